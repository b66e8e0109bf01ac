"""Attach an estimator to a given x, without a program, and differentiate the result."""

import numpy as np

from flowvi.estimators import attach


def attached(host, family, parameters, estimator, x, wrap=lambda d: d):
    """The drawn value, the weight, and the derivative of (value * a).sum() + (score * b).sum() in each parameter."""
    estimator = estimator(host)

    def draw(parameters):
        fn = wrap(getattr(host.dist, family)(**parameters))
        target = host.target("x", fn, estimator.enters)
        at = host.array(x) if np.asarray(x).dtype.kind == "f" else host.integers(x)
        draw = attach(host.ops, target, estimator.resolve(target), at)
        total = (draw.value * ramp(host, 0.5, 1.5, draw.value)).sum()
        if draw.score is not None:
            total = total + (draw.score * ramp(host, -1.0, 2.0, draw.score)).sum()
        return total, (draw.value, draw.log_weight)

    (_, (value, log_weight)), gradient = host.value_and_gradient(draw, parameters, has_aux=True)
    return host.numpy(value), None if log_weight is None else host.numpy(log_weight), gradient


def ramp(host, low, high, like):
    shape = tuple(like.shape)
    return host.array(np.linspace(low, high, int(np.prod(shape)))).reshape(shape)
