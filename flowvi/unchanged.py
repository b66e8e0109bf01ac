"""Runs that leave a program as they found it: an automatic guide draws its start, and makes its parameters, when it first runs."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from types import FunctionType, MethodType
from typing import Any


@contextmanager
def unchanged(programs: Iterable[Any], kinds: type | tuple[type, ...]) -> Iterator[None]:
    """Restore at its end the attributes of all objects of some kinds that programs hold, and what is in their lists and dicts.

    Args:
        programs: Model or guide, as the user gave them.
        kinds: The host's classes whose objects change when a program runs for the first time.
    """
    states = [_State(found) for found in _held(list(programs)) if isinstance(found, kinds)]
    try:
        yield
    finally:
        for state in states:
            state.restore()


class _State:
    """The attributes of an object at this time."""

    def __init__(self, owner: Any):
        self.owner, self.kind, self.attributes = owner, type(owner), dict(vars(owner))
        containers = [value for value in self.attributes.values() if isinstance(value, dict | list | set)]
        self.contents = [(container, container.copy()) for container in containers]

    def restore(self) -> None:
        if type(self.owner) is not self.kind:  # a lazy module has become another one
            return
        vars(self.owner).clear()
        vars(self.owner).update(self.attributes)
        for container, items in self.contents:
            container.clear()
            container.extend(items) if isinstance(container, list) else container.update(items)


def _held(values: list[Any]) -> Iterator[Any]:
    """The callables that objects hold: in attributes, arguments, containers, and variables that a function reads."""
    seen: dict[int, Any] = {}
    while values:
        value = values.pop()
        if id(value) in seen or isinstance(value, type):
            continue
        seen[id(value)] = value
        if isinstance(value, dict):
            values += value.values()
        elif isinstance(value, list | tuple | set):
            values += value
        elif callable(value):
            yield value
            values += [*getattr(value, "__dict__", {}).values(), *_variables(value)]


def _variables(value: Any) -> Iterator[Any]:
    """What a function, a method or a partial call reads."""
    if isinstance(value, partial):
        yield from (value.func, value.args, value.keywords)
    elif isinstance(value, MethodType):
        yield from (value.__self__, getattr(value.__self__, "__dict__", {}), value.__func__)
    elif isinstance(value, FunctionType):
        yield from (value.__defaults__, value.__kwdefaults__)
        for cell in value.__closure__ or ():
            try:
                yield cell.cell_contents
            except ValueError:  # a variable that is not set yet
                continue
        for name in value.__code__.co_names:
            found = value.__globals__.get(name)
            own = getattr(found, "__globals__", value.__globals__) is value.__globals__  # a function of this module, not of a library
            if isinstance(found, dict | list | tuple) or (callable(found) and own):
                yield found
