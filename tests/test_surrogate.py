"""Surrogate (RELAX, REBAR and LAX): formulas at given draws, exact mean and variance, learning, refusals."""

from contextlib import nullcontext
from itertools import product
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import pyro
import pytest
import torch
from hosts import HOSTS, Program, always, each, z_scores
from numpyro.contrib.control_flow import cond
from quadrature import nodes
from test_alternatives_formulas import by_complex_step, of_pair, sigmoid, softmax

import flowvi.numpyro
import flowvi.pyro
from flowvi import LR, Surrogate, relaxations
from flowvi.estimators import attach

NUMPYRO = HOSTS["numpyro"]


# ---- at given draws and uniform numbers, against formulas with complex-step derivatives


def log_softmax(logits):
    return logits - np.log(np.exp(logits).sum())


def binary(logits, x, v):
    """The two relaxed draws of independent Bernoullis: z, with the noise that gives x, and z~."""

    def of_noise(u, logits):
        return logits + np.log(u) - np.log(1 - u)

    def noise(v, p):
        return np.where(x == 1, 1 - p + v * p, (1 - v) * (1 - p))

    p = sigmoid(logits)
    return of_noise(noise(v[0], p.real), logits), of_noise(noise(v[1], p), logits)


def categories(logits, x, v):
    """The two relaxed draws of one categorical; x is an index."""
    log_p = log_softmax(logits)

    def given(v, log_p):
        e = -np.log(v)
        return np.where(np.arange(len(v)) == x, -np.log(e[x]), -np.log(e / np.exp(log_p) + e[x]))

    fixed = log_p.real
    return given(v[0], fixed) - fixed + log_p, given(v[1], log_p)


def wave(math, z, a):
    """A surrogate that depends on all coordinates of an event."""
    return (math.sin(a * z)).sum(-1) + 0.3 * z[..., 0] * z[..., -1]


class Law(NamedTuple):
    """A site with parameters theta: its distribution, its relaxed draws, its log probability, and draws."""

    make: Any
    relaxed: Any
    log_prob: Any
    theta: np.ndarray
    draws: list
    hosts: tuple[str, ...] = ("numpyro", "pyro")


def log_bernoulli(logits, x):
    return (x * logits - np.log(1 + np.exp(logits))).sum()


BITS = [np.array(b) for b in product((0, 1), repeat=3)]
LAWS = {
    "Bernoulli, logits": Law(
        lambda h, t: h.dist.Bernoulli(logits=t).to_event(1), binary, log_bernoulli, np.array([0.0, 0.7, -1.2]), BITS
    ),
    "Bernoulli, probs": Law(
        lambda h, t: h.dist.Bernoulli(probs=t).to_event(1),
        lambda t, x, v: binary(np.log(t) - np.log(1 - t), x, v),
        lambda t, x: log_bernoulli(np.log(t) - np.log(1 - t), x),
        np.array([0.5, 0.7, 0.1]),
        BITS,
    ),
    "Categorical, logits": Law(
        lambda h, t: h.dist.Categorical(logits=t), categories, lambda t, x: log_softmax(t)[x], np.array([0.3, 1.2, -0.8]), [0, 1, 2]
    ),
    "Categorical, probs": Law(
        lambda h, t: h.dist.Categorical(probs=t / t.sum(-1, keepdims=True)),
        lambda t, x, v: categories(np.log(t), x, v),
        lambda t, x: log_softmax(np.log(t))[x],
        np.array([0.3, 0.6, 0.1]),
        [0, 1, 2],
    ),
    "OneHotCategorical": Law(
        lambda h, t: h.dist.OneHotCategorical(logits=t),
        lambda t, x, v: categories(t, x.argmax(), v),
        lambda t, x: log_softmax(t)[x.argmax()],
        np.array([0.3, 1.2, -0.8]),
        list(np.eye(3)),
        ("pyro",),
    ),
}
OF_HOSTS = [pytest.param(HOSTS[host], law, id=f"{host}-{name}") for name, law in LAWS.items() for host in law.hosts]


def compiled(host, f):
    """Compile a function in NumPyro, which is faster than operation by operation."""
    return jax.jit(f) if host.name == "numpyro" else f


