"""What a site may be: nested wrappers, transforms, plates, scales, masks; where its estimator is said; control flow; stock ELBOs."""

from contextlib import nullcontext

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as numpyro_dist
import pyro
import pyro.distributions as pyro_dist
import pytest
import torch
from hosts import HOSTS, Program, chain, expected_under
from numpyro.contrib.control_flow import cond, scan

import flowvi.numpyro
import flowvi.pyro
from flowvi import LR, RP, Auto, Flow, ImplicitRP

HALF = Flow(loc=lambda x, p: 0.5, scale=lambda x, p: 0.5 * (x - p.loc) / p.scale)


def half_velocity(x, p, dtheta):
    return 0.5 * (dtheta.loc + (x - p.loc) / p.scale * dtheta.scale)


def standardize(x, p):
    return (x - p.loc) / p.scale


def shift(x, p):
    return x - p.loc


def wide(p):
    return type(p)(p.loc, 1.4 * p.scale)


KINDS = {
    "LR": LR(),
    "RP": RP(),
    "cdf": ImplicitRP(),
    "S": ImplicitRP(standardize),
    "G-Rep": ImplicitRP(shift, exact=False),
    "half": HALF,
    "half, general": Flow(half_velocity),
    "half, divergence given": Flow(half_velocity, divergence=lambda x, p, dtheta: 0.5 * dtheta.scale / p.scale + 0 * x),
    "LR, q": LR(q=wide),
    "RP, q": RP(wide),
    "half, q": Flow(half_velocity, q=wide),
}
WEIGHTS = [0.5, -1.0, 2.0]


def base(h, t, batch_shape):
    """A Normal whose elements have distinct locations, of any batch shape that ends in 3."""
    return h.dist.Normal(t[0][..., None] + h.array(WEIGHTS), t[1][..., None]).expand(batch_shape)


# Each nesting of wrappers around the same three independent Normals, with event dim 1; Pyro's programs have a batch dim for replicates.
NESTINGS = {
    "to_event": lambda d: d.to_event(1),
    "mask, to_event": lambda d: d.mask(True).to_event(1),
    "to_event, mask": lambda d: d.to_event(1).mask(False),
    "to_event, expand": lambda d: d.to_event(1).expand(d.batch_shape[:-1]),
    "expand, mask, to_event": lambda d: d.expand(d.batch_shape).mask(False).to_event(1),
    "to_event, mask, mask": lambda d: d.to_event(1).mask(False).mask(True),
}


def cost_of(h, x):
    return (h.array([1.0, 0.5, -0.3]) * x**2).sum(-1) + h.math.cos(x.sum(-1))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("nesting", NESTINGS)
def test_nested_wrappers(host, nesting, kind):
    """Every nesting gives, sample by sample, what three scalar sites give that are drawn with the same numbers."""

    def program(wrap):
        def distribution(h, t, v):
            return wrap(base(h, t, (*t[0].shape, 3)))

        return chain((0.3, 0.8), {"x": distribution}, {"x": lambda h, t, v: cost_of(h, v["x"])})

    options = {"estimators": {"x": KINDS[kind]}}
    reference = host.gradients(program(NESTINGS["to_event, mask"]), 5, **options)
    np.testing.assert_allclose(host.gradients(program(lambda d: NESTINGS[nesting](d).mask(False)), 5, **options), reference, rtol=1e-10)
    if "q" not in kind:  # the estimate itself, from the sum of the scalar estimates on the same draws
        assert np.isfinite(reference).all()


@pytest.mark.parametrize("kind", ["RP", "cdf", "half", "half, general", "G-Rep", "RP, q", "half, q"])
def test_plain_transforms_are_entered(host, kind):
    """exp(Normal) as a plain transformed distribution: the base sample flows and is pushed through."""

    def transformed(h, t, v):
        return h.dist.TransformedDistribution(h.dist.Normal(*t), [h.dist.transforms.ExpTransform()])

    def cost(h, y):
        return h.math.sin(y) + 0.1 * y

    pushed = chain((0.3, 0.8), {"x": transformed}, {"x": lambda h, t, v: cost(h, v["x"])})
    inner = chain((0.3, 0.8), {"x": lambda h, t, v: h.dist.Normal(*t)}, {"x": lambda h, t, v: cost(h, h.math.exp(v["x"]))})
    gradients = [host.gradients(p, 6, estimators={"x": KINDS[kind]}) for p in (pushed, inner)]
    np.testing.assert_allclose(*gradients, rtol=1e-8)


def test_a_live_transform_moves_the_value(host):
    """y = a + b exp(x): LR on y and RP through everything agree in the mean; a Flow on the base keeps the transform's own path."""

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
    """x = exp(t + log e) with e from an Exponential: the transform in the middle is live, and the support is that of x at every t."""
    exp, shift = host.dist.transforms.ExpTransform, host.dist.transforms.AffineTransform

    def distribution(h, t, v):
        return h.dist.TransformedDistribution(h.dist.Exponential(h.array(1.0)), [exp().inv, shift(t[0], h.array(1.0)), exp()])

    program = chain([0.3], {"x": distribution}, {"x": lambda h, t, v: v["x"]})
    expected_under(program, host, np.exp(0.3), default=LR())


