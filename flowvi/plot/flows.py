"""How mass flows: lines through the densities of a scalar, arrows in two dimensions."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from flowvi.estimators import Estimator
from flowvi.host import Host, host_of
from flowvi.ops import Array
from flowvi.plot.arguments import Estimators, Parameter, Path, by_label, dimensions, is_discrete, mesh, paths, points_along
from flowvi.plot.reading import NUM, density_at, read
from flowvi.plot.style import color_map, mass_colors, name_coordinates, styled_pyplot

if TYPE_CHECKING:
    from matplotlib.figure import Figure


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

    For a scalar, the density before (below) is cut into slices of equal mass. The edges of the slices follow the flow lines up to the
    density after (above). The mass m along a line is constant where psi = 0; elsewhere it grows (orange) or shrinks (blue). LR does not
    move the edges; a pathwise field keeps the mass of every slice. In two dimensions: the density, and arrows u with colour psi.

    **Requirements**: those of the estimators; a continuous distribution of event shape () or (2,), without batch.

    Args:
        distribution: The distribution p.
        estimators: One estimator, or several by label.
        parameter: A name or ``move(t)``, see :mod:`flowvi.plot`.
        by: How far the parameter moves (for a scalar).
        lines: The number of slices, or of arrows along each axis.
        x: The range to show: an array, or one for each coordinate. By default the range of p's samples.

    Returns:
        The figure: for each estimator three axes (after, flow lines, before), or one axes in two dimensions.

    Raises:
        ValueError: A shape or a parameter that cannot be drawn, a discrete distribution, or an error of the estimator, naming a site
            'x'.

    Example:
        >>> import pyro.distributions as dist
        >>> import flowvi.pyro
        >>> from flowvi import LR, RP, plot
        >>> figure = plot.flow(dist.Normal(0.0, 1.0), {"LR": LR(), "RP": RP()}, "loc")
        >>> len(figure.axes)
        7

    References:
        Parmas and Sugiyama 2021, section 3 and eq. 19.
    """
    host, dims, named = host_of(distribution), dimensions(distribution), by_label(estimators)
    (path,) = paths(host, distribution, parameter)
    if is_discrete(distribution):
        raise ValueError(
            f"flow lines need a continuous distribution, but {type(distribution).__name__} is discrete; use flowvi.plot.gradients."
        )
    with styled_pyplot() as plt:
        if dims == 2:
            return _arrows(plt, host, distribution, named, path, lines, x)
        return _lines(plt, host, named, path, by, lines, x)


def _lines(plt: Any, host: Host, named: Mapping[str, Estimator], path: Path, by: float, lines: int, x: Any) -> Figure:
    from matplotlib.collections import LineCollection
    from matplotlib.colors import Normalize

    (points,) = points_along(host, [path.move(host.array(t)) for t in (0.0, by)], x)
    before, after = (density_at(host, path.move(host.array(t)), points) for t in (0.0, by))
    cumulated = np.cumsum(before) / before.sum()
    edges = np.interp(np.arange(1, lines) / lines, cumulated, points)
    carried = {label: carry(host, path.move, estimator, edges, by) for label, estimator in named.items()}
    limit = np.clip(max(np.abs(mass).max() for _, mass in carried.values()), np.log(2), np.log(4))
    norm = Normalize(-limit, limit, clip=True)
    figure, axes = plt.subplots(
        3, len(named), sharex=True, sharey="row", squeeze=False, height_ratios=(2, 3, 2), figsize=(1.4 + 2.1 * len(named), 4.6)
    )
    for (top, middle, bottom), (label, (places, mass)) in zip(axes.T, carried.items(), strict=True):
        t = path.start + np.linspace(0.0, by, len(places))
        for i in range(lines - 1):
            line = np.stack([places[:, i], t], -1)
            segments = LineCollection(list(np.stack([line[:-1], line[1:]], 1)), cmap=mass_colors(), norm=norm, capstyle="butt")
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


def carry(
    host: Host, move: Callable[[Array], Any], estimator: Estimator, x: np.ndarray, by: float, steps: int = 8
) -> tuple[np.ndarray, np.ndarray]:
    """The places along the flow lines from x, and the logarithm of the mass, both (steps + 1, len(x)), by Runge and Kutta's method."""

    def rates(t: float, state: np.ndarray) -> np.ndarray:
        at = read(host, move, estimator, state[0], t=t)
        if not at.drawn:
            return np.stack([at.slope, at.psi])
        at = read(host, move, estimator, np.zeros(NUM), t=t)
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
    places, mass = np.stack(states, 1)
    return places, mass


def _arrows(plt: Any, host: Host, p: Any, named: Mapping[str, Estimator], path: Path, lines: int, x: Any) -> Figure:
    axes_of_x = points_along(host, [p], x)
    density = density_at(host, p, mesh(axes_of_x))
    coarse = mesh([np.linspace(a[0], a[-1], lines + 2)[1:-1] for a in axes_of_x])
    found = {}
    for label, estimator in named.items():
        at = read(host, path.move, estimator, coarse)
        found[label] = at.at(density_at(host, p, at.x) > 0.01 * density.max())
    limit = max(max(np.abs(at.psi).max() for at in found.values()), 1e-3)
    fastest = max(np.hypot(*at.slope.T).max() for at in found.values()) or 1.0
    spacing = max(a[-1] - a[0] for a in axes_of_x) / lines
    figure, axes = plt.subplots(1, len(named), sharex=True, sharey=True, squeeze=False, figsize=(1.4 + 2.8 * len(named), 3.2))
    colors = {"cmap": mass_colors(), "norm": plt.Normalize(-limit, limit)}
    for ax, (label, at) in zip(axes[0], found.items(), strict=True):
        color_map(ax, axes_of_x, density, cmap="Greys", vmax=1.6 * density.max())
        dots = ax.scatter(*at.x.T, c=at.psi, s=6, linewidth=0, **colors)
        arrows = {"angles": "xy", "scale_units": "xy", "scale": fastest / (1.6 * spacing), "width": 0.006}
        ax.quiver(*at.x.T, *at.slope.T, at.psi, **arrows, **colors)
        ax.set(title=label, aspect="equal")
    name_coordinates(axes)
    figure.colorbar(dots, ax=axes[0], label="score term ψ", pad=0.01)
    return figure
