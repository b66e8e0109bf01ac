"""
A state space model in scan: the flow of the Nile
=================================================

The level of a river changes a little from year to year. Model and guide are each one ``scan`` over a hundred years.
``TraceFlow_ELBO`` takes them as they are: draws inside the ``scan`` are pathwise, and sites outside get the estimators
that you choose. This example uses NumPyro.
"""

# %%
# The yearly flow of the Nile at Aswan from 1871 to 1970, in 10⁸ m³ (Cobb 1978; ``nile`` in statsmodels' data sets).

import sys

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import numpyro
import numpyro.distributions as dist
from numpyro.contrib.control_flow import scan
from numpyro.infer import SVI

from flowvi import LR, plot
from flowvi.numpyro import TraceFlow_ELBO, gradient_report

FLOW = [
    *(1120, 1160, 963, 1210, 1160, 1160, 813, 1230, 1370, 1140, 995, 935, 1110, 994, 1020, 960, 1180, 799, 958, 1140),
    *(1100, 1210, 1150, 1250, 1260, 1220, 1030, 1100, 774, 840, 874, 694, 940, 833, 701, 916, 692, 1020, 1050, 969),
    *(831, 726, 456, 824, 702, 1120, 1100, 832, 764, 821, 768, 845, 864, 862, 698, 845, 744, 796, 1040, 759),
    *(781, 865, 845, 944, 984, 897, 822, 1010, 771, 676, 649, 846, 812, 742, 801, 1040, 860, 874, 848, 890),
    *(744, 749, 838, 1050, 918, 986, 797, 923, 975, 815, 1020, 906, 901, 1170, 912, 746, 919, 718, 714, 740),
]
YEARS, Y = 1871 + np.arange(len(FLOW)), jnp.array(FLOW) / 100.0
STEPS, NUM_SAMPLES = (3, 5) if "--smoke" in sys.argv else (2000, 200)

# %%
# The level is a random walk. The guide is a chain too: each level depends on the one before it.


def model():
    drift = numpyro.sample("drift", dist.LogNormal(-1.0, 0.5))  # the size of the change in a year
    noise = numpyro.sample("noise", dist.LogNormal(0.0, 0.5))

    def year(level, y):
        level = numpyro.sample("level", dist.Normal(level, drift))
        numpyro.sample("flow", dist.Normal(level, noise), obs=y)
        return level, None

    scan(year, 10.0, Y)


def guide():
    def param(name, initial):
        return numpyro.param(name, initial, constraint=dist.constraints.positive)

    numpyro.sample("drift", dist.LogNormal(numpyro.param("drift_loc", -1.0), param("drift_scale", 0.2)))
    numpyro.sample("noise", dist.LogNormal(numpyro.param("noise_loc", 0.0), param("noise_scale", 0.2)))
    kept = numpyro.param("kept", jnp.full(len(Y), 0.5))  # the weight of the previous level
    added, scale = numpyro.param("added", 0.5 * Y), param("scale", jnp.full(len(Y), 0.5))

    def year(level, of_year):
        kept, added, scale = of_year
        level = numpyro.sample("level", dist.Normal(kept * level + added, scale))
        return level, level

    return scan(year, 10.0, (kept, added, scale))[1]


# %%
# Fit it. ``describe`` also lists the site inside the scan.

elbo = TraceFlow_ELBO(num_particles=4)
print(elbo.describe(model, guide))
optimizer = numpyro.optim.Adam(lambda step: 0.05 * 0.02 ** (step / STEPS))
fitted = SVI(model, guide, optimizer, elbo).run(jax.random.key(0), STEPS, progress_bar=False).params
for name in ("drift", "noise"):
    print(f"{name}: {100 * np.exp(fitted[f'{name}_loc']):.0f}")

# %%
# Top: the data, and paths of the level under the guide. Bottom: the noise of the gradient with RP everywhere, and with LR
# at the two sites outside the scan.

draw = numpyro.handlers.substitute(guide, fitted)
paths = jax.vmap(lambda key: numpyro.handlers.seed(draw, key)())(jax.random.split(jax.random.key(1), 1000))
low, middle, high = np.quantile(100 * paths, [0.05, 0.5, 0.95], axis=0)
plt.rcParams.update(plot.STYLE)
figure, (upper, lower) = plt.subplots(2, 1, figsize=(5.5, 6.2))
upper.plot(YEARS, FLOW, "o", color="0.6", markersize=3, label="flow")
upper.plot(YEARS, middle, label="level")
upper.fill_between(YEARS, low, high, alpha=0.3, linewidth=0, label="90% of the guide's paths")
upper.set(xlabel="year", ylabel="10⁸ m³ a year", ylim=(400, 1700))
upper.legend(ncols=3, columnspacing=1.0)
ESTIMATORS = {"RP": {}, "LR outside the scan": {"drift": LR(), "noise": LR()}}
report = gradient_report(model, guide, estimators=ESTIMATORS, params=fitted, num_samples=NUM_SAMPLES)
report.plot(lower)
lower.set_xlabel("variance of one sample of the gradient")
plt.show()

# %%
# The level falls around 1899, when work on the dam at Aswan began. LR at the two sites outside raises the noise of their
# own parameters by four orders of magnitude, because their scores multiply the cost of every year. The other parameters
# do not change.
