"""What a program may do while it is traced: Python must not read numbers that change from step to step."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch._ops import OpOverload
from torch.fx import Node
from torch.fx.experimental.proxy_tensor import disable_proxy_modes_tracing, get_proxy_mode, get_proxy_slot
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from flowvi.pyro.generators import generator_states, is_tracing
from flowvi.pyro.provenance import METADATA, provenance

aten = torch.ops.aten
CONSTRUCTORS = {"tensor", "as_tensor", "asarray", "new_tensor"}  # they read the numbers of tensors in a list
# their schemas do not say that they change the running mean and variance
BATCH_NORMS = (aten.native_batch_norm.default, aten.cudnn_batch_norm.default, aten.miopen_batch_norm.default)


class ReadsNumbersError(Exception):
    """Python reads numbers that change from step to step.

    Attributes:
        draws: The sites on whose draws these numbers depend.
    """

    def __init__(self, function: str, *tensors: Any):
        super().__init__(function)
        self.draws = provenance(tensors)


def _slot(value: Any) -> Any:
    mode = get_proxy_mode()
    return get_proxy_slot(value, mode.tracer, None) if mode is not None and isinstance(value, torch.Tensor) else None


def is_traced(value: Any) -> bool:
    """Whether the numbers of a tensor may change from step to step, and are not constants of the program."""
    return (slot := _slot(value)) is not None and slot.constant is None and not _is_constant(slot.proxy.node)


def _is_constant(node: Node) -> bool:
    """Whether a node is computed only from constants of its graph that are not changed in place."""
    for ancestor in _closure(node, lambda n: n.all_input_nodes):
        is_input = ancestor.op == "placeholder" or (ancestor.op == "get_attr" and not is_fresh(ancestor))
        if is_input or torch.Tag.nondeterministic_seeded in getattr(ancestor.target, "tags", ()):
            return False
        for alias in _closure(ancestor, lambda n: [user for user in n.users if _is_view(user)]):
            calls = (user for user in alias.users if isinstance(user.target, OpOverload))
            if any(alias in _written(user.target, user.args, user.kwargs) for user in calls):  # type: ignore[arg-type]
                return False
    return True


def _is_view(node: Node) -> bool:
    return node.target is operator.getitem or getattr(node.target, "is_view", False)


def _closure(node: Node, neighbours: Callable[[Node], list[Node]]) -> set[Node]:
    found, new = {node}, [node]
    while new:
        new = [n for n in neighbours(new.pop()) if n not in found] + new
        found.update(new)
    return found


def is_fresh(node: Node) -> bool:
    """Whether a tensor in a graph was made by ``torch.tensor``, and is not one over which the program closes."""
    return all(user.target is aten.lift_fresh_copy.default for user in node.users)


class Reads(TorchFunctionMode):
    """Refuse functions that return the numbers of traced tensors to Python."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        name, kwargs = func.__name__, kwargs or {}
        if name in ("__getitem__", "__setitem__") and isinstance(args[1], torch.Tensor) and args[1].ndim == 0:  # torch would look at it
            if name == "__getitem__" and args[1].dtype == torch.long:
                return args[0].index_select(0, args[1].reshape(1)).squeeze(0)
            if name == "__setitem__" and args[1].dtype == torch.bool:
                args[0].copy_(torch.where(args[1], args[2], args[0]))
                return None
        result = func(*args, **kwargs)
        if name in CONSTRUCTORS:
            lists = [a for a in (*args, *kwargs.values()) if isinstance(a, list | tuple)]
            reads = any(map(is_traced, tree_leaves(lists)))
        elif name in METADATA or result is None or any(isinstance(r, torch.Tensor) for r in tree_leaves(result)):
            reads = False
        else:
            reads = any(map(is_traced, tree_leaves((args, kwargs))))
        if reads:
            raise ReadsNumbersError(name, args, kwargs)
        return result


