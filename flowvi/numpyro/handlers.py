"""Effect handlers: attach estimators where the guide draws, and read annotations where the model runs."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax.lax import stop_gradient
from numpyro.distributions import Delta
from numpyro.distributions.distribution import Unit
from numpyro.primitives import Messenger

import flowvi.ops.jax as ops
from flowvi.assignment import Assignment, Choice, SiteDescription, require_estimator, require_random
from flowvi.estimators import LR, Draw, attach
from flowvi.numpyro.distributions import NumPyroTarget, attaching, draw, find_estimated, unwrap


def _fixed(msg) -> str | None:
    """What the statement is, if it is no random choice."""
    family = unwrap(msg["fn"])
    if isinstance(family, Unit):
        return "a factor"
    if msg["is_observed"]:
        return "observed"
    return "a Delta" if isinstance(family, Delta) else None


class attach_estimators(Messenger):
    """Serve every random site of the guide by its estimator.

    Attributes:
        random: The random sites in program order, and what each was served by.
        draws: The draws of the sites that have a score or a weight.
        fixed: Names of the statements that are no random choice.
    """

    def __init__(self, fn, assignment: Assignment):
        self.assignment = assignment
        self.random: dict[str, SiteDescription] = {}
        self.draws: dict[str, Draw] = {}
        self.fixed: list[str] = []
        super().__init__(fn)

    def __call__(self, *args, **kwargs):
        with attaching(True):
            return super().__call__(*args, **kwargs)

    def process_message(self, msg):
        if msg["type"] != "sample":
            return
        name, wrapped = msg["name"], find_estimated(msg["fn"])
        if what := _fixed(msg):
            require_random(msg, wrapped, what)
            self.fixed.append(name)
            return
        if msg["infer"].get("enumerate"):
            raise ValueError(
                f"site '{name}': expected a site that is sampled, found infer['enumerate']; enumerate with TraceEnum_ELBO."
            )
        choice = self.assignment.choose(msg, name, wrapped)
        fn = msg["fn"].expand_by(msg["kwargs"]["sample_shape"])
        target = NumPyroTarget(name, fn, enters=True)
        estimator = choice.estimator.resolve(target)
        if target.transforms and not estimator.enters:
            target = NumPyroTarget(name, fn, enters=False)
        if msg.get("_control_flow_done"):
            if not estimator.uses_sampler:
                self.draws[name] = _draw_in_control_flow(target, choice._replace(estimator=estimator), wrapped, msg["value"])
            elif wrapped is not None and choice.estimator != wrapped:
                _refuse_in_control_flow(target, choice)
        elif msg["value"] is None:
            if estimator.uses_sampler:
                if wrapped is not None:
                    p = target.p.expand(target.batch_shape)
                    msg["value"] = target.push(p(rng_key=msg["kwargs"]["rng_key"], sample_shape=()))
            else:
                self.draws[name] = draw(target, estimator, msg["kwargs"]["rng_key"])
                msg["value"] = self.draws[name].value
        plates = tuple(frame.name for frame in msg["cond_indep_stack"])
        self.random[name] = SiteDescription(name, estimator, choice.said, target.family, target.parameters, plates)


def _draw_in_control_flow(target: NumPyroTarget, choice: Choice, wrapped, value) -> Draw:
    """The draw of a site whose value comes out of scan or cond, where only the wrapper could act while it was drawn."""
    discrete_lr = wrapped is None and isinstance(choice.estimator, LR) and choice.estimator.q is None and target.is_discrete()
    if not discrete_lr and (wrapped is None or choice.said != "Estimated"):
        _refuse_in_control_flow(target, choice)
    if choice.estimator.baseline is not None:
        target.refuse("inside scan or cond the inputs of a baseline are out of reach; use the leave-one-out baseline there.")
    if choice.estimator.proposal(ops, target)[1]:
        target.refuse("inside scan or cond the support of q must be that of p; choose q from the same family.")
    return attach(ops, target, choice.estimator, target.pull(stop_gradient(value)))


def _refuse_in_control_flow(target: NumPyroTarget, choice: Choice):
    target.refuse(
        f"handlers do not reach into scan and cond, so that {choice.estimator} (said in: {choice.said}) cannot act on this draw; "
        "write numpyro.sample(name, flowvi.numpyro.Estimated(distribution, estimator)) there."
    )


class read_annotations(Messenger):
    """Collect ``infer={"estimator": ...}`` from the model, before ``replay`` overwrites it."""

    def __init__(self, fn):
        self.annotations = {}
        super().__init__(fn)

    def process_message(self, msg):
        if msg["type"] == "sample" and "estimator" in msg["infer"]:
            if what := _fixed(msg):
                require_random(msg, None, what)
            where = f"site '{msg['name']}': infer['estimator']"
            self.annotations[msg["name"]] = require_estimator(msg["infer"]["estimator"], where)


class mark_draws(Messenger):
    """Add a number to every draw that has one in ``marks``, so that a jaxpr shows what leads from it."""

    def __init__(self, fn, marks):
        self.marks = marks
        super().__init__(fn)

    def process_message(self, msg):
        if msg["type"] == "sample" and (mark := self.marks.get(msg["name"])) is not None:
            if msg["value"] is None:
                msg["value"] = _any_value(msg["fn"], **msg["kwargs"])
            msg["value"] = msg["value"] + mark.astype(msg["value"].dtype)


def _any_value(fn, rng_key, sample_shape, **kwargs):
    """A value to which all parameters lead."""
    try:
        return fn(rng_key=rng_key, sample_shape=sample_shape)
    except NotImplementedError:  # no sampler, so that a proposal draws
        return jnp.zeros(fn.shape(sample_shape)) + sum(0 * jnp.sum(leaf) for leaf in jax.tree.leaves(fn))
