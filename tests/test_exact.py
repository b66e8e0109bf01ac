"""Mean and variance of every row of exact.json that flowvi can express, against the exact ones, in both hosts."""

import numpy as np
import pytest
from cases import CASES, ELSEWHERE, EXACT, KINDS, elsewhere, one, square
from hosts import HOSTS, each, z_scores

from flowvi import LR, RP, Flow

N = 40_000


def variance_z_scores(samples, variance):
    """z-scores of the sample variance, with its own sampling error."""
    d2 = (samples - samples.mean(0)) ** 2
    return (d2.mean(0) - np.asarray(variance)) / np.maximum(d2.std(0) / np.sqrt(len(samples)), 1e-9)


def rows():
    """The id of each test, the case and the row."""
    for name, case in CASES.items():
        for row in EXACT[name.split(",")[0]]["estimators"]:
            label, q = row["estimator"], row["q"]
            if label in case.estimators and q in case.proposals and not elsewhere(name, row):
                yield f"{name}-{label}-{q}".replace(" ", "_"), (name, row)


# with an order of the coordinates, the variance depends on a constant added to the logits, which Pyro removes
NORMALISED = ("telescoping field, coordinates (0,1)", "telescoping field, coordinates (1,0)")


def test_every_row_is_accounted_for():
    tested = {(name.split(",")[0], row["estimator"], row["q"]) for _, (name, row) in rows()}
    missing = [
        (case, row["estimator"], row["q"])
        for case, exact in EXACT.items()
        for row in exact["estimators"]
        if (case, row["estimator"], row["q"]) not in tested and not elsewhere(case, row)
    ]
    assert not missing
    unknown = [key for key in ELSEWHERE if key[0] not in EXACT]
    assert not unknown


def slow_in_numpyro(value):
    """Rows with another sampling density, except in one case, and rows with the default dependencies."""
    name, row = value
    return name.endswith(", graph") or (row["q"] != "p" and not name.startswith("normal-loc-square"))


