"""The style of the figures, and parts that several of them share."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np

COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")  # Okabe and Ito: told apart by the colour-blind
STYLE: Any = {
    "axes.prop_cycle": f"cycler('color', {list(COLORS)})",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": "medium",
    "figure.constrained_layout.use": True,
    "font.size": 10.0,
    "image.cmap": "cividis",
    "legend.frameon": False,
}  #: what the figures look like; ``plt.rcParams.update(STYLE)`` gives figures of your own the same look


@contextmanager
def styled_pyplot() -> Iterator[Any]:
    """matplotlib.pyplot, with our style."""
    try:
        import matplotlib.pyplot as plt
    except ImportError as error:
        error.add_note("flowvi.plot needs matplotlib: pip install 'flowvi[report]'")
        raise
    with plt.rc_context(STYLE):
        yield plt


def mass_colors() -> Any:
    from matplotlib.colors import LinearSegmentedColormap

    return LinearSegmentedColormap.from_list("mass", [COLORS[0], "0.45", COLORS[1]])


def name_coordinates(axes: np.ndarray) -> None:
    for ax in axes[-1]:
        ax.set_xlabel("$x_1$")
    for ax in axes[:, 0]:
        ax.set_ylabel("$x_2$")


def color_map(ax: Any, axes: Sequence[np.ndarray], values: np.ndarray, **options: Any) -> Any:
    return ax.pcolormesh(*axes, values.reshape([len(a) for a in axes[::-1]]), shading="gouraud", rasterized=True, **options)
