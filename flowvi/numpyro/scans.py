"""Given values inside NumPyro's ``scan``.

``scan`` stacks the values of its steps in the order of ``xs``. It takes given values in the order in which the steps run, and so do
NumPyro's tools for a fitted model, such as ``Predictive``. With ``reverse=True`` these orders differ. So values that a reverse scan has
stacked are flipped before a reverse scan gets them.
"""

from __future__ import annotations

from collections.abc import Container, Mapping
from functools import partial
from types import MappingProxyType
from typing import Any

import jax.numpy as jnp
from numpyro.handlers import replay, substitute
from numpyro.primitives import Messenger

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
        if is_scan(msg):
            msg["kwargs"]["substitute_stack"].append(("substitute", partial(self._in_scan, is_reverse_scan(msg))))
        else:
            super().process_message(msg)

    def _in_scan(self, reverse: bool, site):
        """The values of a site in all steps, in the order in which they run."""
        value = self.data.get(site["name"])
        if value is None:
            return None
        if jnp.ndim(value) > 1 + len(site["kwargs"]["sample_shape"] + site["fn"].shape()):
            raise refusal(
                site["name"],
                "expected a site inside one scan, found one inside nested scans, where NumPyro cannot hold a value fixed; "
                "use entropy='full' or 'analytic', or write the inner scan as a plate or a loop.",
            )
        return jnp.flip(value, 0) if reverse and site["name"] in self.reverse else value


class replay_guide(replay):
    """Replay the guide's values in the model: in a reverse scan, too, a step has the density of the value that it gets."""

    def __init__(self, fn, trace):
        super().__init__(mark_scans(fn), trace)

    def process_message(self, msg):
        value = msg["value"]
        super().process_message(msg)
        if is_reverse_scan(msg):
            flipped = {name: {**site, "value": jnp.flip(site["value"], 0)} for name, site in self.trace.items() if is_reversed(site)}
            msg["kwargs"]["substitute_stack"][-1] = ("replay", {**self.trace, **flipped})
        elif "_history" in msg:  # the scan has stacked the value
            msg["value"] = value
