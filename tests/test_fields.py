"""The library of velocity fields: transport equation, flux, unbiasedness and parity, without sampling."""

import pickle
from dataclasses import replace

import jax
import jax.numpy as jnp
import matplotlib
import numpy as np
import pytest
import torch
from field_rows import BOTH, ROWS, VECTORS, dirichlet, normal_mixture
from hosts import HOSTS, always, each
from matplotlib import pyplot as plt
from quadrature import STENCIL, nodes
from scipy import special

from flowvi import LR, Flow, fields, plot
from flowvi.estimators import attach

matplotlib.use("agg")


def at(host, distribution, theta, field, x):
    """u, psi, the score and grad log p at each x (n, *event), for n copies of a scalar theta."""
    estimator = Flow(field) if field is not None else LR()

    def draw(t):
        drawn = attach(host.ops, host.target("x", distribution(host, t), enters=True), estimator, host.array(x))
        return drawn.value, 0 * t if drawn.score is None else drawn.score

    def log_prob(t, x):
        return distribution(host, t).log_prob(x)

    x = np.asarray(x, float)
    if host.name == "numpyro":
        n = len(x)
        x = np.resize(x, (40 if n <= 40 else 450, *x.shape[1:]))  # the same shape for all rows, so that JAX compiles once
        t = np.full(len(x), theta)
        tangent = jnp.ones(t.shape)
        u, psi = jax.jvp(draw, (jnp.asarray(t),), (tangent,))[1]
        score, slope = jax.grad(lambda t, x: log_prob(t, x).sum(), (0, 1))(jnp.asarray(t), jnp.asarray(x))
        return tuple(np.asarray(a)[:n] for a in (u, psi, score, slope))
    t, at_x = torch.tensor(np.full(len(x), theta), requires_grad=True), torch.tensor(x, requires_grad=True)

    def derivative(y):
        if not y.requires_grad:
            return np.zeros(t.shape)
        (g,) = torch.autograd.grad(y.sum(), t, retain_graph=True, allow_unused=True)
        return np.zeros(t.shape) if g is None else g.numpy()

    value, score_term = draw(t)
    columns = [derivative(c) for c in value.reshape(x.shape[0], -1).unbind(-1)]
    score, slope = torch.autograd.grad((log_prob(t, at_x) + 0 * at_x.sum()).sum(), (t, at_x))
    return np.stack(columns, -1).reshape(x.shape), derivative(score_term), score.numpy(), slope.numpy()


def divergence(host, distribution, theta, field, x, directions, step):
    """The divergence of u by finite differences, along the given directions."""
    x = np.asarray(x, float)
    total = 0.0
    for i, e in enumerate(directions):
        points = np.concatenate([x + s * k * step * e for k in STENCIL for s in (1, -1)])
        u = at(host, distribution, theta, field, points)[0].reshape(len(STENCIL), 2, *x.shape)
        u = u[..., i] if x.ndim > 1 else u
        total = total + sum(c * (u[n, 0] - u[n, 1]) for n, c in enumerate(STENCIL.values())) / step
    return total


def psi_by_definition(host, distribution, theta, field, x, directions=(1.0,), step=4e-3):
    u, psi, score, slope = at(host, distribution, theta, field, x)
    flow = (u * slope).reshape(len(u), -1).sum(-1)
    return psi, divergence(host, distribution, theta, field, x, directions, step) + flow + score


ALL_ROWS = each("row", ROWS, hosts=lambda row: row.hosts)
SLOW_IN_NUMPYRO = each("row", ROWS, slow_in_numpyro=always, hosts=lambda row: row.hosts)


@ALL_ROWS
def test_transport_equation(host, row):
    """psi = div u + u . grad log p + d_theta log p, which is 0 for a pathwise field."""
    tolerance = 10.0**-row.digits
    psi, expected = psi_by_definition(host, row.distribution, row.theta, row.field(), row.x)
    np.testing.assert_allclose(psi, expected, rtol=0, atol=tolerance)
    if row.field().divergence == "pathwise":
        np.testing.assert_allclose(expected, 0.0, rtol=0, atol=tolerance)


