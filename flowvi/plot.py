r"""Pictures of estimators: how mass flows, u and psi, proposals and weights, and histograms of gradients.

Each function takes a distribution of either host, with one event of one or two dimensions and no batch, and one estimator or a mapping
from labels to estimators, and returns a matplotlib figure. What is drawn is read off the estimator: it is attached at given x as at a
site, and the draw is differentiated along the parameter. Where it is the host's own sampler (``RP()``), x are draws of that sampler.

A *parameter* is the name of one with a single element, such as ``"loc"``; or a function ``move(t)`` that returns the distribution,
moved by a number t of the host, which serves vectors, matrices and mixtures::

    lambda t: dist.MultivariateNormal(loc + t * direction, scale_tril=scale_tril)

This module needs matplotlib, ``pip install 'flowvi[report]'``; ``import flowvi`` does not import it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from importlib import import_module
from inspect import signature
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from flowvi.estimators import LR, Estimator
from flowvi.ops import Array
from flowvi.support import Support
from flowvi.tangents import unknown_parameter

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Parameter = str | Callable[[Array], Any]
Estimators = Estimator | Mapping[str, Estimator]

COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")  # Okabe and Ito: told apart by the colour-blind
STYLE: Any = {
    "axes.prop_cycle": f"cycler('color', {list(COLORS)})",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": "medium",
    "figure.constrained_layout.use": True,
    "font.size": 9.0,
    "image.cmap": "cividis",
    "legend.frameon": False,
}  #: what the figures look like; ``plt.rcParams.update(STYLE)`` gives figures of your own the same look
NUM = 2000  # draws of a host's sampler where its field is asked for
ALTERNATIVES = (("logits", "probs"), ("scale_tril", "covariance_matrix", "precision_matrix"))  # a constructor takes one of each


class At(NamedTuple):
    """What an estimator does at samples x, along axis 0, as its parameter moves.

    Attributes:
        drawn: Whether x are draws of the host's sampler, rather than those that were given.
        x: The values of the site.
        phi: f(x).
        slope: The derivative of f along the flow: u where f is the identity, u . grad f otherwise.
        psi: The score term.
        weight: p / q.
    """

    drawn: bool
    x: np.ndarray
    phi: np.ndarray
    slope: np.ndarray
    psi: np.ndarray
    weight: np.ndarray

    def at(self, i: np.ndarray) -> At:
        """Some of the samples, by index or mask."""
        return At(self.drawn, *(a[i] for a in self[1:]))


class _Path(NamedTuple):
    """A parameter on the move: its name, where it starts, and the distribution after a step."""

    label: str
    start: float
    move: Callable[[Any], Any]


def flow(
    distribution: Any,
    estimators: Estimators,
    parameter: Parameter,
    *,
    by: float = 1.0,
    lines: int = 12,
    x: Any = None,
) -> Figure:
    r"""How an estimator moves mass: dx/dt = u(x), d log m/dt = psi(x), from the parameter to the parameter plus ``by``.

    For a scalar, the density before (below) is cut into slices of the same mass, whose edges follow the lines up to the density after
    (above). Mass m is carried along a line where psi = 0, and made (orange) or lost (blue) on the way where it is not. LR leaves every
    edge where it is; a pathwise field keeps the mass of every slice. In two dimensions: the density, arrows u and their colour psi.

    **Requirements**: those of the estimators; a continuous distribution of event shape () or (2,), without batch.

    Args:
        distribution: The distribution p.
        estimators: One estimator, or several by label.
        parameter: Its name or ``move(t)``, see the module.
        by: How far the parameter moves (for a scalar).
        lines: How many slices of mass, or arrows along each axis.
        x: The range shown: an array, or one for each coordinate; that of p's samples by default.

    Returns:
        The figure: for each estimator three axes (after, flow lines, before), or one axes in two dimensions.

    Raises:
        ValueError: A shape or a parameter that cannot be drawn, a discrete distribution; or as the estimator at a site 'x'.

    Example:
        >>> import pyro.distributions as dist
        >>> from flowvi import LR, RP, plot
        >>> figure = plot.flow(dist.Normal(0.0, 1.0), {"LR": LR(), "RP": RP()}, "loc")
        >>> len(figure.axes)
        7

    References:
        Parmas and Sugiyama 2021, section 3 and eq. 19.
    """
    dims, named, host = _dims(distribution), _by_label(estimators), _host(distribution)
    (path,) = _paths(distribution, parameter)
    if Support.of(distribution.support).discrete:
        raise ValueError(f"flow lines need a continuous distribution, but {type(distribution).__name__} is discrete.")
    with _style() as plt:
        if dims == 2:
            return _arrows(plt, host, distribution, named, path, lines, x)
        return _flow_lines(plt, host, named, path, by, lines, x)


def velocity(distribution: Any, estimators: Estimators, parameter: Parameter | Sequence[Parameter] | None = None, *, x: Any = None):
    r"""The velocity u(x) and the score term psi(x) of :math:`E = w\,[u\cdot\nabla\phi + \psi\,\phi]`, for each parameter.

    For a scalar, a column for each parameter, with the density in grey; in two dimensions a row for each parameter and estimator.

    **Requirements**: those of the estimators; a distribution of event shape () or (2,), without batch.

    Args:
        distribution: The distribution p.
        estimators: One estimator, or several by label.
        parameter: A parameter, see the module, or a list of them; the default is every named one with a single element.
        x: Where: an array, or one for each coordinate; the range of p's samples by default.

    Returns:
        The figure: axes of u and of psi for each parameter; in two dimensions of u_1, u_2 and psi.

    Raises:
        ValueError: A shape or a parameter that cannot be drawn; or as the estimator at a site 'x'.

    Example:
        >>> import pyro.distributions as dist
        >>> from flowvi import LR, Flow, plot
        >>> half = Flow(loc=lambda x, p: 0.5)
        >>> figure = plot.velocity(dist.Normal(0.0, 1.0), {"LR": LR(), "half": half}, "loc", x=[-1.0, 0.0, 1.0])
        >>> [float(u) for u in figure.axes[0].lines[1].get_ydata()]
        [0.5, 0.5, 0.5]

    References:
        Parmas and Sugiyama 2021, eq. 19.
    """
    dims, named, host = _dims(distribution), _by_label(estimators), _host(distribution)
    paths = _paths(distribution, parameter)
    with _style() as plt:
        if dims == 2:
            return _velocity_maps(plt, host, distribution, named, paths, x)
        (points,) = _points(host, [distribution], x)
        discrete = Support.of(distribution.support).discrete
        figure, axes = plt.subplots(2, len(paths), sharex=True, sharey="row", squeeze=False, figsize=(1 + 3 * len(paths), 4.2))
        for j, path in enumerate(paths):
            for label, estimator in named.items():
                at = host.at(path.move, estimator, points, 0.0, _identity, 0)
                at = at.at(np.argsort(at.x))
                for ax, y in zip(axes[:, j], (at.slope, at.psi), strict=True):
                    ax.plot(at.x, y, marker="o" if discrete else "", label=label)
            for ax in axes[:, j]:
                _shade(ax, points, host.density(distribution, points), discrete)
            axes[0, j].set_title(path.label)
            axes[1, j].set_xlabel("x")
        axes[0, 0].set_ylabel("velocity u = dx/dθ")
        axes[1, 0].set_ylabel("score term ψ")
        if len(named) > 1:
            figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside upper center", ncols=4)
        return figure


def proposal(distribution: Any, estimators: Estimators, *, x: Any = None) -> Figure:
    r"""The density p, the sampling density q of an estimator, and its weight w = p / q.

    **Requirements**: those of the estimators; a distribution of event shape () or (2,), without batch.

    Args:
        distribution: The distribution p.
        estimators: One estimator, or several by label.
        x: Where: an array, or one for each coordinate; the range of the samples of p and of every q by default.

    Returns:
        The figure: axes of the densities and of the weights; in two dimensions p, q and w for each estimator.

    Raises:
        ValueError: A shape that cannot be drawn; or as the estimator at a site 'x'.

    Example:
        >>> import pyro.distributions as dist
        >>> from flowvi import LR, plot, proposals
        >>> figure = plot.proposal(dist.Normal(0.0, 1.0), LR(q=proposals.tempered(2.0)), x=[0.0])
        >>> round(float(figure.axes[1].lines[0].get_ydata()[0]) ** 2, 5)
        2.0

    References:
        Parmas and Sugiyama 2021, section 3, on the choice of q.
    """
    dims, named, host = _dims(distribution), _by_label(estimators), _host(distribution)
    with _style() as plt:
        axes_of_x = _points(host, [distribution], x, *named.values())
        points = _mesh(axes_of_x) if dims == 2 else axes_of_x[0]
        p = host.density(distribution, points)
        weights = {label: _weight(host, distribution, estimator, points) for label, estimator in named.items()}
        if dims == 2:
            figure, axes = plt.subplots(len(named), 3, squeeze=False, sharex=True, sharey=True, figsize=(9, 0.4 + 2.6 * len(named)))
            for row, (label, w) in zip(axes, weights.items(), strict=True):
                for ax, values, title in zip(row, (p, p / w, w), ("p", f"q, {label}", f"w = p/q, {label}"), strict=True):
                    figure.colorbar(_color_map(ax, axes_of_x, values), ax=ax)
                    ax.set_title(title.removesuffix(", "))
            _name_coordinates(axes)
            return figure
        discrete = Support.of(distribution.support).discrete
        figure, (top, bottom) = plt.subplots(2, sharex=True, height_ratios=(3, 2), figsize=(5.5, 4.4))
        top.plot(points, p, color="0.3", marker="o" if discrete else "", label="p")
        for label, w in weights.items():
            q = np.divide(p, w, out=np.zeros_like(p), where=w > 0)
            top.plot(points, q, marker="o" if discrete else "", label=f"q, {label}".removesuffix(", "))
            bottom.plot(points, w, marker="o" if discrete else "")
        top.set_ylabel("probability" if discrete else "density")
        top.set_ylim(bottom=0)
        top.legend()
        bottom.axhline(1.0, color="0.3", linewidth=0.8)
        bottom.set(yscale="log", xlabel="x", ylabel="weight w = p/q")
        bottom.set_ylim(bottom=max(bottom.get_ylim()[0], 1e-3))
        return figure


def gradients(
    distribution: Any,
    estimators: Estimators,
    parameter: Parameter,
    cost: Callable[[Array], Array],
    *,
    num_samples: int = 10_000,
    seed: int = 0,
) -> Figure:
    r"""Histograms of the gradient of single samples, :math:`E = w\,[u\cdot\nabla\phi + \psi\,\phi]` of a cost phi.

    One row for each estimator, with the mean as a line and the standard deviation as a number; the outermost hundredth is not shown.

    **Requirements**: those of the estimators; a distribution without batch.

    Args:
        distribution: The distribution p.
        estimators: One estimator, or several by label.
        parameter: Its name or ``move(t)``, see the module.
        cost: ``phi(x)`` in the host's functions, from (num_samples,) + event shape to (num_samples,).
        num_samples: How many samples.
        seed: Of the draws.

    Returns:
        The figure: one axes for each estimator.

    Raises:
        ValueError: A parameter that cannot be drawn; or as the estimator at a site 'x'.

    Example:
        >>> import pyro.distributions as dist
        >>> from flowvi import LR, RP, plot
        >>> figure = plot.gradients(dist.Normal(0.0, 1.0), {"LR": LR(), "RP": RP()}, "loc", lambda x: x**2)
        >>> len(figure.axes)
        2

    References:
        Parmas and Sugiyama 2021, eq. 19.
    """
    named = _by_label(estimators)
    (path,) = _paths(distribution, parameter)
    found = {
        label: gradient_samples(distribution, e, parameter, cost, num_samples=num_samples, seed=seed) for label, e in named.items()
    }
    low, high = np.quantile(np.stack(list(found.values())), (0.005, 0.995))
    with _style() as plt:
        figure, axes = plt.subplots(len(named), sharex=True, squeeze=False, figsize=(5.5, 1 + 0.9 * len(named)))
        for i, (ax, (label, e)) in enumerate(zip(axes[:, 0], found.items(), strict=True)):
            ax.hist(e, bins=np.linspace(low, high, 81), density=True, color=COLORS[0])
            ax.axvline(e.mean(), color=COLORS[1])
            ax.set_yticks([])
            ax.spines["left"].set_visible(False)
            ax.text(0.99, 0.95, f"{label}\nstd {e.std():.3g}".strip(), transform=ax.transAxes, ha="right", va="top")
            if i == 0:
                ax.set_title("density of the gradient of one sample; line: the mean")
        axes[-1, 0].set_xlabel(f"gradient in {path.label}")
        return figure


def gradient_samples(
    distribution: Any,
    estimator: Estimator,
    parameter: Parameter,
    cost: Callable[[Array], Array],
    *,
    num_samples: int = 10_000,
    seed: int = 0,
) -> np.ndarray:
    r"""The gradient of single samples, :math:`E = w\,[u\cdot\nabla\phi + \psi\,\phi]`: the numbers behind :func:`gradients`.

    **Requirements**: those of the estimator; a distribution without batch.

    Args:
        distribution: The distribution p.
        estimator: The estimator.
        parameter: Its name or ``move(t)``, see the module.
        cost: ``phi(x)`` in the host's functions, from (num_samples,) + event shape to (num_samples,).
        num_samples: How many samples.
        seed: Of the draws.

    Returns:
        An array of shape (num_samples,).

    Raises:
        ValueError: A parameter that cannot be drawn; or as the estimator at a site 'x'.

    Example:
        >>> import pyro.distributions as dist
        >>> from flowvi import RP, plot
        >>> float(plot.gradient_samples(dist.Normal(0.0, 1.0), RP(), "loc", lambda x: 3 * x).mean())
        3.0

    References:
        Parmas and Sugiyama 2021, eq. 19.
    """
    (path,), host = _paths(distribution, parameter), _host(distribution)
    at = host.at(path.move, estimator, host.sample(distribution, estimator, num_samples, seed), 0.0, cost, seed)
    return at.weight * (at.slope + at.psi * at.phi)


# ---- what is asked for


def _host(p: Any) -> Any:
    """The adapter's module for the host of a distribution, which has imported that host already."""
    pyro = any(c.__module__.startswith(("torch.", "pyro.")) for c in type(p).__mro__)
    return import_module("flowvi.pyro.plot" if pyro else "flowvi.numpyro.plot")


