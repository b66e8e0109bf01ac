"""The programs of ``exact.json`` and the estimators of its rows, written once for both hosts.

``CASES[id]`` has the program, and its estimators and proposals by the name of the row. ``ELSEWHERE`` says why the other rows are not
estimated here.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hosts import Program, chain

from flowvi import LR, RP, Baseline, FiniteDifference, Flow, ImplicitRP, fields, proposals

EXACT = {case["id"]: case for case in json.loads((Path(__file__).parent / "exact.json").read_text())["cases"]}


@dataclass(frozen=True)
class Case:
    """One program of exact.json.

    Attributes:
        program: The program, with theta at the case's value.
        estimators: For a row's ``estimator``: a function ``(h, q) -> estimators``, the argument of the objective.
        proposals: For a row's ``q``: a function ``h -> q``, or None for q = p.
        refused: The rows whose estimator is refused at this program, with a part of the message.
        dependencies: The option of the objective, if the row has one.
        heavy: The proposals under which the estimate has no fourth moment, so that its sample variance means little.
    """

    program: Program
    estimators: dict[str, Callable[[Any, Any], Any]]
    proposals: dict[str, Callable[[Any], Any] | None] = field(default_factory=lambda: {"p": None})
    refused: dict[str, str] = field(default_factory=dict)
    heavy: tuple[str, ...] = ()
    dependencies: str | None = None


def at_x(estimator):
    """The estimator of a row, at the only site."""
    return lambda h, q: {"x": estimator(h, q)}


LR_ROW = at_x(lambda h, q: LR(q=q))
RP_ROW = at_x(lambda h, q: RP(q))


def flow(*velocity, **per_parameter):
    return at_x(lambda h, q: Flow(*velocity, q=q, **per_parameter))


def one(theta, distribution, cost) -> Program:
    """A program of one site x."""
    return chain(theta, {"x": lambda h, t, v: distribution(h, *t)}, {"x": lambda h, t, v: cost(h, v["x"])})


def q_normal(shift, widen):
    return lambda h: lambda p: h.dist.Normal(p.loc + shift, widen * p.scale)


NORMAL_Q = {"p": None, "N(loc,(1.4 scale)^2)": q_normal(0.0, 1.4), "N(loc+0.5,(1.5 scale)^2)": q_normal(0.5, 1.5)}
SLICE_Q = {
    "p": None,
    "Maxwell: z^2 p": lambda h: proposals.slice_by_mass(epsilon=0),
    "Rayleigh: |z| p sqrt(pi/2)": lambda h: proposals.slice_by_height(epsilon=0),
    "overdispersed tau=2: N(loc, 2 scale^2)": lambda h: proposals.tempered(2.0),
    "defensive 0.8 Rayleigh + 0.2 p": lambda h: proposals.slice_by_height(epsilon=0.2),
}
HALF_NORMAL = {"loc": lambda x, p: 0.5, "scale": lambda x, p: 0.5 * (x - p.loc) / p.scale}


def half_normal(x, p, dtheta):
    return 0.5 * (dtheta.loc + (x - p.loc) / p.scale * dtheta.scale)


def normal(parameter, cost, loc=0.5, scale=1.2, **more) -> Case:
    program = (
        one(loc, lambda h, t: h.dist.Normal(t, h.array(scale)), cost)
        if parameter == "loc"
        else one(scale, lambda h, t: h.dist.Normal(h.array(loc), t), cost)
    )
    estimators = {"LR": LR_ROW, "RP": RP_ROW, "half": flow(**HALF_NORMAL), **more.pop("estimators", {})}
    return Case(program, estimators, **{"proposals": NORMAL_Q, **more})


def square(h, x):
    return x**2


def step(h, x):
    return h.math.where(x > 0.9, 1.0, 0.0)


def masked(h):
    """m(x) u_RP with m = 0 at the jump x = 0.9."""
    return lambda x, p: 1 - h.math.exp(-((x - 0.9) ** 2) / (2 * 0.8**2))


MASK = {"mask h=0.8": at_x(lambda h, q: Flow(loc=masked(h), q=q))}


def wave(h, x):
    return 2.5 + h.math.cos(1.3 * x) + 0.3 * x


def zero_variance(h):
    """u* = (g F(x) - int_-inf^x d_loc p phi) / (p phi), the integral by quadrature."""
    g, loc, scale = EXACT["normal-loc-zero-variance-flow"]["gradient"], 0.5, 1.2
    nodes, weights = (h.array(a) for a in _legendre(200))

    def density(x):
        return h.math.exp(-0.5 * ((x - loc) / scale) ** 2) / (scale * math.sqrt(2 * math.pi))

    def u(x, p):
        low = loc - 9 * scale
        y = low + (x[..., None] - low) * (nodes + 1) / 2
        integrand = density(y) * (g - (y - loc) / scale**2 * wave(h, y))
        return (integrand * weights).sum(-1) * (x - low) / 2 / (density(x) * wave(h, x))

    return u


def _legendre(n):
    import numpy as np

    return np.polynomial.legendre.leggauss(n)


def linear_flow(size):
    coefficients = EXACT["learned-linear-flow"]["coefficients"][str(size)]

    def estimator(h, q):
        def u(x, p):
            z = (x - p.loc) / p.scale
            basis = [1.0 + 0 * z, z, h.math.sin(z), z**2, h.math.tanh(z)]
            return sum(c * b for c, b in zip(coefficients, basis, strict=False))

        return Flow(loc=u)

    return at_x(estimator)


def gamma_field(h, factor):
    """``factor`` times the implicit field of the concentration, with its divergence from the transport equation."""

    def implicit(x, p):
        return h.random_gamma_grad(p.concentration + 0 * x, x * p.rate) / p.rate

    def velocity(x, p, dtheta):
        return factor * implicit(x, p) * dtheta.concentration

    def divergence(x, p, dtheta):
        score = h.math.log(p.rate * x) - h.polygamma(0, p.concentration)
        return factor * (-score - implicit(x, p) * ((p.concentration - 1) / x - p.rate)) * dtheta.concentration

    return velocity, "pathwise" if factor == 1 else divergence


def gamma_flow(factor):
    def estimator(h, q):
        velocity, divergence = gamma_field(h, factor)
        return Flow(velocity, divergence=divergence, q=q)

    return at_x(estimator)


def g_rep(h):
    def u(x, p):
        psi1, psi2 = h.polygamma(1, p.concentration), h.polygamma(2, p.concentration)
        c = psi2 / (2 * psi1)
        return x * (c * (h.math.log(x) - h.polygamma(0, p.concentration) + h.math.log(p.rate)) + psi1)

    return u


def gamma_rp(h, q):
    if q is None:
        return RP()
    # torch's cdf has no derivative in the concentration, so there the field is written out
    if h.name == "numpyro":
        return RP(q)
    velocity, divergence = gamma_field(h, 1)
    return Flow(velocity, divergence=divergence, q=q)


def mixture(h, logit):
    logits = h.array([0.0, -0.2, 0.1]) + logit[..., None] * h.array([1.0, 0.0, 0.0])
    components = h.dist.Normal(h.array([-1.5, 0.4, 2.0]), h.array([0.6, 0.9, 0.5]))
    return h.dist.MixtureSameFamily(h.dist.Categorical(logits=logits), h.components(components, logits.shape))


def mixture_2d(h, *logits):
    logits = h.math.stack(logits, -1)
    locs, scales = h.array([[-1.0, 0.4], [0.8, -0.6], [0.1, 1.2]]), h.array([[1.3, 1.1], [0.9, 1.5], [0.7, 0.6]])
    components = h.dist.Normal(locs, scales).to_event(1)
    return h.dist.MixtureSameFamily(h.dist.Categorical(logits=logits), h.components(components, logits.shape))


def mvn(h, t):
    unit = h.array([[0.0, 0, 0], [1, 0, 0], [0, 0, 0]])
    scale_tril = h.array([[0.6, 0, 0], [0, 0.8, 0], [-0.3, 0.5, 0.9]]) + t[..., None, None] * unit
    return h.dist.MultivariateNormal(h.array([0.2, -0.1, 0.3]), scale_tril=scale_tril)


def optimal_transport(h):
    """u = M (x - loc) with M symmetric and M Sigma + Sigma M = dSigma."""

    def velocity(x, p, dtheta):
        scale_tril = p.scale_tril
        half = dtheta.scale_tril @ h.math.swapaxes(scale_tril, -1, -2)
        d, v = h.math.linalg.eigh(scale_tril @ h.math.swapaxes(scale_tril, -1, -2))
        vt = h.math.swapaxes(v, -1, -2)
        m = v @ ((vt @ (half + h.math.swapaxes(half, -1, -2)) @ v) / (d[..., None, :] + d[..., :, None])) @ vt
        return (m @ (x - p.loc)[..., None])[..., 0]

    return velocity


def best_null(h):
    """The antisymmetric A that makes u . grad cos(omega . x) a function of omega . x, which gives the least variance."""
    omega = h.array([0.5, 0.75, 0.4])

    def null(p, dtheta):
        l_t = h.math.swapaxes(p.scale_tril, -1, -2)
        g = h.math.linalg.solve(l_t, (h.math.swapaxes(dtheta.of(lambda p: p.scale_tril), -1, -2) @ omega)[..., None])
        sigma = p.scale_tril @ l_t
        sigma_g, sigma_omega = (sigma @ g)[..., 0], sigma @ omega
        c = (sigma_g * omega).sum(-1) / (sigma_omega * omega).sum(-1)
        a = c[..., None] * sigma_omega - sigma_g
        half = omega[:, None] * a[..., None, :] / (omega**2).sum()
        return half - h.math.swapaxes(half, -1, -2)

    return null


def nonlinear_chain(costs_last=False) -> Program:
    sites = {
        "x1": lambda h, t, v: h.dist.Normal(t[0], h.array(0.9)),
        "x2": lambda h, t, v: h.dist.Normal(h.math.sin(v["x1"]) + 0.5 * t[0], h.math.exp(0.25 * v["x1"])),
    }

    def f1(h, t, v):
        return 0.3 * v["x1"] ** 2

    def f2(h, t, v):
        return h.math.cos(1.1 * v["x2"] + 0.3 * v["x1"]) + 0.2 * v["x2"] ** 2 + 0.1 * t[0] * v["x2"]

    if not costs_last:
        return chain(0.3, sites, {"x1": f1, "x2": f2})
    program = chain(0.3, sites, {})

    def model(h, t):
        v = {}
        for name, distribution in sites.items():
            v[name] = h.sample(name, distribution(h, t, v).mask(False))
        h.factor("f1", f1(h, t, v))
        h.factor("f2", f2(h, t, v))

    return Program(program.guide, model, program.theta)


def widen(factor):
    return lambda p: type(p)(p.loc, factor * p.scale)


KINDS = {"LR": lambda q: LR(q=q), "RP": lambda q: RP(q), "half": lambda q: Flow(half_normal, q=q)}


def pair(first, second, names=("x1", "x2")):
    """A row of two sites. Its proposals, if any, are wider by 1.2 and 1.15."""
    return lambda h, q: {name: KINDS[kind](q and widen(w)) for name, kind, w in zip(names, (first, second), (1.2, 1.15), strict=True)}


def rao_blackwell(costs) -> Program:
    """Three sites with a cost each. The costs come after their ``"own"`` sites, ``"summed"`` at the end, or ``"apart"`` at the end."""

    def normal_at(loc):
        return lambda h, t, v: h.dist.Normal(loc(h, t, v), h.array(0.7))

    sites = {
        "x1": normal_at(lambda h, t, v: t[0]),
        "x2": normal_at(lambda h, t, v: 0.8 * h.math.tanh(v["x1"]) + 0.3 * t[0]),
        "x3": normal_at(lambda h, t, v: 0.8 * h.math.tanh(v["x2"]) + 0.3 * t[0]),
    }
    if costs == "summed":
        return chain(0.4, sites, {"x3": lambda h, t, v: (v["x1"] - 0.5) ** 2 + (v["x2"] - 1) ** 2 + (v["x3"] - 1.5) ** 2})
    targets = {"x1": 0.5, "x2": 1.0, "x3": 1.5}
    if costs == "own":
        return chain(0.4, sites, {name: lambda h, t, v, name=name: (v[name] - targets[name]) ** 2 for name in sites})
    program = chain(0.4, sites, {})

    def model(h, t):
        values = {}
        for name, distribution in sites.items():
            values[name] = h.sample(name, distribution(h, t, values).mask(False))
        for name in sites:
            h.factor(f"cost_{name}", (values[name] - targets[name]) ** 2)

    return Program(program.guide, model, program.theta)


def triple(*kinds):
    return lambda h, q: {name: KINDS[kind](None) for name, kind in zip(("x1", "x2", "x3"), kinds, strict=True)}


def plate_of_four(local) -> Program:
    def site(h, t):
        return h.sample("x", h.dist.Normal(t[0], h.array(1.2)).mask(False))

    def guide(h, t):
        with h.plate("n", 4):
            site(h, t)

    def model(h, t):
        with h.plate("n", 4):
            cost = (site(h, t) - h.array([-0.4, 0.3, 1.1, 2.0])) ** 2
            if local:
                h.factor("cost", cost)
        if not local:
            h.factor("cost", h.over_plate(cost))

    return Program(guide, model, (0.5,), plates=1)


def normal_normal(theta) -> Program:
    """Guide N(m, exp(ls)), prior N(0, 1), observation N(x, 0.8) = 1.1."""

    def guide(h, t):
        h.sample("x", h.dist.Normal(t[0], h.math.exp(t[1])))

    def model(h, t):
        x = h.sample("x", h.dist.Normal(h.array(0.0), h.array(1.0)))
        h.sample("y", h.dist.Normal(x, h.array(0.8)), obs=h.array(1.1))

    return Program(guide, model, tuple(theta))


ELBO_ROWS = {
    f"{kind} {entropy}": at_x(lambda h, q, kind=kind: KINDS[kind](q)) for kind in ("LR", "half", "RP") for entropy in ("total", "STL")
}
ELBO_Q = {"p": None, "scale x1.3": q_normal(0.0, 1.3)}


def lr_baseline(b):
    return at_x(lambda h, q: LR(Baseline(lambda: b), q))


LOG_EVIDENCE = -0.5 * (1.1**2 / (1 + 0.8**2) + math.log(2 * math.pi * (1 + 0.8**2)))
OPTIMUM_ROWS = {
    **{f"LR {entropy} baseline=log Z": lr_baseline(LOG_EVIDENCE) for entropy in ("total", "STL")},
    **{
        f"half {entropy} baseline=log Z": at_x(lambda h, q: Flow(q=q, baseline=Baseline(lambda: LOG_EVIDENCE), **HALF_NORMAL))
        for entropy in ("total", "STL")
    },
}


def discrete(theta, distribution, cost, **baselines) -> Case:
    differences = {"GO": at_x(lambda h, q: FiniteDifference()), "half GO": at_x(lambda h, q: FiniteDifference(share=0.5))}
    return Case(one(theta, distribution, cost), {"LR": LR_ROW, **differences, **{row: lr_baseline(b) for row, b in baselines.items()}})


def baselines(case, probs, costs):
    """The rows with a constant baseline, at a discrete site with these probabilities and costs."""
    mean = sum(p * cost for p, cost in zip(probs, costs, strict=True))
    return {"LR optimal baseline": EXACT[case]["optimal_baseline"], "LR baseline E[phi]": mean}


def softmax(*logits):
    total = sum(map(math.exp, logits))
    return tuple(math.exp(logit) / total for logit in logits)


CASES: dict[str, Case] = {
    "normal-loc-square": normal("loc", square),
    "normal-scale-square": normal("scale", square),
    "normal-loc-cos": normal("loc", lambda h, x: h.math.cos(2 * x)),
    "normal-loc-step": normal("loc", step, estimators=MASK),
    "normal-loc-step-smooth": normal("loc", lambda h, x: h.math.sin(x) + 1.5 * step(h, x), estimators=MASK),
    "normal-loc-slice-square": normal("loc", square, proposals=SLICE_Q, heavy=("Maxwell: z^2 p",)),
    "normal-loc-slice-const": normal("loc", lambda h, x: 1.0 + 0 * x, proposals=SLICE_Q),
    "normal-scale-defensive": normal("scale", square, proposals=SLICE_Q),
    "normal-loc-zero-variance-flow": normal("loc", wave, estimators={"u*": at_x(lambda h, q: Flow(loc=zero_variance(h)))}),
    **{f"mcg-exp-loc-k{k}": normal("loc", lambda h, x, k=k: h.math.exp(-k * x**2), loc=1.0, scale=1.0) for k in (0.1, 1.0)},
    **{
        f"mcg-square-{parameter}-k{k}": normal(parameter, lambda h, x, k=k: (x - k) ** 2, loc=1.0, scale=1.0)
        for parameter, k in (("loc", -3.0), ("scale", -3.0), ("loc", 0.0), ("scale", 0.0), ("loc", 3.0))
    },
    "lognormal-loc": Case(
        one(0.2, lambda h, t: h.dist.LogNormal(t, h.array(0.7)), lambda h, x: x),
        {"LR": LR_ROW, "RP": RP_ROW, "half": flow(loc=lambda x, p: 0.5 * x)},
    ),
    "exponential-rate": Case(
        one(1.4, lambda h, t: h.dist.Exponential(t), square),
        {"LR": LR_ROW, "RP": RP_ROW, "half": flow(rate=lambda x, p: -0.5 * x / p.rate)},
        {"p": None, "Exponential(1.0)": lambda h: lambda p: h.dist.Exponential(h.array(1.0))},
    ),
    "laplace-loc": Case(
        one(0.3, lambda h, t: h.dist.Laplace(t, h.array(0.8)), square),
        {"LR": LR_ROW, "RP": RP_ROW, "half": flow(loc=lambda x, p: 0.5)},
    ),
    "gamma-concentration": Case(
        one(1.7, lambda h, t: h.dist.Gamma(t, h.array(1.2)), square),
        {
            "LR": LR_ROW,
            "RP": at_x(gamma_rp),
            "half": gamma_flow(0.5),
            "G-Rep": at_x(lambda h, q: Flow(concentration=g_rep(h), q=q)),
        },
        {
            "p": None,
            "Gamma(2.0,0.9)": lambda h: lambda p: h.dist.Gamma(h.array(2.0), h.array(0.9)),
            "overdispersed tau=1.5: Gamma((a-1)/tau+1, b/tau)": lambda h: proposals.tempered(1.5),
        },
    ),
    "studentt-loc": Case(
        one(0.3, lambda h, t: h.dist.StudentT(h.array(4.0), t, h.array(1.1)), lambda h, x: h.math.tanh(x)),
        {"LR": LR_ROW, "RP": RP_ROW, "half": flow(loc=lambda x, p: 0.5)},
    ),
    **{
        case: Case(
            one(0.5, lambda h, t: h.dist.VonMises(t, h.array(1.8)), cost),
            {"LR": LR_ROW, "RP": flow(loc=lambda x, p: 1.0), "half": flow(loc=lambda x, p: 0.5)},
        )
        for case, cost in (("vonmises-loc", lambda h, x: h.math.cos(x - 1)), ("vonmises-loc-nonperiodic", lambda h, x: x))
    },
    "uniform-high": Case(
        one(1.3, lambda h, t: h.dist.Uniform(h.array(-0.4), t), lambda h, x: h.math.cos(2 * x) + x),
        {"LR": LR_ROW, "RP": RP_ROW, "half": flow(high=lambda x, p: 0.5 * (x - p.low) / (p.high - p.low))},
        refused={"LR": "support moves", "half": "support moves"},
    ),
    "truncnormal-loc": Case(
        one(0.4, lambda h, t: h.dist.TruncatedNormal(t, h.array(1.1), low=-0.8, high=1.5), lambda h, x: x),
        {"LR": LR_ROW, "RP": RP_ROW, "half": flow(fields.scaled(0.5, fields.truncated_normal()))},
    ),
    "pareto-scale": Case(
        one(1.2, lambda h, t: h.dist.Pareto(t, h.array(2.5)), lambda h, x: 1 / x),
        {"LR": LR_ROW, "RP": RP_ROW, "half": flow(scale=lambda x, p: 0.5 * x / p.scale)},
        refused={"LR": "support moves", "half": "support moves"},
    ),
    "mixture1d-logit0": Case(
        one(0.3, mixture, lambda h, x: h.math.sin(0.9 * x)),
        {"LR": LR_ROW, "RP": at_x(lambda h, q: ImplicitRP()), "half": flow(fields.scaled(0.5, fields.mixture()))},
    ),
    "mixture2d-logits": Case(
        one(
            (0.3, -0.2, 0.1),
            mixture_2d,
            lambda h, x: h.math.sin(0.5 * x[..., 0] + 0.3 * x[..., 1]) + 0.1 * x[..., 0] ** 2,
        ),
        {
            "LR": LR_ROW,
            "telescoping field, coordinates (0,1)": flow(fields.mixture([(0, 1)])),
            "telescoping field, coordinates (1,0)": flow(fields.mixture([(1, 0)])),
            "telescoping field, average of both orders": flow(fields.mixture()),
        },
    ),
    **{
        f"bernoulli-logit-t{c}": discrete(
            0.4,
            lambda h, t: h.dist.Bernoulli(logits=t),
            lambda h, x, c=c: (x - c) ** 2,
            **baselines(f"bernoulli-logit-t{c}", softmax(0.0, 0.4), (c**2, (1 - c) ** 2)),
        )
        for c in (0.45, 0.499)
    },
    "categorical-logit2": discrete(
        0.9,
        lambda h, t: h.dist.Categorical(logits=h.array([0.2, -0.5, 0.0, 0.1]) + t[..., None] * h.array([0.0, 0, 1, 0])),
        lambda h, x: h.array([1.0, -0.5, 0.3, 2.0])[x],
        **baselines("categorical-logit2", softmax(0.2, -0.5, 0.9, 0.1), (1.0, -0.5, 0.3, 2.0)),
    ),
    "chain-nonlinear-two-costs": Case(
        nonlinear_chain(),
        {f"x1:{a} x2:{b}": pair(a, b) for a in KINDS for b in KINDS},
        {"p": None, "scales x1.2,x1.15; per-cost ancestor weights": lambda h: True},
    ),
    "chain-nonlinear-two-costs, costs last": Case(
        nonlinear_chain(costs_last=True),
        {f"x1:{a} x2:{b} joint weight on every cost": pair(a, b) for a in ("LR", "RP") for b in ("LR", "RP")},
        {"scales x1.2,x1.15": lambda h: True},
        dependencies="plates",
    ),
    "chain-nonlinear-two-costs, graph": Case(
        nonlinear_chain(costs_last=True),
        {f"x1:{a} x2:{b}": pair(a, b) for a in KINDS for b in KINDS},
        {"p": None, "scales x1.2,x1.15; per-cost ancestor weights": lambda h: True},
        dependencies="graph",
    ),
    "normal-to-bernoulli": Case(
        chain(
            (0.2, -0.3),
            {
                "x": lambda h, t, v: h.dist.Normal(t[0], h.array(0.9)),
                "b": lambda h, t, v: h.dist.Bernoulli(logits=1.5 * v["x"] + t[1]),
            },
            {"b": lambda h, t, v: (1 + 0.5 * v["b"]) * h.math.cos(v["x"]) + 0.2 * v["b"] * v["x"]},
        ),
        {f"x:{a} b:LR": pair(a, "LR", ("x", "b")) for a in KINDS},
    ),
    **{
        f"chain3-rao-blackwell{suffix}": Case(
            rao_blackwell(last),
            {
                f"{'/'.join(kinds)} {label}": triple(*kinds)
                for kinds in (["LR"] * 3, ["half"] * 3, ["RP"] * 3, ["RP", "LR", "LR"], ["LR", "RP", "RP"])
            },
            dependencies=dependencies,
        )
        for suffix, last, label, dependencies in (
            ("", "own", "downstream costs", None),
            (", costs last", "summed", "all costs", "plates"),
            (", graph", "apart", "downstream costs", "graph"),
        )
    },
    "plate4-local-cost": Case(
        plate_of_four(local=True),
        {f"{kind}, psi_n times its own cost (plate Rao-Blackwell)": at_x(lambda h, q, kind=kind: KINDS[kind](None)) for kind in KINDS},
    ),
    "plate4-local-cost, cost outside": Case(
        plate_of_four(local=False),
        {
            f"{kind}, psi_n times the whole cost (no Rao-Blackwell)": at_x(lambda h, q, kind=kind: KINDS[kind](None))
            for kind in ("LR", "half")
        },
    ),
    "branch-on-continuous": Case(
        chain(
            0.25,
            {
                "x": lambda h, t, v: h.dist.Normal(t[0], h.array(1.0)),
                "y": lambda h, t, v: h.dist.Normal(h.math.where(v["x"] > 0, 1.5 + 0.2 * v["x"], -0.5 * v["x"]), h.array(0.5)),
            },
            {"y": lambda h, t, v: (v["y"] - 1) ** 2},
        ),
        {"x:LR y:RP": pair("LR", "RP", ("x", "y"))},
    ),
    "mvn-cholesky-L10": Case(
        one(0.4, mvn, lambda h, x: h.math.cos(0.5 * x[..., 0] + 0.75 * x[..., 1] + 0.4 * x[..., 2])),
        {
            "LR": LR_ROW,
            "Cholesky RP": RP_ROW,
            "OMT": at_x(lambda h, q: Flow(optimal_transport(h))),
            "best linear null field (A Sigma^-1 y)": at_x(lambda h, q: Flow(fields.multivariate_normal(best_null(h)))),
        },
    ),
    "dirichlet-concentration0": Case(
        one(
            1.4,
            lambda h, t: h.dist.Dirichlet(h.array([0.0, 2.1, 0.8]) + t[..., None] * h.array([1.0, 0, 0])),
            lambda h, x: x[..., 0] * x[..., 1],
        ),
        {
            "LR": LR_ROW,
            "tangent flow (J&O)": flow(fields.dirichlet()),
            "half": flow(fields.scaled(0.5, fields.dirichlet())),
        },
    ),
    "elbo-normal-normal-off": Case(normal_normal(EXACT["elbo-normal-normal-off"]["theta"]["value"]), ELBO_ROWS, ELBO_Q),
    "elbo-normal-normal-off, graph": Case(
        normal_normal(EXACT["elbo-normal-normal-off"]["theta"]["value"]), ELBO_ROWS, ELBO_Q, dependencies="graph"
    ),
    "elbo-normal-normal-opt": Case(
        normal_normal(EXACT["elbo-normal-normal-opt"]["theta"]["value"]), {**ELBO_ROWS, **OPTIMUM_ROWS}, ELBO_Q
    ),
    "total-propagation": normal(
        "loc",
        lambda h, x: (x - 1) ** 2 + 0.3 * x**3,
        loc=0.0,
        scale=1.0,
        estimators={
            "RP (a=1.000000)": RP_ROW,
            "LR (a=0.000000)": LR_ROW,
            "inverse variance, covariance ignored (a=0.811788)": flow(loc=lambda x, p: 0.811788),
            "optimal a* (a=1.138546)": flow(loc=lambda x, p: 1.138546),
        },
    ),
    "baseline-loc": normal(
        "loc",
        lambda h, x: (x - 1) ** 2 + 0.3 * x**3,
        loc=0.0,
        scale=1.0,
        estimators={"LR b=0": LR_ROW, "LR b=E[phi]=2.000000": lr_baseline(2.0), "LR b*=4.000000": lr_baseline(4.0)},
    ),
    "learned-linear-flow": normal(
        "loc",
        wave,
        loc=0.0,
        scale=1.0,
        estimators={f"u=sum c_j b_j(z), best c, basis size {n}": linear_flow(n) for n in range(1, 6)},
    ),
    "go-non-terminal": Case(
        chain(
            0.3,
            {
                "b": lambda h, t, v: h.dist.Bernoulli(t[0]),
                "y": lambda h, t, v: h.dist.Normal(1.0 * v["b"], h.array(1.0)),
            },
            {"y": lambda h, t, v: h.math.sin(v["y"]) + 0.5 * v["b"] * v["y"]},
        ),
        {"LR": lambda h, q: {"b": LR()}, "GO, common random numbers": lambda h, q: {"b": FiniteDifference()}},
    ),
}

DOCUMENTED = "biased by a jump or a seam that an estimator cannot see; 'Requirements' in the docstrings of RP and Flow say so"
ELSEWHERE: dict[tuple[str, str], str] = {
    ("normal-loc-step", "RP"): DOCUMENTED,
    ("normal-loc-step", "half"): DOCUMENTED,
    ("normal-loc-step-smooth", "RP"): DOCUMENTED,
    ("normal-loc-step-smooth", "half"): DOCUMENTED,
    ("vonmises-loc-nonperiodic", "RP"): DOCUMENTED,
    ("vonmises-loc-nonperiodic", "half"): DOCUMENTED,
    ("branch-on-continuous", "TRAP x:half y:RP"): DOCUMENTED,
    ("branch-on-continuous", "TRAP x:RP y:RP"): DOCUMENTED,
    ("truncnormal-loc", "u=1"): DOCUMENTED,
    ("go-non-terminal", "GO, y kept and re-weighted"): "flowvi draws y anew, with the same random numbers",
    ("go-non-terminal", "TRAP GO, y kept, no weight"): "flowvi draws y anew; the row that does so has another mean",
    ("leave-one-out-baseline", ""): "in test_exact.py::test_leave_one_out",
    ("self-normalised-K2", ""): "in test_exact.py::test_plain_weights; flowvi has no self-normalised weights",
    ("iwae-K2", ""): "in test_bounds.py::test_the_exact_row",
}


def elsewhere(case: str, row: dict) -> str | None:
    """Why :func:`test_exact.test_row` does not test this row of exact.json, or None."""
    name = row["estimator"]
    if reason := ELSEWHERE.get((case, name)) or ELSEWHERE.get((case, "")):
        return reason
    if name.startswith("RP") and "baseline" in name:
        return "a site without a score has no baseline"
    if name.startswith("TRAP"):
        return "a known bug: test_exact.py::test_trap tells its mean from the estimate"
    return None
