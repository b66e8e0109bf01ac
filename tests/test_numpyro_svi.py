"""NumPyro's SVI with TraceFlow_ELBO: every way to take a step, and the state between steps."""

import contextlib

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import pytest
from hosts import HOSTS
from svi_programs import (
    ESTIMATORS,
    MIXED,
    PROGRAMS,
    assert_same,
    bind,
    both,
    fit,
    m,
    mixed,
    normal,
    observe,
    plain,
    s,
    svi,
)

import flowvi.numpyro
import flowvi.pyro
from flowvi import LR

NUMPYRO = HOSTS["numpyro"]


def begin(run):
    """The initial state, compiled because that is faster."""
    return jax.jit(run.init)(jax.random.key(0))


def multi_sample():
    def guide(h):
        h.sample("w", h.dist.Normal(m(h), s(h)).expand([3]))
        h.sample("v", h.dist.LogNormal(m(h), s(h)).expand([3]))

    return guide, plain()[1]


@pytest.mark.parametrize("options", [{}, {"num_particles": 4}, {"num_particles": 4, "vectorize_particles": False}])
def test_numpyro_multi_sample_guide(options):
    assert_same(*both(NUMPYRO, multi_sample(), multi_sample_guide=True, **options))


def test_numpyro_multi_sample_guide_in_svi():
    assert_same(
        *(
            fit(NUMPYRO, multi_sample(), elbo(multi_sample_guide=True), 3)
            for elbo in (numpyro.infer.Trace_ELBO, flowvi.numpyro.TraceFlow_ELBO)
        )
    )


@pytest.mark.parametrize("particles", [1, 4])
def test_numpyro_by_statement(particles):
    guide, model = bind(NUMPYRO, PROGRAMS["subsampled plate"])
    theirs, ours = (
        jax.jit(lambda elbo=elbo: elbo.loss(jax.random.key(0), {}, model, guide))()
        for elbo in (
            numpyro.infer.Trace_ELBO(particles, sum_sites=False),
            flowvi.numpyro.TraceFlow_ELBO(particles, sum_sites=False),
        )
    )
    assert theirs.keys() == ours.keys() == {"w", "z", "y"}
    assert_same(theirs, ours)
    total = jax.jit(lambda: flowvi.numpyro.TraceFlow_ELBO(particles).loss(jax.random.key(0), {}, model, guide))()
    assert_same(total, sum(ours.values()))


def test_numpyro_run_options():
    """The options of ``svi.run`` do not change the steps."""
    plain, other = (
        fit(NUMPYRO, small(), flowvi.numpyro.TraceFlow_ELBO(2), 5, **dict.fromkeys(options, True))
        for options in ((), ("stable_update", "progress_bar", "forward_mode_differentiation"))
    )
    assert_same(plain, other)


def small():
    """A program with an LR site and a Flow site."""

    def guide(h):
        h.sample("w", normal(h, m(h), s(h)), infer={"estimator": ESTIMATORS["z"]})
        h.sample("k", h.dist.Bernoulli(logits=h.param("logit", h.array(0.0))))

    def model(h):
        observe(h, h.sample("w", normal(h, 0.0)) + h.sample("k", h.dist.Bernoulli(h.array(0.5))))

    return guide, model


def test_numpyro_update_evaluate_scan_and_vmap():
    run = svi(NUMPYRO, small(), flowvi.numpyro.TraceFlow_ELBO(2))
    states = jax.jit(jax.vmap(run.init))(jax.random.split(jax.random.key(7), 3))
    state = first = jax.tree.map(lambda leaf: leaf[1], states)

    def step(state, _=None):
        evaluation = run.evaluate(state)
        state, loss = run.update(state)
        return state, (loss, evaluation, run.get_params(state))

    update, outputs = jax.jit(step), []
    for _ in range(3):
        state, output = update(state)
        outputs.append(output)
    assert_same(*zip(*((loss, evaluation) for loss, evaluation, _ in outputs), strict=True))  # with the same random numbers
    scanned, vmapped = jax.lax.scan(step, first, length=3)[1], jax.jit(jax.vmap(step))(states)[1]
    for i, output in enumerate(outputs):
        assert_same(output, jax.tree.map(lambda leaf, i=i: leaf[i], scanned))
    assert_same(outputs[0], jax.tree.map(lambda leaf: leaf[1], vmapped))
    assert_same(outputs[0][0], run.update(first)[1])  # without jit


def test_numpyro_stable_update_keeps_the_state():
    def model(h, y):
        w = h.sample("w", normal(h, 0.0))
        h.factor("cost", jnp.log(y) * w)

    run = numpyro.infer.SVI(
        lambda y: model(NUMPYRO, y),
        lambda y: numpyro.sample("w", normal(NUMPYRO, m(NUMPYRO), s(NUMPYRO))),
        numpyro.optim.Adam(0.1),
        flowvi.numpyro.TraceFlow_ELBO(default=LR()),
    )
    state = run.init(jax.random.key(0), 1.0)
    update = jax.jit(run.stable_update)
    kept, loss = update(state, -1.0)
    assert np.isnan(loss)
    assert_same(run.get_params(state), run.get_params(kept))
    moved, loss = update(state, 2.0)
    assert np.isfinite(loss)
    assert run.get_params(moved)["m"] != run.get_params(state)["m"]


def test_numpyro_forward_mode():
    """Forward and reverse mode agree in a program with every kind of estimator."""
    guide, model = bind(NUMPYRO, MIXED)
    run = numpyro.infer.SVI(model, guide, numpyro.optim.SGD(1.0), mixed(NUMPYRO, num_particles=3))
    state = begin(run)
    reverse, forward = (
        jax.jit(lambda state, mode=mode: run.update(state, forward_mode_differentiation=mode))(state) for mode in (False, True)
    )
    assert_same((run.get_params(reverse[0]), reverse[1]), (run.get_params(forward[0]), forward[1]))