def _by_label(estimators: Estimators) -> dict[str, Estimator]:
    return {"": estimators} if isinstance(estimators, Estimator) else dict(estimators)


def _dims(p: Any) -> int:
    shape = tuple(p.event_shape)
    if tuple(p.batch_shape) or shape not in ((), (2,)):
        raise ValueError(
            f"a picture needs a distribution of event shape () or (2,) without batch, found batch shape {tuple(p.batch_shape)} "
            f"and event shape {shape} of {type(p).__name__}."
        )
    return 2 if shape else 1


def _paths(p: Any, parameter: Parameter | Sequence[Parameter] | None) -> list[_Path]:
    """One for each parameter asked for."""
    if parameter is None:
        parameter = [name for name in _constructor(p) if name in p.arg_constraints and np.size(_detached(getattr(p, name))) == 1]
    if isinstance(parameter, str):
        return [_named_path(p, parameter)]
    if callable(parameter):
        name = getattr(parameter, "__name__", "<")
        return [_Path("θ" if name.startswith("<") else name, 0.0, parameter)]
    return [path for one in parameter for path in _paths(p, one)]


def _named_path(p: Any, name: str) -> _Path:
    if name not in p.arg_constraints:
        raise ValueError(unknown_parameter(p, name))
    value, given = getattr(p, name), _constructor(p, name)
    if np.size(_detached(value)) != 1 or name not in given:
        raise ValueError(
            f"parameter '{name}' of {type(p).__name__} cannot be moved by name, expected a single number of its constructor, "
            f"found shape {np.shape(_detached(value))}; give a function move(t) that returns the distribution."
        )
    arguments = {argument: getattr(p, argument) for argument in given}
    return _Path(name, float(_detached(value)), lambda t: type(p)(**{**arguments, name: value + t}))


