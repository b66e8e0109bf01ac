"""Ten small programs of common kinds, whose model has discrete sites that the host sums out."""

import numpy as np
import numpyro.contrib.control_flow
import numpyro.contrib.funsor
import numpyro.infer.autoguide
import numpyro.infer.initialization
import pyro
import pyro.infer.autoguide
import pyro.ops.indexing

RNG = np.random.default_rng(0)
POINTS = np.array([-1.9, -2.3, 1.7, 2.2, 1.4])


def markov(h, steps, history=1):
    """The steps of a chain, in the form that the host's enumeration needs."""
    return pyro.markov(steps, history) if h.name == "pyro" else numpyro.contrib.funsor.markov(steps, history)


def at(h, array, *index):
    """Entries of an array at indices that broadcast, like Pyro's Vindex."""
    index = tuple(h.index(i) for i in index)
    return pyro.ops.indexing.Vindex(array)[index] if h.name == "pyro" else array[index]


def label(h, name, probs):
    return h.sample(name, h.dist.Categorical(probs), infer={"enumerate": "parallel"})


def switch(h, name, probs):
    return h.sample(name, h.dist.Bernoulli(probs), infer={"enumerate": "parallel"})


def positive(h, name, value):
    return h.param(name, h.array(value), constraint=h.dist.constraints.positive)


def lognormal(h, name, loc):
    """A site of the guide with its own location and scale."""
    return h.sample(name, h.dist.LogNormal(h.param(f"{name}_loc", h.array(loc)), positive(h, f"{name}_scale", np.full_like(loc, 0.3))))


def normal(h, name, loc):
    return h.sample(name, h.dist.Normal(h.param(f"{name}_loc", h.array(loc)), positive(h, f"{name}_scale", np.full_like(loc, 0.4))))


def dirichlet(h, name, concentration):
    return h.sample(name, h.dist.Dirichlet(positive(h, f"{name}_concentration", concentration)))


def hidden(h, model, names):
    """The model without some sites, for an autoguide."""
    return h.handlers.block(model, hide=names)


def autoguide(h, name, model, values, **options):
    """An autoguide that starts at these values, so that the draws of both hosts are likely under the model."""
    values = {key: h.array(value) for key, value in values.items()}
    if h.name == "pyro":
        init = pyro.infer.autoguide.initialization.init_to_value(values=values)
        guide = getattr(pyro.infer.autoguide, name)(hidden(h, model, ["z"]), init_loc_fn=init, **options)
        guide()  # the first call draws more than later ones
        return guide
    init = numpyro.infer.initialization.init_to_value(values=values)
    return getattr(numpyro.infer.autoguide, name)(hidden(h, model, ["z"]), init_loc_fn=init, **options)


def introduction(h):
    """A continuous site and a marginalised one."""

    def model():
        x = h.sample("x", h.dist.Normal(h.array(0.0), h.array(1.0)))
        z = switch(h, "z", h.array(0.3))
        h.sample("y", h.dist.Normal(x + 3 * z, h.array(1.0)), obs=h.array(2.0))

    def guide():
        h.sample("x", h.dist.Normal(h.param("m", h.array(0.5)), h.array(1.0)))

    return model, guide


def mixture(h):
    """Two Gaussians, five points."""
    points = h.array(POINTS)

    def model():
        weight = h.sample("weight", h.dist.Dirichlet(h.array([2.0, 3.0])))
        with h.plate("components", 2):
            loc = h.sample("loc", h.dist.Normal(h.array(0.0), h.array(3.0)))
        scale = h.sample("scale", h.dist.LogNormal(h.array(0.0), h.array(0.5)))
        with h.plate("data", 5):
            z = label(h, "z", weight)
            h.sample("y", h.dist.Normal(at(h, loc, z), scale), obs=points)

    return model


START = {"weight": [0.8, 0.2], "loc": [-1.0, 0.3], "scale": 1.2}


def mixture_by_auto_delta(h):
    return mixture(h), autoguide(h, "AutoDelta", mixture(h), START)


def mixture_by_auto_normal(h):
    return mixture(h), autoguide(h, "AutoNormal", mixture(h), START, init_scale=0.5)