@pytest.mark.parametrize("kind", ["LR", "RP", "half"])
def test_exact_elementwise_formula(host, kind):
    """E = w (u . grad phi + psi phi), written out, for one sample of a vector of Normals with a proposal."""
    seen = []

    def cost(h, t, v):
        seen[:] = [v["x"]]
        return (v["x"] ** 3).sum(-1)

    estimator = {"LR": LR(q=wide), "RP": RP(wide), "half": Flow(half_velocity, q=wide)}[kind]
    amount = {"LR": 0.0, "RP": 1.0, "half": 0.5}[kind]

    def distribution(h, t, v):
        return h.dist.Normal(t[0][..., None] + h.array(WEIGHTS), t[1][..., None]).to_event(1)

    program = chain((0.3, 0.8), {"x": distribution}, {"x": cost})
    if host.name == "pyro":
        gradient = host.gradients(program, 1, estimators={"x": estimator})[0]
        x = seen[0].detach().numpy()[0]
    else:

        def estimate(theta):
            elbo = host.flow.TraceFlow_ELBO(estimators={"x": estimator}, dependencies="plates")
            t = list(theta)
            loss = elbo.loss(jax.random.key(3), {}, lambda: program.model(host, t), lambda: program.guide(host, t))
            return -loss, seen[0]

        gradient, x = jax.grad(estimate, has_aux=True)(jnp.array([0.3, 0.8]))
        x = np.asarray(x)
    loc, scale = 0.3 + np.array(WEIGHTS), 0.8
    z = (x - loc) / scale
    weight = np.prod(1.4 * np.exp(-0.5 * z**2 + 0.5 * (z / 1.4) ** 2))
    score = np.array([(z / scale).sum(), ((z**2 - 1) / scale).sum()])
    pathwise = np.array([(3 * x**2).sum(), (3 * x**2 * z).sum()])
    expected = weight * (amount * pathwise + (1 - amount) * score * (x**3).sum())
    np.testing.assert_allclose(gradient, expected, rtol=1e-10)


@pytest.mark.parametrize("shape", [(), (1,), (3,)])
def test_a_field_may_be_smaller_than_x(host, shape):
    """A velocity that broadcasts to x moves it as a number does, whatever the dims to its left."""
    plate = numpyro.plate if host.name == "numpyro" else pyro.plate

    def gradient(u, particles, size):
        def guide():
            with plate("plate", size) if size else nullcontext():
                loc = host.param("loc", host.array([0.1, 0.2, 0.3]), event_dim=1)
                host.sample("x", host.dist.Normal(loc, host.array(1.0)).to_event(1))

        def model():
            with plate("plate", size) if size else nullcontext():
                x = host.sample("x", host.dist.Normal(host.array(np.zeros(3)), host.array(1.0)).to_event(1))
                host.sample("y", host.dist.Normal((x**2).sum(-1), 1.0), obs=host.array(2.0))

        options = {"num_particles": particles, "vectorize_particles": particles > 1, "estimators": {"x": Flow(loc=u)}}
        if host.name == "numpyro":  # without jit: there is no tracer in the field
            elbo = host.flow.TraceFlow_ELBO(**options)
            loss = lambda loc: elbo.loss(jax.random.key(0), {"loc": loc}, model, guide)
            return np.asarray(jax.grad(loss)(jnp.array([0.1, 0.2, 0.3])))
        pyro.clear_param_store()
        pyro.set_rng_seed(0)
        host.flow.TraceFlow_ELBO(max_plate_nesting=1, **options).loss_and_grads(model, guide)
        return pyro.param("loc").grad.numpy()

    for particles, size in ((1, None), (1, 1), (4, None), (4, 1), (4, 2)):
        expected = gradient(lambda x, p: 0.5, particles, size)
        found = gradient(lambda x, p: host.array(np.full(shape, 0.5)), particles, size)
        np.testing.assert_allclose(found, expected, rtol=1e-12)


def test_numpyro_keeps_scores_by_statement():
    """Where the loss is kept by statement, each score is with its own site, so that their sum alone is the estimator."""
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


# ---- plates and control flow; more of scales, masks and plates in test_host_bugs.py


def test_a_cost_outside_the_plate_carries_every_weight(host):
    """E[(z_1 + z_2)^2] under N(m, 1)^2: each element's score meets the joint cost with the joint weight."""

    def site(h, t):
        return h.sample("z", h.dist.Normal(t[0] + h.array([0.0, 0.0]), h.array(1.0)).mask(False))

    def guide(h, t):
        with h.plate("n", 2):
            site(h, t)

    def model(h, t):
        with h.plate("n", 2):
            z = site(h, t)
        h.factor("f", z.sum(-1, keepdims=h.name == "pyro") ** 2)

    exact = 2 * 2 * (2 * 0.7)
    for estimator in (LR(q=wide), RP(wide), Flow(half_velocity, q=wide)):
        expected_under(Program(guide, model, (0.7,), plates=1), host, exact, estimators={"z": estimator})


