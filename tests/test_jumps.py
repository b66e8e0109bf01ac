"""Declared jumps of the cost: with the surface term, pathwise derivatives are right, in both hosts."""

import numpy as np
import pytest
from cases import CASES, EXACT
from hosts import Program, z_scores
from scipy import stats

from flowvi import LR, RP, Enumerate, Flow, ImplicitRP, fields
from flowvi.jumps import jump_comparison

M, S, T = 0.3, 0.8, 0.5
Z = (T - M) / S
MEAN = np.array([3 + 4 * stats.norm.pdf(Z) / S, 4 * stats.norm.pdf(Z) * Z / S])


def program(at=lambda t: T):
    """The cost 3 x + 4 [x > at] under Normal(t0, t1)."""

    def guide(h, t):
        h.sample("x", h.dist.Normal(t[0], t[1]).mask(False))

    def model(h, t):
        x = h.sample("x", h.dist.Normal(h.array(0.0), h.array(1.0)).mask(False))
        h.factor("cost", 3 * x + 4 * h.math.where(x > at(t), 1.0, 0.0))

    return Program(guide, model, (M, S))


RIGHT = {
    "RP": RP(jumps=[T]),
    "the cdf": ImplicitRP(jumps=(T,)),
    "a pathwise field": Flow(fields.location_scale(), jumps=[T]),
    "half of it": Flow(loc=lambda x, p: 0.5, scale=lambda x, p: 0.5 * (x - p.loc) / p.scale, jumps=[T]),
    "a proposal": RP(lambda p: type(p)(p.loc, 1.3 * p.scale), jumps=[T]),
    "LR, to which a jump that stays is nothing": LR(jumps=[T]),
}


@pytest.mark.parametrize("name", RIGHT)
@pytest.mark.parametrize("particles", [1, 4])
def test_unbiased(host, name, particles):
    samples = host.gradients(program(), 20_000, particles=particles, estimators={"x": RIGHT[name]})
    assert np.all(np.abs(z_scores(samples, MEAN)) < 5)


def test_the_derivative_in_loc_has_no_noise(host):
    samples = host.gradients(program(), 200, estimators={"x": RP(jumps=[T])})
    np.testing.assert_allclose(samples[:, 0], MEAN[0], rtol=1e-10)
    wrong = host.gradients(program(), 200, estimators={"x": RP()})
    np.testing.assert_allclose(wrong[:, 0], 3.0, rtol=1e-10)  # without the term of the jump


def test_a_wrong_sign_is_rejected(host, monkeypatch):
    def flipped(ops, target, x, jumps, velocity):
        return jump_comparison(ops, target, x, jumps, lambda t: -velocity(t))

    monkeypatch.setattr("flowvi.estimators.estimator.jump_comparison", flipped)
    samples = host.gradients(program(), 2000, estimators={"x": RP(jumps=[T])})
    assert np.abs(z_scores(samples, MEAN)).max() > 5


@pytest.mark.parametrize("estimator", [LR, RP])
def test_a_jump_that_moves(host, estimator):
    """A jump at t = m / 2 + 0.35 moves at half the speed of the samples, so the flux is half as large."""
    at = lambda t: t[0] / 2 + 0.35
    exact = np.array([3 + 2 * stats.norm.pdf(Z) / S, MEAN[1]])
    choose = lambda h, t: {"x": estimator(jumps=[at(t)])}
    samples = host.gradients_with(program(at), 20_000, choose)
    assert np.all(np.abs(z_scores(samples, exact)) < 5)
    if estimator is LR:
        biased = host.gradients(program(at), 20_000, estimators={"x": LR()})
        assert np.abs(z_scores(biased, exact)).max() > 5


def test_elements_of_a_plate_and_of_an_event(host):
    """Each element has its own jump. A plate takes one run above and one below; an event takes both for each coordinate."""
    jumps = np.array([0.2, -0.4, 0.9])
    exact = np.array([stats.norm.pdf((jumps - M) / S).sum() / S])

    def of(event):
        def site(h, loc):
            fn = h.dist.Normal(loc, h.array(S)).expand([3]) if event else h.dist.Normal(loc, h.array(S))
            return (fn.to_event(1) if event else fn).mask(False)

        def guide(h, t):
            if event:
                h.sample("x", site(h, t[0][..., None] if h.name == "pyro" else t[0]))
            else:
                with h.plate("n", 3):
                    h.sample("x", site(h, t[0]))

        def model(h, t):
            if event:
                x = h.sample("x", site(h, h.array(0.0)))
                h.factor("cost", h.math.where(x > h.array(jumps), 1.0, 0.0).sum(-1))
            else:
                with h.plate("n", 3):
                    x = h.sample("x", site(h, h.array(0.0)))
                    h.factor("cost", h.math.where(x > h.array(jumps), 1.0, 0.0))

        return Program(guide, model, (M,), plates=0 if event else 1)

    estimators = {"x": RP(jumps=[host.array(jumps)])}
    events = (False,) if host.name == "pyro" else (False, True)  # in Pyro the replicates cannot be a plate around an event
    for event in events:
        samples = host.gradients(of(event), 50, estimators=estimators)
        np.testing.assert_allclose(samples, np.broadcast_to(exact, samples.shape), rtol=1e-9)


