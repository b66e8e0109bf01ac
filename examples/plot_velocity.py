"""
Velocity and score term of four estimators
==========================================

At a site with density p(x; θ), an estimator of flowvi is a velocity field u: the speed dx/dθ of a sample as the
parameter changes. The score term ψ = ∇·u + u·∇ log p + ∂ log p/∂θ accounts for the change of p that u does not. This
example plots both for four estimators of a Normal, in Pyro and NumPyro, and then the mass that they move.
"""

# %%
# The estimators are defined once for both libraries. ``LR`` has u = 0 and leaves everything to ψ. ``RP`` has the velocity
# of the sampler, and ψ = 0. ``Flow`` takes any field: here half of that of ``RP``, and one that is 0 at x = 0, for a cost
# that jumps there.

import matplotlib.pyplot as plt
import numpy as np
import numpyro.distributions
import pyro.distributions

import flowvi.numpyro
import flowvi.pyro  # noqa: F401
from flowvi import LR, RP, Flow, fields, plot


def away_from_zero(x, p):
    return x**2 / (0.25 + x**2)


ESTIMATORS = {
    "LR": LR(),
    "half-way": Flow(loc=lambda x, p: 0.5, scale=lambda x, p: 0.5 * (x - p.loc) / p.scale),
    "0 at x = 0": Flow(fields.masked(away_from_zero, fields.location_scale())),
    "RP": RP(),
}

# %%
# To compute u and ψ, each estimator is attached to the distribution at given x, and the result is differentiated in
# ``loc`` and in ``scale``. The lines are NumPyro, and the dots are Pyro. (``RP`` uses the library's own sampler, so its x
# are draws.)

x = np.linspace(-3.0, 3.0, 241)
figure = plot.velocity(numpyro.distributions.Normal(0.0, 1.0), ESTIMATORS, x=x)
in_pyro = plot.velocity(pyro.distributions.Normal(0.0, 1.0), ESTIMATORS, x=x)
for ax, other in zip(figure.axes[:4], in_pyro.axes[:4], strict=True):
    for line in other.lines[:3]:
        ax.plot(x, line.get_ydata(), "k.", markersize=3, markevery=24)
plt.close(in_pyro)

# %%
# The farther u is from the velocity of the sampler, the larger is ψ. Where the third field is 0, its ψ is that of LR with
# a correction for the slope of the field. Without the correction the gradient would be biased.
#
# The next figure shows the flow. At the bottom, p is cut into slices of equal mass. The lines follow the edges of the
# slices while ``loc`` goes from 0 to 1. At the top are the same slices under the new p.

plot.flow(pyro.distributions.Normal(0.0, 1.0), {name: ESTIMATORS[name] for name in ("LR", "RP")}, "loc")
plt.show()

# %%
# RP moves every slice and keeps its mass. LR keeps the slices in place and changes their mass: the left loses mass (blue)
# and the right gains mass (orange).

plot.flow(pyro.distributions.Normal(0.0, 1.0), {name: ESTIMATORS[name] for name in ("half-way", "0 at x = 0")}, "loc")
plt.show()

# %%
# These two do some of both. All four end with the same density.
