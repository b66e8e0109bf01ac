"""JAX's random generator for CPUs, with the same numbers, but faster.

JAX compiles a call of threefry for CPUs as a loop of five iterations. It takes about two microseconds even for a few numbers, half of a
short step of SVI. Here the loop is unrolled. Its result is stored, since XLA would otherwise compute it again wherever it is read.
Other devices, and versions of JAX without such a loop, use JAX's own generator.

The type of a key says which generator reads it. Where a program can see a key, the key has the type of the one that the program was
given.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache, partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax, random
from jax.extend.random import define_prng_impl, threefry2x32_p, threefry_prng_impl

ROTATIONS = ((13, 15, 26, 6), (17, 29, 16, 24))
PARITY = 0x1BD11BDA
Words = tuple[jax.Array, jax.Array]


def unrolled(key: jax.Array) -> jax.Array:
    """The same key for the unrolled generator, if that is faster than the key's own."""
    counts_elements = getattr(jax.config, "jax_threefry_partitionable", True)  # the default; the other one has other numbers
    if random.key_impl(key) != "threefry2x32" or not counts_elements or not is_a_loop():
        return key
    return random.wrap_key_data(random.key_data(key), impl=UNROLLED)


def is_unrolled(key: Any) -> bool:
    return key is not None and random.key_impl(key) == UNROLLED


def typed_like(key: jax.Array, given: jax.Array) -> jax.Array:
    """The same key, or keys, with the type of another key."""
    data = random.key_data(key)
    return random.wrap_key_data(data, impl=random.key_impl(given)) if jnp.issubdtype(given.dtype, jax.dtypes.prng_key) else data


def rolled(key: jax.Array) -> jax.Array:
    """The same key for JAX's own generator."""
    return random.wrap_key_data(random.key_data(key), impl="threefry2x32")


def split(key: jax.Array, num: int = 2) -> jax.Array:
    """Like ``jax.random.split``: the same keys, of the same type."""
    return typed_like(random.split(unrolled(key), num), key)


def takes(fn: Callable[..., Any], key: jax.Array) -> bool:
    """Whether a distribution draws with keys of this type; a Poisson, for example, accepts only JAX's own."""
    try:
        jax.eval_shape(lambda k: fn(rng_key=k, sample_shape=()), key)
    except Exception:  # if the key is not the cause, the draw with JAX's own key raises the error again
        return False
    return True


@cache
def is_a_loop() -> bool:
    """Whether this version of JAX compiles threefry for CPUs as a loop."""
    word = jax.ShapeDtypeStruct((), jnp.uint32)
    return "while" in jax.jit(threefry2x32_p.bind).trace(word, word, word, word).lower(lowering_platforms=("cpu",)).as_text()


def _threefry(k1: jax.Array, k2: jax.Array, x1: jax.Array, x2: jax.Array) -> Words:
    """The twenty rounds of threefry 2x32 at the counters x, with a key k."""
    keys = (k1, k2, k1 ^ k2 ^ jnp.uint32(PARITY))
    x1, x2 = x1 + k1, x2 + k2
    for i in range(5):
        for r in ROTATIONS[i % 2]:
            x1 = x1 + x2
            x2 = x1 ^ (x2 << jnp.uint32(r) | x2 >> jnp.uint32(32 - r))
        x1, x2 = x1 + keys[(i + 1) % 3], x2 + keys[(i + 2) % 3] + jnp.uint32(i + 1)
    return x1, x2


def _count(key: jax.Array, shape: tuple[int, ...]) -> Words:
    """Two words for each element of ``shape``; the counter is the number of the element."""
    counters = lax.iota(jnp.uint32, math.prod(shape)).reshape(shape)
    return _threefry(key[0], key[1], jnp.zeros(shape, jnp.uint32), counters)


def _split(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    return jnp.stack(_count(key, shape), -1)


def _random_bits(key: jax.Array, bit_width: int, shape: tuple[int, ...]) -> jax.Array:
    high, low = _count(key, shape)
    dtype = jnp.dtype(f"uint{bit_width}")
    return high.astype(dtype) << jnp.array(32, dtype) | low.astype(dtype) if bit_width == 64 else (high ^ low).astype(dtype)


def _fold_in(key: jax.Array, data: jax.Array) -> jax.Array:
    return jnp.stack(_threefry(*key, *threefry_prng_impl.seed(data)))


def _stored(f: Callable[..., jax.Array], *arrays: jax.Array) -> jax.Array:
    """``f(*arrays)`` in a branch that is always taken, though XLA cannot know this; see :func:`flowvi.ops.jax.computed_once`."""
    like = jax.eval_shape(f, *arrays)
    return lax.cond(lax.optimization_barrier(jnp.array(True)), f, lambda *_: jnp.zeros(like.shape, like.dtype), *arrays)


@partial(jax.jit, static_argnums=(0, 1))
def _on_cpus(quick: str, static: tuple, *arrays: jax.Array) -> jax.Array:
    """A function of the generator: the one above on CPUs; JAX's own on other devices, or if the counters need two words."""
    ours, own = QUICK[quick], getattr(threefry_prng_impl, quick)

    def jaxs(*arrays: jax.Array) -> jax.Array:
        return own(*arrays, *static)

    if static and math.prod(static[-1]) >= 2**32:
        return jaxs(*arrays)
    return lax.platform_dependent(*arrays, cpu=partial(_stored, lambda *arrays: ours(*arrays, *static)), default=jaxs)


QUICK: dict[str, Callable[..., jax.Array]] = {"split": _split, "random_bits": _random_bits, "fold_in": _fold_in}
UNROLLED = define_prng_impl(
    key_shape=(2,),
    seed=threefry_prng_impl.seed,
    split=lambda key, shape: _on_cpus("split", (shape,), key),
    random_bits=lambda key, bit_width, shape: _on_cpus("random_bits", (bit_width, shape), key),
    fold_in=lambda key, data: _on_cpus("fold_in", (), key, jnp.asarray(data, jnp.uint32)),
    name="unrolled_threefry2x32",
    tag="cpu",
)
