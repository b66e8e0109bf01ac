"""Every bad input has its own error, which names the site."""

import numpy as np
import pytest
from hosts import HOSTS, Program, chain

from flowvi import LR, RP, Auto, Flow, ImplicitRP


def run(host, distribution, estimator, theta=0.3, n=3, **options):
    """The gradients of a program of one site x with the distribution ``(h, theta) -> distribution``."""
    program = chain(theta, {"x": lambda h, t, v: distribution(h, *t)}, {"x": lambda h, t, v: h.math.cos(1.0 * v["x"]).sum()})
    return host.gradients(program, n, estimators={"x": estimator} if estimator is not None else None, **options)


def normal(h, t):
    return h.dist.Normal(t, h.array(1.0))


def vector(h, t):
    return h.dist.Normal(t[..., None] + h.array([0.0, 1.0]), h.array(1.0)).to_event(1)


def mvn(h, t):
    return h.dist.MultivariateNormal(t[..., None] * h.array([1.0, 0.0]), scale_tril=h.array([[1.0, 0.0], [0.5, 1.0]]))


def dirichlet(h, t):
    return h.dist.Dirichlet(1.0 + t[..., None] * h.array([1.0, 2.0, 3.0]))


def exp_and_shift(h, t):
    return [h.dist.transforms.ExpTransform(), h.dist.transforms.AffineTransform(t, 1.0)]


