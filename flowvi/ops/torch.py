"""The operations of the core over torch tensors."""

import math
from functools import lru_cache

import torch
from torch import broadcast_to, concatenate, cos, exp, expm1, log, log1p, logaddexp, moveaxis, sin, sqrt, stack, tanh, tril, where  # noqa: F401
from torch.linalg import eigh  # noqa: F401
from torch.special import digamma, i0e, i1e, log_softmax, ndtr, ndtri  # noqa: F401

from flowvi.ops import no_second_derivative


def broadcast_shapes(*shapes):
    return shapes[0] if len(set(shapes)) == 1 else torch.broadcast_shapes(*shapes)  # torch's is slow


def asarray(x, like):
    if isinstance(x, torch.Tensor) and x.dtype == like.dtype and x.device == like.device:  # faster than torch's own check
        return x
    return torch.as_tensor(x, dtype=like.dtype, device=like.device)


def stop_gradient(x):
    return x.detach()


def computed_once(x):
    return x


def tether(t):
    return t - t.detach()


def tangent_of(t):
    return (_TangentInside if torch._C._are_functorch_transforms_active() else _Tangent).apply(t)


class _Tangent(torch.autograd.Function):
    """0 with the derivative of a tensor, also where the tensor is not finite."""

    @staticmethod
    def forward(ctx, t):
        return torch.zeros_like(t)

    @staticmethod
    def backward(ctx, cotangent):
        return cotangent

    @staticmethod
    def jvp(ctx, tangent):
        return tangent.clone()


class _TangentInside(_Tangent):
    """The form that the transforms of torch.func need, which torch takes longer to call."""

    generate_vmap_rule = True

    @staticmethod
    def forward(t):  # type: ignore[override]
        return torch.zeros_like(t)

    @staticmethod
    def setup_context(ctx, inputs, output):
        pass


def derivative(f, x, live):
    with torch.enable_grad():
        x = _differentiable(x)
        y = f(x)
        slope = _pullback(y, x, torch.ones_like(y), live) if y.requires_grad else None
    return (y, slope) if live else (y.detach(), slope)


def gradient(f, x, live):
    y, slope = derivative(f, x, live)
    return y, torch.zeros_like(x) if slope is None else slope


def jacobian(f, x, event_ndim, live):
    batch_shape, event_shape = x.shape[: x.ndim - event_ndim], x.shape[x.ndim - event_ndim :]
    size = math.prod(event_shape)
    basis = torch.eye(size, dtype=x.dtype, device=x.device)
    with torch.enable_grad():
        x = _differentiable(x)
        y = f(x)
        rows = [_pullback(y, x, e.reshape(event_shape).expand(y.shape), live) for e in basis]
        result = y, torch.stack([row.reshape((*batch_shape, size)) for row in rows], -2)
    return result if live else (y.detach(), result[1])


def is_elementwise(f, x):
    with torch.enable_grad():
        x = _differentiable(x)
        y, weights = f(x), ramp(x)
        by_weight, at_once = (_pullback(y, x, w, live=False) for w in (weights, torch.ones_like(y)))
    return is_close(by_weight, weights * at_once) or not all_finite(at_once)


def _differentiable(x):
    return x if x.requires_grad else x.detach().requires_grad_()


def _pullback(y, x, cotangent, live):
    """The derivative of (y * cotangent).sum() in x; ``live``: with a graph for another derivative."""
    if not y.requires_grad:
        return torch.zeros_like(x)
    (gradient,) = torch.autograd.grad(y, x, cotangent, retain_graph=True, create_graph=live, allow_unused=True)
    return torch.zeros_like(x) if gradient is None else gradient


def polygamma(n, x):
    return (-1) ** (n + 1) * math.factorial(n) * torch.special.zeta(n + 1.0, x)  # torch's own has ten digits


def log_abs(x):
    return x.abs().log()


def logsumexp(x, axis):
    return x.logsumexp(axis)


def eye(size, like):
    return torch.eye(size, dtype=torch.bool, device=like.device)


def diagonal_matrix(x):
    return x.unsqueeze(-1) * _unit_matrix(x.shape[-1], x.dtype, x.device)


@lru_cache(maxsize=16)
def _unit_matrix(size, dtype, device):
    return torch.eye(size, dtype=dtype, device=device)