def _constructor(p: Any, wanted: str = "") -> list[str]:
    """The arguments from which p can be made again; of alternatives the wanted one, or the first."""
    names = [name for name in signature(type(p)).parameters if hasattr(p, name)]
    for options in ALTERNATIVES:
        there = [name for name in options if name in names]
        keep = wanted if wanted in there else next(iter(there), None)
        names = [name for name in names if name not in there or name == keep]
    return names


def _detached(a: Any) -> np.ndarray:
    return np.asarray(a.detach().cpu() if hasattr(a, "detach") else a)


def _identity(x: Array) -> Array:
    return x


def _points(host: Any, distributions: Sequence[Any], x: Any, *estimators: Estimator) -> list[np.ndarray]:
    """The points along each coordinate: those asked for, or over the range of samples (of a discrete site: its values)."""
    dims = _dims(distributions[0])
    if x is not None:
        return [np.asarray(x, float)] if dims == 1 else [np.asarray(one, float) for one in x]
    draws = [host.sample(p, LR(), 4 * NUM, 0) for p in distributions]
    if dims == 1 and Support.of(distributions[0].support).discrete:
        return [np.unique(np.concatenate(draws)).astype(float)]
    draws += [host.sample(distributions[0], e, 4 * NUM, 0) for e in estimators]
    tails = [0.001] * len(distributions) + [0.01] * len(estimators)  # those of a proposal are long
    ends = np.array([np.quantile(d.reshape(len(d), -1), (a, 1 - a), axis=0) for d, a in zip(draws, tails, strict=True)])
    return list(np.linspace(ends[:, 0].min(0), ends[:, 1].max(0), 401 if dims == 1 else 81).T)


