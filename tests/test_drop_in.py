"""TraceFlow_ELBO as the loss of the hosts' own SVI: where every site is reparameterized, it is Trace_ELBO to the last digit."""

import contextlib
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import pyro
import pytest
import torch
from hosts import HOSTS, Program
from programs import (
    DATA,
    ESTIMATORS,
    INIT,
    MIXED,
    PROGRAMS,
    assert_same,
    begin,
    bind,
    both,
    fit,
    library,
    m,
    mixed,
    normal,
    observe,
    plain,
    s,
    svi,
)
from pyro.nn import PyroModule, PyroParam

import flowvi.numpyro
import flowvi.pyro
from flowvi import LR, RP


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


def pairs():
    """Every program with one particle and with four, and every way to have four with one program."""
    for name, options in OPTIONS.items():
        for program in PROGRAMS:
            for option in options if program == "plain" else ("one", "four"):
                yield pytest.param(HOSTS[name], program, options[option], id=f"{name}-{program}-{option}".replace(" ", "_"))


@pytest.mark.parametrize(("h", "program", "options"), list(pairs()))
def test_the_same_as_trace_elbo(h, program, options):
    assert_same(*both(h, PROGRAMS[program], **options))


def test_subclass(host):
    assert issubclass(host.flow.TraceFlow_ELBO, library(host).infer.Trace_ELBO)
    assert isinstance(host.flow.TraceFlow_ELBO(), library(host).infer.elbo.ELBO)


# A program in which every kind of estimator serves a site.


def test_svi_takes_the_same_steps(host):
    theirs, ours = (
        fit(host, PROGRAMS["subsampled plate"], elbo(2), 5) for elbo in (library(host).infer.Trace_ELBO, host.flow.TraceFlow_ELBO)
    )
    assert_same(theirs, ours)


def test_a_mixed_program_trains_and_is_deterministic(host):
    losses, params = fit(host, MIXED, mixed(host, num_particles=4), 200)
    assert_same(losses[:5], fit(host, MIXED, mixed(host, num_particles=4), 5)[0], rtol=0)
    assert np.isfinite(losses).all()
    assert losses[-50:].mean() < losses[:20].mean() - 1
    assert params["logit"] > 0.5
    assert params["a"] > -0.8


def test_lr_alone_trains(host):
    losses, params = fit(host, MIXED, host.flow.TraceFlow_ELBO(num_particles=8, default=LR()), 100)
    assert losses[-20:].mean() < losses[:10].mean() - 1
    assert params["logit"] > 0.5


def test_a_site_that_is_said_not_to_be_enumerated(host):
    def gradients(infer):
        def guide(h, t):
            h.sample("k", h.dist.Bernoulli(logits=t[0]), infer=infer)

        def model(h, t):
            observe(h, h.sample("k", h.dist.Bernoulli(h.array(0.5))))

        return host.gradients(Program(guide, model, (0.3,)), 3)

    assert_same(gradients({}), gradients({"enumerate": None}), rtol=0)  # as Pyro's config_enumerate(default=None) writes it


# NumPyro

NUMPYRO = HOSTS["numpyro"]


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
    """The same steps whichever way they are taken."""
    plain, other = (
        fit(NUMPYRO, small(), flowvi.numpyro.TraceFlow_ELBO(2), 5, **dict.fromkeys(options, True))
        for options in ((), ("stable_update", "progress_bar", "forward_mode_differentiation"))
    )
    assert_same(plain, other)


def small():
    """A score and a field."""

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
    assert_same(*zip(*((loss, evaluation) for loss, evaluation, _ in outputs), strict=True))  # of the same random numbers
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
    """Both modes hold the same surrogate, in a program with every kind of estimator."""
    run = svi(NUMPYRO, MIXED, mixed(NUMPYRO, num_particles=3), optimizer=numpyro.optim.SGD(1.0))
    state = begin(run)
    reverse, forward = (
        jax.jit(lambda state, mode=mode: run.update(state, forward_mode_differentiation=mode))(state) for mode in (False, True)
    )
    assert_same((run.get_params(reverse[0]), reverse[1]), (run.get_params(forward[0]), forward[1]))