REFUSED = {
    "RP without a reparameterized sampler": (
        lambda h, t: h.dist.VonMises(t, h.array(2.0)),
        lambda h: RP(),
        "site 'x': RP needs a reparameterized sampler, but VonMises has none.*; use LR",
    ),
    "RP at a discrete site": (lambda h, t: h.dist.Bernoulli(t), lambda h: RP(), "site 'x': RP needs .* but Bernoulli.* has none"),
    "ImplicitRP at a discrete site": (
        lambda h, t: h.dist.Bernoulli(t),
        lambda h: ImplicitRP(),
        "site 'x': ImplicitRP needs a continuous distribution, but Bernoulli.* is discrete",
    ),
    "Flow at a discrete site": (
        lambda h, t: h.dist.Bernoulli(t),
        lambda h: Flow(probs=lambda x, p: 1.0),
        "site 'x': Flow needs a continuous distribution",
    ),
    "ImplicitRP without a cdf": (dirichlet, lambda h: ImplicitRP(), "site 'x': ImplicitRP needs a cdf, but Dirichlet has none"),
    "unknown parameter": (
        normal,
        lambda h: Flow(mean=lambda x, p: 1.0),
        "Normal has no parameter 'mean'; its parameters are: loc, scale",
    ),
    "unknown tangent": (
        normal,
        lambda h: Flow(lambda x, p, dtheta: dtheta.mean),
        "site 'x': Normal has no parameter 'mean'; its parameters are: loc, scale",
    ),
    "coupled parameter": (
        mvn,
        lambda h: Flow(scale_tril=lambda x, p: 1.0),
        "site 'x': parameter 'scale_tril' .* does not act coordinate",
    ),
    "a field per parameter on the simplex": (
        dirichlet,
        lambda h: Flow(concentration=lambda x, p: x),
        r"site 'x': a field per parameter cannot stay .*\(simplex\)",
    ),
    "velocity of the wrong shape": (
        vector,
        lambda h: Flow(loc=lambda x, p: h.array([1.0, 2.0, 3.0])),
        "site 'x': the velocity of 'loc' must have the shape of x .* found .*3",
    ),
    "general velocity of the wrong shape": (
        mvn,
        lambda h: Flow(lambda x, p, dtheta: (x * dtheta.loc)[..., None, :] * h.array([[1.0], [1.0]])),
        "site 'x': the velocity must have the shape of x",
    ),
    "standardization of the wrong shape": (
        mvn,
        lambda h: ImplicitRP(lambda x, p: (x - p.loc).sum(-1)),
        "site 'x': the standardization function must return the shape of x",
    ),
    "a field that mixes coordinates": (
        vector,
        lambda h: Flow(loc=lambda x, p: x - x.mean(-1)[..., None]),
        "site 'x': the velocity of 'loc' must be elementwise",
    ),
    "a standardization that mixes coordinates": (
        vector,
        lambda h: ImplicitRP(lambda x, p: x - p.loc + 0.1 * x.sum(-1)[..., None]),
        "site 'x': the standardization function must be elementwise",
    ),
    "q of another event shape": (
        normal,
        lambda h: LR(q=lambda p: mvn(h, h.array(0.3))),
        "site 'x': q.p. must have the event shape of Normal",
    ),
    "q of another batch shape": (
        vector,
        lambda h: LR(q=lambda p: h.dist.Normal(h.array([0.0] * 7), h.array(1.0)).to_event(1)),
        "site 'x': q.p. must have the event shape",
    ),
    "q of a larger batch shape": (
        vector,
        lambda h: ImplicitRP(q=lambda p: h.dist.Normal(h.array([0.0] * 7), h.array(1.0))),
        "site 'x': q.p. must have the batch shape of x or one that expands to it, expected .*2.*found .*7",
    ),
    "q with a smaller support": (
        normal,
        lambda h: LR(q=lambda p: h.dist.Exponential(h.array(1.0))),
        "site 'x': the support of q must cover that of Normal, expected numbers from -inf to inf, found numbers from 0",
    ),
    "q of another kind": (
        normal,
        lambda h: LR(q=lambda p: h.dist.Poisson(h.array(1.0))),
        "site 'x': the support of q must cover that of Normal",
    ),
    "q that is no distribution": (normal, lambda h: LR(q=lambda p: 3.0), "site 'x': q.p. must return a .* distribution, found float"),
    "RP(q) without a known inverse": (dirichlet, lambda h: RP(lambda p: p), "site 'x': RP.q=.* none is known for Dirichlet"),
    "LR on a moving support": (
        lambda h, t: h.dist.Uniform(h.array(0.0), 1 + t),
        lambda h: LR(),
        "site 'x': LR is biased where the support",
    ),
    "Flow on a moving support": (
        lambda h, t: h.dist.Uniform(h.array(0.0), 1 + t),
        lambda h: Flow(high=lambda x, p: x / p.high),
        "site 'x': a Flow field that is not known to move with the bound is biased",
    ),
    "generalised reparameterization on a moving support": (
        lambda h, t: h.dist.Uniform(h.array(0.0), 1 + t),
        lambda h: ImplicitRP(lambda x, p: x, exact=False),
        r"site 'x': ImplicitRP\(exact=False\) is biased where the support",
    ),
    "LR on a base with a boundary that a transform moves": (
        lambda h, t: h.dist.TransformedDistribution(h.dist.Exponential(h.array(1.0)), [h.dist.transforms.AffineTransform(t, 1.0)]),
        lambda h: LR(),
        "site 'x': LR is biased .* moves with AffineTransform",
    ),
    "LR on a boundary that exp makes and a transform moves": (
        lambda h, t: h.dist.TransformedDistribution(h.dist.Laplace(h.array(0.0), h.array(1.0)), exp_and_shift(h, t)),
        lambda h: LR(),
        "site 'x': LR is biased .* moves with AffineTransform",
    ),
    "LR on a boundary that moves inside a composition": (
        lambda h, t: h.dist.TransformedDistribution(
            h.dist.Laplace(h.array(0.0), h.array(1.0)), [h.dist.transforms.ComposeTransform(exp_and_shift(h, t))]
        ),
        lambda h: LR(),
        "site 'x': LR is biased .* moves with AffineTransform",
    ),
    "LR on a transformed base that is itself transformed": (
        lambda h, t: h.dist.TransformedDistribution(
            h.dist.TransformedDistribution(h.dist.Exponential(h.array(1.0)), [h.dist.transforms.AffineTransform(t, 1.0)]),
            [h.dist.transforms.AffineTransform(1.0, 2.0)],
        ),
        lambda h: LR(),
        "site 'x': LR is biased .* moves with AffineTransform",
    ),
    "LR on a base whose own support moves": (
        lambda h, t: h.dist.TransformedDistribution(h.dist.Uniform(0.0, 1 + t), [h.dist.transforms.AffineTransform(1.0, 2.0)]),
        lambda h: LR(),
        "site 'x': LR is biased .* moves with its base's upper bound",
    ),
    "LR on a folded base whose support moves": (
        lambda h, t: h.dist.FoldedDistribution(h.dist.Uniform(0.0, 1 + t)),
        lambda h: LR(),
        "site 'x': LR is biased .* moves with its base's upper bound",
    ),
    "a thin support without a chart": (
        lambda h, t: h.dist.LKJCholesky(3, 1.0 + t),
        lambda h: Flow(lambda x, p, dtheta: 0 * x * dtheta.concentration[..., None, None]),
        "site 'x': the divergence on a support of lower dimension .Cholesky factors of correlation",
    ),
    "Estimated around the base": (
        lambda h, t: h.dist.TransformedDistribution(h.flow.Estimated(normal(h, t), LR()), [h.dist.transforms.ExpTransform()]),
        lambda h: None,
        "Estimated must wrap the whole TransformedDistribution",
    ),
}


@pytest.mark.parametrize("what", REFUSED)
def test_refused(host, what):
    distribution, estimator, message = REFUSED[what]
    with pytest.raises(ValueError, match=message):
        run(host, distribution, estimator(host))


