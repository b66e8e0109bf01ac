"""
A hierarchical regression on mini-batches
=========================================

How strongly does a share follow the market? Each company has a slope of its own, and the slopes have a common mean. The
gradient of a mini-batch has noise from the draws of the guide, which the estimator can lower, and from the choice of
the batch, which it cannot. A report shows which of them matters. This example uses Pyro.
"""

# %%
# Monthly returns of eight companies and of the S&P 500 from 1990 to 2019; the data come with matplotlib. Each observation
# is one company in one month.

import sys

import matplotlib.pyplot as plt
import numpy as np
import pyro
import pyro.distributions as dist
import torch
from matplotlib.cbook import get_sample_data
from pyro.infer import SVI
from pyro.optim import ExponentialLR

from flowvi import LR, RP, plot
from flowvi.pyro import TraceFlow_ELBO, gradient_report

with open(get_sample_data("Stocks.csv", asfileobj=False)) as file:
    header, *lines = [line.split(",") for line in file.read().splitlines() if not line.startswith("#")]
prices = np.array([[float(cell or "nan") for cell in line[1:]] for line in lines])
prices = prices[~np.isnan(prices[:, header.index("^GSPC") - 1])]
returns = 100 * np.diff(np.log(prices), axis=0)
NAMES, MARKET = header[1:9], torch.tensor(returns[:, 8], dtype=torch.float32)
month, company = (torch.tensor(index) for index in np.nonzero(~np.isnan(returns[:, :8])))
Y = torch.tensor(returns[:, :8], dtype=torch.float32)[month, company]

# %%
# The plate of observations is subsampled; flowvi scales costs as Pyro scales log densities.


def model(batch):
    common = pyro.sample("common", dist.Normal(1.0, 0.5))
    spread = pyro.sample("spread", dist.LogNormal(-1.0, 0.5))
    with pyro.plate("companies", len(NAMES)):
        slope = pyro.sample("slope", dist.Normal(common, spread))
        noise = pyro.sample("noise", dist.LogNormal(2.0, 0.5))
    with pyro.plate("observations", len(Y), subsample_size=batch) as i:
        loc = slope[..., company[i]] * MARKET[month[i]]
        pyro.sample("return", dist.StudentT(4.0, loc, noise[..., company[i]]), obs=Y[i])


def guide(batch):
    def normal(name, loc, scale):
        loc, scale = (torch.as_tensor(value) for value in (loc, scale))
        return pyro.param(f"{name}_loc", loc), pyro.param(f"{name}_scale", scale, constraint=dist.constraints.positive)

    pyro.sample("common", dist.Normal(*normal("common", 1.0, 0.2)))
    pyro.sample("spread", dist.LogNormal(*normal("spread", -1.0, 0.2)))
    with pyro.plate("companies", len(NAMES)):
        pyro.sample("slope", dist.Normal(*normal("slope", torch.ones(len(NAMES)), torch.full((len(NAMES),), 0.1))))
        pyro.sample("noise", dist.LogNormal(*normal("noise", 2 * torch.ones(len(NAMES)), torch.full((len(NAMES),), 0.1))))


# %%
# Fit with batches of 128.

STEPS, NUM_SAMPLES = (3, 5) if "--smoke" in sys.argv else (1500, 200)
pyro.clear_param_store()
pyro.set_rng_seed(0)
adam = ExponentialLR({"optimizer": torch.optim.Adam, "optim_args": {"lr": 0.03}, "gamma": 0.05 ** (1 / STEPS)})
svi = SVI(model, guide, adam, TraceFlow_ELBO())
for _ in range(STEPS):
    svi.step(128)
    adam.step()

# %%
# The variance of the gradient in the slopes at this fit, for batches of several sizes, with RP and with LR at the slopes.

BATCHES = [32, 128, 512, len(Y)]
variances: dict[str, list[float]] = {"LR()": [], "RP()": []}
for label, estimator in (("LR()", LR()), ("RP()", RP())):
    for batch in BATCHES:
        report = gradient_report(model, guide, batch, estimators={"slope": estimator}, num_samples=NUM_SAMPLES)
        variances[label] += [p.std**2 for p in report.parameters if p.parameter == "slope_loc"]

# %%
# Top: the slope of each company under the guide, and by least squares for each company alone. Bottom: the variances.

loc, scale = (pyro.param(f"slope_{part}").detach().numpy() for part in ("loc", "scale"))
own = [float((MARKET[month[company == c]] @ Y[company == c]) / (MARKET[month[company == c]] ** 2).sum()) for c in range(len(NAMES))]
plt.rcParams.update(plot.STYLE)
figure, (upper, lower) = plt.subplots(2, 1, figsize=(5.5, 6.8))
upper.errorbar(loc, np.arange(len(NAMES)), xerr=2 * scale, fmt="o", label="guide, ± 2 scales")
upper.plot(own, np.arange(len(NAMES)), "x", color=plot.COLORS[1], label="least squares on its own")
upper.axvline(pyro.param("common_loc").item(), color="0.6", linewidth=1, label="common mean")
upper.set_yticks(np.arange(len(NAMES)), NAMES)
upper.set(xlabel="slope of the return on the market's")
upper.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=3, columnspacing=1.0)
for (label, found), style in zip(variances.items(), ("s--", "o-"), strict=True):
    lower.plot(BATCHES, found, style, label=label)
lower.set(xlabel="observations in a batch", ylabel="variance of the gradient in the slopes", xscale="log", yscale="log")
lower.set_xticks(BATCHES, [*BATCHES[:-1], "all"])
lower.minorticks_off()
lower.legend()
plt.show()

# %%
# With RP the noise falls as the batch grows: nearly all of it comes from the choice of the batch, and no other estimator
# would help. With LR it comes from the draws, and stays the same for every size of the batch.
