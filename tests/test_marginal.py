"""Sites of the model that the host sums out."""

import sys

import funsor
import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import pyro
import pytest
from hosts import HOSTS, Program, always, each, slow_in_numpyro, z_scores
from jax.scipy.stats import norm
from marginal_programs import PROGRAMS, autoguide, introduction, label, mixture, switch
from svi_programs import assert_same

import flowvi.tape
from flowvi import LR, RP, Enumerate, Flow, proposals


@pytest.fixture(autouse=True)
def _funsor_with_jax():
    """Set funsor's backend for NumPyro's own objective, because an import of Pyro may have changed it."""
    funsor.set_backend("jax")


def flow(host, nesting, **options):
    """An objective with a given plate nesting."""
    return host.flow.TraceFlow_ELBO(**options, **({"max_plate_nesting": nesting} if host.name == "pyro" else {}))


def by_both(host, program, nesting=1, seed=0, **options):
    """Loss and gradients of the host's own objective and of flowvi's, with the same random numbers."""
    model, guide = program(host)
    if host.name == "pyro":
        options["max_plate_nesting"] = nesting
    ours = {name: options.pop(name) for name in ("estimators", "default", "entropy", "dependencies") if name in options}
    elbos = host.library.infer.TraceEnum_ELBO(**options), host.flow.TraceFlow_ELBO(**options, **ours)
    return host.evaluate(elbos, model, guide, seed)


def test_introduction(host):
    theirs, ours = by_both(host, introduction, 0, num_particles=3)
    assert_same(theirs, ours)


@each("name", ["nested"], slow_in_numpyro=always)
def test_two_discrete_levels(host, name):
    program, nesting = PROGRAMS[name]
    assert_same(*by_both(host, program, nesting))


@pytest.mark.slow
@pytest.mark.parametrize("name", PROGRAMS)
def test_as_the_host(host, name):
    program, nesting = PROGRAMS[name]
    assert_same(*by_both(host, program, nesting))


# ---- scores, weights and alternatives in the guide: a Normal, two Normals that depend on it, and a Bernoulli

THETA = (0.3, -0.4, 0.2, 0.5)
Y, V = np.array([2.7, 1.4]), np.array([1.6, 2.1])


def guide(h, t):
    w = h.sample("w", h.dist.Normal(t[0], h.math.exp(t[1])))
    h.sample("k", h.dist.Bernoulli(logits=t[3]))
    with h.plate("n", 2):
        h.sample("x", h.dist.Normal(t[2] + 0.5 * w, h.array(0.7)))


def model(h, t):
    """A model in which z is summed out for each element of a plate, and c for all of them."""
    w = h.sample("w", h.dist.Normal(h.array(0.0), h.array(1.0)))
    c = switch(h, "c", h.array(0.4))
    k = h.sample("k", h.dist.Bernoulli(h.array(0.5)))
    with h.plate("n", 2):
        z = switch(h, "z", h.array(0.3))
        x = h.sample("x", h.dist.Normal(w + z, h.array(1.0)))
        h.sample("y", h.dist.Normal(x + 2 * z, h.array(0.8)), obs=h.array(Y))
        h.sample("v", h.dist.Normal(w + 1.5 * c - x + 2 * k, h.array(1.0)), obs=h.array(V))


def written_out(h, t):
    """The same model with its marginal densities written as factors."""
    w = h.sample("w", h.dist.Normal(h.array(0.0), h.array(1.0)))
    k = h.sample("k", h.dist.Bernoulli(h.array(0.5)))

    def density(loc, scale, value):
        return h.dist.Normal(loc, h.array(scale)).log_prob(value)

    with h.plate("n", 2):
        x = h.sample("x", h.dist.Normal(h.array(0.0), h.array(1.0)).mask(False))
        of_z = [density(w + z, 1.0, x) + density(x + 2 * z, 0.8, h.array(Y)) + np.log(p) for z, p in enumerate((0.7, 0.3))]
        h.factor("z", h.math.logaddexp(*of_z))
    of_c = [h.over_plate(density(w + 1.5 * c - x + 2 * k, 1.0, h.array(V))) + np.log(p) for c, p in enumerate((0.6, 0.4))]
    h.factor("c", h.math.logaddexp(*of_c))


PROGRAM = Program(guide, model, THETA, plates=1)
WRITTEN_OUT = Program(guide, written_out, THETA, plates=1)


