"""What estimators learn, as parameters of a NumPyro program."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpyro
from numpyro.handlers import block, seed, trace

import flowvi.ops.jax as ops
from flowvi.estimators import Draw, Estimator
from flowvi.numpyro.distributions import NumPyroTarget, draw
from flowvi.numpyro.host import HOST
from flowvi.numpyro.influence import Axes
from flowvi.refusals import refusal
from flowvi.shapes import rows
from flowvi.sites import find_estimated, not_random, weight_of_density

OwnRows = Callable[[str], Axes]  # of the name of a site; see :meth:`flowvi.numpyro.run.NumPyroProgram.own_rows`


class Sizes:
    """The full sizes of the plates of a guide so far, and of the axes of its parameters.

    Args:
        own_rows: Tells which plates of a site have a row for each element in some parameter.
    """

    def __init__(self, own_rows: OwnRows):
        self.own_rows = own_rows
        self.plates: dict[str, int] = {}
        self.axes: set[int] = set()

    def read(self, msg) -> None:
        if msg["type"] == "plate":
            self.plates[msg["name"]] = msg["args"][0]
        elif msg["type"] == "param" and hasattr(msg["value"], "shape"):  # the parameters of a network are a tree
            self.axes.update(msg["value"].shape)

    def rows(self, site: str, frame) -> int:
        def has_own() -> bool:
            return frame.size in self.axes and (frame.dim, frame.size) in self.own_rows(site)

        return rows(self.plates.get(frame.name, frame.size), frame.size, has_own)


def target_of(msg, enters: bool, sizes: Sizes) -> NumPyroTarget:
    """The target of a site, given the sizes in the guide so far."""
    frames = [frame._replace(size=sizes.rows(msg["name"], frame)) for frame in msg["cond_indep_stack"]]
    return NumPyroTarget(msg["name"], msg["fn"].expand_by(msg["kwargs"]["sample_shape"]), enters, frames=frames)


def declare(msg, target: NumPyroTarget, estimator: Estimator, own_density) -> tuple[NumPyroTarget, list[str]]:
    """Register the parameters that the estimator learns; returns the target with their values, and their names."""
    learns = estimator.learns(ops, target)
    with trace() as found, target.registering(learns):  # under `handlers.scope` a parameter gets another name
        values = {
            name: numpyro.param(f"{msg['name']}.{name}", learned.initial(), event_dim=len(learned.event_shape))
            for name, learned in learns.items()
        }
    return target.with_learned(learns, values, own_density), list(found)


# ---- inside scan, which takes no parameters, and into which no other handler reaches


class Scanned(NamedTuple):
    """What comes out of ``scan`` with the values of a site, in place of its intermediates.

    Attributes:
        draw: What the estimator has attached; None at given values.
        learned: The names of the parameters that it learns, as keys.
    """

    draw: Draw | None
    learned: dict[str, None]


class Registered(NamedTuple):
    """What the estimator of a site inside ``scan`` learns.

    Attributes:
        values: The values, by the estimator's names.
        names: The names of these parameters in the program.
        scale: The scale around the ``scan``.
    """

    values: dict[str, jax.Array]
    names: list[str]
    scale: Any


class LearningInScan:
    """The sites inside a ``scan`` with an estimator that learns, by the wrapper; all steps share its parameters, registered before.

    Args:
        msg: The message of the ``scan``.
        sizes: The sizes that the guide has shown.
    """

    def __init__(self, msg, sizes: Sizes):
        self.sizes = sizes
        step, carry, xs, *_ = msg["args"]

        def initial(carry, x):
            with block(), trace() as found, seed(rng_seed=0):
                step(carry, x)
            learning = filter(None, map(self._learning, found.values()))
            return {
                target.name: {name: learned.initial() for name, learned in estimator.learns(ops, target).items()}
                for target, estimator in learning
            }

        first = carry, jax.tree.map(lambda a: a[0], xs)
        values = jax.jit(initial)(*first) if jax.eval_shape(initial, *first) else {}
        self.registered = {name: self._register(name, of_site) for name, of_site in values.items()}

    def _learning(self, site) -> tuple[NumPyroTarget, Estimator] | None:
        """Target and estimator of a site of a step, if it is one of these."""
        if site["type"] != "sample" or not_random(HOST, site) or (estimator := find_estimated(HOST, site["fn"])) is None:
            return None
        if not estimator.shares or estimator.baseline is not None or estimator.compares:
            return None
        target = target_of(site, True, self.sizes)
        return target, estimator.resolve(target)

    def _register(self, site: str, values: dict[str, jax.Array]) -> Registered:
        with trace() as found:
            values = {name: numpyro.param(f"{site}.{name}", value, event_dim=value.ndim) for name, value in values.items()}
        scale = next((param["scale"] for param in found.values() if param["scale"] is not None), 1.0)
        if numpyro.get_mask() is not None or jnp.ndim(scale):
            raise refusal(
                site,
                "expected no mask and no scale that is an array around a scan with an estimator that learns, found one; put it "
                "into the step.",
            )
        return Registered(values, list(found), scale)

    def draw(self, has_own_density: bool, site) -> jax.Array | None:
        """Draw at a site of a step, as a ``substitute_fn``; ``has_own_density``: whether the objective differentiates its density."""
        if (registered := self.registered.get(site["name"])) is None or (found := self._learning(site)) is None:
            return None
        (target, estimator), drawn = found, None
        if site["value"] is None:
            own_density = registered.scale * weight_of_density(site) if has_own_density else 0.0
            target = target.with_learned(estimator.learns(ops, target), registered.values, own_density)
            drawn = draw(target, estimator, site["kwargs"]["rng_key"])
        site["intermediates"] = Scanned(drawn, dict.fromkeys(registered.names))
        return None if drawn is None else drawn.value
