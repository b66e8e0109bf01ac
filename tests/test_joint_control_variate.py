"""A control variate for the whole guide: mean 0 for every coefficient, and no noise left if the model of the cost is exact."""

from itertools import combinations_with_replacement

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import pyro
import pytest
import torch
from hosts import HOSTS, each, slow_in_numpyro
from numpyro.infer import SVI

import flowvi.numpyro
import flowvi.run
from flowvi import LR, RP
from flowvi.learned.coupling import Block, Coupling, Plate, couple
from flowvi.numpyro import adaptive

KINDS = ["quadratic", "cubic"]
START = {
    "g_loc": np.array([0.3, -0.2]),
    "g_scale": np.array([0.5, 0.8]),
    "m_loc": np.array([0.1, 0.4]),
    "m_tril": np.array([[0.6, 0.0], [0.3, 0.7]]),
    "t_loc": 0.2,
    "t_scale": 0.7,
    "l_loc": np.array([0.5, -0.5, 0.1]),
    "l_scale": np.array([0.4, 0.9, 0.6]),
}
SIZES = {"g": 2, "m": 2, "t": 1, "l": 1}
PARENT = 0.3  # the slope of the loc of t in the sum of g


def guide_of(host, slope=0.0):
    """Two global sites, a third that may depend on the first, and a plate of local sites, without densities."""

    def guide():
        p = {name: host.param(name, host.array(value)) for name, value in START.items()}
        g = host.sample("g", host.dist.Normal(p["g_loc"], p["g_scale"]).to_event(1).mask(False))
        host.sample("m", host.dist.MultivariateNormal(p["m_loc"], scale_tril=host.math.tril(p["m_tril"])).mask(False))
        host.sample("t", host.dist.Normal(p["t_loc"] + slope * g.sum(-1) if slope else p["t_loc"], p["t_scale"]).mask(False))
        with host.plate("data", 3):
            host.sample("l", host.dist.Normal(p["l_loc"], p["l_scale"]).mask(False))

    return guide


def model_of(host, cost):
    def model():
        values = {
            "g": host.sample("g", host.dist.Normal(host.array(np.zeros(2)), 1.0).to_event(1).mask(False)),
            "m": host.sample("m", host.dist.MultivariateNormal(host.array(np.zeros(2)), host.array(np.eye(2))).mask(False)),
            "t": host.sample("t", host.dist.Normal(host.array(0.0), 1.0).mask(False)),
        }
        with host.plate("data", 3):
            values["l"] = host.sample("l", host.dist.Normal(host.array(0.0), 1.0).mask(False))
        host.factor("cost", cost(host, values))

    return model


def others(name, slope=0.0):
    return [site for site in SIZES if site != name and not (slope and (name, site) == ("t", "g"))]


def elements(name, site):
    """The elements of a site that have separate coefficients for another site."""
    return range(3) if site == "l" and name != "l" else [None]


def seen(name, eps, kind, slope=0.0):
    """The noise with which a site is coupled, by definition: of others or of its own element, and products; (elements, columns)."""
    columns = [eps[site] for site in others(name, slope)]
    if kind == "cubic":
        everything = [(site, k, e) for site in [name, *others(name, slope)] for e in elements(name, site) for k in range(SIZES[site])]
        for (a, k, e), (b, n, f) in combinations_with_replacement(everything, 2):
            if b != name and (e == f or None in (e, f)):
                x, y = (
                    eps[site][:, i] if element is None else eps[site][element : element + 1, i]
                    for site, i, element in ((a, k, e), (b, n, f))
                )
                columns.append((x * y - ((a, k, e) == (b, n, f)))[:, None])
    if name == "l":
        return np.concatenate([np.broadcast_to(c, (3, c.shape[1])) for c in columns], 1)
    return np.concatenate([c.reshape(1, -1) for c in columns], 1)


