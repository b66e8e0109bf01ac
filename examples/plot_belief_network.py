"""
A sigmoid belief network of digits
==================================

Two layers of Bernoullis generate the pixels of a digit, and the guide infers both layers from the image. 48 discrete
values share one cost, too many for an exact sum. This example compares ``LR()`` with ``DisARM()``, which runs the
program once more with mirrored draws. It uses NumPyro.
"""

# %%
# The data are the 1,797 digits of scikit-learn, 8 x 8 pixels, made black or white.

import sys

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import numpyro
import numpyro.distributions as dist
from numpyro.infer import SVI
from sklearn.datasets import load_digits

from flowvi import LR, DisARM, plot
from flowvi.numpyro import TraceFlow_ELBO

IMAGES = jnp.array(load_digits().data > 7.5, float)
TOP, BOTTOM, PIXELS, BATCH = 16, 32, 64, 64
STEPS = 3 if "--smoke" in sys.argv else 3000

# %%
# The logits of each layer are linear in the layer above it, and in the guide in the layer below it.


def linear(name, inputs, outputs):
    weights = numpyro.param(f"{name}_weights", lambda key: 0.1 * jax.random.normal(key, (inputs, outputs)))
    bias = numpyro.param(f"{name}_bias", jnp.zeros(outputs))
    return lambda x: x @ weights + bias


def bernoulli(name, logits, **given):
    return numpyro.sample(name, dist.Bernoulli(logits=logits).to_event(1), **given)


def model(images):
    down, out = linear("down", TOP, BOTTOM), linear("out", BOTTOM, PIXELS)
    prior = numpyro.param("prior", jnp.zeros(TOP))
    with numpyro.plate("images", len(images), subsample_size=BATCH):
        batch = numpyro.subsample(images, event_dim=1)
        top = bernoulli("top", prior)
        bottom = bernoulli("bottom", down(top))
        bernoulli("pixels", out(bottom), obs=batch)


def guide(images):
    inward, up = linear("in", PIXELS, BOTTOM), linear("up", BOTTOM, TOP)
    with numpyro.plate("images", len(images), subsample_size=BATCH):
        batch = numpyro.subsample(images, event_dim=1)
        bottom = bernoulli("bottom", inward(2 * batch - 1))
        bernoulli("top", up(2 * bottom - 1))


# %%
# ``LR()`` with one particle; ``LR()`` with three, whose baseline is the mean of the other two; and ``DisARM()`` with one
# particle. ``DisARM()`` takes three evaluations of the program, one of them for each of the two sites.

RUNS = {
    "LR(), one particle": (1, LR()),
    "LR(), three particles": (3, LR()),
    "DisARM(), one particle": (1, DisARM()),
}
fits = {}
for label, (particles, estimator) in RUNS.items():
    elbo = TraceFlow_ELBO(particles, default=estimator)
    print(f"{label}: {particles * elbo.describe(model, guide, IMAGES).evaluations} evaluations of the program a step")
    svi = SVI(model, guide, numpyro.optim.Adam(3e-3), elbo)
    fits[label] = svi.run(jax.random.key(0), STEPS, IMAGES, progress_bar=False)

# %%
# Top: the losses. Bottom: digits, and samples from the network of the last fit.

fitted = fits["DisARM(), one particle"].params
draw = numpyro.handlers.seed(numpyro.handlers.substitute(numpyro.handlers.uncondition(model), fitted), 1)
bottom = numpyro.handlers.trace(draw).get_trace(IMAGES)["bottom"]["value"][:32]
drawn = jax.nn.sigmoid(bottom @ fitted["out_weights"] + fitted["out_bias"])
plt.rcParams.update(plot.STYLE)
figure = plt.figure(figsize=(5.5, 5.2))
upper, lower = figure.subfigures(2, 1, squeeze=False, height_ratios=(2, 1))[:, 0]
ax, window = upper.subplots(), max(1, STEPS // 30)
for label, fit in fits.items():
    ax.plot(np.convolve(fit.losses / len(IMAGES), np.ones(window) / window, "valid"), label=label)
ax.set(xlabel="step", ylabel=f"-ELBO in nats per image,\nmean over {window} steps")
ax.legend()
for ax, (title, images) in zip(lower.subplots(1, 2), {"digits": IMAGES[:32], "drawn by the network": drawn}.items(), strict=True):
    ax.set_title(title, loc="left")
    framed = np.pad(np.reshape(images, (4, 8, 8, 8)), [(0, 0), (0, 0), (1, 1), (1, 1)])
    ax.imshow(framed.transpose(0, 2, 1, 3).reshape(40, 80), cmap="Greys", vmin=0.0, vmax=1.0)
    ax.axis("off")
plt.show()

# %%
# With one particle there is no baseline, and the fit is slow. At three evaluations per step, DisARM and the
# leave-one-out baseline are equally good, two nats below; DisARM needs only one particle.
