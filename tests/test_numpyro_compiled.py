"""NumPyro's adapter under XLA: the size of compiled programs, kept draws, and the loss by statement."""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as numpyro_dist
import pytest

import flowvi.numpyro
import flowvi.pyro
from flowvi import LR, Enumerate, MeasureValued


def test_numpyro_keeps_scores_by_statement():
    """If the loss is kept by statement, each score is at its own site, and only the sum is the estimator."""
    elbo = flowvi.numpyro.TraceFlow_ELBO(sum_sites=False, default=LR(), dependencies="plates")

    def guide(m, n):
        numpyro.sample("a", numpyro_dist.Normal(m, 1.0), infer={"is_auxiliary": True})
        numpyro.sample("x", numpyro_dist.Normal(n, 1.0))

    def model(m, n):
        numpyro.sample("y", numpyro_dist.Normal(numpyro.sample("x", numpyro_dist.Normal(0.0, 1.0)), 1.0), obs=0.5)

    slopes = jax.jacobian(lambda m, n: elbo.loss_with_mutable_state(jax.random.key(1), {}, model, guide, m, n)["loss"], (0, 1))(
        0.2, 0.3
    )
    of_a, of_x = slopes["a"], slopes["x"]
    assert of_a[0] != 0 == of_a[1]
    assert of_x[0] == 0 != of_x[1]


def test_numpyro_draws_are_kept(monkeypatch):
    """XLA's CPU compiler does not repeat the sampler in every loop that reads the draw; the numbers stay the same."""

    def guide(loc):
        with numpyro.plate("data", 50):
            numpyro.sample("x", numpyro_dist.Normal(loc, 1.0))

    def model():
        with numpyro.plate("data", 50):
            x = numpyro.sample("x", numpyro_dist.Normal(0.0, 1.0))
            numpyro.sample("y", numpyro_dist.Normal(jnp.sin(x), 0.5), obs=jnp.linspace(-1.0, 1.0, 50))

    def step():
        elbo = flowvi.numpyro.TraceFlow_ELBO(4, default=LR())
        loss = jax.value_and_grad(lambda loc, key: elbo.loss(key, {}, model, lambda: guide(loc)))
        return jax.jit(loss).lower(jnp.zeros(50), jax.random.key(0)).compile()

    kept = step()
    monkeypatch.setattr(flowvi.ops.jax, "computed_once", lambda x: x)
    plain = step()
    for a, b in zip(*(compiled(jnp.zeros(50), jax.random.key(3)) for compiled in (kept, plain)), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-12)
    assert len(kept.as_text()) < 0.9 * len(plain.as_text())


def test_numpyro_a_kept_draw_is_itself():
    once, nan = flowvi.ops.jax.computed_once, jnp.array([jnp.nan, -jnp.inf, 2.0])
    for x in (nan, jnp.stack([nan, 0 * nan]), jnp.zeros((0, 3)), jnp.array(1.5), jnp.arange(3)):
        for f in (once, jax.jit(once), jax.vmap(once) if x.ndim else once):
            np.testing.assert_array_equal(f(x), x)


def number(n):
    """A program of sites that share one cost."""

    def model():
        b = [numpyro.sample(f"b{i}", numpyro_dist.Bernoulli(0.4)) for i in range(n)]
        numpyro.factor("f", -((sum((i % 3 - 0.7) * x for i, x in enumerate(b)) - 0.3) ** 2))

    def guide():
        for i in range(n):
            numpyro.sample(f"b{i}", numpyro_dist.Bernoulli(logits=numpyro.param(f"l{i}", 0.1 * i)))

    return model, guide


@pytest.mark.slow
@pytest.mark.parametrize("estimator", [LR(), Enumerate()])
def test_numpyro_compiles_in_linear_time(estimator):
    """The length of the compiled program grows linearly: a shared cost is not repeated for each site."""

    def length(n):
        elbo = flowvi.numpyro.TraceFlow_ELBO(default=estimator)
        loss = jax.value_and_grad(lambda params, key: elbo.loss(key, params, *number(n)))
        params = {f"l{i}": jnp.array(0.1 * i) for i in range(n)}
        return len(jax.jit(loss).lower(params, jax.random.key(0)).compile().as_text())

    small, middle, large = length(4), length(8), length(16)
    assert large - middle < 1.15 * 2 * (middle - small)


def test_numpyro_one_run_tells_which_arrays_move():
    """The number of runs of the guide does not depend on the number of sites."""
    runs = []

    def guide():
        runs.append(1)
        for i in range(3):
            rate = numpyro.param(f"rate{i}", 2.0, constraint=numpyro_dist.constraints.positive)
            numpyro.sample(f"k{i}", numpyro_dist.Poisson(rate))
        numpyro.sample("u", numpyro_dist.Uniform(jnp.zeros(2), 1.0).to_event(1))

    def model():
        for i in range(3):
            numpyro.sample(f"k{i}", numpyro_dist.Poisson(2.0))
        numpyro.sample("u", numpyro_dist.Uniform(jnp.zeros(2), 1.0).to_event(1))

    elbo = flowvi.numpyro.TraceFlow_ELBO(default=MeasureValued(), estimators={"u": LR()})
    params = {f"rate{i}": jnp.array(2.0) for i in range(3)}
    jax.jit(jax.grad(lambda params: elbo.loss(jax.random.key(0), params, model, guide))).lower(params)
    assert (
        len(runs) == 1 + 2 + 1 + 1 + 1
    )  # the run, its influences (with and without arguments), the graph, the other runs, their influences
