"""The loss of a program and its gradient as one graph of torch operations, traced with ``make_fx``.

Python runs only while the loss is traced. If it read numbers that change from step to step, the graph would keep the numbers of this
step; so such a program is refused (:mod:`flowvi.pyro.operations`).
"""

from __future__ import annotations

import linecache
from collections.abc import Callable, Iterator, Mapping
from itertools import zip_longest
from traceback import walk_tb
from types import TracebackType
from typing import Any, NamedTuple, NoReturn

import pyro
import torch
from pyro import poutine
from pyro.poutine.runtime import apply_stack
from torch._guards import TracingContext, tracing
from torch._subclasses import FakeTensorMode
from torch.fx import GraphModule, Node
from torch.fx.experimental.proxy_tensor import make_fx

from flowvi.pyro.arguments import Arguments
from flowvi.pyro.generators import forked_generators
from flowvi.pyro.operations import Operations, Reads, is_fresh
from flowvi.pyro.provenance import mark_statements, track_provenance

LIBRARIES = ("torch.", "pyro.", "flowvi.")
TRACERS = ("torch.fx.", "torch._", "torch.utils.", "torch.overrides.", "flowvi.pyro.provenance.", "flowvi.pyro.operations.", __name__)


def distinct(parameters: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Each parameter once, by the first of its names: a guide may register a tensor twice, as AutoIAFNormal does."""
    names: dict[torch.Tensor, str] = {}
    for name, leaf in parameters.items():
        names.setdefault(leaf, name)
    return {name: leaf for leaf, name in names.items()}


class Traced(NamedTuple):
    """A loss as a graph.

    Attributes:
        graph: A function of the parameters, the tensors of the arguments and ``others``. It returns the loss, the gradients of the
            parameters ``trained``, and new values of the parameters ``assigned``. Inputs and outputs are flat.
        names: The parameters that the program uses, each tensor by one name.
        trained: The parameters that have a gradient.
        assigned: The parameters that the program sets, such as the decaying average of a baseline.
        others: Tensors over which the program closes.
    """

    graph: GraphModule
    names: tuple[str, ...]
    trained: tuple[str, ...]
    assigned: tuple[str, ...]
    others: tuple[torch.Tensor, ...]


Loss = Callable[[tuple, dict[str, Any]], torch.Tensor]


def trace(loss: Loss, names: tuple[str, ...], arguments: Arguments, gradient: bool) -> Traced:
    """Trace a loss and its gradient twice: a program that differs between the two traces would differ at the next step.

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
        with torch.set_grad_enabled(gradient), Operations(), poutine.trace(param_only=True) as used:
            with track_provenance() as tracker, mark_statements(tracker), Reads():
                value = loss(args, kwargs)
            if new := sorted(set(used.trace.nodes) - set(names)):
                raise ValueError(
                    f"parameter '{new[0]}': expected parameters that exist after the first step, found a new one; "
                    "make it at the first step too."
                )
            values = {name: store._params[name].detach() for name, leaf in leaves.items() if store._params[name] is not leaf}
            live = [name for name, leaf in leaves.items() if gradient and leaf.requires_grad and name not in values]
            found = torch.autograd.grad(value, [leaves[name] for name in live], allow_unused=True) if value.requires_grad else ()
            gradients = {name: g for name, g in zip(live, found, strict=False) if g is not None}
            trained[:], assigned[:] = gradients, values
            # a gradient may be one of the inputs, which an optimizer must not change
            return [value.detach(), *(g.clone() for g in gradients.values()), *(v.clone() for v in values.values())]

    one_fake_mode = tracing(TracingContext(FakeTensorMode()))  # otherwise make_fx makes one for each node, which takes half of the time
    with store.scope(store.get_state()), one_fake_mode, poutine.block():
        graph = make_fx(run)(list(leaves.values()), [t.detach() for t in arguments.tensors])
    others = _close_over(graph)
    return Traced(graph, tuple(leaves), tuple(trained), tuple(assigned), others)


def _close_over(graph: GraphModule) -> tuple[torch.Tensor, ...]:
    """Make the tensors inside a graph its last inputs, so that it sees changes in them; fresh constants stay inside."""
    nodes = list(graph.graph.nodes)
    last = [node for node in nodes if node.op == "placeholder"][-1:]
    inputs: dict[str, Node] = {}
    for node in nodes:
        if node.op == "get_attr" and not is_fresh(node):
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
    """Refuse a loss whose two traces differ."""
    for one, other in zip_longest(*(str(traced.graph.graph).splitlines() for traced in (first, second)), fillvalue="none"):
        if one != other:
            _refuse_two("operations", one.strip(), other.strip())
    for a, b in zip(_constants(first), _constants(second), strict=True):
        if not torch.equal(a.nan_to_num(), b.nan_to_num()):
            _refuse_two("constants", a, b)


def _refuse_two(what: str, one: Any, other: Any) -> NoReturn:
    raise ValueError(
        f"expected the same {what} in two runs of the program, found {one} and {other}; a compiled step would keep one of them. Draw "
        "with torch, not with numpy or random, and pass what changes from step to step (a temperature) as a tensor among the arguments."
    )


def _constants(traced: Traced) -> Iterator[torch.Tensor]:
    yield from traced.others
    for node in traced.graph.graph.nodes:
        if node.op == "get_attr":
            yield getattr(traced.graph, node.target)


class Place(NamedTuple):
    """Where an error came from.

    Attributes:
        site: The sample statement that was running, if there was one.
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
