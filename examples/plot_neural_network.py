"""
A Bayesian neural network, and what the entropy costs
=====================================================

The weights of a small network get a posterior, so the network knows where it is uncertain. The ELBO contains the entropy
of the guide, and there are three ways to differentiate it: in full (``"full"``, the default), along the path only
(``"stl"``, sticking the landing), or in closed form (``"analytic"``). This example uses NumPyro.
"""

# %%
# Is a tumour benign? We take two features of scikit-learn's 569 patients, so that the answer fits into a plot.

import sys

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import numpyro
import numpyro.distributions as dist
from numpyro.infer import SVI
from numpyro.infer.autoguide import AutoNormal
from sklearn.datasets import load_breast_cancer

from flowvi import plot
from flowvi.numpyro import TraceFlow_ELBO, gradient_report

data = load_breast_cancer()
CHOSEN = [list(data.feature_names).index(name) for name in ("mean texture", "mean smoothness")]
X = data.data[:, CHOSEN]
X, Y = jnp.array((X - X.mean(0)) / X.std(0)), jnp.array(data.target)
HIDDEN = 8

# %%
# Two layers, every weight Normal a priori. The guide is NumPyro's AutoNormal.


def layer(name, inputs, outputs):
    weights = numpyro.sample(f"{name}_weights", dist.Normal(0.0, 1.0).expand([inputs, outputs]).to_event(2))
    return weights, numpyro.sample(f"{name}_bias", dist.Normal(0.0, 1.0).expand([outputs]).to_event(1))


def model(x, y=None):
    (w, b), (v, c) = layer("first", 2, HIDDEN), layer("second", HIDDEN, 1)
    logits = numpyro.deterministic("logits", (jnp.tanh(x @ w + b) @ v + c)[..., 0])
    with numpyro.plate("patients", len(x)):
        numpyro.sample("benign", dist.Bernoulli(logits=logits), obs=y)


guide = AutoNormal(model, init_scale=0.1)
STEPS, NUM_SAMPLES = (3, 5) if "--smoke" in sys.argv else (2000, 300)

# %%
# Fit, and measure the noise of each way at the same fit.

elbo = TraceFlow_ELBO(num_particles=4, entropy="stl")
svi = SVI(model, guide, numpyro.optim.Adam(0.01), elbo)
fitted = svi.run(jax.random.key(0), STEPS, X, Y, progress_bar=False).params
variances = {}
for entropy in ("full", "stl", "analytic"):
    report = gradient_report(model, guide, X, Y, params=fitted, num_samples=NUM_SAMPLES, options={"entropy": entropy})
    variances[entropy] = [sum(p.std**2 for p in report.parameters if p.parameter.endswith(end)) for end in ("auto_loc", "auto_scale")]

# %%
# Top left: the probability of a benign tumour, as the mean over 200 networks. Top right: by how much the networks disagree.
# Bottom: the noise.

axis = np.linspace(-3.0, 4.5, 81)
grid = jnp.array(np.stack(np.meshgrid(axis, axis), -1).reshape(-1, 2))
predict = numpyro.infer.Predictive(model, guide=guide, params=fitted, num_samples=200)
probabilities = np.asarray(jax.nn.sigmoid(predict(jax.random.key(1), grid)["logits"])).reshape(200, 81, 81)
plt.rcParams.update(plot.STYLE)
figure, panels = plt.subplot_mosaic([["mean", "std"], ["noise", "noise"]], figsize=(5.5, 5.4))
axes = list(panels.values())
for ax, values, title, top in (
    (axes[0], probabilities.mean(0), "probability of benign", 1.0),
    (axes[1], probabilities.std(0), "its standard deviation", None),
):
    shown = ax.pcolormesh(axis, axis, values, shading="gouraud", rasterized=True, vmin=0.0, vmax=top)
    figure.colorbar(shown, ax=ax)
    ax.set(title=title, xlabel="mean texture", ylabel="mean smoothness", xlim=(-3.0, 4.5), ylim=(-3.0, 4.5))
for label, marker, color, of_class in (("malignant", "x", "#D55E00", 0), ("benign", "o", "white", 1)):
    axes[0].plot(*X[of_class == Y].T, marker, color=color, markersize=3, alpha=0.8, label=label, linestyle="none")
axes[0].legend(loc="upper left", labelcolor="white", frameon=True, facecolor="0.3", framealpha=0.8)
places = np.arange(2)
for i, (entropy, found) in enumerate(variances.items()):
    axes[2].barh(places + 0.27 * (i - 1), found, 0.27, label=f'"{entropy}"')
axes[2].set_yticks(places, ["loc", "scale"])
axes[2].set(xlabel="variance of the gradient, one particle", xscale="log")
axes[2].invert_yaxis()
axes[2].legend(title="entropy")
plt.show()

# %%
# The networks disagree along the border between the classes, and more so far from the patients. Sticking the landing
# lowers the noise in the scales by a third. Most of the noise in loc comes from the likelihood, which is the same in all
# three.