def coefficients(kind, slope=0.0, seed=3):
    noise, rng = {site: np.zeros((3 if site == "l" else 1, size)) for site, size in SIZES.items()}, np.random.default_rng(seed)
    values = {}
    for site, size in SIZES.items():
        columns = 1 + size + (2 * size if kind == "cubic" else 0) + seen(site, noise, kind, slope).shape[1]
        values[f"{site}.control_variate"] = 0.5 * rng.normal(size=((3,) if site == "l" else ()) + (size, columns))
    return values


def control(learned, eps, kind, slope=0.0):
    """The gradient of the control variate in all parameters, by its definition at given noise."""
    gradient = {name: np.zeros(np.shape(value)) for name, value in START.items()}
    for site, size in SIZES.items():
        c = learned[f"{site}.control_variate"].reshape((-1, size, learned[f"{site}.control_variate"].shape[-1]))
        m = START["m_tril"] / np.sqrt((START["m_tril"] ** 2).sum(-1))[:, None] if site == "m" else np.eye(size)
        z, y = eps[site] @ m.T, seen(site, eps, kind, slope)
        b, matrix = c[..., 0], c[..., 1 : 1 + size]
        h = (matrix @ z[..., None])[..., 0] + (c[..., -y.shape[1] :] @ y[..., None])[..., 0]
        if kind == "cubic":  # the test has as many directions as coordinates
            weights, v = c[..., 1 + size : 1 + 2 * size], c[..., 1 + 2 * size : 1 + 3 * size]
            squares = (z[:, None] @ v)[:, 0] ** 2 - np.diagonal(v.swapaxes(1, 2) @ m @ m.T @ v, axis1=1, axis2=2)
            h = h + (weights @ squares[..., None])[..., 0]
        of_m = matrix @ m - (b + h)[..., None] * eps[site][:, None, :]
        s = np.sqrt((START["m_tril"] ** 2).sum(-1)) if site == "m" else START[f"{site}_scale"]
        of_loc = -h / np.reshape(s, h.shape)
        gradient[f"{site}_loc"] += of_loc.reshape(gradient[f"{site}_loc"].shape)
        factor = "m_tril" if site == "m" else f"{site}_scale"
        of_m = np.tril(of_m[0]) / s[:, None] if site == "m" else np.diagonal(of_m, axis1=1, axis2=2) / np.reshape(s, h.shape)
        gradient[factor] += of_m.reshape(gradient[factor].shape)
        if site == "t":  # the loc of t depends on g
            gradient["g_loc"] += slope * of_loc[0, 0]
            gradient["g_scale"] += slope * of_loc[0, 0] * eps["g"][0]
    return gradient


def gradients(host, params, cost, slope=0.0, seed=4, **options):
    model, guide = model_of(host, cost), guide_of(host, slope)
    if host.name == "numpyro":
        elbo = host.flow.TraceFlow_ELBO(**options)
        f = jax.jit(jax.grad(lambda p: elbo.loss(jax.random.key(seed), p, model, guide)))
        g = f({name: host.array(value) for name, value in params.items()})
    else:
        _, g = host.loss_and_gradients(params, model, guide, seed, plates=1, **options)
    return {name: -np.asarray(g[name]) for name in params}  # the gradient of the ELBO


def no_cost(host, values):
    return 0 * values["t"].sum()


def linear(host, values):
    return sum(value.sum() for value in values.values())


def noise_of(host, seed):
    """The noise of a run, which the gradient of a linear cost in the scales reveals."""
    g = gradients(host, START, linear, seed=seed)
    return {"g": g["g_scale"][None], "m": g["m_tril"][-1:], "t": g["t_scale"].reshape(1, 1), "l": g["l_scale"][:, None]}


@each(
    ("kind", "slope"),
    {f"{kind}-{slope}": (kind, slope) for kind in KINDS for slope in (0.0, PARENT)},
    lambda v: v[0] == "cubic" or not v[1],
)
def test_at_one_point(host, kind, slope):
    """Without a cost the gradient is that of the control variate, by its definition."""
    learned = coefficients(kind, slope)
    found = gradients(host, START | learned, no_cost, slope, control_variate=kind)
    for name, value in control(learned, noise_of(host, 4), kind, slope).items():
        np.testing.assert_allclose(found[name], value, rtol=1e-10, atol=1e-12)