def of_draws(host, law, surrogate, v):
    """The derivatives of the control variate in theta, for all draws of the law at once."""
    x = np.stack(law.draws)

    def control(values):
        target = host.target("x", law.make(host, values["theta"]), True)
        target.uniforms = lambda shape, like: host.array(v)
        draw = host.array(x) if host.name == "pyro" and x.ndim > 1 else host.integers(x)
        return attach(host.ops, target, surrogate, draw).control.sum()

    return host.value_and_gradient(compiled(host, control), {"theta": np.tile(law.theta, (len(x), 1))})[1]["theta"]


def by_hand(law, c, v):
    """The same by its formula: the derivative of c(z) - c(z~), minus c(z~) times the score."""
    found = []
    for i, x in enumerate(law.draws):
        of_c = by_complex_step(lambda theta, x=x, i=i: np.subtract(*map(c, law.relaxed(theta, x, v[:, i]))), {"theta": law.theta})
        score = by_complex_step(lambda theta, x=x: law.log_prob(theta, x), {"theta": law.theta})
        found.append(of_c["theta"] - c(law.relaxed(law.theta, x, v[:, i])[1]) * score["theta"])
    return np.stack(found)


IN_NUMPYRO = "numpyro-Bernoulli, logits"  # the others are slow to compile
SOME = [
    pytest.param(*one.values, id=one.id, marks=[] if one.id.startswith("pyro") or one.id == IN_NUMPYRO else pytest.mark.slow)
    for one in OF_HOSTS
]


@pytest.mark.parametrize(("host", "law"), SOME)
def test_at_given_draws(host, law):
    v = np.random.default_rng(1).uniform(size=(2, len(law.draws), 3))
    relax = Surrogate(lambda z, params: wave(host.math, z, params["a"]["b"]), {"a": {"b": 0.7}})
    np.testing.assert_allclose(of_draws(host, law, relax, v), by_hand(law, lambda z: wave(np, z, 0.7), v), rtol=1e-10, atol=1e-12)
    soft = sigmoid if law.draws is BITS else softmax
    rebar = Surrogate(lambda b: wave(host.math, b, 1.3), temperature=0.6)
    expected = by_hand(law, lambda z: wave(np, soft(z / 0.6), 1.3), v)
    np.testing.assert_allclose(of_draws(host, law, rebar, v), expected, rtol=1e-10, atol=1e-12)


@each("a", [0.7], slow_in_numpyro=always)
def test_lax_at_given_draws(host, a):
    """The velocity of a Normal is 1 and (x - loc) / scale; two coordinates of one event."""
    x, theta = np.array([[0.3, -0.8], [1.9, 0.4]]), {"loc": np.array([[0.2, 0.5]] * 2), "scale": np.array([[0.7, 1.3]] * 2)}
    surrogate = Surrogate(lambda z, params: wave(host.math, z, params), a)

    def control(values):
        target = host.target("x", host.dist.Normal(values["loc"], values["scale"]).to_event(1), True)
        return attach(host.ops, target, surrogate, host.array(x)).control.sum()

    found = host.value_and_gradient(compiled(host, control), theta)[1]
    eps = (x - theta["loc"]) / theta["scale"]
    (slopes,) = by_complex_step(lambda z: wave(np, z, a), {"z": x.astype(complex)}).values()
    slopes, c = slopes.sum(-1).reshape(2, 2), wave(np, x, a)[:, None]
    np.testing.assert_allclose(found["loc"], slopes - c * eps / theta["scale"], rtol=1e-10)
    np.testing.assert_allclose(found["scale"], slopes * eps - c * (eps**2 - 1) / theta["scale"], rtol=1e-10)