def topics(h):
    """Latent Dirichlet allocation: 2 topics, 3 documents of 4 words, a vocabulary of 5."""
    words = h.integers(RNG_WORDS)

    def model():
        with h.plate("topics", 2):
            of_topic = h.sample("of_topic", h.dist.Dirichlet(h.array(np.ones(5))))
        with h.plate("documents", 3):
            proportions = h.sample("proportions", h.dist.Dirichlet(h.array(np.ones(2))))
            with h.plate("words", 4, dim=-2):
                z = label(h, "z", proportions)
                h.sample("word", h.dist.Categorical(at(h, of_topic, z)), obs=words)

    def guide():
        with h.plate("topics", 2):
            dirichlet(h, "of_topic", RNG_TOPICS)
        with h.plate("documents", 3):
            dirichlet(h, "proportions", RNG_DOCUMENTS)

    return model, guide


RNG_WORDS = RNG.integers(0, 5, (4, 3))
RNG_TOPICS = RNG.uniform(1, 3, (2, 5))
RNG_DOCUMENTS = RNG.uniform(1, 3, (3, 2))


def hidden_markov(h):
    """Two states, five steps, written as a loop."""

    def model():
        with h.plate("states", 2):
            transition = h.sample("transition", h.dist.Dirichlet(h.array([3.0, 2.0])))
            loc = h.sample("loc", h.dist.Normal(h.array(0.0), h.array(3.0)))
        z = h.integers(0)
        for t in markov(h, range(5)):
            z = label(h, f"z_{t}", at(h, transition, z))
            h.sample(f"y_{t}", h.dist.Normal(at(h, loc, z), h.array(1.0)), obs=h.array(POINTS[t]))

    return model, chain_guide(h)


def chain_guide(h):
    def guide():
        with h.plate("states", 2):
            dirichlet(h, "transition", np.array([[4.0, 2.0], [1.5, 3.0]]))
            normal(h, "loc", np.array([-1.5, 1.5]))

    return guide


def regressions(h):
    """Two lines, six points, with a subsample of four."""
    x, y = h.array([-2.0, -1.0, 0.0, 1.0, 2.0, 3.0]), h.array([-1.8, 1.1, 0.2, 0.7, -2.2, 3.3])

    def model():
        weight = h.sample("weight", h.dist.Beta(h.array(2.0), h.array(2.0)))
        with h.plate("lines", 2):
            slope = h.sample("slope", h.dist.Normal(h.array(0.0), h.array(2.0)))
        with h.library.plate("data", 6, subsample_size=4, dim=-1) as index:
            z = switch(h, "z", weight)
            h.sample("y", h.dist.Normal(at(h, slope, z) * x[index], h.array(0.5)), obs=y[index])

    def guide():
        h.sample("weight", h.dist.Beta(positive(h, "a", 2.5), positive(h, "b", 1.5)))
        with h.plate("lines", 2):
            normal(h, "slope", np.array([-1.0, 0.8]))

    return model, guide


def counts(h):
    """Zero-inflated counts; half of them are missing."""
    observed = h.array([0.0, 3.0, 0.0, 5.0, 0.0, 2.0])
    seen = h.integers([True, True, False, True, True, False])

    def model():
        rate = h.sample("rate", h.dist.LogNormal(h.array(0.0), h.array(1.0)))
        gate = h.sample("gate", h.dist.Beta(h.array(1.0), h.array(2.0)))
        with h.plate("data", 6), h.handlers.mask(mask=seen):
            z = switch(h, "z", gate)
            h.sample("y", h.dist.Poisson(z * rate + 0.01), obs=observed)

    def guide():
        lognormal(h, "rate", np.array(0.7))
        h.sample("gate", h.dist.Beta(positive(h, "a", 2.0), positive(h, "b", 2.0)))

    return model, guide


def autoencoder(h):
    """Codes from a guide that reads the data, and labels that are summed out."""
    x = h.array(RNG_X)
    weights = h.array(RNG_W)

    def model():
        decoder = h.param("decoder", weights)
        with h.plate("data", 4):
            z = label(h, "z", h.array([0.2, 0.5, 0.3]))
            code = h.sample("code", h.dist.Normal(h.array(np.zeros(2)), h.array(1.0)).to_event(1))
            mean = h.math.tanh((at(h, decoder, z) * code[..., None, :]).sum(-1))
            h.sample("x", h.dist.Normal(mean, h.array(0.7)).to_event(1), obs=x)

    def guide():
        encoder = h.param("encoder", h.array(RNG_E))
        with h.plate("data", 4):
            h.sample("code", h.dist.Normal(x @ encoder, positive(h, "spread", 0.6)).to_event(1))

    return model, guide


