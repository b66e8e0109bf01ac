"""
A velocity field that learns
============================

For each cost there is a best field, somewhere between LR and RP or beyond, and it is not known beforehand.
``AdaptiveFlow`` learns it while SVI runs, together with a control variate. With ``q="learned"`` it learns the sampling
density too. Learning changes the variance of the gradient and never its mean. This example uses Pyro; in NumPyro, pass
``flowvi.numpyro.adaptive(guide, elbo)`` to ``SVI`` as the guide.
"""

# %%
# A posterior with ripples. Their derivative makes RP noisy, and the overall slope makes LR noisy.

import sys

import matplotlib.pyplot as plt
import numpy as np
import pyro
import pyro.distributions as dist
import torch
from pyro.infer import SVI
from pyro.optim import Adam

from flowvi import LR, RP, AdaptiveFlow, plot
from flowvi.pyro import TraceFlow_ELBO, gradient_report


def model():
    x = pyro.sample("x", dist.Normal(2.0, 1.0))
    pyro.factor("ripples", torch.sin(4 * x))


def guide():
    loc = pyro.param("loc", torch.tensor(0.5))
    scale = pyro.param("scale", torch.tensor(0.8), constraint=dist.constraints.positive)
    pyro.sample("x", dist.Normal(loc, scale))


# %%
# The candidates. Without bumps, the field is u = a u_RP with a number a for each parameter, which starts at 1. With
# bumps, a depends on x.

CANDIDATES = {
    "LR": LR(),
    "RP": RP(),
    "blend": AdaptiveFlow(bumps=0),
    "5 bumps": AdaptiveFlow(),
    "5 bumps, learned q": AdaptiveFlow(q="learned"),
}
STEPS, NUM_SAMPLES = (10, 20) if "--smoke" in sys.argv else (800, 1000)

# %%
# The learned coefficients are parameters, such as ``"x.velocity"``, and the optimizer trains them. Here the guide's own
# parameters stay fixed (a step size of 0), so that the variances can be compared. The rows of ``"x.velocity"`` belong
# to loc and scale.


def step_size(name):
    return {"lr": 0.0 if name in ("loc", "scale") else 0.02}


variances, blends = {}, []
for label, estimator in CANDIDATES.items():
    pyro.clear_param_store()
    pyro.set_rng_seed(0)
    elbo = TraceFlow_ELBO(num_particles=16, vectorize_particles=True, max_plate_nesting=0, estimators={"x": estimator})
    svi = SVI(model, guide, Adam(step_size), elbo)
    for _ in range(STEPS if isinstance(estimator, AdaptiveFlow) else 1):
        svi.step()
        if label == "blend":
            blends.append(pyro.param("x.velocity").detach().numpy()[:, 0].copy())
    report = gradient_report(model, guide, estimators={"x": estimator}, num_samples=NUM_SAMPLES)
    variances[label] = [float(p.variance.sum()) for p in report.parameters if p.parameter in ("loc", "scale")]

# %%
# Top: the coefficients a while they are learned. Bottom: the variance of the gradient from one particle afterwards.

plt.rcParams.update(plot.STYLE)
figure, (upper, lower) = plt.subplots(2, 1, figsize=(5.5, 5.8))
for name, a in zip(("loc", "scale"), np.transpose(blends), strict=True):
    upper.plot(a, label=f"a of {name}")
for a, label in ((0.0, "LR"), (1.0, "RP")):
    upper.axhline(a, color="0.7", linewidth=1)
    upper.text(0, a, f" {label}", va="bottom", color="0.3")
upper.set(xlabel="step", ylabel="a, of the field u = a u_RP")
upper.legend()
places = np.arange(len(variances))
for j, name in enumerate(("loc", "scale")):
    lower.barh(places + 0.4 * j - 0.2, [v[j] for v in variances.values()], 0.4, label=name)
lower.set_yticks(places, list(variances))
lower.invert_yaxis()
lower.set(xlabel="variance of the gradient, one particle", xscale="log")
lower.legend(title="gradient in")
plt.show()

# %%
# The blend settles between LR and RP, at a different place for each parameter. If a depends on x, the variance falls
# further, and a learned q lowers it again, most of all for the scale.
