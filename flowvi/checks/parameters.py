"""From the arguments of :func:`flowvi.check_estimator` to a function of the parameters to check."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from flowvi.host import Host
from flowvi.rebuild import Parameter, parameters, rebuild

Build = Callable[[Mapping[str, Any]], Any]  # from the values of all parameters by name

LOWER = ("_LowerCholesky", "_LowerTriangular", "_ScaledUnitLowerCholesky", "_SoftplusLowerCholesky")
SYMMETRIC = ("_PositiveDefinite", "_PositiveSemiDefinite", "_CorrMatrix")


def as_function(distribution: Any, names: Sequence[str] | Mapping[str, Any] | None) -> tuple[Build, dict[str, Parameter]]:
    """How to build the distribution from the parameters to check, and their values."""
    if not hasattr(distribution, "log_prob"):
        if not callable(distribution) or not isinstance(names, Mapping) or not names:
            raise TypeError(
                "check_estimator: expected a distribution, or a function with its arguments by name, such as "
                f"check_estimator(f, estimator, {{'loc': 0.3}}); found {distribution!r} with {names!r}."
            )
        return lambda values: distribution(**values), {name: Parameter(value) for name, value in names.items()}
    found = parameters(distribution)
    chosen = list(found) if names is None else [names] if isinstance(names, str) else list(names)
    if unknown := [name for name in chosen if name not in found]:
        raise TypeError(
            f"check_estimator: {type(distribution).__name__} has no parameter {unknown}; its parameters are: {', '.join(found)}."
        )
    if not chosen:
        raise TypeError(f"check_estimator: {type(distribution).__name__} has no parameter to check; give a function and its arguments.")
    return lambda values: rebuild(distribution, values), {name: found[name] for name in chosen}


def require_same(host: Host, p: Any, again: Any) -> None:
    """Refuse a class that its parameters do not determine: ``again`` is p, built again."""
    others = parameters(again)
    for name, parameter in parameters(p).items():
        if not np.array_equal(host.numpy(parameter.value), host.numpy(others[name].value)):
            raise TypeError(
                f"check_estimator: {type(p).__name__} cannot be built again from its parameters, because its {name} changes; "
                "give a function of the parameters: check_estimator(lambda loc: ..., estimator, {'loc': 0.3})."
            )


def directions(name: str, parameter: Parameter) -> Iterator[tuple[str, np.ndarray]]:
    """The directions in which a parameter may move within its constraint, each with a label."""
    constraint = parameter.constraint
    while hasattr(constraint, "base_constraint"):
        constraint = constraint.base_constraint
    kind = type(constraint).__name__
    shape = np.shape(parameter.value)
    for index in np.ndindex(shape):
        e = np.zeros(shape)
        e[index] = 1.0
        if kind == "_Simplex":
            if index[-1] == shape[-1] - 1:
                continue
            e[(*index[:-1], -1)] = -1.0
        elif kind in LOWER + SYMMETRIC:
            if index[-1] > index[-2]:
                continue
            if kind in SYMMETRIC:
                e[(*index[:-2], index[-1], index[-2])] = 1.0
        yield (f"{name}[{','.join(map(str, index))}]" if shape else name), e
