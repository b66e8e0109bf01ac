"""Estimators that learn inside NumPyro's ``scan``: all steps share the learned parameters, as a Python loop with equal ones would."""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from hosts import HOSTS, Program, expected_under
from numpyro.contrib.control_flow import cond, scan
from numpyro.infer import SVI

from flowvi import LR, RP, AdaptiveFlow, Surrogate
from flowvi.numpyro import Estimated, TraceFlow_ELBO, TraceFlow_RenyiELBO, adaptive

NUMPYRO = HOSTS["numpyro"]
START, RATE = 0.3, 0.8
PARAMS = {"m": 0.4, "s": 0.7}


def features(p):
    return jnp.stack([p.loc, p.loc**2], -1)


def chain(estimator, steps, masked, loop, scale=1.0):
    """Model and guide of x_t ~ N(0.8 x_{t-1} + m, s) in a plate of two, with given keys, as a scan or as a loop."""
    keys = jax.random.split(jax.random.key(5), steps)

    def run(step):
        x, values = jnp.full(2, START), []
        if not loop:
            return scan(lambda x, key: (step(x, "x", key),) * 2, x, keys)[1]
        for i in range(steps):
            x = step(x, f"x{i}", keys[i])
            values.append(x)
        return jnp.stack(values)

    def draw(loc, s, name, key, wrap=lambda d: d):
        with numpyro.plate("i", 2):
            d = wrap(dist.Normal(loc, s))
            return numpyro.sample(name, d.mask(False) if masked else d, rng_key=key)

    def guide():
        m, s = numpyro.param("m", PARAMS["m"]), numpyro.param("s", PARAMS["s"])
        with numpyro.handlers.scale(scale=scale):
            run(lambda x, name, key: draw(RATE * x + m, s, name, key, lambda d: Estimated(d, estimator)))

    def model():
        xs = run(lambda x, name, key: draw(RATE * x, 1.0, name, key))
        numpyro.factor("cost", (jnp.cos(xs) * jnp.arange(1, steps + 1)[:, None]).sum())

    return model, guide


def random_values(**shapes):
    rng = np.random.default_rng(1)
    return {name: rng.normal(size=shape) * 0.5 for name, shape in shapes.items()}


ROWS = {  # the estimator, and values of its learned parameters
    "velocity": (AdaptiveFlow(shared=True), random_values(velocity=(2, 6), control=(2, 7))),
    "velocity and q": (AdaptiveFlow(shared=True, q="learned"), random_values(velocity=(2, 6), control=(2, 7), proposal=(2,))),
    "velocity of features": (AdaptiveFlow(features=features), random_values(velocity=(3, 2, 6), control=(3, 2, 7))),
    "quadratic": (RP(control_variate="quadratic", shared=True), random_values(control_variate=(1, 2))),
    "cubic": (RP(control_variate="cubic", shared=True), random_values(control_variate=(1, 4))),
    "quadratic of features": (RP(control_variate="quadratic", features=features), random_values(control_variate=(3, 1, 2))),
    "LAX": (Surrogate(lambda z, a: a * z**2, 0.3), random_values(c=())),
}


def fast(row):
    return pytest.mark.parametrize("name", [pytest.param(name, marks=[] if name == row else pytest.mark.slow) for name in ROWS])


@fast("quadratic of features")
@pytest.mark.parametrize(("steps", "masked"), [(3, True), pytest.param(1, False, marks=pytest.mark.slow)])
def test_the_same_as_a_loop(name, steps, masked):
    """Each sample has the loss and gradients of the loop; the gradients of learned parameters are the sum over the loop's sites.

    With several steps there are no costs at the steps, because in a scan, by program order, more costs depend on a site than in a loop.
    """
    estimator, learned = ROWS[name]

    def differentiate(loop, values):
        model, guide = chain(estimator, steps, masked, loop, scale=0.5)
        elbo = TraceFlow_ELBO(vectorize_particles=False)
        return jax.jit(jax.value_and_grad(lambda p: elbo.loss(jax.random.key(0), p, model, guide)))(PARAMS | values)

    loss, g = differentiate(False, {f"x.{part}": value for part, value in learned.items()})
    expected, of_loop = differentiate(True, {f"x{i}.{part}": value for i in range(steps) for part, value in learned.items()})
    np.testing.assert_allclose(loss, expected, rtol=1e-12)
    for parameter in PARAMS:
        np.testing.assert_allclose(g[parameter], of_loop[parameter], rtol=1e-10)
    for part in learned:
        total = sum(of_loop[f"x{i}.{part}"] for i in range(steps))
        assert np.any(total)
        np.testing.assert_allclose(g[f"x.{part}"], total, rtol=1e-10, atol=1e-12)


