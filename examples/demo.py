"""Two models, two hosts, one set of estimator objects.

    python examples/demo.py            # one to two minutes
    python examples/demo.py --smoke    # seconds: one assignment of each model, too few steps to converge

The estimators are defined once, below the imports, and used unchanged in NumPyro and in Pyro. The models are

1. a Bayesian logistic regression (scikit-learn's breast cancer data) under a mean-field Normal guide, and
2. the eight schools, with a discrete switch between complete and partial pooling.

Both ELBOs have a closed form, up to an integral in one dimension in the first. So the best ELBO of the guide is known, and the
ELBO of each fit is printed without Monte Carlo noise. Then the variance of the gradient from a single particle is measured at
the optimum, site by site, in both hosts.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions
import pyro
import pyro.distributions
import pyro.infer
import pyro.optim
import torch
from jax.flatten_util import ravel_pytree
from scipy.optimize import minimize
from scipy.special import expit, log_softmax, logsumexp
from scipy.stats import multivariate_normal
from sklearn.datasets import load_breast_cancer
from sklearn.preprocessing import StandardScaler

import flowvi.numpyro
import flowvi.pyro
from flowvi import LR, RP, Flow, ImplicitRP

numpyro.enable_x64()
torch.set_default_dtype(torch.float64)

# The estimators. They work in both hosts: p is the site's distribution, and type(p) makes another one of the same family.


def standardize(x, p):
    return (x - p.loc) / p.scale


def wider(p):
    return type(p)(p.loc, 1.1 * p.scale)


def tempered(p):
    return type(p)(logits=0.5 * p.logits)


HALFWAY = Flow(loc=lambda x, p: 0.5, scale=lambda x, p: 0.5 * (x - p.loc) / p.scale, q=wider)  # between LR (0) and RP (1)

WEIGHTS = {
    "LR": {"w": LR()},
    "RP": {"w": RP()},
    "ImplicitRP": {"w": ImplicitRP(standardize)},
    "Flow, half-way": {"w": HALFWAY},
}
SCHOOLS = {
    "LR at every site": {"pooled": LR(), "mu": LR(), "tau": LR(), "eta": LR()},
    "LR and RP": {"pooled": LR(), "mu": RP(), "tau": RP(), "eta": RP()},
    "one of each kind": {"pooled": LR(q=tempered), "mu": HALFWAY, "tau": ImplicitRP(), "eta": RP()},
}

STEP_SIZE = 0.1  # the initial step size of Adam


class Problem(NamedTuple):
    """A model and a guide for both hosts, with the exact ELBO."""

    model: Callable[[Any], None]
    guide: Callable[[Any], None]
    elbo: Callable[[dict], jax.Array]  # exact, as a function of the variational parameters
    initial: dict[str, np.ndarray]
    plates: int  # the number of nested plates


# The hosts. Models and guides are written once, with a host's own primitives in host.ppl and its distributions in host.dist.


class NumPyro:
    ppl, dist, exp, array = numpyro, numpyro.distributions, staticmethod(jnp.exp), staticmethod(jnp.asarray)

    def fit(self, problem, estimators, particles, steps):
        """The variational parameters after Adam with a step size that decays by a factor of 100."""
        elbo = flowvi.numpyro.TraceFlow_ELBO(num_particles=particles, estimators=estimators)
        adam = numpyro.optim.Adam(lambda step: STEP_SIZE * 0.01 ** (step / steps))
        svi = numpyro.infer.SVI(partial(problem.model, self), partial(problem.guide, self), adam, elbo)
        return svi.run(jax.random.key(0), steps, progress_bar=False).params

    def gradients(self, problem, estimators, params, draws):
        """Gradients of the loss, each from one particle, by parameter; the draws are the first axis."""
        elbo = flowvi.numpyro.TraceFlow_ELBO(estimators=estimators)

        def loss(params, key):
            return elbo.loss(key, params, partial(problem.model, self), partial(problem.guide, self))

        return jax.jit(jax.vmap(jax.grad(loss), in_axes=(None, 0)))(params, jax.random.split(jax.random.key(1), draws))


class Pyro:
    ppl, dist, exp, array = pyro, pyro.distributions, staticmethod(torch.exp), staticmethod(torch.tensor)

    def elbo(self, problem, **options):
        return flowvi.pyro.TraceFlow_ELBO(vectorize_particles=True, max_plate_nesting=problem.plates, **options)

    def fit(self, problem, estimators, particles, steps):
        """The variational parameters after Adam with a step size that decays by a factor of 100."""
        pyro.clear_param_store()
        pyro.set_rng_seed(0)
        elbo = self.elbo(problem, num_particles=particles, estimators=estimators)
        adam = pyro.optim.ExponentialLR({"optimizer": torch.optim.Adam, "optim_args": {"lr": STEP_SIZE}, "gamma": 0.01 ** (1 / steps)})
        svi = pyro.infer.SVI(partial(problem.model, self), partial(problem.guide, self), adam, elbo)
        for _ in range(steps):
            svi.step()
            adam.step()
        return {name: value.detach().numpy().copy() for name, value in pyro.get_param_store().items()}

    def gradients(self, problem, estimators, params, draws):
        """Gradients of the loss, each from one particle, by parameter; the draws are the first axis.

        Every particle has its own copy of the parameters, so one backward pass gives the gradient of each.
        """
        pyro.clear_param_store()
        pyro.set_rng_seed(1)
        copies = {name: self._copies(value, draws, problem.plates) for name, value in params.items()}
        guide = pyro.poutine.substitute(partial(problem.guide, self), data=copies)
        elbo = self.elbo(problem, num_particles=draws, estimators=estimators, baseline=None)  # a baseline would couple the particles
        loss = draws * elbo.differentiable_loss(partial(problem.model, self), guide)
        return {name: gradient.numpy() for name, gradient in zip(copies, torch.autograd.grad(loss, list(copies.values())), strict=True)}

    def _copies(self, value, draws, plates):
        value = torch.as_tensor(np.array(value))
        plate_dims = (1,) * (plates - value.ndim)
        return value.expand(draws, *plate_dims, *value.shape).clone().requires_grad_()


HOSTS = (NumPyro(), Pyro())

# First problem: logistic regression.


def breast_cancer():
    """The 30 standardized features with a column of ones, and the labels."""
    features, labels = load_breast_cancer(return_X_y=True)
    return np.column_stack([StandardScaler().fit_transform(features), np.ones(len(labels))]), labels.astype(float)


FEATURES, LABELS = breast_cancer()


def logistic_model(host):
    w = host.ppl.sample("w", host.dist.Normal(host.array(np.zeros(31)), 1.0).to_event(1))
    logits = w @ host.array(FEATURES).T
    host.ppl.sample("y", host.dist.Bernoulli(logits=logits).to_event(1), obs=host.array(LABELS))


LOGISTIC_INITIAL = {"w_loc": np.zeros(31), "w_log_scale": np.full(31, -1.0)}


def logistic_guide(host):
    param = {name: host.ppl.param(name, host.array(value)) for name, value in LOGISTIC_INITIAL.items()}
    host.ppl.sample("w", host.dist.Normal(param["w_loc"], host.exp(param["w_log_scale"])).to_event(1))


def logistic_elbo(params):
    """The exact ELBO. Each logit is Normal under the guide, so each term of the likelihood is an integral in one dimension."""
    loc, log_scale = params["w_loc"], params["w_log_scale"]
    z = jnp.linspace(-9.0, 9.0, 301)  # the trapezoid rule; 64 Gauss-Hermite nodes have an error of 3e-5 if a logit's scale is 11
    weights = jax.nn.softmax(-0.5 * z**2)
    logits = (FEATURES @ loc)[:, None] + jnp.sqrt(FEATURES**2 @ jnp.exp(2 * log_scale))[:, None] * z
    log_likelihood = jnp.sum(jax.nn.log_sigmoid((2 * LABELS - 1)[:, None] * logits) @ weights)
    return log_likelihood - kl_normal(loc, log_scale)


def kl_normal(loc, log_scale, prior_scale=1.0):
    """KL divergence from Normal(loc, exp(log_scale)) to Normal(0, prior_scale), summed."""
    ratio = jnp.exp(log_scale) / prior_scale
    return 0.5 * jnp.sum(ratio**2 + (loc / prior_scale) ** 2 - 1 - 2 * jnp.log(ratio))


LOGISTIC = Problem(logistic_model, logistic_guide, logistic_elbo, LOGISTIC_INITIAL, plates=0)

# Second problem: eight schools. With pooled = 1 all have the effect mu; otherwise school j has the effect mu + tau * eta[j].

EFFECTS = np.array([28.0, 8.0, -3.0, 7.0, -1.0, 1.0, 18.0, 12.0])
ERRORS = np.array([15.0, 10.0, 16.0, 11.0, 9.0, 11.0, 10.0, 18.0])
MU_SCALE, TAU_LOC, TAU_SCALE = 10.0, np.log(8.0), 0.5  # of the priors


def schools_model(host):
    pooled = host.ppl.sample("pooled", host.dist.Bernoulli(host.array(0.5)))
    mu = host.ppl.sample("mu", host.dist.Normal(host.array(0.0), MU_SCALE))
    tau = host.ppl.sample("tau", host.dist.LogNormal(host.array(TAU_LOC), TAU_SCALE))
    with host.ppl.plate("schools", 8):
        eta = host.ppl.sample("eta", host.dist.Normal(host.array(0.0), 1.0))
        effect = mu + (1 - pooled) * tau * eta
        host.ppl.sample("y", host.dist.Normal(effect, host.array(ERRORS)), obs=host.array(EFFECTS))


SCHOOLS_INITIAL = {
    "pooled_logits": np.array(0.0),
    "mu_loc": np.array(0.0),
    "mu_log_scale": np.array(1.0),
    "tau_shift": np.array(0.0),
    "tau_log_scale": np.array(0.0),
    "eta_loc": np.zeros(8),
    "eta_log_scale": np.zeros(8),
}


def schools_guide(host):
    """Under complete pooling the data do not depend on tau and eta, so the guide draws them from their priors."""
    param = {name: host.ppl.param(name, host.array(value)) for name, value in SCHOOLS_INITIAL.items()}
    free = 1 - host.ppl.sample("pooled", host.dist.Bernoulli(logits=param["pooled_logits"]))
    host.ppl.sample("mu", host.dist.Normal(param["mu_loc"], host.exp(param["mu_log_scale"])))
    tau_loc, tau_scale = TAU_LOC + free * param["tau_shift"], TAU_SCALE * host.exp(free * param["tau_log_scale"])
    host.ppl.sample("tau", host.dist.LogNormal(tau_loc, tau_scale))
    with host.ppl.plate("schools", 8):
        host.ppl.sample("eta", host.dist.Normal(free * param["eta_loc"], host.exp(free * param["eta_log_scale"])))


def schools_elbo(params):
    pooled = jax.nn.sigmoid(params["pooled_logits"])
    mu_loc, mu_variance = params["mu_loc"], jnp.exp(2 * params["mu_log_scale"])
    tau_loc, tau_variance = TAU_LOC + params["tau_shift"], TAU_SCALE**2 * jnp.exp(2 * params["tau_log_scale"])
    tau_mean, tau_square = jnp.exp(tau_loc + tau_variance / 2), jnp.exp(2 * tau_loc + 2 * tau_variance)
    eta_loc, eta_square = params["eta_loc"], params["eta_loc"] ** 2 + jnp.exp(2 * params["eta_log_scale"])

    def log_likelihood(mean, variance):  # its expectation, for school effects with this mean and variance
        return jnp.sum(-0.5 * ((EFFECTS - mean) ** 2 + variance) / ERRORS**2 - jnp.log(ERRORS) - 0.5 * jnp.log(2 * jnp.pi))

    shift_mean, shift_square = tau_mean * eta_loc, tau_square * eta_square
    if_free = log_likelihood(mu_loc + shift_mean, mu_variance + shift_square - shift_mean**2)
    if_free -= kl_normal(params["tau_shift"] / TAU_SCALE, params["tau_log_scale"]) + kl_normal(eta_loc, params["eta_log_scale"])
    if_pooled = log_likelihood(mu_loc, mu_variance)
    kl_pooled = pooled * jnp.log(2 * pooled) + (1 - pooled) * jnp.log(2 * (1 - pooled))
    return pooled * if_pooled + (1 - pooled) * if_free - kl_pooled - kl_normal(mu_loc, params["mu_log_scale"], MU_SCALE)


def schools_posterior():
    """The log evidence and the probability of the switch. Given tau the data are jointly Normal; tau is summed on a grid."""

    def log_density(tau):
        covariance = MU_SCALE**2 * np.ones((8, 8)) + np.diag(tau**2 + ERRORS**2)
        return multivariate_normal(np.zeros(8), covariance).logpdf(EFFECTS)

    z = np.linspace(-9.0, 9.0, 301)
    log_free = logsumexp([log_density(tau) for tau in np.exp(TAU_LOC + TAU_SCALE * z)] + log_softmax(-0.5 * z**2))
    log_pooled = log_density(0.0)
    return np.logaddexp(log_pooled, log_free) - np.log(2), expit(log_pooled - log_free)


EIGHT_SCHOOLS = Problem(schools_model, schools_guide, schools_elbo, SCHOOLS_INITIAL, plates=1)

# The runs and the tables.


def optimum(problem):
    """The best parameters of the guide, from the exact ELBO."""
    initial, unravel = ravel_pytree({name: jnp.asarray(value) for name, value in problem.initial.items()})
    loss = jax.jit(jax.value_and_grad(lambda flat: -problem.elbo(unravel(flat))))
    found = minimize(lambda flat: [np.asarray(a) for a in loss(flat)], initial, jac=True, method="L-BFGS-B", options={"gtol": 1e-8})
    return unravel(jnp.asarray(found.x))


def variances(host, problem, estimators, params, draws):
    """The variance of each site's gradient, summed over the elements of its parameters."""
    gradients = host.gradients(problem, estimators, params, draws)
    of_site = dict.fromkeys(estimators, 0.0)
    for name, gradient in gradients.items():
        of_site[name.split("_")[0]] += float(np.var(gradient, axis=0, ddof=1).sum())
    return of_site