def spread(kind, learned, slope):
    """The standard deviations of the control variate, by its definition."""
    rng = np.random.default_rng(0)
    draws = [{site: rng.normal(size=(3 if site == "l" else 1, size)) for site, size in SIZES.items()} for _ in range(500)]
    samples = [control(learned, eps, kind, slope) for eps in draws]
    return {name: np.std([sample[name] for sample in samples], 0) for name in START}


def z_of_mean(host, kind, learned, n=15_000, particles="independent", full=None):
    """The largest z-score of the mean gradient; ``full``: the coefficients, if they are not those of :func:`coefficients`."""
    options = {"num_particles": n, "vectorize_particles": True, "particles": particles, "control_variate": kind}
    found = gradients(host, START | learned, no_cost, PARENT, **options)
    sd = spread(kind, full or coefficients(kind, PARENT), PARENT)
    return max(np.abs(found[name] / np.where(sd[name] > 0, sd[name], 1)).max() for name in START) * np.sqrt(n)


@each("kind", KINDS, lambda kind: True)
def test_the_mean_is_zero(host, kind, monkeypatch):
    """The mean is 0 at any coefficients. It is not 0 if a site is coupled with one from which it was computed."""
    assert z_of_mean(host, kind, coefficients(kind, PARENT)) < 5
    couple = flowvi.run.couple
    monkeypatch.setattr(flowvi.run, "couple", lambda blocks, ancestors, kind: couple(blocks, dict.fromkeys(blocks, frozenset()), kind))
    faulty = {name: 0 * value for name, value in coefficients(kind, 0.0).items()}
    faulty["t.control_variate"][0, 2 if kind == "quadratic" else 4] = 2.0  # couples t with g
    assert z_of_mean(host, kind, faulty) > 10


@slow_in_numpyro
def test_the_mean_is_zero_over_stratified_particles(host):
    assert z_of_mean(host, "quadratic", coefficients("quadratic", PARENT), particles="stratified") < 5


def quadratic_cost():
    """A quadratic cost that couples no two elements of the plate: its matrix and slope, over g, m, t and l."""
    rng = np.random.default_rng(1)
    matrix = rng.normal(size=(8, 8))
    matrix = matrix @ matrix.T / 4
    for i in (5, 6, 7):
        for j in (5, 6, 7):
            matrix[i, j] *= i == j
    return matrix, rng.normal(size=8)


@slow_in_numpyro
def test_no_noise_is_left_of_a_quadratic_cost(host):
    """With the right coupling every sample is the exact gradient of the ELBO; without it none is."""
    matrix, tilt = quadratic_cost()

    def cost(host, values):
        x = host.math.concatenate([values["g"], values["m"], values["t"].reshape((1,)), values["l"]])
        return host.array(tilt) @ x - 0.5 * x @ (host.array(matrix) @ x)

    loc = np.concatenate([np.ravel(START[f"{site}_loc"]) for site in SIZES])
    factor = np.diag(np.concatenate([START["g_scale"], np.ones(2), [START["t_scale"]], START["l_scale"]]))
    factor[2:4, 2:4] = START["m_tril"]
    s = np.sqrt((factor**2).sum(1))
    slope, of_factor = tilt - matrix @ loc, -matrix @ factor
    places = {"g": [0, 1], "m": [2, 3], "t": [4], "l": [5, 6, 7]}
    best = {}
    for site, rows in places.items():
        ours = []
        for i in rows:
            own = [i] if site == "l" else rows
            hessian = -s[i] * matrix[i, own] * s[own]
            # sites are coupled by their noise, so the factor of m appears here
            columns = [-(s[i] * matrix[i] @ factor)[places[other]] for other in others(site)]
            ours.append(np.concatenate([[s[i] * slope[i]], hessian, *columns]))
        best[f"{site}.control_variate"] = np.array(ours)[:, None] if site == "l" else np.array(ours)
    exact = {"g_loc": slope[:2], "m_loc": slope[2:4], "t_loc": slope[4], "l_loc": slope[5:]}
    exact |= {"g_scale": np.diag(of_factor)[:2], "m_tril": np.tril(of_factor[2:4, 2:4]), "t_scale": of_factor[4, 4]}
    exact["l_scale"] = np.diag(of_factor)[5:]
    for seed in (0, 1):
        found = gradients(host, START | best, cost, seed=seed, control_variate="quadratic")
        for name, value in exact.items():
            np.testing.assert_allclose(found[name], value, rtol=1e-10, atol=1e-12)
    alone = {name: np.concatenate([v[..., : 1 + SIZES[name[0]]], 0 * v[..., 1 + SIZES[name[0]] :]], -1) for name, v in best.items()}
    found = gradients(host, START | alone, cost, control_variate="quadratic")
    assert not any(np.allclose(found[name], value, rtol=1e-3) for name, value in exact.items())


