"""AdaptiveFlow: it equals RP, LR and their blends at the right coefficients, is unbiased at all of them, and descends E[g^2]."""

import copy
import math

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as numpyro_dist
import pyro
import pyro.distributions as pyro_dist
import pytest
import torch
from cases import CASES, EXACT, mixture
from hosts import HOSTS, Program, always, chain, each, slow_in_numpyro, z_scores
from numpyro.contrib.control_flow import scan
from numpyro.infer import SVI
from numpyro.infer.autoguide import AutoNormal

import flowvi.numpyro
import flowvi.pyro
from flowvi import LR, RP, AdaptiveFlow, Flow, families, fields
from flowvi.estimators import attach

NUMPYRO, PYRO = HOSTS["numpyro"], HOSTS["pyro"]

# For each family: a function that makes it, the values of its parameters, and how many of them have a field.
FAMILIES = {
    "Normal": (lambda h, t: h.dist.Normal(t[0], t[1]), (0.4, 0.8), 2),
    "StudentT": (lambda h, t: h.dist.StudentT(t[0], t[1], t[2]), (3.5, 0.2, 0.9), 3),
    "LogNormal": (lambda h, t: h.dist.LogNormal(t[0], t[1]), (0.2, 0.5), 2),
    "HalfNormal": (lambda h, t: h.dist.HalfNormal(t[0]), (0.8,), 1),
    "HalfCauchy": (lambda h, t: h.dist.HalfCauchy(t[0]), (0.8,), 1),
    "Exponential": (lambda h, t: h.dist.Exponential(t[0]), (1.3,), 1),
    "Gamma": (lambda h, t: h.dist.Gamma(t[0], t[1]), (1.7, 1.2), 2),
    "InverseGamma": (lambda h, t: h.dist.InverseGamma(t[0], t[1]), (2.4, 1.2), 2),
    "Beta": (lambda h, t: h.dist.Beta(t[0], t[1]), (1.6, 2.3), 2),
    "Weibull": (lambda h, t: h.dist.Weibull(t[0], t[1]), (1.2, 1.6), 2),
    "VonMises": (lambda h, t: h.dist.VonMises(t[0], t[1]), (0.5, 1.8), 2),
    "mixture": (lambda h, t: mixture(h, t[0]), (0.3,), 9),
}
MOST = {name: FAMILIES[name] for name in ("Normal", "Gamma", "VonMises", "mixture")}


def cost(h, x):
    return h.math.sin(2 * x) + 0.3 * h.math.cos(x)


def coefficients(size, bumps=5, proposal=0, seed=3, batch=()):
    rng = np.random.default_rng(seed)
    learned = {
        "x.velocity": rng.normal(size=(*batch, size, 1 + bumps)),
        "x.control": rng.normal(size=(*batch, size, bumps + size)),
    }
    return learned | (
        {"x.proposal": np.linspace(-0.3, 0.4, math.prod(batch) * proposal).reshape((*batch, proposal))} if proposal else {}
    )


def start_values(size, start, bumps=5, batch=()):
    zero = {name: 0 * value for name, value in coefficients(size, bumps, batch=batch).items()}
    zero["x.velocity"][..., 0] = start
    return zero


def at(h, learned):
    """A handler that sets the learned parameters to these values."""
    return h.substitute(learned)


def one(family, learned, cost=cost):
    """One site x of a family and a factor, with fixed learned parameters."""
    make, theta, _ = FAMILIES[family]
    program = chain(theta, {"x": lambda h, t, v: make(h, t)}, {"x": lambda h, t, v: cost(h, v["x"])})

    def guide(h, t):
        with at(h, learned):
            program.guide(h, t)

    return Program(guide, program.model, program.theta)


def scaled(a, family):
    field = families.FAMILIES["MixtureSameFamily" if family == "mixture" else family].pathwise
    return Flow(fields.scaled(a, field)) if a != 1 else Flow(field)


@each("family", list(FAMILIES), slow_in_numpyro=lambda family: family not in ("Normal", "mixture"))
def test_the_start_is_a_blend_of_rp_and_lr(host, family):
    """Every sample is that of LR, of the family's field, or of the scaled field, depending on the start value."""
    size, atol = FAMILIES[family][2], 1e-10
    if family == "VonMises" and host.name == "pyro":  # torch's log density is a polynomial approximation
        atol = 1e-7
    for a, reference in ((0.0, LR()), (1.0, scaled(1, family)), (0.3, scaled(0.3, family))):
        learned = host.gradients(one(family, start_values(size, a)), 20, estimators={"x": AdaptiveFlow(start=a)})
        np.testing.assert_allclose(learned, host.gradients(one(family, {}), 20, estimators={"x": reference}), rtol=1e-8, atol=atol)


