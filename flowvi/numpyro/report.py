"""``gradient_report`` for NumPyro."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from time import perf_counter
from typing import Any

import jax
import numpyro
from jax import random
from jax.flatten_util import ravel_pytree
from numpyro.infer import SVI
from numpyro.ops.provenance import eval_provenance

from flowvi.assignment import Estimators
from flowvi.entropy import held_values
from flowvi.estimators import Auto, Estimator
from flowvi.numpyro.elbo import TraceFlow_ELBO
from flowvi.numpyro.host import HOST, as_found
from flowvi.numpyro.learning import adaptive
from flowvi.numpyro.run import NumPyroProgram
from flowvi.progress import Bar
from flowvi.report import Candidates, GradientReport, Measured, compare, require_measurable

BATCH = 100


def gradient_report(
    model: Callable[..., Any],
    guide: Callable[..., Any],
    *args: Any,
    estimators: Candidates = None,
    default: Estimator = Auto(),  # noqa: B008
    num_samples: int = 1000,
    params: dict[str, Any] | None = None,
    rng_key: jax.Array | None = None,
    progress_bar: bool = False,
    options: Mapping[str, Any] | None = None,
    **kwargs: Any,
) -> GradientReport:
    r"""Measure the noise of the gradient: its mean and variance in each parameter, over many samples.

    The loss is :class:`TraceFlow_ELBO`, with the u and psi of each site's estimator. Gradients are taken in the unconstrained
    parameters, as the optimizer sees them.

    **Requirements**: those of the estimators. Mutable state is that of ``SVI.init``.

    Args:
        model: The model.
        guide: The guide.
        *args: Passed to both.
        estimators: As for :class:`TraceFlow_ELBO`; or a mapping from labels to these, to compare candidates side by side.
        default: The estimator of a site for which none is given.
        num_samples: The number of samples of the gradient. Each averages over the particles of the loss.
        params: Values of the (constrained) parameters, for instance ``svi_result.params``; their initial values by default. They
            include what estimators learn, which stays fixed.
        rng_key: The random key; every candidate gets the same one.
        progress_bar: Whether to show a progress bar.
        options: Further options of :class:`TraceFlow_ELBO`, for instance ``{"num_particles": 4}``.
        **kwargs: Passed to model and guide.

    Returns:
        A :class:`flowvi.report.GradientReport`, which prints as a table.

    Raises:
        TypeError: The model or the guide is not a function, or does not take an option of the objective.
        ValueError: Naming the site; see the estimators. Fewer than two samples; ``particles="fixed"``, whose gradient has no noise.

    Example:
        >>> import numpyro, numpyro.distributions as dist
        >>> from flowvi import LR, RP
        >>> from flowvi.numpyro import gradient_report
        >>> def model():
        ...     x = numpyro.sample("x", dist.Normal(0.0, 1.0))
        ...     numpyro.sample("y", dist.Normal(x, 0.8), obs=1.1)
        >>> def guide():
        ...     numpyro.sample("x", dist.Normal(numpyro.param("m", 0.2), 0.7))
        >>> report = gradient_report(model, guide, estimators={"LR": {"x": LR()}, "RP": {"x": RP()}}, num_samples=500)
        >>> lr, rp = report.parameters
        >>> lr.sites, lr.std > rp.std
        (('x',), True)

    References:
        Parmas and Sugiyama 2021, eq. 19.
    """
    require_measurable(TraceFlow_ELBO.__init__, model, guide, kwargs, num_samples, options or {})
    key = random.key(0) if rng_key is None else rng_key

    def measure(choice: Estimators) -> Measured:
        elbo = TraceFlow_ELBO(estimators=choice, default=default, **(options or {}))
        svi = SVI(model, adaptive(guide, elbo, model, rng_key=key), numpyro.optim.SGD(1.0), elbo)
        state = svi.init(key, *args, init_params=params, **kwargs)
        unconstrained, mutable_state = svi.optim.get_params(state.optim_state), state.mutable_state or {}
        constrained = svi.constrain_fn(unconstrained) | mutable_state

        def run(key, params=constrained):
            return elbo._run(NumPyroProgram(key, params, model, guide, args, kwargs))

        learned = run(key).sites.learned
        of_program = {name: value for name, value in unconstrained.items() if name not in learned}

        def gradient(key):
            def loss(of_program):
                params = svi.constrain_fn(unconstrained | of_program) | mutable_state
                return svi.loss.loss(key, params, model, guide, *args, **kwargs)

            return {name: g if isinstance(g, jax.Array) else ravel_pytree(g)[0] for name, g in jax.grad(loss)(of_program).items()}

        def log_weights(key):
            return {name: draw.log_weight for name, draw in run(key).draws.items() if draw.log_weight is not None}

        description = elbo._describe(model, guide, args, kwargs, params, key)
        measured = Measured(description, _readers(run, key, {name: constrained[name] for name in of_program}, constrained))
        size = min(BATCH, num_samples)
        gradient, log_weights = jax.jit(jax.vmap(gradient)), jax.jit(jax.vmap(log_weights))
        jax.block_until_ready(gradient(random.split(key, size)))  # compiled before it is timed
        for begin in Bar(range(0, num_samples, size), unit="batches", disable=not progress_bar, desc="gradients"):
            keys = random.split(random.fold_in(key, begin), size)[: num_samples - begin]
            start = perf_counter()
            gradients = jax.block_until_ready(gradient(keys))
            measured.seconds += perf_counter() - start
            measured.add(gradients, log_weights(keys))
        return measured

    with as_found(model, guide, args, kwargs, estimators, default, options):
        return compare(estimators, measure, num_samples)


def _readers(run, key, params, constrained) -> dict[str, tuple[str, ...]]:
    """For each parameter, the sites whose distribution depends on it at fixed values of all sites."""
    first = run(key)
    values = held_values(HOST, first)

    def distributions(**params):
        again = run(key, constrained | params).again(values, with_model=False)
        return {name: jax.tree.leaves(again.guide[name].fn) for name in values}

    try:
        found = eval_provenance(distributions, **params)
    except ValueError:  # a site inside nested scans; the report leaves its sites out
        found = {}
    read = {name: frozenset().union(*names) for name, names in found.items()}
    return {parameter: tuple(name for name, names in read.items() if parameter in names) for parameter in params}