def test_extreme_numbers(host):
    """At uniform numbers next to 0 and 1, and probabilities next to 0, in single precision, z is finite and gives x."""
    array = jnp.asarray if host.name == "numpyro" else torch.as_tensor

    def given(relaxation, eta, hard, v):
        arrays = (np.broadcast_to(a, np.shape(eta)).astype(np.float32) for a in (eta, hard, v))
        return map(host.numpy, relaxation.given(host.ops, *map(array, arrays)))

    for v in (0.0, 2.0**-24, 0.5, 1 - 2.0**-24):
        for hard in (0, 1):
            z, slope = given(relaxations.BINARY, [-80.0, -3.0, 0.0, 3.0, 80.0], hard, v)
            assert np.isfinite(z).all()
            assert ((2 * hard - 1) * z >= 0).all()
            assert ((slope >= 0) & (slope <= 1)).all()
        z, slope = given(relaxations.CATEGORIES, [[-1e-6, -15.0, -60.0]] * 3, np.eye(3), v)
        assert np.isfinite(z).all()
        assert (np.diag(z) == z.max(-1)).all()
        assert ((slope >= 0) & (slope <= 1)).all()


# ---- the toy problem of REBAR and RELAX: E[(b - t)^2] in the logit of b

LOGIT = 0.4
TOYS = {  # c and its derivative at z, and its estimator in flowvi
    "RELAX": (
        Surrogate(lambda z, params: params[0] + params[1] * z + params[2] * z**2, [0.2, 0.02, -0.01]),
        lambda z, t: (0.2 + 0.02 * z - 0.01 * z**2, 0.02 - 0.02 * z),
    ),
    "REBAR": (None, lambda z, t: ((sigmoid(z / 2) - t) ** 2, (sigmoid(z / 2) - t) * sigmoid(z / 2) * (1 - sigmoid(z / 2)))),
}


def toy(t):
    def model(h, theta):
        b = h.sample("b", h.dist.Bernoulli(h.array(0.5)).mask(False))
        h.factor("cost", (b - t) ** 2)

    return Program(lambda h, theta: h.sample("b", h.dist.Bernoulli(logits=theta[0]).mask(False)), model, (LOGIT,))


def exact_of_toy(of_c, t):
    """Mean and variance of one sample, by quadrature over the uniform numbers of z and of z~, which are independent given b."""
    u, q = nodes(0.0, 1.0)
    inside = (u > 1e-12) & (u < 1 - 1e-12)
    u, q = u[inside], q[inside]
    p, mean, second = sigmoid(LOGIT), 0.0, 0.0
    for b, mass in ((1, p), (0, 1 - p)):
        z = by_noise(LOGIT + 1e-30j, b, u)
        c, dc = of_c(z.real, t)
        parts = dc, (b - p) * ((b - t) ** 2 - c) - z.imag / 1e-30 * dc  # the parts of z and of z~
        means, squares = ([(a * q).sum() for a in of] for of in (parts, [a**2 for a in parts]))
        mean += mass * sum(means)
        second += mass * (sum(squares) + 2 * means[0] * means[1])
    return mean, second - mean**2


def by_noise(logit, b, u):
    """z given b, from a uniform number u."""
    p = sigmoid(logit)
    v = 1 - p + u * p if b else u * (1 - p)
    return logit + np.log(v) - np.log(1 - v)


@each(
    ("name", "t", "particles"),
    {f"{name}, {t}, {k}": (name, t, k) for name in TOYS for t, k in ((0.45, 1), (0.499, 4))},
    slow_in_numpyro=lambda value: value[:2] not in (("RELAX", 0.45), ("REBAR", 0.499)),
)
def test_toy(host, name, t, particles):
    """Mean and variance are exact on the toy problem."""
    surrogate, of_c = TOYS[name]
    surrogate = surrogate or Surrogate(lambda b: (b - t) ** 2, temperature=2.0)
    mean, variance = exact_of_toy(of_c, t)
    p = sigmoid(LOGIT)
    np.testing.assert_allclose(mean, p * (1 - p) * (1 - 2 * t), rtol=1e-8)
    samples = host.gradients(toy(t), 20_000, particles=particles, baseline=None, estimators={"b": surrogate})
    assert np.all(np.abs(z_scores(samples, mean, variance / particles)) < 5)
    assert np.all(np.abs(z_scores((samples - mean) ** 2, variance / particles)) < 5)


