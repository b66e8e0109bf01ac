"""The properties of every estimator in the table of ``estimators.py``."""

import pickle
from functools import cache

import estimators
import jax
import numpy as np
import pyro
import pytest
from cases import CASES, EXACT
from estimators import ROWS, WRONG, normal
from hosts import HOSTS, Program, z_scores

import flowvi
from flowvi import LR, Auto, fields

THETA = {"loc": 0.3, "scale": 0.8}


def wave(h, x):
    return h.math.sin(2 * x) + 0.3 * x**2


def evaluate(host, estimator, learned=None, particles=1, cost=wave, mask=True, live=tuple(THETA), by=1.0, run=None, site=normal):
    """The loss and its gradients in loc and scale, with two Normals or other sites in a plate.

    Only the ``live`` parameters depend on the variables that are differentiated, scaled by ``by``.
    """

    def distribution(moved):
        return site(host, *(value + by * moved[k] if k in moved else host.array(value) for k, value in THETA.items()))

    def guide():
        moved = {name: host.param(name, host.array(0.0)) for name in live}
        with host.plate("n", 2):
            host.sample("x", distribution(moved).mask(mask))

    def model():
        with host.plate("n", 2):
            x = host.sample("x", site(host, host.array(0.0), host.array(1.0)).mask(mask))
            host.factor("cost", cost(host, x))

    params = {**dict.fromkeys(live, 0.0), **(learned or {})}
    options = {"num_particles": particles, "vectorize_particles": True, "estimators": {"x": estimator}}
    loss, gradients = (run or host.loss_and_gradients)(params, model, guide, plates=1, **options)
    return loss, {name: gradients[name] for name in live}


def of_row(host, row, **options):
    return evaluate(host, row.make(), row.coefficients(2), row.particles[0], site=row.site, **options)


def itself(h, x):
    return x


@cache
def by_lr(host, q, particles, site):
    """The loss with the cost x."""
    return evaluate(host, LR(q=q), None, particles, cost=itself, mask=False, site=site)[0]


# ---- the properties


def value(host, row):
    """The value is the drawn number bit for bit: with the cost x, the loss is that of LR at the same density."""
    assert of_row(host, row, cost=itself, mask=False)[0] == by_lr(host, row.draws or row.make().q, row.particles[0], row.site)


def linear(host, row):
    """The derivatives of value and score are linear in dtheta: parameters add up, and a step three times as far counts three times."""
    _, both = of_row(host, row)
    for name in THETA:
        _, alone = of_row(host, row, live=(name,), by=3.0)
        np.testing.assert_allclose(alone[name], 3 * both[name], rtol=1e-9, atol=1e-12)


def unbiased(host, row):
    """The mean over many draws is the exact gradient, with one particle and with several."""
    for name in row.cases:
        program, exact = CASES[name].program, EXACT[name.split(",")[0]]["gradient"]

        def guide(h, t, program=program):
            with h.substitute(row.coefficients()):
                program.guide(h, t)

        for particles in row.particles:
            estimated = Program(guide, program.model, program.theta, program.plates)
            samples = host.gradients(estimated, 20_000 // particles, particles=particles, estimators={"x": row.make()})
            assert np.all(np.abs(z_scores(samples, exact)) < 5), (name, particles)


def refused(host, row):
    """A site at which it would be wrong raises an error that names the site."""
    if row.refused is None:
        assert row.make is Auto
        return
    distribution, message = row.refused

    def site(h, t):
        h.sample("x", distribution(h, t[0]))

    with pytest.raises(ValueError, match=f"^site 'x': .*{message}"):
        host.gradients(Program(site, site, (0.3,)), 3, particles=row.particles[0], estimators={"x": row.make()})


def plain(row):
    """Equal arguments make equal estimators with equal hashes; a repr and a pickle give an equal estimator too."""
    one, names = row.make(), {**vars(estimators), **vars(fields), **vars(flowvi)}
    for make in (row.make, lambda: eval(repr(one), names), lambda: pickle.loads(pickle.dumps(one))):
        again = make()
        assert repr(again) == repr(one)
        if row.by_value:
            assert again == one
            assert hash(again) == hash(one)


OF_A_HOST = {f.__name__: f for f in (value, linear, unbiased, refused)}


@pytest.mark.parametrize("name", ROWS)
@pytest.mark.parametrize("what", OF_A_HOST)
def test_every_estimator(host, what, name):
    OF_A_HOST[what](host, ROWS[name])


@pytest.mark.parametrize("name", ROWS)
def test_every_estimator_is_a_plain_value(name):
    plain(ROWS[name])


@pytest.mark.parametrize("what", WRONG)
def test_a_wrong_estimator_is_rejected(host, what):
    """A wrong estimator fails the property that it violates, so the tests can fail."""
    with pytest.raises((AssertionError, pytest.fail.Exception)):
        plain(WRONG[what]) if what == "plain" else OF_A_HOST[what](host, WRONG[what])


@pytest.mark.parametrize("name", ROWS)
def test_grad_of_jit_in_numpyro(name):
    """The gradient of a compiled loss is that of the loss. (``unbiased`` compiles the gradient.)"""
    host, row = HOSTS["numpyro"], ROWS[name]

    def run(params, model, guide, plates, **options):
        elbo = host.flow.TraceFlow_ELBO(**options)
        return host.value_and_gradient(jax.jit(lambda params: elbo.loss(jax.random.key(0), params, model, guide)), params)

    (loss, gradients), (compiled, of_compiled) = of_row(host, row), of_row(host, row, run=run)
    np.testing.assert_allclose(compiled, loss, rtol=1e-12)
    for parameter in THETA:
        np.testing.assert_allclose(of_compiled[parameter], gradients[parameter], rtol=1e-10)


@pytest.mark.parametrize("name", ROWS)
def test_without_validation_in_pyro(name):
    """Without validation all numbers stay the same."""
    host, row = HOSTS["pyro"], ROWS[name]
    loss, gradients = of_row(host, row)
    with pyro.validation_enabled(False):
        unseen, of_unseen = of_row(host, row)
    assert (loss, gradients) == (unseen, of_unseen)