def test_numpyro_minimize():
    program = PROGRAMS["plain"]
    found = []
    for elbo in (numpyro.infer.Trace_ELBO(8), flowvi.numpyro.TraceFlow_ELBO(8)):
        run = svi(NUMPYRO, program, elbo, optimizer=numpyro.optim.Minimize())
        state, loss = jax.jit(run.update)(begin(run))
        found.append((run.get_params(state), loss))
    assert_same(*found, rtol=1e-6)


@pytest.mark.parametrize("where", ["model", "guide"])
def test_numpyro_mutable_state(where):
    """A mutable site advances once a step, also in the step that reads an annotation of the model."""

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
    with pytest.warns(UserWarning, match=r"mutable state is currently ignored when num_particles > 1\."):
        next(states(ours(2), None))


def test_numpyro_discrete_sites_are_no_news():
    for elbo, discrete in ((numpyro.infer.Trace_ELBO(), True), (mixed(NUMPYRO), False)):
        with pytest.warns(UserWarning, match="discrete latent") if discrete else contextlib.nullcontext():
            svi(NUMPYRO, MIXED, elbo).init(jax.random.key(0))


def by_a_parameter(here, where):
    """LR whose proposal reads a parameter that moves, if it is said ``here``."""
    c = numpyro.param("c", 1.5, constraint=numpyro.distributions.constraints.positive)
    q = lambda p: NUMPYRO.dist.Normal(p.loc, c * p.scale)
    return c, {"estimator": LR(q=q)} if here == where else {}


@pytest.mark.parametrize("start", ["compiled", "evaluated"])
def test_numpyro_an_annotation_of_the_model_belongs_to_its_run(start):
    """A proposal that reads a traced parameter: said in the model it acts as if it was said in the guide, trace after trace."""

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


# Pyro

PYRO = HOSTS["pyro"]


def sequential():
    def guide(h):
        w = h.sample("w", normal(h, m(h), s(h)))
        for i in pyro.plate("n", 6, subsample_size=4):
            h.sample(f"z_{i}", normal(h, w + h.param("l", h.array(INIT["l"]))[i], s(h)))

    def model(h):
        w = h.sample("w", normal(h, 0.0))
        for i in pyro.plate("n", 6, subsample_size=4):
            observe(h, h.sample(f"z_{i}", normal(h, w)), name=f"y_{i}", value=DATA[int(i)])

    return guide, model


@pytest.mark.parametrize("options", [{}, {"num_particles": 4}])
def test_pyro_sequential_plate(options):
    assert_same(*both(PYRO, sequential(), **options))


ALL_PYRO = pytest.mark.parametrize("options", list(OPTIONS["pyro"].values()), ids=list(OPTIONS["pyro"]))


def seeded(f, *args):
    pyro.set_rng_seed(5)
    return f(*args)


def gradients():
    """The gradients in the parameter store, which are then cleared."""
    found = {name: p.grad.clone() for name, p in pyro.get_param_store().named_parameters()}
    for _, p in pyro.get_param_store().named_parameters():
        p.grad = None
    return found


@ALL_PYRO
def test_pyro_faces_of_the_loss(options):
    """loss, evaluate_loss, differentiable_loss and loss_and_grads: one number and one derivative."""
    guide, model = bind(PYRO, MIXED)
    elbo = mixed(PYRO, **options)
    run = svi(PYRO, MIXED, elbo)
    elbo.loss(model, guide)  # the guess of the nesting draws once
    total = seeded(elbo.loss_and_grads, model, guide)
    expected = gradients()
    assert isinstance(total, float)
    surrogate = seeded(elbo.differentiable_loss, model, guide)
    surrogate.backward()
    assert_same((total, expected), (surrogate.detach(), gradients()))
    for value in (seeded(elbo.loss, model, guide), seeded(run.evaluate_loss)):
        assert isinstance(value, float)
        assert_same(total, value)
    with torch.no_grad():
        assert not seeded(elbo.differentiable_loss, model, guide).requires_grad
    assert_same(total, seeded(run.step))


