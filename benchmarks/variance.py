"""Variance, time, and variance x time of the gradient estimators.

Two tables, both by `gradient_report`. The first has expectations E[f(x)] under a Normal with loc 1 and scale 1, for functions f of
varying steepness k, as in Mohamed, Rosca, Figurnov and Mnih 2020. It has the measured mean and variance, and the exact ones: means in
closed form, variances by Gauss-Hermite quadrature of eq. 19 of Parmas and Sugiyama 2021. The second has the gradient of the ELBO of
whole programs after some steps of training, with its variance summed over all parameters. Every gradient is a mean over 10 particles.
The smaller variance x time, the sooner a fit reaches a given accuracy. About four minutes:

    python benchmarks/variance.py
    python benchmarks/variance.py --smoke
    python benchmarks/variance.py --only NumPyro "eight schools"
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache
from tempfile import TemporaryDirectory
from typing import Any

import jax
import numpy as np
from programs import HOSTS, PROGRAMS, SLOW_TO_COMPILE, NumPyro, Program, names
from tables import figure, options, table
from timing import STEPS, particles, use_one_thread

from flowvi import LR, RP, Auto, Flow, ImplicitRP, fields, proposals

K = 10  # particles
HALF = Flow(loc=lambda x, p: 0.5, scale=lambda x, p: 0.5 * (x - p.loc) / p.scale)

# The options of each estimator. With fewer sites to share the weight, q can be wider.
ESTIMATORS: dict[str, tuple[Any, dict[str, Any]]] = {
    "LR": (LR(), {"baseline": None}),
    "LR + leave-one-out": (LR(), {}),
    "RP": (RP(), {}),
    "half Flow": (HALF, {}),
    "ImplicitRP": (ImplicitRP(), {}),
}
WIDER = {q: (LR(q=proposals.tempered(q)), {"baseline": None}) for q in (1.3, 2.0)}
OF_FUNCTIONS = {**ESTIMATORS, "LR, q tempered by 2": WIDER[2.0]}
OF_PROGRAMS = {**ESTIMATORS, "LR, q tempered by 1.3": WIDER[1.3]}
OF_MIXTURES = {
    **{name: ESTIMATORS[name] for name in ("LR", "LR + leave-one-out", "ImplicitRP")},
    "Flow(mixture())": (Flow(fields.mixture()), {}),
    "half Flow": (Flow(fields.scaled(0.5, fields.mixture())), {}),
}


# Expectations under Normal(LOC, SCALE): f, its derivative, and the derivatives of its expectation in loc and in scale.

LOC, SCALE = 1.0, 1.0
Function = tuple[Callable, Callable, Callable[[float], tuple[float, float]]]


def square(xp: Any, k: float) -> Function:
    return lambda x: (x - k) ** 2, lambda x: 2 * (x - k), lambda s: (2 * (LOC - k), 2 * s)


def bump(xp: Any, k: float) -> Function:
    def gradient(s):
        r = 1 + 2 * k * s**2
        mean = r**-0.5 * np.exp(-k * LOC**2 / r)
        return -2 * k * LOC / r * mean, (-2 * k * s / r + 4 * k**2 * s * LOC**2 / r**2) * mean

    return lambda x: xp.exp(-k * x**2), lambda x: -2 * k * x * xp.exp(-k * x**2), gradient


def cosine(xp: Any, k: float) -> Function:
    def gradient(s):
        damped = np.exp(-(k**2) * s**2 / 2)
        return -k * damped * np.sin(k * LOC), -(k**2) * s * damped * np.cos(k * LOC)

    return lambda x: xp.cos(k * x), lambda x: -k * xp.sin(k * x), gradient


FUNCTIONS = {"(x - k)^2": (square, (-3.0, 0.0, 3.0)), "exp(-k x^2)": (bump, (0.1, 1.0, 10.0)), "cos(k x)": (cosine, (0.5, 1.6, 5.0))}


def expectation(h: Any, make: Callable[..., Function], k: float) -> Program:
    """A program whose loss is E[f(x)]: neither density of its only site counts."""
    f, _, _ = make(h.xp, k)

    def model():
        x = h.ppl.sample("x", h.dist.Normal(LOC, SCALE).mask(False))
        h.ppl.factor("cost", -f(x))

    def guide():
        loc, scale = h.ppl.param("loc", h.array(LOC)), h.ppl.param("scale", h.array(SCALE))
        h.ppl.sample("x", h.dist.Normal(loc, scale).mask(False))

    return Program(model, guide)


@cache
def quadrature() -> tuple[np.ndarray, np.ndarray]:
    """Nodes and weights for a standard Normal, without those of weight 0, at which a cost might overflow."""
    z, mass = np.polynomial.hermite_e.hermegauss(300)
    return z[mass > 1e-280], mass[mass > 1e-280] / mass.sum()


def exact_variance(make: Callable[..., Function], k: float, estimator: str) -> np.ndarray:
    """The variance, in loc and in scale, of a mean over K particles of E = w (u f' + psi f), with x drawn from q."""
    z, mass = quadrature()
    f, slope, gradient = make(np, k)
    wide = 2.0 if estimator.startswith("LR, q") else 1.0  # the variance of q
    x = LOC + SCALE * np.sqrt(wide) * z
    standard = (x - LOC) / SCALE
    w = np.sqrt(wide) * np.exp((1 / wide - 1) * standard**2 / 2)
    u = np.stack([np.ones_like(x), standard])
    score = np.stack([standard, standard**2 - 1]) / SCALE
    part = {"RP": 1.0, "ImplicitRP": 1.0, "half Flow": 0.5}.get(estimator, 0.0)
    cost, mean = f(x), np.array(gradient(SCALE))

    def moment(a: np.ndarray) -> np.ndarray:
        return a @ mass

    one = moment((w * (part * u * slope(x) + (1 - part) * score * cost)) ** 2) - mean**2
    if estimator not in ("LR + leave-one-out", "half Flow"):
        return one / K
    # psi (f - the mean of the others) is, over K particles, the sample covariance of psi and f
    psi, centred = (1 - part) * score, cost - moment(cost)
    path = part * u * slope(x)
    path = path - moment(path)[:, None]
    both = moment((psi * centred) ** 2) - moment(psi * centred) ** 2
    pairs = (moment(psi * centred) ** 2 + moment(psi**2) * moment(centred**2)) / (K - 1)
    return (moment(path**2) + 2 * moment(path * psi * centred) + both + pairs) / K


# Measured.


def report(h: Any, program: Program, choice: tuple[Any, dict[str, Any]], samples: int, params: Any, seed: int) -> Any:
    estimator, more = choice
    how = {"params": params, "rng_key": jax.random.key(seed)} if h is NumPyro else {"seed": seed}
    told = {**particles(h, K), **more}
    return h.flow.gradient_report(
        program.model, program.guide, *program.args, default=estimator, num_samples=samples, options=told, **how
    )


def functions(smoke: bool, wants: Callable[..., bool]) -> Iterator[tuple[object, ...]]:
    """The rows of the first table: exact and measured mean and variance, in loc and in scale."""
    h, samples = NumPyro, 200 if smoke else 10_000
    for name, (make, steepness) in FUNCTIONS.items():
        for k in steepness[1:2] if smoke else steepness:
            program = expectation(h, make, k)
            for label, choice in list(OF_FUNCTIONS.items())[1 : 2 if smoke else None]:
                if not wants(name, k, label):
                    continue
                found = report(h, program, choice, samples, None, 0)
                cells = []
                for i, name_of in enumerate(("loc", "scale")):
                    (p,) = (p for p in found.parameters if p.parameter == name_of)
                    exact = make(np, k)[2](SCALE)[i], exact_variance(make, k, label)[i]
                    cells += [f"{figure(e)} ({figure(m)})" for e, m in zip(exact, (p.mean, p.variance), strict=True)]
                yield name, figure(k), label, *cells


def estimators_of(name: str) -> dict[str, tuple[Any, dict[str, Any]]]:
    return OF_MIXTURES if name == "mixture guide" else OF_PROGRAMS


SAMPLES = {"NumPyro": 1000, "Pyro": 50}  # in a round


def wrapped(h: Any, estimator: Any) -> Callable[..., Any]:
    return lambda loc, scale: h.flow.Estimated(h.dist.Normal(loc, scale), estimator)


def programs(smoke: bool, wants: Callable[..., bool]) -> Iterator[tuple[object, ...]]:
    """The rows of the second table: medians over rounds of variance, time and their product, and the range of the product."""
    for h in HOSTS:
        samples, rounds = (20, 1) if smoke else (SAMPLES[h.name], 3)
        for name in names(h)[: 1 if smoke else None]:
            if h is NumPyro and name in SLOW_TO_COMPILE:  # each estimator would take a minute
                continue
            choices = {label: choice for label, choice in estimators_of(name).items() if wants(h.name, name, label)}
            if smoke:
                choices = {"half Flow": choices["half Flow"]}
            if not choices:
                continue
            program = PROGRAMS[name](h, h.dist.Normal)
            trained = STEPS[h](program, h.flow.TraceFlow_ELBO(default=Auto(), **particles(h, K)), rate=1e-2)
            trained.run(20 if smoke else 500)
            params = trained.svi.get_params(trained.state) if h is NumPyro else None
            found: dict[str, list[tuple[float, float]]] = {label: [] for label in choices}
            for seed in range(rounds):
                for label, choice in choices.items():
                    wrapped_program = program
                    if name == "scan of 100":  # inside scan only the wrapper Estimated works
                        wrapped_program = PROGRAMS[name](h, wrapped(h, choice[0]))
                    seen = report(h, wrapped_program, choice, samples, params, seed)
                    found[label].append((sum(p.variance.sum() for p in seen.parameters), seen.seconds[""]))
            for label, each in found.items():
                v, t = np.array(each).T
                product = 1e6 * v * t
                spread = f"{figure(product.min())} to {figure(product.max())}"
                medians = (figure(float(np.median(a))) for a in (v, 1e6 * t, product))
                yield h.name, name, label, *medians, spread


def keep_compiled(folder: str) -> None:
    """Let JAX cache compiled programs in a folder, because the rounds of a row compile the same ones."""
    jax.config.update("jax_compilation_cache_dir", folder)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)


def main(argv: list[str] | None = None) -> None:
    options_given = options(__file__, __doc__, argv)
    use_one_thread()
    each = "Each cell: the exact value (and that of 10,000 gradients of 10 particles). x is Normal with loc 1 and scale 1."
    columns = ("f", "k", "Estimator", "Mean in loc", "Variance in loc", "Mean in scale", "Variance in scale")
    with table("variance_functions", options_given, columns, each) as row:
        for cells in functions(options_given.smoke, options_given.wants):
            row(*cells)
    each = "Medians of three rounds. A gradient is a mean over 10 particles; its variance is summed over the parameters."
    columns = ("Host", "Program", "Estimator", "Variance", "µs a gradient", "Variance x µs", "Lowest to highest")
    with TemporaryDirectory() as folder, table("variance_programs", options_given, columns, each) as row:
        if not options_given.smoke:
            keep_compiled(folder)
        for cells in programs(options_given.smoke, options_given.wants):
            row(*cells)


if __name__ == "__main__":
    main()
