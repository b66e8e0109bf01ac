"""Learned control variates: mean 0 for every coefficient, no noise left if the model of the cost is exact, descent of E[g^2]."""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.contrib.control_flow
import numpyro.distributions as numpyro_dist
import pyro
import pyro.distributions as pyro_dist
import pytest
import torch
from hosts import HOSTS, Program, always, each, slow_in_numpyro
from numpyro.infer import SVI
from numpyro.infer.autoguide import AutoNormal

import flowvi.numpyro
import flowvi.pyro
from flowvi import LR, RP, AdaptiveFlow

NUMPYRO, PYRO = HOSTS["numpyro"], HOSTS["pyro"]
HESSIAN = np.array([[2.0, 0.6, -0.3], [0.6, 1.0, 0.2], [-0.3, 0.2, 0.7]])
TILT = np.array([0.5, -1.0, 0.3])
LOC, SCALE = np.array([0.3, -0.2, 0.1]), np.array([0.5, 0.8, 1.1])
TRIL = np.array([[0.5, 0.0, 0.0], [0.3, 0.7, 0.0], [-0.2, 0.1, 0.9]])
FACTORS = {"Normal": SCALE, "MultivariateNormal": TRIL}
SCALES = {"Normal": SCALE, "MultivariateNormal": np.sqrt((TRIL**2).sum(-1))}


def fn(host, family, loc, factor):
    if family == "Normal":
        return host.dist.Normal(loc, factor).to_event(1)
    return host.dist.MultivariateNormal(loc, scale_tril=host.math.tril(factor))


def program(host, family, cost, weight=1.0):
    """A site with parameters loc and factor, with a density scaled by ``weight``, and a model that is a factor."""

    def guide():
        with host.scale(weight):
            host.sample("x", fn(host, family, host.param("loc", host.array(LOC)), host.param("factor", host.array(FACTORS[family]))))

    def model():
        with host.scale(weight):
            x = host.sample("x", fn(host, family, host.array(LOC + 0.1), host.array(1.5 * FACTORS[family])))
        host.factor("cost", cost(host, x))

    return model, guide


def quadratic(host, x):
    return host.array(TILT) @ x - 0.5 * x @ (host.array(HESSIAN) @ x)


def quartic(host, x):
    return quadratic(host, x) - 0.1 * (x**4).sum() + host.math.sin(x[0] * x[2])


KINDS = {"diagonal": 2, "quadratic": 4, "cubic": 10}  # the number of coefficients of a coordinate


def coefficients(kind="quadratic"):
    values = np.random.default_rng(3).normal(size=(3, KINDS[kind]))
    values[:, 4:] *= 0.4
    return {"x.control_variate": values}


def slope(kind, learned, z, covariance):
    """b, h at the rows of z, and B, by their definition."""
    b, matrix = learned[:, 0], np.diag(learned[:, 1]) if kind == "diagonal" else learned[:, 1:4]
    weights, v = (learned[:, 4:7], learned[:, 7:]) if kind == "cubic" else np.zeros((2, 3, 1))
    return b, z @ matrix.T + ((z @ v) ** 2 - np.diag(v.T @ covariance @ v)) @ weights.T, matrix


@pytest.mark.parametrize("family", list(FACTORS))
def test_no_noise_is_left_of_a_quadratic_cost(host, family):
    """At the right coefficients every sample is the exact gradient of the ELBO; at others none is."""
    model, guide = program(host, family, quadratic)
    matrix, s = (np.diag(SCALE) if family == "Normal" else TRIL), SCALES[family]
    precision = np.linalg.inv(1.5**2 * matrix @ matrix.T)
    hessian, of_loc = HESSIAN + precision, TILT - HESSIAN @ LOC + precision @ np.full(3, 0.1)
    of_factor = np.tril(-hessian @ matrix + np.linalg.inv(matrix).T)
    of_factor = np.diag(of_factor) if family == "Normal" else of_factor
    best = {"x.control_variate": np.column_stack([s * of_loc, -s[:, None] * hessian * s])}
    params = {"loc": LOC, "factor": FACTORS[family]}
    for seed, learned in ((0, best), (1, best), (0, coefficients())):
        _, g = host.loss_and_gradients(params | learned, model, guide, seed, estimators={"x": RP(control_variate="quadratic")})
        close = [np.abs(-g["loc"] - of_loc).max() < 1e-10, np.abs(-g["factor"] - of_factor).max() < 1e-10]
        assert close == [learned is best] * 2


