"""NumPyro's ``scan`` and ``cond``: reverse and nested scans, a ``scope`` around them, branches of the model, and what is summed out."""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from numpyro.contrib.control_flow import cond, scan
from numpyro.handlers import scope
from numpyro.infer import Trace_ELBO

from flowvi import LR, RP
from flowvi.numpyro import Estimated, TraceFlow_ELBO, TraceFlow_RenyiELBO, gradient_report

SLOW = pytest.mark.slow
KEY = jax.random.key(3)
XS = jnp.array([1.0, -2.0, 0.5, 3.0])


def same(found, expected):
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-10, atol=1e-12)


def flipped_if(reverse, xs):
    """``xs`` in the order in which a reverse scan over them runs."""
    return xs if reverse else xs[::-1]


def chain(estimator, reverse):
    """x_t ~ N(m x_{t+1} + data_t, 0.8) in the guide, N(0.5 x_{t+1}, 1) in the model, from the last step to the first."""

    def run(draw):
        return scan(lambda x, of_step: (draw(x, of_step),) * 2, 0.2, flipped_if(reverse, XS), reverse=reverse)

    def guide():
        m = numpyro.param("m", 0.4)
        run(lambda x, of_step: numpyro.sample("x", Estimated(dist.Normal(m * x + of_step, 0.8), estimator)))

    def model():
        run(lambda x, of_step: numpyro.sample("x", dist.Normal(0.5 * x + 0.1 * of_step**2, 1.0)))

    return model, guide


OBJECTIVES = {
    "full": TraceFlow_ELBO(),
    "stl": TraceFlow_ELBO(2, entropy="stl"),
    "analytic": TraceFlow_ELBO(entropy="analytic"),
    "dreg": TraceFlow_RenyiELBO(num_particles=3, gradient="dreg"),
}


@pytest.mark.parametrize(("name", "estimator"), [*((name, RP()) for name in OBJECTIVES), ("full", LR()), ("stl", LR())])
def test_a_reverse_scan_is_a_scan_over_flipped_data(name, estimator):
    elbo = OBJECTIVES[name]

    def loss(m, reverse):
        return elbo.loss(KEY, {"m": m}, *chain(estimator, reverse))

    same(*(jax.value_and_grad(loss)(0.4, reverse) for reverse in (True, False)))


def drawn(name):
    """The distribution of z_t in the guide for all t, drawn as a vector, in a scan or in a reverse scan."""
    m = numpyro.param("m", 0.4)
    if name == "vector":
        return numpyro.sample("z", dist.Normal(m * XS, 1.0))
    return scan(lambda c, x: (c, numpyro.sample("z", dist.Normal(m * x, 1.0))), 0.0, XS, reverse=name == "reverse scan")[1]


@pytest.mark.parametrize("of_guide", ["vector", "scan", "reverse scan"])
@pytest.mark.parametrize("reverse", [False, True])
def test_a_step_of_the_model_gets_its_own_value(of_guide, reverse):
    """The model is a chain over the steps, first to last or last to first. In a reverse scan NumPyro's own loss is wrong."""

    def model():
        def step(z, x):
            z = numpyro.sample("z", dist.Normal(x**2 + 0.5 * z, 1.0))
            return z, None

        scan(step, 0.7, XS, reverse=reverse)

    def loss(m, elbo):
        return elbo.loss(KEY, {"m": m}, model, lambda: drawn(of_guide))

    def exact(m, of_density):
        values = numpyro.handlers.seed(lambda: numpyro.handlers.substitute(drawn, data={"m": m})(of_guide), jax.random.split(KEY)[1])()
        z = values[::-1] if reverse and of_guide == "reverse scan" else values  # in the order in which the steps run
        locs = (XS[::-1] if reverse else XS) ** 2 + 0.5 * jnp.concatenate([jnp.array([0.7]), z[:-1]])
        return dist.Normal(of_density * XS, 1.0).log_prob(values).sum() - dist.Normal(locs, 1.0).log_prob(z).sum()

    value, gradient = jax.value_and_grad(loss)(0.4, TraceFlow_ELBO())
    same((value, gradient), (exact(0.4, 0.4), sum(jax.grad(exact, (0, 1))(0.4, 0.4))))
    same(jax.grad(loss)(0.4, TraceFlow_ELBO(entropy="stl")), jax.grad(exact)(0.4, 0.4))
    assert (abs(loss(0.4, numpyro.infer.Trace_ELBO()) - value) > 0.1) == reverse
    if reverse and of_guide != "reverse scan":
        with pytest.raises(ValueError, match="site 'z': entropy='analytic' compares"):
            loss(0.4, TraceFlow_ELBO(entropy="analytic"))