def exact_elbo(t):
    """The exact ELBO by quadrature over w and both x, and a sum over k."""
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


OPTIONS = ({}, {"entropy": "stl"}, {"dependencies": "graph"}, {"dependencies": "plates"})
IN_TURN = ((1, False), (3, True), (3, False))


def variants():
    """Estimators, options, and ways to run particles. NumPyro gets only one, because each takes seconds to compile."""
    for name in ("pathwise", *ESTIMATORS):
        for options in OPTIONS:
            for particles in IN_TURN:
                for host in HOSTS.values():
                    one = (name, options, particles) == ("scores", {}, (1, False))
                    marks = [] if host.name == "pyro" or one else [pytest.mark.slow]
                    yield pytest.param(host, name, options, *particles, marks=marks, id=f"{host.name}-{name}-{options}-{particles}")


@pytest.mark.parametrize(("host", "name", "options", "particles", "vectorize"), list(variants()))
def test_as_written_out(host, name, options, particles, vectorize):
    """Each estimate equals that of the program with the marginal densities as factors."""
    settings = {**options, **ESTIMATORS.get(name, {}), "particles": particles, "vectorize": vectorize}
    assert_same(*(host.gradients(program, 2, **settings) for program in (WRITTEN_OUT, PROGRAM)))


@each("estimator", [LR(), Enumerate()], slow_in_numpyro=always)
def test_a_subsample_of_locals(host, estimator):
    """Guide and model see the same subsample of a plate with local sites."""
    y = host.array([1.0, -0.5, 2.5, 3.5, 0.1])

    def plate():
        return host.library.plate("n", 5, subsample_size=3, dim=-1)

    def guide():
        logits = host.param("l", host.array([0.3, -0.2, 0.4, 0.1, 0.5]))
        with plate() as index:
            host.sample("b", host.dist.Bernoulli(logits=logits[index]))

    def model(written_out):
        with plate() as index:
            b = host.sample("b", host.dist.Bernoulli(host.array(0.4)))

            def density(z):
                return host.dist.Normal(b + 2 * z, host.array(0.8))

            if written_out:
                of_z = [density(z).log_prob(y[index]) + np.log(p) for z, p in enumerate((0.7, 0.3))]
                host.factor("y", host.math.logaddexp(*of_z))
            else:
                z = switch(host, "z", host.array(0.3))
                host.sample("y", density(z), obs=y[index])

    options = {"default": estimator, "num_particles": 2}
    assert_same(*(host.evaluate([flow(host, 1, **options)], lambda w=w: model(w), guide, seed=1) for w in (True, False)))


@pytest.mark.slow
@pytest.mark.parametrize("name", ESTIMATORS)
@pytest.mark.parametrize(("particles", "vectorize"), [(1, False), (4, True), (4, False)])
def test_the_mean_is_exact(host, name, particles, vectorize):
    samples = host.gradients(PROGRAM, 20_000, particles=particles, vectorize=vectorize, **ESTIMATORS[name])
    assert np.all(np.abs(z_scores(samples, EXACT)) < 5), (samples.mean(0), EXACT)


@each("site", ["w", "x", "k"], slow_in_numpyro=always)
def test_the_tests_can_fail(host, site, monkeypatch):
    """The test detects a marginal density that wrongly does not depend on one of the sites."""
    of_parts = flowvi.tape._of_parts

    def without(graph, model):
        graph = of_parts(graph, model)
        return graph._replace(model=graph.model | {name: graph.model[name] - {site} for name in ("z", "c")})

    monkeypatch.setattr(flowvi.tape, "_of_parts", without)
    monkeypatch.setattr(flowvi.tape, "_by_order", flowvi.tape._by_order.__wrapped__)  # without its cache
    samples = host.gradients(PROGRAM, 20_000, particles=4, estimators={site: LR()})
    assert np.any(np.abs(z_scores(samples, EXACT)) > 8), z_scores(samples, EXACT)


# ---- other options of objectives


@each("entropy", ["stl", "analytic"], slow_in_numpyro=always)
def test_entropies(host, entropy):
    """There is no closed form at x, because its density in the model depends on a marginalised site."""
    options = {"entropy": entropy, "estimators": {"k": Enumerate(), "w": LR()}, "default": RP()}
    samples = host.gradients(PROGRAM, 20_000, **options)
    assert np.all(np.abs(z_scores(samples, EXACT)) < 5), (samples.mean(0), EXACT)


