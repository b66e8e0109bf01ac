"""
Ask which estimator to take
===========================

``recommend`` measures the estimators that each site can have, on your own program, and chooses those with the least
product of noise and time. ``gradient_report`` shows the noise of each parameter's gradient. This example uses NumPyro;
the calls in Pyro are the same, without a key.
"""

# %%
# Which of ten measurements predicts the progression of diabetes best? A Categorical chooses the measurement, and a
# Normal is the slope. The data are 442 patients, from scikit-learn.

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
# Ask for a recommendation. The table has a row for each site, and the options of the objective below. With more seconds,
# it tries more candidates and measures them more exactly.

SECONDS, STEPS, NUM_SAMPLES = (1, 3, 5) if "--smoke" in sys.argv else (25, 1000, 1000)
advice = recommend(model, guide, seconds=SECONDS, progress_bar=False)
print(advice)

# %%
# Fit with the recommendation. ``adaptive`` registers the parameters of estimators that learn, if there are any.

elbo = TraceFlow_ELBO(estimators=advice.estimators, **advice.options)
svi = SVI(model, adaptive(guide, elbo), numpyro.optim.Adam(0.02), elbo)
fitted = svi.run(jax.random.key(0), STEPS, progress_bar=False).params
for name, probability in zip(DATA.feature_names, jax.nn.softmax(fitted["logits"]), strict=True):
    if probability > 0.01:
        print(f"{name} with probability {probability:.2f}")

# %%
# The noise of the gradient before the fit: with LR at both sites, with the default, and with the recommendation.

CANDIDATES = {"LR() everywhere": {"measurement": LR(), "slope": LR()}, "default": {}, "recommended": advice.estimators}
report = gradient_report(model, guide, estimators=CANDIDATES, num_samples=NUM_SAMPLES, options=advice.options)
print(report)
plt.rcParams.update(plot.STYLE)
figure, ax = plt.subplots(figsize=(5.5, 3.2))
report.plot(ax)
ax.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=3)
plt.show()

# %%
# The exact sum lowers the noise of the logits by four orders of magnitude, and a step takes little longer: NumPyro
# evaluates all ten measurements at once. The default is ``LR()`` here, because it takes an exact sum only over up to
# three values.
