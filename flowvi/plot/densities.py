"""The density p, the sampling density q of an estimator, and its weight."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from flowvi.host import host_of
from flowvi.plot.arguments import Estimators, by_label, dimensions, is_discrete, mesh, points_along
from flowvi.plot.reading import density_at, weight_at
from flowvi.plot.style import color_map, name_coordinates, styled_pyplot

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def proposal(distribution: Any, estimators: Estimators, *, x: Any = None) -> Figure:
    r"""The density p, the sampling density q of an estimator, and its weight w = p / q.

    **Requirements**: those of the estimators; a distribution of event shape () or (2,), without batch.

    Args:
        distribution: The distribution p.
        estimators: One estimator, or several by label.
        x: The points: an array, or one for each coordinate. By default the range of the samples of p and of every q.

    Returns:
        The figure: axes of the densities and of the weights; in two dimensions p, q and w for each estimator.

    Raises:
        ValueError: A shape that cannot be drawn, or an error of the estimator, naming a site 'x'.

    Example:
        >>> import pyro.distributions as dist
        >>> import flowvi.pyro
        >>> from flowvi import LR, plot, proposals
        >>> figure = plot.proposal(dist.Normal(0.0, 1.0), LR(q=proposals.tempered(2.0)), x=[0.0])
        >>> round(float(figure.axes[1].lines[0].get_ydata()[0]) ** 2, 5)
        2.0

    References:
        Parmas and Sugiyama 2021, section 3, on the choice of q.
    """
    host, dims, named = host_of(distribution), dimensions(distribution), by_label(estimators)
    with styled_pyplot() as plt:
        axes_of_x = points_along(host, [distribution], x, *named.values())
        points = mesh(axes_of_x) if dims == 2 else axes_of_x[0]
        p = density_at(host, distribution, points)
        weights = {label: weight_at(host, distribution, estimator, points) for label, estimator in named.items()}
        if dims == 2:
            figure, axes = plt.subplots(len(named), 3, squeeze=False, sharex=True, sharey=True, figsize=(9, 0.4 + 2.6 * len(named)))
            for row, (label, w) in zip(axes, weights.items(), strict=True):
                for ax, values, title in zip(row, (p, p / w, w), ("p", f"q, {label}", f"w = p/q, {label}"), strict=True):
                    figure.colorbar(color_map(ax, axes_of_x, values), ax=ax)
                    ax.set_title(title.removesuffix(", "))
            name_coordinates(axes)
            return figure
        discrete = is_discrete(distribution)
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
