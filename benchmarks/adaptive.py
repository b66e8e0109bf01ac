"""What AdaptiveFlow gains: variances of the gradient at fixed variational parameters, and ELBOs after a fixed time, in NumPyro.

The tables go to docs/tables/adaptive.md, which docs/performance.md includes. All of them take about ten minutes. Parts that
you name are only printed:

    python benchmarks/adaptive.py
    python benchmarks/adaptive.py costs latents jump binary modes schools overhead
    python benchmarks/adaptive.py --smoke
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from time import perf_counter
from types import MappingProxyType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pyro
import pyro.distributions as pyro_dist
import torch
from jax.nn import log_sigmoid, softplus
from numpyro.infer import SVI, Trace_ELBO, init_to_median
from numpyro.infer.autoguide import AutoNormal
from numpyro.optim import Adam
from programs import HOSTS, NumPyro, Program, logistic_regression
from scipy.optimize import minimize
from timing import STEPS, alternate, particles

import flowvi.pyro
from flowvi import LR, RP, AdaptiveFlow, Flow, ImplicitRP, fields, proposals
from flowvi.numpyro import TraceFlow_ELBO, adaptive

numpyro.enable_x64()
TABLES = Path(__file__).parent.parent / "docs" / "tables" / "adaptive.md"
GRID = jnp.linspace(-12.0, 12.0, 20_001)


def log_normal(x, loc, scale):
    return dist.Normal(loc, scale).log_prob(x)


def table(title: str, header: list[str], rows: list[list[Any]]) -> str:
    lines = [f"**{title}**", "", "| " + " | ".join(header) + " |", "| --- " * len(header) + "|"]
    lines += ["| " + " | ".join(f"{cell:.3g}" if isinstance(cell, float) else str(cell) for cell in row) + " |" for row in rows]
    return "\n".join(lines) + "\n"


# ---- one site, at fixed variational parameters


def learn(loss: Callable, fixed: dict, learned: dict, steps: int, step_size: float | Callable = 0.02, seed: int = 0) -> dict:
    """``learned`` after ``steps`` steps of Adam on its own gradient of ``loss(key, parameters)``."""
    optimizer = Adam(step_size)

    def step(state, key):
        gradients = jax.grad(partial(loss, key))(fixed | optimizer.get_params(state))
        return optimizer.update({name: gradients[name] for name in learned}, state), None

    return optimizer.get_params(jax.lax.scan(step, optimizer.init(learned), jax.random.split(jax.random.key(seed), steps))[0])


def variances(loss: Callable, fixed: dict, learned: dict, n: int, batch: int = 10_000) -> dict:
    """The variance of the gradient in each of ``fixed``, from n samples."""
    return moments(loss, fixed, learned, n, batch)[1]


def moments(loss: Callable, fixed: dict, learned: dict, n: int, batch: int = 10_000, seed: int = 1) -> tuple[dict, dict]:
    """Mean and variance of the gradient."""

    def gradient(key):
        return jax.grad(lambda fixed: loss(key, fixed | learned))(fixed)

    keys = jax.random.split(jax.random.key(seed), (max(n // batch, 1), min(n, batch)))
    samples = jax.lax.map(jax.vmap(gradient), keys)
    samples = jax.tree.map(lambda a: a.reshape((-1, *a.shape[2:])), samples)
    return jax.tree.map(lambda a: a.mean(0), samples), jax.tree.map(lambda a: a.var(0), samples)


def one_site(title: str, problems: dict[str, tuple[float, float, Callable, bool]], steps: int, n: int) -> str:
    """For each of (loc, scale, cost, is_elbo): the variance of the best other estimator over that of the learned ones."""
    rows = []
    for name, (loc, scale, cost, is_elbo) in problems.items():
        theta = {"loc": jnp.asarray(loc), "scale": jnp.asarray(scale)}

        def guide():
            numpyro.sample("x", dist.Normal(numpyro.param("loc", 0.0), numpyro.param("scale", 1.0)).mask(False))

        def model(theta=theta, cost=cost, is_elbo=is_elbo):
            x = numpyro.sample("x", dist.Normal(0.0, 1.0).mask(False))
            numpyro.factor("cost", cost(x) - (log_normal(x, **theta) if is_elbo else 0.0))

        def loss_of(estimator, particles, model=model):
            elbo = TraceFlow_ELBO(particles, estimators={"x": estimator}, baseline=None)
            return lambda key, params: elbo.loss(key, params, model, guide)

        bumps = AdaptiveFlow().bumps
        start = {"x.velocity": jnp.zeros((2, 1 + bumps)).at[:, 0].set(1.0), "x.control": jnp.zeros((2, bumps + 2))}
        variance = jax.jit(partial(variances, loss_of(AdaptiveFlow(), 1), theta, n=n))
        z = GRID[None]
        x, p = loc + scale * z, jnp.exp(log_normal(z, 0.0, 1.0))
        phi = cost(x) - (log_normal(x, **theta) if is_elbo else 0.0)
        scores = jnp.concatenate([z, z**2 - 1])
        b = (p * scores**2 * phi).sum(-1) / (p * scores**2).sum(-1)  # the best constant baseline of LR
        lr = start | {"x.velocity": jnp.zeros_like(start["x.velocity"])}
        plain = {
            "RP": start,
            "LR": lr,
            "LR + baseline": lr | {"x.control": start["x.control"].at[jnp.arange(2), bumps + jnp.arange(2)].set(-b)},
        }
        plain = {how: variance(learned) for how, learned in plain.items()}
        blend = AdaptiveFlow(bumps=0)
        with_q = AdaptiveFlow(q="learned")
        small = {"x.velocity": jnp.ones((2, 1)), "x.control": jnp.zeros((2, 2))}
        ratios = []
        for estimator, initial in ((blend, small), (AdaptiveFlow(), start), (with_q, start | {"x.proposal": jnp.zeros(2)})):
            learned = jax.jit(partial(learn, loss_of(estimator, 64), theta, steps=steps))(initial)
            found = jax.jit(partial(variances, loss_of(estimator, 1), theta, n=n))(learned)
            best = {part: min(float(v[part]) for v in plain.values()) for part in theta}
            ratios.append([best[part] / float(found[part]) for part in theta])
            ratios[-1].append(sum(best.values()) / sum(float(found[part]) for part in theta))
        winners = [min(plain, key=lambda how, part=part: float(plain[how][part])) for part in theta]
        rows.append([name, *winners, *(", ".join(f"{r:.3g}" for r in ratio) for ratio in ratios)])
    header = ["cost", "best for loc", "for scale", "`AdaptiveFlow(bumps=0)`", "`AdaptiveFlow()`", '`AdaptiveFlow(q="learned")`']
    return table(title, header, rows)


COSTS: dict[str, Callable] = {
    "sin 2x + 0.3 x²": lambda x: jnp.sin(2 * x) + 0.3 * x**2,
    "(x - 1)²": lambda x: (x - 1) ** 2,
    "-softplus(3x) - x²/2": lambda x: -softplus(3 * x) - x**2 / 2,
    "sin 20x + x/2": lambda x: jnp.sin(20 * x) + x / 2,
    "x³": lambda x: x**3,
    "max(x, 0) - x/5": lambda x: jnp.maximum(x, 0) - x / 5,
}

LIKELIHOODS: dict[str, Callable] = {
    "logistic, slope 3": lambda x: log_sigmoid(3 * (x - 0.3)),
    "logistic, slope 10": lambda x: log_sigmoid(10 * (x - 0.3)),
    "Student's t": lambda x: dist.StudentT(3.0, x, 0.5).log_prob(2.0),
    "Laplace": lambda x: dist.Laplace(x, 0.4).log_prob(1.0),
    "bimodal": lambda x: jnp.logaddexp(log_normal(x, -1.0, 0.5), log_normal(x, 1.2, 0.6)),
    "Poisson": lambda x: dist.Poisson(jnp.exp(x)).log_prob(3),
}


def off_the_optimum(likelihood: Callable) -> tuple[float, float, Callable, bool]:
    """The best Normal for a N(0, 1) prior and the likelihood, shifted by 0.2 and stretched by 1.15, and its cost minus the mean."""

    def target(x):
        return likelihood(x) + log_normal(x, 0.0, 1.0)

    def elbo(t):
        x = t[0] + jnp.exp(t[1]) * GRID
        p = jnp.exp(log_normal(GRID, 0.0, 1.0))
        return (p * (target(x) - log_normal(x, t[0], jnp.exp(t[1])))).sum() / p.sum()

    best = minimize(jax.jit(jax.value_and_grad(lambda t: -elbo(t))), np.zeros(2), jac=True).x
    loc, scale = best[0] + 0.2 * np.exp(best[1]), 1.15 * np.exp(best[1])
    mean = elbo(jnp.array([loc, np.log(scale)]))
    return float(loc), float(scale), lambda x: target(x) - mean, True


def costs(smoke: bool) -> str:
    problems = {name: (0.5, 0.74, cost, False) for name, cost in COSTS.items()}
    title = "A Normal(0.5, 0.74): variance of the best of LR, LR with the best baseline and RP, over that learned: loc, scale, sum"
    return one_site(title, dict(list(problems.items())[:1]) if smoke else problems, 20 if smoke else 4000, 1000 if smoke else 1_000_000)


def latents(smoke: bool) -> str:
    likelihoods = dict(list(LIKELIHOODS.items())[:1]) if smoke else LIKELIHOODS
    problems = {name: off_the_optimum(likelihood) for name, likelihood in likelihoods.items()}
    title = (
        "The ELBO of one local latent with a N(0, 1) prior, 0.2 and 15 % off its optimum (STL, mean cost subtracted): the same ratios"
    )
    return one_site(title, problems, 20 if smoke else 4000, 1000 if smoke else 1_000_000)


def jump(smoke: bool) -> str:
    """At a cost that jumps: the mean learned gradient in loc, without and with a mask that keeps the field at 0 there."""
    loc, scale, steps, n = 0.5, 0.74, 20 if smoke else 4000, 1000 if smoke else 1_000_000
    theta = {"loc": jnp.asarray(loc), "scale": jnp.asarray(scale)}

    def guide():
        numpyro.sample("x", dist.Normal(numpyro.param("loc", 0.0), numpyro.param("scale", 1.0)).mask(False))

    def model():
        x = numpyro.sample("x", dist.Normal(0.0, 1.0).mask(False))
        numpyro.factor("cost", jnp.where(x > 0.4, 1.0, 0.0))

    def away(x, p):
        return (x - 0.4) ** 2 / (0.1 + (x - 0.4) ** 2)

    def loss_of(estimator, particles):
        elbo = TraceFlow_ELBO(particles, estimators={"x": estimator}, baseline=None)
        return lambda key, params: elbo.loss(key, params, model, guide)

    truth = math.exp(float(log_normal(0.4, loc, scale)))
    rows: list[list[Any]] = [["the exact gradient", truth, ""]]
    for name, estimator in (
        ("`LR()`", LR()),
        ("`AdaptiveFlow()`, learned", AdaptiveFlow()),
        ("`AdaptiveFlow(mask=away)`, learned", AdaptiveFlow(mask=away)),
    ):
        start = {"x.velocity": jnp.zeros((2, 6)).at[:, 0].set(1.0), "x.control": jnp.zeros((2, 7))}
        learned: dict = start if isinstance(estimator, AdaptiveFlow) else {}
        if learned:
            learned = jax.jit(partial(learn, loss_of(estimator, 64), theta, steps=steps))(learned)
        mean, variance = jax.jit(partial(moments, loss_of(estimator, 1), theta, n=n))(learned)
        rows.append([name, -float(mean["loc"]), float(variance["loc"])])
    return table("A cost that jumps from 0 to 1 at 0.4, under a Normal(0.5, 0.74): the gradient in loc", ["", "mean", "variance"], rows)


# ---- SVI


EVERYWHERE = MappingProxyType(
    {
        "AdaptiveFlow": AdaptiveFlow(),
        "AdaptiveFlow, q learned": AdaptiveFlow(q="learned"),
        "RP, quadratic control variate": RP(control_variate="diagonal"),
        "RP, cubic control variate": RP(control_variate="cubic"),
    }
)


class Problem(NamedTuple):
    """A model and a guide, and how to compute the ELBO of the guide's parameters.

    Attributes:
        model: The model.
        guide: The guide.
        elbo: From constrained parameters to the ELBO, by quadrature or from many samples.
        pathwise: The pathwise estimators, by site.
        adaptive: The learned flows to compare, by name.
        host: Whether NumPyro's own objective has a gradient here.
    """

    model: Callable
    guide: Callable
    elbo: Callable
    pathwise: Any = RP()
    adaptive: Mapping[str, Any] = EVERYWHERE
    host: bool = True


PARTICLES = 4


def methods(problem: Problem) -> dict[str, Trace_ELBO]:
    served = {"LR + leave-one-out": LR(), "pathwise": problem.pathwise, **problem.adaptive}
    found: dict[str, Trace_ELBO] = {
        name: TraceFlow_ELBO(PARTICLES, default=estimator, entropy="stl") for name, estimator in served.items()
    }
    return found | ({"NumPyro's Trace_ELBO": Trace_ELBO(PARTICLES)} if problem.host else {})


def binary_data() -> Problem:
    """500 local latents z ~ N(0, 1), each observed through a Bernoulli(sigmoid(10 (z - 0.3))), with a Normal guide for each."""
    size = 500
    rng = np.random.default_rng(0)
    y = jnp.asarray(rng.random(size) < 1 / (1 + np.exp(-10 * (rng.normal(size=size) - 0.3))), float)

    def model():
        with numpyro.plate("data", size):
            z = numpyro.sample("z", dist.Normal(0.0, 1.0))
            numpyro.sample("y", dist.Bernoulli(logits=10 * (z - 0.3)), obs=y)

    def guide():
        loc = numpyro.param("loc", jnp.zeros(size))
        scale = numpyro.param("scale", jnp.ones(size), constraint=dist.constraints.positive)
        with numpyro.plate("data", size):
            numpyro.sample("z", dist.Normal(loc, scale))

    grid, weights = np.polynomial.hermite_e.hermegauss(64)

    def elbo(params):
        loc, scale = params["loc"][:, None], params["scale"][:, None]
        z = loc + scale * grid
        cost = log_normal(z, 0.0, 1.0) + dist.Bernoulli(logits=10 * (z - 0.3)).log_prob(y[:, None]) - log_normal(z, loc, scale)
        return (cost * weights).sum() / weights.sum()

    fewer = {f"AdaptiveFlow, {bumps} bumps": AdaptiveFlow(bumps=bumps) for bumps in (0, 2)}
    return Problem(model, guide, elbo, adaptive={**fewer, **EVERYWHERE})


def two_modes() -> Problem:
    """One latent with a density proportional to (0.5 N(-1, 0.5) + 0.5 N(1.2, 0.6)) exp(-|x|), and a mixture guide of two Normals."""

    def log_density(x):
        return jnp.logaddexp(log_normal(x, -1.0, 0.5), log_normal(x, 1.2, 0.6)) - jnp.log(2.0) - jnp.abs(x)

    def model():
        x = numpyro.sample("x", dist.Normal(0.0, 1.0).mask(False))
        numpyro.factor("target", log_density(x))

    def mixture(params):
        return dist.MixtureSameFamily(dist.Categorical(logits=params["logits"]), dist.Normal(params["loc"], params["scale"]))

    def guide():
        logits, loc = numpyro.param("logits", jnp.zeros(2)), numpyro.param("loc", jnp.array([-0.5, 0.5]))
        scale = numpyro.param("scale", jnp.ones(2), constraint=dist.constraints.positive)
        numpyro.sample("x", mixture({"logits": logits, "loc": loc, "scale": scale}))

    def elbo(params):
        log_q = mixture(params).log_prob(GRID)
        return jnp.trapezoid(jnp.exp(log_q) * (log_density(GRID) - log_q), GRID)

    return Problem(model, guide, elbo, ImplicitRP(), {"AdaptiveFlow": AdaptiveFlow()}, host=False)


def eight_schools() -> Problem:
    """Effects of eight schools under a Student's t with 3 degrees of freedom, a half-Cauchy(5) scale, and AutoNormal."""
    effects = jnp.array([28.0, 8.0, -3.0, 7.0, -1.0, 1.0, 18.0, 12.0])
    errors = jnp.array([15.0, 10.0, 16.0, 11.0, 9.0, 11.0, 10.0, 18.0])

    def model():
        mu = numpyro.sample("mu", dist.Normal(0.0, 5.0))
        tau = numpyro.sample("tau", dist.HalfCauchy(5.0))
        with numpyro.plate("schools", 8):
            theta = numpyro.sample("theta", dist.StudentT(3.0, mu, tau))
            numpyro.sample("y", dist.Normal(theta, errors), obs=effects)

    guide = AutoNormal(model, init_loc_fn=init_to_median(num_samples=100))

    def elbo(params):
        return -Trace_ELBO(20_000).loss(jax.random.key(99), params, model, guide)

    return Problem(model, guide, elbo)


