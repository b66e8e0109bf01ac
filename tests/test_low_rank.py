"""The control variate for the whole guide where sites have many coordinates: diagonal plus low rank."""

from itertools import product

import jax
import numpy as np
import numpyro
import pyro
import pytest
from hosts import always, each, slow_in_numpyro
from test_joint_control_variate import PARENT, SIZES, START, coefficients, gradients, rough_cost, z_of_mean

import flowvi.run
from flowvi.learned import low_rank
from flowvi.learned.coupling import couple
from flowvi.learned.low_rank import LowRankModel

RANK = 2
FULL = coefficients("quadratic", PARENT)


def learned_of_low_rank(seed=5):
    """Coefficients and directions for the sites of the program."""
    rng, values = np.random.default_rng(seed), {}
    for site, size in SIZES.items():
        *batch, _, columns = FULL[f"{site}.control_variate"].shape
        rank = min(RANK, size)
        values[f"{site}.control_variate"] = 0.5 * rng.normal(size=(*batch, size, 2 + rank))
        values[f"{site}.directions"] = 0.5 * rng.normal(size=(*batch, columns - 1, rank))
    return values


def parts(learned, site):
    """b, D, U and (V, V_y) of a site."""
    coefficients, directions = (learned[f"{site}.{name}"] for name in ("control_variate", "directions"))
    return coefficients[..., :1], coefficients[..., 1], coefficients[..., 2:], directions


def as_full(learned):
    """The same model with a full matrix: b, D + U V^T and U V_y^T."""
    full = {}
    for site, size in SIZES.items():
        b, d, u, v = parts(learned, site)
        matrix = u @ v.swapaxes(-2, -1)
        matrix[..., :size] += d[..., None] * np.eye(size)
        full[f"{site}.control_variate"] = np.concatenate([b, matrix], -1)
    return full


def of_low_rank(slopes, learned):
    """The derivative in b, D, U, V and V_y, from that in the full coefficients."""
    found = {}
    for site, size in SIZES.items():
        _, _, u, v = parts(learned, site)
        of_full = slopes[f"{site}.control_variate"]
        of_b, of_matrix = of_full[..., :1], of_full[..., 1:]
        of_d = np.diagonal(of_matrix[..., :size], axis1=-2, axis2=-1)[..., None]
        found[f"{site}.control_variate"] = np.concatenate([of_b, of_d, of_matrix @ v], -1)
        found[f"{site}.directions"] = of_matrix.swapaxes(-2, -1) @ u
    return found


@pytest.fixture
def every_site(monkeypatch):
    """Every site has a matrix of rank 2, or 1 if it has one coordinate."""

    def coupled(*args):
        found = couple(*args)
        of = {name: coupling._replace(low_rank=True) for name, coupling in found.of.items()}
        estimators = {name: type(e)(kind=e.kind, coupling=of[name]) for name, e in found.estimators.items()}
        return found._replace(of=of, estimators=estimators)

    monkeypatch.setattr(low_rank, "RANK", RANK)
    with monkeypatch.context() as patch:
        patch.setattr(flowvi.run, "couple", coupled)
        yield patch


@each("slope", [0.0, PARENT], always)
def test_every_sample_is_that_of_the_full_matrix(host, slope, every_site):
    """The gradient in the program's parameters, and by the chain rule that in the coefficients."""
    learned = learned_of_low_rank()
    if not slope:  # then t also sees both coordinates of g
        learned["t.directions"] = np.random.default_rng(6).normal(size=(SIZES["t"] + 2 + 2 + 3, 1))
    found = gradients(host, START | learned, rough_cost, slope, control_variate="quadratic")
    every_site.undo()
    full = gradients(host, START | as_full(learned), rough_cost, slope, control_variate="quadratic")
    for name, value in (full | of_low_rank(full, learned)).items():
        np.testing.assert_allclose(found[name], value, rtol=1e-10, atol=1e-12)


def nodes_and_weights(dim, degree=5):
    """Points and weights of Gauss-Hermite quadrature in several dimensions."""
    nodes, weights = np.polynomial.hermite_e.hermegauss(degree)
    points = np.array(list(product(nodes, repeat=dim)))
    return points, np.array(list(product(weights / weights.sum(), repeat=dim))).prod(-1)


