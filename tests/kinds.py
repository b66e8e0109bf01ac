"""Every kind of estimator, for a Normal."""

from flowvi import LR, RP, Flow, ImplicitRP


def half_of_loc(x, p):
    return 0.5


def half_of_scale(x, p):
    return 0.5 * (x - p.loc) / p.scale


def half_velocity(x, p, dtheta):
    return 0.5 * (dtheta.loc + (x - p.loc) / p.scale * dtheta.scale)


def half_divergence(x, p, dtheta):
    return 0.5 * dtheta.scale / p.scale + 0 * x


def standardize(x, p):
    return (x - p.loc) / p.scale


def shift(x, p):
    return x - p.loc


def wide(p):
    return type(p)(p.loc, 1.4 * p.scale)


HALF = Flow(loc=half_of_loc, scale=half_of_scale)
KINDS = {
    "LR": LR(),
    "RP": RP(),
    "cdf": ImplicitRP(),
    "S": ImplicitRP(standardize),
    "G-Rep": ImplicitRP(shift, exact=False),
    "half": HALF,
    "half, general": Flow(half_velocity),
    "half, divergence given": Flow(half_velocity, divergence=half_divergence),
    "LR, q": LR(q=wide),
    "RP, q": RP(wide),
    "half, q": Flow(half_velocity, q=wide),
}
WEIGHTS = [0.5, -1.0, 2.0]


def cost_of(h, x):
    return (h.array([1.0, 0.5, -0.3]) * x**2).sum(-1) + h.math.cos(x.sum(-1))
