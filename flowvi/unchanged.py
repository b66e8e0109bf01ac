"""Runs that leave a program as they found it: an automatic guide draws its start, and makes its parameters, when it first runs."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from types import MethodType
from typing import Any


@contextmanager
def unchanged(programs: Iterable[Any], kinds: type | tuple[type, ...]) -> Iterator[None]:
    """Restore at its end the attributes of all objects of some kinds that programs hold, and what is in their lists and dicts.

    Args:
        programs: Model or guide, as the user gave them.
        kinds: The host's classes whose objects change when a program runs for the first time.
    """
    states = [_State(found) for found in _held(list(programs), set()) if isinstance(found, kinds)]
    try:
        yield
    finally:
        for state in states:
            state.restore()


class _State:
    """The attributes of an object at this time."""

    def __init__(self, owner: Any):
        self.owner, self.attributes = owner, dict(vars(owner))
        containers = [value for value in self.attributes.values() if isinstance(value, dict | list | set)]
        self.contents = [(container, container.copy()) for container in containers]

    def restore(self) -> None:
        vars(self.owner).clear()
        vars(self.owner).update(self.attributes)
        for container, items in self.contents:
            container.clear()
            container.extend(items) if isinstance(container, list) else container.update(items)


def _held(value: Any, seen: set[int]) -> Iterator[Any]:
    """An object, and the callables and containers that it holds: attributes, arguments, closed-over and global variables."""
    if id(value) in seen or isinstance(value, type):
        return
    seen.add(id(value))
    if isinstance(value, Mapping):
        inner = list(value.values())
    elif isinstance(value, list | tuple | set):
        inner = list(value)
    elif callable(value):
        yield value
        inner = [*getattr(value, "__dict__", {}).values(), *_variables(value)]
    else:
        return
    for item in inner:
        yield from _held(item, seen)


def _variables(value: Any) -> Iterator[Any]:
    """What a function, a method or a partial call reads."""
    if isinstance(value, partial):
        yield from (value.func, value.args, value.keywords)
    elif isinstance(value, MethodType):
        yield from (value.__self__, getattr(value.__self__, "__dict__", {}), value.__func__)
    elif (code := getattr(value, "__code__", None)) is not None:
        for cell in value.__closure__ or ():
            try:
                yield cell.cell_contents
            except ValueError:  # a variable that is not set yet
                continue
        for name in code.co_names:
            found = value.__globals__.get(name)
            if callable(found) and getattr(found, "__globals__", value.__globals__) is value.__globals__:  # not into libraries
                yield found