def _mesh(axes: Sequence[np.ndarray]) -> np.ndarray:
    return np.stack([a.ravel() for a in np.meshgrid(*axes)], -1)


def _weight(host: Any, p: Any, estimator: Estimator, points: np.ndarray) -> np.ndarray:
    if estimator.q is None:
        return np.ones(len(points))
    return host.at(lambda t: p, estimator, points, 0.0, _identity, 0).weight


# ---- the figures


@contextmanager
def _style() -> Iterator[Any]:
    """matplotlib.pyplot, with our style."""
    try:
        import matplotlib.pyplot as plt
    except ImportError as error:
        error.add_note("flowvi.plot needs matplotlib: pip install 'flowvi[report]'")
        raise
    with plt.rc_context(STYLE):
        yield plt


def _mass_colors() -> Any:
    from matplotlib.colors import LinearSegmentedColormap

    return LinearSegmentedColormap.from_list("mass", [COLORS[0], "0.45", COLORS[1]])


def _shade(ax: Any, x: np.ndarray, p: np.ndarray, discrete: bool) -> None:
    """The density behind the lines, without a scale of its own."""
    behind = ax.twinx()
    if discrete:
        behind.bar(x, p, color="0.9")
    else:
        behind.fill_between(x, p, color="0.9", linewidth=0)
    behind.set(ylim=(0, 1.1 * p.max()), yticks=[])
    behind.spines["right"].set_visible(False)
    ax.set_zorder(behind.get_zorder() + 1)
    ax.patch.set_visible(False)


