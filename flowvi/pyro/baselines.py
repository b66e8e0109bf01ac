"""Pyro's own annotation of a baseline: ``infer={"baseline": {...}}``, as for its ``TraceGraph_ELBO``."""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from typing import Any

import pyro
import torch
from pyro.distributions.util import detach

from flowvi.baselines import Fitted, MakeScores, Score, SiteCosts, make_score, require_plate_shape
from flowvi.ops import Ops

OPTIONS = {"nn_baseline", "nn_baseline_input", "use_decaying_avg_baseline", "baseline_beta", "baseline_value"}


def require_baseline_options(name: str, options: dict[str, Any]) -> None:
    if unknown := sorted(set(options) - OPTIONS):
        raise ValueError(f"site '{name}': infer['baseline'] has no option {unknown}; the options are: {', '.join(sorted(OPTIONS))}.")
    if options.get("nn_baseline") is not None and options.get("baseline_value") is not None:
        raise ValueError(f"site '{name}': infer['baseline'] takes nn_baseline or baseline_value, found both; remove one.")


def annotated_baselines(guide_trace, names: Iterable[str]) -> dict[str, MakeScores]:
    """The baselines that the guide annotates at the sites of these names."""
    infer = {name: guide_trace.nodes[name]["infer"] for name in names}
    return {name: partial(_annotated, of_site["baseline"]) for name, of_site in infer.items() if of_site.get("baseline")}


def _annotated(options: dict[str, Any], ops: Ops, costs: SiteCosts) -> tuple[Score, ...]:
    score = make_score(ops, *costs[:4])
    return (score._replace(baseline=Fitted(_value(costs.name, options, score.cost))),)


def _value(name: str, options: dict[str, Any], cost: torch.Tensor) -> torch.Tensor:
    """The baseline of a site whose score multiplies ``cost``. It updates the decaying average of the costs, except under ``no_grad``.

    Args:
        name: The site's name; the average is the parameter ``__baseline_avg_downstream_cost_<name>``, where Pyro keeps it.
        options: The dict at the site.
        cost: The detached costs of one run, in the shape of the site's plates.
    """
    baseline = torch.zeros_like(cost)
    if options.get("use_decaying_avg_baseline"):
        parameter, beta = f"__baseline_avg_downstream_cost_{name}", options.get("baseline_beta", 0.9)
        update = torch.is_grad_enabled()
        with torch.no_grad():
            baseline = pyro.param(parameter, baseline)
            require_plate_shape(name, baseline, cost.shape)
            if update:
                pyro.get_param_store()[parameter] = (1 - beta) * cost + beta * baseline
    fitted = options.get("baseline_value")
    if (network := options.get("nn_baseline")) is not None:
        fitted = network(detach(options["nn_baseline_input"]))
    if fitted is not None:
        fitted = torch.as_tensor(fitted)
        require_plate_shape(name, fitted, cost.shape)
        baseline = baseline + fitted
    return baseline.expand(cost.shape)