def rough_cost(host, values):
    local = values["l"] * values["g"].sum() + host.math.sin(values["l"] * values["t"])
    return local.sum() - 0.3 * (values["g"] ** 4).sum() + values["m"][0] * values["m"][1] * values["t"]


FACTORS = ("g_scale", "m_tril", "t_scale", "l_scale")
UNITS = {site: np.sqrt((START["m_tril"] ** 2).sum(-1)) if site == "m" else START[f"{site}_scale"] for site in SIZES}


@each("kind", KINDS, lambda kind: True)
def test_coefficients_descend_the_second_moment(host, kind):
    """The coefficients get the derivative of the squared gradient in loc and factor, in units of the standard deviation."""
    learned = coefficients(kind)

    def second_moment(learned):
        g = gradients(host, START | learned, rough_cost, control_variate=kind)
        of_loc = sum(((UNITS[site] * g[f"{site}_loc"]) ** 2).sum() for site in SIZES)
        return of_loc + sum(
            ((np.reshape(UNITS[name[0]], (-1, 1) if name[0] == "m" else np.shape(g[name])) * g[name]) ** 2).sum() for name in FACTORS
        )

    slopes = gradients(host, START | learned, rough_cost, control_variate=kind)
    for name, value in learned.items():
        for i in (1, value.size - 1):
            step = np.zeros(value.size)
            step[i] = 1.0
            f = [second_moment(learned | {name: value + by * step.reshape(value.shape)}) for by in (-1, 1)]
            np.testing.assert_allclose(-slopes[name].ravel()[i], (f[1] - f[0]) / 2, rtol=1e-8)


OPTIONS = {
    "stl": {"entropy": "stl"},
    "analytic": {"entropy": "analytic"},
    "score": {"estimators": {"k": LR()}},
    "sum": {"dependencies": "graph"},
    "loop": {"num_particles": 2, "estimators": {"k": LR()}, "vectorize_particles": False},
    "vectorized": {"num_particles": 2, "estimators": {"k": LR()}, "vectorize_particles": True},
    "stratified": {"num_particles": 2, "estimators": {"k": LR()}, "vectorize_particles": True, "particles": "stratified"},
}


