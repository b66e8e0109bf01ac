"""The unrolled generator: all draws are JAX's own, bit for bit."""

import re
from collections import Counter

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from hosts import HOSTS
from jax import random
from numpyro.contrib.control_flow import scan
from numpyro.infer import Trace_ELBO
from svi_programs import PROGRAMS, bind
from test_families import THETA, made

from flowvi import LR, RP
from flowvi.numpyro import TraceFlow_ELBO, TraceFlow_RenyiELBO, threefry

KEY = random.key(7)
POISSON = {"Poisson", "NegativeBinomial2", "NegativeBinomialLogits", "NegativeBinomialProbs", "GammaPoisson", "ZeroInflatedPoisson"}
SCALE_TRIL = jnp.array([[1.0, 0.0], [0.5, 2.0]])
OTHERS = [
    dist.Dirichlet(jnp.array([1.0, 2.0, 3.0])),
    dist.MultivariateNormal(jnp.zeros(2), scale_tril=SCALE_TRIL),
    dist.MultivariateStudentT(4.0, jnp.zeros(2), SCALE_TRIL),
    dist.LowRankMultivariateNormal(jnp.zeros(2), jnp.ones((2, 1)), jnp.ones(2)),
    dist.LKJCholesky(3, 1.5),
    dist.Wishart(4.0, scale_tril=SCALE_TRIL),
    dist.MixtureSameFamily(dist.Categorical(jnp.array([0.3, 0.7])), dist.Normal(jnp.array([0.0, 1.0]), 1.0)),
    dist.Multinomial(5, jnp.array([0.3, 0.7])),
    dist.BetaBinomial(2.0, 3.0, 5),
    dist.DiscreteUniform(0, 4),
    dist.GammaPoisson(2.0, 3.0),
    dist.ZeroInflatedPoisson(0.2, 1.4),
    dist.NegativeBinomial2(2.0, 3.0),
    dist.TruncatedNormal(0.3, 1.2, low=-0.5, high=0.8),
    dist.GaussianRandomWalk(1.0, 3),
    dist.ProjectedNormal(jnp.ones(3)),
    dist.SineBivariateVonMises(0.1, 0.2, 1.0, 1.2, 0.3),
    dist.SoftLaplace(0.1, 0.9),
]


def families():
    return [p for name in THETA if (p := made(HOSTS["numpyro"], name)) is not None] + OTHERS


@pytest.fixture
def off(monkeypatch):
    """Turn the unrolled generator off, as with a version of JAX that unrolls threefry itself."""
    monkeypatch.setattr(threefry, "is_a_loop", lambda: False)


@pytest.mark.parametrize("shape", [(), (2, 5), (0,)], ids=str)
def test_the_bits_are_those_of_jax(shape):
    key = threefry.unrolled(KEY)
    assert threefry.is_unrolled(key)
    np.testing.assert_array_equal(random.key_data(random.split(key, shape)), random.key_data(random.split(KEY, shape)))
    for width in (8, 16, 32, 64):
        ours, theirs = (random.bits(k, shape, f"uint{width}") for k in (key, KEY))
        assert ours.dtype == theirs.dtype
        np.testing.assert_array_equal(ours, theirs)


def test_a_number_folded_in():
    for number in (0, 3, 2**32 - 1):
        ours, theirs = (random.key_data(random.fold_in(key, number)) for key in (threefry.unrolled(KEY), KEY))
        np.testing.assert_array_equal(ours, theirs)


def test_many_keys_at_once():
    ours, theirs = (jax.jit(jax.vmap(jax.vmap(random.normal)))(random.split(key, (2, 3))) for key in (threefry.unrolled(KEY), KEY))
    np.testing.assert_array_equal(ours, theirs)


@pytest.mark.filterwarnings("ignore:shape requires ndarray:DeprecationWarning")  # SineBivariateVonMises in NumPyro 0.19
@pytest.mark.parametrize("p", families(), ids=lambda p: type(p).__name__)
def test_every_family_draws_the_same(p):
    """Every family draws the same numbers; samplers that only take JAX's own keys get them."""
    key = threefry.unrolled(KEY)
    assert threefry.takes(p, key) == (type(p).__name__ not in POISSON)
    if threefry.takes(p, key):
        jaxprs = [str(jax.make_jaxpr(lambda k: p.sample(k, (4,)))(k)) for k in (key, KEY)]
        assert jaxprs[0].replace("<cpu>", "<fry>") == jaxprs[1]


@pytest.mark.parametrize("p", [dist.Gamma(2.0, 1.0)], ids=["Gamma"])
def test_samplers_that_look_at_the_key(p):
    """A Gamma looks at the key, and JAX maps over its draws in another way; the numbers stay the same."""
    np.testing.assert_array_equal(*(p.sample(key, (7,)) for key in (threefry.unrolled(KEY), KEY)))


def step(elbo, name="plain"):
    guide, model = bind(HOSTS["numpyro"], PROGRAMS[name])
    params = {"m": jnp.array(0.3), "s": jnp.array(0.8), "b": jnp.array(0.9), "l": jnp.zeros(6)}
    return jax.value_and_grad(lambda params, key: elbo.loss(key, params, model, guide)), params


def cone(elbo):
    """A program of Normal sites, with no operation of flowvi."""

    def guide():
        for name in ("x", "y"):
            numpyro.sample(name, dist.Normal(numpyro.param(f"{name}_loc", 0.0), 1.0))

    def model():
        x, y = (numpyro.sample(name, dist.Normal(0.0, 10.0)) for name in ("x", "y"))
        numpyro.sample("r", dist.Normal(x**2 + y**2, 0.5), obs=5.0)

    params = {"x_loc": jnp.array(0.3), "y_loc": jnp.array(0.8)}
    f = jax.grad(lambda params, key: elbo.loss(key, params, model, guide))
    return [
        Counter(re.findall(pattern, str(program)))
        for pattern, program in (
            (r" = ([a-z_0-9]+)", jax.make_jaxpr(f)(params, KEY)),
            (r" = (?:call )?([a-z@_.0-9]+)", jax.jit(f).lower(params, KEY).as_text()),
        )
    ]