RNG_X, RNG_W, RNG_E = RNG.normal(size=(4, 3)), RNG.normal(size=(3, 3, 2)), RNG.normal(size=(3, 2))


def captures(h):
    """Capture and recapture: whether each of three animals is alive at each of four occasions, as a chain."""
    caught = RNG_CAUGHT

    def model():
        survival = h.sample("survival", h.dist.Beta(h.array(3.0), h.array(2.0)))
        capture = h.sample("capture", h.dist.Beta(h.array(2.0), h.array(2.0)))
        with h.plate("animals", 3, dim=-1):
            z = h.array(np.ones(3))
            for t in markov(h, range(4)):
                z = switch(h, f"z_{t}", survival * z)
                h.sample(f"y_{t}", h.dist.Bernoulli(capture * z), obs=h.array(caught[t]))

    def guide():
        h.sample("survival", h.dist.Beta(positive(h, "a", 4.0), positive(h, "b", 2.0)))
        h.sample("capture", h.dist.Beta(positive(h, "c", 2.0), positive(h, "d", 3.0)))

    return model, guide


RNG_CAUGHT = np.array([[1.0, 1.0, 0.0], [1.0, 0.0, 1.0], [0.0, 1.0, 0.0], [0.0, 1.0, 0.0]])


def annotators(h):
    """Dawid and Skene: two classes, four items, three annotators with a confusion matrix each."""
    annotations = h.integers(RNG_LABELS)

    def model():
        prevalence = h.sample("prevalence", h.dist.Dirichlet(h.array([1.0, 1.0])))
        with h.plate("annotators", 3, dim=-2), h.plate("classes", 2, dim=-1):
            confusion = h.sample("confusion", h.dist.Dirichlet(h.array([2.0, 1.0])))
        with h.plate("items", 4, dim=-1):
            z = label(h, "z", prevalence)
            with h.plate("positions", 3, dim=-2):
                rows = h.integers(np.arange(3)[:, None])
                h.sample("y", h.dist.Categorical(at(h, confusion, rows, z)), obs=annotations)

    def guide():
        dirichlet(h, "prevalence", np.array([4.0, 1.0]))
        with h.plate("annotators", 3, dim=-2), h.plate("classes", 2, dim=-1):
            dirichlet(h, "confusion", RNG_CONFUSION)

    return model, guide


RNG_LABELS = RNG.integers(0, 2, (3, 4))
RNG_CONFUSION = RNG.uniform(1, 3, (3, 2, 2))


def nested(h):
    """A discrete site for each group and one for each of its members, a global one, and an isolated one."""
    values = h.array(RNG_Y)

    def model():
        loc = h.sample("loc", h.dist.Normal(h.array(0.0), h.array(1.0)))
        spread = h.sample("spread", h.dist.LogNormal(h.array(0.0), h.array(0.5)))
        era = switch(h, "era", h.array(0.4))
        h.sample("dated", h.dist.Normal(loc + era, h.array(1.0)), obs=h.array(0.8))
        with h.plate("groups", 3, dim=-2):
            kind = label(h, "kind", h.array([0.2, 0.3, 0.5]))
            with h.plate("members", 2, dim=-1):
                state = switch(h, "state", 0.2 + 0.25 * kind)
                h.sample("y", h.dist.Normal(loc + 2 * state - kind, spread), obs=values)

    def guide():
        normal(h, "loc", np.array(0.3))
        lognormal(h, "spread", np.array(-0.2))

    return model, guide


RNG_Y = RNG.normal(size=(3, 2))

PROGRAMS = {
    "mixture by AutoDelta": (mixture_by_auto_delta, 1),
    "mixture by AutoNormal": (mixture_by_auto_normal, 1),
    "topics": (topics, 2),
    "hidden Markov model": (hidden_markov, 1),
    "regressions": (regressions, 1),
    "counts": (counts, 1),
    "autoencoder": (autoencoder, 1),
    "captures": (captures, 1),
    "annotators": (annotators, 2),
    "nested": (nested, 2),
}