def test_the_start_is_rp(host):
    learned = host.gradients(one("Normal", {}), 50, estimators={"x": AdaptiveFlow()})
    np.testing.assert_allclose(learned, host.gradients(one("Normal", {}), 50, estimators={"x": RP()}), rtol=1e-10)
    for a in (0.0, 0.7):
        pyro.clear_param_store()
        blend = host.gradients(one("Normal", {}), 50, estimators={"x": AdaptiveFlow(bumps=0, start=a)})
        flow = Flow(fields.scaled(a, fields.location_scale()))
        np.testing.assert_allclose(blend, host.gradients(one("Normal", {}), 50, estimators={"x": flow}), rtol=1e-10)


def of_formula(z, scale, learned, phi, dphi, mask=(1.0, 0.0)):
    """The gradient in loc and scale of a Normal, by the formula of AdaptiveFlow's docstring, with a mask and its derivative in x."""
    centres, width = np.array([-2.0, -1, 0, 1, 2]), 0.7
    bumps = np.exp(-(((z[..., None] - centres) / width) ** 2) / 2)
    dbumps = -(z[..., None] - centres) / width**2 * bumps / scale
    u, s = np.stack([1 + 0 * z, z]), np.stack([z, z**2 - 1]) / scale
    a, b = learned["x.velocity"], learned["x.control"]
    m, dm = (a[:, :1] + a[:, 1:] @ bumps.T), a[:, 1:] @ dbumps.T
    m, dm = m * mask[0], dm * mask[0] + m * mask[1]
    h, dh = b[:, :5] @ bumps.T, b[:, :5] @ dbumps.T
    return m * u * dphi + ((1 - m) * s + u * dm) * phi + b[:, 5:] @ s + h * s - u * dh


@pytest.mark.parametrize("masked", [False, True])
def test_every_sample_has_the_formula(host, masked):
    """Every sample has the gradient of the formula. A third parameter of value 0 reveals x by its derivative."""

    def away(x, p):
        return x**2 / (1 + x**2)

    (loc, scale), learned = FAMILIES["Normal"][1], coefficients(2)
    program = chain(
        (loc, scale, 0.0),
        {"x": lambda h, t, v: h.dist.Normal(t[0], t[1])},
        {"x": lambda h, t, v: cost(h, v["x"]) + t[2] * v["x"]},
    )

    def guide(h, t):
        with at(h, learned):
            program.guide(h, t)

    estimator = AdaptiveFlow(mask=away if masked else None)
    g = host.gradients(Program(guide, program.model, program.theta), 20, estimators={"x": estimator})
    x = g[:, 2]
    mask = (x**2 / (1 + x**2), 2 * x / (1 + x**2) ** 2) if masked else (1.0, 0.0)
    phi, dphi = np.sin(2 * x) + 0.3 * np.cos(x), 2 * np.cos(2 * x) - 0.3 * np.sin(x)
    expected = of_formula((x - loc) / scale, scale, learned, phi, dphi, mask)
    np.testing.assert_allclose(g[:, :2], expected.T, rtol=1e-10, atol=1e-12)


# ---- unbiased for every coefficient


def truth(family, n=200_001):
    """The gradient of E[cost] at a torch distribution, by quadrature in z."""
    make, theta, _ = FAMILIES[family]
    low, high = {"Normal": (-8.0, 8.0), "Gamma": (1e-9, 40.0), "VonMises": (-math.pi, math.pi), "mixture": (-9.0, 9.0)}[family]
    x = torch.linspace(low, high, n)
    leaf = [torch.tensor(value, requires_grad=True) for value in theta]
    density = make(PYRO, leaf).log_prob(x).exp()
    return torch.stack(torch.autograd.grad(torch.trapezoid(density * cost(PYRO, x), x), leaf)).numpy()


@each(
    ("family", "particles"),
    {
        "Normal": ("Normal", 1),
        "Normal, 4 particles": ("Normal", 4),
        "Gamma": ("Gamma", 1),
        "VonMises": ("VonMises", 1),
        "mixture": ("mixture", 1),
    },
    slow_in_numpyro=lambda value: value[0] in ("Gamma", "VonMises"),
)
def test_unbiased_for_every_coefficient(host, family, particles):
    learned = coefficients(FAMILIES[family][2])
    samples = host.gradients(one(family, learned), 20_000, particles=particles, estimators={"x": AdaptiveFlow()})
    assert np.all(np.abs(z_scores(samples, truth(family))) < 5)