PROBLEMS = {
    "binary": ("500 binary observations", binary_data),
    "modes": ("Two modes", two_modes),
    "schools": ("Eight schools", eight_schools),
}


def prepared(problem: Problem, elbo: Trace_ELBO):
    """Unconstrained initial parameters, the map that constrains them, and the loss of unconstrained ones."""
    guide = adaptive(problem.guide, elbo) if isinstance(elbo, TraceFlow_ELBO) else problem.guide
    svi = SVI(problem.model, guide, Adam(0.01), elbo)
    unconstrained = svi.optim.get_params(svi.init(jax.random.key(0)).optim_state)
    return unconstrained, svi.constrain_fn, lambda key, u: elbo.loss(key, svi.constrain_fn(u), problem.model, guide)


def descend(loss: Callable, step_size: float, u: dict, key: jax.Array, steps: int) -> dict:
    """The parameters after ``steps`` steps. The loss is kept, as in ``SVI.run``, so that XLA computes its value too."""
    optimizer = Adam(step_size)

    def step(i, carry):
        state, _ = carry
        value, gradient = jax.value_and_grad(partial(loss, jax.random.fold_in(key, i)))(optimizer.get_params(state))
        return optimizer.update(gradient, state), value

    state, value = jax.lax.fori_loop(0, steps, step, (optimizer.init(u), jnp.zeros(())))
    return jax.lax.optimization_barrier((optimizer.get_params(state), value))[0]


