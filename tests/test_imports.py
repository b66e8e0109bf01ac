"""Each part imports without packages that it does not need, and says what to install if a package is missing."""

import ast
import re
from importlib import import_module
from importlib.metadata import PackageNotFoundError
from pathlib import Path

import pytest
from processes import run

import flowvi
from flowvi.__main__ import report

EVERYTHING = ("jax", "numpyro", "torch", "pyro")


LOADED = "print([name for name in ('jax', 'numpyro', 'torch', 'pyro') if sys.modules.get(name)])"


@pytest.mark.parametrize(
    ("module", "blocked", "loaded"),
    [
        ("flowvi", EVERYTHING, []),
        ("flowvi", (), []),
        ("flowvi.numpyro", ("torch", "pyro"), ["jax", "numpyro"]),
        ("flowvi.pyro", ("jax", "numpyro"), ["torch", "pyro"]),
    ],
)
def test_imports_alone(module, blocked, loaded):
    assert run(blocked, f"import {module}\n{LOADED}") == str(loaded)


def test_estimators_need_no_host():
    code = "import flowvi\nprint(flowvi.Flow(loc=lambda x, p: 0.5), flowvi.LR(), flowvi.__version__)"
    assert run(EVERYTHING, code).startswith("Flow(velocity=fields.per_element(loc=<lambda>)) LR() ")


@pytest.mark.parametrize(
    ("module", "modules"),
    [("flowvi", {"guidance", "numpyro", "plot", "pyro", "report"}), ("flowvi.numpyro", set()), ("flowvi.pyro", set())],
)
def test_tab_completion_offers_the_public_names_only(module, modules):
    found = import_module(module)
    offered = {name for name in dir(found) if not name.startswith("_")}
    assert {*found.__all__} <= offered <= {*found.__all__, *modules}


@pytest.mark.parametrize(
    ("module", "missing", "hint"),
    [
        ("flowvi.numpyro", "numpyro", "pip install 'flowvi[numpyro]'"),
        ("flowvi.numpyro", "jax", "pip install 'flowvi[numpyro]'"),
        ("flowvi.pyro", "pyro", "pip install 'flowvi[pyro]'"),
        ("flowvi.pyro", "torch", "pip install 'flowvi[pyro]'"),
    ],
)
def test_a_missing_host_says_what_to_install(module, missing, hint):
    code = f"try:\n    import {module}\nexcept ImportError as error:\n    print(error.__notes__)"
    assert hint in run((missing,), code)


@pytest.mark.parametrize("blocked", [(), ("jax", "numpyro"), EVERYTHING])
def test_the_command_for_bug_reports(blocked):
    """The command prints versions and devices, and says if a library cannot be imported."""
    first, *adapters = run(blocked, "import runpy\nrunpy.run_module('flowvi', run_name='__main__')").splitlines()
    assert first.startswith(f"flowvi {flowvi.__version__}, Python 3.")
    for line, (adapter, package) in zip(adapters, {"flowvi.numpyro": "jax", "flowvi.pyro": "torch"}.items(), strict=True):
        assert re.match(rf"{adapter}: .*{package} \d", line)
        assert ("cannot be imported: ModuleNotFoundError" if package in blocked else "; devices: ") in line


def test_a_library_that_is_not_installed(monkeypatch):
    def version(package):
        raise PackageNotFoundError(package)

    monkeypatch.setattr("flowvi.__main__.version", version)
    assert list(report())[1:] == ["flowvi.numpyro: numpyro is not installed", "flowvi.pyro: pyro-ppl is not installed"]


PROJECT = Path(__file__).parent.parent


def test_the_version_to_cite():
    assert f"\nversion: {flowvi.__version__}\n" in (PROJECT / "CITATION.cff").read_text()


def test_the_oldest_versions_are_those_that_are_tested():
    """The lower bounds of pyproject.toml are the tested oldest versions; jaxlib comes with jax."""
    oldest = re.findall(r"^([\w-]+)==(.+)$", (PROJECT / "constraints-oldest.txt").read_text(), re.MULTILINE)
    bounds = re.findall(
        r'"([\w-]+)>=([\d.]+)"', re.search(r"^numpyro = .*\npyro = .*$", (PROJECT / "pyproject.toml").read_text(), re.M)[0]
    )
    assert sorted(bounds) == sorted(pair for pair in oldest if pair[0] != "jaxlib")


# ---- the direction of dependencies

ROOT = Path(flowvi.__file__).parent
BACKENDS = {"jax", "numpyro", "torch", "pyro"}
ADAPTERS = ("flowvi.numpyro", "flowvi.pyro", "flowvi.ops.jax", "flowvi.ops.torch")


def imported_by(path):
    """The modules that a file imports, also inside functions, without those for type checkers only."""
    tree = ast.parse(path.read_text())
    guarded = [n for n in ast.walk(tree) if isinstance(n, ast.If) and getattr(n.test, "id", "") == "TYPE_CHECKING"]
    skipped = {inner for n in guarded for inner in ast.walk(n)}
    for node in ast.walk(tree):
        if node in skipped:
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Call) and getattr(node.func, "id", getattr(node.func, "attr", "")) == "import_module":
            yield from (a.value for a in node.args if isinstance(a, ast.Constant))


MODULES = {".".join(path.relative_to(ROOT.parent).with_suffix("").parts).removesuffix(".__init__"): path for path in ROOT.rglob("*.py")}
COMMAND = "flowvi.__main__"  # the command looks for the adapters
CORE = [name for name in MODULES if not name.startswith(ADAPTERS) and name != COMMAND]


@pytest.mark.parametrize("name", CORE)
def test_the_core_imports_no_adapter_and_no_backend(name):
    found = [m for m in imported_by(MODULES[name]) if m.split(".")[0] in BACKENDS or m.startswith(ADAPTERS)]
    assert found == []


SIDES = {
    "numpyro": ("flowvi.numpyro", "flowvi.ops.jax", "jax", "numpyro"),
    "pyro": ("flowvi.pyro", "flowvi.ops.torch", "torch", "pyro"),
}


@pytest.mark.parametrize("side", SIDES)
def test_adapters_do_not_import_each_other(side):
    (other,) = (prefixes for name, prefixes in SIDES.items() if name != side)
    for name in MODULES:
        if name.startswith(SIDES[side][:2]):
            assert not [m for m in imported_by(MODULES[name]) if m.split(".")[0] in other or m.startswith(other[:2])], name


def test_no_imports_in_a_circle():
    """No imports form a circle, except through the ``__init__`` of a package, which collects the names of its modules."""
    packages = {name for name, path in MODULES.items() if path.name == "__init__.py"}
    graph = {
        name: {m for m in imported_by(path) if m in MODULES and m != name and m not in packages}
        for name, path in MODULES.items()
        if name not in packages
    }
    done: set[str] = set()

    def visit(name, way):
        assert name not in way, f"imported in a circle: {' -> '.join([*way, name])}"
        if name not in done:
            for m in graph[name]:
                visit(m, [*way, name])
            done.add(name)

    for name in graph:
        visit(name, [])


def test_a_circle_and_a_hidden_import_are_seen(tmp_path):
    hidden = tmp_path / "hidden.py"
    hidden.write_text("from importlib import import_module\ndef f():\n    import torch\n    import_module('flowvi.pyro.host')\n")
    assert {"torch", "flowvi.pyro.host"} <= set(imported_by(hidden))