@each("family", ["Normal", "MultivariateNormal"], lambda family: family != "Normal")
def test_the_mean_is_exactly_zero(host, family, monkeypatch):
    """By quadrature over the site's own noise and that of another one, in loc and in the factor."""
    monkeypatch.setattr(low_rank, "RANK", RANK)
    points, weights = nodes_and_weights(5)
    rng, size = np.random.default_rng(0), 3
    tril = np.tril(rng.normal(size=(size, size))) + 2 * np.eye(size)
    factor = tril if family == "MultivariateNormal" else np.diag(tril).copy()
    x = points[:, :size] @ (tril.T if family == "MultivariateNormal" else np.diag(factor))
    y, weights, x = (host.array(a) for a in (points[:, size:], weights, x))
    learned = {"control_variate": host.array(rng.normal(size=(size, 2 + RANK)))}
    learned["directions"] = host.array(rng.normal(size=(size + 2, RANK)))
    one = host.array(np.ones((len(points), 1)))

    def fn(loc, factor):
        if family == "MultivariateNormal":
            return host.dist.MultivariateNormal(loc * one, scale_tril=host.math.tril(factor))
        return host.dist.Normal(loc * one, factor).to_event(1)

    def mean(parameters, power=1):
        target = host.target("x", fn(**parameters), True).with_learned({}, learned, 0.0)
        _, control, context = LowRankModel(host.ops, target, 2).attach(x)
        return (weights * (control + (context * y**power).sum(-1))).sum()

    parameters = {"loc": np.zeros(size), "factor": factor}
    compiled = jax.jit if host.name == "numpyro" else lambda f, **_: f
    mean = compiled(mean, static_argnames="power")
    for found in host.value_and_gradient(mean, parameters)[1].values():
        np.testing.assert_allclose(found, 0, atol=1e-12)
    wrong = host.value_and_gradient(lambda parameters: mean(parameters, power=2), parameters)[1]
    assert np.abs(wrong["loc"]).min() > 1e-3  # y^2 has another mean


@slow_in_numpyro
def test_the_mean_is_zero(host, every_site):
    """Over many particles; and not where a site sees one from which it was computed."""
    learned = learned_of_low_rank()
    assert z_of_mean(host, "quadratic", learned, full=as_full(learned)) < 5
    coupled = flowvi.run.couple
    every_site.setattr(flowvi.run, "couple", lambda blocks, _, kind: coupled(blocks, dict.fromkeys(blocks, frozenset()), kind))
    faulty = {name: 0 * value for name, value in learned.items()}
    faulty["t.directions"] = np.zeros((SIZES["t"] + 2 + 2 + 3, 1))
    faulty["t.control_variate"][0, 2], faulty["t.directions"][1, 0] = 2.0, 1.0  # what t sees of g first
    assert z_of_mean(host, "quadratic", faulty, full=as_full(learned)) > 10


SIZE = 150


def one_direction(host):
    """A cost with one strong direction, under a mean-field guide that stays as it is."""
    direction = host.array(np.linspace(-0.3, 0.6, SIZE))

    def guide():
        with host.plate("rows", 2):
            host.sample("x", host.dist.Normal(host.param("loc", host.array(np.zeros((2, SIZE)))), 0.5).to_event(1))

    def model():
        with host.plate("rows", 2):
            x = host.sample("x", host.dist.Normal(host.array(np.zeros(SIZE)), 1.0).to_event(1))
            host.factor("cost", -0.5 * (x @ direction) ** 2)

    return model, guide


@pytest.mark.slow
def test_the_noise_of_a_strong_direction_is_learned(host):
    """With a row of coefficients for each element of a plate."""
    model, guide = one_direction(host)
    pyro.clear_param_store()
    pyro.set_rng_seed(0)
    elbo = host.flow.TraceFlow_ELBO(control_variate="quadratic")
    if host.name == "numpyro":
        optimizer = numpyro.optim.Adam(lambda i: 0.03 * 0.01 ** (i / 2000))
        svi = numpyro.infer.SVI(model, host.flow.adaptive(guide, elbo), optimizer, elbo)
        learned = dict(svi.run(jax.random.key(0), 2000, progress_bar=False).params)
        learned.pop("loc")
    else:
        optimizer = pyro.optim.ClippedAdam({"lr": 0.03, "lrd": 0.01 ** (1 / 2000), "clip_norm": float("inf")})
        svi = pyro.infer.SVI(model, guide, optimizer, elbo)
        for _ in range(2000):
            svi.step()
        learned = {f"x.{name}": pyro.param(f"x.{name}").detach().numpy() for name in ("control_variate", "directions")}
    assert {name: value.shape for name, value in learned.items()} == {
        "x.control_variate": (2, SIZE, 2 + low_rank.RANK),
        "x.directions": (2, SIZE, low_rank.RANK),
    }
    gradients = []
    for kind, values in ((None, {}), ("quadratic", learned)):
        params = {"loc": np.zeros((2, SIZE))} | values
        runs = [host.loss_and_gradients(params, model, guide, seed, plates=1, control_variate=kind)[1] for seed in range(20)]
        gradients.append([g["loc"] for g in runs])
    of_rp, left = np.var(gradients, 1).sum(-1)
    assert np.all(left < 0.2 * of_rp)
