"""
A cost that jumps: when did coal mines become safer?
====================================================

The year of a change is a continuous site, and the likelihood jumps from one year to the next. ``RP`` sees only the
slope between the jumps, and is silently wrong. ``RP(jumps=[...])`` adds the contribution of the jumps. This example
uses NumPyro.
"""

# %%
# British coal-mining disasters with ten or more deaths, in each of the years from 1851 to 1961 (Jarrett 1979; the dates of
# ``coal`` in the R package boot).

import sys

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import numpyro
import numpyro.distributions as dist
from numpyro.infer import SVI

from flowvi import LR, RP, plot
from flowvi.numpyro import TraceFlow_ELBO

COUNTS = "454104340633402633545314415534252234213221111300101100310322011101010002100011023311211112330001400010000010010"
DISASTERS = np.array([int(count) for count in COUNTS])
YEARS = 1851 + np.arange(len(DISASTERS))

# %%
# One rate before the change and another one after it. The cost jumps at every year.


def model():
    change = numpyro.sample("change", dist.Normal(1906.0, 30.0))
    early, late = (numpyro.sample(name, dist.LogNormal(0.0, 1.0)) for name in ("early", "late"))
    numpyro.sample("disasters", dist.Poisson(jnp.where(change > YEARS, early, late)).to_event(1), obs=DISASTERS)


def guide():
    def param(name, initial):
        return numpyro.param(name, initial, constraint=dist.constraints.positive)

    numpyro.sample("change", dist.Normal(numpyro.param("change_loc", 1906.0), param("change_scale", 10.0)))
    for name in ("early", "late"):
        numpyro.sample(name, dist.LogNormal(numpyro.param(f"{name}_loc", 0.5), param(f"{name}_scale", 0.2)))


ESTIMATORS = {"RP()": RP(), "LR()": LR(), "RP(jumps=...)": RP(jumps=[float(year) for year in YEARS])}
STEPS = 3 if "--smoke" in sys.argv else 1500

# %%
# Fit with each estimator, from the same start and with the same keys.

fitted = {}
for label, estimator in ESTIMATORS.items():
    elbo = TraceFlow_ELBO(num_particles=4, estimators={"change": estimator})
    svi = SVI(model, guide, numpyro.optim.Adam(0.05), elbo)
    fitted[label] = svi.run(jax.random.key(0), STEPS, progress_bar=False).params
    print(f"{label:13}  change in {fitted[label]['change_loc']:.0f} ± {fitted[label]['change_scale']:.1f}")

# %%
# For comparison: the exact posterior of the year, with each rate summed over a grid.

log_rates = np.linspace(-3.0, 3.0, 601)
prior = -0.5 * log_rates**2


def evidence(counts):
    """The log likelihood of years with one rate, up to a constant."""
    log_likelihood = counts.sum() * log_rates - len(counts) * np.exp(log_rates)
    return np.logaddexp.reduce(prior + log_likelihood)


log_posterior = [evidence(DISASTERS[:i]) + evidence(DISASTERS[i:]) for i in range(len(YEARS))] - (YEARS - 1906.5) ** 2 / 1800
exact = np.exp(log_posterior - np.logaddexp.reduce(log_posterior))

# %%
# Top: the data, and the rates of the last fit. Bottom: the exact posterior of the year, and that of each fit.

plt.rcParams.update(plot.STYLE)
figure, (upper, lower) = plt.subplots(2, 1, figsize=(5.5, 6.0))
upper.bar(YEARS, DISASTERS, color="0.8", width=1.0)
best = fitted["RP(jumps=...)"]
rates = [np.exp(best[f"{name}_loc"]) for name in ("early", "late")]
upper.step([1851, best["change_loc"], 1961], [rates[0], *rates], where="pre", color=plot.COLORS[2])
upper.set(xlabel="year", ylabel="disasters")
lower.bar(YEARS - 0.5, exact, color="0.8", width=1.0, label="exact")
grid = np.linspace(1870.0, 1920.0, 801)
for label, params in fitted.items():
    density = np.exp(dist.Normal(params["change_loc"], params["change_scale"]).log_prob(grid))
    lower.plot(grid, density, label=label)
lower.set(xlabel="year of the change", ylabel="posterior", xlim=(grid[0], grid[-1]), ylim=(0.0, 1.5 * exact.max()))
lower.legend(loc="upper right")
plt.show()

# %%
# With RP the year stays at its start, and its scale grows without limit. With the jumps, and with LR, the fits find the
# years of the exact posterior.