@pytest.mark.parametrize("particles", [1, 4])
def test_python_control_flow_in_pyro(particles):
    """A branch on a discrete latent, in guide and model: the site z is there only sometimes. Provenance would not see it."""
    logit, loc = (torch.tensor(v, requires_grad=True) for v in (0.3, 0.4))

    def guide():
        if pyro.sample("b", pyro_dist.Bernoulli(logits=logit)).item() > 0:
            pyro.sample("z", pyro_dist.Normal(loc, 1.0))

    def model():
        if pyro.sample("b", pyro_dist.Bernoulli(torch.tensor(0.5))).item() > 0:
            pyro.sample("z", pyro_dist.Normal(torch.tensor(0.0), 1.0))

    p = 1 / (1 + np.exp(-0.3))
    exact = [p * (1 - p) * (-0.5 * 0.4**2 - np.log(p) + np.log(1 - p)), -p * 0.4]
    elbo = flowvi.pyro.TraceFlow_ELBO(particles, default=LR())
    samples = np.empty((2000 // particles, 2))
    for sample in samples:
        logit.grad, loc.grad = torch.zeros(()), torch.zeros(())
        elbo.differentiable_loss(model, guide).backward()
        sample[:] = -logit.grad, -loc.grad
    assert np.all(np.abs(samples.mean(0) - exact) < 5 * samples.std(0) / np.sqrt(len(samples)))


@pytest.mark.parametrize("kind", ["LR", "RP", "half", "LR, q"])
def test_a_scale_for_each_element(host, kind):
    """d/dm of -sum_i c_i KL(N(m, 1) || N(0, 1)) is -m sum_i c_i."""

    def part(h, loc):
        with h.plate("n", 3), h.scale(h.array([1.0, 2.0, 4.0])):
            h.sample("x", h.dist.Normal(loc + h.array([0.0, 0.0, 0.0]), h.array(1.0)))

    program = Program(lambda h, t: part(h, t[0]), lambda h, t: part(h, 0 * t[0]), (0.7,), plates=1)
    expected_under(program, host, -0.7 * 7, estimators={"x": KINDS[kind]})


def masked_by_a_handler(h, d, mask):
    with numpyro.handlers.mask(mask=mask) if h.name == "numpyro" else pyro.poutine.mask(mask=mask):
        return h.sample("x", d)


MASKS = {
    "distribution, False": lambda h, d: h.sample("x", d.mask(False)),
    "distribution, tensor": lambda h, d: h.sample("x", d.mask(h.math.zeros(()) > 0)),
    "distribution, elements": lambda h, d: h.sample("x", d.mask(h.array([1.0, 0.0]) > 0)),
    "handler, False": lambda h, d: masked_by_a_handler(h, d, False),
    "handler, tensor": lambda h, d: masked_by_a_handler(h, d, h.math.zeros(()) > 0),
    "handler, elements": lambda h, d: masked_by_a_handler(h, d, h.array([1.0, 0.0]) > 0),
}


@pytest.mark.parametrize("kind", ["LR", "RP", "half"])
@pytest.mark.parametrize("way", MASKS)
def test_every_mask_leaves_the_score(host, way, kind):
    """Two elements; d/dm E[-x^2 / 2] is -m for each, and the entropy of N(m, 1), masked or not, adds nothing."""

    def part(h, sample, loc):
        with h.plate("n", 2):
            sample(h, h.dist.Normal(loc + h.array([0.0, 0.0]), h.array(1.0)))

    program = Program(
        lambda h, t: part(h, MASKS[way], t[0]), lambda h, t: part(h, lambda h, d: h.sample("x", d), 0 * t[0]), (0.7,), plates=1
    )
    expected_under(program, host, -1.4, estimators={"x": KINDS[kind]})


def test_pyro_observations_without_a_plate():
    """A vector is one cost, counted once, inside a plate further out; where there is none, Pyro's validation refuses it."""
    host, data = HOSTS["pyro"], np.array([0.5, -1.0, 2.0])

    def guide(h, t):
        h.sample("z", h.dist.Normal(t[0], h.array(1.0)))

    def model(h, t):
        z = h.sample("z", h.dist.Normal(0 * t[0], h.array(1.0)))
        h.sample("y", h.dist.Normal(z, h.array(1.0)), obs=h.array(data).expand(*t[0].shape[:-1], 3))

    expected_under(Program(guide, model, (0.7,), plates=1), host, -0.7 + (data - 0.7).sum(), estimators={"z": LR()})
    with pytest.raises(ValueError, match='at site "y", invalid log_prob shape'):
        host.flow.TraceFlow_ELBO(default=LR()).loss(*(lambda part=part: part(host, [torch.tensor(0.7)]) for part in (model, guide)))


def test_pyro_a_factor_that_is_a_score():
    """``pyro.factor(..., has_rsample=False)``: x ~ N(0.7, 1) and the factor log N(x; m, 1) / N(x; 0.7, 1) are LR at m = 0.7, by hand.

    d/dm of -KL(N(m, 1) || N(0, 1)) is -m.
    """

    def guide(h, t):
        fixed, moving = h.dist.Normal(0 * t[0] + 0.7, h.array(1.0)), h.dist.Normal(t[0], h.array(1.0))
        x = h.sample("x", fixed)
        pyro.factor("f", moving.log_prob(x) - fixed.log_prob(x), has_rsample=False)

    model = lambda h, t: h.sample("x", h.dist.Normal(0 * t[0], h.array(1.0)))
    expected_under(Program(guide, model, (0.7,)), HOSTS["pyro"], -0.7)


@pytest.mark.parametrize("dependencies", ["graph", "plates"])
def test_pyro_a_factor_that_is_a_score_meets_every_cost(dependencies):
    """Also the cost that stands before it: x ~ N(0, 1) and the factor log N(x; 0, s) / N(x; 0, 1).

    d/ds of -KL(N(0, s) || N(0, 2)) is 1/s - s/4.
    """

    def guide(h, t):
        fixed, moving = h.dist.Normal(0 * t[0], h.array(1.0)), h.dist.Normal(0 * t[0], t[0])
        x = h.sample("x", fixed)
        pyro.factor("f", moving.log_prob(x) - fixed.log_prob(x), has_rsample=False)

    model = lambda h, t: h.sample("x", h.dist.Normal(0 * t[0], h.array(2.0)))
    expected_under(Program(guide, model, (1.0,)), HOSTS["pyro"], 0.75, dependencies=dependencies)


@pytest.mark.parametrize("kind", ["LR", "RP", "half", "RP, q"])
@pytest.mark.parametrize("cached", [True, False])
def test_the_cache_of_a_transform(host, kind, cached):
    """y = a + b x with x ~ N(0.2, 0.5^2), the preimage kept by the transform or as an intermediate.

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
    """Its proposal is all that draws: -KL(N(m, 1) || N(0, 1)) again."""
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


class Foreign(numpyro_dist.Distribution):
    """What NumPyro makes of a discrete distribution of TensorFlow Probability: no support, no ``intermediates`` in log_prob."""

    support, has_rsample, is_discrete = None, False, True
    pytree_data_fields = ("logits",)

    def __init__(self, logits):
        self.logits = logits
        super().__init__(jnp.shape(logits))

    def sample(self, key, sample_shape=()):
        return numpyro_dist.Bernoulli(logits=self.logits).sample(key, sample_shape).astype(float)

    def log_prob(self, value):
        return numpyro_dist.Bernoulli(logits=self.logits).log_prob(value)


def test_a_foreign_distribution():
    """d/dt of -KL(Bernoulli(logit t) || Bernoulli(1/2)) is -p (1 - p) t."""
    host, p = HOSTS["numpyro"], 1 / (1 + np.exp(-0.7))
    program = Program(lambda h, t: h.sample("b", Foreign(t[0])), lambda h, t: h.sample("b", h.dist.Bernoulli(0.5)), (0.7,))
    expected_under(program, host, -p * (1 - p) * 0.7)
    with pytest.raises(ValueError, match="site 'b': Flow needs a continuous distribution, but Foreign is discrete"):
        host.gradients(program, 3, default=HALF)


def test_a_flag_that_denies_a_path():
    """NumPyro's Levy is the transform of a Normal but says it has no path: RP(force=True) is right, Auto takes the score.

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
    """VonMises is drawn by a loop without a reverse mode: a draw from detached parameters is all that LR needs.

    E[cos x] = I1(k) / I0(k) cos m, whose derivative in m is -I1(k) / I0(k) sin m.
    """
    program = chain(0.5, {"x": lambda h, t, v: h.dist.VonMises(t[0], h.array(1.8))}, {"x": lambda h, t, v: h.math.cos(v["x"])})
    ratio = float(torch.special.i1(torch.tensor(1.8)) / torch.special.i0(torch.tensor(1.8)))
    expected_under(program, host, -ratio * np.sin(0.5), estimators={"x": LR()})


@pytest.mark.parametrize("family", ["Categorical", "Poisson"])
def test_integers_under_every_mode(family):
    """Integer draws between paths, in reverse and in forward mode: d/dt of E[k] m with k ~ p(t) and x ~ N(m k, 1)."""
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

    expected_under(program, host, np.array(jax.grad(mean)(jnp.array([0.3, 0.7]))))
    elbo = host.flow.TraceFlow_ELBO(3)

    def loss(t):
        return elbo.loss(jax.random.key(0), {}, lambda: program.model(host, list(t)), lambda: program.guide(host, list(t)))

    np.testing.assert_allclose(*(jax.jit(mode(loss))(jnp.array([0.3, 0.7])) for mode in (jax.jacfwd, jax.grad)), rtol=1e-12)


def test_pyro_a_support_that_is_left_open():
    class Open(pyro_dist.Normal):
        support = torch.distributions.constraints.dependent

    site = lambda h, t: h.sample("x", Open(t[0], h.array(1.0)))
    with pytest.raises(ValueError, match="site 'x': expected a support, but that of Open is left open"):
        HOSTS["pyro"].gradients(Program(site, site, (0.7,)), 3, default=LR())


# ---- sticking the landing


def hierarchy(theta):
    """The model is the guide at theta = 0: x1 ~ N(0, 1), a plate of x2 ~ N(x1, 1), nothing observed."""

    def part(h, a, b, c, d):
        x1 = h.sample("x1", h.dist.Normal(a, h.math.exp(b)))
        with h.plate("n", 2):
            h.sample("x2", h.dist.Normal(x1 + c, h.math.exp(d)))

    return Program(lambda h, t: part(h, *t), lambda h, t: part(h, *(0 * p for p in t)), theta, plates=1)


def test_sticking_the_landing_has_no_variance_at_the_optimum(host):
    """Only the path that parents take through a site's own parameters is kept; without that, RP would not be exact here."""
    samples = host.gradients(hierarchy((0.0, 0.0, 0.0, 0.0)), 50, entropy="stl")
    np.testing.assert_allclose(samples, 0.0, atol=1e-12)
    assert host.gradients(hierarchy((0.0, 0.0, 0.0, 0.0)), 50).std() > 0.1  # "full" has variance
    assert host.gradients(hierarchy((0.3, 0.2, -0.1, 0.1)), 50, entropy="stl").std() > 0.1


@pytest.mark.parametrize("kind", ["LR", "RP", "half", "RP, q"])
def test_sticking_the_landing_is_unbiased(host, kind):
    """d/da, d/db, d/dc, d/dd of -KL off the optimum."""
    a, b, c, d = theta = (0.3, 0.2, -0.1, 0.1)
    exact = [-a, 1 - np.exp(2 * b), -2 * c, 2 * (1 - np.exp(2 * d))]
    expected_under(hierarchy(theta), host, exact, estimators={"x1": KINDS[kind], "x2": KINDS[kind]}, entropy="stl")


# ---- where an estimator is said


def described(host, guide, model, **options):
    elbo = host.flow.TraceFlow_ELBO(**options)
    return {d.name: (type(d.estimator).__name__, d.source) for d in elbo.describe(model, guide)}


def annotated(host, guide_infer=None, model_infer=None, wrapper=None):
    def guide():
        d = host.dist.Normal(host.param("m", host.array(0.1)), host.array(1.0))
        host.sample("x", host.flow.Estimated(d, wrapper) if wrapper else d, infer=guide_infer)

    def model():
        host.sample("x", host.dist.Normal(host.array(0.0), host.array(1.0)), infer=model_infer)

    return guide, model


def test_precedence(host):
    """1. the mapping or function, 2. the guide's annotation, 3. the wrapper, 4. the model's annotation, 5. the default."""
    everything = {"guide_infer": {"estimator": LR()}, "model_infer": {"estimator": ImplicitRP()}, "wrapper": HALF}
    places = [
        ({"estimators": {"x": RP()}}, {}, "RP", "estimators['x']"),
        ({"estimators": lambda site: RP() if site["name"] == "x" else None}, {}, "RP", "estimators(site)"),
        ({"estimators": lambda site: None}, {}, "LR", "guide"),
        ({}, {"guide_infer": None}, "Flow", "Estimated"),
        ({}, {"guide_infer": None, "wrapper": None}, "ImplicitRP", "model"),
        ({"default": LR()}, {"guide_infer": None, "wrapper": None, "model_infer": None}, "LR", "default"),
        ({}, {"guide_infer": None, "wrapper": None, "model_infer": None}, "RP", "default"),
    ]
    for options, removed, estimator, said in places:
        guide, model = annotated(host, **{**everything, **removed})
        assert described(host, guide, model, **options) == {"x": (estimator, said)}


def test_a_model_annotation_costs_no_run_after_the_first(host):
    runs = []

    def guide():
        runs.append("guide")
        host.sample("x", host.dist.Normal(host.param("m", host.array(0.1)), host.array(1.0)))

    def model():
        wide = 1.5  # an inline function with a closure is a new object at every run
        estimator = Flow(loc=lambda x, p: 0.5 * wide / 1.5)
        host.sample("x", host.dist.Normal(host.array(0.0), host.array(1.0)), infer={"estimator": estimator})

    elbo = host.flow.TraceFlow_ELBO()
    for expected in (2, 3, 4):
        assert elbo.describe(model, guide)[0].source == "model"
        assert len(runs) == expected


def test_a_model_annotation_mends_what_the_default_refuses(host):
    def guide():
        loc = host.param("m", host.array(0.1))
        host.sample("x", host.dist.VonMises(loc, host.array(1.0)))

    def model():
        d = host.dist.VonMises(host.array(0.0), host.array(1.0))
        host.sample("x", d, infer={"estimator": LR()})

    assert described(host, guide, model, default=RP()) == {"x": ("LR", "model")}


def regression(host, annotate):
    def model():
        infer = {"estimator": LR()} if annotate else None
        w = host.sample("w", host.dist.Normal(host.array(0.0), host.array(1.0)), infer=infer)
        s = host.sample("s", host.dist.LogNormal(host.array(0.0), host.array(1.0)))
        host.sample("y", host.dist.Normal(w, s), obs=host.array(0.5))

    return model


def autoguide(host, name, model):
    module = numpyro.infer.autoguide if host.name == "numpyro" else pyro.infer.autoguide
    guide = getattr(module, name)(model)
    if host.name == "numpyro":
        with numpyro.handlers.seed(rng_seed=0), numpyro.handlers.trace():
            guide()
    return guide


def test_autonormal_takes_names_of_model_sites(host):
    suffix = "_unconstrained" if host.name == "pyro" else ""
    model = regression(host, annotate=False)
    guide = autoguide(host, "AutoNormal", model)
    got = described(host, guide, model, estimators={"w": LR(), "s": HALF})
    assert got == {f"w{suffix}": ("LR", "estimators['w']"), f"s{suffix}": ("Flow", "estimators['s']")}
    model = regression(host, annotate=True)
    guide = autoguide(host, "AutoNormal", model)
    assert described(host, guide, model) == {f"w{suffix}": ("LR", "model"), f"s{suffix}": ("RP", "default")}


def test_two_names_for_one_site():
    host = HOSTS["pyro"]
    model = regression(host, annotate=False)
    guide = autoguide(host, "AutoNormal", model)
    with pytest.raises(ValueError, match="site 'w_unconstrained': the keys .* both name this site"):
        described(host, guide, model, estimators={"w": LR(), "w_unconstrained": RP()})


@pytest.mark.parametrize("annotate", [True, False])
def test_a_joint_site_is_named(host, annotate):
    model = regression(host, annotate)
    guide = autoguide(host, "AutoDiagonalNormal", model)
    joint = next(iter(described(host, guide, regression(host, annotate=False))))
    assert "latent" in joint
    with pytest.raises(ValueError, match=f"site 'w': .* names a site that is no random choice.*The random sites are: '{joint}'"):
        described(host, guide, model, estimators=None if annotate else {"w": LR()})


# ---- the wrapper


@pytest.mark.parametrize("kind", KINDS)
def test_the_wrapper_is_the_annotation(host, kind):
    """Estimated(p, e), in any nesting, does sample by sample what the mapping does; outside flowvi it is p."""

    def program(wrap):
        def guide(h, t):
            h.sample("x", wrap(h, h.dist.Normal(t[0][..., None] + h.array(WEIGHTS), t[1][..., None])))

        def model(h, t):
            x = h.sample("x", h.dist.Normal(0 * t[0][..., None] + h.array(WEIGHTS), h.array(1.0)).to_event(1))
            h.factor("f", cost_of(h, x))

        return Program(guide, model, (0.3, 0.8))

    plain = host.gradients(program(lambda h, d: d.to_event(1)), 5, estimators={"x": KINDS[kind]})
    for wrap in (
        lambda h, d: h.flow.Estimated(d, KINDS[kind]).to_event(1),
        lambda h, d: h.flow.Estimated(d.to_event(1), KINDS[kind]),
        lambda h, d: h.flow.Estimated(d, KINDS[kind]).to_event(1).mask(True),
    ):
        np.testing.assert_allclose(host.gradients(program(wrap), 5), plain, rtol=1e-10)
    overridden = host.gradients(program(lambda h, d: h.flow.Estimated(d.to_event(1), LR())), 5, estimators={"x": RP()})
    np.testing.assert_allclose(overridden, host.gradients(program(lambda h, d: d.to_event(1)), 5, estimators={"x": RP()}), rtol=1e-10)


def test_the_wrapper_is_a_distribution(host):
    plain = host.dist.Normal(host.array([0.3, 0.1]), host.array(1.5))
    wrapped = host.flow.Estimated(plain, LR(q=wide))
    x = host.array([0.2, -0.4])
    assert type(wrapped.support) is type(plain.support)
    np.testing.assert_allclose(wrapped.log_prob(x), plain.log_prob(x))
    np.testing.assert_allclose(wrapped.to_event(1).log_prob(x), plain.to_event(1).log_prob(x))
    np.testing.assert_allclose(wrapped.mask(False).log_prob(x), 0 * plain.log_prob(x))
    assert tuple(wrapped.expand((3, 2)).batch_shape) == (3, 2)
    np.testing.assert_allclose(wrapped.mean, plain.mean)
    other = host.dist.Normal(host.array(0.0), host.array(1.0))
    kl = numpyro_dist.kl_divergence if host.name == "numpyro" else torch.distributions.kl_divergence
    np.testing.assert_allclose(kl(wrapped, other), kl(plain, other))
    np.testing.assert_allclose(kl(other.expand((2,)), wrapped), kl(other.expand((2,)), plain))
    np.testing.assert_allclose(kl(wrapped, wrapped), 0 * kl(plain, plain), atol=1e-12)
    if host.name == "numpyro":
        key = jax.random.key(0)
        np.testing.assert_allclose(wrapped.sample(key, (3,)), plain.sample(key, (3,)))
        assert jax.tree.structure(wrapped) == jax.tree.structure(host.flow.Estimated(plain, LR(q=wide)))
        np.testing.assert_allclose(jax.jit(lambda d: d.log_prob(x))(wrapped), plain.log_prob(x))
        assert numpyro_dist.biject_to(wrapped.support)(0.3) == 0.3
    else:
        draws = []
        for d in (wrapped, plain):
            pyro.set_rng_seed(0)
            draws.append(d.sample((3,)).detach().numpy())
        np.testing.assert_allclose(*draws)


CHAIN_LENGTH = 3


def scanned(estimator, annotate=None):
    """x_t ~ N(0.8 x_{t-1} + m, 1) through scan, cost sum_t cos(x_t)."""
    h = HOSTS["numpyro"]

    def guide(h_, t):
        def step(x, _):
            d = numpyro_dist.Normal(0.8 * x + t[0], 1.0).mask(False)
            d = flowvi.numpyro.Estimated(d, estimator) if estimator is not None else d
            x = numpyro.sample("x", d, infer={"estimator": annotate} if annotate else None)
            return x, None

        scan(step, jnp.array(0.0), None, length=CHAIN_LENGTH)

    def model(h_, t):
        def step(x, _):
            x = numpyro.sample("x", numpyro_dist.Normal(0.8 * x, 1.0).mask(False))
            return x, x

        _, xs = scan(step, jnp.array(0.0), None, length=CHAIN_LENGTH)
        numpyro.factor("f", jnp.cos(xs).sum())

    return h, Program(guide, model, (0.4,))


def scanned_truth():
    total, loc, variance, slope = 0.0, 0.0, 0.0, 0.0
    for _ in range(CHAIN_LENGTH):
        loc, variance, slope = 0.8 * loc + 0.4, 0.64 * variance + 1.0, 0.8 * slope + 1.0
        total += -np.sin(loc) * np.exp(-variance / 2) * slope
    return total


@pytest.mark.parametrize("kind", ["LR", "RP", "cdf", "half", "half, general", "G-Rep", "LR, q", "RP, q", "half, q"])
@pytest.mark.parametrize("particles", [1, 4])
def test_the_wrapper_inside_scan(kind, particles):
    host, program = scanned(KINDS[kind])
    expected_under(program, host, scanned_truth(), particles=particles, n=40_000 // particles)


@pytest.mark.parametrize("kind", ["LR", "RP", "half, general", "LR, q"])
def test_the_wrapper_inside_scan_in_a_plate(kind):
    """Two chains x_t ~ N(x_{t-1} + m, 1), t = 1..3, from -1 and 1, with cost sum_t x_t^2: d/dm is the sum of 2 t (x_0 + t m)."""
    host = HOSTS["numpyro"]

    def chains(family, loc):
        def step(x, _):
            with numpyro.plate("n", 2):
                x = numpyro.sample("x", family(x + loc))
            return x, x

        return scan(step, jnp.array([-1.0, 1.0]), None, length=3)[1]

    def guide(h, t):
        chains(lambda loc: flowvi.numpyro.Estimated(numpyro_dist.Normal(loc, 1.0).mask(False), KINDS[kind]), t[0])

    def model(h, t):
        h.factor("f", (chains(lambda loc: numpyro_dist.Normal(loc, 1.0).mask(False), 0.0) ** 2).sum())

    exact = sum(2 * i * (start + i * 0.4) for i in (1, 2, 3) for start in (-1, 1))
    expected_under(Program(guide, model, (0.4,)), host, exact)


def test_a_plain_annotation_inside_scan_is_refused():
    for estimator in (LR(), HALF):
        host, program = scanned(None, annotate=estimator)
        with pytest.raises(
            ValueError, match=r"site 'x': handlers do not reach into scan and cond.*Estimated\(distribution, estimator\)"
        ):
            host.gradients(program, 2)
    host, program = scanned(LR())
    with pytest.raises(ValueError, match="site 'x': handlers do not reach into scan"):
        host.gradients(program, 2, estimators={"x": HALF})
    host, program = scanned(None, annotate=RP())
    expected_under(program, host, scanned_truth())


def test_discrete_sites_inside_scan_need_no_wrapper():
    """b_t ~ Bernoulli(sigmoid(m + b_{t-1})), cost sum_t b_t, against enumeration."""
    host = HOSTS["numpyro"]

    def body(logits):
        def step(b, _):
            b = numpyro.sample("b", numpyro_dist.Bernoulli(logits=logits(b)).mask(False))
            return b.astype(float), b

        return scan(step, jnp.array(0.0), None, length=CHAIN_LENGTH)[1]

    program = Program(
        lambda h, t: body(lambda b: t[0] + b), lambda h, t: numpyro.factor("f", 1.0 * body(lambda b: 0.0 * b).sum()), (0.4,)
    )

    def expectation(m):
        total, p = 0.0, 0.0
        for _ in range(CHAIN_LENGTH):
            p = p / (1 + np.exp(-m - 1)) + (1 - p) / (1 + np.exp(-m))
            total += p
        return total

    exact = (expectation(0.4 + 1e-6) - expectation(0.4 - 1e-6)) / 2e-6
    expected_under(program, host, exact)


@pytest.mark.parametrize("kind", ["LR", "half", "RP", "LR, q"])
def test_the_wrapper_inside_cond(kind):
    """c ~ Bernoulli(0.3) chooses the branch; the cost is sin(x)."""
    host = HOSTS["numpyro"]

    def branch(loc):
        return lambda _: numpyro.sample("x", flowvi.numpyro.Estimated(numpyro_dist.Normal(loc, 1.0).mask(False), KINDS[kind]))

    def guide(h, t):
        c = numpyro.sample("c", numpyro_dist.Bernoulli(0.3).mask(False))
        cond(c > 0, branch(t[0]), branch(-2 * t[0]), None)

    def model(h, t):
        numpyro.sample("c", numpyro_dist.Bernoulli(0.3).mask(False))
        x = numpyro.sample("x", numpyro_dist.Normal(0.0, 1.0).mask(False))
        numpyro.factor("f", jnp.sin(x))

    exact = np.exp(-0.5) * (0.3 * np.cos(0.4) - 0.7 * 2 * np.cos(0.8))
    expected_under(Program(guide, model, (0.4,)), host, exact)


def test_the_wrapper_in_one_branch_only():
    """JAX has branches of one kind; the estimators of the two may be equal, and need not be the same object."""
    host = HOSTS["numpyro"]

    def branch(estimator):
        d = numpyro_dist.Normal(0.3, 1.0)
        return lambda _: numpyro.sample("x", flowvi.numpyro.Estimated(d, estimator) if estimator else d)

    def guide(*branches):
        return lambda h, t: cond(t[0] > 0, *map(branch, branches), None)

    model = lambda h, t: numpyro.sample("x", numpyro_dist.Normal(0.0, 1.0))
    host.gradients(Program(guide(LR(q=wide), LR(q=wide)), model, (0.4,)), 2)
    for other in (None, LR()):
        with pytest.raises(TypeError, match="same"):
            host.gradients(Program(guide(LR(q=wide), other), model, (0.4,)), 2)


@pytest.mark.parametrize("kind", [k for k in KINDS if k != "cdf"])
@pytest.mark.parametrize("elbo", ["Trace_ELBO", "TraceGraph_ELBO", "TraceEnum_ELBO"])
def test_the_wrapper_under_pyros_own_elbos(elbo, kind):
    """At q = p Pyro's own objectives follow the estimator: x -> y, so that a lost path or score would show."""
    n = 20_000
    leaf = torch.full((n,), 0.4, requires_grad=True)

    def guide():
        with pyro.plate("n", n):
            x = pyro.sample("x", flowvi.pyro.Estimated(pyro_dist.Normal(leaf, 0.9), KINDS[kind]))
            pyro.sample("y", flowvi.pyro.Estimated(pyro_dist.Normal(torch.sin(x), 0.7), LR()))

    def model():
        with pyro.plate("n", n):
            x = pyro.sample("x", pyro_dist.Normal(0.0, 1.0))
            pyro.sample("y", pyro_dist.Normal(x, 1.0))

    def exact(m):  # E[log p(x, y)] + entropies, by quadrature over x; E[(y - x)^2] = 0.49 + (sin x - x)^2
        nodes, weights = np.polynomial.hermite_e.hermegauss(60)
        x = m + 0.9 * nodes
        return (weights * (-0.5 * x**2 - 0.5 * (0.49 + (np.sin(x) - x) ** 2))).sum() / weights.sum()

    truth = (exact(0.4 + 1e-5) - exact(0.4 - 1e-5)) / 2e-5
    objective = getattr(pyro.infer, elbo)(max_plate_nesting=1, strict_enumeration_warning=False)
    pyro.set_rng_seed(0)
    if elbo == "TraceGraph_ELBO":
        _, surrogate = objective._loss_and_surrogate_loss(model, guide, (), {})
        surrogate.backward()
    else:
        objective.differentiable_loss(model, guide).backward()
    samples = -leaf.grad.numpy()
    assert abs(samples.mean() - truth) < 5 * samples.std() / np.sqrt(n)


def test_numpyro_draws_are_kept(monkeypatch):
    """XLA for CPUs would run the sampler again in every loop that reads the draw; the numbers are those of the plain draw."""

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
    monkeypatch.setattr(flowvi.numpyro.distributions, "computed_once", lambda x: x)
    plain = step()
    for a, b in zip(*(compiled(jnp.zeros(50), jax.random.key(3)) for compiled in (kept, plain)), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-12)
    assert len(kept.as_text()) < 0.9 * len(plain.as_text())


def test_numpyro_a_kept_draw_is_itself():
    once, nan = flowvi.numpyro.distributions.computed_once, jnp.array([jnp.nan, -jnp.inf, 2.0])
    for x in (nan, jnp.stack([nan, 0 * nan]), jnp.zeros((0, 3)), jnp.array(1.5), jnp.arange(3)):
        for f in (once, jax.jit(once), jax.vmap(once) if x.ndim else once):
            np.testing.assert_array_equal(f(x), x)
