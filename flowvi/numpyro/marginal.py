"""NumPyro's enumeration: runs a model with the values of each marginalised site along a separate dim, and sums these dims out."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import jax
import jax.numpy as jnp
from numpyro.distributions import ExpandedDistribution, MaskedDistribution
from numpyro.handlers import substitute
from numpyro.primitives import Messenger

from flowvi.dependence import Frame
from flowvi.marginal import Factor
from flowvi.numpyro.scans import is_reversed, is_scan, is_without_history, mark_scans
from flowvi.refusals import SUMMED_OUT, refusal


def require_funsor(site: str) -> None:
    """Refuse to sum out a site if funsor is not installed."""
    try:
        import funsor  # noqa: F401
    except ImportError as error:
        raise ImportError(
            f"site '{site}': expected funsor, with which NumPyro sums a site out, but it is not installed; "
            "pip install 'flowvi[enum]', or draw the site in the guide."
        ) from error


@contextmanager
def funsor_with_jax() -> Iterator[None]:
    """Let funsor compute with JAX, which NumPyro needs. funsor has one backend at a time, and Pyro may have chosen torch."""
    import funsor

    before = funsor.get_backend()
    funsor.set_backend("jax")
    try:
        yield
    finally:
        if before == "torch":
            funsor.set_backend(before)


def enumerated_trace(
    model, args: tuple, kwargs: Mapping[str, Any], params: Mapping[str, Any], max_plate_nesting: int
) -> dict[str, Any]:
    """The sample sites of a model that runs under NumPyro's ``enum``."""
    from numpyro.contrib.funsor import enum, plate_to_enum_plate, trace

    program = trace(mark_scans(copy_annotations(substitute(model, data=params))))
    with plate_to_enum_plate(), take_values_of_support(), enum(first_available_dim=-1 - max_plate_nesting):
        found = program.get_trace(*args, **kwargs)
    return {name: site for name, site in found.items() if site["type"] == "sample"}


class copy_annotations(Messenger):
    """Give each site its own copy of ``infer``: NumPyro's enumeration writes to it, and several sites may share one dict."""

    def process_message(self, msg):
        if msg["type"] == "sample":
            msg["infer"] = dict(msg["infer"])
        elif is_scan(msg):  # whose steps handlers do not reach
            step, *others = msg["args"]
            msg["args"] = (copy_annotations(step), *others)


class take_values_of_support(Messenger):
    """Give an enumerated site the values of its support; ``enum`` gives it their indices. A scan without history runs as always.

    Such a scan enumerates nothing, but under ``enum`` NumPyro asks its sites for names of dims that they do not have.
    """

    def process_message(self, msg):
        if is_scan(msg) and msg["kwargs"]["history"] == 0:
            msg["kwargs"]["enum"] = False
        if msg["type"] == "sample" and is_enumerated(msg):
            support = msg["fn"].enumerate_support(expand=False)
            msg["value"] = support.reshape((support.shape[0], *msg["fn"].event_shape))[msg["value"]]


def is_enumerated(site: Mapping[str, Any]) -> bool:
    """Whether ``enum`` has given the site its value."""
    return bool(site.get("done")) and not site["is_observed"] and site["infer"].get("enumerate") == "parallel"


def log_density_of(site: Mapping[str, Any]) -> jax.Array:
    """The unscaled log density of a site; for an enumerated site it is not masked."""
    fn = site["fn"]
    if is_enumerated(site):
        while isinstance(fn, MaskedDistribution | ExpandedDistribution):
            fn = fn.base_dist
        fn = fn.expand(site["fn"].batch_shape)
    return fn.log_prob(site["value"], site["intermediates"]) if site["intermediates"] else fn.log_prob(site["value"])


