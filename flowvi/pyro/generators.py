"""Restore and seed torch's random number generators, also those of GPUs."""

from __future__ import annotations

from contextlib import AbstractContextManager
from hashlib import blake2b

import torch
from torch.fx.experimental.proxy_tensor import get_proxy_mode


def is_tracing() -> bool:
    """Whether a step is being traced, to be compiled."""
    return get_proxy_mode() is not None


def forked_generators() -> AbstractContextManager[None]:
    """A context that restores the generators at its end."""
    return torch.random.fork_rng(devices=range(torch.cuda.device_count() if torch.cuda.is_initialized() else 0))


def generator_states() -> tuple[torch.Tensor, ...]:
    """The state of each generator, that of the CPU first."""
    gpus = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else ()
    return torch.default_generator.get_state(), *gpus


def uniforms(states: tuple[torch.Tensor, ...], name: str, shape: tuple[int, ...], like: torch.Tensor) -> torch.Tensor:
    """Uniform numbers for a site from a separate generator, seeded by the states of torch's generators, which do not change.

    In a compiled step they come from torch's own generator: they need not be the same, only independent of the program's draws.
    """
    dtype = like.dtype if like.is_floating_point() else torch.get_default_dtype()
    if is_tracing():
        return torch.rand(shape, dtype=dtype, device=like.device)
    digest = blake2b(b"".join(state.numpy().tobytes() for state in states) + name.encode(), digest_size=7).digest()
    generator = torch.Generator("cpu").manual_seed(int.from_bytes(digest))
    return torch.rand(shape, generator=generator, dtype=dtype, device="cpu").to(like.device)


def restore_generators(states: tuple[torch.Tensor, ...]) -> None:
    """Put the generators into the states of a :func:`generator_states`."""
    cpu, *gpus = states
    torch.default_generator.set_state(cpu)
    for device, state in enumerate(gpus):
        torch.cuda.set_rng_state(state, device)


def seed_generators(seed: int) -> None:
    """``torch.manual_seed``, except for unused GPUs, whose generators :func:`forked_generators` could not restore."""
    (torch.manual_seed if torch.cuda.is_initialized() else torch.default_generator.manual_seed)(seed)