@SLOW_IN_NUMPYRO
def test_divergence_against_automatic(host, row):
    """The same field without its closed form has the same psi."""
    x = np.add(row.x, 0.01)
    psi = at(host, row.distribution, row.theta, row.field(), x)[1]
    automatic = replace(row.field(), divergence=None)
    np.testing.assert_allclose(at(host, row.distribution, row.theta, automatic, x)[1], psi, rtol=0, atol=10.0**-row.digits)


@ALL_ROWS
def test_flux(host, row):
    """The flux p (u - v) through each end of the support is 0, where v is the speed of the end."""
    flux_free = row.field()
    if "VonMises" in str(row.field()) or "von_mises()" in str(flux_free):
        pytest.skip("a circle has no ends")
    h = 1e-6
    for side in (0, 1):
        end = row.support(row.theta)[side]
        speed = (row.support(row.theta + h)[side] - row.support(row.theta - h)[side]) / (2 * h) if np.isfinite(end) else 0.0
        sign = 1 if side == 0 else -1
        x = end + sign * 1e-12 if np.isfinite(end) else -sign * 1e7
        p = np.exp(log_density(host, row, row.theta, [x]))
        if p == 0:
            continue
        u = at(host, row.distribution, row.theta, row.field(), [x])[0]
        assert abs(p * (u - speed)) < 1e-6


def log_density(host, row, theta, x):
    n, x = len(x), np.resize(x, 450)
    return np.asarray(row.distribution(host, host.array(np.full(450, theta))).log_prob(host.array(x)))[:n]


def grid(row, theta):
    """Quadrature points and weights over the support, split at the kink."""
    low, high = row.support(theta)
    kink = row.kink(theta) if low < row.kink(theta) < high else (low + high) / 2
    parts = [nodes(low, kink), nodes(kink, high)]
    x, w = (np.concatenate(a) for a in zip(*parts, strict=True))
    inside = (x > low) & (x < high) & (x != kink)
    return x[inside], w[inside]


def mean_cost(host, row, theta):
    x, w = grid(row, theta)
    return (w * np.nan_to_num(np.exp(log_density(host, row, theta, x))) * row.cost(np, x)).sum()


@SLOW_IN_NUMPYRO
def test_unbiased(host, row):
    """The integral of p (u phi' + psi phi) is the derivative of E[phi]."""
    step = 1e-3
    truth = sum(
        c * (mean_cost(host, row, row.theta + k * step) - mean_cost(host, row, row.theta - k * step)) for k, c in STENCIL.items()
    )
    x, w = grid(row, row.theta)
    p = np.nan_to_num(np.exp(log_density(host, row, row.theta, x)))
    seen = w * p * (1 + abs(x)) > 1e-14
    x, w, p = x[seen], w[seen], p[seen]
    u, psi, _, _ = at(host, row.distribution, row.theta, row.field(), x)
    slope = np.asarray(jax.vmap(jax.grad(lambda x: row.cost(jnp, x)))(jnp.asarray(x)))
    estimate = (w * p * (u * slope + psi * row.cost(np, x))).sum()
    np.testing.assert_allclose(estimate, truth / step, rtol=0, atol=10.0 ** (2 - row.digits))


@pytest.mark.parametrize("name", [name for name, row in ROWS.items() if row.hosts == BOTH])
def test_hosts_agree(name):
    row = ROWS[name]
    (u, psi, *_), (u2, psi2, *_) = (at(host, row.distribution, row.theta, row.field(), row.x) for host in HOSTS.values())
    np.testing.assert_allclose(u, u2, rtol=1e-10, atol=1e-10)
    np.testing.assert_allclose(psi, psi2, rtol=1e-10, atol=1e-10 if row.digits == 8 else 10.0**-row.digits)


# ---- vectors


