"""The benchmarks: a short form of each command, their statistics, and how they write tables."""

import importlib
import math
import sys
from functools import partial
from pathlib import Path

import jax
import numpy as np
import pytest

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"


@pytest.fixture
def benchmark(monkeypatch, tmp_path):
    """A function that imports a module of the benchmarks; tables go to ``tmp_path``."""
    monkeypatch.syspath_prepend(BENCHMARKS)
    monkeypatch.setattr(sys, "argv", ["pytest"])
    monkeypatch.setattr(importlib.import_module("tables"), "TABLES", tmp_path)
    return importlib.import_module


SLOW = [
    pytest.param(command, marks=pytest.mark.slow)
    for command in (
        "growth",
        "draws",
        "particles",
        "linear_baseline",
        "compile_time",
        "compiled_pyro",
        "convergence",
        "variance",
        "control_variate",
        "discrete",
        "jumps",
        "marginal",
        "toy",
        "vae",
        "digits",
        "scaling",
        "counting",
        "gpu",
    )
]


@pytest.mark.parametrize("command", ["step_time", *SLOW])
def test_smoke(benchmark, command, capsys, tmp_path):
    module = benchmark(command)
    module.main(["--smoke"])
    out = capsys.readouterr().out
    assert out.strip().startswith(f"python benchmarks/{command}.py")
    rows = [line for line in out.splitlines() if line.startswith("| ")]
    assert len(rows) > 2
    assert "nan" not in out
    assert not list(tmp_path.iterdir())  # an incomplete table is not written


@pytest.mark.slow
def test_adaptive_smoke(benchmark, capsys):
    benchmark("adaptive").main(["--smoke"])
    assert capsys.readouterr().out.count("| --- ") > 7


def test_plans(benchmark):
    """Every comparison in the plan runs."""
    step_time, timing, programs = map(benchmark, ("step_time", "timing", "programs"))
    assert list(step_time.PLAN) == list(benchmark("compile_time").PLAN) == list(programs.PROGRAMS)
    h = programs.Pyro
    for name, whats in {(n, whats) for n in programs.names(h) for whats, _ in step_time.PLAN[n]}:
        for what in whats:
            comparison = step_time.comparisons(h)[what]
            mode = timing.particles(h, 2)
            for elbo in (comparison.ours, comparison.theirs):
                timing.PyroSteps(programs.PROGRAMS[name](h, comparison.normal), elbo(**mode)).run(1)


class Side:
    """A side that only records its steps."""

    def __init__(self, name, ran):
        self.name, self.ran = name, ran

    def run(self, steps):
        self.ran.append(self.name)


def test_sides_take_turns(benchmark):
    ran = []
    times = benchmark("timing").alternate(Side("a", ran), Side("b", ran), 4, 1e-9)
    assert times.shape == (4, 2)
    assert "".join(ran[-8:]) == "baabbaab"


def test_verdicts_and_intervals(benchmark):
    timing = benchmark("timing")
    assert [timing.verdict(1.05, *x) for x in ((1.05, 0.9), (1.06, 1.05), (1.07, 1.06))] == ["met", "noise", "missed"]
    x = np.random.default_rng(1).normal(3.0, 1.0, 400)
    median, low, high = timing.median_interval(x)
    assert median == np.median(x)
    assert abs((high - low) / (2 * 1.96 * math.sqrt(math.pi / 2 / 400)) - 1) < 0.3  # the asymptotic interval of a Normal's median


def test_exponent(benchmark):
    exponent = benchmark("growth").exponent
    sizes = (1, 10, 30, 100)
    times = np.array([[5.0, *(n**1.5 for n in sizes[1:])]] * 3)  # only the last decade counts
    assert math.isclose(exponent(times, sizes), 1.5)
    median, low, high = benchmark("timing").median_interval(times, partial(exponent, sizes=sizes))
    assert math.isclose(median, 1.5)
    assert math.isclose(low, high)


# x = 1 + z and f = (x - 1)^2 = z^2; the moments of z are 1, 3, 15, 105. With q, w = sqrt(2) exp(-z^2 / 4), so E_p[w (score f)^2] is
# sqrt(4/3) times an expectation under a Normal of variance 2/3.
BY_HAND = {
    "LR": (15, 105 - 30 + 3 - 4),
    "RP": (4, 12 - 4),
    "ImplicitRP": (4, 12 - 4),
    "LR + leave-one-out": (10 + 2 / 9, 60 - 4 * (1 - 1 / 9) + 2 * 2 / 9),
    "LR, q tempered by 2": (
        math.sqrt(4 / 3) * 15 * (2 / 3) ** 3,
        math.sqrt(4 / 3) * (105 * (2 / 3) ** 4 - 30 * (2 / 3) ** 3 + 3 * (2 / 3) ** 2) - 4,
    ),
    # half the path and half of psi: Var(z) + Cov(2 z, z (z^2 - 1) / 2) + a quarter of LR; in scale the same with z^2 and z^2 - 1
    "half Flow": (1 + 2 * 1 + (10 + 2 / 9) / 4, 2 + 8 + (60 - 4 * (1 - 1 / 9) + 2 * 2 / 9) / 4),
}


