"""Requirements of a GPU in Pyro, tested without one: tensors go to numpy through the CPU, and the generator's state is restored."""

import sys

import pyro
import pyro.distributions as dist
import pytest
import torch

import flowvi.pyro
from flowvi import LR, Flow, check_estimator, plot


def model():
    pyro.sample("y", dist.Normal(pyro.sample("x", dist.Normal(0.0, 1.0)), 0.8), obs=torch.tensor(1.1))


def guide():
    pyro.sample("x", dist.Normal(pyro.param("m", torch.tensor(0.2)), 0.7))


def wide(p):
    return dist.Normal(p.loc, 1.3 * p.scale)


def normal():
    return dist.Normal(torch.tensor(0.3), torch.tensor(1.2))


TOOLS = {
    "describe": lambda: flowvi.pyro.TraceFlow_ELBO().describe(model, guide),
    "describe, bound": lambda: flowvi.pyro.TraceFlow_RenyiELBO().describe(model, guide),
    "gradient_report": lambda: flowvi.pyro.gradient_report(model, guide, estimators={"x": LR(q=wide)}, num_samples=3),
    "check_estimator": lambda: check_estimator(normal(), LR(q=wide), num_samples=2_000, raise_exception=False),
    "plot": lambda: plot.gradient_samples(normal(), Flow(loc=lambda x, p: 0.5), "loc", lambda x: x**2, num_samples=10),
}


@pytest.fixture
def far_away(monkeypatch):
    """Make code in flowvi fail if it converts a tensor to numpy without ``.cpu()``, as on a GPU."""
    near = []
    to_cpu = torch.Tensor.cpu

    def cpu(tensor):
        copy = to_cpu(tensor).view(tensor.shape)
        near.append(copy)
        return copy

    def guarded(method):
        def to_numpy(tensor, *args, **kwargs):
            frame = sys._getframe(1)
            while "site-packages" in frame.f_code.co_filename:
                frame = frame.f_back
            ours = frame.f_globals["__name__"].startswith("flowvi.")
            assert not ours or any(tensor is copy for copy in near), "a tensor of a GPU does not turn into numbers"
            return method(tensor, *args, **kwargs)

        return to_numpy

    monkeypatch.setattr(torch.Tensor, "cpu", cpu)
    for name in ("numpy", "__array__"):
        monkeypatch.setattr(torch.Tensor, name, guarded(getattr(torch.Tensor, name)))


@pytest.mark.parametrize("name", TOOLS)
def test_numbers_come_by_way_of_the_cpu(far_away, name):
    TOOLS[name]()


def test_the_guard_sees_it(far_away):
    """In code of flowvi, a conversion without ``.cpu()`` fails, and one with it passes."""
    code = {"__name__": "flowvi.made_up", "tensor": torch.ones(2)}
    exec("a = tensor.cpu().numpy()", code)
    with pytest.raises(AssertionError, match="does not turn into numbers"):
        exec("a = tensor.numpy()", code)


@pytest.mark.parametrize("name", TOOLS)
def test_the_generator_of_a_gpu_is_put_back(monkeypatch, name):
    """After a seed of torch, the state of the GPU's generator is restored."""
    state = [torch.tensor([7], dtype=torch.uint8)]
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_rng_state", lambda device: state[0])
    monkeypatch.setattr(torch.cuda, "set_rng_state", lambda new, device: state.__setitem__(0, new))
    monkeypatch.setattr(torch.cuda, "manual_seed_all", lambda seed: state.__setitem__(0, torch.tensor([seed], dtype=torch.uint8)))
    TOOLS[name]()
    assert state[0].item() == 7
    torch.manual_seed(3)
    assert state[0].item() != 7


@pytest.mark.parametrize("name", TOOLS)
def test_a_gpu_that_is_not_in_use_gets_no_seed(monkeypatch, name):
    """A GPU that is not in use gets no seed, because torch would store the seed for later and it could not be undone."""
    monkeypatch.setattr(torch.cuda, "manual_seed_all", lambda seed: pytest.fail("a seed for a GPU"))
    TOOLS[name]()