@pytest.mark.parametrize("name", VECTORS)
def test_transport_equation_of_vectors(host, name):
    distribution, field, x = VECTORS[name]
    directions = np.eye(x.shape[-1])
    if name.startswith("Dirichlet"):  # without the last coordinate, which depends on the others
        directions = (directions - directions[-1])[:-1]
    psi, expected = psi_by_definition(host, distribution, 0.1, field(), x, directions, step=1e-3 if "Dirichlet" in name else 1e-2)
    np.testing.assert_allclose(psi, expected, rtol=0, atol=1e-8)
    if field().divergence == "pathwise":
        np.testing.assert_allclose(expected, 0.0, rtol=0, atol=1e-8)


@each("name", [name for name in VECTORS if "summed" not in name], slow_in_numpyro=always)
def test_divergence_of_vectors_against_automatic(host, name):
    distribution, field, x = VECTORS[name]
    psi = at(host, distribution, 0.1, field(), x)[1]
    np.testing.assert_allclose(at(host, distribution, 0.1, replace(field(), divergence=None), x)[1], psi, rtol=0, atol=1e-8)


@pytest.mark.parametrize("name", VECTORS)
def test_hosts_agree_on_vectors(name):
    distribution, field, x = VECTORS[name]
    (u, psi, *_), (u2, psi2, *_) = (at(host, distribution, 0.1, field(), x) for host in HOSTS.values())
    np.testing.assert_allclose(u, u2, rtol=1e-10, atol=1e-10)
    np.testing.assert_allclose(psi, psi2, rtol=1e-10, atol=1e-10)


def test_the_dirichlet_field_is_tangent(host):
    u = at(host, dirichlet, 0.1, fields.dirichlet(), np.array([[0.2, 0.5, 0.3], [1e-8, 1e-8, 1 - 2e-8]]))[0]
    np.testing.assert_allclose(u.sum(-1), 0.0, atol=1e-15)


# ---- implicit fields over a wide range of shapes


@pytest.mark.parametrize("a", [0.01, 0.1, 0.7, 2.0, 30.0, 1000.0])
def test_implicit_gamma_over_shapes(host, a):
    """The field is JAX's derivative, which is right to 1e-13, from quantile 1e-6 to 1 - 1e-6."""
    y = np.maximum(special.gammaincinv(a, np.array([1e-6, 0.05, 0.3, 0.5, 0.7, 0.95, 1 - 1e-6])), 1e-250)
    expected = jax.lax.random_gamma_grad(jnp.full(y.shape, a), jnp.asarray(y))
    u = fields.gamma._gamma_implicit(host.ops, host.array(a), host.array(y))
    np.testing.assert_allclose(np.asarray(u), expected, rtol=1e-10)


@pytest.mark.parametrize("a", [0.05, 0.5, 3.0, 100.0])
@pytest.mark.parametrize("b", [0.05, 0.5, 3.0, 300.0])
def test_implicit_beta_over_shapes(host, a, b):
    """The flux p u is minus the derivative of the cdf, by finite differences of SciPy's cdf."""
    x = special.betaincinv(a, b, np.array([0.01, 0.2, 0.5, 0.8, 0.99]))
    x = x[(x > 1e-200) & (x < 1 - 1e-9)]
    step = 0.02 * min(a, a**0.5)
    slope = sum(c * (special.betainc(a + k * step, b, x) - special.betainc(a - k * step, b, x)) for k, c in STENCIL.items()) / step
    u = np.asarray(fields.beta._beta_implicit(host.ops, *(host.array(v) for v in (a, b, x, 1 - x))))
    log_flux = a * np.log(x) + b * np.log1p(-x) - special.betaln(a, b)
    np.testing.assert_allclose(-u * np.exp(log_flux), slope, rtol=1e-8, atol=1e-10)


# ---- refusals, and wrong fields that the tests reject