@each("options", OPTIONS, lambda options: True)
def test_nothing_else_changes(host, options):
    """The gradient is that of RP plus the control variate, also next to a discrete site; at coefficients of 0 it is that of RP."""
    logit = {"logit": 0.4}

    def guide():
        guide_of(host)()
        host.sample("k", host.dist.Bernoulli(logits=host.param("logit", host.array(0.4))))

    def model():
        model_of(host, linear)()
        k = host.sample("k", host.dist.Bernoulli(host.array(0.5)))
        host.factor("of_k", 1.7 * k)

    def at(learned, **more):
        params = START | logit | learned
        elbo = options | more
        if host.name == "numpyro":
            objective = host.flow.TraceFlow_ELBO(**elbo)
            f = jax.jit(jax.value_and_grad(lambda p: objective.loss(jax.random.key(4), p, model, guide)))
            loss, g = f({name: host.array(value) for name, value in params.items()})
        else:
            loss, g = host.loss_and_gradients(params, model, guide, 4, plates=1, **elbo)
        return float(loss), {name: -np.asarray(g[name]) for name in START | logit}

    learned = coefficients("quadratic")
    loss, plain = at({})
    for zero, values in ((0, {name: 0 * value for name, value in learned.items()}), (1, learned)):
        other, found = at(values, control_variate="quadratic")
        np.testing.assert_allclose(loss, other, rtol=1e-12)
        added = {name: found[name] - plain[name] for name in START | logit}
        assert not added.pop("logit").any()
        if not zero:
            assert max(np.abs(value).max() for value in added.values()) < 1e-12
        elif "num_particles" not in options:
            for name, value in control(learned, noise_of(host, 4), "quadratic").items():
                np.testing.assert_allclose(added[name], value, rtol=1e-8, atol=1e-10)


def test_a_run_at_given_values_changes_no_coupling(host):
    """Sticking the landing runs the guide again at given values, which changes no coupling."""
    model, guide = pair(host)
    elbo = host.flow.TraceFlow_ELBO(control_variate="quadratic", entropy="stl")
    for _ in range(2):
        host.loss(elbo, model, guide)
        assert set(elbo.assignment.couplings.blocks) == {"x", "y"}


@slow_in_numpyro
def test_an_event_without_coordinates_is_left_alone(host):
    def part():
        host.sample("x", host.dist.Normal(host.array(0.1), host.array(1.0)))
        host.sample("nothing", host.dist.Normal(host.array(np.zeros(0)), host.array(1.0)).to_event(1))

    elbo = host.flow.TraceFlow_ELBO(control_variate="cubic")
    assert host.loss(elbo, part, part) == 0
    assert set(elbo.assignment.couplings.blocks) == {"x"}


def plated(host, subsample=None, size=6):
    """A global site, local sites in nested plates, and sites left out: a Gamma, one with a q, one with its own control variate."""

    def guide():
        loc = host.param("loc", host.array(np.zeros(size)), event_dim=0)
        with host.plate("data", size, subsample_size=subsample) as i:
            z = host.sample("z", host.dist.Normal(loc[i], 0.5))
        host.sample("w", host.dist.Normal(host.param("w_loc", host.array(np.zeros(2))), 1.0).to_event(1))
        host.sample("gamma", host.dist.Gamma(host.array(2.0), host.array(1.0)))
        host.sample("own", host.dist.Normal(host.array(0.0), 1.0))
        return z

    def model():
        w = host.sample("w", host.dist.Normal(host.array(np.zeros(2)), 1.0).to_event(1))
        host.sample("gamma", host.dist.Gamma(host.array(1.0), host.array(1.0)))
        host.sample("own", host.dist.Normal(host.array(0.0), 1.0))
        with host.plate("data", size, subsample_size=subsample):
            z = host.sample("z", host.dist.Normal(0.0, 1.0))
            host.sample("y", host.dist.Normal(z + w.sum(-1, keepdims=True), 1.0), obs=host.array(1.0))

    return model, guide


@each(("subsample", "columns"), {"whole": (None, 1 + 2 + 6), "subsample": (2, 1 + 2 + 1)}, lambda value: True)
def test_an_element_of_a_plate_has_coefficients_of_its_own(host, subsample, columns):
    """A global site has coefficients for each element of a plate, or for the sum over the elements if the plate is subsampled."""
    model, guide = plated(host, subsample)
    estimators = {"own": RP(control_variate="quadratic")}
    shapes = {"z.control_variate": (6, 1, 1 + 1 + 2), "w.control_variate": (2, columns)}
    learned = {name: np.zeros(shape) for name, shape in shapes.items()}
    params = {"loc": np.zeros(6), "w_loc": np.zeros(2)} | learned
    options = {"control_variate": "quadratic", "estimators": estimators}
    _, g = host.loss_and_gradients(params | {"own.control_variate": np.zeros((1, 2))}, model, guide, plates=1, **options)
    unseen = g["loc"] == 0
    assert unseen.sum() == (0 if subsample is None else 4)
    assert np.all((np.abs(g["z.control_variate"]).sum((1, 2)) == 0) == unseen)
    assert np.abs(g["w.control_variate"]).min() > 0
    nesting = {} if host.name == "numpyro" else {"max_plate_nesting": 1}
    pyro.clear_param_store()
    elbo = host.flow.TraceFlow_ELBO(**options, **nesting)
    description = elbo.describe(model, host.flow.adaptive(guide, elbo) if host.name == "numpyro" else guide)
    assert str(description).endswith("control variate over: z, w; without: gamma, own")