def test_predictions_after_a_fit_with_a_reverse_scan():
    """NumPyro's tools give a model the values of an autoguide in the order in which the steps run, and so does flowvi."""

    def model(y=None):
        scan(
            lambda c, y: (c, numpyro.sample("y", dist.Normal(numpyro.sample("z", dist.Normal(0.0, 10.0)), 0.1), obs=y)), 0.0, y, 3, True
        )

    guide = numpyro.infer.autoguide.AutoNormal(model)
    y = jnp.array([5.0, 0.0, -5.0])
    svi = numpyro.infer.SVI(model, guide, numpyro.optim.Adam(0.1), TraceFlow_ELBO())
    params = svi.run(KEY, 300, y, progress_bar=False).params
    z = guide.sample_posterior(KEY, params, sample_shape=(20,))
    np.testing.assert_allclose(numpyro.infer.Predictive(model, z)(KEY)["y"].mean(0), y, atol=0.5)


@SLOW
def test_predictions_from_a_guide_with_a_reverse_scan():
    """NumPyro's ``Predictive`` gives the model the values of the guide in the order of xs; flipped, they reach their steps."""

    def draw(name, locs):
        return scan(lambda c, loc: (c, numpyro.sample(name, dist.Normal(loc, 0.01))), 0.0, locs, reverse=True)[1]

    def model():
        numpyro.deterministic("seen", draw("z", jnp.zeros(4)))

    predictive = numpyro.infer.Predictive(lambda: draw("z", XS), num_samples=3)
    z = predictive(KEY)
    np.testing.assert_allclose(z["z"].mean(0), XS, atol=0.1)
    right = numpyro.infer.Predictive(model, {"z": jnp.flip(z["z"], 1)})(KEY)["seen"]
    np.testing.assert_allclose(right, z["z"])
    wrong = numpyro.infer.Predictive(model, guide=lambda: draw("z", XS), num_samples=3)(KEY)["seen"]
    np.testing.assert_allclose(wrong.mean(0), XS[::-1], atol=0.1)


def hidden(history, reverse, ys, mask):
    """A hidden Markov chain with two states, which is summed out."""
    stay = jnp.array([[0.8, 0.2], [0.3, 0.7]])

    def model():
        locs = numpyro.sample("locs", dist.Normal(0.0, 1.0).expand([2]).to_event(1))

        def step(states, of_step):
            y, observed = of_step
            rows = stay[states[-1]] if history == 1 else 0.5 * (stay[states[0]] + stay[states[1]][..., ::-1])
            state = numpyro.sample("state", dist.Categorical(rows), infer={"enumerate": "parallel"})
            with numpyro.handlers.mask(mask=observed):
                numpyro.sample("y", dist.Normal(locs[state], 0.7), obs=y)
            return (*states[1:], state), None

        data = flipped_if(reverse, ys), flipped_if(reverse, mask)
        scan(step, (0,) * history, data, reverse=reverse, history=history)

    return model


