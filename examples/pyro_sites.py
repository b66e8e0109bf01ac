"""One gradient estimator per site in Pyro: in the model under an autoguide, and in a guide of your own.

python examples/pyro_sites.py [--smoke]
"""

import sys

import pyro
import pyro.distributions as dist
import torch
from pyro.infer import SVI
from pyro.infer.autoguide import AutoNormal
from pyro.optim import Adam

from flowvi import LR, RP, Flow, ImplicitRP
from flowvi.pyro import TraceFlow_ELBO

pyro.set_rng_seed(0)
X = torch.linspace(-1.0, 1.0, 40)
Y = 0.5 + 1.5 * X + 0.3 * torch.randn(40)

# 1. A continuous model under AutoNormal. An annotation in the model gives the estimator of the guide's draw. A site without an
#    annotation gets the default, Auto(): RP if the distribution is reparameterized, the exact sum over a discrete site if that is
#    cheap, else LR.


def line(x, y):
    intercept = pyro.sample("intercept", dist.Normal(0.0, 1.0), infer={"estimator": LR()})
    slope = pyro.sample("slope", dist.Normal(0.0, 1.0), infer={"estimator": ImplicitRP()})
    noise = pyro.sample("noise", dist.HalfNormal(1.0))
    with pyro.plate("data", len(x)):
        pyro.sample("y", dist.Normal(intercept + slope * x, noise), obs=y)


# 2. The same line with a discrete site, which says whether x matters at all, and a guide of your own.


def line_or_not(x, y):
    matters = pyro.sample("matters", dist.Bernoulli(0.5))
    intercept = pyro.sample("intercept", dist.Normal(0.0, 1.0))
    slope = pyro.sample("slope", dist.Normal(0.0, 1.0))
    with pyro.plate("data", len(x)):
        pyro.sample("y", dist.Normal(intercept + matters * slope * x, 0.3), obs=y)


# A velocity for each parameter: that of RP for the scale, and halfway between LR (0) and RP (1) for the loc.
HALFWAY = Flow(loc=lambda x, p: 0.5, scale=lambda x, p: (x - p.loc) / p.scale)


def guide(x, y):
    logits = pyro.param("matters_logits", torch.tensor(0.0))
    pyro.sample("matters", dist.Bernoulli(logits=logits), infer={"estimator": LR()})
    for name, estimator in (("intercept", RP()), ("slope", HALFWAY)):
        loc = pyro.param(f"{name}_loc", torch.tensor(0.0))
        scale = pyro.param(f"{name}_scale", torch.tensor(0.5), constraint=dist.constraints.positive)
        pyro.sample(name, dist.Normal(loc, scale), infer={"estimator": estimator})


def train(model, guide, steps):
    elbo = TraceFlow_ELBO(num_particles=16, vectorize_particles=True, max_plate_nesting=1)
    svi = SVI(model, guide, Adam({"lr": 0.02}), elbo)
    losses = [svi.step(X, Y) for _ in range(steps)]
    print(elbo.describe(model, guide, X, Y))
    print(f"loss: {losses[0]:.2f} at the first step, {torch.tensor(losses[-100:]).mean():.2f} over the last\n")


if __name__ == "__main__":
    steps = 10 if "--smoke" in sys.argv else 1000
    train(line, AutoNormal(line), steps)
    train(line_or_not, guide, steps)
