"""The operations of the core over JAX arrays."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.core import Tracer
from jax.custom_batching import custom_vmap
from jax.lax import stop_gradient
from jax.nn import log_softmax  # noqa: F401
from jax.numpy import broadcast_to, concatenate, cos, exp, expm1, log, log1p, logaddexp, moveaxis, sin, sqrt, stack, tanh, tril, where  # noqa: F401
from jax.numpy.linalg import eigh  # noqa: F401
from jax.scipy.linalg import solve_triangular
from jax.scipy.special import digamma, i0e, i1e, ndtr, ndtri, polygamma  # noqa: F401

from flowvi.ops import no_second_derivative


def broadcast_shapes(*shapes):
    return lax.broadcast_shapes(*shapes)


def asarray(x, like):
    return jnp.asarray(x, like.dtype)


@custom_vmap
def computed_once(x):
    """On CPUs, XLA compiles cheap operations, such as random generators, into each loop that reads their result.

    But XLA does not look into a conditional. The optimization barrier hides the condition, so XLA cannot remove the conditional.
    """
    return lax.platform_dependent(x, cpu=_through_a_branch, default=_same)


@computed_once.def_vmap
def _all_at_once(axis_size, in_batched, x):
    return computed_once(x), True


def _through_a_branch(x):
    return lax.cond(lax.optimization_barrier(jnp.array(True)), _same, _other, x)


def _same(x):
    return x


def _other(x):
    return jnp.full_like(x, jnp.nan) if jnp.issubdtype(x.dtype, jnp.floating) else jnp.zeros_like(x)


def tether(t):
    t = jnp.asarray(t)
    return t - stop_gradient(t)


@jax.custom_jvp
def tangent_of(t):
    return jnp.zeros_like(t)


@tangent_of.defjvp
def _tangent(primals, tangents):
    return tangent_of(primals[0]), tangents[0]  # 0, which an outer derivative may see


def derivative(f, x, live):
    result = jax.jvp(f, (x,), (jnp.ones_like(x),))
    return result if live else stop_gradient(result)


def gradient(f, x, live):
    value, pullback = jax.vjp(f, x)
    result = value, pullback(jnp.ones_like(value))[0]
    return result if live else stop_gradient(result)


def jacobian(f, x, event_ndim, live):
    batch_shape, event_shape = x.shape[: x.ndim - event_ndim], x.shape[x.ndim - event_ndim :]
    size = int(np.prod(event_shape))
    basis = jnp.eye(size, dtype=x.dtype).reshape((size, *event_shape))
    value, columns = jax.vmap(lambda e: jax.jvp(f, (x,), (jnp.broadcast_to(e, x.shape),)), out_axes=(None, -1))(basis)
    result = value, columns.reshape((*batch_shape, size, size))
    return result if live else stop_gradient(result)


def log_abs(x):
    return jnp.log(jnp.abs(x))


def logsumexp(x, axis):
    return jax.scipy.special.logsumexp(x, axis=axis)


def eye(size, like):
    return jnp.eye(size, dtype=bool)


def diagonal(a):
    return jnp.diagonal(a, axis1=-2, axis2=-1)


def diagonal_matrix(x):
    return x[..., None] * jnp.eye(x.shape[-1], dtype=x.dtype).reshape((*(1,) * (x.ndim - 1), *x.shape[-1:] * 2))


def trace(a):
    return jnp.trace(a, axis1=-2, axis2=-1)


def solve(a, b):
    return jnp.linalg.solve(a, b[..., None])[..., 0]


def solve_lower(a, b):
    return _solve_triangular(a, b, lower=True)


def solve_upper(a, b):
    return _solve_triangular(a, b, lower=False)


def _solve_triangular(a, b, lower):
    a = jnp.broadcast_to(a, b.shape + b.shape[-1:])
    return solve_triangular(a, b[..., None], lower=lower)[..., 0]


def log_abs_det(a):
    return jnp.linalg.slogdet(a)[1]


def iterate(step, n, state):
    return lax.fori_loop(0, n, lambda _, state: step(state), state)


def with_pullback(values, inputs, fixed, pullback):
    @jax.custom_vjp
    def attached(values, inputs, fixed):
        return values

    def forward(values, inputs, fixed):
        return values, (inputs, fixed)

    def backward(residuals, cotangents):
        return None, pullback(cotangents, *residuals), None

    attached.defvjp(forward, backward)
    return attached(stop_gradient(values), inputs, stop_gradient(fixed))


def learn(outputs, learned, fixed, second_moment):
    def pullback(cotangents, inputs, fixed):
        return cotangents, jax.grad(second_moment, argnums=1)(cotangents, inputs[1], fixed)

    return with_pullback(outputs, (outputs, learned), fixed, pullback)


@partial(jax.custom_jvp, nondiff_argnums=(1,))
def first_order(loss, what):
    return loss


@first_order.defjvp
def _first_derivative(what, primals, tangents):
    return primals[0], tangents[0] * _one(primals[0], what)


@partial(jax.custom_jvp, nondiff_argnums=(1,))
def _one(x, what):
    """1, with a derivative that raises an error: it is taken if a first derivative is differentiated again."""
    return jnp.ones_like(x)


@_one.defjvp
def _second_derivative(what, primals, tangents):
    raise no_second_derivative(what)


def nextafter(x, towards):
    return jnp.nextafter(x, jnp.asarray(towards, x.dtype))


def ramp(x):
    return jnp.linspace(0.2, 0.8, x.size, dtype=x.dtype).reshape(x.shape)


def all_finite(x):
    return jnp.isfinite(x).all()


def is_elementwise(f, x):
    weights = ramp(x)
    by_weight, at_once = jax.jvp(f, (x,), (weights,))[1], jax.jvp(f, (x,), (jnp.ones_like(x),))[1]
    return is_close(by_weight, weights * at_once) | ~all_finite(at_once)


def is_close(x, y):
    return (jnp.abs(x - y) <= jnp.finfo(x.dtype).eps ** 0.5 * (1 + jnp.abs(x) + jnp.abs(y))).all()


def is_known_equal(x, y):
    if x is y:
        return True
    return not isinstance(x, Tracer) and not isinstance(y, Tracer) and np.array_equal(x, y)


def check(ok, message):
    if not isinstance(ok, Tracer) and not ok:  # a traced value is not known, as in NumPyro's own validation
        raise ValueError(message)
