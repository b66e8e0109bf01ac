"""Effect handlers: attach estimators to the draws of the guide, and read the annotations of the model."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.lax import stop_gradient
from numpyro.handlers import block, seed
from numpyro.primitives import Messenger

import flowvi.ops.jax as ops
from flowvi.assignment import Choice
from flowvi.estimators import LR, Draw, Estimator, attach
from flowvi.flows import held_base
from flowvi.learned.coupling import CoupledRP
from flowvi.numpyro.distributions import MovingLeaves, NumPyroTarget, attaching, draw, propose
from flowvi.numpyro.host import HOST
from flowvi.numpyro.parameters import LearningInScan, OwnRows, Scanned, Sizes, declare, target_of
from flowvi.numpyro.particles import Together
from flowvi.numpyro.scans import is_scan
from flowvi.numpyro.special_points import with_right_derivative
from flowvi.numpyro.threefry import is_unrolled, takes, typed_like, unrolled
from flowvi.particles import at_uniforms, can_be_joint
from flowvi.refusals import PLACES
from flowvi.sites import GuideSites, Visit, annotation, is_masked, weight_of_density
from flowvi.target import Target


class attach_estimators(Messenger):
    """Draw at every random site of the guide with the site's estimator."""

    def __init__(self, fn, sites: GuideSites, moving_leaves: MovingLeaves, own_rows: OwnRows, together: Together | None = None):
        self.sites, self.moving_leaves, self.together = sites, moving_leaves, together
        self.sizes = Sizes(own_rows)
        super().__init__(fn)

    def __call__(self, *args, **kwargs):
        with attaching(self.moving_leaves):
            return super().__call__(*args, **kwargs)

    def process_message(self, msg):
        if msg["type"] == "sample":
            msg["fn"] = with_right_derivative(msg["fn"])
            self.sites.visit(HOST, msg, msg["name"], self._target, self._draw)
        elif is_scan(msg) and (in_scan := LearningInScan(msg, self.sizes)).registered:
            has_own_density = self.sites.entropy == "full"
            msg["kwargs"]["substitute_stack"].append(("substitute", partial(in_scan.draw, has_own_density)))

    def postprocess_message(self, msg):
        self.sizes.read(msg)

    def _target(self, msg, enters: bool) -> NumPyroTarget:
        return target_of(msg, enters, self.sizes)

    def _draw(self, msg, visit: Visit) -> Draw | None:
        name, estimator = msg["name"], visit.estimator
        target: Any = visit.target
        if msg.get("_control_flow_done"):
            if not isinstance(scanned := msg["intermediates"], Scanned):
                return _drawn_in_control_flow(msg["value"], visit)
            if visit.choice.source != "Estimated":
                _refuse_in_control_flow(target, estimator, visit.choice)
            msg["intermediates"] = []
            self.sites.learned |= dict.fromkeys(scanned.learned, name)
            return None if scanned.draw is None else scanned.draw._replace(value=msg["value"])
        if msg["value"] is not None:
            if (base := self.sites.bases.get(name)) is not None:
                msg["intermediates"] = target.intermediates(target.push(held_base(ops, target, base)))
            return None
        if estimator.uses_sampler:
            if self.together is not None and can_be_joint(target):
                msg["value"] = target.push(self._together(self.together, msg, target))
                msg["intermediates"] = target.intermediates(msg["value"])
            elif visit.wrapped is not None:
                p = target.p.expand(target.batch_shape)
                msg["value"] = target.push(p(rng_key=msg["kwargs"]["rng_key"], sample_shape=()))
                msg["intermediates"] = target.intermediates(msg["value"])
            return None
        target, learned = declare(msg, target, estimator, weight_of_density(msg) if self.sites.entropy == "full" else 0.0)
        self.sites.learned |= dict.fromkeys(learned, name)
        if name in self.sites.replaced:
            return self._replace(msg, target, estimator)
        if self.together is not None and isinstance(estimator, CoupledRP):
            drawn = attach(ops, target, estimator, self._together(self.together, msg, target))
        else:
            drawn = draw(target, estimator, msg["kwargs"]["rng_key"])
        msg["value"], msg["intermediates"] = drawn.value, target.intermediates(drawn.value)
        if drawn.log_prob is not None and not target.transforms and not is_masked(msg["fn"]):
            self.sites.log_probs[name] = drawn.log_prob
        return drawn

    def _together(self, together: Together, msg, target) -> jax.Array:
        """X of one of the particles that are drawn together."""
        self.sites.together.append(msg["name"])
        return at_uniforms(ops, target, together.uniforms(msg["name"], msg["kwargs"]["rng_key"], target.shape))

    def _replace(self, msg, target, estimator) -> Draw:
        """Replace the draw by the value for this run; the weight of the draw stays."""
        value, active = self.sites.replaced[msg["name"]]
        key = msg["kwargs"]["rng_key"]
        if estimator.q is None:
            drawn, log_weight = target.push(propose(target, estimator, key)), None
        else:
            again = draw(target, estimator, key)
            drawn, log_weight = again.value, again.log_weight
        msg["value"] = value if active is None else jnp.where(active, value, drawn)
        return Draw(msg["value"], log_weight=log_weight)