@pytest.mark.parametrize("epsilon", [0.0, 0.1])
@each("family", ["Normal", "Gamma", "VonMises"], slow_in_numpyro=lambda family: family != "Normal")
def test_unbiased_under_a_learned_proposal(host, family, epsilon):
    learned = coefficients(FAMILIES[family][2], proposal=2)
    if family == "Gamma" and epsilon == 0:
        learned["x.proposal"] = np.array([-0.3, -0.2])  # makes q heavier at both ends
    estimators = {"x": AdaptiveFlow(q="learned", epsilon=epsilon)}
    samples = host.gradients(one(family, learned), 20_000, estimators=estimators)
    assert np.all(np.abs(z_scores(samples, truth(family))) < 5)


def test_a_jump_needs_a_mask(host):
    """At a jump the z-score rejects the pathwise field. LR, and a field that a mask keeps at 0 at the jump, are right."""

    def step(h, x):
        return h.math.where(x > 0.5, 1.0, 0.0) + 0 * x

    def away(x, p):
        return (x - 0.5) ** 2 / (0.1 + (x - 0.5) ** 2)

    loc, scale = FAMILIES["Normal"][1]
    z = (0.5 - loc) / scale
    exact = np.array([1.0, z]) * np.exp(-(z**2) / 2) / math.sqrt(2 * math.pi) / scale
    learned = coefficients(2)
    for mask, right in ((away, True), (None, False)):
        samples = host.gradients(one("Normal", learned, step), 40_000, estimators={"x": AdaptiveFlow(mask=mask)})
        assert (np.abs(z_scores(samples, exact)).max() < 5) == right


def attached(host, family, learned, estimator):
    """Derivatives of the sum of value, score and control at three given x, in the parameters and in the learned parameters."""
    make, theta, _ = FAMILIES[family]

    def total(values):
        target = host.target("x", make(host, [values[str(i)] for i in range(len(theta))]), True)
        target = target.with_learned({}, {name: values[name] for name in learned}, 0.0)
        draw = attach(host.ops, target, estimator, host.array([0.31, 0.62, 0.93]))
        weights = host.array([1.0, -0.5, 2.0])
        return (weights * (draw.value + 0.7 * draw.score - 0.3 * draw.control)).sum()

    learned = {k.removeprefix("x."): v for k, v in learned.items()}
    values = {**{str(i): np.full(3, v) for i, v in enumerate(theta)}, **learned}
    return host.value_and_gradient(total, values)[1].values()


@pytest.mark.parametrize("family", list(FAMILIES))
def test_the_hosts_agree(family):
    """Both hosts give the same derivatives at the same x, for every coefficient."""
    moves = 0 if family == "mixture" else len(families.FAMILIES[family].moves)
    learned = coefficients(FAMILIES[family][2], proposal=0 if family == "VonMises" else moves)
    if family == "mixture":  # Pyro normalises the logits, so all get the same coefficients
        learned = {name: 0 * value + value[0] for name, value in learned.items()}
        learned["x.control"][:, 5:] = 0
    estimator = AdaptiveFlow(q="learned" if "x.proposal" in learned else None)
    found = [attached(host, family, learned, estimator) for host in (NUMPYRO, PYRO)]
    for one, other in zip(*found, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-9, atol=1e-10)


# ---- learning


@each("entropy", ["full", "stl"], slow_in_numpyro=lambda entropy: entropy == "full")
def test_coefficients_descend_the_second_moment(host, entropy):
    """The coefficients get the derivative of the squared gradient in loc and scale (by differences, exact for a quadratic)."""
    params = {"loc": 0.4, "scale": 0.8}

    def guide():
        with host.scale(1.7):
            host.sample("x", host.dist.Normal(*(host.param(k, host.array(v)) for k, v in params.items())))

    def model():
        with host.scale(1.7):
            x = host.sample("x", host.dist.Normal(host.array(0.3), host.array(1.2)))
        host.factor("cost", cost(host, x))

    options = {"estimators": {"x": AdaptiveFlow(q="learned")}, "entropy": entropy}

    def gradients(learned):
        return host.loss_and_gradients(params | learned, model, guide, **options)[1]

    def second_moment(learned):
        g = gradients(learned)
        return g["loc"] ** 2 + g["scale"] ** 2

    learned = coefficients(2, proposal=2)
    g = gradients(learned)
    for name, i in (
        ("x.velocity", (1, 2)),
        ("x.velocity", (0, 0)),
        ("x.control", (0, 3)),
        ("x.control", (1, 5)),
        ("x.control", (0, 6)),
    ):
        step = np.zeros(learned[name].shape)
        step[i] = 1.0
        above, below = (second_moment(learned | {name: learned[name] + sign * step}) for sign in (1, -1))
        np.testing.assert_allclose(g[name][i], (above - below) / 2, rtol=1e-8)