@each("estimator", [LR(), RP()], slow_in_numpyro=lambda estimator: estimator == RP())
def test_bounds(host, estimator):
    """The bound is that of the program with the marginal density as a factor."""

    def written_out(h, t):
        x = h.sample("x", h.dist.Normal(h.array(0.0), h.array(1.0)))
        densities = [
            h.math.log(h.array(p)) + h.dist.Normal(x + 3 * z, h.array(1.0)).log_prob(h.array(2.0)) for z, p in ((0, 0.7), (1, 0.3))
        ]
        h.factor("y", h.math.logaddexp(*densities))

    def guide(h, t):
        h.sample("x", h.dist.Normal(t[0], h.array(1.0)))

    theirs, ours = (
        host.bound_gradients(Program(guide, model, (0.5,)), 3, alpha=0.5, particles=4, default=estimator)
        for model in (written_out, lambda h, t: introduction(h)[0]())
    )
    assert_same(theirs, ours)


def test_pyro_bounds_in_sequential_plates():
    """A sequential plate has a bound for each iteration, like a plate for each element."""
    host = HOSTS["pyro"]

    def model(sequential):
        def local(suffix, y):
            x = host.sample(f"x{suffix}", host.dist.Normal(host.array(0.0), host.array(1.0)))
            z = switch(host, f"z{suffix}", host.array(0.3))
            host.sample(f"y{suffix}", host.dist.Normal(x + 3 * z, host.array(1.0)), obs=y)

        in_plates(sequential, local)

    def guide(sequential):
        def local(suffix, _):
            host.sample(f"x{suffix}", host.dist.Normal(host.array(0.5), host.array(1.0)))

        in_plates(sequential, local)

    def in_plates(sequential, local):
        y = host.array([2.0, -1.0])
        if sequential:
            for i in host.library.plate("n", 2):
                local(i, y[i])
        else:
            with host.plate("n", 2):
                local("", y)

    losses = (
        host.loss(host.flow.TraceFlow_RenyiELBO(0.5, 3, max_plate_nesting=1), lambda s=s: model(s), lambda s=s: guide(s))
        for s in (True, False)
    )
    assert_same(*losses)


def test_described(host):
    model, guide = introduction(host)
    for objective in (host.flow.TraceFlow_ELBO, host.flow.TraceFlow_RenyiELBO):
        description = objective().describe(model, guide)
        assert description.marginalised == ("z",)
        assert [site.name for site in description] == ["x"]
        assert str(description).endswith("summed out by the host: z")
    report = host.flow.gradient_report(model, guide, num_samples=50)
    assert report.marginalised == ("z",)
    assert abs(report.parameters[0].mean - 0.2114) < 5 * report.parameters[0].std / np.sqrt(50)
    assert str(report).endswith("summed out by the host: z")


@each("mark", ["parallel", "sequential"], slow_in_numpyro=lambda mark: mark == "sequential")
def test_an_estimator_in_the_guide_by_its_mark(host, mark):
    """``infer={"enumerate": ...}`` in the guide means the exact sum, also together with a marginalised site of the model."""

    def gradients(infer, **options):
        def guide(h, t):
            w = h.sample("w", h.dist.Normal(t[0], h.math.exp(t[1])))
            k = h.sample("k", h.dist.Bernoulli(logits=t[2]), infer=infer)
            h.sample("x", h.dist.Normal(w + k, h.array(0.7)))

        def model(h, t):
            w = h.sample("w", h.dist.Normal(h.array(0.0), h.array(1.0)))
            k = switch(h, "k", h.array(0.5))
            z = switch(h, "z", 0.2 + 0.5 * k)
            x = h.sample("x", h.dist.Normal(w + z, h.array(1.0)))
            h.sample("y", h.dist.Normal(x + k, h.array(1.0)), obs=h.array(2.0))

        return host.gradients(Program(guide, model, (0.3, -0.4, 0.5)), 3, **options)

    assert_same(gradients({}, estimators={"k": Enumerate()}), gradients({"enumerate": mark}))
    if host.name == "pyro":
        assert_same(gradients({}, estimators={"k": LR()}), gradients({"enumerate": mark}, estimators={"k": LR()}))


