"""One gradient estimator per site in NumPyro: in the model under an autoguide, and in a guide of your own.

python examples/numpyro_sites.py [--smoke]
"""

import sys

import jax
import jax.numpy as jnp
import numpyro
import numpyro.distributions as dist
from numpyro.infer import SVI
from numpyro.infer.autoguide import AutoNormal

from flowvi import LR, RP, Flow, ImplicitRP
from flowvi.numpyro import TraceFlow_ELBO

X = jnp.linspace(-1.0, 1.0, 40)
Y = 0.5 + 1.5 * X + 0.3 * jax.random.normal(jax.random.key(0), (40,))

# 1. A continuous model under AutoNormal. An annotation in the model gives the estimator of the guide's draw. A site without an
#    annotation gets the default, Auto(): RP if the distribution is reparameterized, the exact sum over a discrete site if that is
#    cheap, else LR.


def line(x, y):
    intercept = numpyro.sample("intercept", dist.Normal(0.0, 1.0), infer={"estimator": LR()})
    slope = numpyro.sample("slope", dist.Normal(0.0, 1.0), infer={"estimator": ImplicitRP()})
    noise = numpyro.sample("noise", dist.HalfNormal(1.0))
    with numpyro.plate("data", len(x)):
        numpyro.sample("y", dist.Normal(intercept + slope * x, noise), obs=y)


# 2. The same line with a discrete site, which says whether x matters at all, and a guide of your own.


def line_or_not(x, y):
    matters = numpyro.sample("matters", dist.Bernoulli(0.5))
    intercept = numpyro.sample("intercept", dist.Normal(0.0, 1.0))
    slope = numpyro.sample("slope", dist.Normal(0.0, 1.0))
    with numpyro.plate("data", len(x)):
        numpyro.sample("y", dist.Normal(intercept + matters * slope * x, 0.3), obs=y)


# A velocity for each parameter: that of RP for the scale, and halfway between LR (0) and RP (1) for the loc.
HALFWAY = Flow(loc=lambda x, p: 0.5, scale=lambda x, p: (x - p.loc) / p.scale)


def guide(x, y):
    logits = numpyro.param("matters_logits", 0.0)
    numpyro.sample("matters", dist.Bernoulli(logits=logits), infer={"estimator": LR()})
    for name, estimator in (("intercept", RP()), ("slope", HALFWAY)):
        loc = numpyro.param(f"{name}_loc", 0.0)
        scale = numpyro.param(f"{name}_scale", 0.5, constraint=dist.constraints.positive)
        numpyro.sample(name, dist.Normal(loc, scale), infer={"estimator": estimator})


def train(model, guide, steps):
    elbo = TraceFlow_ELBO(num_particles=16)
    svi = SVI(model, guide, numpyro.optim.Adam(0.02), elbo)
    result = svi.run(jax.random.key(1), steps, X, Y, progress_bar=False)
    print(elbo.describe(model, guide, X, Y))
    print(f"loss: {result.losses[0]:.2f} at the first step, {result.losses[-100:].mean():.2f} over the last\n")


if __name__ == "__main__":
    steps = 10 if "--smoke" in sys.argv else 1000
    train(line, AutoNormal(line), steps)
    train(line_or_not, guide, steps)
