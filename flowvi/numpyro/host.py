"""NumPyro as the core sees it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
from jax.lax import stop_gradient
from numpyro.distributions import kl_divergence
from numpyro.distributions.distribution import validation_enabled
from numpyro.distributions.util import scale_and_mask
from numpyro.infer.autoguide import AutoGuide
from numpyro.primitives import Messenger

import flowvi.ops.jax
from flowvi.numpyro.distributions import WRAPPERS, Estimated, NumPyroTarget, unwrap
from flowvi.numpyro.proposals import Proposal
from flowvi.unchanged import attributes, unchanged

try:
    from jax import enable_x64
except ImportError:  # an older JAX
    from jax.experimental import enable_x64  # type: ignore[no-redef, attr-defined]


@contextmanager
def as_found(*programs: Any) -> Iterator[None]:
    """A context that leaves what programs hold as it was.

    An autoguide that runs for the first time keeps the start that it then draws. A program changes the dict of a ``mutable`` in place.
    """
    with unchanged(programs, {AutoGuide: attributes}), _restore_mutables():
        yield


class _restore_mutables(Messenger):
    """Restore at the end the dicts of ``mutable`` statements."""

    def __enter__(self):
        self.found: dict[int, tuple[dict, dict]] = {}
        return super().__enter__()

    def process_message(self, msg):
        if msg["type"] == "mutable" and isinstance(msg["value"], dict) and id(msg["value"]) not in self.found:
            self.found[id(msg["value"])] = msg["value"], jax.tree.map(lambda leaf: leaf, dict(msg["value"]))

    def __exit__(self, *exception):
        super().__exit__(*exception)
        for found, values in self.found.values():
            found.clear()
            found.update(values)


class NumPyroHost:
    """See :class:`flowvi.host.Host`."""

    name = "numpyro"
    ops = flowvi.ops.jax
    distribution = dist.Distribution
    target = NumPyroTarget
    estimated = Estimated
    wrappers = WRAPPERS
    unwrap = staticmethod(unwrap)
    proposal = Proposal
    as_found = staticmethod(as_found)
    student_t = dist.StudentT
    multivariate_student_t = dist.MultivariateStudentT

    @staticmethod
    def divergence(guide, model):
        try:
            return jnp.asarray(scale_and_mask(kl_divergence(guide.fn, model.fn), scale=guide.scale))  # 0.0 under mask(False)
        except NotImplementedError:
            return None

    @staticmethod
    def base_sample(statement):
        target = NumPyroTarget(statement.name, statement.fn, enters=True)
        if not target.transforms or target.one_way() is None:
            return None
        if not statement.intermediates:
            target.require_inverse("the base sample of a value that was not drawn here")
        return stop_gradient(statement.intermediates[0][0])

    compiles = True
    array = staticmethod(jnp.asarray)
    numpy = staticmethod(np.asarray)

    def devices(self) -> list[str]:
        return list(map(str, jax.devices()))

    @contextmanager
    def precise(self) -> Iterator[None]:
        with enable_x64(True), validation_enabled(False):
            yield

    def sample(self, target: NumPyroTarget, q: Any, seed: int) -> jax.Array:
        return target.sample(q, jax.random.key(seed))

    def rsample(self, p: Any, seed: Any) -> jax.Array:
        return p(rng_key=jax.random.key(seed), sample_shape=())

    def values(self, f: Callable[..., list[jax.Array]], size: int) -> Callable[..., list[np.ndarray]]:
        run = jax.jit(f)
        return lambda *arrays: [np.asarray(a) for a in run(jnp.zeros(size), *arrays)]

    def jacobian(self, f: Callable[..., list[jax.Array]], size: int) -> Callable[..., list[np.ndarray]]:
        @jax.jit
        def run(*arrays: jax.Array) -> list[jax.Array]:
            def along(e: jax.Array) -> list[jax.Array]:
                return jax.jvp(lambda eta: f(eta, *arrays), (jnp.zeros(size),), (e,))[1]

            return jax.vmap(along, out_axes=-1)(jnp.eye(size))

        return lambda *arrays: [np.asarray(derivative) for derivative in run(*arrays)]

    def derivative(self, f: Callable[[jax.Array], tuple[jax.Array, ...]], t: float) -> tuple[list[np.ndarray], list[np.ndarray]]:
        values, derivatives = jax.jvp(f, (jnp.asarray(t, float),), (jnp.ones(()),))
        return [np.asarray(a) for a in values], [np.asarray(a) for a in derivatives]


HOST = NumPyroHost()
