"""The loss of a program and its gradient as one graph of torch operations, traced with ``make_fx``.

Python runs at tracing only. Where it looks at numbers that change from step to step, a graph would keep what it found; there the trace
is refused.
"""

from __future__ import annotations

import linecache
import operator
from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import zip_longest
from traceback import walk_tb
from types import TracebackType
from typing import Any, NamedTuple, NoReturn

import pyro
import torch
from pyro import poutine
from pyro.poutine.runtime import apply_stack
from torch._guards import TracingContext, tracing
from torch._ops import OpOverload
from torch._subclasses import FakeTensorMode
from torch.fx import GraphModule, Node
from torch.fx.experimental.proxy_tensor import disable_proxy_modes_tracing, get_proxy_mode, get_proxy_slot, make_fx
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import TreeSpec, tree_flatten, tree_leaves, tree_unflatten

from flowvi.pyro.generators import forked_generators, generator_states, is_tracing
from flowvi.pyro.provenance import METADATA, mark_statements, provenance, track_provenance

aten = torch.ops.aten
CONSTRUCTORS = {"tensor", "as_tensor", "asarray", "new_tensor"}  # they read the numbers of tensors in a list
# their schemas do not say that they change the running mean and variance
BATCH_NORMS = (aten.native_batch_norm.default, aten.cudnn_batch_norm.default, aten.miopen_batch_norm.default)
LIBRARIES = ("torch.", "pyro.", "flowvi.")
TRACERS = ("torch.fx.", "torch._", "torch.utils.", "torch.overrides.", "flowvi.pyro.provenance.", __name__)


class Arguments(NamedTuple):
    """The arguments of a step.

    Attributes:
        tensors: The tensors in them, whose numbers may change from step to step.
        key: All else, and the shapes of the tensors: what a graph holds for.
    """

    tensors: list[torch.Tensor]
    key: tuple[TreeSpec, tuple]

    @classmethod
    def of(cls, args: tuple, kwargs: dict[str, Any]) -> Arguments:
        """Those of one call.

        Raises:
            ValueError: A tensor requires a gradient.
            TypeError: Something that is not a tensor cannot be compared with what was given before.
        """
        leaves, spec = tree_flatten((args, kwargs))
        return cls([leaf for leaf in leaves if isinstance(leaf, torch.Tensor)], (spec, tuple(map(_fixed, leaves))))

    def filled(self, tensors: list[torch.Tensor]) -> tuple[tuple, dict[str, Any]]:
        """The same arguments with other tensors."""
        spec, fixed = self.key
        of_step = iter(tensors)
        return tree_unflatten([next(of_step) if kind is torch.Tensor else value for kind, value in fixed], spec)


def _fixed(leaf: Any) -> tuple[type, Any]:
    """What a graph holds for: the shape of a tensor, or the value of something else."""
    if isinstance(leaf, torch.Tensor):
        if leaf.requires_grad:
            raise ValueError(
                "expected arguments without a gradient, found a tensor that requires one; detach it, or make it a parameter "
                "by pyro.param."
            )
        return torch.Tensor, (leaf.shape, leaf.stride(), leaf.dtype, leaf.device)
    try:
        hash(leaf)
    except TypeError:
        raise TypeError(
            f"expected tensors, and values that can be hashed, as arguments of a compiled step, found {type(leaf).__name__}; "
            "pass arrays as tensors, and close over what does not change."
        ) from None
    return type(leaf), leaf


