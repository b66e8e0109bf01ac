"""
A hidden Markov model: years of many earthquakes
================================================

Some decades have more large earthquakes than others. A hidden state says for each year whether it is a calm or a lively
one. The model is a ``scan`` whose states have ``infer={"enumerate": "parallel"}``: flowvi sums over all 2¹⁰⁷ paths of
the states, exactly. NumPyro's own ``TraceEnum_ELBO`` does not sum over a ``scan``. This example uses NumPyro.
"""

# %%
# Earthquakes of magnitude 7 or more in the world, in each of the years from 1900 to 2006 (Zucchini and MacDonald 2009,
# Hidden Markov Models for Time Series, table 1.1; also in an example of hmmlearn).

import sys

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import numpyro
import numpyro.distributions as dist
from numpyro.contrib.control_flow import scan
from numpyro.infer import SVI

from flowvi import plot
from flowvi.numpyro import TraceFlow_ELBO

COUNTS = [
    *(13, 14, 8, 10, 16, 26, 32, 27, 18, 32, 36, 24, 22, 23, 22, 18, 25, 21, 21, 14, 8, 11, 14, 23, 18, 17, 19, 20, 22, 19),
    *(13, 26, 13, 14, 22, 24, 21, 22, 26, 21, 23, 24, 27, 41, 31, 27, 35, 26, 28, 36, 39, 21, 17, 22, 17, 19, 15, 34, 10, 15),
    *(22, 18, 15, 20, 15, 22, 19, 16, 30, 27, 29, 23, 20, 16, 21, 21, 25, 16, 18, 15, 18, 14, 10, 15, 8, 15, 6, 11, 8, 7),
    *(18, 16, 13, 12, 13, 20, 15, 16, 12, 18, 15, 16, 13, 15, 16, 11, 11),
]
YEARS, Y = 1900 + np.arange(len(COUNTS)), jnp.array(COUNTS)
STEPS = 3 if "--smoke" in sys.argv else 600

# %%
# The model has a rate for each state, and the probability of staying in it. The guide has these sites and no hidden
# states.


def model():
    with numpyro.plate("states", 2):
        rate = numpyro.sample("rate", dist.LogNormal(3.0, 0.5))
        stay = numpyro.sample("stay", dist.Beta(8.0, 2.0))

    def year(state, y):
        lively = jnp.where(state == 1, stay[1], 1 - stay[0])
        state = numpyro.sample("state", dist.Bernoulli(lively), infer={"enumerate": "parallel"})
        numpyro.sample("count", dist.Poisson(rate[state]), obs=y)
        return state, None

    scan(year, 0, Y)


def guide():
    def param(name, initial):
        return numpyro.param(name, jnp.array(initial), constraint=dist.constraints.positive)

    with numpyro.plate("states", 2):
        loc = numpyro.param("rate_loc", jnp.array([2.7, 3.3]))
        numpyro.sample("rate", dist.LogNormal(loc, param("rate_scale", [0.1, 0.1])))
        numpyro.sample("stay", dist.Beta(param("stay_a", [8.0, 8.0]), param("stay_b", [2.0, 2.0])))


# %%
# Fit it.

elbo = TraceFlow_ELBO(num_particles=4)
print(elbo.describe(model, guide))
fitted = SVI(model, guide, numpyro.optim.Adam(0.05), elbo).run(jax.random.key(0), STEPS, progress_bar=False).params

# %%
# The probability of a lively year, from the forward and backward recursions at the medians and means of the guide.

rates = np.exp(fitted["rate_loc"])
stay = np.asarray(fitted["stay_a"] / (fitted["stay_a"] + fitted["stay_b"]))
transition = np.array([[stay[0], 1 - stay[0]], [1 - stay[1], stay[1]]])
likelihood = np.exp(dist.Poisson(rates).log_prob(Y[:, None]))
forward, backward = [np.array([1.0, 0.0])], [np.ones(2)]
for of_year in np.asarray(likelihood):
    step = forward[-1] @ transition * of_year
    forward.append(step / step.sum())
for of_year in np.asarray(likelihood)[:0:-1]:
    step = transition @ (of_year * backward[-1])
    backward.append(step / step.sum())
smoothed = np.array(forward[1:]) * np.array(backward[::-1])
lively = smoothed[:, 1] / smoothed.sum(1)
print(f"rates: {rates[0]:.0f} and {rates[1]:.0f} a year; a state lasts {1 / (1 - stay[0]):.0f} and {1 / (1 - stay[1]):.0f} years")

# %%
# Above: the counts, and the expected count of each year. Below: the probability that the year is a lively one.

plt.rcParams.update(plot.STYLE)
figure, (upper, lower) = plt.subplots(2, 1, figsize=(5.5, 4.2), sharex=True, height_ratios=(2, 1))
upper.bar(YEARS, COUNTS, color="0.8", width=1.0, label="earthquakes")
upper.plot(YEARS, rates[0] + (rates[1] - rates[0]) * lively, label="expected")
upper.set(ylabel="in a year")
upper.legend(ncols=2, loc="upper right")
lower.fill_between(YEARS, lively, color=plot.COLORS[1], linewidth=0, alpha=0.7)
lower.set(xlabel="year", ylabel="P(lively)", ylim=(0.0, 1.0))
plt.show()

# %%
# The lively years are those before 1918, from 1934 to 1951, and around 1970. The sum over the states is exact. Each step
# draws only two rates and two probabilities.