def table(*rows):
    """Print rows of cells below a heading; words are aligned to the left, numbers to the right."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    numeric = [rows[-1][i][-1:].isdigit() for i in range(len(rows[0]))]
    for i, row in enumerate(rows):
        cells = (cell.rjust(w) if n else cell.ljust(w) for cell, w, n in zip(row, widths, numeric, strict=True))
        print("   " + "   ".join(cells).rstrip())
        if i == 0:
            print("   " + "   ".join("-" * w for w in widths))
    print()


def print_variances(problem, assignments, params, draws):
    print(f"Variance of the gradient from one particle, at the optimum of the guide ({draws:,} draws in each host)\n")
    rows = [("estimators", "site", "its estimator", *(type(host).__name__ for host in HOSTS))]
    for title, estimators in assignments.items():
        found = [variances(host, problem, estimators, params, draws) for host in HOSTS]
        for i, (site, estimator) in enumerate(estimators.items()):
            rows.append(("" if i else title, site, type(estimator).__name__, *(f"{of_site[site]:,.3f}" for of_site in found)))
    table(*rows)


def logistic_regression(assignments, steps, draws):
    best = optimum(LOGISTIC)
    best_elbo = float(logistic_elbo(best))
    print("1. Bayesian logistic regression: breast cancer, 569 patients, 31 weights, mean-field Normal guide\n")
    print(f"The best ELBO of this guide, by quadrature and L-BFGS, is {best_elbo:.4f} (-67.4635 is quoted for mc_gradients' model).")
    print(f"The exact ELBO of each fit after {steps} steps of Adam, and its distance to the best:\n")
    rows = [("estimator of w", "particles", *(heading for host in HOSTS for heading in (type(host).__name__, "below")))]
    for title, estimators in assignments.items():
        for particles in (20, 100) if title == "LR" else (20,):
            elbos = [float(logistic_elbo(host.fit(LOGISTIC, estimators, particles, steps))) for host in HOSTS]
            rows.append((title, str(particles), *(cell for elbo in elbos for cell in (f"{elbo:.4f}", f"{best_elbo - elbo:.4f}"))))
    table(*rows)
    print_variances(LOGISTIC, assignments, best, draws)


def eight_schools(assignments, steps, draws):
    best = optimum(EIGHT_SCHOOLS)
    evidence, probability = schools_posterior()
    print("2. Eight schools, with a switch between complete and partial pooling\n")
    print(f"By quadrature, the posterior probability of complete pooling is {probability:.4f} and the log evidence {evidence:.4f}.")
    print("In the guide, mu, tau and eta are independent given the switch; the last row is the best guide of this kind.")
    print(f"The exact ELBO and the probability of each fit after {steps} steps of Adam with 20 particles:\n")

    def row(title, fits):
        elbos, probabilities = [schools_elbo(fit) for fit in fits], [expit(fit["pooled_logits"]) for fit in fits]
        return (title, *(f"{number:.4f}" for number in elbos + probabilities))

    rows = [("estimators", *(f"{type(host).__name__} {what}" for what in ("ELBO", "P(pooled)") for host in HOSTS))]
    rows += [row(title, [host.fit(EIGHT_SCHOOLS, it, 20, steps) for host in HOSTS]) for title, it in assignments.items()]
    rows.append(row("the best of this guide", [best, best]))
    table(*rows)
    print_variances(EIGHT_SCHOOLS, assignments, best, draws)


def main():
    parser = argparse.ArgumentParser(description="Two models, two hosts, one set of estimator objects.")
    parser.add_argument("--smoke", action="store_true", help="one assignment of each model, a few steps and draws")
    start = time.perf_counter()
    if parser.parse_args().smoke:
        jax.config.update("jax_disable_most_optimizations", True)  # compilation takes most of the time
        logistic_regression(dict([list(WEIGHTS.items())[-1]]), steps=5, draws=20)
        eight_schools(dict([list(SCHOOLS.items())[-1]]), steps=5, draws=20)
    else:
        logistic_regression(WEIGHTS, steps=1000, draws=4000)
        eight_schools(SCHOOLS, steps=1000, draws=20_000)
    print(f"Done in {time.perf_counter() - start:.0f} seconds.")


if __name__ == "__main__":
    main()
