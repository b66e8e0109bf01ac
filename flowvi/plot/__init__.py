r"""Pictures of estimators: how mass flows, u and psi, proposals and weights, and histograms of gradients.

Each function takes a distribution of either host, with an event of one or two dimensions and no batch, and one estimator or a mapping
from labels to estimators. It returns a matplotlib figure. The numbers come from the estimator itself: it is attached at given x as at a
site, and the draw is differentiated along the parameter. For the host's own sampler (``RP()``), x are draws of this sampler.

A *parameter* is the name of a parameter with a single element, such as ``"loc"``, or a function ``move(t)`` that returns the
distribution moved by a number t. Use a function for vectors, matrices and mixtures::

    lambda t: dist.MultivariateNormal(loc + t * direction, scale_tril=scale_tril)

Import the adapter of the distribution's host first, ``import flowvi.numpyro`` or ``import flowvi.pyro``. Drawing needs matplotlib,
``pip install 'flowvi[report]'``; ``import flowvi`` does not import it.
"""

from flowvi.plot.densities import proposal
from flowvi.plot.flows import flow
from flowvi.plot.histograms import gradient_samples, gradients
from flowvi.plot.style import COLORS, STYLE
from flowvi.plot.velocities import velocity

__all__ = ["COLORS", "STYLE", "flow", "gradient_samples", "gradients", "proposal", "velocity"]
