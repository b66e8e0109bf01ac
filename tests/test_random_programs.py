"""Random programs: the mean of the estimator, over all outcomes, is the exact gradient.

The hosts' generators are replaced. Every Bernoulli gets each of its values, and every Normal each node of a Gauss-Hermite rule. So the
mean of an estimator is a finite sum without sampling error. It is compared with the derivative of the ELBO, which NumPyro computes as
such a sum, without flowvi.
"""

from __future__ import annotations

import itertools
from contextlib import ExitStack
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions
import numpyro.handlers
import pyro
import pytest
import torch
from hosts import HOSTS, Program

import flowvi.tape
from flowvi import LR, RP, AdaptiveFlow, Baseline, Enumerate, Flow, ImplicitRP, Surrogate, relaxations
from flowvi.baselines import PlateMean
from flowvi.dependence import Ancestor
from flowvi.numpyro import threefry
from flowvi.numpyro.distributions import NumPyroTarget
from flowvi.numpyro.run import NumPyroProgram
from flowvi.pyro.distributions import PyroTarget

THETA = (0.4, -0.3, 0.7, 0.2)
PLATES = {"a": -1, "b": -2}  # each of two elements
NODES, WEIGHTS = np.polynomial.hermite_e.hermegauss(28)
WEIGHTS = WEIGHTS / WEIGHTS.sum()
UNIFORMS = 1 / (1 + np.exp(-np.linspace(-30, 30, 81)))  # even in the logit, which is exact also if not smooth at 0 and 1
SHARES = UNIFORMS * (1 - UNIFORMS) / (UNIFORMS * (1 - UNIFORMS)).sum()


def wide(p):
    return type(p)(p.loc, 1.2 * p.scale)


def other_odds(p):
    return type(p)(logits=0.3 - 0.5 * p.logits)


def half_velocity(x, p, dtheta):
    return 0.5 * (dtheta.loc + (x - p.loc) / p.scale * dtheta.scale)


def curved(x, p):
    return (x - p.loc) ** 2 / p.scale


def standardize(x, p):
    return (x - p.loc) / p.scale


def shift(x, p):
    return x - p.loc


ESTIMATORS = {
    "Bernoulli": [LR(), LR(), LR(q=other_odds), LR(Baseline(lambda: 0.7)), LR("plate", other_odds)],
    "Normal": [
        LR(),
        RP(),
        ImplicitRP(standardize),
        ImplicitRP(shift, exact=False),
        Flow(half_velocity),
        Flow(loc=lambda x, p: 0.5, scale=curved),
        Flow(scale=curved),
        LR("plate"),
        LR(q=wide),
        RP(wide),
        Flow(half_velocity, q=wide),
        Flow(scale=curved, q=wide, baseline="plate"),
    ],
}
SURROGATES = {
    "Bernoulli": [
        Surrogate(lambda z, w: w["a"] * z + w["b"] * z**2 + 0.3, {"a": 0.8, "b": -0.3}),  # RELAX
        Surrogate(lambda b: 1.3 * b - 0.4 * b**2, temperature=1.5),  # REBAR
    ],
    "Normal": [Surrogate(lambda z, w: w * z**2 - 0.2 * z, 0.7)],  # LAX
}
LEARNERS = [AdaptiveFlow(bumps=1), AdaptiveFlow(bumps=0, q=wide), RP(control_variate="cubic"), RP(control_variate="diagonal")]


class Latent(NamedTuple):
    """A random site of the guide and its prior.

    Attributes:
        family: Bernoulli, Normal, or Delta, a function of the sites that it reads (with a Normal prior).
        plates: The names of its plates.
        reads: The sites that it reads, with coefficients: in the guide, and in the model, where it has other parents.
        parameters: The indices in theta of its location (or logit) and of its scale.
        weights: The scales of its two log densities.
        masks: The elements of its plates that count, in the guide and in the model; None for all.
        auxiliary: Whether the model lacks it.
    """

    family: str
    plates: tuple[str, ...]
    reads: tuple[dict[str, float], dict[str, float]]
    parameters: tuple[int, int]
    weights: tuple[float, float]
    masks: tuple[Any, Any]
    auxiliary: bool