@pytest.mark.slow
@pytest.mark.parametrize("entropy", ["full", "stl"])
def test_a_pathwise_site_with_costs_of_its_own(entropy):
    """Without a score, the steps can have costs, and the result is still that of the loop."""
    estimator, learned = ROWS["quadratic"]

    def differentiate(loop, values):
        model, guide = chain(estimator, 3, False, loop, scale=0.5)
        elbo = TraceFlow_ELBO(entropy=entropy)
        return jax.jit(jax.grad(lambda p: elbo.loss(jax.random.key(0), p, model, guide)))(PARAMS | values)

    g = differentiate(False, {"x.control_variate": learned["control_variate"]})
    of_loop = differentiate(True, {f"x{i}.control_variate": learned["control_variate"] for i in range(3)})
    for parameter in PARAMS:
        np.testing.assert_allclose(g[parameter], of_loop[parameter], rtol=1e-10)
    np.testing.assert_allclose(g["x.control_variate"], sum(of_loop[f"x{i}.control_variate"] for i in range(3)), rtol=1e-10)


def cosines(estimator, learned):
    """x_t ~ N(0.8 x_{t-1} + m, 1), three steps from 0, with cost sum_t cos(x_t)."""

    def guide(h, t):
        def step(x, _):
            return numpyro.sample("x", Estimated(dist.Normal(0.8 * x + t[0], 1.0), estimator).mask(False)), None

        with h.substitute({f"x.{name}": value for name, value in learned.items()}):
            scan(step, jnp.array(0.0), None, length=3)

    def model(h, t):
        def step(x, _):
            x = numpyro.sample("x", dist.Normal(0.8 * x, 1.0).mask(False))
            return x, x

        h.factor("f", jnp.cos(scan(step, jnp.array(0.0), None, length=3)[1]).sum())

    return Program(guide, model, (0.4,))


def exact_of_cosines():
    total, loc, variance, slope = 0.0, 0.0, 0.0, 0.0
    for _ in range(3):
        loc, variance, slope = 0.8 * loc + 0.4, 0.64 * variance + 1.0, 0.8 * slope + 1.0
        total += -np.sin(loc) * np.exp(-variance / 2) * slope
    return total