@each("batch", {"scalar": (), "event": (2,)}, slow_in_numpyro=bool)
def test_the_proposal_descends_the_second_moment(host, batch):
    """The derivative in q is -g^2 d log q / d eta at each sample. Two more parameters of value 0 reveal the weight and x.

    The coordinates of an event share one weight, so each of them descends the noise of all.
    """
    loc, scale, learned = np.full(batch, 0.4), np.full(batch, 0.8), coefficients(2, proposal=2, batch=batch)

    def guide():
        fn = host.dist.Normal(host.param("loc", host.array(loc)), host.param("scale", host.array(scale)))
        host.sample("x", fn.to_event(len(batch)).mask(False))

    def model():
        x = host.sample("x", host.dist.Normal(host.array(0 * loc), host.array(1.0)).to_event(len(batch)).mask(False))
        total = (cost(host, x) + host.param("first", host.array(0 * loc)) * x).sum()
        host.factor("cost", total + host.param("one", host.array(0.0)))

    params = {"loc": loc, "scale": scale, "one": np.zeros(()), "first": 0 * loc}
    _, g = host.loss_and_gradients(params | learned, model, guide, estimators={"x": AdaptiveFlow(q="learned", epsilon=0.2)})
    eta = learned["x.proposal"]
    moved_loc, moved_scale = loc + scale * eta[..., 0], scale * np.exp(eta[..., 1])

    def normal(x, loc, scale):
        return np.exp(-(((x - loc) / scale) ** 2) / 2) / scale / math.sqrt(2 * math.pi)

    def weight(x):
        return normal(x, loc, scale) / (0.2 * normal(x, loc, scale) + 0.8 * normal(x, moved_loc, moved_scale))

    x = g["first"] / g["one"]
    np.testing.assert_allclose(-g["one"], weight(x).prod(), rtol=1e-10)
    share = 1 - 0.2 * weight(x)  # the share of q in the mixture
    z = (x - moved_loc) / moved_scale
    dlog_q = np.stack([share * z / moved_scale * scale, share * (z**2 - 1)], -1)
    np.testing.assert_allclose(g["x.proposal"], -(g["loc"] ** 2 + g["scale"] ** 2).sum() * dlog_q, rtol=1e-8)


@slow_in_numpyro
def test_nothing_else_changes(host):
    """Learning changes neither the loss nor the gradients of other parameters, bit for bit, at any coefficients."""

    def guide():
        with host.plate("i", 3):
            host.sample("x", host.dist.Normal(host.param("loc", host.array(0.4)), host.param("scale", host.array(0.8))))

    def model():
        w = host.param("w", host.array(1.3))
        with host.plate("i", 3):
            x = host.sample("x", host.dist.Normal(host.array(0.3), host.math.exp(w)))
            host.factor("cost", w * cost(host, x))

    params = {"loc": 0.4, "scale": 0.8, "w": 1.3}
    for particles, vectorize in ((1, False), (3, False), (3, True)):
        options = {"num_particles": particles, "vectorize_particles": vectorize, "plates": 1}
        results = [
            host.loss_and_gradients(params | learned, model, guide, estimators={"x": estimator}, **options)
            for estimator, learned in (
                (AdaptiveFlow(), coefficients(2, batch=(3,))),
                (AdaptiveFlow(), start_values(2, 0.2, batch=(3,))),
                (Flow(fields.scaled(0.5, fields.location_scale())), {}),
            )
        ]
        for loss, g in results[1:]:
            assert loss == results[0][0]
            assert g["w"] == results[0][1]["w"]
            assert g["loc"] != results[0][1]["loc"]


def plate_program(host, size, subsample_size):
    def guide():
        loc = host.param("loc", host.array(np.linspace(-1, 1, size)), event_dim=0)
        with host.plate("data", size, subsample_size=subsample_size) as i:
            host.sample("x", host.dist.Normal(loc[i], 0.5))

    def model():
        with host.plate("data", size, subsample_size=subsample_size):
            x = host.sample("x", host.dist.Normal(0.0, 1.0))
            host.sample("y", host.dist.Normal(x**2, 1.0), obs=host.array(1.0))

    return model, guide


