"""Sites of the model that the host sums out: which statements are contracted together, and the resulting cost.

A statement whose log density depends on the value of a marginalised site z is a *factor*. Factors that share such sites, directly or
through other factors, form a *component*. The host contracts a component to

    log sum_z prod_j exp(f_j),

once for each element of the plates that all of its statements share; over the other plates the contraction multiplies. The component is
one cost, which depends on every site on which one of its statements depends.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from flowvi.dependence import Frame
from flowvi.ops import Array, Ops
from flowvi.refusals import SUMMED_OUT, refusal
from flowvi.run import Statement


class Factor(NamedTuple):
    """The log density of a statement that depends on marginalised sites.

    Attributes:
        name: The name of the statement.
        frames: Its plates.
        dims: The marginalised sites on which it depends, including itself if it is one, by the names of the host's dims.
        log_density: Masked but not scaled, in the form that the host contracts. For a marginalised site it is not masked, so its
            probabilities always add up to 1.
        own_dim: If it is a marginalised site, the one of ``dims`` along which its values lie.
        label: The program's own name of the statement, for messages; None for ``name``.
    """

    name: str
    frames: frozenset[Frame]
    dims: frozenset[str]
    log_density: Any
    own_dim: str | None = None
    label: str | None = None


Contract = Callable[[Sequence[Factor], frozenset[Frame]], Array]


def with_marginals(
    ops: Ops, model: Mapping[str, Statement], marginalised: Sequence[str], factors: Sequence[Factor], contract: Contract
) -> dict[str, Statement]:
    """The statements of a model, with the log density of each component at the first of its marginalised sites.

    Args:
        ops: The operations of the backend.
        model: The statements of the model, its marginalised sites enumerated.
        marginalised: The marginalised sites.
        factors: The statements that depend on them.
        contract: ``contract(component, frames)`` sums out all dims of a component's factors, and multiplies over all plates but
            ``frames``; returns an array whose batch dims are those of ``frames``.

    Raises:
        ValueError: Statements of a component have different scales, so no scale of the marginal density is right; or a statement
            outside a plate depends on a site inside.
    """
    statements = dict(model)
    _require_plates(factors)
    for component in _components(factors):
        names = tuple(dict.fromkeys(factor.name for factor in component))
        scale = _common_scale(ops, [(factor.label or factor.name, model[factor.name].scale) for factor in component])
        frames = frozenset.intersection(*(factor.frames for factor in component))
        log_density = contract(component, frames)
        statements |= {name: model[name].with_log_density(None) for name in names}
        site = next(name for name in marginalised if name in names)
        statements[site] = statements[site]._replace(
            frames=frames,
            steps=frozenset.intersection(*(model[name].steps for name in names)),
            log_density=log_density if scale is None else log_density * scale,
            scale=scale,
            parts=names,
        )
    return statements


def _components(factors: Sequence[Factor]) -> list[list[Factor]]:
    """The factors in groups that share no dims."""
    components: list[tuple[set[str], list[Factor]]] = []
    for factor in factors:
        joined = [component for component in components if not component[0].isdisjoint(factor.dims)]
        components = [component for component in components if component not in joined]
        dims = set(factor.dims).union(*(dims for dims, _ in joined))
        components.append((dims, [*(member for _, members in joined for member in members), factor]))
    return [members for _, members in components]


def _require_plates(factors: Sequence[Factor]) -> None:
    """Refuse a statement outside a plate that depends on a site inside: the hosts would give all elements the same value."""
    owners = {factor.own_dim: factor for factor in factors if factor.own_dim is not None}
    for factor in factors:
        for site in (owners[dim] for dim in sorted(factor.dims) if dim in owners):
            if left := sorted(frame.name for frame in site.frames - factor.frames if frame.size > 1):
                raise refusal(
                    factor.label or factor.name,
                    f"expected it inside the plate '{left[0]}', because it depends on '{site.label or site.name}', which is summed out "
                    f"there; move the statement into the plate, or draw '{site.label or site.name}' in the guide.",
                    SUMMED_OUT,
                )


def _common_scale(ops: Ops, scales: Sequence[tuple[str, Any]]) -> Any:
    """The scale of all statements of a component, given with their names."""
    first_name, common = scales[0]
    first = 1.0 if common is None else common
    for name, given in scales:
        scale = 1.0 if given is None else given
        require_number(name, scale)
        if not ops.is_known_equal(first, scale):
            found = f"found {first} at '{first_name}' and {scale} at '{name}'"
            _refuse(name, f"{found}; put the same scale, or the same subsampled plate, around all of them")
    return common


def require_number(name: str, scale: Any) -> None:
    """Refuse an array as the scale of a statement that is summed out."""
    if shape := getattr(scale, "shape", ()):
        _refuse(name, f"found a scale of shape {tuple(shape)}; give one number, or mask the statement")


def _refuse(name: str, found: str):
    raise refusal(name, f"expected one scale for all statements that are summed out together, {found}.", SUMMED_OUT)