@fast("velocity and q")
@pytest.mark.parametrize("particles", [1, pytest.param(4, marks=pytest.mark.slow)])
def test_the_mean_is_exact(name, particles):
    expected_under(cosines(*ROWS[name]), NUMPYRO, exact_of_cosines(), n=40_000 // particles, particles=particles)


@pytest.mark.slow
def test_relax():
    """b_t ~ Bernoulli(logits = m + b_{t-1}), three steps from 0, with cost sum_t t b_t, by enumeration."""
    surrogate = Surrogate(lambda z, a: a * jnp.tanh(z), 0.3)

    def steps(logits, wrap=lambda d: d):
        def step(b, i):
            b = numpyro.sample("b", wrap(dist.Bernoulli(logits=logits(b))).mask(False))
            return b.astype(float), i * b

        return scan(step, jnp.array(0.0), jnp.array([1.0, 2.0, 3.0]))[1].sum()

    def guide(h, t):
        with h.substitute({"b.c": 0.7}):
            steps(lambda b: t[0] + b, lambda d: Estimated(d, surrogate))

    def expectation(m):
        total, p = 0.0, 0.0
        for i in (1, 2, 3):
            p = p * jax.nn.sigmoid(m + 1) + (1 - p) * jax.nn.sigmoid(m)
            total = total + i * p
        return total

    program = Program(guide, lambda h, t: h.factor("f", steps(lambda b: 0.0 * b)), (0.4,))
    expected_under(program, NUMPYRO, jax.grad(expectation)(0.4))


def test_svi_trains_what_is_learned():
    """``init`` registers the learned parameters at their start values and only ``update`` changes them, also in a scope."""
    model, guide = (
        numpyro.handlers.scope(f, prefix="a", hide_types=["plate"])
        for f in chain(RP(control_variate="quadratic", shared=True), 3, False, loop=False)
    )
    elbo = TraceFlow_ELBO()
    svi = SVI(model, adaptive(guide, elbo), numpyro.optim.Adam(0.02), elbo)
    state = jax.jit(svi.init)(jax.random.key(0))
    start, params = svi.get_params(state), svi.get_params(jax.jit(svi.update)(state)[0])
    assert sorted(start) == ["a/m", "a/s", "a/x.control_variate"]
    assert start["a/x.control_variate"].shape == (1, 2)
    assert not np.any(start["a/x.control_variate"])
    assert all(np.all(params[name] != start[name]) for name in start)
    known = {name: start[name] for name in ("a/m", "a/s")}
    with pytest.raises(ValueError, match="^site 'a/x': .* learns the parameter 'a/x.control_variate', but SVI does not know it"):
        elbo.loss(jax.random.key(0), known, model, guide)


@pytest.mark.slow
def test_the_noise_falls():
    """In a state space model, 1500 steps reduce the noise of the gradient to a small part of RP's."""
    y = jnp.array([0.5, 1.1, -0.2, 0.7, 1.9])

    def model():
        def step(x, y):
            x = numpyro.sample("x", dist.Normal(0.8 * x, 1.0))
            numpyro.sample("y", dist.Normal(x, 0.5), obs=y)
            return x, None

        scan(step, jnp.array(0.0), y)

    def program(estimator):
        def guide():
            weight, scale = numpyro.param("weight", 0.3), numpyro.param("scale", 0.6, constraint=dist.constraints.positive)

            def step(x, y):
                return numpyro.sample("x", Estimated(dist.Normal(0.8 * x + weight * (y - 0.8 * x), scale), estimator)), None

            scan(step, jnp.array(0.0), y)

        return guide

    learning = RP(control_variate="quadratic", features=lambda p: p.loc[..., None])
    elbo = TraceFlow_ELBO(4)
    svi = SVI(model, adaptive(program(learning), elbo), numpyro.optim.Adam(0.02), elbo)
    params = svi.run(jax.random.key(0), 1500, progress_bar=False).params

    def variance(estimator):
        loss = lambda key, weight: TraceFlow_ELBO().loss(key, params | {"weight": weight}, model, program(estimator))
        keys = jax.random.split(jax.random.key(1), 1000)
        return jax.jit(jax.vmap(jax.grad(loss, 1), (0, None)))(keys, params["weight"]).var()

    assert variance(learning) < 0.5 * variance(RP())


def test_describe():
    model, guide = chain(AdaptiveFlow(shared=True), 3, False, loop=False)
    elbo = TraceFlow_ELBO()
    (site,) = elbo.describe(model, adaptive(guide, elbo))
    assert (site.name, site.estimator, site.source) == ("x", AdaptiveFlow(shared=True), "Estimated")


@pytest.mark.parametrize("estimator", [AdaptiveFlow(), RP(control_variate="quadratic")], ids=repr)
def test_coefficients_of_each_element_are_refused(estimator):
    model, guide = chain(estimator, 3, False, loop=False)
    with pytest.raises(ValueError, match="^site 'x': .*inside scan give it shared=True or features=, so that all steps"):
        jax.eval_shape(lambda: TraceFlow_ELBO().loss(jax.random.key(0), {}, model, guide))


def test_refusals():
    shared = RP(control_variate="quadratic", shared=True)
    model, guide = chain(shared, 3, False, loop=False)

    def loss(model, guide, elbo):
        return jax.eval_shape(lambda: elbo.loss(jax.random.key(0), {}, model, guide))

    with pytest.raises(ValueError, match="^site 'x': handlers do not reach into scan and cond"):
        loss(model, guide, TraceFlow_ELBO(estimators={"x": LR()}))
    with pytest.raises(ValueError, match="^site 'x': a control variate has mean 0 only under an ELBO"):
        loss(model, guide, TraceFlow_RenyiELBO())
    two = jnp.array([True, False])
    for around in (numpyro.handlers.mask(guide, mask=two), numpyro.handlers.scale(guide, scale=1.0 + two)):
        with pytest.raises(ValueError, match="^site 'x': expected no mask and no scale that is an array around a scan"):
            loss(model, around, TraceFlow_ELBO())

    def branch(_):
        numpyro.sample("x", Estimated(dist.Normal(0.0, 1.0), shared))

    in_cond = lambda: cond(True, branch, branch, None)
    with pytest.raises(ValueError, match="^site 'x': .*inside cond use one that does not learn"):
        loss(in_cond, in_cond, TraceFlow_ELBO())