@pytest.mark.parametrize(("history", "steps"), [(1, 4), *(pytest.param(*row, marks=SLOW) for row in ((1, 1), (2, 3), (2, 5)))])
def test_a_chain_is_summed_out_from_its_last_step(history, steps):
    def guide():
        numpyro.sample("locs", dist.Normal(numpyro.param("m", jnp.array([0.3, -0.4])), 0.5).to_event(1))

    ys, mask = jnp.array([0.5, 1.1, -0.2, 0.7, 2.0])[:steps], jnp.array([True, False, True, True, True])[:steps]

    def loss(m, reverse):
        return TraceFlow_ELBO().loss(KEY, {"m": m}, hidden(history, reverse, ys, mask), guide)

    same(*(jax.value_and_grad(loss)(jnp.array([0.3, -0.4]), reverse) for reverse in (True, False)))


def nested():
    """Guide and model with a site inside two scans."""

    def run(loc):
        def outer(x, _):
            return scan(lambda x, _: (numpyro.sample("z", dist.Normal(loc + 0.5 * x, 1.0)), None), x, None, length=2)[0], None

        scan(outer, 0.0, None, length=3)

    return lambda: run(0.0), lambda: run(numpyro.param("m", 0.3))


def test_nested_scans():
    """A value cannot be held fixed inside nested scans: sticking the landing refuses, and a report leaves the sites out."""
    with pytest.raises(ValueError, match="site 'z': expected a site inside one scan, found one inside nested scans"):
        TraceFlow_ELBO(entropy="stl").loss(KEY, {"m": 0.3}, *nested())
    (of_m,) = gradient_report(*nested(), num_samples=20).parameters
    assert of_m.sites == ()
    assert of_m.std > 0


@pytest.mark.parametrize("steps", [1, 3])
def test_a_site_of_the_guide_in_a_scan_beside_a_summed_out_site(steps):
    def chain_of(loc):
        return scan(lambda z, _: (numpyro.sample("z", dist.Normal(0.5 * z + loc, 1.0)),) * 2, 0.0, None, length=steps)[1]

    def model():
        def step(k, z):
            k = numpyro.sample("k", dist.Categorical(jnp.array([[0.8, 0.2], [0.3, 0.7]])[k]), infer={"enumerate": "parallel"})
            numpyro.sample("y", dist.Normal(k + z, 0.5), obs=0.3)
            return k, None

        scan(step, 0, chain_of(0.0))

    with pytest.raises(ValueError, match="site 'z': expected no site of the guide inside a scan"):
        TraceFlow_ELBO().loss(KEY, {"m": 0.2}, model, lambda: chain_of(numpyro.param("m", 0.2)))


LOGITS, MU = jnp.array([[0.2, -0.4, 0.1], [0.5, -0.3, 0.2]]), jnp.array([-1.0, 0.5, 2.0])


@pytest.mark.parametrize("reverse", [pytest.param(False, marks=SLOW), True])
@pytest.mark.parametrize("steps", [pytest.param(1, marks=SLOW), 3])
def test_a_site_of_the_guide_in_a_scan_without_history(reverse, steps):
    """With ``history=0`` a scan gets the guide's values while sites outside are summed out, also sites that it reads."""
    ys = jnp.array([0.3, -0.2, 0.9])[:steps]

    def model():
        a, b = (
            numpyro.sample(name, dist.Categorical(logits=logits), infer={"enumerate": "parallel"})
            for name, logits in zip("ab", LOGITS, strict=True)
        )

        def step(before, y):
            z = numpyro.sample("z", dist.Normal(MU[a] + 0.2 * before, 1.0))
            with numpyro.plate("n", 2):
                numpyro.sample("y", dist.Normal(z + MU[b], 1.0), obs=jnp.stack([y, y + 1]))
            return z, None

        scan(step, 0.0, ys, reverse=reverse, history=0)

    def guide():
        loc = numpyro.param("m", 0.3)
        return scan(lambda _, i: (numpyro.sample("z", dist.Normal(loc + 0.1 * i, 0.5)),) * 2, 0.0, jnp.arange(1.0 * steps))[1]

    def exact(m):
        z = numpyro.handlers.seed(numpyro.handlers.substitute(guide, data={"m": m}), jax.random.split(KEY)[1])()
        before, of_step = jnp.concatenate([jnp.zeros(1), z[:-1]]), ys[::-1] if reverse else ys
        of_a = dist.Normal(MU[:, None] + 0.2 * before, 1.0).log_prob(z).sum(-1) + jax.nn.log_softmax(LOGITS[0])
        of_b = sum(dist.Normal(z + MU[:, None], 1.0).log_prob(of_step + i).sum(-1) for i in (0, 1)) + jax.nn.log_softmax(LOGITS[1])
        of_guide = dist.Normal(m + 0.1 * jnp.arange(steps), 0.5).log_prob(z).sum()
        return of_guide - jax.nn.logsumexp(of_a) - jax.nn.logsumexp(of_b)

    same(jax.value_and_grad(lambda m: TraceFlow_ELBO().loss(KEY, {"m": m}, model, guide))(0.3), jax.value_and_grad(exact)(0.3))


