"""
Ask which estimator to take
===========================

``recommend`` measures what each site could have on your own program, and chooses what needs the least noise times time.
``gradient_report`` shows what the choice changes, parameter by parameter. This example is NumPyro's; Pyro's calls are
the same, without a key.
"""

# %%
# Which one of ten measurements tells the most about the progression of diabetes? A Categorical chooses the measurement, a
# Normal is the slope. 442 patients, from scikit-learn.

import sys

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpyro
import numpyro.distributions as dist
from numpyro.infer import SVI
from sklearn.datasets import load_diabetes

from flowvi import LR, plot
from flowvi.numpyro import TraceFlow_ELBO, adaptive, gradient_report, recommend

DATA = load_diabetes()
X, Y = (jnp.array((a - a.mean(0)) / a.std(0)) for a in (DATA.data, DATA.target))


def model():
    measurement = numpyro.sample("measurement", dist.Categorical(jnp.ones(10) / 10))
    slope = numpyro.sample("slope", dist.Normal(0.0, 1.0))
    numpyro.sample("progression", dist.Normal(slope * X[:, measurement], 0.8).to_event(1), obs=Y)


def guide():
    numpyro.sample("measurement", dist.Categorical(logits=numpyro.param("logits", jnp.zeros(10))))
    scale = numpyro.param("scale", 0.1, constraint=dist.constraints.positive)
    numpyro.sample("slope", dist.Normal(numpyro.param("loc", 0.3), scale))


# %%
# Ask. The table has a line for each site, and below it the options of the objective. The more seconds it has, the more
# candidates it tries, and the closer it looks.

SECONDS, STEPS, NUM_SAMPLES = (1, 3, 5) if "--smoke" in sys.argv else (25, 1000, 1000)
advice = recommend(model, guide, seconds=SECONDS, progress_bar=False)
print(advice)

# %%
# Fit with what it says. ``adaptive`` is for estimators that learn, and does nothing for others.

elbo = TraceFlow_ELBO(estimators=advice.estimators, **advice.options)
svi = SVI(model, adaptive(guide, elbo), numpyro.optim.Adam(0.02), elbo)
fitted = svi.run(jax.random.key(0), STEPS, progress_bar=False).params
for name, probability in zip(DATA.feature_names, jax.nn.softmax(fitted["logits"]), strict=True):
    if probability > 0.01:
        print(f"{name} with probability {probability:.2f}")

# %%
# The noise of the gradient before the fit: with LR at both sites, with the default, and as recommended.

CANDIDATES = {"LR() everywhere": {"measurement": LR(), "slope": LR()}, "default": {}, "recommended": advice.estimators}
report = gradient_report(model, guide, estimators=CANDIDATES, num_samples=NUM_SAMPLES, options=advice.options)
print(report)
plt.rcParams.update(plot.STYLE)
figure, ax = plt.subplots(figsize=(6.5, 3.0))
report.plot(ax)
ax.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0))
plt.show()

# %%
# The exact sum takes the noise of the logits down by four orders of magnitude, for a step that is little longer: NumPyro
# evaluates all ten measurements at once. The default leaves it at ``LR()``, as it takes an exact sum only up to three
# values by itself.