def distinct(parameters: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Each parameter once, by the first of its names: a guide may register one tensor twice, as AutoIAFNormal does."""
    names: dict[torch.Tensor, str] = {}
    for name, leaf in parameters.items():
        names.setdefault(leaf, name)
    return {name: leaf for leaf, name in names.items()}


class Traced(NamedTuple):
    """A loss as a graph.

    Attributes:
        graph: From the parameters, the tensors of the arguments and ``others`` to the loss, the gradients of the parameters
            ``trained``, and new values of those ``assigned``; all of them flat.
        names: The parameters that the program uses, each tensor by one name.
        trained: Those that have a gradient.
        assigned: Those that the program sets, such as the decaying average of a baseline.
        others: Tensors over which the program closes.
    """

    graph: GraphModule
    names: tuple[str, ...]
    trained: tuple[str, ...]
    assigned: tuple[str, ...]
    others: tuple[torch.Tensor, ...]


class ReadsNumbersError(Exception):
    """Python looks at numbers that change from step to step.

    Attributes:
        draws: The sites on whose draws these numbers depend.
    """

    def __init__(self, function: str, *tensors: Any):
        super().__init__(function)
        self.draws = provenance(tensors)


Loss = Callable[[tuple, dict[str, Any]], torch.Tensor]


def trace(loss: Loss, names: tuple[str, ...], arguments: Arguments, gradient: bool) -> Traced:
    """Trace a loss and its gradient, twice: what is not the same then would not be the same at the next step.

    Args:
        loss: The loss of arguments and keyword arguments.
        names: The parameters that it uses, which have their values in the parameter store.
        arguments: The arguments.
        gradient: Whether to differentiate it.

    Raises:
        ReadsNumbersError: Python looks at numbers that change from step to step.
        ValueError: The two traces differ.
    """
    with forked_generators(), pyro.validation_enabled(False):
        first, second = (_trace(loss, names, arguments, gradient) for _ in range(2))
    _require_equal(first, second)
    return first


def _trace(loss: Loss, names: tuple[str, ...], arguments: Arguments, gradient: bool) -> Traced:
    store = pyro.get_param_store()
    leaves = distinct({name: store._params[name] for name in names})
    trained: list[str] = []
    assigned: list[str] = []

    def run(parameters: list[torch.Tensor], tensors: list[torch.Tensor]) -> list[torch.Tensor]:
        args, kwargs = arguments.filled(tensors)
        with torch.set_grad_enabled(gradient), _Operations(), poutine.trace(param_only=True) as used:
            with track_provenance() as tracker, mark_statements(tracker), _Reads():
                value = loss(args, kwargs)
            if new := sorted(set(used.trace.nodes) - set(names)):
                raise ValueError(f"parameter '{new[0]}': expected parameters that exist after the first step, found a new one.")
            values = {name: store._params[name].detach() for name, leaf in leaves.items() if store._params[name] is not leaf}
            live = [name for name, leaf in leaves.items() if gradient and leaf.requires_grad and name not in values]
            found = torch.autograd.grad(value, [leaves[name] for name in live], allow_unused=True) if value.requires_grad else ()
            gradients = {name: g for name, g in zip(live, found, strict=False) if g is not None}
            trained[:], assigned[:] = gradients, values
            # a gradient may be one of the inputs, which an optimizer must not change
            return [value.detach(), *(g.clone() for g in gradients.values()), *(v.clone() for v in values.values())]

    one_fake_mode = tracing(TracingContext(FakeTensorMode()))  # else make_fx makes one for each node, which takes half of the time
    with store.scope(store.get_state()), one_fake_mode, poutine.block():
        graph = make_fx(run)(list(leaves.values()), [t.detach() for t in arguments.tensors])
    others = _close_over(graph)
    return Traced(graph, tuple(leaves), tuple(trained), tuple(assigned), others)


def _close_over(graph: GraphModule) -> tuple[torch.Tensor, ...]:
    """Make the tensors that a graph holds its last inputs, so that it sees what changes in them; fresh constants stay in it."""
    nodes = list(graph.graph.nodes)
    last = [node for node in nodes if node.op == "placeholder"][-1:]
    inputs: dict[str, Node] = {}
    for node in nodes:
        if node.op == "get_attr" and not _is_fresh(node):
            if node.target not in inputs:
                with graph.graph.inserting_after(*last) if last else graph.graph.inserting_before(nodes[0]):
                    inputs[node.target] = graph.graph.placeholder(node.target)
                last = [inputs[node.target]]
            node.replace_all_uses_with(inputs[node.target])
            graph.graph.erase_node(node)
    graph.graph.set_codegen(torch.fx.graph.CodeGen())  # flat arguments
    graph.graph.eliminate_dead_code()
    graph.recompile()
    return tuple(getattr(graph, name).detach() for name in inputs)


def _require_equal(first: Traced, second: Traced) -> None:
    """Refuse a loss of which two traces differ."""
    for one, other in zip_longest(*(str(traced.graph.graph).splitlines() for traced in (first, second)), fillvalue="none"):
        if one != other:
            _refuse_two("operations", one.strip(), other.strip())
    for a, b in zip(_constants(first), _constants(second), strict=True):
        if not torch.equal(a.nan_to_num(), b.nan_to_num()):
            _refuse_two("constants", a, b)


def _refuse_two(what: str, one: Any, other: Any) -> NoReturn:
    raise ValueError(
        f"expected the same {what} in two runs of the program, found {one} and {other}, of which a compiled step would keep one. Draw "
        "with torch, not with numpy or random, and pass what changes from step to step (a temperature) as a tensor among the arguments."
    )


def _constants(traced: Traced) -> Iterator[torch.Tensor]:
    yield from traced.others
    for node in traced.graph.graph.nodes:
        if node.op == "get_attr":
            yield getattr(traced.graph, node.target)


# While a trace is taken.


def _slot(value: Any) -> Any:
    mode = get_proxy_mode()
    return get_proxy_slot(value, mode.tracer, None) if mode is not None and isinstance(value, torch.Tensor) else None


def is_traced(value: Any) -> bool:
    """Whether the numbers of a tensor are those of this step, not constants of the program."""
    return (slot := _slot(value)) is not None and slot.constant is None and not _is_constant(slot.proxy.node)


def _is_constant(node: Node) -> bool:
    """Whether a node is computed from nothing but constants of its graph, none of which is changed in place."""
    for ancestor in _closure(node, lambda n: n.all_input_nodes):
        is_input = ancestor.op == "placeholder" or (ancestor.op == "get_attr" and not _is_fresh(ancestor))
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


def _is_fresh(node: Node) -> bool:
    """Whether a tensor that a graph holds is one that ``torch.tensor`` has made, not one over which the program closes."""
    return all(user.target is aten.lift_fresh_copy.default for user in node.users)


class _Reads(TorchFunctionMode):
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


class _Operations(TorchDispatchMode):
    """Refuse operations that look at traced numbers, and let equal states of the generator draw equal numbers.

    A program that runs again from the same state of the generator draws the same numbers; in a graph, it uses those of the first run.
    Tensors that the program changes in place, such as the statistics of a BatchNorm, get their values back.
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
        with disable_proxy_modes_tracing():  # the generator goes on
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
    """Indices with the places where a mask is true instead of the mask, whose numbers decide the shape of the result."""
    for index in indices:
        if index is None or index.dtype not in (torch.bool, torch.uint8):
            yield index
        elif is_traced(index):
            raise ReadsNumbersError("a mask as an index", index)
        else:
            with disable_proxy_modes_tracing():
                yield from index.nonzero().unbind(-1)


# Where a trace was refused.


class Place(NamedTuple):
    """Where an error came from.

    Attributes:
        site: The sample statement that was being run, if there was one.
        line: The line of the program, or of flowvi.
    """

    site: str | None
    line: str


def place_of(traceback: TracebackType | None) -> Place:
    """The statement and the line of the program from which an error came."""
    site, of_program, of_libraries = None, "", ""
    for frame, number in walk_tb(traceback):
        if frame.f_code is apply_stack.__code__ and frame.f_locals["initial_msg"]["type"] == "sample":
            site = frame.f_locals["initial_msg"]["name"]
        module, file = f"{frame.f_globals.get('__name__', '')}.", frame.f_code.co_filename
        line = f"{file}:{number}: {linecache.getline(file, number).strip()}"
        if not module.startswith(LIBRARIES):
            of_program = line
        elif not module.startswith(TRACERS):
            of_libraries = line
    return Place(site, of_program or of_libraries)