def test_a_wrong_slope_is_seen(monkeypatch):
    given = relaxations.Binary._given
    monkeypatch.setattr(relaxations.Binary, "_given", lambda *args: (given(*args)[0], 0 * given(*args)[1]))
    samples = HOSTS["pyro"].gradients(toy(0.45), 20_000, estimators={"b": Surrogate(lambda z: 0.1 * z)})
    assert np.all(np.abs(z_scores(samples, exact_of_toy(TOYS["RELAX"][1], 0.45)[0])) > 5)


# ---- learning


def gradients_in(host, model, guide, **options):
    """The gradients of the loss as a function of the parameters, at fixed random numbers; compiled once."""
    if host.name == "pyro":
        return lambda params: host.loss_and_gradients(params, model, guide, **options)[1]
    elbo = host.flow.TraceFlow_ELBO(**options)
    gradient = jax.jit(jax.grad(lambda params: elbo.loss(jax.random.key(0), params, model, guide)))
    return lambda params: jax.tree.map(np.asarray, gradient(jax.tree.map(host.array, params)))


@each(
    ("family", "entropy"),
    {f"{family}, {entropy}": (family, entropy) for family in ("Bernoulli", "Categorical", "Normal") for entropy in ("full", "stl")},
    slow_in_numpyro=lambda value: value != ("Categorical", "full"),
)
def test_parameters_descend_the_second_moment(host, family, entropy):
    """The parameters of c get the derivative of the squared gradient in the site's parameters."""
    make, params = {
        "Bernoulli": (lambda t: host.dist.Bernoulli(logits=t["logits"]).to_event(1), {"logits": np.array([0.3, -0.6])}),
        "Categorical": (lambda t: host.dist.Categorical(logits=t["logits"]), {"logits": np.array([0.3, 1.1, -0.6])}),
        "Normal": (lambda t: host.dist.Normal(t["loc"], t["scale"]).to_event(1), {"loc": np.array([0.3, 1.1]), "scale": np.ones(2)}),
    }[family]

    def site(t):
        with host.scale(1.7):
            return host.sample("x", make(t))

    def guide():
        site({name: host.param(name, host.array(value)) for name, value in params.items()})

    def model():
        x = site({name: host.array(0.4 * value + 0.2) for name, value in params.items()})
        host.factor("cost", x**2 + 0.1 * x if family == "Categorical" else x[..., 0] * x[..., 1] + x.sum(-1))

    def c(z, params):
        return params["w"]["a"][0] * z.sum(-1) + params["w"]["a"][1] * (z**2).sum(-1) + params["b"] * z[..., 0] * z[..., 1]

    surrogate = Surrogate(c, {"w": {"a": [0.0, 0.0]}, "b": 0.0})

    gradients = gradients_in(host, model, guide, entropy=entropy, estimators={"x": surrogate})
    learned = {"x.c.w.a": np.array([0.4, -0.2]), "x.c.b": np.array(0.3)}
    g = gradients(params | learned)
    for name, i in (("x.c.w.a", (0,)), ("x.c.w.a", (1,)), ("x.c.b", ())):
        step = np.zeros(learned[name].shape)
        step[i] = 1.0
        sides = (gradients(params | learned | {name: learned[name] + sign * step}) for sign in (1, -1))
        above, below = (sum((side[of] ** 2).sum() for of in params) for side in sides)
        np.testing.assert_allclose(g[name][i], (above - below) / 2, rtol=1e-8)


@each("temperature", [0.9], slow_in_numpyro=always)
def test_scale_and_temperature_descend_the_second_moment(host, temperature):
    def guide():
        host.sample("x", host.dist.Bernoulli(logits=host.param("logits", host.array([0.3, -0.6]))).to_event(1))

    def model():
        x = host.sample("x", host.dist.Bernoulli(logits=host.array([0.1, 0.2])).to_event(1))
        host.factor("cost", (x.sum(-1) - 0.8) ** 2)

    surrogate = Surrogate(lambda b: (b.sum(-1) - 0.8) ** 2, temperature=temperature)
    gradients = gradients_in(host, model, guide, estimators={"x": surrogate})
    params = {"logits": np.array([0.3, -0.6]), "x.scale": np.array(0.8), "x.log_temperature": np.array(-0.3)}
    g = gradients(params)
    for name in ("x.scale", "x.log_temperature"):
        above, below = ((gradients(params | {name: params[name] + step})["logits"] ** 2).sum() for step in (1e-5, -1e-5))
        np.testing.assert_allclose(g[name], (above - below) / 2e-5, rtol=1e-6)


