"""Stochastic variational inference in Pyro with compiled steps."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pyro
import torch
from pyro import poutine
from pyro.optim import PyroOptim
from pyro.poutine.runtime import _PYRO_STACK
from pyro.util import warn_if_nan

from flowvi.progress import Bar
from flowvi.pyro.arguments import Arguments
from flowvi.pyro.compiled import Backend, CompiledLoss, require_backend
from flowvi.pyro.elbo import TraceFlow_ELBO
from flowvi.pyro.optimizers import JointOptimizer
from flowvi.pyro.renyi import TraceFlow_RenyiELBO
from flowvi.pyro.tracing import distinct


class CompiledSVI:
    r"""Pyro's :class:`pyro.infer.SVI` with compiled steps: the loss and its gradient are one function, without Python.

    Its estimates are those of the objective, :math:`\sum_s w\,[u\cdot\nabla\phi + \psi\,\phi]` with the u and psi of each site's
    estimator, from the draws of torch's generator. All parameters share one torch optimizer.

    The first step with arguments of new shapes runs as in ``SVI``: it makes the parameters and runs Pyro's checks. The second step
    compiles; later steps run the compiled code. Parameters stay in Pyro's store.

    **Requirements**: Python computes the same at every step. It must not look at draws, parameters or arguments (``if x > 0``,
    ``x.item()``), draw with NumPy or count steps. Whatever changes between steps must be a tensor among the arguments. Other arguments
    must be hashable, and each of their values is compiled separately. Globals and attributes (a module in training mode) are read once.
    Distributions that are sampled by rejection (VonMises) are refused.

    Args:
        model: The model.
        guide: The guide.
        optim: An optimizer of :mod:`pyro.optim`, such as ``pyro.optim.Adam({"lr": 0.01})`` or ``pyro.optim.ClippedAdam(...)``. Its
            constructor, options and clipping are used. Torch's fused version is used if there is one, unless the options set ``fused``
            or ``foreach``. ``optim.save`` and ``optim.load`` work. Schedulers are refused.
        loss: A :class:`TraceFlow_ELBO` or :class:`TraceFlow_RenyiELBO`.
        backend: ``"inductor"`` compiles to C++ (to Triton on GPUs) and needs a compiler; ``"eager"`` runs the same torch operations one
            after the other.

    Raises:
        TypeError: ``loss`` is not an objective of flowvi, or ``optim`` is not an optimizer of Pyro.
        ValueError: At the second step, naming the site: Python looks at numbers, or two runs differ.
        RuntimeError: There is no C++ compiler, or a step is taken inside a handler of Pyro.

    Attributes:
        optimizer: The torch optimizer; None before the first step.

    Example:
        >>> import pyro, torch, pyro.distributions as dist
        >>> from flowvi.pyro import CompiledSVI, TraceFlow_ELBO
        >>> def model(y):
        ...     x = pyro.sample("x", dist.Normal(0.0, 1.0))
        ...     pyro.sample("y", dist.Normal(x, 0.5), obs=y)
        >>> def guide(y):
        ...     pyro.sample("x", dist.Normal(pyro.param("m", torch.tensor(0.0)), 0.4))
        >>> pyro.clear_param_store()
        >>> pyro.set_rng_seed(0)
        >>> svi = CompiledSVI(model, guide, pyro.optim.Adam({"lr": 0.05}), TraceFlow_ELBO(), backend="eager")
        >>> losses = svi.run(300, torch.tensor(1.0), progress_bar=False)
        >>> abs(pyro.param("m").item() - 0.8) < 0.2
        True
        >>> pyro.clear_param_store()

    References:
        Parmas and Sugiyama 2021, eq. 19. Reed, DeVito, He, Ussery and Ansel 2022 (torch.fx).
    """

    def __init__(
        self,
        model: Callable[..., Any],
        guide: Callable[..., Any],
        optim: PyroOptim,
        loss: TraceFlow_ELBO | TraceFlow_RenyiELBO,
        *,
        backend: Backend = "inductor",
    ):
        if not isinstance(loss, TraceFlow_ELBO | TraceFlow_RenyiELBO):
            raise TypeError(f"loss: expected a TraceFlow_ELBO or a TraceFlow_RenyiELBO of flowvi.pyro, found {type(loss).__name__}.")
        require_backend(backend)
        self.model = model
        self.guide = guide
        self.optim: PyroOptim = optim
        self.loss: TraceFlow_ELBO | TraceFlow_RenyiELBO = loss
        self._optimizer = JointOptimizer(optim)
        self._loss_and_gradients = CompiledLoss(loss, model, guide, backend)
        self._loss = CompiledLoss(loss, model, guide, backend, gradient=False)

    @property
    def optimizer(self) -> torch.optim.Optimizer | None:
        """The torch optimizer; None before the first step."""
        return self._optimizer.torch

    def step(self, *args: Any, **kwargs: Any) -> float:
        """Take a gradient step.

        Args:
            *args: Passed to model and guide.
            **kwargs: Passed to model and guide.

        Returns:
            The loss.
        """
        arguments = _arguments(args, kwargs)
        value = self._loss_and_gradients(arguments)
        if value is None:
            with poutine.trace(param_only=True) as used:
                loss = self.loss.loss_and_grads(self.model, self.guide, *args, **kwargs)
            nodes: dict[str, Any] = used.trace.nodes
            leaves = distinct({name: site["value"].unconstrained() for name, site in nodes.items()})
            self._loss_and_gradients.prepare(arguments, tuple(nodes))
        else:
            loss = _number(value.loss)
            store = pyro.get_param_store()._params
            leaves = {name: store[name] for name in value.gradients}
            for name, gradient in value.gradients.items():
                leaves[name].grad = gradient
        self._optimizer.step(leaves)
        return loss

    def evaluate_loss(self, *args: Any, **kwargs: Any) -> float:
        """The loss, without a step.

        Args:
            *args: Passed to model and guide.
            **kwargs: Passed to model and guide.

        Returns:
            The loss.
        """
        arguments = _arguments(args, kwargs)
        value = self._loss(arguments)
        if value is None:
            with poutine.trace(param_only=True) as used:
                loss = self.loss.loss(self.model, self.guide, *args, **kwargs)
            self._loss.prepare(arguments, tuple(used.trace.nodes))
            return loss
        return _number(value.loss)

    def run(self, num_steps: int, *args: Any, progress_bar: bool = True, **kwargs: Any) -> torch.Tensor:
        """Take many steps with the same arguments.

        Args:
            num_steps: How many.
            *args: Passed to model and guide.
            progress_bar: Whether to show a progress bar.
            **kwargs: Passed to model and guide.

        Returns:
            The losses, of shape (num_steps,).
        """
        with Bar(range(num_steps), unit="steps", disable=not progress_bar, desc="SVI") as steps:
            return torch.tensor([self.step(*args, **kwargs) for _ in steps])


def _number(loss: torch.Tensor) -> float:
    value = loss.item()
    warn_if_nan(value, "loss")  # type: ignore[call-overload]
    return value


def _arguments(args: tuple, kwargs: dict[str, Any]) -> Arguments:
    if _PYRO_STACK:
        raise RuntimeError(
            "CompiledSVI: expected a step outside of all handlers of Pyro, found one inside a handler, which would act on some "
            "steps only; apply the handler to model and guide."
        )
    return Arguments.of(args, kwargs)