REFUSED = {
    "another family": (
        lambda h, t: h.dist.Gamma(1 + t, h.array(2.0)),
        fields.location_scale,
        r"site 'x': the field fields.location_scale\(\) is for Normal, .*; found Gamma",
    ),
    "another family in a combination": (
        lambda h, t: h.dist.Gamma(1 + t, h.array(2.0)),
        lambda: fields.scaled(0.5, fields.beta_implicit()),
        r"site 'x': the field fields.scaled\(0.5, fields.beta_implicit\(\)\) is for Beta; found Gamma",
    ),
    "half of a field at a moving bound": (
        lambda h, t: h.dist.Uniform(h.array(0.0), 1 + t),
        lambda: fields.scaled(0.5, fields.uniform()),
        "site 'x': a Flow field that is not known to move with the bound is biased",
    ),
    "components that are no products": (
        lambda h, t: h.dist.MixtureSameFamily(
            h.dist.Categorical(logits=t[..., None] * h.array([1.0, 0.0])),
            h.dist.MultivariateNormal(t[..., None, None] + h.array([[0.0, 0.0], [1.0, 1.0]]), scale_tril=h.array(np.eye(2))),
        ),
        fields.mixture,
        "site 'x': .*mixture.. needs scalar components .* found MultivariateNormal",
    ),
    "another family of components": (
        lambda h, t: normal_mixture(h, t, t),
        lambda: fields.mixture(components=fields.gamma_implicit()),
        "site 'x': the field fields.gamma_implicit.. is for Gamma; found Normal",
    ),
    "no cdf": (dirichlet, fields.implicit, "site 'x': .*needs a cdf, but Dirichlet has none"),
    "a mask that mixes coordinates": (
        lambda h, t: h.dist.Normal(t, h.array(1.0)),
        lambda: fields.masked(lambda x, p: x - x.mean(), fields.location_scale()),
        "site 'x': the mask must be elementwise",
    ),
    "an unknown parameter": (
        lambda h, t: h.dist.Normal(t, h.array(1.0)),
        lambda: fields.per_element(mean=lambda x, p: 1.0),
        "site 'x': Normal has no parameter 'mean'; its parameters are: loc, scale",
    ),
}


@pytest.mark.parametrize("what", REFUSED)
def test_refused(host, what):
    distribution, field, message = REFUSED[what]
    x = np.array([[0.2, 0.3, 0.5]] if what == "no cdf" else [[0.2, 0.3]] if "products" in what else [0.2, 0.5])
    with pytest.raises(ValueError, match=message):
        at(host, distribution, 0.3, field(), x)


def test_a_truncated_cauchy_is_no_truncated_normal():
    with pytest.raises(ValueError, match="site 'x': the field truncated_normal.. is for a truncated Normal; found one of Cauchy"):
        at(HOSTS["numpyro"], ROWS["TruncatedCauchy low implicit()"].distribution, -0.8, fields.truncated_normal(), [0.1])


def test_arguments():
    with pytest.raises(TypeError, match="no divergence with a Field"):
        Flow(fields.location_scale(), divergence="pathwise")
    with pytest.raises(TypeError, match=r"mixture takes a pathwise field for its components; found fields.gamma_g_rep\(\)"):
        fields.mixture(components=fields.gamma_g_rep())


def test_a_wrong_field_is_rejected(host):
    """A mask without its gradient term, and u_loc = 1 at a truncated support, violate the transport equation."""
    row = ROWS["Normal scale masked"]
    naive = fields.masked(lambda x, p: x**2 / (1 + x**2), fields.location_scale())
    naive = replace(naive, divergence=lambda x, p, dtheta: x**2 / (1 + x**2) * dtheta.scale / p.scale)
    psi, expected = psi_by_definition(host, row.distribution, row.theta, naive, np.add(row.x, 0.2))
    assert np.all(np.abs(psi - expected) > 1e-3)
    wrong = replace(fields.gamma_one_moment(), divergence="pathwise")
    row = ROWS["Gamma concentration fields.gamma_one_moment()"]
    psi, expected = psi_by_definition(host, row.distribution, row.theta, wrong, row.x)
    assert np.all(psi == 0)
    assert np.all(np.abs(expected) > 1e-3)