def _drawn_in_control_flow(value: jax.Array, visit: Visit) -> Draw | None:
    """The draw of a site inside scan or cond, where only the wrapper could act when it was drawn."""
    target, estimator, choice, wrapped = visit
    if estimator.uses_sampler:
        if wrapped is not None and choice.estimator != wrapped:
            _refuse_in_control_flow(target, estimator, choice)
        return None
    if estimator.compares:
        target.refuse(
            f"{estimator} has to replace the site's value, which is not possible inside scan and cond; use LR() there.", PLACES
        )
    discrete_lr = wrapped is None and isinstance(estimator, LR) and estimator.q is None and target.is_discrete()
    if not discrete_lr and (wrapped is None or choice.source != "Estimated"):
        _refuse_in_control_flow(target, estimator, choice)
    if estimator.learns(ops, target):
        target.refuse(
            "inside scan or cond an estimator cannot register parameters; inside scan give it shared=True or features=, so that all "
            "steps share them, inside cond use one that does not learn.",
            PLACES,
        )
    if estimator.biased:  # the wrapper has attached everything
        return Draw(value)
    if estimator.baseline is not None:
        target.refuse("inside scan or cond an estimator cannot have a baseline of its own; use the leave-one-out baseline there.")
    if estimator.proposal(ops, target)[1]:
        target.refuse("inside scan or cond the support of q must be that of p; choose q from the same family.")
    return attach(ops, target, estimator, target.pull(stop_gradient(value)))._replace(instead=None)


def _refuse_in_control_flow(target: Target, estimator: Estimator, choice: Choice):
    target.refuse(
        f"handlers do not reach into scan and cond, so {estimator} (given by: {choice.source}) cannot act on this draw; "
        "write numpyro.sample(name, flowvi.numpyro.Estimated(distribution, estimator)) there.",
        PLACES,
    )


def hidden() -> block:
    """Like ``block()``, but a parameter without a value gets it from an outer handler: ``init_params`` of ``SVI`` is one."""
    return block(hide_fn=lambda msg: msg["type"] != "param" or msg["value"] is not None or all(a is not None for a in msg["args"]))


def seeded(fn: Callable, key: jax.Array, **options: Any) -> Messenger:
    """Like ``seed(fn, key)``, with the same draws, by the faster generator if there is one."""
    return own_keys(seed(fn, unrolled(key), **options), key)


class own_keys(Messenger):
    """Give a statement a key of the type of the program's ``key`` if it returns the key to the program, or accepts no other type."""

    def __init__(self, fn, key):
        self.key = key
        super().__init__(fn)

    def process_message(self, msg):
        if msg["value"] is not None:  # a statement that draws nothing, such as a deterministic one, may have no kwargs
            return
        key = msg["kwargs"].get("rng_key")
        if not is_unrolled(key):
            return
        if msg["type"] == "prng_key" or (msg["type"] == "sample" and not takes(msg["fn"], key)):
            msg["kwargs"]["rng_key"] = typed_like(key, self.key)
        elif msg["type"] == "control_flow":
            msg["fn"] = partial(self._with_either, msg["fn"])

    def _with_either(self, fn, *args, rng_key, **kwargs):
        """Handlers do not reach into scan and cond, so all draws there have keys of the same type."""
        try:
            return fn(*args, rng_key=rng_key, **kwargs)
        except Exception:  # if the key is not the cause, the next call raises the error again
            pass
        return fn(*args, rng_key=typed_like(rng_key, self.key), **kwargs)


class read_annotations(Messenger):
    """Collect ``infer={"estimator": ...}`` from the model, before ``replay`` overwrites it."""

    def __init__(self, fn):
        self.annotations = {}
        super().__init__(fn)

    def process_message(self, msg):
        if msg["type"] == "sample" and "estimator" in msg["infer"]:
            self.annotations[msg["name"]] = annotation(HOST, msg)


class mark_draws(Messenger):
    """Add to every draw its number in ``marks``, so that a jaxpr shows what depends on the draw.

    The density of a ``scored`` site has to depend on its own mark. Some densities can only be computed from the intermediates of the
    draw, so these get the mark too.
    """

    def __init__(self, fn, marks, scored):
        self.marks, self.scored = marks, scored
        super().__init__(fn)

    def process_message(self, msg):
        if msg["type"] != "sample" or (mark := self.marks.get(msg["name"])) is None:
            return
        if msg["value"] is None:
            msg["value"], msg["intermediates"] = _any_value(msg["fn"], **msg["kwargs"])
        msg["value"] = _marked(msg["value"], mark)
        if msg["name"] in self.scored:
            msg["intermediates"] = jax.tree.map(lambda a: _marked(a, mark), msg["intermediates"])


class mark_every_draw(Messenger):
    """Add one number to every draw, so that a jaxpr shows what depends on any of the draws.

    A parameter that is not ``known`` gets the number too, because an outer handler, which does not act here, may give it another value.
    """

    def __init__(self, fn, mark, known):
        self.mark, self.known = mark, known
        super().__init__(fn)

    def process_message(self, msg):
        if msg["type"] == "sample" and msg["value"] is None:
            msg["value"] = _marked(_any_value(msg["fn"], **msg["kwargs"])[0], self.mark)

    def postprocess_message(self, msg):
        if msg["type"] == "param" and msg["name"] not in self.known:
            msg["value"] = jax.tree.map(lambda a: _marked(a, self.mark), msg["value"])


def _marked(value, mark):
    value = jnp.asarray(value)
    return value + mark.astype(value.dtype)


def _any_value(fn, rng_key, sample_shape, **kwargs):
    """A value that depends on all parameters of the distribution, and the intermediates of the draw."""
    try:
        return fn(rng_key=rng_key, sample_shape=sample_shape, sample_intermediates=True)
    except NotImplementedError:  # a distribution without a sampler; a proposal draws for it
        return jnp.zeros(fn.shape(sample_shape)) + sum(0 * jnp.sum(leaf) for leaf in jax.tree.leaves(fn)), []