class Cost(NamedTuple):
    """A factor of the model, in plates, that reads some sites."""

    plates: tuple[str, ...]
    reads: dict[str, float]


class Case(NamedTuple):
    """A program: the sites of the guide and the statements of the model, in order, and options of the ELBO."""

    latents: dict[str, Latent]
    costs: dict[str, Cost]
    model: tuple[str, ...]
    estimators: dict[str, Any]
    options: dict[str, str]


def shape_of(plates) -> tuple[int, ...]:
    return tuple(2 if name in plates else 1 for name in ("b", "a"))[0 if "b" in plates else 1 if "a" in plates else 2 :]


def made(seed: int, host: str, elements: int = 5, normals: int = 2, deltas: bool = True) -> Case:
    """A program with limits on its random numbers and on its Normals.

    In Pyro the outcomes are a plate here, and ``baseline="plate"`` would average over it.
    """
    rng = np.random.default_rng(seed)

    def plates():
        return tuple(name for name in PLATES if rng.random() < 0.4)

    def some(names):
        return {name: float(rng.uniform(-0.4, 0.4)) for name in names if rng.random() < 0.6}

    kept: dict[str, tuple[str, tuple[str, ...]]] = {}
    for i in range(rng.integers(2, 5)):
        within = plates()
        if deltas and kept and rng.random() < 0.2:
            kept[f"z{i}"] = "Delta", within
            continue
        size = 2 ** len(within)
        families = [family for family, room in (("Bernoulli", elements), ("Normal", min(normals, elements))) if size <= room]
        if families:
            family = str(rng.choice(families))
            elements, normals = elements - size, normals - size * (family == "Normal")
            kept[f"z{i}"] = family, within
    auxiliary = {name: bool(rng.random() < 0.1) for name in kept}
    in_model = [name for name in kept if not auxiliary[name]]
    if rng.random() < 0.5:
        rng.shuffle(in_model)
    latents = {}
    for i, (name, (family, within)) in enumerate(kept.items()):
        before = in_model[: in_model.index(name)] if name in in_model else []
        masks = tuple(rng.random(shape_of(within)) < 0.6 if rng.random() < 0.2 else None for _ in range(2))
        latents[name] = Latent(
            family,
            within,
            (some(list(kept)[:i]), some(before)),
            tuple(rng.integers(len(THETA), size=2).tolist()),
            tuple(float(rng.choice([1.0, 1.0, 1.7])) for _ in range(2)),
            masks,
            auxiliary[name],
        )
    costs = {f"cost{i}": Cost(plates(), some(in_model)) for i in range(rng.integers(1, 4))}
    model = list(in_model)
    for name, cost in costs.items():  # at any place after the sites that it reads
        first = max((model.index(read) + 1 for read in cost.reads), default=0)
        model.insert(int(rng.integers(first, len(model) + 1)), name)
    estimators = {}
    for name, latent in random_sites(latents).items():
        fits = [e for e in ESTIMATORS[latent.family] if not isinstance(e.baseline, PlateMean) or (latent.plates and host == "numpyro")]
        estimators[name] = fits[rng.integers(len(fits))]
    entropies = ["full", "stl"] + ["analytic"] * (in_model == [name for name in kept if name in in_model])
    options = {"dependencies": str(rng.choice(["graph", "plates"])), "entropy": str(rng.choice(entropies))}
    return Case(latents, costs, tuple(model), estimators, options)


def random_sites(latents: dict[str, Latent]) -> dict[str, Latent]:
    return {name: site for name, site in latents.items() if site.family != "Delta"}


def enumerated(case: Case) -> Case:
    """The same program with ``Enumerate`` at the Bernoullis on which no other Bernoulli depends.

    The others would need new draws, with other probabilities, but here all outcomes are given.
    """
    leads_to_bernoulli: set[str] = set()
    for name, site in reversed(case.latents.items()):
        if site.family == "Bernoulli" or name in leads_to_bernoulli:
            leads_to_bernoulli |= set(site.reads[0])
    names = [name for name, site in case.latents.items() if site.family == "Bernoulli" and name not in leads_to_bernoulli]
    return case._replace(estimators=case.estimators | dict.fromkeys(names, Enumerate()))