@pytest.mark.parametrize("family", list(FACTORS))
def test_no_noise_is_left_of_a_cubic_cost(host, family):
    """No noise is left if the slope of the cost is that of the model, along one direction."""
    direction = np.array([0.5, -0.3, 0.4])

    def guide():
        loc, factor = host.param("loc", host.array(LOC)), host.param("factor", host.array(FACTORS[family]))
        host.sample("x", fn(host, family, loc, factor).mask(False))

    def model():
        x = host.sample("x", fn(host, family, host.array(LOC), host.array(FACTORS[family])).mask(False))
        host.factor("cost", (host.array(direction) @ x) ** 3)

    s = SCALES[family]
    covariance = np.diag(SCALE**2) if family == "Normal" else TRIL @ TRIL.T
    mean, u = direction @ LOC, s * direction  # so the slope in z is 3 (mean + u . z)^2 u
    best = np.zeros((3, 10))
    best[:, 0] = 3 * (mean**2 + direction @ covariance @ direction) * u
    best[:, 1:4], best[:, 4], best[:, 7] = 6 * mean * np.outer(u, u), 3 * u, u
    params = {"loc": LOC, "factor": FACTORS[family]}
    options = {"estimators": {"x": RP(control_variate="cubic")}}
    found = [host.loss_and_gradients(params | {"x.control_variate": best}, model, guide, seed, **options)[1] for seed in range(3)]
    np.testing.assert_allclose(found[0]["loc"], -best[:, 0] / s, rtol=1e-10)
    for g in found[1:]:
        for name in params:
            np.testing.assert_allclose(g[name], found[0][name], rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", list(FACTORS))
def test_at_one_point(host, family, kind):
    """Without a cost the gradient in loc and factor is that of E[f] - f(x), by its definition."""
    learned = coefficients(kind)
    zero = {name: 0 * value for name, value in learned.items()}
    params = {"loc": LOC, "factor": FACTORS[family]}
    model, guide = program(host, family, lambda host, x: 0 * x.sum())
    options = {"estimators": {"x": RP(control_variate=kind)}, "entropy": "stl"}
    with_model, plain = (host.loss_and_gradients(params | at, model, guide, 4, **options)[1] for at in (learned, zero))
    tril, s = (np.diag(SCALE) if family == "Normal" else TRIL), SCALES[family]
    m = tril / s[:, None]
    # the gradient of a linear cost in factor is its slope times eps, which reveals eps
    with_cost, guide = program(host, family, lambda host, x: -x.sum())
    tilted = host.loss_and_gradients(params | zero, with_cost, guide, 4, **options)[1]
    eps = (tilted["factor"] - plain["factor"]) if family == "Normal" else (tilted["factor"] - plain["factor"])[-1]
    b, h, matrix = slope(kind, *learned.values(), eps @ m.T, m @ m.T)
    of_m = np.tril(matrix @ m - np.outer(b + h, eps))
    of_factor = (np.diag(of_m) if family == "Normal" else of_m) / (s if family == "Normal" else s[:, None])
    np.testing.assert_allclose(with_model["loc"] - plain["loc"], h / s, rtol=1e-10, atol=1e-12)
    np.testing.assert_allclose(with_model["factor"] - plain["factor"], -of_factor, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("particles", [1, 4])
@pytest.mark.parametrize("kind", KINDS)
def test_the_mean_is_zero_for_every_coefficient(host, kind, particles):
    """Without a cost only the control variate is left. Its mean is 0, and its variance is that of a quadrature."""
    (learned,) = coefficients(kind).values()
    nodes, weights = np.polynomial.hermite_e.hermegauss(5)
    z = np.stack(np.meshgrid(nodes, nodes, nodes), -1).reshape(-1, 3)
    weights = np.prod(np.meshgrid(weights, weights, weights), 0).ravel() / weights.sum() ** 3
    b, h, matrix = slope(kind, learned, z, np.eye(3))
    exact = np.concatenate([-h, np.diag(matrix) - (b + h) * z], 1) / np.tile(SCALE, 2)
    np.testing.assert_allclose(weights @ exact, 0, atol=1e-12)
    variance = weights @ exact**2 / particles

    def guide(h, t):
        stack = h.math.stack([t[i] + 0.0 for i in range(6)], -1)
        with h.substitute({"x.control_variate": learned}):
            h.sample("x", h.dist.Normal(stack[..., :3], stack[..., 3:]).to_event(1).mask(False))

    def model(h, t):
        h.sample("x", h.dist.Normal(h.array(np.zeros(3)), h.array(1.0)).to_event(1).mask(False))

    n = 10_000
    samples = host.gradients(Program(guide, model, (*LOC, *SCALE)), n, particles=particles, estimators={"x": RP(control_variate=kind)})
    assert np.all(np.abs(samples.mean(0)) < 5 * np.sqrt(variance / n))
    squares = samples**2
    assert np.all(np.abs(squares.mean(0) - variance) < 5 * squares.std(0) / np.sqrt(n))
    unmatched = samples - np.concatenate([np.zeros(3), np.diag(matrix) / SCALE])  # without the mean of the model
    assert np.any(np.abs(unmatched.mean(0)) > 5 * np.sqrt(variance / n))


@pytest.mark.parametrize("entropy", ["full", "stl", "analytic"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", list(FACTORS))
def test_coefficients_descend_the_second_moment(host, family, kind, entropy):
    """The coefficients get the derivative of the squared gradient in loc and factor, in units of the standard deviation.

    The squared gradient is quadratic in the coefficients, and of fourth order in the directions. It leaves out a divergence in closed
    form, which is not random.
    """
    model, guide = program(host, family, quartic, weight=1.7)
    options = {"estimators": {"x": RP(control_variate=kind)}, "entropy": entropy}
    params = {"loc": LOC, "factor": FACTORS[family]}
    units = {"loc": SCALES[family], "factor": SCALE if family == "Normal" else SCALES[family][:, None]}
    fixed = dict.fromkeys(params, 0.0)
    if entropy == "analytic":
        fixed = host.loss_and_gradients(params, *program(host, family, lambda host, x: 0 * x.sum(), 1.7), entropy="analytic")[1]

    def second_moment(learned):
        _, g = host.loss_and_gradients(params | learned, model, guide, **options)
        return sum(((units[name] * (g[name] - fixed[name])) ** 2).sum() for name in params)

    at = coefficients(kind)
    (name,) = at
    _, g = host.loss_and_gradients(params | at, model, guide, **options)
    for i in (0, 2 * KINDS[kind] - 1, 6, at[name].size - 1)[: 4 if kind == "cubic" else 2]:
        step = np.zeros(at[name].size)
        step[i] = 1.0
        f = [second_moment({name: at[name] + by * step.reshape(at[name].shape)}) for by in (-2, -1, 1, 2)]
        np.testing.assert_allclose(g[name].ravel()[i], (f[0] - 8 * f[1] + 8 * f[2] - f[3]) / 12, rtol=1e-8)


@slow_in_numpyro
def test_nothing_else_changes(host):
    """At coefficients of 0 the loss and all other gradients are those of RP, however the particles run."""
    # Pyro's particles are a batch dim of x, which quartic does not know
    model, guide = program(host, "Normal", quartic if host.name == "numpyro" else lambda h, x: (x.sum(-1) - 0.3) ** 2)
    params = {"loc": LOC, "factor": SCALE}
    for particles, vectorize in ((1, False), (3, False), (3, True)):
        options = {"num_particles": particles, "vectorize_particles": vectorize, "plates": 0}
        zero = {name: 0 * value for name, value in coefficients().items()}
        loss, g = host.loss_and_gradients(params | zero, model, guide, estimators={"x": RP(control_variate="quadratic")}, **options)
        other, plain = host.loss_and_gradients(params, model, guide, estimators={"x": RP()}, **options)
        np.testing.assert_allclose(loss, other, rtol=1e-14)
        for name in params:
            np.testing.assert_allclose(g[name], plain[name], rtol=1e-12)


def plate_program(host, size, subsample_size):
    """Local Normals in a subsampled plate, and a discrete site with LR."""

    def guide():
        host.sample("k", host.dist.Bernoulli(logits=host.param("logit", host.array(0.3))))
        loc = host.param("loc", host.array(np.linspace(-1, 1, size)), event_dim=0)
        with host.plate("data", size, subsample_size=subsample_size) as i:
            host.sample("z", host.dist.Normal(loc[i], 0.5))

    def model():
        k = host.sample("k", host.dist.Bernoulli(0.5))
        with host.plate("data", size, subsample_size=subsample_size):
            z = host.sample("z", host.dist.Normal(0.0, 1.0))
            host.sample("y", host.dist.Normal(z**2 + k, 1.0), obs=host.array(1.0))

    return model, guide


@each("vectorize", [False, True], slow_in_numpyro=always)
def test_an_element_of_a_plate_has_coefficients_of_its_own(host, vectorize):
    model, guide = plate_program(host, 6, 2)
    estimators = {"z": RP(control_variate="quadratic"), "k": LR()}
    options = {"num_particles": 3, "vectorize_particles": vectorize, "plates": 1, "estimators": estimators}
    params = {"loc": np.linspace(-1, 1, 6), "logit": 0.3, "z.control_variate": np.zeros((6, 1, 2))}
    _, g = host.loss_and_gradients(params, model, guide, **options)
    seen = g["loc"] != 0
    assert 2 <= seen.sum() <= 6
    assert np.all((np.abs(g["z.control_variate"]) > 0) == seen[:, None, None])


def test_learned_in_numpyro():
    """With a wrapped autoguide the noise falls; without the wrapper the objective refuses to run."""

    def model():
        w = numpyro.sample("w", numpyro_dist.Normal(jnp.zeros(3), 2.0).to_event(1))
        numpyro.factor("cost", quadratic(NUMPYRO, w))

    guide = AutoNormal(model)
    elbo = flowvi.numpyro.TraceFlow_ELBO(estimators={"w": RP(control_variate="quadratic")})
    svi = SVI(model, flowvi.numpyro.adaptive(guide, elbo), numpyro.optim.Adam(0.02), elbo)
    result = svi.run(jax.random.key(0), 1500, progress_bar=False)
    assert result.params["w.control_variate"].shape == (3, 4)

    def gradients(params):
        loss = lambda key, loc: elbo.loss(key, params | {"w_auto_loc": loc}, model, guide)
        return jax.vmap(jax.grad(loss, 1), (0, None))(jax.random.split(jax.random.key(1), 500), params["w_auto_loc"])

    start = result.params | {"w.control_variate": jnp.zeros((3, 4))}
    assert np.all(gradients(result.params).var(0) < 0.02 * gradients(start).var(0))
    with pytest.raises(
        ValueError, match=r"site 'w': RP\(control_variate='quadratic'\) learns the parameter 'w.control_variate', but SVI does"
    ):
        SVI(model, guide, numpyro.optim.Adam(0.02), elbo).run(jax.random.key(0), 1, progress_bar=False)
    with pytest.raises(Exception, match="forward-mode"):
        svi.run(jax.random.key(0), 1, progress_bar=False, forward_mode_differentiation=True)


def test_learned_in_pyro():
    """The parameters are registered automatically, and the noise falls."""

    def model():
        w = pyro.sample("w", pyro_dist.Normal(torch.zeros(3), 2.0).to_event(1))
        pyro.factor("cost", quadratic(PYRO, w))

    guide = pyro.infer.autoguide.AutoNormal(model)
    elbo = flowvi.pyro.TraceFlow_ELBO(estimators={"w": RP(control_variate="quadratic")})
    svi = pyro.infer.SVI(model, guide, pyro.optim.Adam({"lr": 0.02}), elbo)
    for _ in range(1500):
        svi.step()
    assert pyro.param("w_unconstrained.control_variate").shape == (3, 4)

    def gradients():
        parameter = guide.locs.w_unconstrained if hasattr(guide.locs, "w_unconstrained") else guide.locs.w
        return torch.stack([torch.autograd.grad(elbo.differentiable_loss(model, guide), parameter)[0] for _ in range(300)]).numpy()

    learned = gradients()
    pyro.get_param_store()["w_unconstrained.control_variate"] = torch.zeros(3, 4)
    assert np.all(learned.var(0) < 0.02 * gradients().var(0))


def test_refusals(host):
    with pytest.raises(TypeError, match="RP: expected control_variate='cubic', 'quadratic', 'diagonal' or None, found 'quartic'"):
        RP(control_variate="quartic")
    with pytest.raises(TypeError, match="RP takes a control variate or q, found both"):
        RP(lambda p: p, control_variate="quadratic")
    guide = lambda: host.sample("x", host.dist.Gamma(host.array(2.0), host.array(1.0)))
    with pytest.raises(ValueError, match=r"site 'x': RP's control variate .* expected Normal or MultivariateNormal, found Gamma"):
        host.loss_and_gradients({}, guide, guide, estimators={"x": RP(control_variate="quadratic")})
    model, guide = program(host, "Normal", quadratic)
    bound = host.flow.TraceFlow_RenyiELBO(estimators={"x": RP(control_variate="quadratic")})
    with pytest.raises(ValueError, match="site 'x': a control variate has mean 0 only under an ELBO"):
        host.loss(bound, model, guide)
    wrapped = host.flow.Estimated(host.dist.Normal(host.array(0.0), host.array(1.0)), RP(control_variate="quadratic"))

    def in_scan():
        step = lambda carry, _: (carry + numpyro.sample("z", wrapped), None)
        numpyro.contrib.control_flow.scan(step, 0.0, None, length=3)

    if host.name == "numpyro":
        with pytest.raises(ValueError, match="inside scan or cond an estimator cannot register parameters"):
            host.loss_and_gradients({}, in_scan, in_scan)


WITHOUT_COORDINATES = {"shared": {"shared": True}, "features": {"features": lambda p: p.loc[..., None]}, "own": {}}


@pytest.mark.parametrize("options", WITHOUT_COORDINATES.values(), ids=list(WITHOUT_COORDINATES))
def test_an_event_without_coordinates_is_that_of_rp(host, options):
    def part():
        host.sample("x", host.dist.Normal(host.array(np.zeros(0)), host.array(1.0)).to_event(1))

    elbo = host.flow.TraceFlow_ELBO(estimators={"x": RP(control_variate="cubic", **options)})
    assert host.loss(elbo, part, part) == 0
    assert elbo.describe(part, part)[0].estimator == RP()


@pytest.mark.parametrize("estimator", [RP(control_variate="quadratic"), AdaptiveFlow(), AdaptiveFlow(q="learned")], ids=repr)
def test_outside_of_flowvi_the_start_stays(estimator):
    """Outside flowvi, Pyro's `Estimated` draws from p with the derivative of RP, and keeps the start values."""
    loc, scale = torch.tensor([0.3, -0.2], requires_grad=True), torch.tensor([0.9, 1.4], requires_grad=True)

    def draw(fn):
        pyro.set_rng_seed(3)
        x = fn()
        return x, *torch.autograd.grad((x**3).sum(), (loc, scale))

    p = HOSTS["pyro"].dist.Normal(loc, scale).to_event(1)
    for found, expected in zip(draw(flowvi.pyro.Estimated(p, estimator)), draw(p), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


def test_no_other_family_under_pyros_own_elbo():
    """Under Pyro's own ELBO it is RP, and refuses other families."""
    estimated = flowvi.pyro.Estimated(pyro_dist.Laplace(torch.tensor(0.3), 1.0), RP(control_variate="diagonal"))
    with pytest.raises(ValueError, match="expected Normal or MultivariateNormal, found Laplace"):
        pyro.infer.Trace_ELBO().loss_and_grads(
            lambda: pyro.sample("x", pyro_dist.Normal(0.0, 1.0)), lambda: pyro.sample("x", estimated)
        )


def test_a_second_derivative_is_refused_in_pyro():
    model, guide = program(PYRO, "Normal", quartic)
    pyro.clear_param_store()
    loss = flowvi.pyro.TraceFlow_ELBO(estimators={"x": RP(control_variate="quadratic")}).differentiable_loss(model, guide)
    loc = pyro.param("loc")
    (gradient,) = torch.autograd.grad(loss, loc, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


def test_what_another_estimator_has_left_is_refused(host):
    """Coefficients of the wrong shape are refused, such as those for another number of bumps."""
    model, guide = program(host, "Normal", quadratic)
    params = {"loc": LOC, "factor": SCALE, "x.control_variate": np.zeros((3, 2))}
    with pytest.raises(ValueError, match=r"'x.control_variate' must have the shape \(3, 4\) .* parameter of that name has \(3, 2\)"):
        host.loss_and_gradients(params, model, guide, estimators={"x": RP(control_variate="quadratic")})
    params["x.velocity"], params["x.control"] = np.zeros((3, 2, 3)), np.zeros((3, 2, 7))
    with pytest.raises(ValueError, match=r"'x.velocity' must have the shape \(3, 2, 6\) .* \(3, 2, 3\)"):
        host.loss_and_gradients(params, model, guide, estimators={"x": AdaptiveFlow()})
