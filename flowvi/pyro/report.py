"""``gradient_report`` for Pyro."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from functools import partial
from time import perf_counter
from typing import Any

import torch
from pyro import poutine
from pyro.util import warn_if_nan

from flowvi.assignment import Estimators
from flowvi.entropy import held_values
from flowvi.estimators import Auto, Estimator
from flowvi.progress import Bar
from flowvi.pyro.elbo import TraceFlow_ELBO
from flowvi.pyro.generators import seed_generators
from flowvi.pyro.host import HOST, as_found
from flowvi.pyro.module import unconstrained
from flowvi.pyro.run import PyroProgram
from flowvi.report import Candidates, GradientReport, Measured, compare, require_measurable
from flowvi.run import Run


def gradient_report(
    model: Callable[..., Any],
    guide: Callable[..., Any],
    *args: Any,
    estimators: Candidates = None,
    default: Estimator = Auto(),  # noqa: B008
    num_samples: int = 1000,
    seed: int = 0,
    progress_bar: bool = False,
    options: Mapping[str, Any] | None = None,
    **kwargs: Any,
) -> GradientReport:
    r"""Measure the noise of the gradient: its mean and variance in each parameter, over many samples.

    The loss is :class:`TraceFlow_ELBO`, with the u and psi of each site's estimator. Gradients are taken in the unconstrained
    parameters, as the optimizer sees them.

    **Requirements**: those of the estimators. The parameters, also those that estimators learn, are read from the parameter store.

    Args:
        model: The model.
        guide: The guide.
        *args: Passed to both.
        estimators: As for :class:`TraceFlow_ELBO`; or a mapping from labels to these, to compare candidates side by side.
        default: The estimator of a site for which none is given.
        num_samples: The number of samples of the gradient. Each averages over the particles of the loss.
        seed: The seed of every candidate; the state of torch's generator is restored.
        progress_bar: Whether to show a progress bar.
        options: Further options of :class:`TraceFlow_ELBO`, for instance ``{"num_particles": 4}``.
        **kwargs: Passed to model and guide.

    Returns:
        A :class:`flowvi.report.GradientReport`, which prints as a table.

    Raises:
        TypeError: The model or the guide is not a function, or does not take an option of the objective.
        ValueError: Naming the site; see the estimators. Fewer than two samples; ``particles="fixed"``, whose gradient has no noise.

    Example:
        >>> import pyro, torch, pyro.distributions as dist
        >>> from flowvi import LR, RP
        >>> from flowvi.pyro import gradient_report
        >>> def model():
        ...     x = pyro.sample("x", dist.Normal(0.0, 1.0))
        ...     pyro.sample("y", dist.Normal(x, 0.8), obs=torch.tensor(1.1))
        >>> def guide():
        ...     pyro.sample("x", dist.Normal(pyro.param("m", torch.tensor(0.2)), 0.7))
        >>> pyro.clear_param_store()
        >>> report = gradient_report(model, guide, estimators={"LR": {"x": LR()}, "RP": {"x": RP()}}, num_samples=500)
        >>> lr, rp = report.parameters
        >>> lr.sites, lr.std > rp.std
        (('x',), True)
        >>> pyro.clear_param_store()

    References:
        Parmas and Sugiyama 2021, eq. 19.
    """
    require_measurable(TraceFlow_ELBO.__init__, model, guide, kwargs, num_samples, options or {})

    def measure(choice: Estimators) -> Measured:
        elbo = TraceFlow_ELBO(estimators=choice, default=default, **(options or {}))
        description = elbo._describe(model, guide, args, kwargs)
        program = partial(PyroProgram, model, guide, args, kwargs, elbo)
        with poutine.trace(param_only=True) as used:
            seed_generators(seed)
            run = elbo._run(program())
            nodes = used.trace.nodes
            parameters: dict[str, Any] = {name: nodes[name]["value"] for name in nodes if name not in run.sites.learned}
            leaves = {name: unconstrained(parameter) for name, parameter in parameters.items()}
            weighted = any(draw.log_weight is not None for draw in run.draws.values())
            measured = Measured(description, _readers(run, leaves))
            for _ in Bar(range(num_samples), unit="samples", disable=not progress_bar, desc="gradients"):
                start = perf_counter()
                gradients = _gradients(elbo._losses(model, guide, args, kwargs), list(leaves.values()))
                rows = {name: gradient[None].cpu() for name, gradient in zip(leaves, gradients, strict=True)}
                measured.seconds += perf_counter() - start  # after the numbers have arrived: calls to a GPU return earlier
                measured.add(rows, {})
                if weighted:
                    draws = elbo._run(program()).draws
                    measured.add({}, {name: d.log_weight[None].cpu() for name, d in draws.items() if d.log_weight is not None})
        return measured

    with as_found(model, guide, args, kwargs, estimators, default, options):
        return compare(estimators, measure, num_samples)


def _gradients(losses: Iterable[torch.Tensor], leaves: list[torch.Tensor]) -> list[torch.Tensor]:
    """The derivative of the sum of losses in each leaf. The graph of each loss is freed before the next one is computed."""
    gradients = [torch.zeros_like(leaf) for leaf in leaves]
    for loss in losses:
        warn_if_nan(loss.detach(), "loss")
        if loss.requires_grad:
            for gradient, of_one in zip(gradients, torch.autograd.grad(loss, leaves, materialize_grads=True), strict=True):
                gradient += of_one
    return gradients


def _readers(run: Run, leaves: dict[str, torch.Tensor]) -> dict[str, tuple[str, ...]]:
    """For each parameter, the sites whose distribution depends on it at fixed values of all sites."""
    values = held_values(HOST, run)
    again = run.again(values, with_model=False)
    readers: dict[str, tuple[str, ...]] = dict.fromkeys(leaves, ())
    for site in values:
        density: Any = again.guide[site].log_density
        log_prob = density.sum()
        if log_prob.requires_grad:
            gradients = torch.autograd.grad(log_prob, list(leaves.values()), allow_unused=True, retain_graph=True)
            for name, gradient in zip(leaves, gradients, strict=True):
                readers[name] += () if gradient is None else (site,)
    return readers
