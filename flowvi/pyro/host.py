"""Pyro as the core sees it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import torch
from pyro.distributions.util import scale_and_mask
from pyro.nn.module import _Context
from pyro.params.param_store import ParamStoreDict
from pyro.poutine.guide import GuideMessenger
from torch.distributions.kl import kl_divergence
from torch.nn import Module
from torch.nn.parameter import is_lazy

import flowvi.ops.torch
from flowvi.pyro.distributions import WRAPPERS, Estimated, PyroTarget, unwrap
from flowvi.pyro.generators import forked_generators, seed_generators
from flowvi.pyro.proposals import Proposal
from flowvi.unchanged import Restore, attributes, unchanged


@contextmanager
def as_found(*programs: Any) -> Iterator[None]:
    """A context that leaves what programs hold, the parameter store and the generators as they were.

    An autoguide that runs for the first time makes its parameters, at a start that it may draw.
    """
    kinds: dict[type, Callable[[Any], Restore]] = {
        Module: _module,
        torch.Tensor: _tensor,
        torch.Generator: lambda generator: partial(generator.set_state, generator.get_state()),
        **dict.fromkeys((ParamStoreDict, GuideMessenger, _Context), attributes),
    }
    with forked_generators(), unchanged([*programs, pyro.get_param_store()], kinds):
        yield


def _module(module: Module) -> Restore:
    """What restores a module and the numbers in its buffers."""
    restores = [attributes(module), *(_numbers(buffer) for buffer in module.buffers(recurse=False) if _may_change(buffer))]

    def restore() -> None:
        for of_one in restores:
            of_one()

    return restore


def _numbers(tensor: torch.Tensor) -> Restore:
    """What restores the numbers in a tensor."""
    numbers = tensor.detach().clone()

    def restore() -> None:
        tensor.data.copy_(numbers)

    return restore


def _may_change(buffer: torch.Tensor) -> bool:
    """Whether the numbers in a buffer may change in place: torch refuses this for an expanded tensor."""
    if is_lazy(buffer) or buffer.is_inference():
        return False
    return buffer.layout != torch.strided or all(step or size < 2 for size, step in zip(buffer.shape, buffer.stride(), strict=True))


def _tensor(tensor: torch.Tensor) -> Restore:
    """What restores the gradient of a leaf, to which a run may add, and whether it has one; a lazy parameter has no shape again."""
    kind, requires_grad, grad = type(tensor), tensor.requires_grad, tensor.grad if tensor.is_leaf else None
    restore_grad = None if grad is None else _numbers(grad)

    def restore() -> None:
        if tensor.is_leaf:
            tensor.requires_grad_(requires_grad).grad = grad
        if restore_grad is not None:
            restore_grad()
        if type(tensor) is not kind:
            tensor.data = tensor.data.new_empty(0)
            tensor.__class__ = kind

    return restore


class PyroHost:
    """See :class:`flowvi.host.Host`."""

    name = "pyro"
    ops = flowvi.ops.torch
    distribution = torch.distributions.Distribution
    target = PyroTarget
    estimated = Estimated
    wrappers = WRAPPERS
    unwrap = staticmethod(unwrap)
    proposal = Proposal
    as_found = staticmethod(as_found)
    student_t = dist.StudentT
    multivariate_student_t = dist.MultivariateStudentT

    @staticmethod
    def divergence(guide, model):
        try:
            divergence = kl_divergence(guide.fn, model.fn)
        except NotImplementedError:
            return None
        return scale_and_mask(torch.as_tensor(divergence).expand(guide.fn.batch_shape), guide.scale, guide.mask)

    @staticmethod
    def base_sample(statement):
        target = PyroTarget(statement.name, statement.fn, enters=True)
        if not target.transforms or target.one_way() is None:
            return None
        x = statement.value
        try:
            for transform in reversed(target.transforms):
                x = transform.inv(x)  # from the cache
        except (KeyError, NotImplementedError):
            target.require_inverse("the base sample of a value that its transforms have not cached")
        return x.detach()

    compiles = False

    def devices(self) -> list[str]:
        gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
        return ["cpu", *gpus, *(["mps"] if torch.backends.mps.is_available() else [])]

    def array(self, x: Any) -> torch.Tensor:
        x = torch.as_tensor(x)
        return x.to(torch.get_default_dtype()) if x.is_floating_point() else x

    def numpy(self, x: Any) -> np.ndarray:
        return x.detach().cpu().numpy() if isinstance(x, torch.Tensor) else np.asarray(x)

    @contextmanager
    def precise(self) -> Iterator[None]:
        dtype = torch.get_default_dtype()
        torch.set_default_dtype(torch.float64)
        try:
            with pyro.validation_enabled(False), torch.enable_grad():
                yield
        finally:
            torch.set_default_dtype(dtype)

    def sample(self, target: PyroTarget, q: Any, seed: int) -> torch.Tensor:
        with forked_generators():
            seed_generators(seed)
            return q.expand(target.batch_shape).sample().detach()

    def rsample(self, p: Any, seed: Any) -> torch.Tensor:
        with forked_generators():
            seed_generators(int(seed))
            return p.rsample() if p.has_rsample else p.sample()

    def values(self, f: Callable[..., list[torch.Tensor]], size: int) -> Callable[..., list[np.ndarray]]:
        return lambda *arrays: [self.numpy(a) for a in f(torch.zeros(size, requires_grad=True), *arrays)]

    def jacobian(self, f: Callable[..., list[torch.Tensor]], size: int) -> Callable[..., list[np.ndarray]]:
        """In reverse mode: not every derivative of torch can be differentiated again, as :meth:`derivative` does."""

        def run(*arrays: torch.Tensor) -> list[np.ndarray]:
            eta = torch.zeros(size, requires_grad=True)
            return [np.stack([_gradient(e, eta) for e in y.reshape(-1)]).reshape((*y.shape, size)) for y in f(eta, *arrays)]

        return run

    def derivative(self, f: Callable[[torch.Tensor], tuple[torch.Tensor, ...]], t: float) -> tuple[list[np.ndarray], list[np.ndarray]]:
        at = torch.as_tensor(t, dtype=torch.get_default_dtype())
        values, derivatives = torch.autograd.functional.jvp(f, at, torch.ones(()))
        return [self.numpy(a) for a in values], [self.numpy(a) for a in derivatives]


def _gradient(y: torch.Tensor, eta: torch.Tensor) -> np.ndarray:
    if not y.requires_grad:
        return np.zeros(eta.shape)
    (gradient,) = torch.autograd.grad(y, eta, retain_graph=True, allow_unused=True)
    return np.zeros(eta.shape) if gradient is None else gradient.cpu().numpy()


HOST = PyroHost()