def svi(name: str, smoke: bool) -> str:
    """Variances at the same variational parameters, and ELBOs after equal times."""
    title, make = PROBLEMS[name]
    problem = make()
    ways = methods(problem)
    setups = {name: prepared(problem, elbo) for name, elbo in ways.items()}
    runs = {name: jax.jit(partial(descend, loss)) for name, (_, _, loss) in setups.items()}
    return "\n".join([noise(title, problem, ways, setups, runs, smoke), race(title, problem, setups, runs, smoke)])


def noise(title: str, problem: Problem, ways: dict, setups: dict, runs: dict, smoke: bool) -> str:
    """The variance of each method's gradient, at the parameters that pathwise steps have reached.

    The learned estimators learn at these parameters, with a step size that falls to 0. At a constant step size they would keep a noise
    of their own.
    """
    steps, n = (5, 20) if smoke else (1000, 1000)
    at = runs["pathwise"](0.03, setups["pathwise"][0], jax.random.key(5), steps)
    found = {}
    for name, (u, _, loss) in setups.items():
        learned = {key: value for key, value in u.items() if key not in at}
        if learned:
            falling = partial(lambda last, i: 0.02 * (1 - i / last), 8 * steps)
            learned = jax.jit(partial(learn, loss, at, steps=8 * steps, step_size=falling))(learned)
        v = jax.jit(partial(variances, loss, at, n=n, batch=n))(learned)
        found[name] = np.concatenate([np.ravel(v[key]) for key in sorted(at)])
    others = [name for name in ways if name not in problem.adaptive]
    best = np.min([found[name] for name in others], 0)
    rows = []
    for name in problem.adaptive:
        ratio = best / found[name]
        rows.append([name, *(float(np.quantile(ratio, q)) for q in (0.0, 0.1, 0.5, 0.9))])
    header = ["variance of the best of the others, over that of", "smallest ratio", "10 %", "median", "90 %"]
    return table(f"{title}: {len(best)} variational parameters, {PARTICLES} particles", header, rows)