def test_a_matrix_with_many_coefficients_has_a_low_rank():
    """A site has no coupling if even this would need too many coefficients. Others are still coupled with it."""
    blocks = {"w": Block(600, {}), "x": Block(1, {}), "v": Block(10, {}), "z": Block(1, {5: Plate("data", 50_000)})}
    couplings = couple(blocks, {name: frozenset({name}) for name in blocks}, "cubic")
    assert couplings.of["w"] == Coupling(low_rank=True)
    assert [(feature.site, feature.num_columns) for feature in couplings.of["x"].features] == [("w", 600), ("v", 10), ("z", 50_000)]
    assert set(couplings.of["x"].pairs) == {(i, i) for i in range(1, 50_611)}  # and it has no products of its coordinates
    small = {name: blocks[name] for name in "wxv"}
    couplings = couple(small, {name: frozenset({name}) for name in small}, "cubic")
    assert {name: coupling.low_rank for name, coupling in couplings.of.items()} == {"w": True, "x": False, "v": False}
    assert [feature.site for feature in couplings.of["w"].features] == ["x", "v"]
    assert not couplings.of["w"].pairs


def pair(host):
    def guide():
        p = {name: host.param(name, host.array(0.3)) for name in ("a", "b")}
        host.sample("x", host.dist.Normal(p["a"], 0.5))
        host.sample("y", host.dist.Normal(p["b"], 0.7))

    def model():
        x, y = (host.sample(name, host.dist.Normal(host.array(0.0), 1.0)) for name in "xy")
        host.factor("cost", -2 * (x + y - 1) ** 2)

    return model, guide


@pytest.mark.slow
def test_learned_in_numpyro():
    """The user's optimizer trains it through `adaptive`, and the noise falls. Without `adaptive` it is refused."""
    model, guide = pair(HOSTS["numpyro"])
    elbo = flowvi.numpyro.TraceFlow_ELBO(control_variate="quadratic")
    result = SVI(model, adaptive(guide, elbo), numpyro.optim.Adam(0.02), elbo).run(jax.random.key(0), 1500, progress_bar=False)
    assert {name: value.shape for name, value in result.params.items() if "." in name} == {
        "x.control_variate": (1, 3),
        "y.control_variate": (1, 3),
    }

    def gradients(key, params):
        return jax.grad(lambda a: elbo.loss(key, params | {"a": a}, model, guide))(params["a"])

    samples = jax.jit(jax.vmap(gradients, (0, None)))
    start = result.params | {name: 0 * value for name, value in result.params.items() if "." in name}
    keys = jax.random.split(jax.random.key(1), 500)
    assert samples(keys, result.params).var() < 0.01 * samples(keys, start).var()
    with pytest.raises(ValueError, match=r"site 'x': RP\(\) learns the parameter 'x.control_variate', but SVI does not know it"):
        elbo.loss(jax.random.key(0), {"a": jnp.array(0.3)}, model, guide)


