"""
Sampling from q, and heavy tails
================================

Every estimator can draw its samples from another density q and weight them by w = p/q. A good q lowers the variance. A
q with lighter tails than p can make it infinite, and a finite sample may not show that. This example shows densities,
weights and variances, in Pyro and NumPyro.
"""

# %%
# First a guide with a Normal p, and LR for its location. ``tempered(tau)`` multiplies the variance by tau.
# ``slice_by_height()`` draws where the score is large, mixed with one fifth of p, which keeps the weights below 5.

import sys

import matplotlib.pyplot as plt
import numpy as np
import numpyro.distributions
import pyro.distributions

import flowvi.numpyro
import flowvi.pyro  # noqa: F401
from flowvi import LR, plot, proposals

HOSTS = {"NumPyro": numpyro.distributions, "Pyro": pyro.distributions}
NUM_SAMPLES = 2000 if "--smoke" in sys.argv else 100_000

PROPOSALS = {
    "tempered(0.6)": LR(q=proposals.tempered(0.6)),
    "tempered(2)": LR(q=proposals.tempered(2.0)),
    "student_t(3)": LR(q=proposals.student_t(3.0)),
    "slice_by_height()": LR(q=proposals.slice_by_height()),
}
plot.proposal(pyro.distributions.Normal(0.0, 1.0), PROPOSALS, x=np.linspace(-5.0, 5.0, 401))

# %%
# Only ``tempered(0.6)`` has lighter tails than p, so its weights grow without bound. With a bounded cost, the second
# moment of LR is tau²/(2 tau - 1)^1.5 times that of q = p. It is least at tau = 2, and infinite at and below tau = 1/2.
# The dots are estimates from each library's samples.

taus = np.array([0.55, 0.6, 0.7, 0.85, 1.0, 1.5, 2.0, 3.0, 4.0])


def second_moment(host, estimator, num=NUM_SAMPLES, seed=0):
    p = HOSTS[host].Normal(0.0, 1.0)
    return np.mean(plot.gradient_samples(p, estimator, "loc", lambda x: 1 + 0 * x, num_samples=num, seed=seed) ** 2)


plt.rcParams.update(plot.STYLE)
_, left = plt.subplots(figsize=(5.5, 3.6))
fine = np.linspace(0.51, 4.0, 300)
left.plot(fine, fine**2 / (2 * fine - 1) ** 1.5, color="0.5", label="exact")
for host, marker in zip(HOSTS, "ox", strict=True):
    found = [second_moment(host, LR(q=proposals.tempered(tau))) for tau in taus]
    left.plot(taus, found, marker, markersize=5, label=f"{NUM_SAMPLES:,} samples, {host}")
left.axvline(0.5, color=plot.COLORS[1], linewidth=1, linestyle="--", label="infinite to the left")
left.set(xlabel="tau, of q = tempered(tau)", ylabel="second moment of the gradient in loc", yscale="log")
left.legend()
plt.show()

# %%
# Now p has heavy tails, a Student's t with 4 degrees of freedom, the cost is φ = x, and q is a Normal. The running mean
# of the second moment never settles, because now and then a sample far out in the tail has a huge weight. A q with
# heavier tails than p is safe.


def candidates(dist):
    return {
        "q = p": None,
        "q: Normal(loc, scale)": lambda p: dist.Normal(p.loc, p.scale),
        "q: student_t(2)": proposals.student_t(2.0),
    }


_, right = plt.subplots(figsize=(5.5, 3.6))
counts = np.arange(1, NUM_SAMPLES + 1)
for host, style in zip(HOSTS, ("-", ":"), strict=True):
    p = HOSTS[host].StudentT(4.0, 0.0, 1.0)
    for (label, q), color in zip(candidates(HOSTS[host]).items(), plot.COLORS, strict=False):
        gradients = plot.gradient_samples(p, LR(q=q), "loc", lambda x: x, num_samples=NUM_SAMPLES)
        running = np.cumsum(gradients**2) / counts
        right.plot(counts[100:], running[100:], style, color=color, label=f"{label}" if host == "NumPyro" else None)
right.plot([], [], ":", color="0.4", label="the same in Pyro")
right.set(xlabel="samples", ylabel="running mean of the squared gradient", xscale="log", yscale="log", ylim=(1.0, 5e3))
right.legend()
plt.show()

# %%
# At tau = 0.55 the samples miss about half of the second moment. Under the Normal q, the second moment only looks finite
# between two jumps. So choose a q whose tails are at least as heavy as those of p.
