"""A distribution built again with other parameters; its arguments come from the signature of its class."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from copy import copy
from functools import lru_cache
from inspect import signature
from typing import Any, NamedTuple


class Parameter(NamedTuple):
    """The value of a parameter, and its constraint."""

    value: Any
    constraint: Any = None


def rebuild(p: Any, changed: Mapping[str, Any], *, validate: bool | None = None) -> Any:
    """A distribution like ``p`` with other parameters.

    Args:
        p: A distribution of either host.
        changed: The new values by name. A parameter of a part has a longer name, as in :func:`parameters`.
        validate: Whether the new distribution validates its arguments; None leaves that to the host.

    Raises:
        TypeError: The class of ``p`` cannot be called with the arguments in its signature.

    Example:
        >>> import numpyro.distributions as dist
        >>> rebuild(dist.Normal(0.5, 2.0).expand([3]), {"scale": 4.0}).variance.tolist()
        [16.0, 16.0, 16.0]
    """
    return _rebuilt("", p, changed, validate)


def build(family: type, values: Mapping[str, Any]) -> Any:
    """A distribution of a class from all of its parameters, which are not validated."""
    return family(**values, validate_args=False)


def parameters(p: Any, wanted: Collection[str] = ()) -> dict[str, Parameter]:
    """Every continuous parameter of a distribution and of the distributions inside it, by its full name.

    Of alternatives such as probs and logits it has only one: the ``wanted`` one, or the one that was given.

    Example:
        >>> import jax.numpy as jnp
        >>> import numpyro.distributions as dist
        >>> components = dist.Normal(jnp.array([0.0, 1.0]), 1.0)
        >>> list(parameters(dist.MixtureSameFamily(dist.Categorical(logits=jnp.array([0.2, 0.1])), components)))
        ['mixing_distribution.logits', 'component_distribution.loc', 'component_distribution.scale']
    """
    return dict(_named("", p, wanted))


def arguments(p: Any, wanted: Collection[str] = ()) -> dict[str, Any]:
    """The arguments from which a distribution can be built again: its parameters and the distributions inside it.

    Of alternatives such as probs and logits it has only one: the ``wanted`` one, or the one that was given.
    """
    if _is_wrapper(p):
        return {"base_dist": p.base_dist}
    names, alternatives = _signature(type(p))  # type: ignore[arg-type]
    given = next((name for name in (*wanted, *vars(p), *alternatives) if name in alternatives), None)
    return {name: getattr(p, name) for name in names if (name not in alternatives or name == given) and hasattr(p, name)}


@lru_cache(maxsize=256)
def _signature(family: type) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The arguments of a class, and those that may be replaced by another one."""
    accepted = {name: a for name, a in signature(family).parameters.items() if name not in ("validate_args", "support")}
    return tuple(accepted), tuple(name for name, a in accepted.items() if a.default is None)


def _is_wrapper(p: Any) -> bool:
    """Whether p is independent, expanded, masked or transformed, and so has no parameters itself."""
    return not p.arg_constraints and "base_dist" in vars(p)


def _inside(prefix: str, name: str) -> str:
    return prefix if name == "base_dist" else f"{prefix}{name}."


def _named(prefix: str, p: Any, wanted: Collection[str]) -> Iterator[tuple[str, Parameter]]:
    for name, part in arguments(p, wanted).items():
        if hasattr(part, "log_prob"):
            yield from _named(_inside(prefix, name), part, wanted)
        elif isinstance(part, list | tuple):
            for i, item in enumerate(part):
                if hasattr(item, "log_prob"):
                    yield from _named(f"{prefix}{name}[{i}].", item, wanted)
        elif name in p.arg_constraints and not _is_discrete(p.arg_constraints[name]):
            yield prefix + name, Parameter(part, p.arg_constraints[name])


def _is_discrete(constraint: Any) -> bool:
    try:
        return constraint.is_discrete
    except NotImplementedError:  # of a constraint that depends on the other parameters
        return False


def _rebuilt(prefix: str, p: Any, changed: Mapping[str, Any], validate: bool | None) -> Any:
    def part(name: str, value: Any) -> Any:
        if hasattr(value, "log_prob"):
            return _rebuilt(_inside(prefix, name), value, changed, validate)
        if isinstance(value, list | tuple):
            return type(value)(
                _rebuilt(f"{prefix}{name}[{i}].", item, changed, validate) if hasattr(item, "log_prob") else item
                for i, item in enumerate(value)
            )
        return changed.get(prefix + name, value)

    own = [name.removeprefix(prefix) for name in changed if name.startswith(prefix)]
    given = {name: part(name, value) for name, value in arguments(p, own).items()}
    if _is_wrapper(p):
        new = copy(p)
        new.__dict__.update(given)
        return new
    try:
        return type(p)(**given) if validate is None else type(p)(**given, validate_args=validate)
    except TypeError as error:
        raise TypeError(
            f"{type(p).__name__} cannot be built again from {', '.join(given)} ({error}); give a function of its parameters."
        ) from error