@pytest.mark.slow
def test_learned_in_pyro():
    """The parameters are registered automatically, also in compiled steps and in a module."""
    model, guide = pair(HOSTS["pyro"])
    elbo = flowvi.pyro.TraceFlow_ELBO(control_variate="quadratic")
    svi = flowvi.pyro.CompiledSVI(model, guide, pyro.optim.Adam({"lr": 0.05}), elbo, backend="eager")
    svi.run(600, progress_bar=False)

    def gradients():
        leaf = pyro.param("a").unconstrained()
        return torch.stack([torch.autograd.grad(elbo.differentiable_loss(model, guide), leaf)[0] for _ in range(100)]).numpy()

    learned = gradients()
    for name in ("x.control_variate", "y.control_variate"):
        pyro.get_param_store()[name] = torch.zeros(1, 3)
    assert learned.var() < 0.01 * gradients().var()
    module = elbo(model, guide)
    module()
    assert {name for name, _ in module.named_parameters()} == {"learned.x:control_variate", "learned.y:control_variate"}


@slow_in_numpyro
def test_a_batch_outside_of_all_plates_is_one_element(host):
    """Elements outside all plates are coupled with each other, as in NumPyro's AutoDiagonalNormal, also if each has a mask."""
    matrix, mask = np.array([[2.0, 0.6], [0.6, 1.0]]), host.array([1.0, 1.0]) > 0
    exact = -matrix @ np.array([0.3, -0.2])

    def guide():
        host.sample("x", host.dist.Normal(host.param("loc", host.array([0.3, -0.2])), host.array(0.5)).mask(mask))

    def model():
        x = host.sample("x", host.dist.Normal(host.array(np.zeros(2)), 1.0).mask(False))
        host.factor("cost", -0.5 * x @ (host.array(matrix) @ x))

    best = {"x.control_variate": np.column_stack([0.5 * exact, -0.25 * matrix])}
    for seed in (0, 1):
        _, g = host.loss_and_gradients({"loc": np.array([0.3, -0.2])} | best, model, guide, seed, plates=0, control_variate="quadratic")
        np.testing.assert_allclose(-g["loc"], exact, rtol=1e-10)


def nested(host, slopes):
    """Sites outside two plates, in each of them, and in both, without densities."""

    def guide():
        g = host.sample("g", host.dist.Normal(host.param("g_loc", host.array(np.zeros(2))), 0.5).to_event(1).mask(False))
        locs = {name: host.param(f"{name}_loc", host.array(np.zeros(shape))) for name, shape in slopes.items()}
        rows, columns = host.plate("rows", 3, dim=-2), host.plate("columns", 4, dim=-1)
        with rows:
            host.sample("x", host.dist.Normal(locs["x"], 0.7).to_event(1).mask(False))
            with columns:
                host.sample("y", host.dist.Normal(locs["y"], 0.7).mask(False))
        with columns:
            host.sample("w", host.dist.Normal(locs["w"], 0.7).mask(False))
        return g

    return guide


@slow_in_numpyro
def test_nested_plates(host):
    """Two sites are coupled if the plates of one contain those of the other. The mean is 0 at any coefficients."""
    locs = {"x": (3, 1, 2), "y": (3, 4), "w": (4,)}
    seen_by = {"g": (2, 6 + 12 + 4), "x": (3, 1, 2, 2 + 4), "y": (3, 4, 1, 2 + 2 + 1), "w": (4, 1, 2 + 3)}
    size = {"g": 2, "x": 2, "y": 1, "w": 1}
    rng = np.random.default_rng(0)
    learned = {f"{name}.control_variate": rng.normal(size=(*shape[:-1], 1 + size[name] + shape[-1])) for name, shape in seen_by.items()}
    guide, n = nested(host, locs), 4000
    params = {"g_loc": np.zeros(2)} | {f"{name}_loc": np.zeros(shape) for name, shape in locs.items()} | learned
    options = {"num_particles": n, "vectorize_particles": True, "control_variate": "quadratic"}
    _, g = host.loss_and_gradients(params, guide, guide, plates=2, **options)
    spreads = {"g": 0.5, "x": 0.7, "y": 0.7, "w": 0.7}
    for name, s in spreads.items():
        c = learned[f"{name}.control_variate"][..., 1:]
        sd = np.sqrt((c**2).sum(-1)) / s  # because h is linear in independent numbers
        z = g[f"{name}_loc"].reshape(sd.shape) / sd * np.sqrt(n)
        assert 0 < np.abs(z).max() < 5