@each("vectorize", [False, True], slow_in_numpyro=always)
def test_an_element_of_a_plate_has_coefficients_of_its_own(host, vectorize):
    model, guide = plate_program(host, 6, 2)
    options = {"num_particles": 3, "vectorize_particles": vectorize, "plates": 1, "estimators": {"x": AdaptiveFlow(q="learned")}}
    params = {"loc": np.linspace(-1, 1, 6)}
    learned = start_values(2, 1.0, batch=(6,)) | {"x.proposal": np.zeros((6, 2))}
    _, g = host.loss_and_gradients(params | learned, model, guide, **options)
    seen = g["loc"] != 0
    assert 2 <= seen.sum() <= 6
    for name in ("x.velocity", "x.control", "x.proposal"):
        assert np.all((np.abs(g[name]).reshape(6, -1).sum(-1) > 0) == seen)
    shared = start_values(2, 1.0) | {"x.proposal": np.zeros(2)}
    options["estimators"] = {"x": AdaptiveFlow(q="learned", shared=True)}
    _, of_shared = host.loss_and_gradients(params | shared, model, guide, **options)
    for name in shared:
        np.testing.assert_allclose(of_shared[name], g[name].sum(0), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("wrap", ["to_event", "transformed"])
def test_events_and_transforms(host, wrap):
    """Two coordinates of an event, and a base sample under a live transform, behave like scalar sites."""
    learned = coefficients(2, batch=(2,))
    shift = [0.4, -0.3]

    def fn(h, t, i=None):
        loc, scale = t[0][..., None] + h.array(shift) if i is None else t[0] + shift[i], t[1][..., None] if i is None else t[1]
        base = h.dist.Normal(loc, scale)
        if wrap == "transformed":
            base = h.dist.TransformedDistribution(base, [h.dist.transforms.ExpTransform()])
        return base.to_event(1) if i is None else base

    def guide(h, t):
        with at(h, learned):
            h.sample("x", fn(h, t).mask(False))

    def model(h, t):
        x = h.sample("x", fn(h, t).mask(False))
        h.factor("cost", (h.array([1.0, 2.0]) * cost(h, x)).sum(-1) + x[..., 0] * x[..., 1])

    exact = gradient_of_two(wrap, shift)
    samples = host.gradients(Program(guide, model, (0.1, 0.5)), 40_000, estimators={"x": AdaptiveFlow()})
    assert np.all(np.abs(z_scores(samples, exact)) < 5)
    plain = Program(lambda h, t: h.sample("x", fn(h, t).mask(False)), model, (0.1, 0.5))
    start, pathwise = (host.gradients(plain, 20, estimators={"x": estimator}) for estimator in (AdaptiveFlow(), RP()))
    np.testing.assert_allclose(start, pathwise, rtol=1e-10)


def gradient_of_two(wrap, shift):
    """The exact gradient by quadrature, for a cost that is a sum over coordinates plus their product."""
    z = torch.linspace(-9, 9, 20_001)
    p = torch.exp(-(z**2) / 2) / math.sqrt(2 * math.pi)
    loc, scale = (torch.tensor(v, requires_grad=True) for v in (0.1, 0.5))
    x = [loc + s + scale * z for s in shift]
    x = [v.exp() for v in x] if wrap == "transformed" else x
    mean = [torch.trapezoid(p * v, z) for v in x]
    own = [torch.trapezoid(p * cost(PYRO, v), z) for v in x]
    return np.array([float(g) for g in torch.autograd.grad(own[0] + 2 * own[1] + mean[0] * mean[1], (loc, scale))])


def wave(h, x):
    return h.math.sin(2 * x) - 0.4 * x**2


def test_an_autoguide_whose_sites_are_in_a_plate():
    """While the autoguide goes through its sites, flowvi runs it once more, to find what may move."""

    def model():
        with numpyro.plate("i", 3):
            x = numpyro.sample("x", numpyro_dist.Normal(jnp.zeros(3), 2.0))
            numpyro.factor("cost", jnp.cos(x))

    elbo = flowvi.numpyro.TraceFlow_ELBO(estimators={"x": AdaptiveFlow(bumps=0)})
    svi = SVI(model, flowvi.numpyro.adaptive(AutoNormal(model), elbo), numpyro.optim.Adam(0.02), elbo)
    state = svi.init(jax.random.key(0))
    jax.eval_shape(svi.update, state)
    assert svi.get_params(state)["x.velocity"].shape == (3, 2, 1)


@pytest.mark.slow
def test_learned_in_numpyro():
    """Under an autoguide the noise of the gradient falls, and forward mode is refused."""

    def model():
        with numpyro.plate("i", 3):
            x = numpyro.sample("x", numpyro_dist.Normal(jnp.zeros(3), 2.0))
            numpyro.factor("cost", wave(NUMPYRO, x))

    guide = AutoNormal(model)
    elbo = flowvi.numpyro.TraceFlow_ELBO(4, estimators={"x": AdaptiveFlow(q="learned")}, entropy="stl")
    svi = SVI(model, flowvi.numpyro.adaptive(guide, elbo), numpyro.optim.Adam(0.02), elbo)
    params = svi.run(jax.random.key(0), 1500, progress_bar=False).params
    assert params["x.velocity"].shape == (3, 2, 6)

    def variance(estimator, params):
        elbo = flowvi.numpyro.TraceFlow_ELBO(estimators={"x": estimator}, entropy="stl")
        loss = lambda key, loc: elbo.loss(key, params | {"x_auto_loc": loc}, model, guide)
        return jax.vmap(jax.grad(loss, 1), (0, None))(jax.random.split(jax.random.key(1), 1000), params["x_auto_loc"]).var(0)

    assert np.all(variance(AdaptiveFlow(q="learned"), params) < 0.3 * variance(RP(), params))


def test_what_an_autoguide_offers_is_passed_on():
    def model():
        with numpyro.plate("i", 3):
            numpyro.sample("x", numpyro_dist.Normal(0.0, 2.0))

    guide = AutoNormal(model)
    elbo = flowvi.numpyro.TraceFlow_ELBO(estimators={"x": AdaptiveFlow(bumps=0)})
    wrapped = flowvi.numpyro.adaptive(guide, elbo)
    params = SVI(model, wrapped, numpyro.optim.Adam(0.02), elbo).run(jax.random.key(0), 2, progress_bar=False).params
    np.testing.assert_array_equal(wrapped.median(params)["x"], guide.median(params)["x"])
    np.testing.assert_array_equal(wrapped.quantiles(params, [0.2])["x"], guide.quantiles(params, [0.2])["x"])
    assert wrapped.sample_posterior(jax.random.key(0), params, sample_shape=(5,))["x"].shape == (5, 3)
    assert copy.deepcopy(wrapped).median(params)["x"].shape == (3,)
    with pytest.raises(AttributeError, match="neither"):
        wrapped.neither  # noqa: B018


@pytest.mark.parametrize("estimator", [AdaptiveFlow(), RP(control_variate="diagonal")], ids=repr)
def test_forward_mode_is_refused(estimator):
    def model():
        numpyro.sample("x", numpyro_dist.Normal(numpyro.param("loc", 0.3), 1.0))

    elbo = flowvi.numpyro.TraceFlow_ELBO(estimators={"x": estimator})
    svi = SVI(model, flowvi.numpyro.adaptive(model, elbo), numpyro.optim.Adam(0.02), elbo)
    with pytest.raises(ValueError, match="site 'x': the estimator learns from the backward pass: .* found forward-mode"):
        svi.run(jax.random.key(0), 1, progress_bar=False, forward_mode_differentiation=True)


@pytest.mark.parametrize("estimator", [AdaptiveFlow(), RP(control_variate="diagonal")], ids=repr)
def test_scope_and_integers_in_numpyro(estimator):
    """Under a scope the learned parameters have longer names. If loc is an integer, the coefficients are still floats."""

    def model():
        numpyro.factor("cost", -((numpyro.sample("x", numpyro_dist.Normal(0, 1)) - 0.5) ** 2))

    def guide():
        numpyro.sample("x", numpyro_dist.Normal(0, numpyro.param("scale", 0.7, constraint=numpyro_dist.constraints.positive)))

    model, guide = (numpyro.handlers.scope(f, prefix="a", hide_types=["plate"]) for f in (model, guide))
    elbo = flowvi.numpyro.TraceFlow_ELBO(4, default=estimator)
    svi = SVI(model, flowvi.numpyro.adaptive(guide, elbo), numpyro.optim.Adam(0.01), elbo)
    start = svi.get_params(svi.init(jax.random.key(0)))
    params = svi.run(jax.random.key(0), 3, progress_bar=False).params
    assert len(params) > 1
    assert all(np.any(params[name] != start[name]) for name in params)


def test_learned_in_pyro():
    def model():
        with pyro.plate("i", 3):
            x = pyro.sample("x", pyro_dist.Normal(torch.zeros(3), 2.0))
            pyro.factor("cost", wave(PYRO, x))

    def guide():
        loc = pyro.param("loc", torch.full((3,), 0.3))
        scale = pyro.param("scale", torch.full((3,), 0.7), constraint=pyro_dist.constraints.positive)
        with pyro.plate("i", 3):
            pyro.sample("x", pyro_dist.Normal(loc, scale))

    def elbo(estimator):
        options = {"vectorize_particles": True, "max_plate_nesting": 1, "entropy": "stl"}
        return flowvi.pyro.TraceFlow_ELBO(4, estimators={"x": estimator}, **options)

    svi = pyro.infer.SVI(model, guide, pyro.optim.Adam({"lr": 0.02}), elbo(AdaptiveFlow()))
    for _ in range(600):
        svi.step()
    assert pyro.param("x.velocity").shape == (3, 2, 6)

    def variance(estimator):
        objective, loc = elbo(estimator), pyro.param("loc")
        draws = [torch.autograd.grad(objective.differentiable_loss(model, guide), loc)[0] for _ in range(200)]
        return torch.stack(draws).var(0).numpy()

    assert variance(AdaptiveFlow()).sum() < 0.3 * variance(RP()).sum()


# ---- every one-dimensional continuous program of exact.json that has rows of LR or RP, in NumPyro

ROWS = {
    **dict.fromkeys(("normal-loc-square", "normal-scale-square", "normal-loc-cos"), AdaptiveFlow()),
    **dict.fromkeys((name for name in CASES if name.startswith("mcg-")), AdaptiveFlow()),
    **dict.fromkeys(("lognormal-loc", "exponential-rate", "laplace-loc", "gamma-concentration", "studentt-loc"), AdaptiveFlow()),
    **dict.fromkeys(("vonmises-loc", "truncnormal-loc", "mixture1d-logit0", "total-propagation", "baseline-loc"), AdaptiveFlow()),
    "vonmises-loc-nonperiodic": AdaptiveFlow(field=fields.von_mises(cut=math.pi)),
    **dict.fromkeys(("elbo-normal-normal-off", "elbo-normal-normal-opt"), AdaptiveFlow()),
}


def learned_at(program, estimator, entropy, steps=2000):
    """The learned parameters after training at fixed parameters of the program."""
    elbo = flowvi.numpyro.TraceFlow_ELBO(64, default=estimator, entropy=entropy, baseline=None)
    t = [jnp.asarray(v) for v in program.theta]
    guide = flowvi.numpyro.adaptive(lambda: program.guide(NUMPYRO, t), elbo)
    trace = numpyro.handlers.trace(numpyro.handlers.seed(guide, 0)).get_trace()
    optimizer = numpyro.optim.Adam(0.02)

    def loss(t, learned, key):
        return elbo.loss(key, learned, lambda: program.model(NUMPYRO, t), lambda: program.guide(NUMPYRO, t))

    def step(state, key):
        return optimizer.update(jax.grad(loss, (0, 1))(t, optimizer.get_params(state), key)[1], state), None

    state = optimizer.init({name: site["value"] for name, site in trace.items() if site["type"] == "param"})
    state, _ = jax.jit(lambda state: jax.lax.scan(step, state, jax.random.split(jax.random.key(0), steps)))(state)
    return optimizer.get_params(state)


@pytest.mark.slow
@pytest.mark.parametrize("name", list(ROWS))
def test_every_row(name):
    """After training, the gradient is unbiased and has less variance than the better of LR and RP."""
    case, exact = CASES[name], EXACT[name]
    entropy = "stl" if name.startswith("elbo") else "full"
    kinds = ("LR STL", "RP STL") if entropy == "stl" else ("LR", "RP")
    rows = [row for row in exact["estimators"] if row["estimator"].startswith(kinds) and row["q"] == "p" and row["unbiased"]]
    variances = [np.atleast_1d(row["variance"]) for row in rows]
    best = np.maximum(np.min(variances, 0), 1e-6 * np.max(variances, 0))  # the optimizer's last steps leave some noise
    learned = learned_at(case.program, ROWS[name], entropy)
    fixed = Program(lambda h, t: with_learned(h, learned, case.program.guide, t), case.program.model, case.program.theta)
    samples = NUMPYRO.gradients(fixed, 40_000, default=ROWS[name], entropy=entropy)
    assert np.all(np.abs(z_scores(samples, np.atleast_1d(exact["gradient"]))) < 5)
    d2 = (samples - samples.mean(0)) ** 2
    print(name, "variance of the best over that learned:", best / np.maximum(d2.mean(0), 1e-12))
    assert np.all(d2.mean(0) < best + 5 * d2.std(0) / np.sqrt(len(samples)) + 1e-9)


def with_learned(h, learned, guide, t):
    with at(h, learned):
        guide(h, t)


# ---- refusals


def loc_only():
    parts = {"loc": fields.Part(lambda p: p.loc, lambda ops, x, p: 1.0)}
    return fields.Field(lambda x, p, dtheta: dtheta.loc, "pathwise", families=("Normal",), name="loc_only()", parts=lambda p: parts)


def test_refusals(host):
    with pytest.raises(TypeError, match=r"AdaptiveFlow needs a pathwise field with a part for each parameter, found fields.scaled"):
        AdaptiveFlow(field=fields.scaled(0.5, fields.location_scale()))
    with pytest.raises(TypeError, match=r"AdaptiveFlow: expected q='learned', a function q\(p\) or None, found 'learnt'"):
        AdaptiveFlow(q="learnt")
    with pytest.raises(TypeError, match="AdaptiveFlow: expected baseline"):
        AdaptiveFlow(baseline=3.0)
    with pytest.raises(TypeError, match="AdaptiveFlow has no baseline='optimal', which is for LR"):
        AdaptiveFlow(baseline="optimal")
    with pytest.raises(TypeError, match="adaptive: expected a TraceFlow_ELBO, found TraceFlow_RenyiELBO; no other objective learns"):
        flowvi.numpyro.adaptive(lambda: None, flowvi.numpyro.TraceFlow_RenyiELBO())
    with pytest.raises(ValueError, match="AdaptiveFlow: expected a number of bumps, 0 or more, found -1"):
        AdaptiveFlow(bumps=-1)
    with pytest.raises(ValueError, match="AdaptiveFlow: expected an epsilon between 0 and 1, found 1.0"):
        AdaptiveFlow(epsilon=1.0)
    for make, theta, estimator, message in (
        (
            lambda h, t: h.dist.Bernoulli(t[0]),
            (0.3,),
            AdaptiveFlow(),
            "site 'x': AdaptiveFlow needs a continuous distribution, but Berno",
        ),
        (
            lambda h, t: h.dist.Uniform(h.array(-1.0), t[0]),
            (0.3,),
            AdaptiveFlow(),
            "site 'x': a field that is learned is biased where the",
        ),
        (MOST["Normal"][0], (0.3, 0.8), AdaptiveFlow(field=loc_only()), r"site 'x': .* but loc_only\(\) has none for 'scale'; add one"),
        (mvn, (0.3,), AdaptiveFlow(), "site 'x': AdaptiveFlow needs a pathwise field for each .* none for this MultivariateNormal"),
        (mixture_2d, (0.3, 0.1, 0.2), AdaptiveFlow(), "site 'x': .* flowvi.families has none for this MixtureSameFamily"),
        (
            MOST["Gamma"][0],
            (2.0, 1.0),
            AdaptiveFlow(field=fields.scale()),
            r"site 'x': .* but fields.scale\(\) has none for this Gamma",
        ),
        (
            lambda h, t: mixture(h, t[0]),
            (0.3,),
            AdaptiveFlow(q="learned"),
            "site 'x': q='learned' is for Normal, .*; found MixtureSame",
        ),
        (
            lambda h, t: h.dist.Normal(t[0][..., None] + h.array([0.0, 1.0]), h.array(1.0)).to_event(1),
            (0.3,),
            AdaptiveFlow(mask=lambda x, p: x - x.mean()),
            "site 'x': the mask must be elementwise",
        ),
    ):
        pyro.clear_param_store()
        program = chain(theta, {"x": lambda h, t, v, make=make: make(h, t)}, {"x": lambda h, t, v: 0.0 * v["x"].sum()})
        with pytest.raises(ValueError, match=message):
            host.gradients(program, 3, estimators={"x": estimator})


def mvn(h, t):
    return h.dist.MultivariateNormal(t[0][..., None] + h.array([0.0, 1.0]), h.array([[1.0, 0.2], [0.2, 1.0]]))


def mixture_2d(h, t):
    components = h.dist.Normal(h.array([[-1.0, 0.4], [0.8, -0.6], [0.1, 1.2]]), 1.0).to_event(1)
    logits = h.math.stack(list(t), -1)
    return h.dist.MixtureSameFamily(h.dist.Categorical(logits=logits), h.components(components, logits.shape))


def test_components_without_a_cdf():
    def guide():
        logits = pyro.param("logits", torch.zeros(2))
        components = pyro_dist.Beta(torch.tensor([1.0, 2.0]), torch.tensor([2.0, 1.0]))
        pyro.sample("x", pyro_dist.MixtureSameFamily(pyro_dist.Categorical(logits=logits), components))

    elbo = flowvi.pyro.TraceFlow_ELBO(default=AdaptiveFlow())
    with pytest.raises(
        ValueError, match="site 'x': the pathwise field of this MixtureSameFamily needs a cdf, and a component has none"
    ):
        elbo.differentiable_loss(guide, guide)


def test_refused_in_control_flow_and_bounds(host):
    make, theta, _ = MOST["Normal"]
    if host.name == "numpyro":

        def guide(h, t):
            def body(carry, _):
                x = numpyro.sample("x", flowvi.numpyro.Estimated(make(h, t), AdaptiveFlow()))
                return carry, x

            scan(body, 0, jnp.arange(3))

        with pytest.raises(ValueError, match="cannot register parameters"):
            host.gradients(Program(guide, guide, theta), 2)
    program = one("Normal", coefficients(2))
    with pytest.raises(ValueError, match="site 'x': a control variate has mean 0 only under an ELBO"):
        host.bound_gradients(program, 2, estimators={"x": AdaptiveFlow()})