def _carry(host: Any, move: Callable, estimator: Estimator, x: np.ndarray, by: float, steps: int = 8) -> tuple[np.ndarray, np.ndarray]:
    """The places along the flow lines from x, and the logarithm of the mass, both (steps + 1, len(x)), by Runge and Kutta's method."""

    def rates(t, state):
        at = host.at(move, estimator, state[0], t, _identity, 0)
        if not at.drawn:
            return np.stack([at.slope, at.psi])
        at = host.at(move, estimator, np.zeros(NUM), t, _identity, 0)
        at = at.at(np.argsort(at.x))
        return np.stack([np.interp(state[0], at.x, at.slope), np.interp(state[0], at.x, at.psi)])

    states, h = [np.stack([x, 0 * x])], by / steps
    for i in range(steps):
        state = states[-1]
        a = rates(i * h, state)
        b = rates((i + 0.5) * h, state + h / 2 * a)
        c = rates((i + 0.5) * h, state + h / 2 * b)
        d = rates((i + 1) * h, state + h * c)
        states.append(state + h / 6 * (a + 2 * b + 2 * c + d))
    return tuple(np.stack(states, 1))  # type: ignore[return-value]


def _flow_lines(plt, host, named, path, by, lines, x):
    from matplotlib.collections import LineCollection
    from matplotlib.colors import Normalize

    (points,) = _points(host, [path.move(0.0), path.move(by)], x)
    before, after = (host.density(path.move(t), points) for t in (0.0, by))
    cumulated = np.cumsum(before) / before.sum()
    edges = np.interp(np.arange(1, lines) / lines, cumulated, points)
    carried = {label: _carry(host, path.move, estimator, edges, by) for label, estimator in named.items()}
    limit = np.clip(max(np.abs(mass).max() for _, mass in carried.values()), np.log(2), np.log(4))
    norm = Normalize(-limit, limit, clip=True)
    figure, axes = plt.subplots(
        3, len(named), sharex=True, sharey="row", squeeze=False, height_ratios=(2, 3, 2), figsize=(1.4 + 2.6 * len(named), 4.6)
    )
    for (top, middle, bottom), (label, (places, mass)) in zip(axes.T, carried.items(), strict=True):
        t = path.start + np.linspace(0.0, by, len(places))
        for i in range(lines - 1):
            line = np.stack([places[:, i], t], -1)
            segments = LineCollection(list(np.stack([line[:-1], line[1:]], 1)), cmap=_mass_colors(), norm=norm, capstyle="butt")
            segments.set_array((mass[:-1, i] + mass[1:, i]) / 2)
            segments.set(linewidth=1.3 * np.exp(np.clip(mass[1:, i], -limit, limit) / 2), snap=False)
            middle.add_collection(segments)
        for ax, density, ends in ((top, after, places[-1]), (bottom, before, places[0])):
            ends = [points[0], *ends, points[-1]]
            for i in range(lines):
                here = np.linspace(ends[i], ends[i + 1], 30)
                ax.fill_between(here, np.interp(here, points, density), color=("0.85", "0.6")[i % 2], linewidth=0)
            ax.plot(points, density, color="black", linewidth=1)
            ax.set_ylim(bottom=0)
        middle.set_ylim(*sorted((t[0], t[-1])))
        top.set_title(label)
        bottom.set_xlabel("x")
    axes[0, 0].set_ylabel(f"density after,\n{path.label} = {path.start + by:.3g}")
    axes[1, 0].set_ylabel(path.label)
    axes[2, 0].set_ylabel(f"density before,\n{path.label} = {path.start:.3g}")
    bar = figure.colorbar(segments, ax=axes[1, :], pad=0.01)
    factors = [f for f in (0.25, 0.5, 1, 2, 4) if abs(np.log(f)) <= limit + 1e-9]
    bar.set_ticks(np.log(factors), labels=[f"{f:g}" for f in factors])
    bar.set_label("mass, relative to the start")
    return figure


