"""The draws on which a tensor depends, followed through every torch function, in-place writes, indexing and Python branches."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from pyro.poutine.messenger import Messenger
from pyro.poutine.util import site_is_subsample
from torch._C._functorch import get_unwrapped, is_functorch_wrapped_tensor
from torch.overrides import TorchFunctionMode

Names = frozenset[str]
not_followed = torch._C.DisableTorchFunction  # a context in which tensors get no tags

# Functions of a tensor that do not reveal its numbers.
METADATA = {
    *("__get__", "__set__", "__delete__", "__len__", "__hash__", "__deepcopy__", "size", "dim", "ndimension"),
    *("numel", "nelement", "stride", "type", "element_size", "get_device", "storage_offset", "data_ptr"),
    *("is_floating_point", "is_complex", "is_signed", "is_contiguous", "is_conj", "is_neg", "is_inference", "is_same_size"),
    *("register_hook", "has_names", "dtype", "broadcast_shapes", "result_type", "can_cast", "backward", "requires_grad_"),
}
# Functions that write into their first argument and do not return it; ``x.data = y`` calls __set__.
RETURNS_NOTHING = {"__setitem__", "__set__"}
# Functions whose output has a shape that depends on the numbers; Python may read the shape.
DATA_DEPENDENT_SHAPE = {
    "nonzero",
    "argwhere",
    "where",
    "unique",
    "unique_consecutive",
    "masked_select",
    "bincount",
    "repeat_interleave",
}
# Functions of sizes, and methods whose arguments after the tensor are sizes; a draw may give these.
OF_SIZES = {"arange", "empty", "eye", "ones", "rand", "randn", "zeros"}
SIZES_FOLLOW = {"chunk", "expand", "narrow", "new_empty", "new_ones", "new_zeros", "repeat", "reshape", "split", "tile", "view"}
# Modules that look at numbers to check them, not to choose what to run.
CHECKS = ("torch.distributions.", "pyro.distributions.", "pyro.infer.", "pyro.poutine.", "pyro.util", "flowvi.")
PASSED_THROUGH = ("torch.overrides", "torch._tensor", "torch.functional")


class track_provenance(TorchFunctionMode):
    """Tag every tensor that is computed inside with the names of the draws from which it is computed.

    Attributes:
        branched: The draws whose numbers Python has read (``if x > 0``, ``x.item()``, ``table[int(k)]``): everything that runs later
            may depend on them.
        has_drawn: Whether anything has been drawn; before, no tensor has a tag.
    """

    def __init__(self):
        super().__init__()
        self.branched: Names = frozenset()
        self.has_drawn = False

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        if not self.has_drawn:
            return result
        names = provenance(args) | provenance(kwargs)
        if not names:
            return result
        name = func.__name__
        tag(result, names)
        if name in RETURNS_NOTHING:
            tag(args[0], names)
        elif "out" in kwargs:
            tag(kwargs["out"], names)
        if _shows_numbers(name, args, result) and not _by_a_check():
            self.branched |= names
        return result


def provenance(value: Any) -> Names:
    """The names of the draws from which the tensors in ``value`` are computed."""
    names: Names = frozenset()
    for tensor in _tensors(value):
        names |= getattr(tensor, "_flowvi_provenance", frozenset())
        if tensor._base is not None:
            names |= getattr(tensor._base, "_flowvi_provenance", frozenset())
    return names


def tag(value: Any, names: Names) -> None:
    """Add ``names`` to every tensor in ``value``, and to the tensor of which it is a view."""
    for tensor in _tensors(value):
        for t in (tensor, tensor._base):
            if t is not None:
                t._flowvi_provenance = getattr(t, "_flowvi_provenance", frozenset()) | names  # type: ignore[attr-defined]


class mark_statements(Messenger):
    """Record at every sample statement the branches taken so far, and tag each draw with the site's name.

    In the model, a site has the guide's draw, which does not depend on the model's parents. So it is not tagged again.
    """

    def __init__(self, tracker: track_provenance):
        super().__init__()
        self.tracker = tracker
        self.drawn: set[str] = set()

    def _pyro_sample(self, msg):
        msg["branched"] = self.tracker.branched

    def _pyro_post_sample(self, msg):
        if not msg["is_observed"] and not site_is_subsample(msg) and msg["name"] not in self.drawn:
            self.drawn.add(msg["name"])
            self.tracker.has_drawn = True
            tag(msg["value"], frozenset({msg["name"]}) | provenance(msg["fn"]) | msg["branched"])


@contextmanager
def following(inner: AbstractContextManager) -> Iterator[None]:
    """Follow the tensors inside ``inner``, and mark its statements."""
    with track_provenance() as tracker, mark_statements(tracker), inner:
        yield


def _shows_numbers(name: str, args: tuple, result: Any) -> bool:
    if name in DATA_DEPENDENT_SHAPE:
        return name != "where" or len(args) == 1
    if name == "__getitem__":
        return any(_selects_by_numbers(index) for index in (args[1] if isinstance(args[1], tuple) else args[1:]))
    if name in OF_SIZES:
        return True
    if name in SIZES_FOLLOW:
        return bool(provenance(args[1:]))
    if name == "full":
        return bool(provenance(args[:1]))
    return name not in METADATA and result is not None and next(_tensors(result), None) is None


def _selects_by_numbers(index: Any) -> bool:
    """Whether an index is a mask or a slice from a draw, so that the shape of what it selects depends on the draw's numbers."""
    return any((isinstance(index, slice) or t.dtype == torch.bool) and provenance(t) for t in _tensors(index))


def _by_a_check() -> bool:
    """Whether library code that only checks numbers called the torch function."""
    frame = sys._getframe(2)
    while frame.f_back is not None and frame.f_globals["__name__"] in PASSED_THROUGH:
        frame = frame.f_back
    return frame.f_globals["__name__"].startswith(CHECKS)


def _tensors(value: Any) -> Iterator[torch.Tensor]:
    """The tensors in arguments, results, and distributions."""
    if isinstance(value, torch.Tensor):
        yield value
        while is_functorch_wrapped_tensor(value):  # inside of vmap, and of the derivatives of torch.func
            yield (value := get_unwrapped(value))
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _tensors(item)
    elif isinstance(value, dict):
        yield from _tensors(list(value.values()))
    elif isinstance(value, slice):
        yield from _tensors((value.start, value.stop, value.step))
    elif isinstance(value, torch.distributions.Distribution | torch.distributions.Transform):
        yield from _tensors([v for k, v in vars(value).items() if k not in ("_inv", "_cached_x_y")])