def race(title: str, problem: Problem, setups: dict, runs: dict, smoke: bool) -> str:
    """ELBOs after equal times, at the best of several step sizes, from several seeds."""
    steps, seeds, step_sizes = (5, 1, [0.01]) if smoke else (2000, 3, [0.003, 0.01, 0.03, 0.1])
    times = dict.fromkeys(runs, math.inf)
    for _ in range(2 if smoke else 12):  # in turn, so that other load on the machine affects all methods alike
        for name, run in runs.items():
            start = perf_counter()
            jax.block_until_ready(run(0.01, setups[name][0], jax.random.key(0), 100))
            times[name] = min(times[name], perf_counter() - start)
    elbo = jax.jit(problem.elbo)
    results = {}
    for name, (u, constrain, _) in setups.items():
        n = int(steps * times["pathwise"] / times[name])
        for step_size in step_sizes:
            keys = jax.random.split(jax.random.key(7), seeds)
            results[name, step_size] = [float(elbo(constrain(runs[name](step_size, u, key, n)))) for key in keys]
    top = max(value for values in results.values() for value in values)
    rows = []
    for name in runs:
        best = max(step_sizes, key=lambda step_size, name=name: np.nan_to_num(np.mean(results[name, step_size]), nan=-np.inf))
        gaps = ", ".join(f"{top - value:.3g}" for value in sorted(results[name, best], reverse=True))
        rows.append([name, times[name] / times["pathwise"], best, gaps])
    header = ["method", "time of a step / pathwise", "best step size", "ELBO below the best run (nats), all seeds"]
    return table(f"{title}: after the time of {steps} pathwise steps; the best run has {top:.3f}", header, rows)


