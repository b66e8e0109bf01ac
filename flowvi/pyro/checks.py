"""What :func:`flowvi.check_estimator` asks of Pyro."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pyro
import torch

import flowvi.ops.torch as ops
from flowvi.pyro.distributions import PyroTarget as Target
from flowvi.pyro.distributions import unwrap
from flowvi.pyro.generators import forked_generators, seed_generators

__all__ = ["Distribution", "Target", "array", "jacobian", "lengths", "means", "ops", "path", "precise", "sample", "unwrap", "values"]

lengths = ()
Distribution = torch.distributions.Distribution


@contextmanager
def precise() -> Iterator[None]:
    """Double precision, the host's own validation off, and the generator left as it was."""
    dtype = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        with pyro.validation_enabled(False), torch.enable_grad(), forked_generators():
            yield
    finally:
        torch.set_default_dtype(dtype)


def array(x: Any) -> torch.Tensor:
    return torch.as_tensor(x)


def jacobian(f: Callable[..., list[torch.Tensor]], size: int) -> Callable[..., list[np.ndarray]]:
    """The derivatives of the arrays ``f(eta, *arrays)`` in eta at 0 (last axis), as a function of the arrays: reverse mode."""

    def run(*arrays: torch.Tensor) -> list[np.ndarray]:
        eta = torch.zeros(size, requires_grad=True)
        return [np.stack([_gradient(e, eta) for e in y.reshape(-1)]).reshape((*y.shape, size)) for y in f(eta, *arrays)]

    return run


def _gradient(y: torch.Tensor, eta: torch.Tensor) -> np.ndarray:
    if not y.requires_grad:
        return np.zeros(eta.shape)
    (gradient,) = torch.autograd.grad(y, eta, retain_graph=True, allow_unused=True)
    return np.zeros(eta.shape) if gradient is None else gradient.cpu().numpy()


def values(f: Callable[..., list[torch.Tensor]], size: int) -> Callable[..., list[np.ndarray]]:
    """The arrays ``f(eta, *arrays)`` at 0, with an eta that is live."""
    return lambda *arrays: [a.detach().cpu().numpy() for a in f(torch.zeros(size, requires_grad=True), *arrays)]


def means(f: Callable[[torch.Tensor, range], torch.Tensor], size: int, chunks: int) -> np.ndarray:
    """The derivatives of ``f(eta, chunks)``, whose second axis are chunks: one after the other, each a small graph."""
    parts = [jacobian(lambda eta, i=i: [f(eta, range(i, i + 1))], size)()[0] for i in range(chunks)]
    return np.concatenate(parts, 1)


def sample(target: Any, q: Any, seed: int) -> torch.Tensor:
    """Draws of x, of the full shape, from p or from an expanded proposal, as flowvi draws them."""
    seed_generators(seed)
    return q.expand(target.batch_shape).sample()


def path(fn: Any, seed: int) -> torch.Tensor:
    """A draw by the host's own sampler, with its derivative."""
    seed_generators(seed)
    return fn()
