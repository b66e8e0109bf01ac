"""The operations of the core over torch tensors."""

import math

import torch

broadcast_to, broadcast_shapes = torch.broadcast_to, torch.broadcast_shapes
where, exp, log = torch.where, torch.exp, torch.log


def asarray(x, like):
    return torch.as_tensor(x, dtype=like.dtype, device=like.device)


def stop_gradient(x):
    return x.detach()


def tether(t):
    return t - t.detach()


def derivative(f, x):
    return torch.func.jvp(f, (x,), (torch.ones_like(x),))


def directional(f, x, tangent):
    return torch.func.jvp(f, (x,), (tangent,))[1]


def jacobian(f, x, event_ndim):
    batch_shape, event_shape = x.shape[: x.ndim - event_ndim], x.shape[x.ndim - event_ndim :]
    size = math.prod(event_shape)
    basis = torch.eye(size, dtype=x.dtype, device=x.device).reshape((size, *event_shape))
    columns = torch.func.vmap(lambda e: directional(f, x, e.expand(x.shape)), out_dims=-1)(basis)
    return f(x), columns.reshape((*batch_shape, size, size))


def log_abs(x):
    return x.abs().log()


def trace(a):
    return a.diagonal(dim1=-2, dim2=-1).sum(-1)


def solve(a, b):
    return torch.linalg.solve(a, b.unsqueeze(-1)).squeeze(-1)


def solve_lower(a, b):
    return torch.linalg.solve_triangular(a, b.unsqueeze(-1), upper=False).squeeze(-1)


def log_abs_det(a):
    return torch.linalg.slogdet(a)[1]


def ramp(x):
    return torch.linspace(0.2, 0.8, x.numel(), dtype=x.dtype, device=x.device).reshape(x.shape)


def all_finite(x):
    return x.isfinite().all()


def is_close(x, y):
    return ((x - y).abs() <= 100 * torch.finfo(x.dtype).eps * (1 + x.abs() + y.abs())).all()


def check(ok, message):
    if not ok:
        raise ValueError(message)
