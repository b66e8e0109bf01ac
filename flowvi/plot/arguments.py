"""The arguments of the figures: distributions, estimators by label, parameters that move, points."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from flowvi.estimators import LR, Estimator
from flowvi.host import Host
from flowvi.ops import Array
from flowvi.plot.reading import NUM, sample
from flowvi.rebuild import parameters, rebuild
from flowvi.target import Support

Parameter = str | Callable[[Array], Any]
Estimators = Estimator | Mapping[str, Estimator]


class Path(NamedTuple):
    """A parameter that moves: its name, where it starts, and the distribution after a step."""

    label: str
    start: float
    move: Callable[[Array], Any]


def by_label(estimators: Estimators) -> dict[str, Estimator]:
    return {"": estimators} if isinstance(estimators, Estimator) else dict(estimators)


def dimensions(p: Any) -> int:
    """The number of dimensions of an event; refuses one that cannot be drawn."""
    shape = tuple(p.event_shape)
    if tuple(p.batch_shape) or shape not in ((), (2,)):
        raise ValueError(
            f"a picture needs a distribution of event shape () or (2,) without batch, found batch shape {tuple(p.batch_shape)} "
            f"and event shape {shape} of {type(p).__name__}."
        )
    return 2 if shape else 1


def is_discrete(p: Any) -> bool:
    return Support.of(p.support).discrete


def paths(host: Host, p: Any, parameter: Parameter | Sequence[Parameter] | None) -> list[Path]:
    """A path for each given parameter; the default is every one with a single element."""
    if parameter is None:
        parameter = [name for name, (value, _) in parameters(p).items() if np.size(host.numpy(value)) == 1]
    if isinstance(parameter, str):
        return [_named_path(host, p, parameter)]
    if callable(parameter):
        name = getattr(parameter, "__name__", "<")
        return [Path("θ" if name.startswith("<") else name, 0.0, parameter)]
    return [path for one in parameter for path in paths(host, p, one)]


def _named_path(host: Host, p: Any, name: str) -> Path:
    found = parameters(p, wanted=[name])
    if name not in found:
        raise ValueError(f"{type(p).__name__} has no parameter '{name}'; its parameters are: {', '.join(found) or 'none'}.")
    value = found[name].value
    start = host.numpy(value)
    if start.size != 1:
        raise ValueError(
            f"parameter '{name}' of {type(p).__name__} cannot be moved by name, expected a single number, "
            f"found shape {start.shape}; give a function move(t) that returns the distribution."
        )
    return Path(name, float(start.item()), lambda t: rebuild(p, {name: value + t}))


def points_along(host: Host, distributions: Sequence[Any], x: Any, *estimators: Estimator) -> list[np.ndarray]:
    """The points along each coordinate: the given ones, or over the range of samples (for a discrete site: its values)."""
    dims = dimensions(distributions[0])
    if x is not None:
        return [np.asarray(x, float)] if dims == 1 else [np.asarray(one, float) for one in x]
    draws = [sample(host, p, LR(), 4 * NUM, 0) for p in distributions]
    if dims == 1 and is_discrete(distributions[0]):
        return [np.unique(np.concatenate(draws)).astype(float)]
    draws += [sample(host, distributions[0], e, 4 * NUM, 0) for e in estimators]
    tails = [0.001] * len(distributions) + [0.01] * len(estimators)  # those of a proposal are long
    ends = np.array([np.quantile(d.reshape(len(d), -1), (a, 1 - a), axis=0) for d, a in zip(draws, tails, strict=True)])
    return list(np.linspace(ends[:, 0].min(0), ends[:, 1].max(0), 401 if dims == 1 else 81).T)


def mesh(axes: Sequence[np.ndarray]) -> np.ndarray:
    return np.stack([a.ravel() for a in np.meshgrid(*axes)], -1)