class Operations(TorchDispatchMode):
    """Refuse operations that read traced numbers, and give equal draws for equal states of the generator.

    A program that runs again from the same state of the generator draws the same numbers; a graph reuses those of the first run.
    Tensors that the program changes in place, such as the statistics of a BatchNorm, are restored.
    """

    def __init__(self):
        super().__init__()
        self.drawn: dict[tuple, torch.Tensor] = {}
        self.before: dict[torch.Tensor, torch.Tensor] = {}

    def __exit__(self, *error):
        super().__exit__(*error)
        with disable_proxy_modes_tracing(), torch.no_grad():
            for tensor, value in self.before.items():
                tensor.copy_(value)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        for tensor in _written(func, args, kwargs) if is_tracing() else ():
            if isinstance(tensor, torch.Tensor) and _slot(tensor) is None and tensor not in self.before:
                with disable_proxy_modes_tracing():
                    self.before[tensor] = tensor.clone()
        if torch.Tag.nondeterministic_seeded in func.tags:
            return self._draw(func, args, kwargs)
        if func is aten.index.Tensor:
            return func(args[0], list(_without_masks(args[1])))
        if torch.Tag.data_dependent_output in func.tags or torch.Tag.dynamic_output_shape in func.tags:
            if any(map(is_traced, tree_leaves((args, kwargs)))):
                raise ReadsNumbersError(func.overloadpacket.__name__, args, kwargs)
            with disable_proxy_modes_tracing():
                return func(*args, **kwargs)
        return func(*args, **kwargs)

    def _draw(self, func: Any, args: tuple, kwargs: dict[str, Any]) -> torch.Tensor:
        if kwargs.get("generator") is not None:
            raise ValueError(
                "expected draws from torch's own generator in a compiled step, found generator=..., whose state a graph does not keep; "
                "leave it out."
            )
        if func is aten.bernoulli.default:
            (p,) = args
            uniform = self._draw(aten.rand.default, (list(p.shape),), {"dtype": torch.float64, "device": p.device})
            return (uniform < p).to(p.dtype)
        filled, parameters = (args[0], args[1:]) if func._schema.is_mutable else (None, args)
        if any(isinstance(leaf, torch.Tensor) for leaf in tree_leaves((parameters, kwargs))):
            return func(*args, **kwargs)
        layout = () if filled is None else (filled.shape, filled.dtype, filled.device)
        key = (func, _state(), layout, repr((parameters, kwargs)))
        if key not in self.drawn:
            result = func(*args, **kwargs)
            self.drawn[key] = result.clone()  # the program may change the result in place
            return result
        with disable_proxy_modes_tracing():  # this advances the generator
            func(*(args if filled is None else (torch.empty_like(filled), *parameters)), **kwargs)
        return self.drawn[key].clone() if filled is None else filled.copy_(self.drawn[key])


def _state() -> bytes:
    with disable_proxy_modes_tracing():
        return b"".join(state.numpy().tobytes() for state in generator_states())


def _written(func: OpOverload, args: tuple, kwargs: Mapping[str, Any]) -> Iterator[Any]:
    """The arguments that an operation changes in place."""
    if func in BATCH_NORMS:
        yield from args[3:5]
    if func._schema.is_mutable:
        for i, argument in enumerate(func._schema.arguments):
            if argument.alias_info is not None and argument.alias_info.is_write:
                yield args[i] if i < len(args) else kwargs.get(argument.name)


def _without_masks(indices: Iterable[torch.Tensor | None]) -> Iterator[torch.Tensor | None]:
    """Indices in which the places where a mask is true replace the mask, because a mask's numbers decide the shape of the result."""
    for index in indices:
        if index is None or index.dtype not in (torch.bool, torch.uint8):
            yield index
        elif is_traced(index):
            raise ReadsNumbersError("a mask as an index", index)
        else:
            with disable_proxy_modes_tracing():
                yield from index.nonzero().unbind(-1)
