"""Runs that leave a program as they found it: an automatic guide draws its start, and makes its parameters, when it first runs."""

from __future__ import annotations

import gc
import random
import sys
from collections.abc import Callable, Container, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import cache, partial
from types import CodeType, FunctionType, MethodType, ModuleType
from typing import Any

import numpy as np

Restore = Callable[[], None]


@contextmanager
def unchanged(programs: Iterable[Any], kinds: Mapping[type, Callable[[Any], Restore]]) -> Iterator[None]:
    """Restore at its end all objects of some kinds that programs hold, and the random generators of Python and NumPy.

    Other generators of Python and NumPy that programs hold are restored too.

    Args:
        programs: Models, guides and their arguments, as the user gave them.
        kinds: The host's classes whose objects change when a program runs. Each has a function that stores the state of an object,
            and returns what restores it.
    """
    kinds = {
        **kinds,
        random.Random: _python_generator,
        np.random.BitGenerator: _numpy_generator,
        np.random.RandomState: lambda generator: partial(
            generator.set_state, generator.get_state(legacy=False)
        ),  # may keep a number for later
    }
    python, numpy = random.getstate(), np.random.get_state()
    restores = [kinds[kind](found) for found in _held(list(programs), kinds) for kind in kinds if issubclass(type(found), kind)]
    try:
        yield
    finally:
        for restore in restores:
            restore()
        random.setstate(python)
        np.random.set_state(numpy)


def attributes(owner: Any) -> Restore:
    """What restores the class and the attributes of an object, and what is in their lists, dicts and sets."""
    kind, values = type(owner), dict(vars(owner))
    contents = [(container, container.copy()) for container in values.values() if isinstance(container, dict | list | set)]

    def restore() -> None:
        if type(owner) is not kind:  # a lazy module has become another one
            owner.__class__ = kind
        vars(owner).clear()
        vars(owner).update(values)
        for container, items in contents:
            if _identities(container) != _identities(items):  # a program around this one may be iterating over it
                container.clear()
                container.extend(items) if isinstance(container, list) else container.update(items)

    return restore


def _identities(container: dict | list | set) -> list[int]:
    """The identities of what a container holds."""
    return [*map(id, container), *map(id, container.values() if isinstance(container, dict) else ())]


def _python_generator(generator: random.Random) -> Restore:
    has_state = not isinstance(generator, random.SystemRandom)
    return partial(generator.setstate, generator.getstate()) if has_state else lambda: None


def _numpy_generator(generator: Any) -> Restore:
    return partial(setattr, generator, "state", generator.state)


def _held(values: list[Any], kinds: Container[type] = ()) -> Iterator[Any]:
    """What objects hold in attributes, containers, classes, arguments, and variables that a function reads.

    Arrays are not searched. The functions and classes of an installed package are searched only if one of the given values is a
    function of that package. Objects that the garbage collector does not track, such as numbers, are left out unless they are of one of
    the ``kinds``.
    """
    packages = {_package(value.__module__) for value in values if isinstance(value, FunctionType | MethodType)}

    def is_own(module: Any) -> bool:
        return not _is_installed(str(module)) or _package(module) in packages

    seen: dict[int, Any] = {}
    while values:
        value = values.pop()
        if id(value) in seen:
            continue
        seen[id(value)] = value
        yield value
        kind = type(value)  # isinstance would ask the object, as getattr would
        if issubclass(kind, FunctionType):
            values += (value.__closure__, value.__defaults__, value.__kwdefaults__, vars(value))
            values += _globals(value, is_own) if is_own(value.__module__) else ()
        elif issubclass(kind, type):
            values += (*value.__bases__, *vars(value).values()) if is_own(value.__module__) else ()
        elif issubclass(kind, ModuleType) or hasattr(kind, "__array__"):
            continue
        elif "__wrapped__" in (own := _attributes_of(value)):  # a function with a cache, such as a compiled one
            values += own.values()
        else:
            values += (of_it for of_it in gc.get_referents(value) if gc.is_tracked(of_it) or type(of_it) in kinds)


def _attributes_of(value: Any) -> Mapping[str, Any]:
    """The attributes of an object without what its class defines for a missing one; none if the class refuses."""
    try:
        return object.__getattribute__(value, "__dict__")
    except Exception:
        return {}


def _globals(function: FunctionType, is_own: Callable[[str], bool]) -> Iterator[Any]:
    """The global variables that the code of a function names, also those of other modules that it names."""
    names = set(_names(function.__code__))
    spaces = [function.__globals__]
    for space in spaces:
        for name in names & space.keys():
            value = space[name]
            if not isinstance(value, ModuleType):
                yield value
            elif is_own(value.__name__) and all(vars(value) is not known for known in spaces):
                spaces.append(vars(value))


def _names(code: CodeType) -> Iterator[str]:
    """The names of global variables and attributes in a function and in the functions inside it."""
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _names(constant)


@cache
def _is_installed(module: str) -> bool:
    """Whether a module belongs to Python or to an installed package."""
    file = getattr(sys.modules.get(module), "__file__", None) or ""
    return _package(module) in {*sys.stdlib_module_names, "builtins", "flowvi"} or "site-packages" in file


def _package(module: Any) -> str:
    return str(module).partition(".")[0]
