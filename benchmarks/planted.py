"""Programs with a bias planted at one site, and programs without a bias, each written once for both hosts."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np
from pyro.distributions.testing.fakes import NonreparameterizedNormal

from flowvi import LR, RP, Auto, Baseline, Enumerate, FiniteDifference, Flow, ImplicitRP, MeasureValued, fields


class Planted(NamedTuple):
    """A program of a few sites.

    Attributes:
        make: ``make(h)`` is the model, the guide and the estimators.
        site: The site whose estimator is biased, or None.
        statement: The statement of the model whose cost shows the bias, or an empty string.
    """

    make: Callable[[Any], tuple[Callable, Callable, dict]]
    site: str | None
    statement: str = ""


class Peeking(Baseline):
    """A baseline that reads the draw of its own site."""

    def at_draw(self, ops, target, x, score):
        return Baseline(lambda: 2.0 * ops.stop_gradient(x)).at_draw(ops, target, x, score)


class DetachedNormal(NonreparameterizedNormal):
    """A Normal of Pyro whose sampler has no derivative."""

    def rsample(self, sample_shape=()):
        return super().rsample(sample_shape).detach()


def normal(h: Any, name: str, loc: float = 0.2):
    return h.dist.Normal(h.ppl.param(f"{name}_loc", h.array(loc)), h.ppl.param(f"{name}_scale", h.array(0.9)))


def stopped(h: Any, x: Any) -> Any:
    return x.detach() if h.name == "Pyro" else jax.lax.stop_gradient(x)


def one_normal(cost: Callable[[Any, Any], Any], estimator: Any = None, detached: bool = False):
    """A Normal site x under a Normal prior, and ``cost(h, x)``. If ``detached``, the sampler has no derivative."""

    def make(h):
        def model():
            cost(h, h.ppl.sample("x", h.dist.Normal(h.array(0.0), 1.0)))

        def guide():
            loc, scale = h.ppl.param("loc", h.array(0.2)), h.ppl.param("scale", h.array(0.9))
            h.ppl.sample("x", ((DetachedNormal if h.name == "Pyro" else h.score_normal) if detached else h.dist.Normal)(loc, scale))

        return model, guide, {"x": estimator or RP()}

    return make


def observed(f: Callable[[Any, Any], Any]) -> Callable[[Any, Any], Any]:
    """One observation with the mean f(h, x)."""
    return lambda h, x: h.ppl.sample("y", h.dist.Normal(f(h, x), 0.7), obs=h.array(1.0))


def identity(h, x):
    return x


def jump(h, x):
    h.ppl.factor("step", h.xp.where(x > 0.5, h.array(2.0), h.array(0.0)))


def angle(h, read: Callable[[Any, Any], Any] = identity):
    """The model reads an angle as a number."""

    def model():
        a = h.ppl.sample("a", h.dist.VonMises(h.array(0.0), h.array(0.5)))
        h.ppl.sample("y", h.dist.Normal(read(h, a), 0.7), obs=h.array(1.5))

    def guide():
        loc, concentration = h.ppl.param("loc", h.array(1.5)), h.ppl.param("concentration", h.array(1.0))
        h.ppl.sample("a", h.dist.VonMises(loc, concentration))

    return model, guide, {"a": Flow(fields.von_mises())}


def across(h):
    """A field that moves mass across the end of the support, where the density is not 0."""

    def model():
        x = h.ppl.sample("x", h.dist.Exponential(h.array(1.0)))
        h.ppl.sample("y", h.dist.Normal(x, 0.7), obs=h.array(1.0))

    def guide():
        h.ppl.sample("x", h.dist.Exponential(h.ppl.param("rate", h.array(1.5))))

    return model, guide, {"x": Flow(rate=lambda x, p: -(x + 0.5) / p.rate)}


def neighbours(estimator: Any, reads: bool = True):
    """Bernoullis in a plate, where each cost may also read its neighbour."""

    def make(h):
        y = h.array(np.array([1.0, 0.2, 1.4, -0.3, 0.8]))

        def model():
            with h.ppl.plate("data", 5):
                k = 1.0 * h.ppl.sample("k", h.dist.Bernoulli(h.array(0.5)))
                mean = k + 1.5 * h.xp.roll(k, 1, -1) if reads else k
                h.ppl.sample("y", h.dist.Normal(mean, 0.5), obs=y)

        def guide():
            logits = h.ppl.param("logits", h.array(np.array([0.1, -0.4, 0.3, 0.6, 0.0])))
            with h.ppl.plate("data", 5):
                h.ppl.sample("k", h.dist.Bernoulli(logits=logits))

        return model, guide, {"k": estimator}

    return make


def two_sites(hide: bool, jumps: bool):
    """x, and z with mean x. The model reads z through a stop_gradient, or with a jump."""

    def make(h):
        def model():
            x = h.ppl.sample("x", h.dist.Normal(h.array(0.0), 1.0))
            z = h.ppl.sample("z", h.dist.Normal(x, 1.0))
            h.ppl.sample("y", h.dist.Normal(stopped(h, z) if hide else z, 0.7), obs=h.array(1.5))
            if jumps:
                jump(h, z)

        def guide():
            x = h.ppl.sample("x", normal(h, "x"))
            h.ppl.sample("z", h.dist.Normal(0.5 * x + h.ppl.param("shift", h.array(0.3)), 0.8))

        return model, guide, {"x": RP(), "z": RP()}

    return make


def local_jump(h):
    """Local sites in a plate, each with a cost that jumps."""
    y = h.array(np.array([0.5, -0.5, 1.0]))

    def model():
        w = h.ppl.sample("w", h.dist.Normal(h.array(0.0), 1.0))
        with h.ppl.plate("data", 3):
            x = h.ppl.sample("x", h.dist.Normal(w, 1.0))
            h.ppl.sample("y", h.dist.Normal(h.xp.where(x > 0.3, h.array(1.0), h.array(-1.0)), 0.6), obs=y)

    def guide():
        h.ppl.sample("w", normal(h, "w"))
        loc = h.ppl.param("x_loc", h.array(np.array([0.4, -0.1, 0.2])))
        with h.ppl.plate("data", 3):
            h.ppl.sample("x", h.dist.Normal(loc, 0.8))

    return model, guide, {}


def half(x, p, dtheta):
    return 0.5 * (dtheta.loc + (x - p.loc) / p.scale * dtheta.scale)


def shifted(x, p):
    return x - p.loc


def too_small(x, p, dtheta):
    return 0.2 * dtheta.scale / p.scale


BIASES: dict[str, Planted] = {
    "a jump": Planted(one_normal(jump), "x", "step"),
    "a mean that jumps": Planted(one_normal(observed(lambda h, x: h.xp.where(x > 0, x + 1.0, x))), "x", "y"),
    "stop_gradient": Planted(one_normal(observed(stopped)), "x", "y"),
    "half of a path hidden": Planted(one_normal(observed(lambda h, x: 0.5 * x + 0.5 * stopped(h, x))), "x", "y"),
    "rounding": Planted(one_normal(observed(lambda h, x: h.xp.round(2 * x) / 2)), "x", "y"),
    "a sign": Planted(one_normal(observed(lambda h, x: h.xp.sign(x))), "x", "y"),
    "an angle as a number": Planted(angle, "a", "y"),
    "a field across a boundary": Planted(across, "x"),
    "neighbours under LR": Planted(neighbours(LR()), "k", "y"),
    "neighbours under Enumerate": Planted(neighbours(Enumerate()), "k", "y"),
    "a baseline that peeks": Planted(one_normal(observed(identity), LR(baseline=Peeking(lambda: 0.0))), "x"),
    "force": Planted(one_normal(observed(identity), RP(force=True), detached=True), "x"),
    "exact": Planted(one_normal(observed(identity), ImplicitRP(shifted)), "x"),
    "divergence='pathwise'": Planted(one_normal(observed(identity), Flow(half, divergence="pathwise")), "x"),
    "a wrong divergence": Planted(one_normal(observed(identity), Flow(half, divergence=too_small)), "x"),
    "a later site hidden": Planted(two_sites(hide=True, jumps=False), "z", "y"),
    "a jump at a later site": Planted(two_sites(hide=False, jumps=True), "z", "step"),
    "jumps in a plate": Planted(local_jump, "x", "y"),
}


# Random programs without a bias.


class Site(NamedTuple):
    prior: Callable[[Any], Any]
    guide: Callable[[Any, str], Any]
    estimators: tuple[Any, ...]


def parameter(h: Any, name: str, value: Any, positive: bool = False):
    return h.ppl.param(name, h.array(value), **({"constraint": h.dist.constraints.positive} if positive else {}))


def sites(a: float, b: float) -> dict[str, Site]:
    """A site of each family."""
    return {
        "Normal": Site(
            lambda h: h.dist.Normal(h.array(0.0), 1.0),
            lambda h, n: h.dist.Normal(parameter(h, f"{n}_loc", a - 1), parameter(h, f"{n}_scale", b, True)),
            (RP(), Flow(half), Flow(fields.location_scale()), RP(control_variate="quadratic")),
        ),
        "Gamma": Site(
            lambda h: h.dist.Gamma(h.array(2.0), 1.5),
            lambda h, n: h.dist.Gamma(parameter(h, f"{n}_a", 1 + 2 * a, True), parameter(h, f"{n}_b", b, True)),
            (RP(), Flow(fields.gamma_g_rep()), Flow(fields.gamma_implicit())),
        ),
        "Beta": Site(
            lambda h: h.dist.Beta(h.array(2.0), 2.0),
            lambda h, n: h.dist.Beta(parameter(h, f"{n}_1", 1 + 2 * a, True), parameter(h, f"{n}_0", 1 + 2 * b, True)),
            (RP(), Flow(fields.beta_implicit())),
        ),
        "LogNormal": Site(
            lambda h: h.dist.LogNormal(h.array(0.0), 0.5),
            lambda h, n: h.dist.LogNormal(parameter(h, f"{n}_loc", a - 1), parameter(h, f"{n}_scale", 0.5 * b, True)),
            (RP(), Flow(fields.log_normal())),
        ),
        "Exponential": Site(
            lambda h: h.dist.Exponential(h.array(1.0)),
            lambda h, n: h.dist.Exponential(parameter(h, f"{n}_rate", a, True)),
            (RP(), MeasureValued()),
        ),
        "Bernoulli": Site(
            lambda h: h.dist.Bernoulli(h.array(0.4)),
            lambda h, n: h.dist.Bernoulli(logits=parameter(h, f"{n}_logits", a - 1)),
            (Enumerate(), FiniteDifference()),
        ),
        "Poisson": Site(
            lambda h: h.dist.Poisson(h.array(2.0)),
            lambda h, n: h.dist.Poisson(parameter(h, f"{n}_rate", 2 * a, True)),
            (FiniteDifference(), MeasureValued()),
        ),
        "Categorical": Site(
            lambda h: h.dist.Categorical(probs=h.array(np.full(4, 0.25))),
            lambda h, n: h.dist.Categorical(logits=parameter(h, f"{n}_logits", np.array([a, b, 0.0, -b]))),
            (Enumerate(), FiniteDifference()),
        ),
    }


NUM_STRUCTURES = 10


def right(seed: int) -> Planted:
    """A random program whose estimators are right: one mean reads one to three sites, and some programs have a plate below them.

    If two seeds differ by a multiple of `NUM_STRUCTURES`, their programs differ only in the initial values of their parameters.
    """
    structure = seed % NUM_STRUCTURES
    of_structure, of_values = np.random.default_rng(structure), np.random.default_rng(seed)
    chosen = {}
    for i in range(1 + structure % 3):
        known = sites(*of_values.uniform(0.5, 1.5, size=2))
        site = known[list(known)[of_structure.integers(len(known))]]
        chosen[f"s{i}"] = site, site.estimators[of_structure.integers(len(site.estimators))]
    weights, (observation, wave) = of_values.normal(size=len(chosen)), of_structure.uniform(0.3, 2.0, size=2)
    data = of_structure.normal(size=of_structure.integers(2, 6)) if structure % 4 == 0 else None

    def make(h):
        def model():
            weight = parameter(h, "weights", weights)
            mean = sum(weight[i] * h.ppl.sample(name, site.prior(h)) for i, (name, (site, _)) in enumerate(chosen.items()))
            h.ppl.sample("y", h.dist.Normal(mean + 0.3 * h.xp.sin(wave * mean), 0.8), obs=h.array(observation))
            if data is not None:
                with h.ppl.plate("data", len(data)):
                    z = h.ppl.sample("z", h.dist.Normal(0.5 * mean, 1.0))
                    h.ppl.sample("of_z", h.dist.Normal(z, 0.7), obs=h.array(data))

        def guide():
            for name, (site, _) in chosen.items():
                h.ppl.sample(name, site.guide(h, name))
            if data is not None:
                loc = parameter(h, "z_loc", np.zeros(len(data)))
                with h.ppl.plate("data", len(data)):
                    h.ppl.sample("z", h.dist.Normal(loc, 0.8))

        of_plate = {} if data is None else {"z": (RP(), LR(), Auto())[structure // 4 % 3]}
        return model, guide, {name: estimator for name, (_, estimator) in chosen.items()} | of_plate

    return Planted(make, None)
