"""The loss of an objective and its gradient, compiled once for each shape of the arguments."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import pyro
import torch
from torch.nn import Parameter

from flowvi.pyro.arguments import Arguments
from flowvi.pyro.elbo import TraceFlow_ELBO
from flowvi.pyro.operations import ReadsNumbersError
from flowvi.pyro.renyi import TraceFlow_RenyiELBO
from flowvi.pyro.tracing import Traced, place_of, trace

Backend = Literal["inductor", "eager"]
MOST = 8  # the most argument shapes that are compiled


class Value(NamedTuple):
    """What a compiled loss returns.

    Attributes:
        loss: The loss.
        gradients: The gradients of the unconstrained parameters that have one.
    """

    loss: torch.Tensor
    gradients: dict[str, torch.Tensor]


class Compiled(NamedTuple):
    """A compiled graph.

    Attributes:
        traced: The graph.
        run: The function that it was compiled to.
        leaves: The unconstrained parameters.
        live: Whether each of them required a gradient when the graph was traced.
    """

    traced: Traced
    run: Callable[..., Any]
    leaves: dict[str, torch.Tensor]
    live: tuple[bool, ...]


class CompiledLoss:
    """The loss of a program, compiled for each shape of the arguments.

    The caller computes the first call with new shapes, which makes the parameters and runs all checks. The second call compiles.

    Args:
        elbo: A :class:`TraceFlow_ELBO` or :class:`TraceFlow_RenyiELBO`.
        model: The model.
        guide: The guide.
        backend: Compiles a graph.
        gradient: Whether to differentiate it.

    Raises:
        ValueError: The objective has fixed draws.
    """

    def __init__(self, elbo: TraceFlow_ELBO | TraceFlow_RenyiELBO, model: Any, guide: Any, backend: Backend, gradient: bool = True):
        if isinstance(elbo, TraceFlow_ELBO) and elbo.particles == "fixed":
            raise ValueError(
                "particles='fixed': expected an objective that is not compiled, since a compiled step draws anew; "
                "use TraceFlow_ELBO with pyro.infer.SVI or elbo.differentiable_loss."
            )
        self.elbo, self.model, self.guide, self.backend, self.gradient = elbo, model, guide, backend, gradient
        self._names: dict[Any, tuple[str, ...]] = {}
        self._compiled: dict[Any, Compiled] = {}
        self._has_warned = False

    def __call__(self, arguments: Arguments) -> Value | None:
        """The loss and its gradient; None if the caller has to compute them, and then :meth:`prepare` the next call."""
        key = arguments.key
        compiled = self._compiled.get(key)
        if compiled is None:
            if key not in self._names or not pyro.get_param_store()._params.keys() >= set(self._names[key]):
                return None
            compiled = self._compiled[key] = self._compile(arguments)
        if not _fits(compiled):
            self._names.clear()
            self._compiled.clear()
            return None
        traced, run, leaves, _ = compiled
        with torch.no_grad():
            loss, *rest = run(*leaves.values(), *arguments.tensors, *traced.others)
            for name, value in zip(traced.assigned, rest[len(traced.trained) :], strict=True):
                leaves[name].copy_(value)
        return Value(loss, dict(zip(traced.trained, rest, strict=False)))

    def prepare(self, arguments: Arguments, names: tuple[str, ...]) -> None:
        """Let the next call with such arguments compile.

        Args:
            arguments: The arguments of the call that was made.
            names: The parameters that it used.
        """
        if len(self._names) < MOST:
            self._names[arguments.key] = names
        if len(self._names) == 2:
            self._warn(
                "the arguments of a compiled step have changed their shapes, or the values of arguments that are not tensors; the step "
                f"is compiled again for each set of arguments that comes twice, up to {MOST} times, and runs eagerly for others. Pass "
                "numbers that change as tensors."
            )

    def _warn(self, message: str) -> None:
        if not self._has_warned:
            self._has_warned = True
            warnings.warn(message, stacklevel=4)

    def _compile(self, arguments: Arguments) -> Compiled:
        names = self._names[arguments.key]
        try:
            traced = trace(self._surrogate, names, arguments, self.gradient)
        except ReadsNumbersError as error:
            raise ValueError(_refusal(error)) from error
        store = pyro.get_param_store()._params
        leaves = {name: store[name] for name in traced.names}
        inputs = [t.detach() for t in (*leaves.values(), *arguments.tensors, *traced.others)]
        live = tuple(leaf.requires_grad for leaf in leaves.values())
        return Compiled(traced, compile_graph(traced.graph, inputs, self.backend), leaves, live)

    def _surrogate(self, args: tuple, kwargs: dict[str, Any]) -> torch.Tensor:
        return self.elbo._surrogate(self.model, self.guide, args, kwargs)


def _refusal(error: ReadsNumbersError) -> str:
    """What is wrong, and at which site."""
    site, line = place_of(error.__traceback__)
    sites = sorted(error.draws) if site is None else [site]
    where = f"site{'s' if len(sites) > 1 else ''} {', '.join(map(repr, sites))}: " if sites else ""
    what = "Python" if site is None else "its distribution or its estimator"
    return (
        f"{where}expected operations on tensors, which a compiled step can repeat, found that {what} looks at numbers, by {error} at "
        f"{line}. A compiled step would use the numbers found now at every step. Use torch.where instead of if, give "
        "the site another estimator or distribution, or use pyro.infer.SVI."
    )


def require_backend(backend: str) -> None:
    """Refuse a backend that does not exist."""
    if backend not in ("inductor", "eager"):
        raise ValueError(f"backend: expected 'inductor' or 'eager', found {backend!r}.")


def _fits(compiled: Compiled) -> bool:
    """Whether a graph is valid for the present parameters. A parameter may be another tensor of the same layout, which is then used."""
    store = pyro.get_param_store()._params
    for (name, known), live in zip(compiled.leaves.items(), compiled.live, strict=True):
        leaf = store.get(name)
        if leaf is None or leaf.requires_grad != live:
            return False
        if leaf is not known:
            if isinstance(known, Parameter) or _layout(leaf) != _layout(known):
                return False
            compiled.leaves[name] = leaf
    return True


def _layout(leaf: torch.Tensor) -> tuple:
    return leaf.shape, leaf.stride(), leaf.dtype, leaf.device


def compile_graph(graph: torch.fx.GraphModule, inputs: list[torch.Tensor], backend: Backend) -> Callable[..., Any]:
    """Compile a graph by inductor, or run torch's own operations one after the other."""
    if backend == "eager":
        return graph.forward
    import torch._inductor.config as config
    from torch._inductor.compile_fx import compile_fx
    from torch._inductor.exc import InductorError, InvalidCxxCompiler

    try:
        with torch.no_grad(), config.patch(fallback_random=True):  # torch's own generator
            compiled: Any = compile_fx(graph, inputs)
            return compiled
    except (InductorError, InvalidCxxCompiler) as error:
        if not isinstance(getattr(error, "inner_exception", error), InvalidCxxCompiler):
            raise
        raise RuntimeError(
            "backend='inductor': expected a C++ compiler, which it needs on CPUs, found none; install g++ (or set CXX), or use "
            "backend='eager', which needs none and takes longer."
        ) from error
