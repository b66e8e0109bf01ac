"""Programs that run under the hosts' own objectives and under flowvi's, and functions that run and compare them."""

import jax
import numpy as np

from flowvi import LR, RP, Flow, ImplicitRP

INIT = {"m": 0.3, "s": 0.8, "l": [0.1, -0.4, 0.5, 0.2, -0.2, 0.6]}
DATA = [0.4, -1.1, 0.7, 1.9, 0.2, -0.6]


def m(h):
    return h.param("m", h.array(INIT["m"]))


def s(h):
    return h.param("s", h.array(INIT["s"]), constraint=h.dist.constraints.positive)


def normal(h, loc, scale=1.0):
    return h.dist.Normal(h.array(loc) if isinstance(loc, float) else loc, h.array(scale) if isinstance(scale, float) else scale)


def observe(h, loc, name="y", value=1.2):
    h.sample(name, normal(h, loc, 0.7), obs=h.array(value))


def plain():
    def guide(h):
        w = h.sample("w", normal(h, m(h), s(h)))
        h.sample("v", h.dist.LogNormal(0.5 * w, s(h)))

    def model(h):
        w = h.sample("w", normal(h, 0.0))
        v = h.sample("v", h.dist.Gamma(h.array(2.0), h.array(1.0)))
        observe(h, w + v * h.param("b", h.array(0.9)))

    return guide, model


def transformed():
    def guide(h):
        base = normal(h, m(h), s(h))
        w = h.sample("w", h.dist.TransformedDistribution(base, [h.dist.transforms.ExpTransform()]))
        h.sample("v", h.dist.Dirichlet(1.0 + w[..., None] * h.array([1.0, 2.0, 3.0])))

    def model(h):
        w = h.sample("w", h.dist.Exponential(h.array(1.0)))
        v = h.sample("v", h.dist.Dirichlet(h.array([1.0, 1.0, 1.0])))
        observe(h, w * v[..., 0])

    return guide, model


def local(h, w, index, loc=None):
    """Six local sites; the guide gives their locations."""
    return h.sample("z", normal(h, w if loc is None else loc[..., index], 1.0 if loc is None else s(h)))


def subsampled():
    def plate(h):
        return h.library.plate("n", 6, subsample_size=4, dim=-1)

    def guide(h):
        w = h.sample("w", normal(h, m(h), s(h)))
        with plate(h) as index:
            local(h, w, index, h.param("l", h.array(INIT["l"])))

    def model(h):
        w = h.sample("w", normal(h, 0.0))
        with plate(h) as index:
            observe(h, local(h, w, index), value=h.array(DATA)[index])

    return guide, model


def nested():
    def site(h, loc, scale):
        return h.sample("x", h.dist.Normal(loc, scale).expand((3, 2, 4)).to_event(1))

    def guide(h):
        with h.plate("columns", 2), h.plate("rows", 3, dim=-2):
            site(h, m(h), s(h))

    def model(h):
        with h.plate("columns", 2), h.plate("rows", 3, dim=-2):
            observe(h, site(h, h.array(0.0), h.array(1.0)).sum(-1))

    return guide, model


def handled(effect):
    """A scale or a mask around a global site and around some of six local ones."""

    def guide(h):
        with effect(h, True):
            w = h.sample("w", normal(h, m(h), s(h)))
        with h.plate("n", 6), effect(h, h.array(DATA) > 0):
            local(h, w, slice(None), h.param("l", h.array(INIT["l"])))

    def model(h):
        with effect(h, True):
            w = h.sample("w", normal(h, 0.0))
        with h.plate("n", 6):
            with effect(h, h.array(DATA) > 0):
                z = local(h, w, slice(None))
            observe(h, z, value=DATA)

    return guide, model


def scale(h, where):
    return h.handlers.scale(scale=2.5)


def mask(h, where):
    return h.handlers.mask(mask=where)


def mask_out(h, where):
    return h.handlers.mask(mask=False if where is True else where)


PROGRAMS = {
    "plain": plain(),
    "transformed": transformed(),
    "subsampled plate": subsampled(),
    "nested plates": nested(),
    "scale": handled(scale),
    "mask": handled(mask),
    "mask out": handled(mask_out),
}


def bind(h, program):
    """Guide and model as callables without arguments."""
    return tuple(lambda part=part: part(h) for part in program)


def both(h, program, **options):
    """Loss and gradient of the host's Trace_ELBO and of flowvi's, from the same random numbers."""
    guide, model = bind(h, program)
    return h.evaluate((h.library.infer.Trace_ELBO(**options), h.flow.TraceFlow_ELBO(**options)), model, guide, seed=3)


def assert_same(theirs, ours, rtol=1e-10):
    theirs, ours = ([np.asarray(leaf) for leaf in jax.tree.leaves(tree)] for tree in (theirs, ours))
    assert len(theirs) == len(ours) > 0
    for a, b in zip(theirs, ours, strict=True):
        assert np.isfinite(a).all()
        np.testing.assert_allclose(b, a, rtol=rtol, atol=1e-14)


# A program with a site for every kind of estimator.


def mixed_guide(h):
    h.sample("w", normal(h, m(h), s(h)))
    h.sample("k", h.dist.Bernoulli(logits=h.param("logit", h.array(0.0))))
    h.sample("z", normal(h, h.param("a", h.array(-1.0)), h.param("b", h.array(0.9), constraint=h.dist.constraints.positive)))
    h.sample("g", h.dist.Exponential(h.param("r", h.array(1.5), constraint=h.dist.constraints.positive)))


def mixed_model(h):
    w = h.sample("w", normal(h, 0.0))
    k = h.sample("k", h.dist.Bernoulli(h.array(0.5)))
    z = h.sample("z", normal(h, 0.5))
    g = h.sample("g", h.dist.Exponential(h.array(1.0)))
    with h.plate("n", 2):
        observe(h, w + 2 * k + z * g, value=[2.4, 2.7])


MIXED = (mixed_guide, mixed_model)
ESTIMATORS = {
    "w": RP(),
    "k": LR(),
    "z": Flow(loc=lambda x, p: 0.5, scale=lambda x, p: 0.5 * (x - p.loc) / p.scale),
    "g": ImplicitRP(),
}


def mixed(h, **options):
    return h.flow.TraceFlow_ELBO(estimators=ESTIMATORS, **options)


def svi(h, program, elbo, **options):
    guide, model = bind(h, program)
    return h.svi(model, guide, elbo, **options)


def fit(h, program, elbo, steps, **options):
    """Losses and final parameters of a run of the host's SVI."""
    return h.fit(svi(h, program, elbo), steps, **options)


def by_chunks(f, keys):
    return jax.lax.map(f, keys, batch_size=2)


OPTIONS = {
    "numpyro": {
        "one": {},
        "four": {"num_particles": 4},
        "four looped": {"num_particles": 4, "vectorize_particles": False},
        "four by a function": {"num_particles": 4, "vectorize_particles": by_chunks},
    },
    "pyro": {
        "one": {},
        "four looped": {"num_particles": 4},
        "four": {"num_particles": 4, "vectorize_particles": True},
        "four, nesting said": {"num_particles": 4, "vectorize_particles": True, "max_plate_nesting": 2},
    },
}
