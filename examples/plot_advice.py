"""
Ask which estimator to take
===========================

``recommend`` measures what each site could have on your own program, and chooses what needs the least noise times time.
``gradient_report`` shows what the choice changes, parameter by parameter. This example is Pyro's; NumPyro's calls are
the same.
"""

# %%
# How curved is the progression of diabetes in the body mass index? A polynomial, whose degree is a Categorical of five
# values. 442 patients, from scikit-learn.

import sys

import matplotlib.pyplot as plt
import pyro
import pyro.distributions as dist
import torch
from pyro.infer import SVI
from sklearn.datasets import load_diabetes

from flowvi import LR, plot
from flowvi.pyro import TraceFlow_ELBO, gradient_report, recommend

DATA = load_diabetes()
X, Y = (torch.tensor(a / a.std(), dtype=torch.float32) for a in (DATA.data[:, 2], DATA.target - DATA.target.mean()))
POWERS = X ** torch.arange(5)[:, None]


def model():
    coefficients = pyro.sample("coefficients", dist.Normal(torch.zeros(5), 0.5).to_event(1))
    degree = pyro.sample("degree", dist.Categorical(torch.ones(5)))
    kept = coefficients * (torch.arange(5) <= degree[..., None])
    pyro.sample("progression", dist.Normal(kept @ POWERS, 0.8).to_event(1), obs=Y)


def guide():
    loc = pyro.param("loc", torch.zeros(5))
    scale = pyro.param("scale", torch.full((5,), 0.1), constraint=dist.constraints.positive)
    pyro.sample("coefficients", dist.Normal(loc, scale).to_event(1))
    pyro.sample("degree", dist.Categorical(logits=pyro.param("logits", torch.zeros(5))))


# %%
# Ask. The table has a line for each site, and below it the options of the objective. The more seconds it has, the more
# candidates it tries, and the closer it looks.

SECONDS, STEPS, NUM_SAMPLES = (0.1, 3, 5) if "--smoke" in sys.argv else (12, 1000, 300)
pyro.clear_param_store()
pyro.set_rng_seed(0)
advice = recommend(model, guide, seconds=SECONDS, progress_bar=False)
print(advice)

# %%
# Fit with what it says.

elbo = TraceFlow_ELBO(estimators=advice.estimators, **advice.options)
svi = SVI(model, guide, pyro.optim.Adam({"lr": 0.02}), elbo)
losses = [svi.step() for _ in range(STEPS)]
print("probabilities of degree 0 to 4:", *(f"{p:.2f}" for p in pyro.param("logits").softmax(-1)))

# %%
# The noise of the gradient at this fit: with LR at both sites, with the default, and as recommended.

CANDIDATES = {"LR() everywhere": {"coefficients": LR(), "degree": LR()}, "default": {}, "recommended": advice.estimators}
report = gradient_report(model, guide, estimators=CANDIDATES, num_samples=NUM_SAMPLES, options=advice.options)
print(report)
plt.rcParams.update(plot.STYLE)
figure, ax = plt.subplots(figsize=(6.5, 3.0))
report.plot(ax)
ax.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0))
plt.show()

# %%
# E