def _name_coordinates(axes: np.ndarray) -> None:
    for ax in axes[-1]:
        ax.set_xlabel("$x_1$")
    for ax in axes[:, 0]:
        ax.set_ylabel("$x_2$")


def _color_map(ax: Any, axes: Sequence[np.ndarray], values: np.ndarray, **options: Any) -> Any:
    return ax.pcolormesh(*axes, values.reshape([len(a) for a in axes[::-1]]), shading="gouraud", rasterized=True, **options)


def _arrows(plt, host, p, named, path, lines, x):
    axes_of_x = _points(host, [p], x)
    density = host.density(p, _mesh(axes_of_x))
    coarse = _mesh([np.linspace(a[0], a[-1], lines + 2)[1:-1] for a in axes_of_x])
    found = {}
    for label, estimator in named.items():
        at = host.at(path.move, estimator, coarse, 0.0, _identity, 0)
        found[label] = at.at(host.density(p, at.x) > 0.01 * density.max())
    limit = max(max(np.abs(at.psi).max() for at in found.values()), 1e-3)
    fastest = max(np.hypot(*at.slope.T).max() for at in found.values()) or 1.0
    spacing = max(a[-1] - a[0] for a in axes_of_x) / lines
    figure, axes = plt.subplots(1, len(named), sharex=True, sharey=True, squeeze=False, figsize=(1.4 + 2.8 * len(named), 3.2))
    colors = {"cmap": _mass_colors(), "norm": plt.Normalize(-limit, limit)}
    for ax, (label, at) in zip(axes[0], found.items(), strict=True):
        _color_map(ax, axes_of_x, density, cmap="Greys", vmax=1.6 * density.max())
        dots = ax.scatter(*at.x.T, c=at.psi, s=6, linewidth=0, **colors)
        arrows = {"angles": "xy", "scale_units": "xy", "scale": fastest / (1.6 * spacing), "width": 0.006}
        ax.quiver(*at.x.T, *at.slope.T, at.psi, **arrows, **colors)
        ax.set(title=label, aspect="equal")
    _name_coordinates(axes)
    figure.colorbar(dots, ax=axes[0], label="score term ψ", pad=0.01)
    return figure


def _velocity_maps(plt, host, p, named, paths, x):
    axes_of_x = _points(host, [p], x)
    points = _mesh(axes_of_x)
    rows = [(path, label, estimator) for path in paths for label, estimator in named.items()]
    figure, axes = plt.subplots(len(rows), 3, squeeze=False, sharex=True, sharey=True, figsize=(9, 0.4 + 2.6 * len(rows)))
    for row, (path, label, estimator) in zip(axes, rows, strict=True):
        at = host.at(path.move, estimator, points, 0.0, _identity, 0)
        for ax, values, name in zip(row, (*at.slope.T, at.psi), ("$u_1$", "$u_2$", "ψ"), strict=True):
            limit = np.abs(values).max() or 1.0
            colors = {"cmap": "PuOr_r", "vmin": -limit, "vmax": limit}
            scatter = partial(ax.scatter, *at.x.T, s=2, rasterized=True)
            drawn = scatter(c=values, **colors) if at.drawn else _color_map(ax, axes_of_x, values, **colors)
            figure.colorbar(drawn, ax=ax)
            ax.set_title(", ".join(word for word in (name, path.label, label) if word))
    _name_coordinates(axes)
    return figure