def test_constant_parameters_cost_nothing():
    """The fields of constant parameters are not computed."""
    host, asked = HOSTS["pyro"], []

    def u(ops, x, p):
        asked.append(p)
        return x

    field = fields.field._pathwise("asked", ("Normal",), loc=u, scale=lambda ops, x, p: (x - p.loc) / p.scale)
    at(host, lambda h, t: h.dist.Normal(h.array(0.3), t), 1.2, field, [0.1])
    assert not asked


# ---- mixtures in Pyro: exact expectations under MixtureOfDiagNormals of two components at (-1, 0) and (1, 0.5) with unit scales


@pytest.mark.parametrize(("coordinate", "exact", "of_pyro"), [(0, 0.0, -0.055), (1, -0.0588, -0.0038)])
def test_where_the_mixtures_of_pyro_are_wrong(coordinate, exact, of_pyro):
    """The derivative of E[x_i^2] in the first mixing logit is right with the field, and wrong with Pyro's own sampler."""
    host, n = HOSTS["pyro"], 200_000
    locs = host.array([[-1.0, 0.0], [1.0, 0.5]])
    logits = host.array([0.2, -0.3])
    pi = torch.softmax(logits, -1)
    truth = float(pi[0] * (locs[0] ** 2 - (pi[:, None] * locs**2).sum(0))[coordinate])
    assert abs(truth - exact) < 3e-3

    def gradient(x, leaf):
        (x[..., coordinate] ** 2).sum().backward()
        return leaf.grad[:, 0].numpy()

    torch.manual_seed(0)
    leaf = logits.expand(n, 2).clone().requires_grad_()
    p = host.dist.MixtureSameFamily(host.dist.Categorical(logits=leaf), host.dist.Normal(locs.expand(n, 2, 2), 1.0).to_event(1))
    draw = attach(host.ops, host.target("x", p, enters=True), Flow(fields.mixture()), p.sample())
    assert draw.score is None
    ours = gradient(draw.value, leaf)
    assert abs(ours.mean() - truth) < 5 * ours.std() / np.sqrt(n)

    leaf = logits.expand(n, 2).clone().requires_grad_()
    pyros = gradient(host.dist.MixtureOfDiagNormals(locs.expand(n, 2, 2), torch.ones(n, 2, 2), leaf).rsample(), leaf)
    assert abs(pyros.mean() - truth) > 10 * pyros.std() / np.sqrt(n)
    assert abs(pyros.mean() - of_pyro) < 5e-3


def test_mixture_of_components_far_apart(host):
    """If the density of a component underflows, the derivative in its parameters is 0 and the others are right."""
    d, a = host.dist, host.array

    def moved(t):
        return d.MixtureSameFamily(d.Categorical(logits=a([0.0, 0.5])), d.Normal(a([-3.0, 3.0]) + t * a([1.0, 0.0]), a(0.1)))

    for estimator in (Flow(fields.mixture()), Flow(fields.mixture(components=fields.location_scale()))):
        figure = plot.velocity(moved(a(0.0)), estimator, moved, x=[-3.1, -2.9, 2.9, 3.1])
        np.testing.assert_allclose(figure.axes[0].lines[0].get_ydata(), [1, 1, 0, 0], atol=1e-12)
        plt.close(figure)


def test_flow_holds_one_field():
    """Both forms of the constructor give one field."""
    by_name, by_field = Flow(loc=abs, scale=round), Flow(fields.per_element(loc=abs, scale=round))
    assert by_name == by_field
    assert hash(by_name) == hash(by_field)
    assert repr(by_name) == "Flow(velocity=fields.per_element(loc=abs, scale=round))"
    proposed = Flow(loc=abs, scale=round, q=max)
    assert proposed != by_name
    assert proposed.at_p() == by_name
    assert Flow(max, divergence=min) == Flow(fields.Field(max, min))
    assert pickle.loads(pickle.dumps(by_name)) == by_name