@each(("name", "row"), dict(rows()), slow_in_numpyro=slow_in_numpyro)
def test_row(host, name, row):
    if name == "truncnormal-loc" and host.name == "pyro":
        pytest.skip("Pyro has no truncated Normal")
    case = CASES[name]
    make_q = case.proposals[row["q"]]
    estimators = case.estimators[row["estimator"]](host, make_q and make_q(host))
    if message := case.refused.get(row["estimator"]):
        with pytest.raises(ValueError, match=message):
            host.gradients(case.program, 4, estimators=estimators)
        return
    assert row["unbiased"]
    truth = EXACT[name.split(",")[0]]["gradient"]
    options = {"estimators": estimators, "entropy": "stl" if "STL" in row["estimator"] else "full"}
    if case.dependencies:
        options["dependencies"] = case.dependencies
    samples = host.gradients(case.program, N, **options)
    assert np.all(np.abs(z_scores(samples, truth, row["variance"])) < 5)
    if row["q"] not in case.heavy and not (host.name == "pyro" and row["estimator"] in NORMALISED):
        assert np.all(np.abs(variance_z_scores(samples, row["variance"])) < 5)

    four = {"particles": 4, "seed": 1, **options}
    for vectorize in (True, False) if host.name == "pyro" else (True,):  # test_row_looped_in_numpyro has NumPyro's loop
        samples = host.gradients(case.program, N // 4, vectorize=vectorize, **four)
        error = samples.std(0) / np.sqrt(len(samples)) + 1e-9  # the leave-one-out baseline changes the variance
        assert np.all(np.abs(samples.mean(0) - truth) < 5 * error)


def looped_rows():
    """In NumPyro a loop over particles is compiled separately, so most rows are slow tests."""
    quick = ("normal-scale-square", "normal-to-bernoulli", "plate4", "elbo-normal-normal-off", "mvn")
    for label, (name, row) in rows():
        marks = [] if name.startswith(quick) and "graph" not in name and row["q"] != "N(loc,(1.4 scale)^2)" else [pytest.mark.slow]
        yield pytest.param(name, row, id=label, marks=marks)


@pytest.mark.parametrize(("name", "row"), list(looped_rows()))
def test_row_looped_in_numpyro(name, row):
    host, case = HOSTS["numpyro"], CASES[name]
    if row["estimator"] in case.refused:
        pytest.skip("refused, in test_row")
    make_q = case.proposals[row["q"]]
    options = {"particles": 4, "estimators": case.estimators[row["estimator"]](host, make_q and make_q(host))}
    if case.dependencies:
        options["dependencies"] = case.dependencies
    looped, vectorized = (host.gradients(case.program, 100, vectorize=v, **options) for v in (False, True))
    np.testing.assert_allclose(looped, vectorized, rtol=1e-9, atol=1e-9)


TRAPS = {
    "chain-nonlinear-two-costs": {
        "TRAP detach_parent x1:RP x2:LR": ("RP", "LR", None),
        "TRAP live_logq_x2 x1:LR x2:LR": ("LR", "LR", None),
        "TRAP own_weight_only x1:LR x2:LR": ("LR", "LR", True),
        "TRAP psi_local_cost_only x1:LR x2:LR": ("LR", "LR", None),
        "TRAP cost_detached x1:RP x2:RP": ("RP", "RP", None),
        "TRAP theta_in_cost_detached x1:RP x2:RP": ("RP", "RP", None),
    },
    "normal-to-bernoulli": {"TRAP detach_parent x:RP b:LR": ("RP", "LR", None)},
}


@pytest.mark.parametrize(("name", "trap"), [(name, trap) for name, traps in TRAPS.items() for trap in traps])
def test_trap(host, name, trap):
    """The estimate is right, and far from the value that the bug would give."""
    case, exact = CASES[name], EXACT[name]
    first, second, q = TRAPS[name][trap]
    names = ("x1", "x2") if name.startswith("chain") else ("x", "b")
    estimators = case.estimators[f"{names[0]}:{first} {names[1]}:{second}"](host, q)
    wrong = next(row["mean"] for row in exact["estimators"] if row["estimator"] == trap)
    samples = np.concatenate([host.gradients(case.program, 100_000, seed=seed, estimators=estimators) for seed in range(3)])
    error = samples.std(0) / np.sqrt(len(samples))
    assert np.all(np.abs(samples.mean(0) - exact["gradient"]) < 5 * error)
    assert np.any(np.abs(samples.mean(0) - wrong) > 5 * error)


@pytest.mark.parametrize("kind", ["LR", "RP"])
@pytest.mark.parametrize("particles", [1, 2, 4, 10])
def test_leave_one_out(host, kind, particles):
    program = one(0.3, lambda h, t: h.dist.Normal(t, h.array(0.9)), square)
    for row in EXACT["leave-one-out-baseline"]["estimators"]:
        row_kind, *label = row["estimator"].split(" ", 2)
        if row_kind == kind and label[0] == f"K={particles}":
            baseline = "loo" if label[1:] == ["leave-one-out"] else None
            samples = host.gradients(program, N, particles=particles, estimators={"x": KINDS[kind](None)}, baseline=baseline)
            assert abs(z_scores(samples, 0.6, row["variance"])) < 5
            assert abs(variance_z_scores(samples, row["variance"])) < 5


@pytest.mark.parametrize("kind", ["LR", "RP"])
def test_plain_weights(host, kind):
    program = one(0.3, lambda h, t: h.dist.Normal(t, h.array(0.9)), square)
    row = next(r for r in EXACT["self-normalised-K2"]["estimators"] if r["estimator"] == f"{kind} plain weights K=2")
    q = lambda p: host.dist.Normal(p.loc, 1.5 * p.scale)
    samples = host.gradients(program, N, particles=2, estimators={"x": KINDS[kind](q)}, baseline=None)
    assert abs(z_scores(samples, 0.6, row["variance"])) < 5
    assert abs(variance_z_scores(samples, row["variance"])) < 5
    if kind == "LR":  # and not that of self-normalised weights
        wrong = next(r["mean"] for r in EXACT["self-normalised-K2"]["estimators"] if r["estimator"].startswith("TRAP LR"))
        assert abs(z_scores(samples, wrong, row["variance"])) > 5


def test_the_tests_can_fail(host):
    """The same z-scores reject a field with the wrong divergence, and a mask without its gradient term."""
    case, truth = CASES["normal-loc-step-smooth"], EXACT["normal-loc-step-smooth"]["gradient"]

    def mask(x):
        return 1 - host.math.exp(-((x - 0.9) ** 2) / (2 * 0.8**2))

    def velocity(x, p, dtheta):
        return mask(x) * dtheta.loc

    wrong = Flow(velocity, divergence=lambda x, p, dtheta: 0 * x * dtheta.loc)
    for estimator, rejected in ((wrong, True), (Flow(velocity), False), (RP(), True), (LR(), False)):
        samples = host.gradients(case.program, N, estimators={"x": estimator})
        assert (np.abs(z_scores(samples, truth, samples.var(0))) > 5).all() == rejected