def test_a_plate_inside_and_outside_of_a_scan_without_history():
    """Each element of the plate reads its own value of the site that is summed out."""
    ys = jnp.array([[0.3, -0.2], [0.9, 0.4], [0.1, 1.3]])

    def model():
        w = numpyro.sample("w", dist.Normal(0.0, 1.0))
        with numpyro.plate("n", 2):
            a = numpyro.sample("a", dist.Categorical(logits=LOGITS[0]), infer={"enumerate": "parallel"})

        def step(_, y):
            with numpyro.plate("n", 2):
                numpyro.sample("y", dist.Normal(w + MU[a], 1.0), obs=y)
            return _, None

        scan(step, 0.0, ys, history=0)

    def guide():
        return numpyro.sample("w", dist.Normal(numpyro.param("m", 0.3), 1.0))

    def exact(m):
        w = numpyro.handlers.seed(numpyro.handlers.substitute(guide, data={"m": m}), jax.random.split(KEY)[1])()
        of_a = dist.Normal(w + MU[:, None, None], 1.0).log_prob(ys).sum(1) + jax.nn.log_softmax(LOGITS[0])[:, None]
        return dist.Normal(m, 1.0).log_prob(w) - dist.Normal(0.0, 1.0).log_prob(w) - jax.nn.logsumexp(of_a, 0).sum()

    same(jax.value_and_grad(lambda m: TraceFlow_ELBO().loss(KEY, {"m": m}, model, guide))(0.3), jax.value_and_grad(exact)(0.3))


@pytest.mark.parametrize("history", [1, pytest.param(2, marks=SLOW)])
def test_a_chain_that_reads_a_site_outside(history):
    """The site has one value in all steps."""
    rows, ys = jnp.array([[0.8, 0.2], [0.3, 0.7]]), jnp.array([0.3, 0.9, 1.5, -0.2, 0.7])[: 2 * history + 1]

    def model():
        w = numpyro.sample("w", dist.Normal(0.0, 1.0))
        a = numpyro.sample("a", dist.Categorical(logits=LOGITS[0]), infer={"enumerate": "parallel"})

        def step(states, y):
            z = numpyro.sample("z", dist.Categorical(rows[states[-1]]), infer={"enumerate": "parallel"})
            c = numpyro.sample("c", dist.Categorical(rows[z]), infer={"enumerate": "parallel"})
            numpyro.sample("y", dist.Normal(w + z + c + MU[a], 1.0), obs=y)
            return (*states[1:], z), None

        scan(step, (0,) * history, ys, history=history)

    def guide():
        return numpyro.sample("w", dist.Normal(numpyro.param("m", 0.3), 1.0))

    def exact(m):
        w = numpyro.handlers.seed(numpyro.handlers.substitute(guide, data={"m": m}), jax.random.split(KEY)[1])()
        z, c, state = jnp.arange(2)[:, None], jnp.arange(2), jnp.array([0.0, -jnp.inf])
        for y in ys:  # for each value of a
            of_step = jax.nn.logsumexp(jnp.log(rows) + dist.Normal(w + z + c + MU[:, None, None], 1.0).log_prob(y), -1)
            state = jax.nn.logsumexp(state[..., None] + jnp.log(rows), -2) + of_step
        of_a = jax.nn.log_softmax(LOGITS[0]) + jax.nn.logsumexp(state, -1)
        return dist.Normal(m, 1.0).log_prob(w) - dist.Normal(0.0, 1.0).log_prob(w) - jax.nn.logsumexp(of_a)

    same(jax.value_and_grad(lambda m: TraceFlow_ELBO().loss(KEY, {"m": m}, model, guide))(0.3), jax.jit(jax.value_and_grad(exact))(0.3))


