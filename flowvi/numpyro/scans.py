"""Given values inside NumPyro's ``scan`` and ``cond``.

``scan`` stacks the values of its steps in the order of ``xs``. It takes given values in the order in which the steps run, and so do
NumPyro's tools for a fitted model, such as ``Predictive``. With ``reverse=True`` these orders differ. So values that a reverse scan has
stacked are flipped before a reverse scan gets them.

A branch of ``cond`` reads substituted values, but not replayed ones. So the guide's values are substituted there.

A ``scope`` around a scan or a cond does not act inside it. So the names of the given values lose its prefix there.
"""

from __future__ import annotations

from collections.abc import Container, Mapping
from functools import partial
from types import MappingProxyType
from typing import Any

import jax.numpy as jnp
from numpyro.handlers import replay, scope, substitute
from numpyro.primitives import _PYRO_STACK, Messenger

from flowvi.refusals import refusal


def is_scan(msg: Mapping[str, Any]) -> bool:
    return msg["type"] == "control_flow" and "history" in msg["kwargs"]


def is_reverse_scan(msg: Mapping[str, Any]) -> bool:
    return is_scan(msg) and bool(msg["args"][4])


def is_reversed(site: Mapping[str, Any]) -> bool:
    """Whether a site of a trace is inside a reverse scan; its program ran under :class:`mark_scans`."""
    return bool(site.get("_reversed"))


def is_without_history(site: Mapping[str, Any]) -> bool:
    """Whether a site of a trace is inside ``scan(..., history=0)``, which enumerates nothing; see :func:`is_reversed`."""
    return site.get("_history") == 0


class mark_scans(Messenger):
    """Mark the sites inside scans for :func:`is_reversed` and :func:`is_without_history`."""

    def postprocess_message(self, msg):
        if is_scan(msg):
            _, (steps, _) = msg["value"]
            for site in steps.trace.values():
                site["_reversed"], site["_history"] = is_reverse_scan(msg), msg["kwargs"]["history"]


def prefix_of_scopes(handler: Messenger) -> str:
    """What the ``scope`` handlers inside of a handler put in front of a name."""
    msg: dict[str, Any] = {"type": "sample", "name": "x"}
    for inner in reversed(_PYRO_STACK[_PYRO_STACK.index(handler) + 1 :]):
        if isinstance(inner, scope):
            inner.process_message(msg)
    return msg["name"][:-1]


class hold(substitute):
    """Substitute values.

    Args:
        fn: The program.
        data: The values, by site.
        reverse: The sites whose values a reverse scan has stacked; a site that is in no reverse scan does not matter.
    """

    def __init__(self, fn=None, data: Mapping[str, Any] = MappingProxyType({}), reverse: Container[str] = ()):
        self.reverse = reverse
        super().__init__(fn, data=dict(data))

    def process_message(self, msg):
        if msg["type"] == "control_flow":
            prefix = prefix_of_scopes(self)
            values = partial(self._in_scan, prefix, is_reverse_scan(msg)) if is_scan(msg) else partial(self._in_branch, prefix)
            msg["kwargs"]["substitute_stack"].append(("substitute", values))
        else:
            super().process_message(msg)

    def _in_branch(self, prefix: str, site):
        return self.data.get(prefix + site["name"])

    def _in_scan(self, prefix: str, reverse: bool, site):
        """The values of a site in all steps, in the order in which they run."""
        name = prefix + site["name"]
        value = self.data.get(name)
        if value is None:
            return None
        if jnp.ndim(value) > 1 + len(site["kwargs"]["sample_shape"] + site["fn"].shape()):
            raise refusal(
                name,
                "expected a site inside one scan, found one inside nested scans, where NumPyro cannot hold a value fixed; "
                "use entropy='full' or 'analytic', or write the inner scan as a plate or a loop.",
            )
        return jnp.flip(value, 0) if reverse and name in self.reverse else value


class replay_guide(replay):
    """Replay the guide's values in the model, also in a reverse scan and in the branches of a cond."""

    def __init__(self, fn, trace):
        super().__init__(replay_in_branches(mark_scans(fn)), trace)

    def process_message(self, msg):
        stacked = msg["value"]
        super().process_message(msg)
        if msg["type"] == "control_flow":
            msg["kwargs"]["substitute_stack"].pop()
            msg["kwargs"]["substitute_stack"].append(("replay", self._inside(prefix_of_scopes(self), is_reverse_scan(msg))))
        elif msg.get("_control_flow_done"):  # drawn inside, where it got its value and the shape that fits its distribution
            msg["value"] = stacked

    def _inside(self, prefix: str, reverse: bool) -> dict[str, Any]:
        """The sites with their names inside scopes, and with their values in the order in which the steps of a scan run."""
        found = {}
        for name, site in self.trace.items():
            if name.startswith(prefix):
                inner_name = name.removeprefix(prefix)
                value = jnp.flip(site["value"], 0) if reverse and is_reversed(site) else site["value"]
                found[inner_name] = {**site, "name": inner_name, "value": value}
        return found


class replay_in_branches(Messenger):
    """Let the branches of a cond, also inside the steps of a scan, read the values that are replayed around it."""

    def process_message(self, msg):
        if is_scan(msg):
            step, *others = msg["args"]
            msg["args"] = (replay_in_branches(step), *others)
        elif msg["type"] == "control_flow":
            msg["kwargs"]["substitute_stack"] = _Substituted(msg["kwargs"]["substitute_stack"])


class _Substituted(list):
    """What a cond substitutes in its branches. It would ignore a trace to replay, so the values of the trace are substituted."""

    def append(self, entry):
        kind, values = entry
        super().append(("substitute", partial(_replayed, values)) if kind == "replay" else entry)


def _replayed(trace: Mapping[str, Any], site: Mapping[str, Any]) -> Any:
    """The value of a site of the model in the trace of the guide."""
    drawn = trace.get(site["name"]) if site["type"] == "sample" and not site["is_observed"] else None
    return None if drawn is None else drawn["value"]
