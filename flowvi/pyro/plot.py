"""What :mod:`flowvi.plot` draws, read off an estimator at a Pyro distribution."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch

import flowvi.ops.torch as ops
from flowvi.estimators import Estimator, attach
from flowvi.plot import At
from flowvi.pyro.distributions import PyroTarget
from flowvi.pyro.generators import forked_generators, seed_generators


def at(move: Callable[[Any], Any], estimator: Estimator, x: np.ndarray, t: float, f: Callable[[Any], Any], seed: int) -> At:
    """See :class:`flowvi.plot.At`. Where the estimator is the host's own sampler, x are that many of its draws."""
    served = _served(move(_tensor(t)), estimator)
    detached: list[torch.Tensor] = []

    def run(t):
        p, target = _site(move(t), served, len(x))
        if served.uses_sampler:
            value, score, log_weight = p.rsample(), None, None
        else:
            draw = attach(ops, target, served, target.pull(_tensor(x)))
            value, score, log_weight = draw.value, draw.score, draw.log_weight
        none = torch.zeros(len(x))
        score, log_weight = (none if a is None else a for a in (score, log_weight))
        detached[:] = value.detach(), log_weight.exp()
        return f(value), score

    with forked_generators():
        seed_generators(seed)
        (phi, _), (slope, psi) = torch.autograd.functional.jvp(run, _tensor(t), torch.ones(()))
    value, weight = detached
    return At(served.uses_sampler, *(a.cpu().numpy() for a in (value, phi, slope, psi, weight)))


def sample(p: Any, estimator: Estimator, num: int, seed: int) -> np.ndarray:
    """Draws from the estimator's proposal."""
    served = _served(p, estimator)
    _, target = _site(p, served, num)
    with forked_generators():
        seed_generators(seed)
        return target.push(served.proposal(ops, target)[0].sample()).detach().cpu().numpy()


def density(p: Any, x: np.ndarray) -> np.ndarray:
    return p.log_prob(_tensor(x)).exp().detach().cpu().numpy()


def _tensor(x: Any) -> torch.Tensor:
    return torch.as_tensor(x, dtype=torch.get_default_dtype())


def _served(p: Any, estimator: Estimator) -> Estimator:
    return estimator.resolve(PyroTarget("x", p, enters=True))


def _site(p: Any, served: Estimator, num: int) -> tuple[Any, PyroTarget]:
    """A site of ``num`` independent elements."""
    p = p.expand((num,))
    return p, PyroTarget("x", p, served.enters)