def held_fixed(number: int, q: Callable | None = None) -> Flow:
    """The flow that AdaptiveFlow with ``bumps`` bumps equals at given learned values, held fixed."""

    def m(x, p):
        z, exp = (x - p.loc) / p.scale, (torch if isinstance(x, torch.Tensor) else jnp).exp
        centres = np.linspace(-2.0, 2.0, number).tolist()
        return 0.9 + sum(0.1 * exp(-0.5 * ((z - c) / 0.7) ** 2) for c in centres)

    return Flow(fields.masked(m, fields.location_scale()) if number else fields.scaled(0.9, fields.location_scale()), q=q)


def moved(p):
    return type(p)(p.loc + 0.1 * p.scale, 1.1 * p.scale)


SAME_FLOW: dict[str, tuple[Any, Flow]] = {
    "`AdaptiveFlow(bumps=0)`": (AdaptiveFlow(bumps=0), held_fixed(0)),
    "`AdaptiveFlow(bumps=2)`": (AdaptiveFlow(bumps=2), held_fixed(2)),
    "`AdaptiveFlow()`": (AdaptiveFlow(), held_fixed(5)),
    '`AdaptiveFlow(q="learned")`': (AdaptiveFlow(q="learned"), held_fixed(5, proposals.defensive(moved, 0.1))),
}
IDLE = "13,000 parameters more"