def program_of(case: Case) -> Program:
    def plates_of(h):
        return {name: h.plate(name, 2, dim=dim) for name, dim in PLATES.items()}

    def within(*contexts):
        stack = ExitStack()
        for context in contexts:
            stack.enter_context(context)
        return stack

    def read(h, values, reads, plates):
        """The input of a statement in ``plates``: the statement's own elements of each site, summed over the site's other plates."""
        shape = shape_of(plates)
        total = h.array(np.linspace(-0.3, 0.4, int(np.prod(shape))).reshape(shape))
        for name, coefficient in reads.items():
            value = values[name]
            for plate in set(case.latents[name].plates) - set(plates):
                value = value.sum(PLATES[plate], keepdims=True)
            while h.name == "numpyro" and value.shape[:1] == (1,):
                value = value[0]
            total = total + coefficient * (value + 0.2 * value**2)
        return total

    def sample(h, t, plates, values, name, side):
        site = case.latents[name]
        i, j = site.parameters
        loc = read(h, values, site.reads[side], site.plates) + (0.1 if side else t[i])
        if site.family == "Bernoulli":
            fn = h.dist.Bernoulli(logits=loc)
        elif site.family == "Delta" and not side:
            fn = h.dist.Delta(loc)
        else:
            fn = h.dist.Normal(loc, h.array(1.2) if side else h.math.exp(0.3 * t[j]))
        if (mask := site.masks[side]) is not None:
            fn = fn.mask(h.array(mask) > 0)
        with within(*map(plates.get, site.plates), h.scale(site.weights[side])):
            values[name] = h.sample(name, fn, infer={"is_auxiliary": site.auxiliary})

    def guide(h, t):
        plates, values = plates_of(h), {}
        for name in case.latents:
            sample(h, t, plates, values, name, 0)

    def model(h, t):
        plates, values = plates_of(h), {}
        for name in case.model:
            if name in case.latents:
                sample(h, t, plates, values, name, 1)
                continue
            cost = case.costs[name]
            with within(*map(plates.get, cost.plates)):
                h.factor(name, (1.0 + read(h, values, cost.reads, cost.plates)) ** 2 + 0.0 * t[0])

    return Program(guide, model, THETA, plates=2)


# ---- all outcomes


def outcomes(case: Case, particles: int = 1) -> tuple[list[list[np.ndarray]], np.ndarray]:
    """For each particle and site its values (Normal: standardized) in every outcome, and the weights of the nodes.

    Values are of shape (outcomes, *plates), weights (outcomes,).
    """
    sites = [site for _ in range(particles) for site in random_sites(case.latents).values()]
    sizes = [2 ** len(site.plates) for site in sites]
    ranges = [range(2 if site.family == "Bernoulli" else len(NODES)) for site in sites]
    index = np.array(list(itertools.product(*(r for r, n in zip(ranges, sizes, strict=True) for _ in range(n)))))
    values, weight = [], np.ones(len(index))
    for site, own in zip(sites, np.split(index, np.cumsum(sizes)[:-1], 1), strict=True):
        if site.family == "Normal":
            weight = weight * WEIGHTS[own].prod(1)
            own = NODES[own]
        values.append(own.reshape((-1, *shape_of(site.plates))).astype(float))
    n = len(random_sites(case.latents))
    return [values[i * n : (i + 1) * n] for i in range(particles)], weight


def with_noise(case: Case, values: list[list[np.ndarray]], weight: np.ndarray) -> tuple[Any, np.ndarray, np.ndarray]:
    """The same outcomes, at each of the uniform numbers that estimators at Bernoullis may use.

    All estimators can share one number, because each result is a sum of functions of one number.
    """
    if not any(isinstance(case.estimators.get(name), Surrogate) for name, site in case.latents.items() if site.family == "Bernoulli"):
        return values, weight, np.full(len(weight), 0.5)
    n = len(UNIFORMS)
    values = [[np.repeat(own, n, 0) for own in of_particle] for of_particle in values]
    return values, np.outer(weight, SHARES).ravel(), np.tile(UNIFORMS, len(weight))


