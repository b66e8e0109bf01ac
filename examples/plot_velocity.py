"""
u and psi of one Gaussian
=========================

At a site with density p(x; θ), an estimator of flowvi is a velocity field u: the speed dx/dθ with which it lets a
sample move as the parameter moves. What u leaves over of the change of p is made up by the score term ψ = ∇·u + u·∇ log
p + ∂ log p/∂θ. This example draws both for four estimators of a Normal, in both hosts, and then the mass that they
move.
"""

# %%
# The estimators are defined once and know no host. ``LR`` has u = 0 and leaves everything to ψ. ``RP`` has the velocity
# of the sampler and nothing is left. ``Flow`` takes any field: here half of that of ``RP``, and one that is 0 at x = 0,
# for a cost that jumps there.

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
# u and ψ are read off the estimators: each is attached to the distribution at given x, and the draw is differentiated
# in ``loc`` and in ``scale``. The lines are NumPyro's and the dots are Pyro's. (``RP`` is the host's own sampler, so
# that its x are draws.)

x = np.linspace(-3.0, 3.0, 241)
figure = plot.velocity(numpyro.distributions.Normal(0.0, 1.0), ESTIMATORS, x=x)
in_pyro = plot.velocity(pyro.distributions.Normal(0.0, 1.0), ESTIMATORS, x=x)
for ax, other in zip(figure.axes[:4], in_pyro.axes[:4], strict=True):
    for line in other.lines[:3]:
        ax.plot(x[::24], line.get_ydata()[::24], "k.", markersize=3)
plt.close(in_pyro)

# %%
# The farther u is from that of the sampler, the more is left to ψ. Where the third field is 0, its ψ is that of LR,
# with a correction for the slope of the field, without which the gradient would be biased.
#
# The same as a flow. Below, p is cut into slices of the same mass; the lines carry their edges while ``loc`` goes from
# 0 to 1; above are the same slices under the new p.

plot.flow(pyro.distributions.Normal(0.0, 1.0), ESTIMATORS, "loc")
plt.show()

# %%
# RP moves every slice and keeps its mass. LR leaves the slices where they are and changes their mass: it is lost to the
# left (blue) and made to the right (orange). The others do some of both, and all four end up with the same density.
