"""
Learning u and q
================

Between LR and RP, and beyond, there is a best field for each cost, and nobody knows it beforehand. ``AdaptiveFlow``
learns it while SVI runs, with a control variate, and with ``q="learned"`` the sampling density too. What it has learned
so far changes the variance of the gradient and never its mean. This example is Pyro's; in NumPyro the guide is passed
to ``SVI`` through ``flowvi.numpyro.adaptive``.
"""

# %%
# A posterior with ripples: their derivative makes RP noisy, and the slope of the rest makes LR noisy.

import sys

import matplotlib.pyplot as plt
import numpy as np
import pyro
import pyro.distributions as dist
import torch
from pyro.infer import SVI

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
# The candidates. With no bumps, the field is u = a u_RP with a number a for each parameter, which starts at 1; with
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
# The learned coefficients are parameters, ``"x.velocity"`` and others, which the optimizer finds. Here the guide's own
# parameters are held fixed (a step size of 0), so that the variances can be compared. The rows of ``"x.velocity"`` are
# for the parameters loc and scale.


def step_size(name):
    return {"lr": 0.0 if name in ("loc", "scale") else 0.02}


variances, blends = {}, []
for label, estimator in CANDIDATES.items():
    pyro.clear_param_store()
    pyro.set_rng_seed(0)
    elbo = TraceFlow_ELBO(num_particles=16, vectorize_particles=True, max_plate_nesting=0, estimators={"x": estimator})
    svi = SVI(model, guide, pyro.optim.Adam(step_size), elbo)
    for _ in range(STEPS if isinstance(estimator, AdaptiveFlow) else 1):
        svi.step()
        if label == "blend":
            blends.append(pyro.param("x.velocity").detach().numpy()[:, 0].copy())
    report = gradient_report(model, guide, estimators={"x": estimator}, num_samples=NUM_SAMPLES)
    variances[label] = [float(p.variance.sum()) for p in report.parameters if p.parameter in ("loc", "scale")]

# %%
# Left: the numbers of the blend as they are learned. Right: the variance of the gradient from one particle after that.

plt.rcParams.update(plot.STYLE)
figure, (left, right) = plt.subplots(1, 2, figsize=(8.5, 3.2))
for name, a in zip(("loc", "scale"), np.transpose(blends), strict=True):
    left.plot(a, label=f"a of {name}")
for a, label in ((0.0, "LR"), (1.0, "RP")):
    left.axhline(a, color="0.7", linewidth=1)
    left.text(0, a, f" {label}", va="bottom", color="0.3")
left.set(xlabel="step", ylabel="a, of the field u = a u_RP")
left.legend()
places = np.arange(len(variances))
for j, name in enumerate(("loc", "scale")):
    right.barh(places + 0.4 * j - 0.2, [v[j] for v in variances.values()], 0.4, label=name)
right.set_yticks(places, list(variances))
right.invert_yaxis()
right.set(xlabel="variance of the gradient, one particle", xscale="log")
right.legend(title="gradient in")
plt.show()

# %%
# The blend settles between LR and RP, at another place for each parameter. Letting a depend on x lowers the variance
# again, and a learned q does so most for the scale.
