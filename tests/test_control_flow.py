"""Python branches in Pyro; ``scan`` and ``cond`` in NumPyro, where only the wrapper acts."""

import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as numpyro_dist
import pyro
import pyro.distributions as pyro_dist
import pytest
import torch
from hosts import HOSTS, Program, expected_under
from kinds import HALF, KINDS, wide
from numpyro.contrib.control_flow import cond, scan

import flowvi.numpyro
import flowvi.pyro
from flowvi import LR, RP


@pytest.mark.parametrize("particles", [pytest.param(1, marks=pytest.mark.slow), 4])
def test_python_control_flow_in_pyro(particles):
    """Guide and model branch on a discrete latent, so z exists only in some runs. Pyro's provenance does not see this."""
    logit, loc = (torch.tensor(v, requires_grad=True) for v in (0.3, 0.4))

    def guide():
        if pyro.sample("b", pyro_dist.Bernoulli(logits=logit)).item() > 0:
            pyro.sample("z", pyro_dist.Normal(loc, 1.0))

    def model():
        if pyro.sample("b", pyro_dist.Bernoulli(torch.tensor(0.5))).item() > 0:
            pyro.sample("z", pyro_dist.Normal(torch.tensor(0.0), 1.0))

    p = 1 / (1 + np.exp(-0.3))
    exact = [p * (1 - p) * (-0.5 * 0.4**2 - np.log(p) + np.log(1 - p)), -p * 0.4]
    elbo = flowvi.pyro.TraceFlow_ELBO(particles, default=LR())
    samples = np.empty((2000 // particles, 2))
    for sample in samples:
        logit.grad, loc.grad = torch.zeros(()), torch.zeros(())
        elbo.differentiable_loss(model, guide).backward()
        sample[:] = -logit.grad, -loc.grad
    assert np.all(np.abs(samples.mean(0) - exact) < 5 * samples.std(0) / np.sqrt(len(samples)))


CHAIN_LENGTH = 3


def scanned(estimator, annotate=None):
    """x_t ~ N(0.8 x_{t-1} + m, 1) through scan, cost sum_t cos(x_t)."""
    h = HOSTS["numpyro"]

    def guide(h_, t):
        def step(x, _):
            d = numpyro_dist.Normal(0.8 * x + t[0], 1.0).mask(False)
            d = flowvi.numpyro.Estimated(d, estimator) if estimator is not None else d
            x = numpyro.sample("x", d, infer={"estimator": annotate} if annotate else None)
            return x, None

        scan(step, jnp.array(0.0), None, length=CHAIN_LENGTH)

    def model(h_, t):
        def step(x, _):
            x = numpyro.sample("x", numpyro_dist.Normal(0.8 * x, 1.0).mask(False))
            return x, x

        _, xs = scan(step, jnp.array(0.0), None, length=CHAIN_LENGTH)
        numpyro.factor("f", jnp.cos(xs).sum())

    return h, Program(guide, model, (0.4,))


def scanned_truth():
    total, loc, variance, slope = 0.0, 0.0, 0.0, 0.0
    for _ in range(CHAIN_LENGTH):
        loc, variance, slope = 0.8 * loc + 0.4, 0.64 * variance + 1.0, 0.8 * slope + 1.0
        total += -np.sin(loc) * np.exp(-variance / 2) * slope
    return total


@pytest.mark.parametrize("kind", ["LR", "RP", "cdf", "half", "half, general", "G-Rep", "LR, q", "RP, q", "half, q"])
@pytest.mark.parametrize("particles", [1, 4])
def test_the_wrapper_inside_scan(kind, particles):
    host, program = scanned(KINDS[kind])
    expected_under(program, host, scanned_truth(), particles=particles, n=40_000 // particles)


@pytest.mark.parametrize("kind", ["LR", "RP", "half, general", "LR, q"])
def test_the_wrapper_inside_scan_in_a_plate(kind):
    """Two chains x_t ~ N(x_{t-1} + m, 1), t = 1..3, from -1 and 1, with cost sum_t x_t^2: d/dm is the sum of 2 t (x_0 + t m)."""
    host = HOSTS["numpyro"]

    def chains(family, loc):
        def step(x, _):
            with numpyro.plate("n", 2):
                x = numpyro.sample("x", family(x + loc))
            return x, x

        return scan(step, jnp.array([-1.0, 1.0]), None, length=3)[1]

    def guide(h, t):
        chains(lambda loc: flowvi.numpyro.Estimated(numpyro_dist.Normal(loc, 1.0).mask(False), KINDS[kind]), t[0])

    def model(h, t):
        h.factor("f", (chains(lambda loc: numpyro_dist.Normal(loc, 1.0).mask(False), 0.0) ** 2).sum())

    exact = sum(2 * i * (start + i * 0.4) for i in (1, 2, 3) for start in (-1, 1))
    expected_under(Program(guide, model, (0.4,)), host, exact)


def test_a_plain_annotation_inside_scan_is_refused():
    for estimator in (LR(), HALF):
        host, program = scanned(None, annotate=estimator)
        with pytest.raises(
            ValueError, match=r"site 'x': handlers do not reach into scan and cond.*Estimated\(distribution, estimator\)"
        ):
            host.gradients(program, 2)
    host, program = scanned(LR())
    with pytest.raises(ValueError, match="site 'x': handlers do not reach into scan"):
        host.gradients(program, 2, estimators={"x": HALF})
    host, program = scanned(None, annotate=RP())
    expected_under(program, host, scanned_truth())


def test_discrete_sites_inside_scan_need_no_wrapper():
    """b_t ~ Bernoulli(sigmoid(m + b_{t-1})), cost sum_t b_t, against enumeration."""
    host = HOSTS["numpyro"]

    def body(logits):
        def step(b, _):
            b = numpyro.sample("b", numpyro_dist.Bernoulli(logits=logits(b)).mask(False))
            return b.astype(float), b

        return scan(step, jnp.array(0.0), None, length=CHAIN_LENGTH)[1]

    program = Program(
        lambda h, t: body(lambda b: t[0] + b), lambda h, t: numpyro.factor("f", 1.0 * body(lambda b: 0.0 * b).sum()), (0.4,)
    )

    def expectation(m):
        total, p = 0.0, 0.0
        for _ in range(CHAIN_LENGTH):
            p = p / (1 + np.exp(-m - 1)) + (1 - p) / (1 + np.exp(-m))
            total += p
        return total

    exact = (expectation(0.4 + 1e-6) - expectation(0.4 - 1e-6)) / 2e-6
    expected_under(program, host, exact)


@pytest.mark.parametrize("kind", ["LR", "half", "RP", "LR, q"])
def test_the_wrapper_inside_cond(kind):
    """c ~ Bernoulli(0.3) chooses the branch; the cost is sin(x)."""
    host = HOSTS["numpyro"]

    def branch(loc):
        return lambda _: numpyro.sample("x", flowvi.numpyro.Estimated(numpyro_dist.Normal(loc, 1.0).mask(False), KINDS[kind]))

    def guide(h, t):
        c = numpyro.sample("c", numpyro_dist.Bernoulli(0.3).mask(False))
        cond(c > 0, branch(t[0]), branch(-2 * t[0]), None)

    def model(h, t):
        numpyro.sample("c", numpyro_dist.Bernoulli(0.3).mask(False))
        x = numpyro.sample("x", numpyro_dist.Normal(0.0, 1.0).mask(False))
        numpyro.factor("f", jnp.sin(x))

    exact = np.exp(-0.5) * (0.3 * np.cos(0.4) - 0.7 * 2 * np.cos(0.8))
    expected_under(Program(guide, model, (0.4,)), host, exact)


def test_the_wrapper_in_one_branch_only():
    """JAX needs equal estimators in both branches; they may be different objects."""
    host = HOSTS["numpyro"]

    def branch(estimator):
        d = numpyro_dist.Normal(0.3, 1.0)
        return lambda _: numpyro.sample("x", flowvi.numpyro.Estimated(d, estimator) if estimator else d)

    def guide(*branches):
        return lambda h, t: cond(t[0] > 0, *map(branch, branches), None)

    model = lambda h, t: numpyro.sample("x", numpyro_dist.Normal(0.0, 1.0))
    host.gradients(Program(guide(LR(q=wide), LR(q=wide)), model, (0.4,)), 2)
    for other in (None, LR()):
        with pytest.raises(TypeError, match="same"):
            host.gradients(Program(guide(LR(q=wide), other), model, (0.4,)), 2)