@pytest.mark.parametrize("estimator", BY_HAND)
def test_exact_variances(benchmark, estimator):
    variance = benchmark("variance")
    assert set(BY_HAND) == set(variance.OF_FUNCTIONS)
    found = variance.exact_variance(variance.square, 1.0, estimator)
    np.testing.assert_allclose(found, np.array(BY_HAND[estimator]) / variance.K, rtol=1e-10)


def test_exact_means(benchmark):
    """The closed-form derivatives agree with quadrature, and with samples of one of the estimators."""
    variance, programs = benchmark("variance"), benchmark("programs")
    z, mass = np.polynomial.hermite_e.hermegauss(200)
    for make, steepness in variance.FUNCTIONS.values():
        for k in steepness:
            _, slope, gradient = make(np, k)
            in_jax = jax.vmap(jax.grad(make(jax.numpy, k)[0]))
            x = variance.LOC + 0.7 * z
            np.testing.assert_allclose(slope(x), in_jax(x), rtol=1e-10, atol=1e-100)
            np.testing.assert_allclose(gradient(0.7), [slope(x) @ mass / mass.sum(), (z * slope(x)) @ mass / mass.sum()], atol=1e-8)

    n, make, k = 500, variance.cosine, 1.6
    for label in ("half Flow", "LR, q tempered by 2"):
        choice = variance.OF_FUNCTIONS[label]
        found = variance.report(programs.NumPyro, variance.expectation(programs.NumPyro, make, k), choice, n, None, 0)
        exact = make(np, k)[2](variance.SCALE)
        means = np.array([{p.parameter: p.mean for p in found.parameters}[name] for name in ("loc", "scale")])
        error = np.sqrt(variance.exact_variance(make, k, label) / n)
        assert np.all(np.abs(means - exact) < 5 * error)
        assert np.any(np.abs(means - make(np, 1.0)[2](variance.SCALE)) > 5 * error)  # the test rejects the gradient of another function


def test_tables(benchmark, tmp_path):
    tables = benchmark("tables")
    whole = tables.options("benchmarks/step_time.py", "", [])

    def write(said, *rows):
        with tables.table("t", said, ("a", "b"), "About.") as row:
            for cells in rows:
                row(*cells)

    write(whole, (1, 2), (3, 4))
    text = (tmp_path / "t.md").read_text()
    assert text.startswith("    python benchmarks/step_time.py\n\nAbout. Python ")
    assert text.endswith("\n\n| a | b |\n| --- | --- |\n| 1 | 2 |\n| 3 | 4 |\n")
    write(whole, (5, 6))  # replaces the old table
    assert (tmp_path / "t.md").read_text().endswith("| --- | --- |\n| 5 | 6 |\n")
    with pytest.raises(ValueError, match="expected 2 cells, found 3"):
        write(whole, (7, 8), (1, 2, 3))
    for part in (["--smoke"], ["--only", "Pyro"]):
        write(tables.options("benchmarks/step_time.py", "", part), (9, 9))
    assert [path.name for path in tmp_path.iterdir()] == ["t.md"]
    assert (tmp_path / "t.md").read_text().endswith("| 5 | 6 |\n")  # a failed or partial run keeps the old table


def test_only(benchmark):
    said = benchmark("tables").options("x.py", "", ["--only", "Pyro", "10"])
    assert said.wants("Pyro", "eight schools", 10)
    assert not said.wants("NumPyro", "eight schools", 10)
    assert not said.wants("Pyro", "eight schools", 100)


def test_the_figure_of_the_times_to_converge(benchmark, tmp_path):
    """The figure reads the tables in docs: the best of each kind, and a bound if the target was not reached."""
    tables = Path(__file__).parent.parent / "docs" / "tables"
    drawing = benchmark("convergence_figure")
    texts = {host: (tables / f"convergence_{host}.md").read_text() for host in ("numpyro", "pyro")}
    host, default, best, advised = drawing.SIDES
    row = "| p | {} | 0.1 | 1, 2, 3 | 1.0 | {} | | 0.0 |"
    cells = (("A", "> 3"), ("B", "7"), ("TraceFlow_ELBO", "2"), ("best: x", "> 1"), ("recommended: y", "0.1"))
    found = drawing.times("\n".join(row.format(*of_row) for of_row in cells))
    assert found == {"p": {host: (False, 7.0), default: (False, 2.0), best: (True, 1.0), advised: (False, 0.1)}}
    assert len(drawing.times(texts["numpyro"])) == 11
    drawing.draw(texts, tmp_path / "figure.png")
    assert (tmp_path / "figure.png").stat().st_size > 10_000
