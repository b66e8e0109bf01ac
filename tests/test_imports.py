"""Each part imports without the packages that it does not need, and says what to install where one that it needs is missing."""

import pytest
from processes import run

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
    assert run(EVERYTHING, code).startswith("Flow(velocity=per_element(loc=<lambda>)) LR() ")


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
