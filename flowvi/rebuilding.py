"""The parameters of a distribution by name, and the same distribution with other values of them; of either host."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from copy import copy
from inspect import signature
from typing import Any, NamedTuple


class Parameter(NamedTuple):
    """The value of a parameter, and the constraint that it fulfils."""

    value: Any
    constraint: Any = None


def parameters(p: Any, wanted: Collection[str] = ()) -> dict[str, Parameter]:
    """Each parameter of ``p`` by its full name, such as ``"component_distribution.loc"``.

    Of alternatives, such as probs and logits, it has the ``wanted`` one, or the one from which ``p`` was built.
    """
    return dict(_named("", p, wanted))


def rebuilt(p: Any, changed: Mapping[str, Any]) -> Any:
    """A distribution like ``p`` with ``changed`` parameters, by their full names.

    Raises:
        TypeError: Its constructor does not take what it holds.
    """
    return _rebuilt("", p, changed)


def _named(prefix: str, p: Any, wanted: Collection[str]) -> Iterator[tuple[str, Parameter]]:
    for name, value in _arguments(prefix, p, wanted).items():
        if hasattr(value, "log_prob"):
            yield from _named(_prefix(prefix, name), value, wanted)
        elif isinstance(value, list | tuple):
            for i, item in enumerate(value):
                if hasattr(item, "log_prob"):
                    yield from _named(f"{prefix}{name}[{i}].", item, wanted)
        elif name in p.arg_constraints and not _is_discrete(p.arg_constraints[name]):
            yield prefix + name, Parameter(value, p.arg_constraints[name])


def _rebuilt(prefix: str, p: Any, changed: Mapping[str, Any]) -> Any:
    def new(name: str, value: Any) -> Any:
        if hasattr(value, "log_prob"):
            return _rebuilt(_prefix(prefix, name), value, changed)
        if isinstance(value, list | tuple):
            return type(value)(
                _rebuilt(f"{prefix}{name}[{i}].", item, changed) if hasattr(item, "log_prob") else item for i, item in enumerate(value)
            )
        return changed.get(prefix + name, value)

    arguments = {name: new(name, value) for name, value in _arguments(prefix, p, changed).items()}
    if _is_wrapper(p):
        other = copy(p)
        other.__dict__.update(arguments)
        return other
    try:
        return type(p)(**arguments)
    except TypeError as error:
        raise TypeError(
            f"{type(p).__name__} cannot be built again from {', '.join(arguments)} ({error}); give a function of its parameters."
        ) from error


def _arguments(prefix: str, p: Any, wanted: Collection[str]) -> dict[str, Any]:
    """The arguments from which ``p`` can be built again: its parameters and the distributions inside it."""
    if _is_wrapper(p):
        return {"base_dist": p.base_dist}
    accepted = {
        name: a for name, a in signature(type(p).__init__).parameters.items() if name not in ("self", "validate_args", "support")
    }
    ways = [name for name, a in accepted.items() if a.default is None]  # such as probs and logits, of which one is given
    candidates = (*(name for name in ways if prefix + name in wanted), *vars(p), *ways)
    given = next((name for name in candidates if name in ways), None)
    return {name: getattr(p, name) for name in accepted if (name not in ways or name == given) and hasattr(p, name)}


def _is_wrapper(p: Any) -> bool:
    """Independent, expanded, masked, transformed: what has no parameters of its own here."""
    return not p.arg_constraints and "base_dist" in vars(p)


def _prefix(prefix: str, name: str) -> str:
    return prefix if name == "base_dist" else f"{prefix}{name}."


def _is_discrete(constraint: Any) -> bool:
    try:
        return constraint.is_discrete
    except NotImplementedError:  # of a constraint that depends on the other parameters
        return False