def test_a_chain_that_reads_a_site_in_a_plate_is_refused():
    """Each element of the plate would need the chain of its own."""

    def model():
        w = numpyro.sample("w", dist.Normal(0.0, 1.0))
        with numpyro.plate("n", 2):
            a = numpyro.sample("a", dist.Categorical(logits=LOGITS[0]), infer={"enumerate": "parallel"})

        def step(z, y):
            z = numpyro.sample("z", dist.Categorical(jnp.array([[0.8, 0.2], [0.3, 0.7]])[z]), infer={"enumerate": "parallel"})
            with numpyro.plate("n", 2):
                numpyro.sample("y", dist.Normal(w + z + MU[a], 1.0), obs=y)
            return z, None

        scan(step, 0, jnp.zeros((3, 2)))

    with pytest.raises(ValueError, match="site 'a': expected a site that a scan reads to be outside of the plate 'n'"):
        TraceFlow_ELBO().loss(KEY, {}, model, lambda: numpyro.sample("w", dist.Normal(numpyro.param("m", 0.3), 1.0)))


REFUSED = {0: "site 'z': expected scan.*history=1", 1: "site 'y': .*1.0 at 'z' and 2.0 at 'y'"}


@pytest.mark.parametrize("history", [pytest.param(0, marks=SLOW), 1])
def test_a_refusal_names_the_sites_of_the_program(history):
    """Inside an enumerated scan NumPyro gives the sites of the first steps names of its own."""

    def model():
        a = numpyro.sample("a", dist.Normal(0.0, 1.0))

        def step(z, y):
            z = numpyro.sample("z", dist.Categorical(jnp.array([[0.8, 0.2], [0.3, 0.7]])[z]), infer={"enumerate": "parallel"})
            with numpyro.handlers.scale(scale=2.0):
                numpyro.sample("y", dist.Normal(a + z, 1.0), obs=y)
            return z, None

        scan(step, 0, XS[:3], history=history)

    with pytest.raises(ValueError, match=REFUSED[history]):
        TraceFlow_ELBO().loss(KEY, {}, model, lambda: numpyro.sample("a", dist.Normal(numpyro.param("m", 0.2), 1.0)))


def test_two_chains_that_share_an_annotation():
    """Two sites in a step may share one ``infer``, in which NumPyro's enumeration keeps what it knows of a site."""
    rows = jnp.array([[0.8, 0.2], [0.3, 0.7]])

    def model(infer):
        locs = numpyro.sample("locs", dist.Normal(0.0, 1.0).expand([2]).to_event(1))

        def step(states, y):
            a, b = (numpyro.sample("ab"[i], dist.Categorical(rows[states[i]]), infer=infer()) for i in (0, 1))
            numpyro.sample("y", dist.Normal(locs[a] + 2 * locs[b], 0.5), obs=y)
            return (a, b), None

        scan(step, (0, 0), XS[:3])

    def guide():
        numpyro.sample("locs", dist.Normal(numpyro.param("m", jnp.array([0.3, -0.4])), 0.5).to_event(1))

    shared = {"enumerate": "parallel"}
    losses = [TraceFlow_ELBO().loss(KEY, {}, lambda of=of: model(of), guide) for of in (lambda: shared, lambda: dict(shared))]
    same(*losses)


