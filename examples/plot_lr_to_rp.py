"""
From LR to RP
=============

The fields u = a u_RP go from ``LR`` (a = 0) to ``RP`` (a = 1) and beyond, and each of them is unbiased. The cost
decides which a has the least variance. This example shows the gradients of single samples for several a, in Pyro and
NumPyro.
"""

# %%
# The parameter is the location of a Normal. There are two costs: a smooth one, and one with ripples, whose derivative
# varies far more than the cost itself.

import sys

import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import numpyro.distributions
import pyro.distributions
import torch

import flowvi.numpyro
import flowvi.pyro  # noqa: F401
from flowvi import Flow, fields, plot

HOSTS = {"NumPyro": (numpyro.distributions.Normal(0.0, 1.0), jnp), "Pyro": (pyro.distributions.Normal(0.0, 1.0), torch)}
COSTS = {
    "smooth, φ = (x - 1)²": lambda xp, x: (x - 1) ** 2,
    "rippled, φ = x + sin 8x": lambda xp, x: x + xp.sin(8 * x),
}
NUM_SAMPLES = 1000 if "--smoke" in sys.argv else 50_000


def blend(a):
    return Flow(fields.scaled(a, fields.location_scale()))


def samples(a, cost, host):
    p, xp = HOSTS[host]
    return plot.gradient_samples(p, blend(a), "loc", lambda x: COSTS[cost](xp, x), num_samples=NUM_SAMPLES)


# %%
# Histograms of the gradient of the smooth cost, whose mean is -2. LR has a long tail, which gets shorter towards RP.

p, _ = HOSTS["Pyro"]
plot.gradients(p, {f"a = {a:g}": blend(a) for a in (0.0, 0.25, 0.5, 0.75, 1.0)}, "loc", lambda x: (x - 1) ** 2, num_samples=NUM_SAMPLES)

# %%
# The standard deviation of one sample as a function of a, for both costs. The lines are NumPyro, and the dots are Pyro,
# with its own draws. The variance is a parabola in a, so three values give its minimum.

plt.rcParams.update(plot.STYLE)
figure, (upper, lower) = plt.subplots(2, 1, figsize=(5.2, 6.0))
smooth, rippled = COSTS
for a, label in ((0.0, "a = 0 (LR)"), (0.5, "a = 0.5"), (1.0, "a = 1 (RP)")):
    upper.hist(samples(a, smooth, "NumPyro"), np.linspace(-25, 7, 81), density=True, histtype="step", linewidth=1.5, label=label)
upper.axvline(-2.0, color="0.5", linewidth=1, label="the exact gradient")
upper.set(title=smooth, xlabel="gradient in loc, from one sample", ylabel="density", yscale="log", ylim=(1e-4, 10.0))
upper.legend(loc="upper left")

blends = np.linspace(-0.25, 1.75, 9)
for cost in COSTS:
    std = {host: np.array([samples(a, cost, host).std() for a in blends]) for host in HOSTS}
    lower.plot(blends, std["NumPyro"], label=cost)
    lower.plot(blends, std["Pyro"], "ko", markersize=3)
    curvature, slope, _ = np.polyfit(blends, std["NumPyro"] ** 2, 2)
    print(f"{cost}: the variance is least at a = {-slope / (2 * curvature):.2f}")
lower.plot([], [], "ko", markersize=3, label="the same in Pyro")
for a, label in ((0.0, "LR"), (1.0, "RP")):
    lower.axvline(a, color="0.8", linewidth=1, zorder=0)
    lower.text(a, 0.0, label, ha="center", va="bottom", color="0.3")
lower.set(xlabel="a, of the field u = a u_RP", ylabel="standard deviation of one sample", ylim=(0.0, None), xticks=[0.0, 0.5, 1.0, 1.5])
lower.legend()
if "--save" in sys.argv:
    figure.savefig(sys.argv[sys.argv.index("--save") + 1], dpi=150)
plt.show()

# %%
# RP is better than LR for the smooth cost, and worse for the rippled one. The best field is neither: it is beyond RP for
# the first cost, and close to LR for the second.