@pytest.mark.parametrize("particles", [1, 3])
def test_a_program_of_rp_sites_is_the_hosts(particles, monkeypatch):
    """Without the unrolled generator the instructions are those of the host. With it, only operations on keys and bits differ."""
    elbo = TraceFlow_ELBO(particles, default=RP())
    operations, instructions = cone(elbo)
    monkeypatch.setattr(threefry, "is_a_loop", lambda: False)
    plain_operations, plain_instructions = cone(elbo)
    assert plain_instructions == cone(Trace_ELBO(particles))[1]
    assert plain_instructions != instructions
    assert plain_operations <= operations
    assert set(operations - plain_operations) == {"random_wrap", "random_unwrap"}


def test_no_loop_is_left():
    """The only loop left in the program draws the subsample."""
    f, params = step(TraceFlow_ELBO(default=LR()), "subsampled plate")
    g, _ = step(Trace_ELBO(), "subsampled plate")
    assert jax.jit(f).lower(params, KEY).as_text().count("stablehlo.while") == 1
    assert jax.jit(g).lower(params, KEY).as_text().count("stablehlo.while") > 1


def test_other_devices_keep_the_generator_of_jax(monkeypatch):
    """Compiled for a GPU, the step has JAX's own rounds and no stored bits."""

    def text():
        f, params = step(TraceFlow_ELBO(3, default=RP()))
        return jax.jit(f).trace(params, KEY).lower(lowering_platforms=("cuda",)).as_text()

    ours = text()
    monkeypatch.setattr(threefry, "is_a_loop", lambda: False)
    theirs = text()
    for what in ("stablehlo.xor", "stablehlo.optimization_barrier", "stablehlo.while"):
        assert ours.count(what) == theirs.count(what)
    assert ours.count("stablehlo.xor") > 0


@pytest.mark.parametrize(
    ("elbo", "name"), [(TraceFlow_ELBO(3, default=LR()), "subsampled plate"), (TraceFlow_RenyiELBO(0.0, 3), "plain")]
)
def test_the_same_steps_without_it(elbo, name, monkeypatch):
    f, params = step(elbo, name)
    ours = jax.jit(f)(params, KEY)
    monkeypatch.setattr(threefry, "is_a_loop", lambda: False)
    theirs = jax.jit(step(elbo, name)[0])(params, KEY)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-12), ours, theirs)


class Odd(dist.Normal):
    """A Normal whose sampler reads the key's data, like old code."""

    def sample(self, key, sample_shape=()):
        assert key.dtype == jnp.uint32
        return super().sample(key, sample_shape)


@pytest.mark.parametrize("key", [pytest.param(KEY, marks=pytest.mark.slow), random.PRNGKey(7)], ids=["typed", "old"])
def test_a_program_sees_keys_of_its_own_type(key):
    found = []

    def guide():
        found.append(numpyro.prng_key())
        rate = numpyro.param("rate", 2.0)
        if key.dtype == jnp.uint32:
            numpyro.sample("z", Odd(0.0, 1.0))
        numpyro.sample("k", dist.Poisson(rate))
        return scan(lambda carry, _: (numpyro.sample("n", dist.Poisson(rate)), None), jnp.array(0), None, length=2)

    def model():
        if key.dtype == jnp.uint32:
            numpyro.sample("z", dist.Normal(0.0, 1.0))
        numpyro.sample("k", dist.Poisson(1.0))
        scan(lambda carry, _: (numpyro.sample("n", dist.Poisson(1.0)), None), jnp.array(0), None, length=2)

    losses = [elbo.loss(key, {"rate": 2.0}, model, guide) for elbo in (TraceFlow_ELBO(), Trace_ELBO())]
    np.testing.assert_allclose(*losses, rtol=1e-12)
    assert found[0].dtype == found[-1].dtype == key.dtype
    np.testing.assert_array_equal(*(random.key_data(found[i]) for i in (0, -1)))


def test_a_proposal_that_takes_other_keys():
    """A Poisson proposal for a Geometric, which takes other keys."""

    def sample(elbo):
        return elbo.loss(KEY, {}, lambda: numpyro.sample("k", dist.Geometric(0.5)), lambda: numpyro.sample("k", dist.Geometric(0.4)))

    assert np.isfinite(sample(TraceFlow_ELBO(default=LR(q=lambda p: dist.Poisson(2.0)))))


def test_other_generators_stay():
    rbg = random.key(0, impl="rbg")
    assert threefry.unrolled(rbg) is rbg
    with jax.threefry_partitionable(False):
        assert threefry.unrolled(KEY) is KEY


def test_a_jax_that_unrolls(off):
    assert threefry.unrolled(KEY) is KEY


def test_a_deterministic_statement():
    """A deterministic statement draws nothing, and has no arguments in NumPyro."""

    def program():
        x = numpyro.sample("x", dist.Normal(numpyro.param("m", 0.0), 1.0))
        numpyro.factor("cost", numpyro.deterministic("doubled", 2 * x))

    ours, theirs = (
        elbo.loss(KEY, {"m": 0.3}, lambda: numpyro.sample("x", dist.Normal(0.0, 1.0)), program)
        for elbo in (TraceFlow_ELBO(), Trace_ELBO())
    )
    np.testing.assert_allclose(ours, theirs, rtol=1e-12)