def test_numpyro_minimize():
    guide, model = bind(NUMPYRO, PROGRAMS["plain"])
    found = []
    for elbo in (numpyro.infer.Trace_ELBO(8), flowvi.numpyro.TraceFlow_ELBO(8)):
        run = numpyro.infer.SVI(model, guide, numpyro.optim.Minimize(), elbo)
        state, loss = jax.jit(run.update)(begin(run))
        found.append((run.get_params(state), loss))
    assert_same(*found, rtol=1e-6)


@pytest.mark.parametrize("where", ["model", "guide"])
def test_numpyro_mutable_state(where):
    """A mutable site advances once per step, also in the step that reads an annotation of the model."""

    def count(here):
        if here == where:
            counter = numpyro.primitives.mutable("counter", {"value": jnp.array(0.0)})
            counter["value"] = counter["value"] + 1

    def guide():
        count("guide")
        numpyro.sample("w", normal(NUMPYRO, m(NUMPYRO), s(NUMPYRO)))

    def model(infer):
        count("model")
        observe(NUMPYRO, numpyro.sample("w", normal(NUMPYRO, 0.0), infer=infer))

    def states(elbo, infer):
        run = numpyro.infer.SVI(lambda: model(infer), guide, numpyro.optim.Adam(0.1), elbo)
        state = begin(run)
        for _ in range(3):
            state, loss = run.update(state)
            yield state.mutable_state, loss

    ours = flowvi.numpyro.TraceFlow_ELBO
    theirs = list(states(numpyro.infer.Trace_ELBO(), None))
    assert_same(theirs, list(states(ours(), None)))
    annotated = list(states(ours(), {"estimator": LR()}))
    assert_same([state for state, _ in theirs], [state for state, _ in annotated])
    for several in (ours(2), flowvi.numpyro.TraceFlow_RenyiELBO(0.0, 2, gradient="dreg")):
        assert_same([state for state, _ in theirs], [state for state, _ in states(several, None)])


@pytest.mark.parametrize("elbo", [flowvi.numpyro.TraceFlow_ELBO(3), flowvi.numpyro.TraceFlow_RenyiELBO(0.0, 3)])
def test_numpyro_the_state_is_that_of_the_first_particle(elbo):
    """With several particles, a running mean of the data and of a draw is that of the first particle."""
    draws = []

    def guide():
        x = numpyro.sample("x", NUMPYRO.dist.Normal(m(NUMPYRO), 1.0))
        mean = numpyro.primitives.mutable("mean", {"value": jnp.array(0.0)})
        mean["value"] = 0.9 * mean["value"] + 0.1 * x

    def model():
        numpyro.sample("x", normal(NUMPYRO, 0.0))

    def watched(fn, keys):
        result = jax.vmap(fn)(keys)
        draws.append(result[-1]["mean"]["value"])
        return result

    run = numpyro.infer.SVI(model, guide, numpyro.optim.Adam(0.1), elbo)
    assert np.isfinite(run.run(jax.random.key(0), 3, progress_bar=False).losses).all()
    elbo.vectorize_particles_fn = watched
    result = elbo.loss_with_mutable_state(jax.random.key(0), {"mean": {"value": jnp.array(2.0)}}, model, guide)
    (of_all,) = draws
    assert len(set(of_all.tolist())) == 3
    assert result["mutable_state"]["mean"]["value"] == of_all[0]


def test_numpyro_discrete_sites_are_no_news():
    for elbo, discrete in ((numpyro.infer.Trace_ELBO(), True), (mixed(NUMPYRO), False)):
        with pytest.warns(UserWarning, match="discrete latent") if discrete else contextlib.nullcontext():
            svi(NUMPYRO, MIXED, elbo).init(jax.random.key(0))


def by_a_parameter(here, where):
    """LR whose proposal reads a live parameter, if ``here``."""
    c = numpyro.param("c", 1.5, constraint=numpyro.distributions.constraints.positive)
    q = lambda p: NUMPYRO.dist.Normal(p.loc, c * p.scale)
    return c, {"estimator": LR(q=q)} if here == where else {}


@pytest.mark.parametrize("start", ["compiled", "evaluated"])
def test_numpyro_an_annotation_of_the_model_belongs_to_its_run(start):
    """A model's annotation whose proposal reads a traced parameter acts like one in the guide, in every trace."""

    def fit(where):
        def guide(y):
            infer = by_a_parameter("guide", where)[1]
            numpyro.sample("w", normal(NUMPYRO, m(NUMPYRO), s(NUMPYRO)), infer=infer)

        def model(y):
            c, infer = by_a_parameter("model", where)
            w = numpyro.sample("w", normal(NUMPYRO, 0.0, c), infer=infer)
            with numpyro.plate("n", len(y)):
                numpyro.sample("y", normal(NUMPYRO, w, 0.7), obs=y)

        run = numpyro.infer.SVI(model, guide, numpyro.optim.Adam(0.1), flowvi.numpyro.TraceFlow_ELBO())
        state, losses = run.init(jax.random.key(0), jnp.ones(1)), []
        if start == "evaluated":
            losses.append(run.evaluate(state, jnp.ones(1)))
        update = jax.jit(run.update)
        for n in (1, 1, 2):  # another shape is another trace
            state, loss = update(state, jnp.ones(n))
            losses.append(loss)
        return losses, run.evaluate(state, jnp.ones(1)), run.get_params(state)

    assert_same(fit("guide"), fit("model"))