class Forced:
    """The values that the generators return, and the probabilities of their first calls.

    Every run of the guide draws all of its sites in order. An objective may run the guide more than once for one particle.
    """

    def __init__(self, values: list):
        self.values, self.particle, self.calls = values, 0, 0
        self.probabilities: dict[tuple[int, int], Any] = {}

    def start(self, particle: int):
        self.particle, self.calls = particle, 0

    def next(self) -> tuple[tuple[int, int], Any]:
        """The index of this draw, and its value."""
        values = self.values[self.particle]
        site = self.calls % len(values)
        self.calls += 1
        return (self.particle, site), values[site]


def learned_in_numpyro(case: Case) -> dict[str, jax.Array]:
    """Arbitrary values for the learned parameters."""
    h, program, t = HOSTS["numpyro"], program_of(case), list(jnp.array(THETA))
    guide = h.flow.adaptive(lambda: program.guide(h, t), h.flow.TraceFlow_ELBO(estimators=case.estimators))
    trace = numpyro.handlers.trace(numpyro.handlers.seed(guide, 0)).get_trace()
    rng = np.random.default_rng(0)
    return {name: jnp.asarray(0.3 * rng.normal(size=site["value"].shape)) for name, site in trace.items() if site["type"] == "param"}


def mean_in_numpyro(case: Case, monkeypatch, particles: int = 1, alpha: float | None = None) -> np.ndarray:
    """The mean of the estimated gradient, of the ELBO or of the Rényi bound of order ``alpha``."""
    h, program, learned = HOSTS["numpyro"], program_of(case), learned_in_numpyro(case)
    # theta are no parameters of the program; to find this out, flowvi would run the guide again and use up forced draws
    monkeypatch.setattr(NumPyroProgram, "own_rows", lambda program, name: frozenset())

    def estimate(theta, values, noise):
        forced = Forced(values)

        def normal(key, shape=(), dtype=float):
            return forced.next()[1].reshape(shape)

        def bernoulli(key, p=0.5, shape=None):
            which, value = forced.next()
            value = value.reshape(jnp.shape(p) if shape is None else shape)
            forced.probabilities.setdefault(which, jnp.where(value > 0, p, 1 - p).prod())
            return (value > 0) & (p >= 0)  # makes the draw depend on p in the jaxpr

        def one_by_one(particle, keys):
            results = []
            for k in range(particles):
                forced.start(k)
                results.append(particle(keys[k]))
            return jax.tree.map(lambda *leaves: jnp.stack(leaves), *results)

        monkeypatch.setattr(jax.random, "normal", normal)
        monkeypatch.setattr(jax.random, "bernoulli", bernoulli)
        monkeypatch.setattr(NumPyroTarget, "uniforms", lambda target, shape, like: jnp.broadcast_to(noise, shape))
        monkeypatch.setattr(threefry, "is_a_loop", lambda: False)  # otherwise each sampler is tried once before it draws
        if alpha is None:
            elbo = h.flow.TraceFlow_ELBO(particles, one_by_one, estimators=case.estimators, **case.options)
        else:
            elbo = h.flow.TraceFlow_RenyiELBO(alpha, particles, vectorize_particles=one_by_one, estimators=case.estimators)

        def objective(theta):
            t = list(theta)
            loss = elbo.loss(jax.random.key(0), learned, lambda: program.model(h, t), lambda: program.guide(h, t))
            return -loss, jax.lax.stop_gradient(list(forced.probabilities.values()))

        gradient, probabilities = jax.grad(objective, has_aux=True)(theta)
        return gradient, jnp.prod(jnp.array(probabilities))

    values, weight, noise = with_noise(case, *outcomes(case, particles))
    gradient, probability = jax.jit(jax.vmap(estimate, (None, 0, 0)))(jnp.array(THETA), *jax.tree.map(jnp.asarray, (values, noise)))
    return (weight * np.asarray(probability)) @ np.asarray(gradient)