def factors_of(sites: Mapping[str, Any], marginalised: Sequence[str], log_densities: Mapping[str, jax.Array]) -> list[Factor]:
    """The statements of an enumerated trace that depend on its marginalised sites."""
    import funsor

    factors = []
    for name, site in sites.items():
        log_density, names = log_densities[name], site["infer"]["dim_to_name"]
        if is_without_history(site):  # all steps read the same values of the sites outside; NumPyro names neither steps nor plates
            log_density = log_density.sum(0)
            plates = {frame.dim: frame.name for frame in site["cond_indep_stack"]}
            names = {dim: plates.get(dim, of_dim) for dim, of_dim in names.items() if -dim <= log_density.ndim}
        if is_reversed(site):  # contract the steps in the order in which they run
            log_density = jnp.flip(log_density, [dim for dim, of_dim in names.items() if of_dim.startswith("_time_")])
        named = funsor.to_funsor(log_density if names else log_density.reshape(()), output=funsor.Real, dim_to_name=names)
        dims = (frozenset(named.inputs) | {name}) & frozenset(marginalised)
        if dims:
            dims = dims.union(map(unshifted, dims))  # z at one step of a scan is _PREV_z at the next step
            frames = frozenset(Frame(*f) for f in site["cond_indep_stack"])
            own_dim = unshifted(name) if name in marginalised else None
            factors.append(Factor(name, frames, dims, named, own_dim, unshifted(name)))
    return factors


def contract(component: Sequence[Factor], frames: frozenset[Frame]) -> jax.Array:
    """The ``contract`` of :func:`flowvi.marginal.with_marginals`, by funsor's tensor variable elimination."""
    import funsor
    import funsor.optimizer

    dims = frozenset().union(*(factor.dims for factor in component))
    log_densities = _without_steps(component, dims)
    plates = frozenset().union(*(log_density.inputs for log_density in log_densities)) - dims
    with funsor.interpretations.normalize:
        marginal = funsor.sum_product.sum_product(
            funsor.ops.logaddexp,
            funsor.ops.add,
            tuple(log_densities),
            plates=plates,
            eliminate=dims | plates.difference(frame.name for frame in frames),
        )
    return funsor.to_data(funsor.optimizer.apply_optimizer(marginal), name_to_dim={frame.name: frame.dim for frame in frames})


def _without_steps(component: Sequence[Factor], dims: frozenset[str]) -> list[Any]:
    """The log densities of a component. Those inside ``scan`` are contracted over its steps, if the steps depend on earlier ones.

    NumPyro names the dim of the steps ``_time_...``, and the state t steps earlier with t times ``_PREV_``.
    """
    import funsor
    from numpyro.contrib.funsor.infer_util import compute_markov_factors

    steps: dict[Any, list[Any]] = {}
    rest: list[Any] = []
    outside = []  # the marginalised sites with one value in all steps
    for factor in component:
        inputs = factor.log_density.inputs
        time = next((funsor.Variable(name, inputs[name]) for name in inputs if name.startswith("_time_")), None)
        (rest if time is None else steps.setdefault(time, [])).append(factor.log_density)
        outside += [factor] if time is None and factor.own_dim is not None else []
    earlier, states, history = {}, {}, 1
    for time, inside in list(steps.items()):
        names = frozenset().union(*(log_density.inputs for log_density in inside))
        earlier[time] = frozenset(name for name in names if name.startswith("_PREV_"))
        if not earlier[time]:  # the steps are independent, like the elements of a plate
            rest += steps.pop(time)
            continue
        current = {unshifted(name) for name in earlier[time]}
        read = [factor for factor in outside if factor.name in names]
        of_chain = (factor.log_density.inputs for factor in component if factor.name in current)
        states[time] = earlier[time].union((factor.name for factor in read), *of_chain)
        for factor in read:
            if left := sorted(frame.name for frame in factor.frames if frame.size > 1 and frame.name not in states[time]):
                raise refusal(
                    factor.label or factor.name,
                    f"expected a site that a scan reads to be outside of the plate '{left[0]}', or the chain of the scan to be in this "
                    "plate too, if both are summed out; draw the site in the guide.",
                    SUMMED_OUT,
                )
        history = max(history, *(name.count("_PREV_") for name in earlier[time]))
    if not steps:
        return rest
    plates = frozenset(frame.name for factor in component for frame in factor.frames)
    return rest + compute_markov_factors(steps, earlier, states, dims, plates, history, funsor.ops.logaddexp, funsor.ops.add)


def unshifted(name: str) -> str:
    """The model's name of a site in an enumerated ``scan``, in which the first steps have other names."""
    while name.startswith("_PREV_"):
        name = name.removeprefix("_PREV_")
    return name