@pytest.mark.filterwarnings("ignore:Found vars in model but not guide")  # NumPyro warns before flowvi refuses the program
@pytest.mark.parametrize(
    ("fn", "infer", "message"),
    [
        (lambda h: h.dist.Bernoulli(h.array(0.3)), {"enumerate": "parallel", "num_samples": 4}, "found Bernoulli.* with infer=.*num_s"),
        (lambda h: h.dist.Bernoulli(h.array(0.3)), {"enumerate": "sequential"}, "found Bernoulli.* with infer={'enumerate': 'seq"),
        (lambda h: h.dist.Poisson(h.array(0.3)), {"enumerate": "parallel"}, "found Poisson, which has none"),
        (lambda h: h.dist.Bernoulli(h.array([0.3, 0.3])).to_event(1), {"enumerate": "parallel"}, "found Independent"),
    ],
)
def test_refused_at_a_site(host, fn, infer, message):
    def model():
        x = host.sample("x", host.dist.Normal(host.array(0.0), host.array(1.0)))
        z = host.sample("z", fn(host), infer=infer)
        host.sample("y", host.dist.Normal(x + z.sum(), host.array(1.0)), obs=host.array(2.0))

    with pytest.raises(ValueError, match=f"site 'z': to be summed out, .*{message}"):
        host.flow.TraceFlow_ELBO().describe(model, introduction(host)[1])


def test_one_scale_for_what_is_summed_out_together(host):
    def model(scale, other):
        x = host.sample("x", host.dist.Normal(host.array(0.0), host.array(1.0)))
        with host.scale(scale):
            z = switch(host, "z", host.array(0.3))
        with host.scale(other):
            host.sample("y", host.dist.Normal(x + 3 * z, host.array(1.0)), obs=host.array(2.0))

    guide = introduction(host)[1]
    elbo = host.flow.TraceFlow_ELBO()
    assert np.isfinite(float(host.loss(elbo, lambda: model(2.0, 2.0), guide)))
    with pytest.raises(ValueError, match="site 'y': expected one scale .*, found 2.0 at 'z' and 3.0 at 'y'"):
        host.loss(elbo, lambda: model(2.0, 3.0), guide)
    with pytest.raises(ValueError, match="site 'z': expected one scale .*, found a scale of shape .2,."):
        host.loss(elbo, lambda: model(host.array([2.0, 3.0]), 3.0), guide)


def test_a_scale_that_depends_on_a_marginalised_site(host):
    def model():
        x = host.sample("x", host.dist.Normal(host.array(0.0), host.array(1.0)))
        z = switch(host, "z", host.array(0.3))
        with host.scale(1.0 + z):
            host.sample("y", host.dist.Normal(x, host.array(1.0)), obs=host.array(2.0))

    with pytest.raises(ValueError, match="site 'y': expected one scale .*, found a scale of shape .2,."):
        host.loss(flow(host, 0), model, introduction(host)[1])


def test_masks_and_scales(host):
    """A mask acts inside the sum and not on the probabilities of a marginalised site; a scale acts outside the sum."""
    seen = [True, False]

    def model(way):
        x = host.sample("x", host.dist.Normal(host.array(0.0), host.array(1.0)))
        with host.plate("n", 2), host.scale(1.5):
            mask = host.integers(seen)
            if way == "handler":
                with host.handlers.mask(mask=mask):
                    z = switch(host, "z", host.array(0.3))
                    host.sample("y", host.dist.Normal(x + 3 * z, host.array(1.0)), obs=host.array([2.0, 9.0]))
            else:
                z = host.sample("z", host.dist.Bernoulli(host.array([0.3, 0.3])).mask(mask), infer={"enumerate": "parallel"})
                host.sample("y", host.dist.Normal(x + 3 * z, host.array(1.0)).mask(mask), obs=host.array([2.0, 9.0]))

    def written_out():
        x = host.sample("x", host.dist.Normal(host.array(0.0), host.array(1.0)))
        densities = [
            host.math.log(host.array(p)) + host.dist.Normal(x + m, host.array(1.0)).log_prob(host.array(2.0))
            for p, m in ((0.7, 0), (0.3, 3))
        ]
        host.factor("y", 1.5 * host.math.logaddexp(*densities))

    guide = introduction(host)[1]
    expected = host.evaluate([flow(host, 1)], written_out, guide)
    for way in ("handler", "distribution"):
        assert_same(expected, host.evaluate([flow(host, 1)], lambda way=way: model(way), guide))


