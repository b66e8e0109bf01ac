"""The documentation site builds without a warning and without a network, and documents every public name."""

import inspect
import os
import re
import subprocess
import sys
from html.parser import HTMLParser
from importlib import import_module
from pathlib import Path
from shutil import copytree, ignore_patterns
from types import SimpleNamespace

import numpy as np
import pytest
from sphinx.util.inventory import InventoryFile

import flowvi.numpyro
from flowvi import Enumerate

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
    """The index links to every page in its sidebar."""
    linked = set(re.findall(r'href="([\w/.]+)\.html', (site / "index.html").read_text()))
    assert linked.issuperset({*PAGES, "gallery/index"} - {"index"})
    for page in PAGES:
        assert "<h1>" in (site / f"{page}.html").read_text()


class Loaded(HTMLParser):
    """The files that a browser loads to show a page."""

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
    """The site, built from a copy of its sources, without running the scripts of the gallery."""
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


@pytest.mark.slow  # half a minute; `.ci/run` runs it
def test_site(tmp_path):
    """This is one test, so that the site is built only once."""
    site = built(tmp_path)
    every_public_name_is_in_the_reference(site)
    every_page_is_built_and_linked(site)
    pages_load_nothing_from_a_network(site)
    formulas_are_mathml(site)


@pytest.mark.parametrize("module", ["flowvi", "flowvi.fields", "flowvi.proposals", "flowvi.numpyro", "flowvi.pyro"])
def test_public_docstrings_are_whole(module):
    """Every public docstring, except those of records, has requirements, an example and references."""
    records = ("flowvi.fields.Part", "flowvi.proposals.Density")
    for name in set(public_names(module)) - set(records):
        text = inspect.getdoc(getattr(import_module(module), name.removeprefix(f"{module}.")))
        assert all(part in text for part in ("**Requirements**", "Example:", ">>> ", "References:")), name


README = (ROOT / "README.md").read_text()


def blocks(language):
    """The code blocks of the README in a language, by host."""
    return dict(zip(("numpyro", "pyro"), re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL), strict=True))


@pytest.mark.parametrize("host", ["numpyro", "pyro"])
def test_readme(host, capsys):
    """The script of the README runs, and so does its diff, before and after the change, with the script's model and guide."""
    script = blocks("python")[host]
    few = {"numpyro": ("1000)", "20, progress_bar=False)"), "pyro": ("range(500)", "range(20)")}[host]
    assert few[0] in script
    names = {}
    exec(script.replace(*few), names)
    assert "matters  Enumerate()  estimators['matters']" in capsys.readouterr().out

    diff = blocks("diff")[host]
    names["optimizer"] = names["svi"].optim
    run = "svi.run(jax.random.key(0), 3, progress_bar=False).losses" if host == "numpyro" else "[svi.step() for _ in range(3)]"
    for side, objective in {"-": {"numpyro": "TraceGraph_ELBO", "pyro": "Trace_ELBO"}[host], "+": "TraceFlow_ELBO"}.items():
        code = "\n".join(line[1:] for line in diff.splitlines() if line[0] in (" ", side))
        exec(f"{code}\nlosses = {run}", names)
        assert type(names["loss"]).__name__ == objective
        assert all(np.isfinite(float(loss)) for loss in names["losses"])
    assert len([line for line in diff.splitlines() if line.startswith("+")]) <= 2


def test_readme_asks_for_advice(monkeypatch):
    """The two inline expressions run, with a fake recommendation that takes no time."""
    ask, take = re.findall(r"`([^`\n]*advice[^`\n]*)`", README)
    advice = SimpleNamespace(estimators={"matters": Enumerate()}, options={"entropy": "stl", "num_particles": 4})
    monkeypatch.setattr(flowvi.numpyro, "recommend", lambda model, guide, num_particles: advice)
    names = {"recommend": flowvi.numpyro.recommend, "TraceFlow_ELBO": flowvi.numpyro.TraceFlow_ELBO, "model": None, "guide": None}
    exec(ask, names)
    elbo = eval(take, names)
    assert (elbo.num_particles, elbo.entropy) == (4, "stl")


@pytest.mark.slow
def test_guidance_runs(monkeypatch, capsys):
    """The NumPyro blocks run one after the other, with a fake recommendation and a shorter fit."""
    advice = SimpleNamespace(estimators={"k": Enumerate()}, options={"entropy": "stl", "num_particles": 4})
    monkeypatch.setattr(flowvi.numpyro, "recommend", lambda model, guide, x, y: advice)
    first, second, *_ = re.findall(r"```python\n(.*?)```", (DOCS / "guidance.md").read_text(), re.DOTALL)
    names = {}
    for few in ("range(5)", "400, x, y,", "advice.options}"):
        assert few in second
    second = second.replace("range(5)", "range(2)").replace("400, x, y,", "3, x, y, progress_bar=False,")
    exec(first + second.replace("advice.options}", "advice.options, 'num_samples': 5}"), names)
    assert capsys.readouterr().out.count("Enumerate()") >= 2


