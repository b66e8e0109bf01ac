"""
Labels that nobody draws: a mixture of petals
=============================================

The length of a petal depends on the species of the iris, which is not in the data. The library sums out a site with
``infer={"enumerate": "parallel"}`` in the model, and the guide has no such site. Alternatively, the guide draws each
label. This example uses Pyro, and works the same way in NumPyro.
"""

# %%
# The petals of 150 flowers of three species, in centimetres, from scikit-learn.

import sys

import matplotlib.pyplot as plt
import numpy as np
import pyro
import pyro.distributions as dist
import torch
from pyro.infer import SVI
from pyro.optim import Adam
from sklearn.datasets import load_iris

from flowvi import LR, plot
from flowvi.pyro import TraceFlow_ELBO

LENGTHS = torch.tensor(load_iris().data[:, 2], dtype=torch.float32)
STEPS = 5 if "--smoke" in sys.argv else 600

# %%
# The model is written once; ``infer`` decides whether the labels are summed out.


def model_with(infer):
    def model():
        weights = pyro.sample("weights", dist.Dirichlet(torch.full((3,), 2.0)))
        with pyro.plate("species", 3):
            loc = pyro.sample("loc", dist.Normal(4.0, 2.0))
            scale = pyro.sample("scale", dist.LogNormal(-1.0, 0.5))
        with pyro.plate("flowers", len(LENGTHS)):
            label = pyro.sample("label", dist.Categorical(weights), infer=infer)
            pyro.sample("length", dist.Normal(loc[label], scale[label]), obs=LENGTHS)

    return model


def guide():
    def param(name, initial):
        return pyro.param(name, torch.as_tensor(initial), constraint=dist.constraints.positive)

    pyro.sample("weights", dist.Dirichlet(param("concentration", [20.0, 20.0, 20.0])))
    with pyro.plate("species", 3):
        pyro.sample("loc", dist.Normal(pyro.param("loc_loc", torch.tensor([2.0, 4.0, 6.0])), param("loc_scale", [0.1, 0.1, 0.1])))
        pyro.sample("scale", dist.LogNormal(pyro.param("scale_loc", -torch.ones(3)), param("scale_scale", [0.1, 0.1, 0.1])))


def guide_with_labels():
    guide()
    with pyro.plate("flowers", len(LENGTHS)):
        logits = pyro.param("logits", torch.zeros(len(LENGTHS), 3))
        pyro.sample("label", dist.Categorical(logits=logits), infer={"estimator": LR()})


# %%
# Fit both, with one particle.

PROGRAMS = {
    "labels drawn, LR()": (model_with({}), guide_with_labels),
    "labels summed out": (model_with({"enumerate": "parallel"}), guide),
}
losses = {}
for label, (model, of_guide) in PROGRAMS.items():
    pyro.clear_param_store()
    pyro.set_rng_seed(0)
    elbo = TraceFlow_ELBO(max_plate_nesting=1)
    svi = SVI(model, of_guide, Adam({"lr": 0.02}), elbo)
    losses[label] = np.array([svi.step() for _ in range(STEPS)])
    print(f"{label}\n{elbo.describe(model, of_guide)}\n")

# %%
# Top: the loss of both fits. Bottom: the petals, and the three components of the second fit at the medians or means of
# the guide.

fitted = {name: value.detach() for name, value in pyro.get_param_store().items()}
plt.rcParams.update(plot.STYLE)
figure, (upper, lower) = plt.subplots(2, 1, figsize=(5.5, 6.2))
for label, of_fit in losses.items():
    upper.plot(of_fit, label=label, linewidth=1)
upper.set(xlabel="step", ylabel="-ELBO, one particle", yscale="log")
upper.legend()
lower.hist(LENGTHS, np.linspace(0.5, 7.5, 36), density=True, color="0.8", label="petals")
grid, weights = torch.linspace(0.5, 7.5, 400), fitted["concentration"] / fitted["concentration"].sum()
components = weights * dist.Normal(fitted["loc_loc"], fitted["scale_loc"].exp()).log_prob(grid[:, None]).exp()
for k in range(3):
    lower.plot(grid, components[:, k])
lower.plot(grid, components.sum(-1), color="black", linewidth=1, label="their sum")
lower.set(xlabel="length of the petal in cm", ylabel="density")
lower.legend()
plt.show()

# %%
# If the labels are summed out, they add no noise and no parameters, and the fit converges in a hundred steps. If they are
# drawn, each label needs a posterior of its own, learned from noisy scores.
