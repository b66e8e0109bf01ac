"""Restore and seed torch's random number generators, also those of GPUs."""

from contextlib import AbstractContextManager

import torch


def forked_generators() -> AbstractContextManager[None]:
    """A context after which the generators are as they were before."""
    return torch.random.fork_rng(devices=range(torch.cuda.device_count() if torch.cuda.is_initialized() else 0))


def seed_generators(seed: int) -> None:
    """``torch.manual_seed``, without GPUs that are not in use, whose generators :func:`forked_generators` could not restore."""
    (torch.manual_seed if torch.cuda.is_initialized() else torch.default_generator.manual_seed)(seed)