def test_readme_is_short():
    lines = README.splitlines()
    assert len(lines) <= 111
    assert lines.index("```diff") < 12
    assert max(len(cell) for line in lines if line.startswith("| ") for cell in line.split(" | ")) < 130


def rows_of(table):
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines() if re.match(r"\| [^-|]", line)][1:]


def test_headline_numbers_are_those_of_the_tables():
    """Both first pages have the speed on the digits, and the number of small programs that the stock objectives get wrong."""
    speed = {row[0]: row[-1] for row in rows_of((DOCS / "tables" / "digits.md").read_text()) if row[1] == "TraceFlow_ELBO"}
    cases = rows_of((DOCS / "_measured" / "stock.md").read_text())
    silent = [row for row in cases if "Error" not in row[3]]
    assert (len(cases), len(silent)) == (13, 12)
    index = (DOCS / "index.md").read_text()
    for page in (README, index):
        assert f"{speed['NumPyro']} times as fast as NumPyro's own objective, and {speed['Pyro']} times as fast as Pyro's" in page
    assert "On twelve small programs with a known gradient, an objective of Pyro or NumPyro is [wrong without an error]" in README


COMMAND = re.compile(r"python ((?:docs|examples|benchmarks)/[\w/]+\.py)")


def test_commands_name_scripts_that_exist():
    named = {script for page in (ROOT / "README.md", *DOCS.glob("*.md")) for script in COMMAND.findall(page.read_text())}
    assert {"docs/measure_choosing.py", "examples/stock/gradients.py", "benchmarks/digits.py"} <= named
    assert [script for script in named if not (ROOT / script).is_file()] == []


def test_every_measured_table_has_its_page():
    included = {name for page in DOCS.glob("*.md") for name in re.findall(r"{include} _measured/(\w+)\.md", page.read_text())}
    assert included == {table.stem for table in (DOCS / "_measured").glob("*.md")}


def test_every_table_of_the_benchmarks_is_shown():
    included = [name for page in DOCS.glob("*.md") for name in re.findall(r"{include} tables/(\w+)\.md", page.read_text())]
    assert sorted(included) == sorted(table.stem for table in (DOCS / "tables").glob("*.md"))


def test_summary_of_step_times():
    """The lowest and highest medians on the page are those of the tables."""
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


def test_summary_of_convergence():
    """The medians on the page are those of the tables."""
    text = " ".join((DOCS / "performance.md").read_text().split())
    for table in (DOCS / "tables").glob("convergence_*.md"):
        default, best, advised = (row[-2] for row in rows_of(table.read_text())[-3:])
        assert f"{default} times with flowvi's default, {best} times with options that are chosen by hand" in text
        assert f"{advised} times with what [`recommend`](guidance.md) chooses" in text


@pytest.mark.slow
@pytest.mark.parametrize(
    "command", [["docs/measure_choosing.py", "--smoke"], ["examples/stock/gradients.py", "renyi_bound_of_a_discrete_site"]]
)
def test_measurements_run(command):
    environment = {**os.environ, "JAX_DISABLE_MOST_OPTIMIZATIONS": "1", "PYTHONPATH": str(ROOT)}
    result = subprocess.run([sys.executable, *command], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    assert "exact" in result.stdout


def test_numbers_of_the_decision_table_are_measured():
    """Each number in the last column is in a table of the linked section."""
    page = (DOCS / "choosing.md").read_text()
    sections = dict(re.findall(r"^## (.+?)\n(.*?)(?=^## |\Z)", page, re.MULTILINE | re.DOTALL))
    anchors = {title.lower().replace(" ", "-"): text for title, text in sections.items()}
    rows = re.findall(r"\| \[([^\]]+)\]\(#([\w-]+)\) \|$", page, re.MULTILINE)
    assert len(rows) == 9
    for numbers, anchor in rows:
        tables = "".join(
            (DOCS / "_measured" / f"{name}.md").read_text() for name in re.findall(r"_measured/(\w+)\.md", anchors[anchor])
        )
        for number in numbers.removeprefix("refused → ").split(" → "):
            assert f" {number} |" in tables, (anchor, number)
