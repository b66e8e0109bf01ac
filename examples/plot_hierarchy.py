"""
One estimator per site: eight schools
=====================================

Eight schools measured the effect of coaching. Is it one effect for all (complete pooling), or does each school have its
own, around a common mean? A discrete site decides. It has ``LR``, and you choose an estimator for each of the other
sites. This example fits a guide, and shows the noise of each gradient under three choices, in Pyro and NumPyro.
"""

# %%
# Model and guide are written once, with a library's primitives in ``ppl`` and its distributions in ``dist``.

import sys

import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import numpyro
import numpyro.distributions
import pyro
import pyro.distributions
import torch
from jax import random

import flowvi.numpyro
import flowvi.pyro
from flowvi import LR, RP, plot

EFFECTS = np.array([28.0, 8.0, -3.0, 7.0, -1.0, 1.0, 18.0, 12.0], dtype=np.float32)  # Rubin 1981
ERRORS = np.array([15.0, 10.0, 16.0, 11.0, 9.0, 11.0, 10.0, 18.0], dtype=np.float32)


class NumPyro:
    ppl, dist, array, exp, flow = numpyro, numpyro.distributions, jnp.asarray, jnp.exp, flowvi.numpyro


class Pyro:
    ppl, dist, array, exp, flow = pyro, pyro.distributions, torch.as_tensor, torch.exp, flowvi.pyro


def model_of(host):
    def model():
        pooled = host.ppl.sample("pooled", host.dist.Bernoulli(host.array(0.5)))
        mu = host.ppl.sample("mu", host.dist.Normal(host.array(0.0), 10.0))
        tau = host.ppl.sample("tau", host.dist.LogNormal(host.array(2.0), 0.5))
        with host.ppl.plate("schools", 8):
            eta = host.ppl.sample("eta", host.dist.Normal(host.array(0.0), 1.0))
            effect = mu + (1 - pooled) * tau * eta
            host.ppl.sample("y", host.dist.Normal(effect, host.array(ERRORS)), obs=host.array(EFFECTS))

    return model


INITIAL = {
    "pooled_logits": 0.0,
    **{"mu_loc": 0.0, "mu_log_scale": 1.0},
    **{"tau_loc": 2.0, "tau_log_scale": -1.0},
    **{"eta_loc": np.zeros(8), "eta_log_scale": np.zeros(8)},
}


def guide_of(host, initial):
    def guide():
        param = {name: host.ppl.param(name, host.array(np.float32(value))) for name, value in initial.items()}
        host.ppl.sample("pooled", host.dist.Bernoulli(logits=param["pooled_logits"]))
        host.ppl.sample("mu", host.dist.Normal(param["mu_loc"], host.exp(param["mu_log_scale"])))
        host.ppl.sample("tau", host.dist.LogNormal(param["tau_loc"], host.exp(param["tau_log_scale"])))
        with host.ppl.plate("schools", 8):
            host.ppl.sample("eta", host.dist.Normal(param["eta_loc"], host.exp(param["eta_log_scale"])))

    return guide


# %%
# The choices are the same in both libraries: ``LR`` everywhere; ``LR`` for the switch and the schools; ``LR`` for the
# switch only.

CHOICES = {
    "LR everywhere": {"pooled": LR(), "mu": LR(), "tau": LR(), "eta": LR()},
    "LR for switch and eta": {"pooled": LR(), "mu": RP(), "tau": RP(), "eta": LR()},
    "LR for the switch": {"pooled": LR(), "mu": RP(), "tau": RP(), "eta": RP()},
}
STEPS, NUM_SAMPLES = (5, 10) if "--smoke" in sys.argv else (1000, 200)

# %%
# A fit in NumPyro with the last choice. With ten particles, the baseline of each is the mean over the others.

elbo = flowvi.numpyro.TraceFlow_ELBO(num_particles=10, estimators=CHOICES["LR for the switch"])
svi = numpyro.infer.SVI(model_of(NumPyro), guide_of(NumPyro, INITIAL), numpyro.optim.Adam(0.02), elbo)
fitted = {name: np.array(value) for name, value in svi.run(random.key(0), STEPS, progress_bar=False).params.items()}
print(f"probability of complete pooling under the guide: {1 / (1 + np.exp(-fitted['pooled_logits'])):.2f}")

# %%
# The noise after the fit: the variance of the gradient from one particle, by parameter.

plt.rcParams.update(plot.STYLE)
figure, axes = plt.subplots(2, 1, figsize=(5.5, 6.6), sharex=True)
for ax, host in zip(axes, (NumPyro, Pyro), strict=True):
    pyro.clear_param_store()
    guide, options = guide_of(host, fitted), {"dependencies": "graph"}
    report = host.flow.gradient_report(model_of(host), guide, estimators=CHOICES, num_samples=NUM_SAMPLES, options=options)
    report.plot(ax)
    ax.set(title=host.__name__, xlabel="")
    ax.get_legend().remove()
figure.legend(*axes[0].get_legend_handles_labels(), loc="outside upper center", ncols=3, columnspacing=1.0)
axes[-1].set_xlabel("variance of one sample of the gradient")
plt.show()

# %%
# The noise of a site depends on its own estimator. RP instead of LR at mu and tau divides the variance there by a hundred
# or more, and changes nothing elsewhere. With RP at eta too, most of the remaining noise is that of the discrete site.
