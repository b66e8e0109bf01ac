"""Sites of the model that the host sums out."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hosts import Program, z_scores
from jax.scipy.stats import norm
from marginal_programs import PROGRAMS, introduction, switch
from svi_programs import assert_same

import flowvi.tape
from flowvi import LR, RP, Enumerate, Flow, proposals


def by_both(host, program, nesting=1, seed=0, **options):
    """Loss and gradients under the host's own objective and under flowvi's, from the same random numbers."""
    model, guide = program(host)
    if host.name == "pyro":
        options["max_plate_nesting"] = nesting
    ours = {name: options.pop(name) for name in ("estimators", "default", "entropy", "dependencies") if name in options}
    elbos = host.library.infer.TraceEnum_ELBO(**options), host.flow.TraceFlow_ELBO(**options, **ours)
    return host.evaluate(elbos, model, guide, seed)


def test_introduction(host):
    theirs, ours = by_both(host, introduction, 0, num_particles=3)
    assert_same(theirs, ours)


@pytest.mark.parametrize("name", [pytest.param(n, marks=[] if n == "nested" else pytest.mark.slow) for n in PROGRAMS])
def test_as_the_host(host, name):
    program, nesting = PROGRAMS[name]
    assert_same(*by_both(host, program, nesting))


# ---- scores, weights and alternatives in the guide: a Normal, two Normals that depend on it, and a Bernoulli

THETA = (0.3, -0.4, 0.2, 0.5)
Y, V = np.array([2.7, 1.4]), np.array([1.6, 2.1])


def guide(h, t):
    w = h.sample("w", h.dist.Normal(t[0], h.math.exp(t[1])))
    with h.plate("n", 2):
        h.sample("x", h.dist.Normal(t[2] + 0.5 * w, h.array(0.7)))
    h.sample("k", h.dist.Bernoulli(logits=t[3]))


def model(h, t):
    """z is summed out for each element of the plate; c for all of them."""
    w = h.sample("w", h.dist.Normal(h.array(0.0), h.array(1.0)))
    c = switch(h, "c", h.array(0.4))
    k = h.sample("k", h.dist.Bernoulli(h.array(0.5)))
    with h.plate("n", 2):
        z = switch(h, "z", h.array(0.3))
        x = h.sample("x", h.dist.Normal(w + z, h.array(1.0)))
        h.sample("y", h.dist.Normal(x + 2 * z, h.array(0.8)), obs=h.array(Y))
        h.sample("v", h.dist.Normal(w + 1.5 * c - x + 2 * k, h.array(1.0)), obs=h.array(V))


PROGRAM = Program(guide, model, THETA, plates=1)


def exact_elbo(t):
    """By quadrature over w and both x, and a sum over k."""
    nodes, weights = np.polynomial.hermite_e.hermegauss(20)
    weights = weights / weights.sum()
    w = t[0] + jnp.exp(t[1]) * nodes[:, None, None, None]
    loc = t[2] + 0.5 * w
    of_x = jnp.broadcast_arrays(loc + 0.7 * nodes[None, :, None, None], loc + 0.7 * nodes[None, None, :, None])
    x = jnp.stack(of_x, -1)
    w, k = w[..., None], jnp.arange(2.0)[:, None]
    z = sum_out([0.7, 0.3], lambda z: norm.logpdf(x, w + z) + norm.logpdf(Y, x + 2 * z, 0.8)).sum(-1)
    c = sum_out([0.6, 0.4], lambda c: norm.logpdf(V, w + 1.5 * c - x + 2 * k).sum(-1))
    at_w, at_k = norm.logpdf(w[..., 0]) - norm.logpdf(w[..., 0], t[0], jnp.exp(t[1])), jax.nn.log_sigmoid(jnp.stack([-t[3], t[3]]))
    elbo = z + c + at_w - norm.logpdf(x, loc[..., None], 0.7).sum(-1) + jnp.log(0.5) - at_k
    return jnp.einsum("wxyk,w,x,y,k", elbo, weights, weights, weights, jnp.exp(at_k))


def sum_out(probs, log_density):
    return jax.nn.logsumexp(jnp.stack([jnp.log(p) + log_density(value) for value, p in enumerate(probs)]), 0)


EXACT = np.asarray(jax.jit(jax.grad(exact_elbo))(jnp.array(THETA)))
ESTIMATORS = {
    "scores": {"default": LR()},
    "mixed": {"estimators": {"w": Flow(loc=lambda x, p: 0.5), "x": LR(q=proposals.tempered(1.3)), "k": Enumerate()}},
    "weights": {"estimators": {"w": RP(q=proposals.tempered(1.2)), "x": Flow(loc=lambda x, p: 1.0), "k": LR()}},
}


def cases():
    for name in ESTIMATORS:
        for particles, vectorize in ((1, False), (4, True), (4, False)):
            slow = name != "mixed" or particles > 1
            yield pytest.param(name, particles, vectorize, marks=[pytest.mark.slow] if slow else [])


@pytest.mark.parametrize(("name", "particles", "vectorize"), list(cases()))
def test_the_mean_is_exact(host, name, particles, vectorize):
    samples = host.gradients(PROGRAM, 20_000, particles=particles, vectorize=vectorize, **ESTIMATORS[name])
    assert np.all(np.abs(z_scores(samples, EXACT)) < 5), (samples.mean(0), EXACT)


@pytest.mark.parametrize("site", ["w", "x", "k"])
def test_the_tests_can_fail(host, site, monkeypatch):
    """A marginal density that is not taken to depend on one of the sites is found out."""
    of_parts = flowvi.tape._of_parts

    def without(run, graph):
        graph = of_parts(run, graph)
        return graph._replace(model=graph.model | {name: graph.model[name] - {site} for name in ("z", "c")})

    monkeypatch.setattr(flowvi.tape, "_of_parts", without)
    samples = host.gradients(PROGRAM, 20_000, particles=4, estimators={site: LR()})
    assert np.any(np.abs(z_scores(samples, EXACT)) > 8), z_scores(samples, EXACT)