NOT_DIFFERENTIABLE = {
    "numpyro": (lambda h, t: h.dist.Beta(1 + t, h.array(2.0)), "cdf of Beta cannot be differentiated"),
    "pyro": (lambda h, t: h.dist.Gamma(1 + t, h.array(2.0)), "cdf of Gamma has no derivative in the concentration"),
}


def test_cdf_without_a_derivative(host):
    distribution, message = NOT_DIFFERENTIABLE[host.name]
    with pytest.raises(ValueError, match=f"site 'x': .*{message}.*use RP"):
        run(host, distribution, ImplicitRP())


def test_rp_with_a_proposal_for_live_degrees_of_freedom(host):
    with pytest.raises(ValueError, match="site 'x': .*StudentT only for a constant df"):
        run(host, lambda h, t: h.dist.StudentT(4 + t, h.array(0.0), h.array(1.0)), RP(lambda p: p))


def test_sticking_the_landing_on_a_moving_support(host):
    with pytest.raises(
        ValueError, match="site 'x': entropy='stl' is biased where the support moves with a parameter, but the support of Uniform"
    ):
        run(host, lambda h, t: h.dist.Uniform(h.array(0.0), 1 + t), RP(), entropy="stl")

    def shifted(h, t):
        return h.dist.TransformedDistribution(h.dist.Exponential(h.array(1.0)), [h.dist.transforms.AffineTransform(t, 1.0)])

    with pytest.raises(ValueError, match="site 'x': entropy='stl' is biased .* moves with AffineTransform"):
        run(host, shifted, RP(), entropy="stl")


def eager(host, distribution, estimator, theta=0.3):
    """One gradient without jit, so that NumPyro can validate values."""
    if host.name == "pyro":
        return run(host, distribution, estimator, theta, n=1)
    program = chain(theta, {"x": lambda h, t, v: distribution(h, *t)}, {})
    elbo = host.flow.TraceFlow_ELBO(estimators={"x": estimator})
    return host.loss(elbo, *(lambda part=part: part(host, [host.array(theta)]) for part in (program.model, program.guide)))


@pytest.mark.parametrize(
    ("estimator", "message"),
    [
        (lambda h: Flow(loc=lambda x, p: x * float("nan")), "velocity field or its divergence is NaN or infinite"),
        (lambda h: Flow(loc=lambda x, p: float("nan")), "velocity field or its divergence is NaN or infinite"),
        (lambda h: Flow(loc=lambda x, p: (0 * x) ** 0.5), "velocity field or its divergence is NaN or infinite"),
        (lambda h: Flow(lambda x, p, dtheta: 1.0 + dtheta.loc), "must be linear in dtheta, but is not 0 at dtheta = 0"),
        (lambda h: ImplicitRP(lambda x, p: 0 * x + p.loc), "dS/dx of the standardization function is 0"),
        (lambda h: LR(q=lambda p: h.dist.Normal(float("nan") * p.loc, p.scale, validate_args=False)), "the weight p/q is not finite"),
    ],
    ids=["NaN field", "NaN number", "NaN slope", "non-linear velocity", "S without x", "infinite weight"],
)
def test_refused_by_validation(host, estimator, message):
    with pytest.raises(ValueError, match=f"site 'x': .*{message}"):
        eager(host, normal, estimator(host))


def test_a_proposal_that_reads_live_parameters_is_detached(host):
    def gradients(q):
        return run(host, normal, LR(q=q))

    live = []

    def distribution(h, t):
        live[:] = [t]
        return normal(h, t)

    detached = gradients(lambda p: host.dist.Normal(p.loc, 2 * p.scale))
    of_live = run(host, distribution, LR(q=lambda p: host.dist.Normal(live[0], 2 * p.scale)))
    np.testing.assert_allclose(of_live, detached, rtol=1e-12)


@pytest.mark.parametrize("general", [False, True], ids=["per parameter", "general"])
def test_a_field_that_reads_live_parameters_is_linear_in_dtheta(host, general):
    """A field that closes over live parameters is still linear in dtheta: their derivative does not reach the gradient."""

    def flow(loc):
        if general:
            return Flow(lambda x, p, dtheta: 0.5 * (x - loc(p)) * dtheta.loc)
        return Flow(loc=lambda x, p: 0.5 * (x - loc(p)))

    live = []

    def distribution(h, t):
        live[:] = [t]
        return normal(h, t)

    detached = run(host, normal, flow(lambda p: p.loc))
    np.testing.assert_allclose(run(host, distribution, flow(lambda p: live[0])), detached, rtol=1e-12)


def two_sites(guide_infer=None, model_infer=None, observed_infer=None):
    def guide(h, t):
        h.sample("x", h.dist.Normal(t[0], h.array(1.0)), infer=guide_infer)

    def model(h, t):
        x = h.sample("x", h.dist.Normal(h.array(0.0), h.array(1.0)), infer=model_infer)
        h.sample("y", h.dist.Normal(x, h.array(1.0)), obs=h.array(1.0), infer=observed_infer)

    return Program(guide, model, (0.3,))