def diagonal(a):
    return a.diagonal(dim1=-2, dim2=-1)


def trace(a):
    return diagonal(a).sum(-1)


def solve(a, b):
    return torch.linalg.solve(a, b.unsqueeze(-1)).squeeze(-1)


def solve_lower(a, b):
    return torch.linalg.solve_triangular(a, b.unsqueeze(-1), upper=False).squeeze(-1)


def solve_upper(a, b):
    return torch.linalg.solve_triangular(a, b.unsqueeze(-1), upper=True).squeeze(-1)


def log_abs_det(a):
    return torch.linalg.slogdet(a)[1]


def iterate(step, n, state):
    for _ in range(n):
        state = step(state)
    return state


def with_pullback(values, inputs, fixed, pullback):
    function = _WithPullbackInside if torch._C._are_functorch_transforms_active() else _WithPullback
    return function.apply(values, fixed, pullback, *inputs)


class _WithPullback(torch.autograd.Function):
    @staticmethod
    def forward(ctx, values, fixed, pullback, *inputs):
        ctx.fixed, ctx.pullback = fixed, pullback
        ctx.save_for_backward(*inputs)
        return tuple(value.view_as(value) for value in values)

    @staticmethod
    def backward(ctx, *cotangents):
        return (_pull_back_once if torch.is_grad_enabled() else _pull_back)(ctx, *cotangents)


class _WithPullbackInside(_WithPullback):
    """The form that the transforms of torch.func need; torch takes as long to call it as for a small density."""

    @staticmethod
    def forward(values, fixed, pullback, *inputs):  # type: ignore[override]
        return tuple(value.view_as(value) for value in values)

    @staticmethod
    def setup_context(ctx, inputs, output):
        _, ctx.fixed, ctx.pullback, *live = inputs
        ctx.save_for_backward(*live)


def _pull_back(ctx, *cotangents):
    return None, None, None, *ctx.pullback(cotangents, ctx.saved_tensors, ctx.fixed)


_pull_back_once = torch.autograd.function.once_differentiable(_pull_back)  # refuses a second derivative, and takes a little longer


def learn(outputs, learned, fixed, second_moment):
    names, size = list(learned), len(outputs)

    def pullback(cotangents, inputs, fixed):
        learned = [t.detach().requires_grad_() for t in inputs[size:]]
        with torch.enable_grad():
            moment = second_moment(cotangents, dict(zip(names, learned, strict=True)), fixed)
        return *cotangents, *torch.autograd.grad(moment, learned)

    values, fixed = (tuple(t.detach() for t in tensors) for tensors in (outputs, fixed))
    return with_pullback(values, (*outputs, *learned.values()), fixed, pullback)


def first_order(loss, what):
    if not loss.requires_grad:
        return loss

    def once(cotangent):
        if torch.is_grad_enabled():  # with create_graph=True
            return _NoDerivative.apply(cotangent, loss, what)
        return None

    once_differentiable = loss.view_as(loss)
    once_differentiable.register_hook(once)
    return once_differentiable


class _NoDerivative(torch.autograd.Function):
    """The unchanged cotangent, in a graph with the loss, so that a second derivative passes through here."""

    @staticmethod
    def forward(cotangent, loss, what):
        return cotangent.view_as(cotangent)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.what = inputs[-1]

    @staticmethod
    def backward(ctx, _):
        raise no_second_derivative(ctx.what)


def nextafter(x, towards):
    return torch.nextafter(x, torch.full_like(x, towards))


def ramp(x):
    return torch.linspace(0.2, 0.8, x.numel(), dtype=x.dtype, device=x.device).reshape(x.shape)


def all_finite(x):
    return math.isfinite((0 * x.detach()).sum())


def is_close(x, y):
    return ((x - y).abs() <= torch.finfo(x.dtype).eps ** 0.5 * (1 + x.abs() + y.abs())).all()


def is_known_equal(x, y):
    if x is y:
        return True
    if isinstance(x, torch.Tensor) and isinstance(y, torch.Tensor):
        return torch.equal(x, y)
    return not isinstance(x, torch.Tensor) and not isinstance(y, torch.Tensor) and x == y


def check(ok, message):
    if not ok:
        raise ValueError(message)