@slow_in_numpyro
def test_a_mask_that_is_summed_out(host):
    """A mask may depend on a marginalised site, while the densities do not."""
    points = host.array([2.0, -1.0])

    def model(masked):
        x = host.sample("x", host.dist.Normal(host.array(0.0), host.array(1.0)))
        with host.plate("n", 2, dim=-2):
            z = label(host, "z", host.array([0.7, 0.3]))
            if masked:
                with host.plate("components", 2, dim=-1) as component, host.handlers.mask(mask=z == component):
                    host.sample("y", host.dist.Normal(x + host.array([0.0, 3.0]), host.array(1.0)), obs=points[:, None])
            else:
                host.sample("y", host.dist.Normal(x + 3 * z, host.array(1.0)), obs=points[:, None])

    guide = introduction(host)[1]
    assert_same(*(host.evaluate([flow(host, 2)], lambda masked=masked: model(masked), guide) for masked in (False, True)))


def test_a_site_observed_in_some_batches(host):
    """The same objective sums a site out in batches where it is not observed, like the labels of a semi-supervised model."""

    def model(label):
        x = host.sample("x", host.dist.Normal(host.array(0.0), host.array(1.0)))
        z = host.sample("z", host.dist.Bernoulli(host.array(0.3)), obs=label, infer={"enumerate": "parallel"})
        host.sample("y", host.dist.Normal(x + 3 * z, host.array(1.0)), obs=host.array(2.0))

    guide = introduction(host)[1]
    elbo = flow(host, 0)
    labels = None, host.array(0.0), None, host.array(1.0)
    first, zero, again, one = (float(host.loss(elbo, lambda label=label: model(label), guide)) for label in labels)
    theirs = host.library.infer.TraceEnum_ELBO(**({"max_plate_nesting": 0} if host.name == "pyro" else {}))
    assert_same([float(host.loss(theirs, lambda: model(None), guide))] * 2, [first, again])
    assert first < min(zero, one)


def test_a_latent_site_that_nothing_accounts_for(host):
    def model():
        x = host.sample("x", host.dist.Normal(host.array(0.0), host.array(1.0)))
        z = host.sample("z", host.dist.Bernoulli(host.array(0.3)))
        host.sample("y", host.dist.Normal(x + z, host.array(1.0)), obs=host.array(2.0))

    with pytest.warns(UserWarning, match="Found vars in model but not guide: {'z'}"):
        host.loss(host.flow.TraceFlow_ELBO(), model, introduction(host)[1])


def test_a_missing_funsor(monkeypatch):
    """Without funsor the error names the marginalised site."""
    host = HOSTS["numpyro"]
    monkeypatch.setitem(sys.modules, "funsor", None)
    with pytest.raises(ImportError, match="site 'z': expected funsor.*pip install 'flowvi.enum.'"):
        flow(host, 0).describe(*introduction(host))


def test_the_backend_of_funsor():
    """funsor has one backend at a time, and flowvi does not change Pyro's."""
    host = HOSTS["numpyro"]
    expected = host.loss(flow(host, 0), *introduction(host))
    funsor.set_backend("torch")
    assert_same(expected, host.loss(flow(host, 0), *introduction(host)))
    assert funsor.get_backend() == "torch"


def test_numpyro_takes_the_values_of_the_support():
    """An enumerated site has the values of its support, not their indices as under NumPyro's own objective (``test_host_bugs.py``)."""
    host = HOSTS["numpyro"]

    def model():
        x = host.sample("x", host.dist.Normal(0.0, 1.0))
        z = host.sample("z", host.dist.DiscreteUniform(2, 3), infer={"enumerate": "parallel"})
        host.sample("y", host.dist.Normal(x + 3 * z, 1.0), obs=2.0)

    def written_out():
        x = host.sample("x", host.dist.Normal(0.0, 1.0))
        host.factor("y", jnp.logaddexp(norm.logpdf(2.0, x + 6.0), norm.logpdf(2.0, x + 9.0)) + jnp.log(0.5))

    guide = introduction(host)[1]
    assert_same(*(host.evaluate([flow(host, 0)], program, guide) for program in (written_out, model)))