def mean_in_pyro(case: Case, monkeypatch, particles: int = 1, alpha: float | None = None) -> np.ndarray:
    """The same in Pyro, with every outcome as an element of an outermost plate."""
    h, program = HOSTS["pyro"], program_of(case)
    values, weight, noise = with_noise(case, *outcomes(case, particles))
    forced = Forced(values)

    def next_value():
        if particles > 1:
            forced.particle = forced.calls // len(values[0])  # particles run one after the other, once each
        which, value = forced.next()
        return which, torch.as_tensor(value)

    def normal(shape, dtype, device):
        return next_value()[1].reshape(shape)

    def bernoulli(p):
        which, value = next_value()
        value = value.reshape(p.shape)
        forced.probabilities.setdefault(which, torch.where(value > 0, p, 1 - p).reshape((len(weight), -1)).prod(1).detach())
        return value + 0 * p

    monkeypatch.setattr(torch.distributions.normal, "_standard_normal", normal)

    def uniforms(target, shape, like):
        return torch.as_tensor(noise).reshape((-1, 1, 1)).expand(shape)

    monkeypatch.setattr(torch, "bernoulli", bernoulli)
    monkeypatch.setattr(PyroTarget, "uniforms", uniforms)
    pyro.clear_param_store()
    options = {"particles": particles, "vectorize": False, "estimators": case.estimators}
    if alpha is None:
        gradients = h.gradients(program, len(weight), **options, **case.options)
    else:
        gradients = h.bound_gradients(program, len(weight), alpha=alpha, **options)
    assert forced.calls % (particles * len(values[0])) == 0
    return (weight * np.prod([p.numpy() for p in forced.probabilities.values()], axis=0)) @ gradients


MEANS = {"numpyro": mean_in_numpyro, "pyro": mean_in_pyro}


def exact(case: Case, particles: int = 1, alpha: float = 0.0) -> np.ndarray:
    """The exact gradient of the ELBO or, with several particles, of the bound.

    JAX differentiates a sum over all outcomes. The log densities come from NumPyro's own handlers.
    """
    h, program = HOSTS["numpyro"], program_of(case)

    def family(fn):
        while hasattr(fn, "base_dist"):
            fn = fn.base_dist
        return fn

    def ratio(theta, values):
        """The log ratio of one particle, and the probability of its discrete values."""
        t, at = list(theta), dict(zip(random_sites(case.latents), values, strict=True))

        def place(site):
            """The values of the sites; that of a Normal moves with its parameters."""
            if site["name"] not in at:
                return None
            fn, value = family(site["fn"]), at[site["name"]]
            return fn.loc + fn.scale * value if isinstance(fn, numpyro.distributions.Normal) else value

        guide = numpyro.handlers.trace(numpyro.handlers.substitute(lambda: program.guide(h, t), substitute_fn=place)).get_trace()
        drawn = {name: guide[name]["value"] for name in case.latents}
        log_q, _ = numpyro.infer.util.log_density(lambda: program.guide(h, t), (), {}, drawn)
        log_p, _ = numpyro.infer.util.log_density(lambda: program.model(h, t), (), {}, drawn)
        log_probs = [
            jnp.broadcast_to(family(guide[name]["fn"]).log_prob(drawn[name]), shape_of(latent.plates)).sum()
            for name, latent in case.latents.items()
            if latent.family == "Bernoulli"
        ]
        return log_p - log_q, jnp.exp(sum(log_probs))

    def term(theta, values):
        ratios, probabilities = zip(*(ratio(theta, of_particle) for of_particle in values), strict=True)
        powers = jax.scipy.special.logsumexp((1 - alpha) * jnp.array(ratios)) - jnp.log(particles)
        return jnp.prod(jnp.array(probabilities)) * powers / (1 - alpha)

    values, weight = outcomes(case, particles)
    values, weight = jax.tree.map(jnp.asarray, values), jnp.asarray(weight)
    return np.asarray(jax.jit(jax.grad(lambda theta: weight @ jax.vmap(term, (None, 0))(theta, values)))(jnp.array(THETA)))


def assert_unbiased(case: Case, host: str, monkeypatch, particles: int = 1, alpha: float | None = None):
    truth = exact(case) if alpha is None else exact(case, particles, alpha)
    with monkeypatch.context() as patch:
        found = MEANS[host](case, patch, particles, alpha)
    np.testing.assert_allclose(found, truth, rtol=1e-7, atol=1e-7, err_msg=str(case))