def overhead(smoke: bool) -> str:
    """Step times of AdaptiveFlow over those of the flow with the same field (and q) held fixed, taken in turn.

    The last column shows what the optimizer takes: the fixed flow with five bumps, and as many idle parameters as it learns.
    """
    rows = []
    for host, stepper in (("NumPyro", in_numpyro), ("Pyro", in_pyro)):
        build = partial(stepper, binary_data(), 20 if smoke else 200)
        pairs = {name: (build(learned), build(fixed)) for name, (learned, fixed) in SAME_FLOW.items()}
        pairs[IDLE] = build(held_fixed(5), idle=True), pairs["`AdaptiveFlow()`"][1]
        times = {step: math.inf for pair in pairs.values() for step in pair}
        for _ in range(2 if smoke else 15):
            for step in times:
                start = perf_counter()
                step()
                times[step] = min(times[step], perf_counter() - start)
        rows.append([host, *(times[step] / times[fixed] for step, fixed in pairs.values())])
    title = f"500 binary observations, {PARTICLES} particles: time of a step over that of the same flow, held fixed"
    return "\n".join([table(title, ["", *SAME_FLOW, IDLE], rows), overhead_of_regression(smoke)])


def overhead_of_regression(smoke: bool) -> str:
    """The same on a logistic regression with 569 cases and 31 weights."""

    def side(h: Any, estimator: Any) -> Any:
        model, guide, _ = logistic_regression(h, h.dist.Normal)
        elbo = h.flow.TraceFlow_ELBO(**particles(h, PARTICLES), estimators={"w": estimator}, entropy="stl")
        return STEPS[h](Program(model, adaptive(guide, elbo) if h is NumPyro else guide), elbo)

    rounds, duration = (2, 0.002) if smoke else (15, 0.05)
    rows = []
    for h in HOSTS:
        times = [alternate(side(h, learned), side(h, fixed), rounds, duration) for learned, fixed in SAME_FLOW.values()]
        rows.append([h.name, *(float(np.median(t[:, 0] / t[:, 1])) for t in times)])
    title = f"Logistic regression on breast cancer, {PARTICLES} particles: time of a step over that of the same flow, held fixed"
    return table(title, ["", *SAME_FLOW], rows)


