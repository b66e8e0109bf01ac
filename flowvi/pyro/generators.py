"""Torch's random number generators, those of GPUs too: put back, and seeded."""

from contextlib import AbstractContextManager

import torch


def forked_generators() -> AbstractContextManager[None]:
    """They are left as they were."""
    return torch.random.fork_rng(devices=range(torch.cuda.device_count() if torch.cuda.is_initialized() else 0))


def seed_generators(seed: int) -> None:
    """As ``torch.manual_seed``, but for GPUs that are not in use, whose generators :func:`forked_generators` could not put back."""
    (torch.manual_seed if torch.cuda.is_initialized() else torch.default_generator.manual_seed)(seed)
