"""`elbo(model, guide)` with an optimizer of torch: learned parameters belong to the module."""

import copy
import pickle

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer.autoguide import AutoNormal
from pyro.nn import PyroModule

from flowvi import RP, AdaptiveFlow
from flowvi.pyro import TraceFlow_ELBO

DATA = torch.tensor([0.8, -1.1, 2.0, 0.3])


class Model(PyroModule):
    def forward(self):
        with pyro.plate("data", 4, subsample_size=2) as i:
            x = pyro.sample("a.x", dist.Normal(0.0, 1.0))
            pyro.sample("y", dist.Normal(x, 0.5), obs=DATA[i])


@pytest.fixture(params=[False, True], ids=["shared", "local"])
def local(request):
    with pyro.settings.context(module_local_params=request.param):
        yield request.param


def module(estimator, **options):
    model = Model()
    elbo = TraceFlow_ELBO(max_plate_nesting=1, estimators={"a.x": estimator}, **options)(model, AutoNormal(model))
    elbo()
    return elbo


@pytest.mark.parametrize(
    ("estimator", "names"),
    [
        (RP(control_variate="diagonal"), ["control_variate"]),
        (AdaptiveFlow(), ["velocity", "control"]),
        (RP(), []),
    ],
    ids=repr,
)
def test_what_is_learned_are_parameters_of_the_module(local, estimator, names):
    elbo = module(estimator)
    found = {name: p for name, p in elbo.named_parameters() if name.startswith("learned")}
    assert list(found) == [f"learned.a:x_unconstrained:{name}" for name in names]
    assert all(p.shape[0] == 4 for p in found.values())  # one for each element of the plate, not of the subsample
    assert not any("unconstrained." in name for name in pyro.get_param_store())
    before = {name: p.detach().clone() for name, p in found.items()}
    optimizer = torch.optim.Adam(elbo.parameters(), 0.01)
    for _ in range(8):
        optimizer.zero_grad()
        elbo().backward()
        optimizer.step()
    assert all(torch.any(p != before[name]) for name, p in found.items())
    for again in (copy.deepcopy(elbo), pickle.loads(pickle.dumps(elbo))):
        assert again.state_dict().keys() == elbo.state_dict().keys()


def test_the_gradients_are_those_of_svi():
    estimator = RP(control_variate="diagonal")
    elbo = module(estimator, num_particles=3, vectorize_particles=True)
    torch.manual_seed(3)
    elbo().backward()
    ours = {name: p.grad for name, p in elbo.named_parameters()}
    pyro.clear_param_store()
    other = module(estimator, num_particles=3, vectorize_particles=True)
    torch.manual_seed(3)
    TraceFlow_ELBO(3, 2, vectorize_particles=True, estimators={"a.x": estimator}).loss_and_grads(other.model, other.guide)
    theirs = {name: p.grad for name, p in pyro.get_param_store().named_parameters()}
    key = "x_unconstrained.control_variate"
    torch.testing.assert_close(ours["learned.a:x_unconstrained:control_variate"], theirs[f"a.{key}"])
    torch.testing.assert_close(ours["guide.locs.a.x_unconstrained"], theirs["AutoNormal.locs.a.x"])


def test_svi_with_local_parameters_is_refused():
    with pyro.settings.context(module_local_params=True):
        model = Model()
        loss = TraceFlow_ELBO(estimators={"a.x": RP(control_variate="diagonal")})
        svi = pyro.infer.SVI(model, AutoNormal(model), pyro.optim.Adam({}), loss)
        with pytest.raises(ValueError, match=r"site 'a.x_unconstrained': with module_local_params=True .* train that module"):
            svi.step()