@ALL_PYRO
def test_pyro_loss_is_that_of_trace_elbo(options):
    guide, model = bind(PYRO, PROGRAMS["subsampled plate"])
    assert_same(*(seeded(elbo(**options).loss, model, guide) for elbo in (pyro.infer.Trace_ELBO, flowvi.pyro.TraceFlow_ELBO)))


def test_pyro_svi_step():
    """Five steps of the hosts' optimizer end in the same parameters."""

    def run(elbo):
        pyro.clear_param_store()
        pyro.set_rng_seed(0)
        run = svi(PYRO, PROGRAMS["subsampled plate"], elbo)
        return [run.step() for _ in range(5)], {name: p.detach().clone() for name, p in pyro.get_param_store().items()}

    assert_same(run(pyro.infer.Trace_ELBO(2)), run(flowvi.pyro.TraceFlow_ELBO(2)))


class Guide(PyroModule):
    def __init__(self):
        super().__init__()
        self.m = torch.nn.Parameter(torch.tensor(0.3))
        self.s = PyroParam(torch.tensor(0.8), constraint=pyro.distributions.constraints.positive)
        self.logit = torch.nn.Parameter(torch.tensor(0.0))

    def forward(self, y):
        pyro.sample("w", normal(PYRO, self.m, self.s))
        pyro.sample("k", PYRO.dist.Bernoulli(logits=self.logit))


class Model(PyroModule):
    def __init__(self):
        super().__init__()
        self.b = torch.nn.Parameter(torch.tensor(1.0))

    def forward(self, y):
        w = pyro.sample("w", normal(PYRO, 0.0))
        k = pyro.sample("k", PYRO.dist.Bernoulli(PYRO.array(0.5)))
        with pyro.plate("n", len(y)):
            pyro.sample("y", normal(PYRO, w + 2 * self.b * k, 0.7), obs=y)


@pytest.mark.parametrize("vectorize", [False, True])
def test_pyro_module_with_a_torch_optimizer(vectorize):
    elbo = flowvi.pyro.TraceFlow_ELBO(4, vectorize_particles=vectorize)(Model(), Guide())
    assert isinstance(elbo, torch.nn.Module)
    y, losses = torch.tensor([2.3, 2.6]), []
    elbo(y)
    assert {name for name, _ in elbo.named_parameters()} == {"model.b", "guide.m", "guide.s_unconstrained", "guide.logit"}
    optimizer = torch.optim.Adam(elbo.parameters(), lr=0.05)
    for _ in range(100):
        optimizer.zero_grad()
        loss = elbo(y)
        loss.backward()
        assert all(p.grad is not None for p in elbo.parameters())
        optimizer.step()
        losses.append(float(loss.detach()))
    assert np.mean(losses[-20:]) < np.mean(losses[:10]) - 1
    assert elbo.guide.logit > 0.5


@pytest.mark.parametrize("options", [{}, {"num_particles": 2}, {"num_particles": 2, "vectorize_particles": True}])
def test_pyro_retain_graph(options):
    """A graph that two steps share: kept with retain_graph=True only, with score terms as without."""
    leaf = torch.tensor(0.2, requires_grad=True)
    shared = leaf.exp()

    def guide():
        pyro.sample("w", normal(PYRO, PYRO.array(0.0), shared))
        pyro.sample("k", PYRO.dist.Bernoulli(logits=shared))

    def model():
        w = pyro.sample("w", normal(PYRO, 0.0))
        observe(PYRO, w + pyro.sample("k", PYRO.dist.Bernoulli(PYRO.array(0.5))))

    kept = flowvi.pyro.TraceFlow_ELBO(retain_graph=True, **options)
    for _ in range(2):
        leaf.grad = None
        seeded(kept.loss_and_grads, model, guide)
        assert leaf.grad is not None
    again = seeded(kept.differentiable_loss, model, guide)
    expected = leaf.grad
    (gradient,) = torch.autograd.grad(again, leaf)
    assert_same(expected, gradient)
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        flowvi.pyro.TraceFlow_ELBO(**options).loss_and_grads(model, guide)