@slow_in_numpyro
def test_values_of_marginalised_sites(host):
    """The hosts' ``infer_discrete`` and ``Predictive`` work with a guide that flowvi has fitted."""
    model = mixture(host)
    guide = autoguide(host, "AutoNormal", model, {"weight": [0.4, 0.6], "loc": [-1.5, 1.0], "scale": 1.2})
    svi = host.svi(model, guide, flow(host, 1), 0.05)
    losses, params = host.fit(svi, 60)
    assert losses[-10:].mean() < losses[:5].mean() - 3
    if host.name == "pyro":
        replayed = pyro.poutine.replay(model, pyro.poutine.trace(guide).get_trace())
        inferred = pyro.infer.infer_discrete(replayed, temperature=0, first_available_dim=-2)
        z = pyro.poutine.trace(inferred).get_trace().nodes["z"]["value"][None]
        assert pyro.infer.Predictive(model, guide=guide, num_samples=7)()["z"].shape == (7, 5)
    else:
        predictive = numpyro.infer.Predictive(model, guide=guide, params=params, num_samples=1, infer_discrete=True)
        z = predictive(jax.random.key(1))["z"]
        assert numpyro.infer.Predictive(model, guide=guide, params=params, num_samples=7)(jax.random.key(1))["z"].shape == (7, 5)
    assert host.numpy(z).tolist() == [[0, 0, 1, 1, 1]]


def test_recommended_beside_the_hosts_own_enumeration():
    """In Pyro, ``recommend`` compares with TraceEnum_ELBO, because other objectives would draw the marginalised sites."""
    h = HOSTS["pyro"]

    def model():
        b = h.sample("b", h.dist.Bernoulli(h.array(0.3)))
        z = switch(h, "z", h.array(0.3))
        h.sample("y", h.dist.Normal(b + z, h.array(1.0)), obs=h.array(1.0))

    def guide():
        h.sample("b", h.dist.Bernoulli(logits=h.param("m", h.array(0.0))))

    pyro.clear_param_store()
    assert "the host's own objective" in str(h.flow.recommend(model, guide, seconds=0.5, progress_bar=False))


def test_a_chain_in_scan_under_jit():
    """A site that is summed out in each step of a scan gives the forward recursion, in a compiled step."""
    y, stay = np.array([0.3, 1.8, 2.2, -0.4]), 0.8

    def model():
        x = numpyro.sample("x", numpyro.distributions.Normal(0.0, 1.0))

        def step(state, y):
            up = jnp.where(state == 1, stay, 1 - stay)
            state = numpyro.sample("state", numpyro.distributions.Bernoulli(up), infer={"enumerate": "parallel"})
            numpyro.sample("y", numpyro.distributions.Normal(x + 2.0 * state, 1.0), obs=y)
            return state, None

        numpyro.contrib.control_flow.scan(step, 0, y)

    def guide():
        numpyro.sample("x", numpyro.distributions.Delta(numpyro.param("x0", 0.1)))

    def exact(x):
        log_density, forward = norm.logpdf(x), jnp.array([1.0, 0.0])
        for of_step in y:
            forward = jnp.array([[stay, 1 - stay], [1 - stay, stay]]) @ forward * norm.pdf(of_step, x + 2.0 * jnp.arange(2))
        return -log_density - jnp.log(forward.sum())

    def loss(x):
        return flow(HOSTS["numpyro"], 0).loss(jax.random.key(0), {"x0": x}, model, guide)

    for found, expected in zip(*(jax.jit(jax.value_and_grad(f))(0.1) for f in (loss, exact)), strict=True):
        np.testing.assert_allclose(found, expected, rtol=1e-10)


def test_a_statement_outside_the_plate_of_a_marginalised_site(host):
    """A statement outside the plate of a marginalised site is refused; the hosts would give all elements of the plate one value."""

    def model():
        x = host.sample("x", host.dist.Normal(host.array(0.0), host.array(1.0)))
        with host.plate("n", 3):
            z = switch(host, "z", host.array(0.3))
        host.sample("y", host.dist.Normal(x + z[..., :1], host.array(1.0)), obs=host.array(2.0))

    with pytest.raises(ValueError, match="site 'y': expected it inside the plate 'n', because it depends on 'z', which is summed out"):
        host.loss(flow(host, 1), model, introduction(host)[1])