@pytest.mark.parametrize("beside", [RP(jumps=[T]), LR(), Enumerate()])
def test_a_proposal_keeps_its_weight_in_the_other_runs(host, beside):
    """With two jumps in one cost, or a jump and another compared site, the runs of both have the weight of x."""
    discrete = not isinstance(beside, RP)

    def law(h, of_y):
        return (h.dist.Bernoulli(logits=of_y) if discrete else h.dist.Normal(of_y, 1.0)).mask(False)

    def guide(h, t):
        h.sample("x", h.dist.Normal(t[0], 1.0).mask(False))
        h.sample("y", law(h, t[1]))

    def model(h, t):
        x = h.sample("x", h.dist.Normal(h.array(0.0), h.array(1.0)).mask(False))
        y = h.sample("y", law(h, h.array(0.0)))
        h.factor("cost", h.math.where(x > T, 1.0, 0.0) * ((1 + y) if discrete else h.math.where(y > T, 1.0, 0.0)))

    m, r = 0.3, -0.2
    rise, above = stats.norm.pdf(T - m), stats.norm.sf(T - m)
    p = 1 / (1 + np.exp(-r))
    exact = [rise * (1 + p), above * p * (1 - p)] if discrete else [rise * stats.norm.sf(T - r), above * stats.norm.pdf(T - r)]
    proposal = lambda p: type(p)(p.loc + 0.6, 1.3 * p.scale)
    estimators = {"x": RP(proposal, jumps=[T]), "y": beside}
    samples = host.gradients(Program(guide, model, (m, r)), 20_000, estimators=estimators)
    assert np.all(np.abs(z_scores(samples, exact)) < 5), samples.mean(0)


def test_a_gamma_without_a_cdf_that_torch_differentiates(host):
    def guide(h, t):
        h.sample("x", h.dist.Gamma(t[0], t[1]).mask(False))

    def model(h, t):
        x = h.sample("x", h.dist.Gamma(h.array(1.0), h.array(1.0)).mask(False))
        h.factor("cost", h.math.where(x > 1.1, 1.0, 0.0))

    survival = lambda a, b: stats.gamma.sf(1.1, a, scale=1 / b)
    a, b, e = 1.7, 1.3, 1e-5
    exact = [(survival(a + e, b) - survival(a - e, b)) / (2 * e), (survival(a, b + e) - survival(a, b - e)) / (2 * e)]
    estimator = Flow(fields.gamma_implicit(), jumps=[1.1])
    samples = host.gradients(Program(guide, model, (a, b)), 20, estimators={"x": estimator})
    np.testing.assert_allclose(samples, np.broadcast_to(exact, samples.shape), rtol=1e-6)


def test_a_branch_on_a_continuous_site(host):
    """The branch of a row of exact.json at which pathwise estimators are biased."""
    exact = np.atleast_1d(EXACT["branch-on-continuous"]["gradient"])
    case = CASES["branch-on-continuous"]
    samples = host.gradients(case.program, 40_000, estimators={"x": RP(jumps=[0.0]), "y": RP()})
    assert np.all(np.abs(z_scores(samples, exact)) < 5)
    trap = host.gradients(case.program, 40_000, estimators={"x": RP(), "y": RP()})
    assert np.abs(z_scores(trap, exact)).max() > 5


@pytest.mark.parametrize(
    ("fn", "found"),
    [
        (lambda h: h.dist.Dirichlet(h.array([1.0, 2.0])), "found Dirichlet"),
        (
            lambda h: h.dist.TransformedDistribution(h.dist.Normal(h.array(0.0), 1.0), [h.dist.transforms.ExpTransform()]),
            "under a transform",
        ),
    ],
)
def test_refused(host, fn, found):
    def part(h, t):
        h.sample("x", fn(h))

    with pytest.raises(ValueError, match=f"site 'x': jumps=... is for a continuous scalar family .*{found}"):
        host.gradients(Program(part, part, (0.3,)), 1, estimators={"x": LR(jumps=[0.5])} if "Dir" in found else {"x": RP(jumps=[0.5])})


def test_what_is_no_sequence():
    with pytest.raises(TypeError, match=r"RP: expected jumps=\[t, ...\], found 0.5"):
        RP(jumps=0.5)
    assert RP(jumps=[0.5]) == RP(jumps=(0.5,))
    assert repr(RP(jumps=[0.5])) == "RP(jumps=(0.5,))"
