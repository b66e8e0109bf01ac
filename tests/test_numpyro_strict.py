"""JAX's stricter modes: every estimator under ``jax_numpy_rank_promotion="raise"`` and under ``jax.checking_leaks()``."""

from contextlib import nullcontext

import jax
import jax.numpy as jnp
import numpyro
import numpyro.distributions as dist
import pytest
from estimators import ROWS, bernoulli
from hosts import HOSTS
from numpyro.infer import SVI

import flowvi.numpyro
from flowvi import LR, RP, AdaptiveFlow, DisARM, HalfSpace, LevelSet, MeasureValued
from flowvi.numpyro import TraceFlow_ELBO, TraceFlow_RenyiELBO

NUMPYRO = HOSTS["numpyro"]


def one_site(site, plates=(3, 2), event=()):
    """A model and a guide of one site x, in two plates or in one, with a cost for each element."""

    def draw(loc, scale):
        with numpyro.plate("rows", plates[0], dim=-2) if len(plates) == 2 else nullcontext(), numpyro.plate("n", plates[-1]):
            x = numpyro.sample("x", site(loc, scale))
            return numpyro.factor("cost", -jnp.sin(x).reshape((*plates, -1)).sum(-1))

    def guide():
        with numpyro.handlers.block(hide=["cost"]):
            draw(*(numpyro.param(name, jnp.full((*plates, *event), 0.5)) for name in ("loc", "scale")))

    return lambda: draw(jnp.zeros((*plates, *event)), jnp.ones((*plates, *event))), guide


def of_row(name):
    row = ROWS[name]
    if row.site is bernoulli or "Surrogate" in name:
        model, guide = one_site(lambda loc, scale: row.site(NUMPYRO, loc, scale))
    else:
        model, guide = one_site(lambda loc, scale: row.site(NUMPYRO, loc, scale).to_event(1), (2,), (3,))
    return TraceFlow_ELBO(row.particles[-1], estimators={"x": row.make()}), model, guide


def mvn(loc, scale):
    return dist.MultivariateNormal(loc, scale_tril=scale[..., None] * jnp.eye(loc.shape[-1])[None])


def of_vector(estimator, site=mvn):
    return TraceFlow_ELBO(2, estimators={"x": estimator}), *one_site(site, (2,), (3,))


def jointly(size, kind, particles="independent"):
    """A scalar, a vector and local scalars, with a control variate for the whole guide."""

    def draw(loc):
        a = numpyro.sample("a", dist.Normal(loc, 1.0))
        w = numpyro.sample("w", dist.Normal(jnp.full(size, loc), 1.0).to_event(1))
        v = numpyro.sample("v", dist.MultivariateNormal(jnp.full(size, loc), scale_tril=jnp.eye(size)))
        with numpyro.plate("n", 3):
            z = numpyro.sample("z", dist.Normal(jnp.full(3, loc), 1.0))
        return a * w.sum() + jnp.sin(v.sum()) * z.sum()

    def model():
        numpyro.factor("cost", draw(0.0))

    return TraceFlow_ELBO(2, control_variate=kind, particles=particles), model, lambda: draw(numpyro.param("loc", 0.1))


def features(p):
    return jnp.stack([p.loc, p.scale], -1)


def normal(loc, scale):
    return dist.Normal(loc, scale)


def categories(loc, scale):
    return dist.Categorical(logits=jnp.stack([loc, scale, loc - scale], -1))


def on_each_element(estimator):
    return TraceFlow_ELBO(2, estimators={"x": estimator}), *one_site(normal)


SPHERE = LevelSet(lambda x, p: (x**2).sum(-1) - 1.0, centre=jnp.zeros(3))
PROGRAMS = {
    **{name: lambda name=name: of_row(name) for name in ROWS},
    "a joint control variate": lambda: jointly(2, "cubic", "stratified"),
    "a joint control variate, quadratic": lambda: jointly(2, "quadratic", "antithetic"),
    "a joint control variate of low rank": lambda: jointly(60, "quadratic"),
    "jumps": lambda: on_each_element(RP(jumps=[0.2, 0.5])),
    "jumps across a sphere": lambda: of_vector(RP(jumps=SPHERE)),
    "jumps across a sphere, in an event": lambda: of_vector(LR(jumps=SPHERE), lambda loc, scale: normal(loc, scale).to_event(1)),
    "jumps across a plane": lambda: of_vector(LR(jumps=HalfSpace(jnp.ones(3), 1.0))),
    "a full-rank control variate": lambda: of_vector(RP(control_variate="cubic")),
    "a diagonal full-rank control variate": lambda: of_vector(RP(control_variate="diagonal")),
    "an amortised control variate": lambda: on_each_element(RP(control_variate="cubic", features=features)),
    "an amortised field": lambda: on_each_element(AdaptiveFlow(q="learned", features=features)),
    "a masked field": lambda: on_each_element(AdaptiveFlow(mask=lambda x, p: 1 / (1 + x**2))),
    "weak derivatives": lambda: on_each_element(MeasureValued(lanes="random")),
    "categories": lambda: (TraceFlow_ELBO(2, default=DisARM(num_values=3)), *one_site(categories)),
    "a scalar": lambda: (
        TraceFlow_ELBO(2, default=RP(control_variate="cubic")),
        lambda: numpyro.factor("cost", jnp.sin(numpyro.sample("x", dist.Normal(0.0, 1.0)))),
        lambda: numpyro.sample("x", dist.Normal(numpyro.param("loc", 0.1), 1.0)),
    ),
    "no vectorization": lambda: (TraceFlow_ELBO(2, False, default=RP(control_variate="cubic")), *one_site(normal)),
    "a Renyi bound": lambda: (TraceFlow_RenyiELBO(0.5, 3, default=LR()), *one_site(normal)),
    "dreg": lambda: (TraceFlow_RenyiELBO(0.5, 3, gradient="dreg"), *one_site(normal)),
}
FAST = {"AdaptiveFlow, q", "a joint control variate", "jumps across a sphere"}


def trace_a_step(name):
    """Trace the first step of SVI."""
    elbo, model, guide = PROGRAMS[name]()
    guide = flowvi.numpyro.adaptive(guide, elbo) if isinstance(elbo, TraceFlow_ELBO) else guide
    svi = SVI(model, guide, numpyro.optim.Adam(0.01), elbo)
    jax.jit(lambda key: svi.update(svi.init(key))).trace(jax.random.key(0))


@pytest.mark.parametrize("name", [pytest.param(name, marks=[] if name in FAST else pytest.mark.slow) for name in PROGRAMS])
def test_strict_rank_promotion(name):
    """flowvi never relies on NumPy's promotion of ranks."""
    with jax.numpy_rank_promotion("raise"):
        trace_a_step(name)


def promoting(p):
    return dist.Normal(p.loc, p.scale[0] * p.scale)


def test_rank_promotion_is_seen(monkeypatch):
    """The test above can fail: it also sees the ranks of a user's own function."""
    monkeypatch.setitem(PROGRAMS, "promoting", lambda: on_each_element(LR(q=promoting)))
    with jax.numpy_rank_promotion("raise"), pytest.raises(ValueError, match="rank_promotion"):
        trace_a_step("promoting")


@pytest.mark.slow
@pytest.mark.parametrize("name", PROGRAMS)
def test_no_tracer_leaks(name):
    with jax.checking_leaks():
        trace_a_step(name)
