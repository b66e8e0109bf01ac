"""Kinds of sites: nested wrappers, transforms, densities without a sampler, samplers without a derivative."""

from contextlib import nullcontext

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as numpyro_dist
import pyro.distributions as pyro_dist
import pytest
import torch
from hosts import HOSTS, Program, chain, expected_under
from kinds import HALF, KINDS, WEIGHTS, cost_of, half_velocity, standardize, wide

from flowvi import LR, RP, Auto, Flow, ImplicitRP


def base(h, t, batch_shape):
    """A Normal whose elements have distinct locations, of any batch shape that ends in 3."""
    return h.dist.Normal(t[0][..., None] + h.array(WEIGHTS), t[1][..., None]).expand(batch_shape)


# Nestings of wrappers around the same three independent Normals, with event dim 1. Pyro's programs have a batch dim for replicates.
NESTINGS = {
    "to_event": lambda d: d.to_event(1),
    "mask, to_event": lambda d: d.mask(True).to_event(1),
    "to_event, mask": lambda d: d.to_event(1).mask(False),
    "to_event, expand": lambda d: d.to_event(1).expand(d.batch_shape[:-1]),
    "expand, mask, to_event": lambda d: d.expand(d.batch_shape).mask(False).to_event(1),
    "to_event, mask, mask": lambda d: d.to_event(1).mask(False).mask(True),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("nesting", NESTINGS)
def test_nested_wrappers(host, nesting, kind):
    """Every nesting gives the samples of three scalar sites with the same random numbers."""

    def program(wrap):
        def distribution(h, t, v):
            return wrap(base(h, t, (*t[0].shape, 3)))

        return chain((0.3, 0.8), {"x": distribution}, {"x": lambda h, t, v: cost_of(h, v["x"])})

    options = {"estimators": {"x": KINDS[kind]}}
    reference = host.gradients(program(NESTINGS["to_event, mask"]), 5, **options)
    np.testing.assert_allclose(host.gradients(program(lambda d: NESTINGS[nesting](d).mask(False)), 5, **options), reference, rtol=1e-10)
    if "q" not in kind:  # the estimate is the sum of the scalar estimates at the same draws
        assert np.isfinite(reference).all()


@pytest.mark.parametrize("kind", ["RP", "cdf", "half", "half, general", "G-Rep", "RP, q", "half, q"])
def test_plain_transforms_are_entered(host, kind):
    """At exp(Normal) as a plain transformed distribution, the estimator acts on the base sample, and the transform maps it."""

    def transformed(h, t, v):
        return h.dist.TransformedDistribution(h.dist.Normal(*t), [h.dist.transforms.ExpTransform()])

    def cost(h, y):
        return h.math.sin(y) + 0.1 * y

    pushed = chain((0.3, 0.8), {"x": transformed}, {"x": lambda h, t, v: cost(h, v["x"])})
    inner = chain((0.3, 0.8), {"x": lambda h, t, v: h.dist.Normal(*t)}, {"x": lambda h, t, v: cost(h, h.math.exp(v["x"]))})
    gradients = [host.gradients(p, 6, estimators={"x": KINDS[kind]}) for p in (pushed, inner)]
    np.testing.assert_allclose(*gradients, rtol=1e-8)


def test_a_live_transform_moves_the_value(host):
    """At y = a + b exp(x), LR on y and RP have the same mean, and a Flow on the base keeps the path of the transform."""

    def distribution(h, t, v):
        affine = h.dist.transforms.AffineTransform(t[0], t[1])
        return h.dist.TransformedDistribution(h.dist.Normal(h.array(0.2), h.array(0.5)), [affine])

    program = chain((0.3, 0.8), {"x": distribution}, {"x": lambda h, t, v: h.math.sin(v["x"])})
    loc, scale = 0.3 + 0.8 * 0.2, 0.8 * 0.5
    exact = np.exp(-(scale**2) / 2) * np.array([np.cos(loc), 0.2 * np.cos(loc) - 0.5 * scale * np.sin(loc)])
    for estimator in (LR(), RP(), HALF, ImplicitRP(standardize)):
        samples = host.gradients(program, 20_000, estimators={"x": estimator})
        assert np.all(np.abs(samples.mean(0) - exact) < 5 * samples.std(0) / np.sqrt(len(samples)))


def test_a_boundary_that_stays_where_a_transform_moves_what_is_inside(host):
    """At x = exp(t + log e), e ~ Exponential, a live transform is in the middle, but the support of x is fixed."""
    exp, shift = host.dist.transforms.ExpTransform, host.dist.transforms.AffineTransform

    def distribution(h, t, v):
        return h.dist.TransformedDistribution(h.dist.Exponential(h.array(1.0)), [exp().inv, shift(t[0], h.array(1.0)), exp()])

    program = chain([0.3], {"x": distribution}, {"x": lambda h, t, v: v["x"]})
    expected_under(program, host, np.exp(0.3), default=LR())


def test_the_inverse_of_composed_transforms_is_known(host):
    """The inverse is known at x = exp(t + e), e ~ Normal, with a composed transform."""
    transforms = host.dist.transforms

    def distribution(h, t, v):
        parts = [transforms.AffineTransform(t[0], h.array(0.5)), transforms.ExpTransform()]
        return h.dist.TransformedDistribution(h.dist.Normal(h.array(0.0), h.array(1.0)), [transforms.ComposeTransform(parts)])

    program = chain([0.3], {"x": distribution}, {"x": lambda h, t, v: v["x"]})
    expected_under(program, host, np.exp(0.3 + 0.5 * 0.25), default=LR())


@pytest.mark.parametrize("kind", ["LR", "RP", "half"])
def test_exact_elementwise_formula(host, kind):
    """A sample of a vector of Normals with a proposal is E = w (u . grad phi + psi phi), written out."""
    seen = []

    def cost(h, t, v):
        seen[:] = [v["x"]]
        return (v["x"] ** 3).sum(-1)

    estimator = {"LR": LR(q=wide), "RP": RP(wide), "half": Flow(half_velocity, q=wide)}[kind]
    amount = {"LR": 0.0, "RP": 1.0, "half": 0.5}[kind]

    def distribution(h, t, v):
        return h.dist.Normal(t[0][..., None] + h.array(WEIGHTS), t[1][..., None]).to_event(1)

    program = chain((0.3, 0.8), {"x": distribution}, {"x": cost})
    elbo = host.flow.TraceFlow_ELBO(estimators={"x": estimator}, dependencies="plates")

    def loss(theta):
        parts = (lambda part=part: part(host, list(theta.values())) for part in (program.model, program.guide))
        return host.differentiable_loss(elbo, *parts, seed=3), seen[0]

    (_, x), gradient = host.value_and_gradient(loss, {"loc": 0.3, "scale": 0.8}, has_aux=True)
    x = host.numpy(x)
    loc, scale = 0.3 + np.array(WEIGHTS), 0.8
    z = (x - loc) / scale
    weight = np.prod(1.4 * np.exp(-0.5 * z**2 + 0.5 * (z / 1.4) ** 2))
    score = np.array([(z / scale).sum(), ((z**2 - 1) / scale).sum()])
    pathwise = np.array([(3 * x**2).sum(), (3 * x**2 * z).sum()])
    expected = weight * (amount * pathwise + (1 - amount) * score * (x**3).sum())
    np.testing.assert_allclose([-gradient["loc"], -gradient["scale"]], expected, rtol=1e-10)


@pytest.mark.parametrize("shape", [(), (1,), (3,)])
def test_a_field_may_be_smaller_than_x(host, shape):
    """A velocity may broadcast to x, like a number, with any dims to its left."""

    def gradient(u, particles, size):
        def guide():
            with host.plate("plate", size) if size else nullcontext():
                loc = host.param("loc", host.array([0.1, 0.2, 0.3]), event_dim=1)
                host.sample("x", host.dist.Normal(loc, host.array(1.0)).to_event(1))

        def model():
            with host.plate("plate", size) if size else nullcontext():
                x = host.sample("x", host.dist.Normal(host.array(np.zeros(3)), host.array(1.0)).to_event(1))
                host.sample("y", host.dist.Normal((x**2).sum(-1), 1.0), obs=host.array(2.0))

        options = {"num_particles": particles, "vectorize_particles": particles > 1, "estimators": {"x": Flow(loc=u)}}
        return host.loss_and_gradients({"loc": [0.1, 0.2, 0.3]}, model, guide, plates=1, **options)[1]["loc"]

    for particles, size in ((1, None), (1, 1), (4, None), (4, 1), (4, 2)):
        expected = gradient(lambda x, p: 0.5, particles, size)
        found = gradient(lambda x, p: host.array(np.full(shape, 0.5)), particles, size)
        np.testing.assert_allclose(found, expected, rtol=1e-12)


@pytest.mark.parametrize("kind", ["LR", "RP", "half", "RP, q"])
@pytest.mark.parametrize("cached", [True, False])
def test_the_cache_of_a_transform(host, kind, cached):
    """The mean is right at y = a + b x, x ~ N(0.2, 0.5^2), if the transform or an intermediate caches x.

    d/da, d/db of -KL(q || N(0, 1)), q = N(a + 0.2 b, (0.5 b)^2).
    """
    options = {"cache_size": 1} if cached and host.name == "pyro" else {}

    def guide(h, t):
        affine = h.dist.transforms.AffineTransform(t[0], t[1], **options)
        h.sample("y", h.dist.TransformedDistribution(h.dist.Normal(h.array(0.2), h.array(0.5)), [affine]))

    program = Program(guide, lambda h, t: h.sample("y", h.dist.Normal(0 * t[0], h.array(1.0))), (0.3, 0.8))
    loc = 0.3 + 0.2 * 0.8
    exact = [-loc, -0.2 * loc - 0.25 * 0.8 + 1 / 0.8]
    expected_under(program, host, exact, estimators={"y": KINDS[kind]})


class UnsampledNumPyro(numpyro_dist.Normal):
    def sample(self, key, sample_shape=()):
        raise NotImplementedError


class UnsampledPyro(pyro_dist.Normal):
    def sample(self, sample_shape=()):
        raise NotImplementedError

    rsample = sample


@pytest.mark.parametrize("dependencies", ["graph", "plates"])
@pytest.mark.parametrize("kind", ["LR", "RP", "half"])
def test_a_density_without_a_sampler(host, kind, dependencies):
    """A density without a sampler works if it has a proposal: the gradient is that of -KL(N(m, 1) || N(0, 1))."""
    family = UnsampledNumPyro if host.name == "numpyro" else UnsampledPyro
    q = lambda p: host.dist.Normal(p.loc, 1.4 * p.scale)
    estimator = {"LR": LR(q=q), "RP": RP(q), "half": Flow(half_velocity, q=q)}[kind]
    program = Program(
        lambda h, t: h.sample("x", family(t[0], h.array(1.0))),
        lambda h, t: h.sample("x", h.dist.Normal(0 * t[0], h.array(1.0))),
        (0.7,),
    )
    expected_under(program, host, -0.7, estimators={"x": estimator}, dependencies=dependencies)
    with pytest.raises(NotImplementedError):
        host.gradients(program, 3)


class Undeclared(numpyro_dist.Distribution):
    """A Bernoulli that looks continuous, without arg_constraints: NumPyro's has_rsample compares two empty sets, and is true."""

    support = numpyro_dist.constraints.real
    pytree_data_fields = ("logits",)

    def __init__(self, logits):
        self.logits = logits
        super().__init__(jnp.shape(logits))

    def sample(self, key, sample_shape=()):
        return numpyro_dist.Bernoulli(logits=self.logits).sample(key, sample_shape).astype(float)

    def log_prob(self, value):
        return numpyro_dist.Bernoulli(logits=self.logits).log_prob(value)


class Foreign(Undeclared):
    """Like NumPyro's wrapper of a discrete TensorFlow Probability distribution: no support, and no ``intermediates`` in log_prob."""

    support, has_rsample, is_discrete = None, False, True


def test_a_foreign_distribution():
    """d/dt of -KL(Bernoulli(logit t) || Bernoulli(1/2)) is -p (1 - p) t."""
    host, p = HOSTS["numpyro"], 1 / (1 + np.exp(-0.7))
    program = Program(lambda h, t: h.sample("b", Foreign(t[0])), lambda h, t: h.sample("b", h.dist.Bernoulli(0.5)), (0.7,))
    expected_under(program, host, -p * (1 - p) * 0.7)
    with pytest.raises(ValueError, match="site 'b': Flow needs a continuous distribution, but Foreign is discrete"):
        host.gradients(program, 3, default=HALF)


def test_a_distribution_that_does_not_declare_its_parameters():
    """Auto takes the score; a path would have the gradient 0."""
    host, p = HOSTS["numpyro"], 1 / (1 + np.exp(-0.7))
    program = chain(0.7, {"x": lambda h, t, v: Undeclared(t[0])}, {"x": lambda h, t, v: v["x"]})
    assert Undeclared(0.7).has_rsample
    expected_under(program, host, p * (1 - p))
    with pytest.raises(
        ValueError, match=r"site 'x': RP needs .* but Undeclared does not say that it has one \(it has no arg_constraints\)"
    ):
        host.gradients(program, 3, default=RP())
    assert np.all(host.gradients(program, 3, default=RP(force=True)) == 0)


def test_a_flag_that_denies_a_path():
    """NumPyro's Levy is a transformed Normal but declares no reparameterized sampler: RP(force=True) is right, and Auto takes LR.

    1 / x is scale times a chi-square variable with one degree of freedom: E[1 / x] = 1 / scale for Levy(0, scale).
    """
    host = HOSTS["numpyro"]
    program = chain(1.3, {"x": lambda h, t, v: h.dist.Levy(0.0, t[0])}, {"x": lambda h, t, v: 1 / v["x"]})
    with pytest.raises(ValueError, match="site 'x': RP needs a reparameterized sampler, but Levy has none"):
        host.gradients(program, 3, default=RP())
    forced, auto, lr = (expected_under(program, host, -1 / 1.3**2, default=e) for e in (RP(force=True), Auto(), LR()))
    np.testing.assert_array_equal(auto, lr)
    assert not np.allclose(forced, lr)


def test_samplers_without_a_derivative(host):
    """The sampler of VonMises is a loop without reverse mode, but LR only needs a draw at detached parameters.

    E[cos x] = I1(k) / I0(k) cos m, whose derivative in m is -I1(k) / I0(k) sin m.
    """
    program = chain(0.5, {"x": lambda h, t, v: h.dist.VonMises(t[0], h.array(1.8))}, {"x": lambda h, t, v: h.math.cos(v["x"])})
    ratio = float(torch.special.i1(torch.tensor(1.8)) / torch.special.i0(torch.tensor(1.8)))
    expected_under(program, host, -ratio * np.sin(0.5), estimators={"x": LR()})


@pytest.mark.parametrize("family", ["Categorical", "Poisson"])
def test_integers_under_every_mode(family):
    """Integer draws between paths are right in reverse and forward mode: d/dt of E[k] m with k ~ p(t) and x ~ N(m k, 1)."""
    host = HOSTS["numpyro"]

    def discrete(h, t):
        if family == "Poisson":
            return h.dist.Poisson(jnp.exp(t[0]))
        return h.dist.Categorical(logits=jnp.stack([0 * t[0], t[0], 0 * t[0]]))

    program = chain(
        (0.3, 0.7),
        {"k": lambda h, t, v: discrete(h, t), "x": lambda h, t, v: h.dist.Normal(t[1] * v["k"], 1.0)},
        {"x": lambda h, t, v: v["x"]},
    )

    def mean(t):
        k = jnp.exp(t[0]) if family == "Poisson" else jax.nn.softmax(jnp.stack([0 * t[0], t[0], 0 * t[0]])) @ jnp.arange(3.0)
        return k * t[1]

    expected_under(program, host, np.array(jax.grad(mean)(jnp.array([0.3, 0.7]))), estimators={"k": LR()})
    elbo = host.flow.TraceFlow_ELBO(3, estimators={"k": LR()})

    def loss(t):
        return elbo.loss(jax.random.key(0), {}, lambda: program.model(host, list(t)), lambda: program.guide(host, list(t)))

    np.testing.assert_allclose(*(jax.jit(mode(loss))(jnp.array([0.3, 0.7])) for mode in (jax.jacfwd, jax.grad)), rtol=1e-12)


def test_pyro_a_support_that_is_left_open():
    class Open(pyro_dist.Normal):
        support = torch.distributions.constraints.dependent

    site = lambda h, t: h.sample("x", Open(t[0], h.array(1.0)))
    with pytest.raises(ValueError, match="site 'x': expected a support, but Open does not define one"):
        HOSTS["pyro"].gradients(Program(site, site, (0.7,)), 3, default=LR())
