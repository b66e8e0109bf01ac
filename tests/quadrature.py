"""Quadrature rules and finite differences for exact answers."""

import math

import numpy as np

STENCIL = {1: 4 / 5, 2: -1 / 5, 3: 4 / 105, 4: -1 / 280}  # first derivative to order 8


def nodes(low, high, n=201):
    """A double-exponential rule for an interval with at least one finite end."""
    s = np.linspace(-3.6, 3.6, n)
    inner, slope = np.pi / 2 * np.sinh(s), np.pi / 2 * np.cosh(s) * (s[1] - s[0])
    if np.isinf(high):
        return low + np.exp(inner), slope * np.exp(inner)
    if np.isinf(low):
        return high - np.exp(inner), slope * np.exp(inner)
    width = (high - low) / 2
    return low + width * 2 / (1 + np.exp(-2 * inner)), slope * width / np.cosh(inner) ** 2


def slope(f, theta, step=1e-4):
    """The gradient by central differences of fourth order."""
    gradient = []
    for i in range(len(theta)):
        at = lambda e, i=i: f([t + e * (i == j) for j, t in enumerate(theta)])
        gradient.append((8 * (at(step) - at(-step)) - (at(2 * step) - at(-2 * step))) / (12 * step))
    return np.array(gradient)


def gauss(loc, scale, size=40):
    z, w = np.polynomial.hermite_e.hermegauss(size)
    return [(weight, loc + scale * node) for node, weight in zip(z, w / w.sum(), strict=True)]


def log_normal(x, loc, scale):
    return -0.5 * ((x - loc) / scale) ** 2 - math.log(scale) - 0.5 * math.log(2 * math.pi)