@pytest.mark.parametrize(("program", "depth"), [("plain", 0), ("subsampled plate", 1), ("nested plates", 2)])
def test_pyro_guesses_the_nesting(program, depth):
    guide, model = bind(PYRO, PROGRAMS[program])
    elbo = flowvi.pyro.TraceFlow_ELBO(3, vectorize_particles=True, default=LR() if program != "transformed" else RP())
    assert elbo.max_plate_nesting == float("inf")
    elbo.loss_and_grads(model, guide)
    assert elbo.max_plate_nesting == depth + 1


def test_pyro_without_warnings():
    """Nothing warns: torch does where a tensor that requires a gradient becomes a float."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for options in OPTIONS["pyro"].values():
            run = svi(PYRO, MIXED, mixed(PYRO, **options))
            run.step()
            run.evaluate_loss()
    assert not caught


def test_pyro_a_loss_without_parameters():
    def guide(h):
        h.sample("w", normal(h, 0.0))

    def model(h):
        observe(h, h.sample("w", normal(h, 0.0)))

    bound = bind(PYRO, (guide, model))[::-1]
    assert_same(*(seeded(elbo().loss_and_grads, *bound) for elbo in (pyro.infer.Trace_ELBO, flowvi.pyro.TraceFlow_ELBO)))


def test_pyro_an_annotation_of_the_model_belongs_to_its_run():
    """A proposal that reads a parameter of the model reads its present value."""
    seen = []

    def guide():
        pyro.sample("w", normal(PYRO, m(PYRO), s(PYRO)))

    def model():
        c = pyro.param("c", PYRO.array(1.5), constraint=pyro.distributions.constraints.positive)

        def q(p):
            seen.append(c.item())
            return PYRO.dist.Normal(p.loc, c * p.scale)

        observe(PYRO, pyro.sample("w", normal(PYRO, 0.0, c), infer={"estimator": LR(q=q)}))

    run = pyro.infer.SVI(model, guide, pyro.optim.Adam({"lr": 0.1}), flowvi.pyro.TraceFlow_ELBO())
    present = 1.5
    for _ in range(4):
        run.step()
        assert seen[-1] == present
        present = pyro.param("c").item()
    assert present != 1.5


@pytest.mark.parametrize("objective", ["ELBO", "ELBO, graph", "RenyiELBO"])
def test_pyro_a_factor_of_the_model_under_a_messenger_guide(objective):
    """A GuideMessenger runs the model itself, so that the factor is met while the guide draws; it is the model's all the same."""

    def model():
        w = pyro.sample("w", pyro.distributions.Normal(0.0, 1.0))
        pyro.factor("f", -((w - 0.7) ** 2))
        observe(PYRO, w)

    def loss_and_grads(elbo):
        pyro.clear_param_store()
        pyro.set_rng_seed(0)
        guide = pyro.infer.autoguide.AutoNormalMessenger(model)
        guide()
        loss = elbo.loss_and_grads(model, guide)
        return loss, {name: p.grad.numpy() for name, p in pyro.get_param_store().named_parameters()}

    theirs, ours = {
        "ELBO": (pyro.infer.Trace_ELBO(3), flowvi.pyro.TraceFlow_ELBO(3)),
        "ELBO, graph": (pyro.infer.Trace_ELBO(3), flowvi.pyro.TraceFlow_ELBO(3, dependencies="graph")),
        "RenyiELBO": (pyro.infer.RenyiELBO(num_particles=3), flowvi.pyro.TraceFlow_RenyiELBO(num_particles=3)),
    }[objective]
    assert_same(loss_and_grads(theirs), loss_and_grads(ours))


def test_pyro_a_program_without_sites():
    elbo = flowvi.pyro.TraceFlow_ELBO()
    for loss in (elbo.loss, elbo.differentiable_loss, elbo.loss_and_grads):
        assert loss(lambda: None, lambda: None) == 0
