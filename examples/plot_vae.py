"""
Variational autoencoders with discrete and with continuous latents
==================================================================

A variational autoencoder of handwritten digits, in Pyro. With Gaussian latents the default is ``RP``. With Bernoulli
latents it is ``LR``, whose noise depends on the baseline: none, or the mean over the other particles.
(``benchmarks/vae.py`` trains longer, in both libraries, with more kinds of baselines.)
"""

# %%
# The data are the 1,797 digits of scikit-learn, 8 x 8 pixels, made black or white.

import sys

import matplotlib.pyplot as plt
import numpy as np
import pyro
import pyro.distributions as dist
import torch
from pyro.infer import SVI
from pyro.optim import Adam
from sklearn.datasets import load_digits

from flowvi import LR, RP, plot
from flowvi.pyro import TraceFlow_ELBO

IMAGES = torch.tensor(load_digits().data > 7.5, dtype=torch.float32)
BATCH, LATENTS, HIDDEN = 64, 16, 64
STEPS = 20 if "--smoke" in sys.argv else 500


def network(inputs, outputs):
    return torch.nn.Sequential(torch.nn.Linear(inputs, HIDDEN), torch.nn.Tanh(), torch.nn.Linear(HIDDEN, outputs))


def latent(kind, parameters):
    if kind == "Bernoulli":
        return dist.Bernoulli(logits=parameters).to_event(1)
    return dist.Normal(parameters[..., :LATENTS], parameters[..., LATENTS:].exp()).to_event(1)


# %%
# Three autoencoders, each with four particles. The default baseline, ``"loo"``, is the mean over the other three.

RUNS = {
    "Bernoulli, LR, no baseline": ("Bernoulli", LR(), None),
    "Bernoulli, LR, leave-one-out": ("Bernoulli", LR(), "loo"),
    "Gaussian, RP": ("Gaussian", RP(), None),
}


def train(kind, estimator, baseline):
    """The losses per image, and the encoder and decoder."""
    pyro.clear_param_store()
    pyro.set_rng_seed(0)
    size = LATENTS * (2 if kind == "Gaussian" else 1)
    encoder, decoder = network(64, size), network(LATENTS, 64)

    def model(images):
        pyro.module("decoder", decoder)
        with pyro.plate("images", len(images), subsample_size=BATCH) as i:
            z = pyro.sample("z", latent(kind, torch.zeros(size)))
            pyro.sample("x", dist.Bernoulli(logits=decoder(z)).to_event(1), obs=images[i])

    def guide(images):
        pyro.module("encoder", encoder)
        with pyro.plate("images", len(images), subsample_size=BATCH) as i:
            pyro.sample("z", latent(kind, encoder(images[i])), infer={"estimator": estimator})

    elbo = TraceFlow_ELBO(num_particles=4, vectorize_particles=True, max_plate_nesting=1, baseline=baseline)
    svi = SVI(model, guide, Adam({"lr": 3e-3}), elbo)
    return np.array([svi.step(IMAGES) for _ in range(STEPS)]) / len(IMAGES), encoder, decoder


# %%
# Train them, and plot the losses and the reconstructions of some digits.

plt.rcParams.update(plot.STYLE)
figure = plt.figure(figsize=(5.5, 6.8))
upper, lower = figure.subfigures(2, 1, squeeze=False)[:, 0]
ax, shown = upper.subplots(), {"digit": IMAGES[:8]}
for label, run in RUNS.items():
    losses, encoder, decoder = train(*run)
    ax.plot(np.arange(len(losses) - 19), np.convolve(losses, np.ones(20) / 20, "valid"), label=label, linewidth=1)
    print(f"{label}: {losses[-STEPS // 10 :].mean():.1f} nats per image over the last tenth of the steps")
    with torch.no_grad():
        shown[label] = decoder(latent(run[0], encoder(IMAGES[:8])).mean).sigmoid()
ax.set(xlabel="step", ylabel="-ELBO in nats per image,\nmean over 20 steps")
ax.legend()
for row, (label, images) in zip(lower.subplots(len(shown)), shown.items(), strict=True):
    row.set_title(label, loc="left")
    row.imshow(np.concatenate(list(images.reshape(8, 8, 8).numpy()), axis=1), cmap="Greys", vmin=0.0, vmax=1.0)
    row.axis("off")
plt.show()

# %%
# After so few steps, Bernoulli latents without a baseline hardly distinguish the digits. With the mean over the other
# particles as the baseline they do. The Gaussian latents, whose gradient is pathwise, are ahead of both.