def test_learned(host):
    """RELAX on the toy problem: learning removes nearly all of the noise, and the logit goes to the lower cost."""

    def guide():
        with host.plate("n", 20):
            host.sample("b", host.dist.Bernoulli(logits=host.param("logit", host.array(0.0))).mask(False))

    def model():
        with host.plate("n", 20):
            b = host.sample("b", host.dist.Bernoulli(logits=host.array(0.0)).mask(False))
            host.factor("cost", -((b - 0.45) ** 2))

    elbo = host.flow.TraceFlow_ELBO(estimators={"b": Surrogate(lambda z, params: params[0] + params[1] * z, [0.0, 0.0])})
    trained = flowvi.numpyro.adaptive(guide, elbo) if host.name == "numpyro" else guide
    _, params = host.fit(host.svi(model, trained, elbo, rate=0.05), 120)
    assert set(params) == {"logit", "b.c"}
    assert float(params["logit"]) < -0.3

    def variance(estimator, learned):
        program = Program(lambda h, t: guide_at(h, t, learned), toy(0.45).model, (float(params["logit"]),))
        return host.gradients(program, 2000, estimators={"b": estimator}).var()

    def guide_at(h, t, learned):
        with h.substitute(learned):
            h.sample("b", h.dist.Bernoulli(logits=t[0]).mask(False))

    learned = {"b.c": -host.numpy(params["b.c"])}  # the toy's cost has the opposite sign
    assert variance(Surrogate(lambda z, params: params[0] + params[1] * z, [0.0, 0.0]), learned) < 0.1 * variance(LR(), {})


# ---- in programs


def test_given_an_earlier_draw(host):
    """c may read an earlier draw as an input, and close over an observation."""
    y = host.array(0.7)

    def c(z, params, x):
        return params["w"] * z * host.math.tanh(x) + y * params["b"] * x**2

    surrogate = Surrogate(c, {"w": 0.3, "b": 0.1})

    def guide(h, t):
        x = h.sample("x", h.dist.Normal(t[0], h.array(0.8)))
        infer = {"estimator": Surrogate(surrogate.c, surrogate.initial, (x,))}
        h.sample("b", h.dist.Bernoulli(logits=x + t[1]), infer=infer)

    def model(h, t):
        x = h.sample("x", h.dist.Normal(h.array(0.0), h.array(1.0)))
        b = h.sample("b", h.dist.Bernoulli(logits=h.array(-0.4)))
        h.factor("cost", h.math.sin(x) * b + 0.3 * x)

    samples = host.gradients(Program(guide, model, (0.2, 0.4)), 20_000)
    assert np.all(np.abs(z_scores(samples, exact_of_chain(0.2, 0.4))) < 5), samples.mean(0)


def exact_of_chain(loc, shift):
    """The exact gradient, by quadrature in x and a sum over b."""
    eps, q = np.polynomial.hermite_e.hermegauss(60)

    def elbo(theta):
        x = theta[0] + 0.8 * eps
        p = 1 / (1 + np.exp(-x - theta[1]))
        of_b = p * (np.sin(x) + np.log(sigmoid(-0.4)) - np.log(p)) + (1 - p) * (np.log(sigmoid(0.4)) - np.log(1 - p))
        return (q / q.sum() * (0.3 * x - x**2 / 2 + of_b)).sum()

    return by_complex_step(elbo, {"theta": np.array([loc, shift])})["theta"]


def refusing(h, family, estimator, plate=None):
    def site(h, t):
        with h.plate("n", plate) if plate else nullcontext():
            h.sample("x", family(h, t[0]))

    return lambda: h.gradients(Program(site, site, (0.3,), int(plate is not None)), 2, estimators={"x": estimator})