def in_hosts(seeds, in_numpyro: int):
    """Every seed in Pyro. NumPyro compiles each program, so only the first few seeds are not slow tests there."""
    for i, seed in enumerate(seeds):
        for host in HOSTS:
            yield pytest.param(seed, host, id=f"{seed}-{host}", marks=pytest.mark.slow if host == "numpyro" and i >= in_numpyro else ())


@pytest.mark.parametrize(("seed", "host"), list(in_hosts(range(30), 10)))
def test_random_program(seed, host, monkeypatch):
    assert_unbiased(made(seed, host), host, monkeypatch)


@pytest.mark.parametrize(("seed", "host"), list(in_hosts([200, *range(202, 212), *range(213, 224)], 8)))
def test_random_program_with_enumerated_sites(seed, host, monkeypatch):
    case = enumerated(made(seed, host))
    assert Enumerate() in case.estimators.values()
    assert_unbiased(case, host, monkeypatch)


def with_surrogates(case: Case, seed: int) -> Case:
    """The same program with a ``Surrogate`` at two of three sites."""
    rng = np.random.default_rng(seed)
    names = {name: SURROGATES[site.family] for name, site in random_sites(case.latents).items() if rng.random() < 0.7}
    return case._replace(estimators=case.estimators | {name: fits[rng.integers(len(fits))] for name, fits in names.items()})


@pytest.mark.parametrize(("seed", "host"), list(in_hosts([253, *range(250, 253), 255, 257], 1)))
def test_random_program_with_surrogates(seed, host, monkeypatch):
    case = made(seed, host, normals=1)
    assert_unbiased(with_surrogates(enumerated(case) if seed % 2 else case, seed), host, monkeypatch)


def test_a_wrong_slope_of_a_relaxation_is_rejected(monkeypatch):
    given = relaxations.Binary._given
    monkeypatch.setattr(relaxations.Binary, "_given", lambda *args: (given(*args)[0], 0 * given(*args)[1]))
    with pytest.raises(AssertionError):
        assert_unbiased(with_surrogates(made(250, "pyro", normals=1), 250), "pyro", monkeypatch)


@pytest.mark.parametrize("seed", [*range(50, 55), *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(55, 60))])
def test_random_program_with_learners(seed, monkeypatch):
    """The mean is exact at any learned values. In NumPyro only, where they can be passed in."""
    case, rng = made(seed, "numpyro"), np.random.default_rng(seed)
    learners = {name: LEARNERS[rng.integers(len(LEARNERS))] for name, site in case.latents.items() if site.family == "Normal"}
    case = case._replace(estimators=case.estimators | learners)
    assert_unbiased(enumerated(case) if seed % 2 else case, "numpyro", monkeypatch)


@pytest.mark.parametrize(("seed", "host"), list(in_hosts(range(100, 110), 5)))
def test_random_program_with_two_particles(seed, host, monkeypatch):
    assert_unbiased(made(seed, host, elements=3, normals=1), host, monkeypatch, 2)


@pytest.mark.parametrize(("seed", "host"), list(in_hosts(range(150, 160), 5)))
def test_random_bound(seed, host, monkeypatch):
    """The mean gradient of the bound with two particles is exact. A statement outside all plates puts all inside the logarithm."""
    case = made(seed, host, elements=3, normals=1, deltas=False)
    estimators = {name: e for name, e in case.estimators.items() if e.q is None and e.baseline is None}
    case = case._replace(estimators=estimators, costs={**case.costs, "outside": Cost((), {})}, model=(*case.model, "outside"))
    assert_unbiased(case, host, monkeypatch, 2, alpha=(0.0, 0.5)[seed % 2])


def test_a_wrong_rule_is_rejected(host, monkeypatch):
    """The test rejects a rule by which two statements in one plate always depend element by element."""

    def ancestors(statements, draws, scored):
        sites = [draw for draw in draws if draw.name in scored]
        return {
            s.name: frozenset(Ancestor(site.name, s.frames & site.frames) for site in sites if site.name in s.ancestors)
            for s in statements
        }

    monkeypatch.setattr("flowvi.tape.scored_ancestors", ancestors)
    monkeypatch.setattr(flowvi.tape, "_by_order", flowvi.tape._by_order.__wrapped__)  # without its cache
    with pytest.raises(AssertionError):
        assert_unbiased(made(0, host.name), host.name, monkeypatch)
