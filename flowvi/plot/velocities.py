"""The velocity u and the score term psi: curves over a scalar, maps in two dimensions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from flowvi.estimators import Estimator
from flowvi.host import Host, host_of
from flowvi.plot.arguments import Estimators, Parameter, Path, by_label, dimensions, is_discrete, mesh, paths, points_along
from flowvi.plot.reading import density_at, read
from flowvi.plot.style import color_map, name_coordinates, styled_pyplot

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def velocity(
    distribution: Any, estimators: Estimators, parameter: Parameter | Sequence[Parameter] | None = None, *, x: Any = None
) -> Figure:
    r"""The velocity u(x) and the score term psi(x) of :math:`E = w\,[u\cdot\nabla\phi + \psi\,\phi]`, for each parameter.

    For a scalar, a column for each parameter, with the density in grey; in two dimensions a row for each parameter and estimator.

    **Requirements**: those of the estimators; a distribution of event shape () or (2,), without batch.

    Args:
        distribution: The distribution p.
        estimators: One estimator, or several by label.
        parameter: A parameter, see :mod:`flowvi.plot`, or a list of parameters. By default every one with a single element.
        x: The points: an array, or one for each coordinate. By default the range of p's samples.

    Returns:
        The figure: axes of u and of psi for each parameter; in two dimensions of u_1, u_2 and psi.

    Raises:
        ValueError: A shape or a parameter that cannot be drawn, or an error of the estimator, naming a site 'x'.

    Example:
        >>> import pyro.distributions as dist
        >>> import flowvi.pyro
        >>> from flowvi import LR, Flow, plot
        >>> half = Flow(loc=lambda x, p: 0.5)
        >>> figure = plot.velocity(dist.Normal(0.0, 1.0), {"LR": LR(), "half": half}, "loc", x=[-1.0, 0.0, 1.0])
        >>> [float(u) for u in figure.axes[0].lines[1].get_ydata()]
        [0.5, 0.5, 0.5]

    References:
        Parmas and Sugiyama 2021, eq. 19.
    """
    host, dims, named = host_of(distribution), dimensions(distribution), by_label(estimators)
    moving = paths(host, distribution, parameter)
    with styled_pyplot() as plt:
        return (_maps if dims == 2 else _curves)(plt, host, distribution, named, moving, x)


def _curves(plt: Any, host: Host, p: Any, named: Mapping[str, Estimator], moving: Sequence[Path], x: Any) -> Figure:
    (points,) = points_along(host, [p], x)
    discrete = is_discrete(p)
    figure, axes = plt.subplots(2, len(moving), sharex=True, sharey="row", squeeze=False, figsize=(0.9 + 2.3 * len(moving), 4.2))
    for j, path in enumerate(moving):
        for label, estimator in named.items():
            at = read(host, path.move, estimator, points)
            at = at.at(np.argsort(at.x))
            for ax, y in zip(axes[:, j], (at.slope, at.psi), strict=True):
                ax.plot(at.x, y, marker="o" if discrete else "", label=label)
        for ax in axes[:, j]:
            _shade(ax, points, density_at(host, p, points), discrete)
        axes[0, j].set_title(path.label)
        axes[1, j].set_xlabel("x")
    axes[0, 0].set_ylabel("velocity u = dx/dθ")
    axes[1, 0].set_ylabel("score term ψ")
    if len(named) > 1:
        figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside upper center", ncols=4)
    return figure


def _shade(ax: Any, x: np.ndarray, p: np.ndarray, discrete: bool) -> None:
    """Draw the density behind the lines, without a scale."""
    behind = ax.twinx()
    if discrete:
        behind.bar(x, p, color="0.9")
    else:
        behind.fill_between(x, p, color="0.9", linewidth=0)
    behind.set(ylim=(0, 1.1 * p.max()), yticks=[])
    behind.spines["right"].set_visible(False)
    ax.set_zorder(behind.get_zorder() + 1)
    ax.patch.set_visible(False)


def _maps(plt: Any, host: Host, p: Any, named: Mapping[str, Estimator], moving: Sequence[Path], x: Any) -> Figure:
    axes_of_x = points_along(host, [p], x)
    points = mesh(axes_of_x)
    rows = [(path, label, estimator) for path in moving for label, estimator in named.items()]
    figure, axes = plt.subplots(len(rows), 3, squeeze=False, sharex=True, sharey=True, figsize=(9, 0.4 + 2.6 * len(rows)))
    for row, (path, label, estimator) in zip(axes, rows, strict=True):
        at = read(host, path.move, estimator, points)
        for ax, values, name in zip(row, (*at.slope.T, at.psi), ("$u_1$", "$u_2$", "ψ"), strict=True):
            limit = np.abs(values).max() or 1.0
            colors = {"cmap": "PuOr_r", "vmin": -limit, "vmax": limit}
            scatter = partial(ax.scatter, *at.x.T, s=2, rasterized=True)
            drawn = scatter(c=values, **colors) if at.drawn else color_map(ax, axes_of_x, values, **colors)
            figure.colorbar(drawn, ax=ax)
            ax.set_title(", ".join(word for word in (name, path.label, label) if word))
    name_coordinates(axes)
    return figure
