"""Gradients of single samples: their numbers, and histograms of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np

from flowvi.estimators import Estimator
from flowvi.host import host_of
from flowvi.ops import Array
from flowvi.plot.arguments import Estimators, Parameter, by_label, paths
from flowvi.plot.reading import read, sample
from flowvi.plot.style import COLORS, styled_pyplot

if TYPE_CHECKING:
    from matplotlib.figure import Figure


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

    One row for each estimator, with the mean as a line and the standard deviation as a number. The outermost 1% is not shown.

    **Requirements**: those of the estimators; a distribution without batch.

    Args:
        distribution: The distribution p.
        estimators: One estimator, or several by label.
        parameter: A name or ``move(t)``, see :mod:`flowvi.plot`.
        cost: ``phi(x)`` in the host's functions, from (num_samples,) + event shape to (num_samples,).
        num_samples: The number of samples.
        seed: The seed of the draws.

    Returns:
        The figure: one axes for each estimator.

    Raises:
        ValueError: A parameter that cannot be drawn, or an error of the estimator, naming a site 'x'.

    Example:
        >>> import pyro.distributions as dist
        >>> import flowvi.pyro
        >>> from flowvi import LR, RP, plot
        >>> figure = plot.gradients(dist.Normal(0.0, 1.0), {"LR": LR(), "RP": RP()}, "loc", lambda x: x**2)
        >>> len(figure.axes)
        2

    References:
        Parmas and Sugiyama 2021, eq. 19.
    """
    named = by_label(estimators)
    (path,) = paths(host_of(distribution), distribution, parameter)
    found = {
        label: gradient_samples(distribution, e, parameter, cost, num_samples=num_samples, seed=seed) for label, e in named.items()
    }
    low, high = np.quantile(np.stack(list(found.values())), (0.005, 0.995))
    with styled_pyplot() as plt:
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
        parameter: A name or ``move(t)``, see :mod:`flowvi.plot`.
        cost: ``phi(x)`` in the host's functions, from (num_samples,) + event shape to (num_samples,).
        num_samples: The number of samples.
        seed: The seed of the draws.

    Returns:
        An array of shape (num_samples,).

    Raises:
        ValueError: A parameter that cannot be drawn, or an error of the estimator, naming a site 'x'.

    Example:
        >>> import pyro.distributions as dist
        >>> import flowvi.pyro
        >>> from flowvi import RP, plot
        >>> float(plot.gradient_samples(dist.Normal(0.0, 1.0), RP(), "loc", lambda x: 3 * x).mean())
        3.0

    References:
        Parmas and Sugiyama 2021, eq. 19.
    """
    host = host_of(distribution)
    (path,) = paths(host, distribution, parameter)
    x = sample(host, distribution, estimator, num_samples, seed)
    at = read(host, path.move, estimator, x, f=cost, seed=seed)
    return at.weight * (at.slope + at.psi * at.phi)