def test_refusals(host):
    for options, message in (
        ({"control_variate": "diagonal"}, "control_variate: expected 'quadratic' or 'cubic' or None, found 'diagonal'"),
        ({"control_variate": "cubic", "particles": "fixed"}, "control_variate: expected None under particles='fixed'"),
    ):
        with pytest.raises(ValueError, match=message):
            host.flow.TraceFlow_ELBO(**options)
    if host.name == "numpyro":
        with pytest.raises(ValueError, match="control_variate: expected None with multi_sample_guide=True"):
            host.flow.TraceFlow_ELBO(2, multi_sample_guide=True, control_variate="cubic")


def test_a_guide_that_changes_which_draw_it_computes_from_which(host):
    """A guide that starts to compute t from g is refused, because t is coupled with the noise of g and would be biased."""

    def detached(h, x):
        return jax.lax.stop_gradient(x) if h.name == "numpyro" else x.detach()

    def guide(slope):
        g = host.sample("g", host.dist.Normal(host.param("g_loc", host.array(0.3)), host.array(0.5)))
        loc = host.param("t_loc", host.array(0.2))
        host.sample("t", host.dist.Normal(loc + detached(host, g) if slope else loc, host.array(0.7)))

    def model():
        g = host.sample("g", host.dist.Normal(host.array(0.0), host.array(1.0)))
        host.sample("t", host.dist.Normal(g, host.array(1.0)))

    for first, then in ((False, True), (True, False)):
        pyro.clear_param_store()
        elbo = host.flow.TraceFlow_ELBO(control_variate="quadratic")
        for _ in range(2):
            host.loss(elbo, model, lambda first=first: guide(first))
        if then:
            with pytest.raises(ValueError, match="site 't': expected this site to be independent of 'g'"):
                host.loss(elbo, model, lambda: guide(True))
        else:
            host.loss(elbo, model, lambda: guide(False))


@each("annotated", [LR(), RP(control_variate="quadratic")])
def test_estimators_that_the_model_annotates(host, annotated):
    """Annotated estimators act at their sites, and the control variate covers the others. In NumPyro `adaptive` gets the model."""

    def guide():
        for name in ("x", "y", "z"):
            host.sample(name, host.dist.Normal(host.param(f"{name}_loc", host.array(0.3)), host.array(0.5)))

    def model():
        values = [
            host.sample(name, host.dist.Normal(host.array(0.0), 1.0), infer={"estimator": annotated} if name == "y" else {})
            for name in ("x", "y", "z")
        ]
        host.factor("cost", -2 * (sum(values) - 1) ** 2)

    elbo = host.flow.TraceFlow_ELBO(control_variate="quadratic")
    learned = {"x.control_variate": (1, 3), "z.control_variate": (1, 3)}
    learned |= {} if isinstance(annotated, LR) else {"y.control_variate": (1, 2)}
    if host.name == "numpyro":
        svi = SVI(model, adaptive(guide, elbo, model), numpyro.optim.Adam(0.02), elbo)
        state = jax.jit(svi.init)(jax.random.key(0))
        jax.eval_shape(svi.update, state)
        found = svi.get_params(state)
        other = host.flow.TraceFlow_ELBO(control_variate="quadratic")
        without = SVI(model, adaptive(guide, other), numpyro.optim.Adam(0.02), other)
        with pytest.raises(ValueError, match=r"use adaptive\(guide, elbo, model\) if the model annotates estimators"):
            jax.eval_shape(without.update, jax.eval_shape(without.init, jax.random.key(0)))
    else:
        pyro.clear_param_store()
        pyro.infer.SVI(model, guide, pyro.optim.Adam({"lr": 0.01}), elbo).step()
        found = pyro.get_param_store()
    assert {name: tuple(value.shape) for name, value in found.items() if "." in name} == learned
    assert set(elbo.assignment.couplings.blocks) == {"x", "z"}