IDLE_SHAPE = (500, 2, 13)


def in_numpyro(problem: Problem, steps: int, estimator: Any, idle: bool = False) -> Callable:
    def model():
        problem.model()
        if idle:
            numpyro.factor("ridge", -(numpyro.param("idle", jnp.ones(IDLE_SHAPE)) ** 2).sum())

    u, _, loss = prepared(problem._replace(model=model), TraceFlow_ELBO(PARTICLES, default=estimator, entropy="stl"))
    run = jax.jit(partial(descend, loss))
    return lambda: jax.block_until_ready(run(0.01, u, jax.random.key(0), steps))


def in_pyro(problem: Problem, steps: int, estimator: Any, idle: bool = False) -> Callable:
    y, name = torch.zeros(500), f"z_{id(estimator)}"

    def model():
        with pyro.plate("data", 500):
            z = pyro.sample(name, pyro_dist.Normal(0.0, 1.0))
            pyro.sample("y", pyro_dist.Bernoulli(logits=10 * (z - 0.3)), obs=y)
        if idle:
            pyro.factor("ridge", -(pyro.param("idle", torch.ones(IDLE_SHAPE)) ** 2).sum())

    def guide():
        loc = pyro.param(f"{name}_loc", torch.zeros(500))
        scale = pyro.param(f"{name}_scale", torch.ones(500), constraint=pyro_dist.constraints.positive)
        with pyro.plate("data", 500):
            pyro.sample(name, pyro_dist.Normal(loc, scale))

    options = {"vectorize_particles": True, "max_plate_nesting": 1, "entropy": "stl"}
    elbo = flowvi.pyro.TraceFlow_ELBO(PARTICLES, default=estimator, **options)
    svi = pyro.infer.SVI(model, guide, pyro.optim.Adam({"lr": 0.0}), elbo)

    def run():
        for _ in range(steps // 10):
            svi.step()

    return run


PARTS: dict[str, Callable[[bool], str]] = {
    "costs": costs,
    "latents": latents,
    "jump": jump,
    **{name: partial(svi, name) for name in PROBLEMS},
    "overhead": overhead,
}


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", choices=[*PARTS, []])
    parser.add_argument("--smoke", action="store_true")
    arguments = parser.parse_args(argv)
    if arguments.smoke:
        jax.config.update("jax_disable_most_optimizations", True)
    texts = []
    for part in arguments.parts or PARTS:
        texts.append(PARTS[part](arguments.smoke))
        print(texts[-1], flush=True)
    if not arguments.parts and not arguments.smoke:
        TABLES.parent.mkdir(exist_ok=True)
        TABLES.write_text("    python benchmarks/adaptive.py\n\n" + "\n".join(texts))


if __name__ == "__main__":
    main()
