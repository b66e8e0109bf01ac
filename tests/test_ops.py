"""Both backends implement the protocol of the core, and a surrogate has only a first derivative."""

import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

import flowvi.ops.jax
import flowvi.ops.torch
from flowvi.ops import ArrayMethods, Ops

PROTOCOL = {name: f for name, f in vars(Ops).items() if inspect.isfunction(f) and not name.startswith("_")}


@pytest.mark.parametrize("ops", [flowvi.ops.jax, flowvi.ops.torch], ids=["jax", "torch"])
@pytest.mark.parametrize("name", PROTOCOL)
def test_each_operation_is_there(ops, name):
    """Each operation has the arguments of the protocol. A builtin of torch has no signature to compare."""
    _, *parameters = inspect.signature(PROTOCOL[name]).parameters.values()
    function = getattr(ops, name)
    try:
        signature = inspect.signature(function)
    except ValueError:
        assert callable(function)
        return
    positional = [p.name for p in parameters if p.kind is not p.VAR_POSITIONAL and p.name != "live"]
    signature.bind(*positional, **{p.name: None for p in parameters if p.name == "live"})


def test_arrays_have_the_methods_of_the_protocol():
    for x in (jnp.ones((2, 3)), torch.ones(2, 3)):
        assert isinstance(x, ArrayMethods)
        assert x.mT.shape == x.swapaxes(-2, -1).shape == (3, 2)
        assert x.sum(axis=0, keepdims=True).shape == (1, 3)
        assert x.cumsum(-1).reshape((6,)).shape == (6,)
        assert (x > 0).all()


# ---- first_order


def cubed(ops, x):
    return ops.first_order((x**3).sum(), "LR() at site 'x'")


NO_SECOND = r"flowvi: the loss is a surrogate, which has no second derivative because of LR\(\) at site 'x'; only programs whose sites"
X = np.array([0.5, -2.0])


def test_the_first_derivative_in_jax():
    f = lambda x: cubed(flowvi.ops.jax, x)
    x = jnp.asarray(X)
    for transform in (jax.grad, jax.jacfwd, jax.jacrev):
        for compile in (lambda g: g, jax.jit):
            np.testing.assert_array_equal(compile(transform(f))(x), 3 * X**2)
    np.testing.assert_array_equal(jax.vmap(jax.grad(f))(jnp.stack([x, 2 * x])), 3 * np.stack([X, 2 * X]) ** 2)
    np.testing.assert_array_equal(jax.grad(lambda x: jax.vmap(f)(jnp.stack([x, 2 * x])).sum())(x), 27 * X**2)
    assert f(x) == jax.jit(f)(x) == (X**3).sum()


@pytest.mark.parametrize("outer", [jax.grad, jax.jacfwd, jax.jacrev])
@pytest.mark.parametrize("inner", [jax.grad, jax.jacfwd])
@pytest.mark.parametrize("compiled", [False, True])
def test_the_second_derivative_raises_in_jax(outer, inner, compiled):
    f = lambda x: cubed(flowvi.ops.jax, x)
    gradient = inner(jax.jit(f) if compiled else f)
    second = outer(lambda x: (jax.jit(gradient) if compiled else gradient)(x).sum())
    with pytest.raises(ValueError, match=NO_SECOND):
        second(jnp.asarray(X))


def test_derivatives_in_torch():
    x = torch.tensor(X, requires_grad=True)
    loss = cubed(flowvi.ops.torch, x)
    (first,) = torch.autograd.grad(loss, x, retain_graph=True)
    (with_graph,) = torch.autograd.grad(loss, x, create_graph=True)
    for gradient in (first, with_graph):
        np.testing.assert_array_equal(gradient.detach(), 3 * X**2)
    with pytest.raises(ValueError, match=NO_SECOND):
        torch.autograd.grad(with_graph.sum(), x)
    loss.backward()
    np.testing.assert_array_equal(x.grad, 3 * X**2)
    with torch.no_grad():
        assert cubed(flowvi.ops.torch, x) == (X**3).sum()


def test_another_term_keeps_its_second_derivative_in_torch():
    x, y = torch.tensor(X, requires_grad=True), torch.tensor(0.3, requires_grad=True)
    loss = cubed(flowvi.ops.torch, x) + y**3
    (of_y,) = torch.autograd.grad(loss, y, create_graph=True)
    assert torch.autograd.grad(of_y, y)[0] == 6 * y


def test_a_pullback_inside_of_torch_func():
    """A pullback works inside torch.func, whose transforms need another form of the function."""
    x = torch.tensor([0.3, -0.2])

    def f(x):
        (y,) = flowvi.ops.torch.with_pullback((x.detach(),), (x,), (), lambda cotangents, inputs, _: (3 * inputs[0] * cotangents[0],))
        return (y * y).sum()

    torch.testing.assert_close(torch.func.grad(f)(x), 6 * x**2)
    leaf = x.clone().requires_grad_()
    torch.testing.assert_close(torch.autograd.grad(f(leaf), leaf)[0], 6 * x**2)
