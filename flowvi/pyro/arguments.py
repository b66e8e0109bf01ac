"""The arguments of a compiled step: tensors, which may change from step to step, and everything else, for which a graph is compiled."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch.utils._pytree import TreeSpec, tree_flatten, tree_unflatten


class Arguments(NamedTuple):
    """The arguments of a step.

    Attributes:
        tensors: The tensors in them, whose numbers may change from step to step.
        key: Everything else, and the shapes of the tensors. A graph is valid for one key.
        spec: The containers of the tensors and of everything else.
    """

    tensors: list[torch.Tensor]
    key: tuple[str, tuple]
    spec: TreeSpec

    @classmethod
    def of(cls, args: tuple, kwargs: dict[str, Any]) -> Arguments:
        """The arguments of one call.

        Raises:
            ValueError: A tensor requires a gradient.
            TypeError: An argument is neither a tensor nor hashable.
        """
        leaves, spec = tree_flatten((args, kwargs))
        key = str(spec), tuple(map(_fixed, leaves))  # in torch 2.7 a spec has no hash
        return cls([leaf for leaf in leaves if isinstance(leaf, torch.Tensor)], key, spec)

    def filled(self, tensors: list[torch.Tensor]) -> tuple[tuple, dict[str, Any]]:
        """The same arguments with other tensors."""
        of_step = iter(tensors)
        return tree_unflatten([next(of_step) if kind is torch.Tensor else value for kind, value in self.key[1]], self.spec)


def _fixed(leaf: Any) -> tuple[type, Any]:
    """The part of the key for an argument: the layout of a tensor, or the value of anything else."""
    if isinstance(leaf, torch.Tensor):
        if leaf.requires_grad:
            raise ValueError(
                "expected arguments that do not require a gradient, found a tensor that does; detach it, or make it a parameter "
                "by pyro.param."
            )
        return torch.Tensor, (leaf.shape, leaf.stride(), leaf.dtype, leaf.device)
    try:
        hash(leaf)
    except TypeError:
        raise TypeError(
            f"expected tensors and hashable values as arguments of a compiled step, found {type(leaf).__name__}; "
            "pass arrays as tensors, and close over what does not change."
        ) from None
    return type(leaf), leaf
