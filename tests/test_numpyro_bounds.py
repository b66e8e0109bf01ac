"""In NumPyro a traced bound is fixed if no parameter influences it."""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest

from flowvi import LR, RP, Flow, MeasureValued
from flowvi.numpyro import TraceFlow_ELBO

DATA = jnp.array([0.5, 1.0, 2.0])


def pareto(data):
    return dist.Pareto(jnp.array([1.0, 2.0, 0.5]) * 2.0, numpyro.param("a", 1.5))


def pareto_of_data(data):
    return dist.Pareto(data, numpyro.param("a", 1.5))


def uniform_of_data(data):
    numpyro.sample("k", dist.Bernoulli(logits=numpyro.param("a", 0.2)).expand([3]).to_event(1))
    return dist.Uniform(data - 1.0, data + 1.0)


def truncated(data):
    return dist.TruncatedNormal(numpyro.param("a", 0.3), 1.0, low=data - 1.0)


def subsampled(data):
    with numpyro.plate("n", 3, subsample_size=2, dim=-2) as index:
        limit = data[index]
    return dist.TruncatedNormal(numpyro.param("a", 0.3), 1.0, low=jnp.resize(limit, (3,)))


def moved_by_a_parameter(data):
    return dist.Pareto(numpyro.param("a", 1.5) * data, 2.0)


def moved_by_a_draw(data):
    x = numpyro.sample("x", dist.Normal(numpyro.param("a", 0.3), 1.0))
    return dist.Uniform(x, x + data)


FIXED = (pareto, pareto_of_data, uniform_of_data, truncated, subsampled)
MOVING = (moved_by_a_parameter, moved_by_a_draw)
ESTIMATORS = {"LR": LR(), "flow": Flow(lambda x, p, dtheta: 0.0 * x)}


def gradient(build, estimator, estimators, jit=True):
    def model(data):
        if "n" in build.__code__.co_consts:
            numpyro.plate("n", 3, subsample_size=2, dim=-2)
        if "x" in build.__code__.co_consts:
            numpyro.sample("x", dist.Normal(0.0, 1.0))
        if "k" in build.__code__.co_consts:
            numpyro.sample("k", dist.Bernoulli(0.5).expand([3]).to_event(1))
        z = numpyro.sample("z", dist.Normal(0.0, 3.0).expand([3]).to_event(1))
        numpyro.factor("y", -((z - 1.0) ** 2).sum())

    def guide(data):
        numpyro.sample("z", build(data).to_event(1))

    elbo = TraceFlow_ELBO(estimators={"z": estimator, **estimators})

    def loss(params, data):
        return elbo.loss(jax.random.key(0), params, model, guide, data)

    found = jax.grad(loss)
    return (jax.jit(found) if jit else found)({"a": jnp.array(1.5)}, DATA)["a"]


@pytest.mark.parametrize("build", FIXED)
def test_a_traced_bound_without_a_parameter_is_fixed(build):
    for estimator in ESTIMATORS.values():
        under_jit, eager = (gradient(build, estimator, {}, jit) for jit in (True, False))
        assert np.isfinite(under_jit)
        np.testing.assert_allclose(under_jit, eager, rtol=1e-10)


@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("build", MOVING)
def test_a_bound_that_a_parameter_moves_is_refused(build, estimator):
    with pytest.raises(ValueError, match="site 'z': .* is biased where the support moves with a parameter"):
        gradient(build, ESTIMATORS[estimator], {"x": RP()} if build is moved_by_a_draw else {})


def test_what_the_guide_closes_over_may_be_a_parameter():
    """An unknown tracer that is neither a parameter nor an argument counts as live."""

    def loss(low):
        def guide():
            numpyro.sample("z", dist.Uniform(low, 3.0))

        def model():
            numpyro.sample("z", dist.Normal(0.0, 3.0))

        return TraceFlow_ELBO(default=LR()).loss(jax.random.key(0), {}, model, guide)

    with pytest.raises(ValueError, match="its lower bound"):
        jax.grad(loss)(0.5)


def test_arguments_are_data_only_beside_parameters():
    def program(low):
        numpyro.sample("z", dist.Uniform(low, 3.0))

    def loss(low):
        return TraceFlow_ELBO(default=LR()).loss(jax.random.key(0), {}, program, program, low)

    with pytest.raises(ValueError, match="its lower bound"):
        jax.grad(loss)(0.5)


def normal(loc):
    numpyro.sample("x", dist.Normal(loc, 1.0).mask(False))


def cost(loc):
    numpyro.factor("cost", 2 * numpyro.sample("x", dist.Normal(0.0, 1.0).mask(False)))


def of_argument(key, loc, elbo):
    """A program with an argument and a parameter."""

    def guide(loc):
        numpyro.param("unused", 0.0)
        normal(loc)

    return elbo.loss(key, {"unused": jnp.zeros(())}, cost, guide, loc)


def of_outer_handler(key, loc, elbo):
    with numpyro.handlers.substitute(data={"loc": loc}):
        return elbo.loss(key, {}, cost, lambda _: normal(numpyro.param("loc", 0.0)), loc)


@pytest.mark.parametrize("loss", [of_argument, of_outer_handler])
def test_what_is_differentiated_is_live(loss):
    """The weak derivative includes every parameter that may have a derivative, however it reaches the guide."""
    elbo = TraceFlow_ELBO(default=MeasureValued())
    gradient = jax.jit(jax.vmap(jax.grad(lambda loc, key: -loss(key, loc, elbo)), (None, 0)))
    samples = gradient(0.3, jax.random.split(jax.random.key(0), 10_000))
    assert abs(samples.mean() - 2) < 5 * samples.std() / 100
    assert samples.std() > 0


def test_python_may_look_at_what_is_not_traced():
    """A guide may branch on arguments that are not traced, as in ``svi.run``, which closes over them."""

    def guide(n, flag):
        loc = sum((numpyro.param(f"loc{i}", 0.1) for i in range(int(n))), 0.0)
        normal(loc if flag else 0.0)

    svi = numpyro.infer.SVI(lambda n, flag: cost(0.0), guide, numpyro.optim.Adam(0.01), TraceFlow_ELBO(default=MeasureValued()))
    result = svi.run(jax.random.key(0), 3, jnp.array(2), jnp.array(True), progress_bar=False)
    assert np.isfinite(result.losses).all()


def test_a_handler_that_renames_sites_around_the_objective():
    with numpyro.handlers.scope(prefix="a"), pytest.raises(ValueError, match="site 'x': .* has renamed it"):
        TraceFlow_ELBO(default=LR()).loss(jax.random.key(0), {}, cost, normal, 0.3)
