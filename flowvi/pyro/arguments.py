"""The arguments of a compiled step: what a graph holds for, and what may change from step to step."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch.utils._pytree import TreeSpec, tree_flatten, tree_unflatten


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
