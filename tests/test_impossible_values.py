"""Values that the model makes impossible: at probability 0 under q they count as nothing, otherwise the loss is infinite."""

from functools import cache

import jax
import numpy as np
import pytest
from hosts import HOSTS, each, slow_in_numpyro

from flowvi import LR, DisARM, Enumerate, FiniteDifference, MeasureValued, Surrogate

PRIOR, POSSIBLE = np.array([0.4, 0.3, 0.2, 0.1]), np.array([1.0, 0.0, 2.0, 0.0])


def program(host):
    """A Categorical, two of whose values are impossible in the model."""

    def guide():
        host.sample("k", host.dist.Categorical(logits=host.param("logits", host.array(np.zeros(4)))))

    def model():
        k = host.sample("k", host.dist.Categorical(host.array(PRIOR)))
        with np.errstate(divide="ignore"):
            host.factor("cost", host.array(np.log(POSSIBLE))[host.index(k)])

    return model, guide


def flat(z):
    return 0.1 * z.sum(-1)


COEFFICIENTS = {"k.scale": 1.3, "k.log_temperature": -0.5}
ESTIMATORS = {
    "LR": (LR(), 1, {}),
    "LR, loo": (LR(), 3, {}),
    "LR, optimal": (LR("optimal"), 3, {}),
    "Enumerate": (Enumerate(), 1, {}),
    "MeasureValued": (MeasureValued(), 1, {}),
    "DisARM": (DisARM(), 1, {}),
    "FiniteDifference": (FiniteDifference(), 1, {}),
    "FiniteDifference, down": (FiniteDifference(downwards=True), 1, {}),
    "FiniteDifference, share": (FiniteDifference(share=0.5), 1, {}),
    "Surrogate": (Surrogate(flat, temperature=0.5), 1, COEFFICIENTS),
}


def evaluate(host, name, logits, n=8):
    """The losses of n steps and their gradients in the logits."""
    estimator, particles, learned = ESTIMATORS[name]
    options = {"vectorize_particles": True, "num_particles": particles, "default": estimator}
    if host.name == "numpyro":
        losses, gradients = compiled(name)(logits, jax.random.split(jax.random.key(0), n))
        return np.asarray(losses), np.asarray(gradients)
    params, parts = {"logits": logits, **learned}, program(host)
    steps = [host.loss_and_gradients(params, *parts, seed=seed, plates=0, **options) for seed in range(n)]
    return np.array([loss for loss, _ in steps]), np.array([gradients["logits"] for _, gradients in steps])


@cache
def compiled(name):
    """The steps of NumPyro, which are slow to compile, as a function of the logits and the keys. (NumPyro refuses a logit of
    -infinity if it sees it.)"""
    host = HOSTS["numpyro"]
    estimator, particles, learned = ESTIMATORS[name]
    elbo, parts = host.flow.TraceFlow_ELBO(particles, default=estimator), program(host)

    def step(logits, key):
        return elbo.loss(key, {"logits": logits, **{name: host.array(value) for name, value in learned.items()}}, *parts)

    return jax.jit(jax.vmap(jax.value_and_grad(step), (None, 0)))


def probabilities(logits):
    p = np.exp(logits - np.max(logits))
    return p / p.sum()


rows = each("name", list(ESTIMATORS), slow_in_numpyro=lambda name: name not in ("LR, optimal", "FiniteDifference"))


@rows
def test_a_value_of_probability_0_counts_as_nothing(host, name):
    """The second and the last category have probability 0 under q, and the model makes them impossible."""
    logits = np.array([0.2, -np.inf, -0.3, -np.inf])
    p = probabilities(logits)[[0, 2]]
    phi = np.log((PRIOR * POSSIBLE)[[0, 2]]) - np.log(p)
    exact = -p[0] * p[1] * (phi[0] - phi[1])
    losses, gradients = evaluate(host, name, logits)
    assert np.isfinite(losses).all()
    assert np.all(gradients[:, [1, 3]] == 0)
    np.testing.assert_allclose(gradients[:, 0], -gradients[:, 2], rtol=1e-10, atol=1e-14)
    if name in ("Enumerate", "MeasureValued"):
        np.testing.assert_allclose(gradients[:, 0], exact, rtol=1e-10)
    if name in ("FiniteDifference", "FiniteDifference, down"):  # the neighbour of the first category is the third
        drawn, compares = np.isclose(losses[:, None], -phi, rtol=1e-10), [0, 1] if "down" in name else [1, 0]
        assert np.all(drawn.sum(1) == 1)
        np.testing.assert_allclose(gradients[:, 0], (drawn * compares / p).sum(1) * exact, rtol=1e-10, atol=1e-14)


@rows
def test_an_impossible_value_has_an_infinite_loss(host, name):
    """Where q gives it a positive probability, the loss of a step that draws it is infinite, and never NaN."""
    logits = np.array([0.2, -0.1, -0.3, 0.4])
    losses, _ = evaluate(host, name, logits)
    finite = np.isfinite(losses)
    assert np.all(losses[~finite] == np.inf)
    assert not finite.all()
    if ESTIMATORS[name][1] == 1:
        possible = (np.log(probabilities(logits)) - np.log(PRIOR))[[0, 2]] - np.log(POSSIBLE[[0, 2]])
        assert finite.any()
        assert np.all(np.isclose(losses[finite, None], possible, rtol=1e-10).any(1))


@slow_in_numpyro
@pytest.mark.parametrize("downwards", [False, True])
def test_a_derivative_at_probability_0(host, downwards):
    """A probability of 0 may have a derivative, and then FiniteDifference compares with its value: the slope is f_1 - f_0."""
    costs = host.array([1.7, 0.3] if downwards else [0.3, 1.7])

    def site(t):
        return host.dist.Categorical(probs=host.math.stack([t, 1 - t] if downwards else [1 - t, t])).mask(False)

    def guide():
        host.sample("k", site(host.param("t", host.array(0.0))))

    def model():
        k = host.sample("k", host.dist.Categorical(probs=host.array([0.5, 0.5])).mask(False))
        host.factor("cost", costs[host.index(k)])

    _, gradients = host.loss_and_gradients({"t": 0.0}, model, guide, plates=0, default=FiniteDifference(downwards=downwards))
    np.testing.assert_allclose(gradients["t"], -1.4, rtol=1e-10)
