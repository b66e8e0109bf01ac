"""
Attend, infer, repeat: counting digits
======================================

How many digits are in the image, and where? The guide decides for each of two objects whether it exists, then where it
is, then what it looks like, and a network paints it. ``Enumerate()`` compares the image with and without each object,
so there is no score; places and codes have ``RP``. This example uses NumPyro. ``benchmarks/counting.py`` compares
estimators, in both libraries.
"""

# %%
# Images of 16 x 16 pixels with none, one or two of scikit-learn's digits. The number is not in the data.

import sys

import equinox
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import numpyro
import numpyro.distributions as dist
from matplotlib.patches import Rectangle
from numpyro.contrib.module import eqx_module
from numpyro.handlers import mask, seed, substitute, trace
from numpyro.infer import SVI
from sklearn.datasets import load_digits

from flowvi import Enumerate, plot
from flowvi.numpyro import TraceFlow_ELBO

CANVAS, PATCH, CODE, BATCH, NOISE = 16, 8, 8, 64, 0.25
CHUNKS, STEPS, TRAINED = (1, 3, 128) if "--smoke" in sys.argv else (6, 500, 4096)


def canvases(number, seed):
    """Images, and the number of digits in each."""
    rng, digits = np.random.default_rng(seed), load_digits().images / 16
    counts, images = rng.integers(0, 3, number), np.zeros((number, CANVAS, CANVAS))
    for image, count in zip(images, counts, strict=True):
        first = rng.integers(0, CANVAS - PATCH + 1, 2)
        second = (first + rng.integers(4, 6, 2)) % (CANVAS - PATCH + 1)  # at least four pixels away in each direction
        for y, x in (first, second)[:count]:
            image[y : y + PATCH, x : x + PATCH] += digits[rng.integers(len(digits))]
    return jnp.array(images.clip(0, 1)), counts


# %%
# Four parts: an encoder of the whole image, a window that cuts a patch out and puts it back, and an encoder and a decoder
# of patches.


def network(name, inputs, outputs, number):
    net = equinox.nn.MLP(inputs, outputs, 100, 1, jax.nn.tanh, key=jax.random.key(number))
    return lambda: jnp.vectorize(eqx_module(name, net), signature="(i)->(o)")


encoder, glimpse = network("encoder", CANVAS**2, 2 * 5, 0), network("glimpse", PATCH**2, 2 * CODE, 1)
painter = network("painter", CODE, PATCH**2, 2)


def corner(place):
    return (CANVAS - PATCH) * jax.nn.sigmoid(2 * place)


def window(place):
    """For each axis, the canvas-by-patch weights that put a patch at its place, with linear interpolation."""
    pixels = np.arange(CANVAS)[:, None] - np.arange(PATCH)
    return jnp.clip(1 - abs(pixels - corner(place)[..., None, None]), 0)


def normal(name, loc, log_scale):
    return numpyro.sample(name, dist.Normal(loc, jnp.exp(log_scale)).to_event(1))


def guide(images, batch):
    encode, attend = encoder(), glimpse()
    with numpyro.plate("images", len(images), subsample_size=batch):
        image = numpyro.subsample(images, event_dim=2)
        objects = encode(image.reshape(-1, CANVAS**2)).reshape(-1, 2, 5)
        present = jnp.ones(len(image))
        for i in range(2):
            logits, loc, log_scale = objects[:, i, 0], objects[:, i, 1:3], objects[:, i, 3:] - 2
            with mask(mask=present > 0.5):  # there is no second object without a first one
                present = present * numpyro.sample(f"present{i}", dist.Bernoulli(logits=logits), infer={"estimator": Enumerate()})
            with mask(mask=present > 0.5):
                weights = window(normal(f"place{i}", loc, log_scale))
                patch = jnp.einsum("...ip,...jq,...ij->...pq", weights[..., 0, :, :], weights[..., 1, :, :], image)
                seen = attend(patch.reshape(-1, PATCH**2))
                normal(f"code{i}", seen[:, :CODE], seen[:, CODE:])


def model(images, batch):
    decode = painter()
    with numpyro.plate("images", len(images), subsample_size=batch):
        image = numpyro.subsample(images, event_dim=2)
        canvas, present = 0.0, jnp.ones(len(image))
        for i, probability in enumerate((2 / 3, 1 / 2)):
            with mask(mask=present > 0.5):
                present = present * numpyro.sample(f"present{i}", dist.Bernoulli(probability))
            with mask(mask=present > 0.5):
                weights = window(normal(f"place{i}", jnp.zeros(2), jnp.zeros(2)))
                patch = jax.nn.sigmoid(decode(normal(f"code{i}", jnp.zeros(CODE), jnp.zeros(CODE))) - 1).reshape(-1, PATCH, PATCH)
            painted = jnp.einsum("...ip,...jq,...pq->...ij", weights[..., 0, :, :], weights[..., 1, :, :], patch)
            canvas = canvas + present[..., None, None] * painted
        numpyro.sample("image", dist.Normal(canvas, NOISE).to_event(2), obs=image)


# %%
# Train, and count the digits of other images now and then.

images, _ = canvases(TRAINED, 0)
others, counts = canvases(512, 1)


def look(params, images):
    """The guide's inference: for each object whether it exists, and the corner of its window."""
    found = trace(seed(substitute(guide, params), 0)).get_trace(images, None)
    there = np.cumprod([found[f"present{i}"]["fn"].base_dist.logits > 0 for i in range(2)], axis=0)
    return there, [np.asarray(corner(found[f"place{i}"]["value"])) for i in range(2)]


svi = SVI(model, guide, numpyro.optim.Adam(1e-3), TraceFlow_ELBO())
state, right = svi.init(jax.random.key(0), images, BATCH), []


@jax.jit
def train(state):
    return jax.lax.fori_loop(0, STEPS, lambda _, state: svi.update(state, images, BATCH)[0], state)


for _ in range(CHUNKS):
    state = train(state)
    there, _ = look(svi.get_params(state), others)
    right.append((there.sum(0) == counts).mean())
print(f"counted right: {right[-1]:.0%}")

# %%
# Top: the share of images with the right count. Bottom: held-out images, with the windows of the objects that the guide
# finds.

there, corners = look(svi.get_params(state), others)
plt.rcParams.update(plot.STYLE)
figure = plt.figure(figsize=(5.5, 6.4))
upper, grid = figure.subfigures(2, 1, squeeze=False, height_ratios=(4, 5))[:, 0]
ax = upper.subplots()
ax.plot(STEPS * np.arange(1, CHUNKS + 1), right, "o-")
ax.set(xlabel="step", ylabel="share counted right", ylim=(0.0, 1.0))
for i, ax in enumerate(grid.subplots(3, 5).ravel()):
    ax.imshow(others[i], cmap="Greys", vmin=0.0, vmax=1.0)
    ax.set(xticks=[], yticks=[])
    ax.spines[["top", "right"]].set_visible(True)
    for k in range(2):
        if there[k, i]:
            y, x = corners[k][i] - 0.5
            ax.add_patch(Rectangle((x, y), PATCH, PATCH, fill=False, color=plot.COLORS[k], linewidth=1.5))
plt.show()

# %%
# The guide learns to count without labels: the image needs an object for each digit, and an object that does not exist
# costs less.