def test_refusals(host):
    with pytest.raises(TypeError, match=r"Surrogate: expected a function c\(z\), found 3.0"):
        Surrogate(3.0)
    for temperature in (0.0, -1.0, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="Surrogate: expected a positive temperature"):
            Surrogate(of_pair, temperature=temperature)
    bernoulli = lambda h, t: h.dist.Bernoulli(logits=t)
    for family, estimator, plate, message in (
        (lambda h, t: h.dist.Poisson(t), Surrogate(of_pair), None, "Surrogate needs one of Bernoulli, .*found Poisson"),
        (mvn, Surrogate(of_pair), None, "Surrogate needs .*or a scalar family with a pathwise field .*found MultivariateNormal"),
        (lambda h, t: h.dist.VonMises(t, h.array(1.0)), Surrogate(of_pair), None, "a periodic c at a VonMises"),
        (lambda h, t: h.dist.Uniform(h.array(0.0), 1 + t), Surrogate(of_pair), None, "Surrogate is biased where the support moves"),
        (bernoulli, Surrogate(lambda z: z.sum()), 3, "c must return a number for each element of the batch, expected "),
        (bernoulli, Surrogate(lambda z: z * z.mean()), 3, "c must read z at its own element of the batch only"),
    ):
        with pytest.raises(ValueError, match=f"^site 'x': .*{message}"):
            refusing(host, family, estimator, plate)()
    program = Program(lambda h, t: h.sample("x", bernoulli(h, t[0])), lambda h, t: h.sample("x", bernoulli(h, t[0])), (0.3,))
    with pytest.raises(ValueError, match="^site 'x': a control variate has mean 0 only under an ELBO"):
        host.bound_gradients(program, 2, estimators={"x": Surrogate(lambda z: z)})


def test_given_in_the_model(host):
    """In a model's annotation, the parameters of c may be new objects in every run. Inputs may not come from the model."""

    def program(*inputs):
        def model(h, t):
            initial = {"w": h.array([0.3, 0.1])}
            estimator = Surrogate(lambda z, params, *inputs: params["w"][0] * z + params["w"][1], initial, inputs)
            h.sample("b", h.dist.Bernoulli(h.array(0.3)), infer={"estimator": estimator})

        return Program(lambda h, t: h.sample("b", h.dist.Bernoulli(logits=t[0])), model, (LOGIT,))

    samples = host.gradients(program(), 4000)
    p = sigmoid(LOGIT)
    assert np.all(np.abs(z_scores(samples, p * (1 - p) * (np.log(0.3 / 0.7) - LOGIT))) < 5)
    with pytest.raises(ValueError, match="^site 'b': a surrogate with inputs cannot be given in the model"):
        host.gradients(program(host.array(0.2)), 2)


def mvn(h, t):
    return h.dist.MultivariateNormal(t[..., None] + h.array([0.0, 1.0]), h.array([[1.0, 0.2], [0.2, 1.0]]))


@pytest.mark.parametrize("initial", [None, 0.3])
def test_refused_inside_cond(initial):
    surrogate = Surrogate(lambda z, *params: z, initial)

    def guide(h, t):
        def branch(_):
            return numpyro.sample("x", flowvi.numpyro.Estimated(h.dist.Bernoulli(logits=t[0]), surrogate))

        cond(True, branch, branch, None)

    with pytest.raises(ValueError, match="^site 'x': .*(scan or|outside) cond"):
        HOSTS["numpyro"].gradients(Program(guide, guide, (0.3,)), 2)


def test_under_pyros_own_elbo():
    """Under Pyro's own ELBO it is LR, without the control variate."""

    def gradients(estimator):
        def site(h, t):
            return h.sample("b", flowvi.pyro.Estimated(h.dist.Bernoulli(logits=t[0]), estimator).mask(False))

        model = toy(0.45).model
        elbo = pyro.infer.Trace_ELBO(max_plate_nesting=1)
        return HOSTS["pyro"].gradients_of(elbo, Program(site, model, (LOGIT,)), 50)

    np.testing.assert_allclose(gradients(Surrogate(lambda z: z)), gradients(LR()), rtol=1e-12)
