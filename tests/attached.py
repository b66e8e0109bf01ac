"""What an estimator attaches to a given x, and its derivatives, without a program around it."""

import jax
import jax.numpy as jnp
import numpy as np
import torch

import flowvi.ops.jax
import flowvi.ops.torch
from flowvi.estimators import attach
from flowvi.numpyro.distributions import NumPyroTarget
from flowvi.pyro.distributions import PyroTarget

TARGETS = {"numpyro": (flowvi.ops.jax, NumPyroTarget), "pyro": (flowvi.ops.torch, PyroTarget)}


def attached(host, family, parameters, estimator, x, wrap=lambda d: d):
    """The drawn value, the weight, and the derivative of (value * a).sum() + (score * b).sum() in each parameter."""
    ops, target_of = TARGETS[host.name]
    estimator = estimator(host)

    def draw(parameters):
        fn = wrap(getattr(host.dist, family)(**parameters))
        target = target_of("x", fn, estimator.enters)
        draw = attach(ops, target, estimator.resolve(target), host.array(x) if np.asarray(x).dtype.kind == "f" else integers(host, x))
        total = (draw.value * ramp(host, 0.5, 1.5, draw.value)).sum()
        if draw.score is not None:
            total = total + (draw.score * ramp(host, -1.0, 2.0, draw.score)).sum()
        return total, (draw.value, draw.log_weight)

    if host.name == "numpyro":
        (_, (value, log_weight)), gradient = jax.value_and_grad(draw, has_aux=True)({k: jnp.asarray(v) for k, v in parameters.items()})
        gradient = {k: np.asarray(v) for k, v in gradient.items()}
    else:
        leaves = {k: torch.tensor(v, requires_grad=True) for k, v in parameters.items()}
        total, (value, log_weight) = draw(leaves)
        total.backward()
        gradient = {k: np.zeros(v.shape) if v.grad is None else v.grad.numpy() for k, v in leaves.items()}
    to_numpy = np.asarray if host.name == "numpyro" else lambda a: a.detach().numpy()
    return to_numpy(value), None if log_weight is None else to_numpy(log_weight), gradient


def ramp(host, low, high, like):
    shape = tuple(like.shape)
    return host.array(np.linspace(low, high, int(np.prod(shape)))).reshape(shape)


def integers(host, x):
    return jnp.asarray(x) if host.name == "numpyro" else torch.tensor(x)