def scoped(program, prefix):
    return program if prefix is None else scope(program, prefix=prefix)


@pytest.mark.parametrize("name", ["full", "stl", *(pytest.param(name, marks=SLOW) for name in ("analytic", "dreg"))])
def test_a_scope_around_a_scan_changes_only_names(name):
    """NumPyro's own objective does not replay the guide's values inside the scan, so its loss is another one."""

    def value_and_grad(elbo, prefix):
        model, guide = (scoped(program, prefix) for program in chain(RP(), reverse=False))
        m = "m" if prefix is None else "a/m"
        return jax.value_and_grad(lambda value: elbo.loss(KEY, {m: value}, model, guide))(0.4)

    same(value_and_grad(OBJECTIVES[name], "a"), value_and_grad(OBJECTIVES[name], None))
    host = Trace_ELBO()
    assert not np.allclose(value_and_grad(host, "a")[0], value_and_grad(host, None)[0])


def test_a_scope_around_a_chain_that_is_summed_out_is_refused():
    def model():
        def step(z, y):
            z = numpyro.sample("z", dist.Categorical(jnp.array([[0.7, 0.3], [0.2, 0.8]])[z]), infer={"enumerate": "parallel"})
            numpyro.sample("y", dist.Normal(1.0 * z, 0.5), obs=y)
            return z, None

        scan(step, 0, XS)

    with pytest.raises(ValueError, match=r"^site 'a/[zy]': expected no scope around a scan with a site that is summed out"):
        TraceFlow_ELBO().loss(KEY, {}, scope(model, prefix="a"), lambda: None)


def branches(in_branches):
    """A step x_t ~ N(x_{t-1} / 2, 1) of the model, drawn in a branch of a cond or without one."""

    def draw(x):
        return numpyro.sample("x", dist.Normal(0.5 * x, 1.0))

    def draw_in_branches(x):
        return cond(x < 100.0, draw, lambda x: numpyro.sample("x", dist.Normal(3.0 * x, 1.0)), x)

    def step(x, _):
        return ((draw_in_branches if in_branches else draw)(x),) * 2

    return step


@pytest.mark.parametrize("length", [None, 3])
@pytest.mark.parametrize(("name", "prefix"), [("full", None), ("full", "a"), pytest.param("stl", "a", marks=SLOW)])
def test_a_branch_of_the_model_gets_the_guides_value(length, name, prefix):
    """The branch of a cond has the density and the value that the draw has without the cond, also inside a scan.

    NumPyro's own objective draws another value in the branch, and the rest of the model reads that.
    """

    def guide():
        m = numpyro.param("m", 0.4)
        if length is None:
            numpyro.sample("x", dist.Normal(m, 0.7))
        else:
            scan(lambda x, _: (numpyro.sample("x", dist.Normal(m + 0.1 * x, 0.7)),) * 2, 0.2, None, length=length)

    def model(in_branches):
        step = branches(in_branches)
        x = step(0.2, None)[0] if length is None else scan(step, 0.2, None, length=length)[1]
        numpyro.factor("cost", jnp.cos(3.0 * x).sum())

    def value_and_grad(elbo, in_branches):
        programs = scoped(lambda: model(in_branches), prefix), scoped(guide, prefix)
        m = "m" if prefix is None else "a/m"
        return jax.value_and_grad(lambda value: elbo.loss(KEY, {m: value}, *programs))(0.4)

    same(value_and_grad(OBJECTIVES[name], True), value_and_grad(OBJECTIVES[name], False))
    assert not np.allclose(value_and_grad(Trace_ELBO(), True)[0], value_and_grad(TraceFlow_ELBO(), False)[0])
