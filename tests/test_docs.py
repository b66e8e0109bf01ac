"""The documentation site builds without a warning and without a network, and misses no public name."""

import inspect
import os
import re
import subprocess
import sys
from html.parser import HTMLParser
from importlib import import_module
from pathlib import Path
from shutil import copytree, ignore_patterns

import pytest
from sphinx.util.inventory import InventoryFile

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
sys.path.insert(0, str(DOCS / "_ext"))

from public_names import MODULES, missing, public_names  # noqa: E402

PAGES = sorted(page.stem for page in DOCS.glob("*.md"))


def every_public_name_is_in_the_reference(site):
    objects = InventoryFile.loads((site / "objects.inv").read_bytes(), uri="").data
    documented = {name for kind, names in objects.items() if kind.startswith("py:") for name in names}
    assert missing(documented) == []
    for module in MODULES:
        (some, *_) = public_names(module)
        assert missing(documented - {some}) == [some]


def every_page_is_built_and_linked(site):
    """From the index, whose sidebar lists every page."""
    linked = set(re.findall(r'href="([\w/.]+)\.html', (site / "index.html").read_text()))
    assert linked.issuperset({*PAGES, "gallery/index"} - {"index"})
    for page in PAGES:
        assert "<h1>" in (site / f"{page}.html").read_text()


class Loaded(HTMLParser):
    """What a browser fetches to show a page."""

    def __init__(self):
        super().__init__()
        self.sources = []

    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        if tag in ("script", "img", "iframe") or (tag == "link" and attrs.get("rel") in ("stylesheet", "preload", "icon")):
            self.sources += [attrs[name] for name in ("src", "href") if attrs.get(name)]


def pages_load_nothing_from_a_network(site):
    for page in site.rglob("*.html"):
        parser = Loaded()
        parser.feed(page.read_text())
        assert parser.sources
        assert not [source for source in parser.sources if source.startswith(("http:", "https:", "//"))], page
    for style in site.rglob("*.css"):
        assert not re.search(r"(url\(|@import)\s*[\"']?(https?:)?//", style.read_text()), style


def formulas_are_mathml(site):
    theory = (site / "theory.html").read_text()
    assert theory.count("<math") > 30
    assert "\\nabla" not in theory
    assert "<math" in (site / "api" / "flowvi.html").read_text()


def built(root):
    """The site, built from a copy of what it is made of; the gallery's scripts are shown but not run."""
    generated = ignore_patterns("_build", "api", "gallery", "__pycache__")
    for part in ("docs", "examples"):
        copytree(ROOT / part, root / part, ignore=generated)
    for file in ROOT.glob("*.md"):
        (root / file.name).write_text(file.read_text())
    command = [sys.executable, "-m", "sphinx", "-W", "--keep-going", "-q", "-b", "html", "-D", "plot_gallery=0", "docs", "html"]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    result = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, timeout=600)
    assert result.returncode == 0, result.stderr
    return root / "html"


def test_site(tmp_path):
    """One test, so that one process builds the site once."""
    site = built(tmp_path)
    every_public_name_is_in_the_reference(site)
    every_page_is_built_and_linked(site)
    pages_load_nothing_from_a_network(site)
    formulas_are_mathml(site)


@pytest.mark.parametrize("module", ["flowvi", "flowvi.fields", "flowvi.proposals", "flowvi.numpyro", "flowvi.pyro"])
def test_public_docstrings_are_whole(module):
    """What is public, but for records, says what it requires, shows an example and names its source."""
    records = ("flowvi.fields.Part", "flowvi.proposals.Density")
    for name in set(public_names(module)) - set(records):
        text = inspect.getdoc(getattr(import_module(module), name.removeprefix(f"{module}.")))
        assert all(part in text for part in ("**Requirements**", "Example:", ">>> ", "References:")), name


COMMAND = re.compile(r"python ((?:docs|examples|benchmarks)/[\w/]+\.py)")


def test_commands_name_scripts_that_exist():
    named = {script for page in DOCS.glob("*.md") for script in COMMAND.findall(page.read_text())}
    assert {"docs/measure_choosing.py", "examples/stock/gradients.py"} <= named
    assert [script for script in named if not (ROOT / script).is_file()] == []


def test_every_measured_table_has_its_page():
    included = {name for page in DOCS.glob("*.md") for name in re.findall(r"{include} _measured/(\w+)\.md", page.read_text())}
    assert included == {table.stem for table in (DOCS / "_measured").glob("*.md")}


def test_every_table_of_the_benchmarks_is_shown():
    included = re.findall(r"{include} tables/(\w+)\.md", (DOCS / "performance.md").read_text())
    assert sorted(included) == sorted(table.stem for table in (DOCS / "tables").glob("*.md"))


def test_summary_of_step_times():
    """The lowest and the highest medians that the page names are those of the tables."""
    page = (DOCS / "performance.md").read_text()
    for host in ("numpyro", "pyro"):
        table = (DOCS / "tables" / f"step_time_{host}.md").read_text()
        rows = [line.split(" | ") for line in table.splitlines() if re.search(r"\| \d\.\d{3} \|", line)]
        assert len(rows) > 40
        for what in {row[3] for row in rows}:
            medians = sorted(float(row[4]) for row in rows if row[3] == what)
            ours, theirs = what.replace(", graph", "").split(" / ")
            graph = ', `dependencies="graph"`' if "graph" in what else ""
            (line,) = [x for x in page.splitlines() if x.startswith((f"| `{ours}`{graph} / `{theirs}` |", f"| {ours} / `{theirs}` |"))]
            assert f" {medians[0]:.3f} to {medians[-1]:.3f}" in line, (host, what)


@pytest.mark.parametrize(
    "command", [["docs/measure_choosing.py", "--smoke"], ["examples/stock/gradients.py", "renyi_bound_of_a_discrete_site"]]
)
def test_measurements_run(command):
    environment = {**os.environ, "JAX_DISABLE_MOST_OPTIMIZATIONS": "1", "PYTHONPATH": str(ROOT)}
    result = subprocess.run([sys.executable, *command], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    assert "exact" in result.stdout


def test_numbers_of_the_decision_table_are_measured():
    """Each number of its last column is in the table that the linked section includes."""
    page = (DOCS / "choosing.md").read_text()
    sections = dict(re.findall(r"^## (.+?)\n(.*?)(?=^## |\Z)", page, re.MULTILINE | re.DOTALL))
    anchors = {title.lower().replace(" ", "-"): text for title, text in sections.items()}
    rows = re.findall(r"\| \[([^\]]+)\]\(#([\w-]+)\) \|$", page, re.MULTILINE)
    assert len(rows) == 9
    for numbers, anchor in rows:
        tables = "".join(
            (DOCS / "_measured" / f"{name}.md").read_text() for name in re.findall(r"_measured/(\w+)\.md", anchors[anchor])
        )
        for number in numbers.split(" → "):
            assert f" {number} |" in tables, (anchor, number)
