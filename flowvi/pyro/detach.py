"""Distributions without their derivatives.

Torch cannot copy a distribution with detached tensors, and a distribution built again from its parameters would lose other attributes
of a subclass. So the copy is made attribute by attribute.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

HOLDERS = (torch.distributions.Distribution, torch.distributions.Transform, torch.nn.Module)  # classes that hold tensors


def detached(value: Any) -> Any:
    """A copy in which every tensor is detached, through distributions, transforms, modules and containers."""
    if isinstance(value, torch.Tensor):
        return value.detach()
    if type(value) in (list, tuple):
        return type(value)(map(detached, value))
    if isinstance(value, dict):
        return type(value)((k, detached(v)) for k, v in value.items())
    if isinstance(value, torch.distributions.transforms._InverseTransform):
        return detached(value.inv).inv
    if isinstance(value, HOLDERS):
        new: Any = object.__new__(type(value))
        new.__dict__.update(vars(value))
        if isinstance(value, torch.distributions.Transform):
            new._inv = None  # a transform and its inverse refer to each other
        for name, held in vars(new).items():
            if type(held) not in (bool, torch.Size):
                new.__dict__[name] = detached(held)
        if isinstance(value, torch.distributions.Distribution):
            new._validate_args = False
        return new
    return value


def tensors_in(value: Any) -> Iterator[torch.Tensor]:
    """Every tensor in a transform, or in a tensor itself."""
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, torch.distributions.transforms._InverseTransform):
        yield from tensors_in(value.inv)
    elif isinstance(value, torch.distributions.Transform | torch.nn.Module):
        yield from tensors_in({k: v for k, v in vars(value).items() if k not in ("_inv", "_cached_x_y")})
    elif isinstance(value, list | tuple | dict):
        for item in value.values() if isinstance(value, dict) else value:
            yield from tensors_in(item)
