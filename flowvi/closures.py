"""The closures of user functions.

The model may define an estimator's functions inline, as new objects at every run. The code of the functions, and the variables that
they close over, show whether two runs annotate the same estimator, and whether an estimator keeps a value of an earlier run.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from functools import partial
from typing import Any

from flowvi.baselines import Baseline
from flowvi.estimators import Estimator
from flowvi.fields.field import Field, PerElement
from flowvi.surfaces import Surface


def identity(value: Any) -> Any:
    """A key that is equal for equal estimators; two functions are equal if they have the same code and close over the same objects."""
    if isinstance(value, Estimator | Baseline | Field | PerElement | Surface):
        return type(value), tuple(identity(v) for v in vars(value).values())
    if isinstance(value, tuple | list):
        return tuple(identity(v) for v in value)
    if isinstance(value, Mapping):
        return tuple((name, identity(v)) for name, v in value.items())
    if hasattr(value, "__code__"):
        return value.__code__, tuple(id(cell.cell_contents) for cell in value.__closure__ or ())
    return id(value) if callable(value) or hasattr(value, "shape") else value


def closed_over(value: Any, seen: set[int]) -> Iterator[Any]:
    """An estimator, and everything that its functions close over."""
    if id(value) in seen:
        return
    seen.add(id(value))
    yield value
    if isinstance(value, Estimator | Baseline | Field | PerElement | Surface):
        inner: Iterable[Any] = vars(value).values()
    elif isinstance(value, tuple | list):
        inner = value
    elif isinstance(value, Mapping):
        inner = value.values()
    elif isinstance(value, partial):
        inner = (value.func, *value.args, *value.keywords.values())
    else:
        inner = (cell.cell_contents for cell in getattr(value, "__closure__", None) or ())
    for item in inner:
        yield from closed_over(item, seen)