@pytest.mark.parametrize(
    ("options", "infer", "error", "message"),
    [
        ({"estimators": {"z": LR()}}, {}, ValueError, "site 'z': estimators names no site of the guide; the random sites are: 'x'"),
        ({"estimators": {"x": LR}}, {}, TypeError, r"estimators\['x'\]: expected an estimator .* did you mean to call it"),
        ({"estimators": 3}, {}, TypeError, "estimators: expected a mapping .* found 3"),
        ({"estimators": lambda site: "LR"}, {}, TypeError, r"site 'x': estimators\(site\): expected an estimator"),
        ({"default": "LR"}, {}, TypeError, "default: expected an estimator"),
        ({"entropy": "kl"}, {}, ValueError, "entropy: expected 'full' or 'stl' or 'analytic', found 'kl'"),
        ({"baseline": "mean"}, {}, ValueError, "baseline: expected 'loo' or None"),
        ({"dependencies": "none"}, {}, ValueError, "dependencies: expected 'graph' or 'plates', found 'none'"),
        ({}, {"guide_infer": {"estimator": "LR"}}, TypeError, r"site 'x': infer\['estimator'\]: expected an estimator"),
        ({}, {"model_infer": {"estimator": "LR"}}, TypeError, r"site 'x': infer\['estimator'\]: expected an estimator"),
        (
            {},
            {"observed_infer": {"estimator": LR()}},
            ValueError,
            "site 'y': an estimator needs a random choice, but this site is observed",
        ),
        (
            {},
            {"guide_infer": {"enumerate": "parallel"}},
            ValueError,
            "site 'x': expected a finite support .* has Enumerate.. because of infer.'enumerate'.*. Remove it, or give",
        ),
        (
            {},
            {"guide_infer": {"enumerate": "parallel", "num_samples": 3}},
            ValueError,
            "site 'x': expected infer.'enumerate'. without infer.'num_samples'.",
        ),
    ],
)
def test_saying_it_wrong(host, options, infer, error, message):
    with pytest.raises(error, match=message):
        host.gradients(two_sites(**infer), 3, **options)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "either velocity"),
        ({"velocity": abs, "loc": abs}, "either velocity"),
        ({"loc": abs, "divergence": abs}, "divergence with the general form only"),
        ({"velocity": abs, "divergence": "exact"}, "found 'exact'"),
        ({"velocity": abs, "baseline": 2.0}, "Flow: expected baseline=flowvi.Baseline.* found 2.0"),
    ],
)
def test_flow_arguments(arguments, message):
    with pytest.raises(TypeError, match=message):
        Flow(**arguments)


def test_estimated_needs_an_estimator(host):
    with pytest.raises(TypeError, match="Estimated: expected an estimator"):
        host.flow.Estimated(host.dist.Normal(host.array(0.0), host.array(1.0)), "LR")


@pytest.mark.parametrize("what", ["a Delta", "a factor"])
def test_statements_that_are_no_random_choice(host, what):
    def guide(h, t):
        x = h.sample("x", h.dist.Normal(t[0], h.array(1.0)))
        if what == "a Delta":
            h.sample("z", h.dist.Delta(x), infer={"estimator": LR(), "is_auxiliary": True})
        else:
            h.sample("z", h.flow.Estimated(h.dist.Unit(t[0]), LR()), obs=h.array(0.0)[..., None][:0], infer={"is_auxiliary": True})

    program = Program(guide, two_sites().model, (0.3,))
    with pytest.raises(ValueError, match=f"site 'z': an estimator needs a random choice, but this site is {what}"):
        host.gradients(program, 1)


def test_biased_samplers_are_refused_and_auto_falls_back_to_lr():
    host = HOSTS["pyro"]

    def straight_through(h, t):
        return h.dist.OneHotCategoricalStraightThrough(logits=t[..., None] * h.array([1.0, 0.0]))

    def mixture(h, t):
        locs, scale = h.array([[-1.0, 0.0], [1.0, 0.5]]), h.array([1.0, 1.0])
        return h.dist.MixtureOfDiagNormalsSharedCovariance(locs, scale, t[..., None] * h.array([1.0, 0.0]))

    with pytest.raises(ValueError, match="site 'x': .*derivative of OneHotCategoricalStraightThrough's is biased"):
        run(host, straight_through, RP())
    auto, lr = (run(host, straight_through, e, n=1) for e in (Auto(), LR()))
    np.testing.assert_allclose(auto, lr)
    host_program = chain(0.3, {"x": lambda h, t, v: mixture(h, t[0][0])}, {})
    with pytest.raises(ValueError, match="site 'x': .*MixtureOfDiagNormalsSharedCovariance's is biased"):
        host.gradients(host_program, 1, estimators={"x": RP()})
