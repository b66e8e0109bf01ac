"""The objectives with a compiled loss and gradient, like Pyro's ``Jit*`` objectives."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pyro
import torch
from pyro import poutine
from pyro.util import warn_if_nan

import flowvi.ops.torch as ops
from flowvi.pyro.arguments import Arguments
from flowvi.pyro.compiled import Backend, CompiledLoss, Value, require_backend
from flowvi.pyro.elbo import TraceFlow_ELBO
from flowvi.pyro.renyi import TraceFlow_RenyiELBO


class _Jit:
    """An objective whose loss and gradient are compiled, for each pair of model and guide."""

    def __init__(self, *args: Any, backend: Backend = "inductor", **options: Any):
        require_backend(backend)
        super().__init__(*args, **options)
        self._backend: Backend = backend
        self._compiled: dict[Any, CompiledLoss] = {}

    def loss_and_grads(self, model: Callable[..., Any], guide: Callable[..., Any], *args: Any, **kwargs: Any) -> float:
        """The loss, a float; its derivative is added to the ``.grad`` of the parameters.

        Args:
            model: The model.
            guide: The guide.
            *args: Passed to both.
            **kwargs: Passed to both.

        Returns:
            Minus the estimate of the objective.
        """
        value = self._compute(super().loss_and_grads, model, guide, args, kwargs)  # type: ignore[misc]
        if not isinstance(value, Value):
            return value
        for name, gradient in value.gradients.items():
            leaf = _leaf(name)
            leaf.grad = gradient if leaf.grad is None else leaf.grad + gradient
        loss: Any = value.loss.item()
        return warn_if_nan(loss, "loss")

    def differentiable_loss(self, model: Callable[..., Any], guide: Callable[..., Any], *args: Any, **kwargs: Any) -> torch.Tensor:
        """The loss as a scalar tensor: its value is minus the estimate of the objective, its derivative the estimator.

        Args:
            model: The model.
            guide: The guide.
            *args: Passed to both.
            **kwargs: Passed to both.

        Returns:
            A scalar tensor.
        """
        value = self._compute(super().differentiable_loss, model, guide, args, kwargs)  # type: ignore[misc]
        if not isinstance(value, Value):
            return value
        moves = [(g * ops.tether(_leaf(name))).sum() for name, g in value.gradients.items()]
        return warn_if_nan(ops.first_order(sum(moves, value.loss), "its compilation"), "loss")

    def _compute(self, eagerly, model, guide, args, kwargs) -> Any:
        """The compiled loss and its gradient; for arguments of new shapes, the result of ``eagerly``."""
        if (model, guide) not in self._compiled:
            self._compiled[model, guide] = CompiledLoss(self, model, guide, self._backend)  # type: ignore[arg-type]
        compiled, arguments = self._compiled[model, guide], Arguments.of(args, kwargs)
        if (value := compiled(arguments)) is not None:
            return value
        with poutine.trace(param_only=True) as used:
            loss = eagerly(model, guide, *args, **kwargs)
        compiled.prepare(arguments, tuple(used.trace.nodes))
        return loss


def _leaf(name: str) -> torch.Tensor:
    """An unconstrained parameter, by a ``pyro.param`` statement, so that SVI finds it."""
    parameter: Any = pyro.param(name)
    return parameter.unconstrained()


class JitTraceFlow_ELBO(_Jit, TraceFlow_ELBO):
    r"""A :class:`TraceFlow_ELBO` with a compiled loss and gradient, for Pyro's own ``SVI``, like its :class:`pyro.infer.JitTrace_ELBO`.

    Values and gradients are those of :class:`TraceFlow_ELBO`, with the u and psi of each site's estimator. :class:`CompiledSVI` also
    has one optimizer for all parameters, which saves about as much time again.

    **Requirements**: those of :class:`CompiledSVI`. First order only.

    Args:
        *args: As for :class:`TraceFlow_ELBO`.
        backend: As for :class:`CompiledSVI`.
        **options: As for :class:`TraceFlow_ELBO`. ``ignore_jit_warnings`` and ``jit_options`` have no effect: an error replaces Pyro's
            warnings.

    Raises:
        ValueError: As for :class:`CompiledSVI`, at the second step.

    Example:
        >>> import pyro, torch, pyro.distributions as dist
        >>> from flowvi.pyro import JitTraceFlow_ELBO
        >>> def model(y):
        ...     x = pyro.sample("x", dist.Normal(0.0, 1.0))
        ...     pyro.sample("y", dist.Normal(x, 0.5), obs=y)
        >>> def guide(y):
        ...     pyro.sample("x", dist.Normal(pyro.param("m", torch.tensor(0.0)), 0.4))
        >>> pyro.clear_param_store()
        >>> pyro.set_rng_seed(0)
        >>> svi = pyro.infer.SVI(model, guide, pyro.optim.Adam({"lr": 0.05}), JitTraceFlow_ELBO(backend="eager"))
        >>> losses = [svi.step(torch.tensor(1.0)) for _ in range(300)]
        >>> abs(pyro.param("m").item() - 0.8) < 0.2
        True
        >>> pyro.clear_param_store()

    References:
        Parmas and Sugiyama 2021, eq. 19.
    """


class JitTraceFlow_RenyiELBO(_Jit, TraceFlow_RenyiELBO):
    r"""A :class:`TraceFlow_RenyiELBO` with a compiled loss and gradient, for Pyro's own ``SVI``.

    Values and gradients are those of :class:`TraceFlow_RenyiELBO`, with the u and psi of each site's estimator.

    **Requirements**: those of :class:`CompiledSVI`. First order only.

    Args:
        *args: As for :class:`TraceFlow_RenyiELBO`.
        backend: As for :class:`CompiledSVI`.
        **options: As for :class:`TraceFlow_RenyiELBO`.

    Raises:
        ValueError: As for :class:`CompiledSVI`, at the second step.

    Example:
        >>> from flowvi.pyro import JitTraceFlow_RenyiELBO
        >>> JitTraceFlow_RenyiELBO(alpha=0.5, num_particles=10).alpha
        0.5

    References:
        Burda, Grosse and Salakhutdinov 2016; Li and Turner 2016. Parmas and Sugiyama 2021, eq. 19.
    """
