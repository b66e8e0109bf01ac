"""Estimators that learn in a plate whose elements are other data at every step, and may differ in number."""

import jax
import numpy as np
import pyro
import pytest
from hosts import HOSTS, always, each

import flowvi.numpyro
from flowvi import RP, AdaptiveFlow

NUMPYRO, PYRO = HOSTS["numpyro"], HOSTS["pyro"]
SIZES = (20, 10)
LEARNED = {RP(control_variate="diagonal"): ("z.control_variate", (1, 2)), AdaptiveFlow(bumps=0): ("z.velocity", (2, 1))}


def programs(h, rows=None, subsample=None):
    """A latent for each datum, whose location is a function of the datum or a row of a parameter."""

    def guide(data):
        slope = h.param("slope", h.array(0.5))
        loc = slope * data if rows is None else h.param("loc", h.array(np.zeros(rows)), event_dim=0)
        with h.plate("data", len(data), subsample_size=subsample) as i:
            h.sample("z", h.dist.Normal(loc if subsample is None else loc[i], 0.7))

    def model(data):
        with h.plate("data", len(data), subsample_size=subsample) as i:
            z = h.sample("z", h.dist.Normal(0.0, 1.0))
            h.sample("y", h.dist.Normal(z, 0.5), obs=data if subsample is None else data[i])

    return model, guide


class Steps:
    """SVI in both hosts, step by step."""

    def __init__(self, host, model, guide, estimator=None, **options):
        self.host = host
        pyro.clear_param_store()
        elbo = host.flow.TraceFlow_ELBO(2, **(options or {"estimators": {"z": estimator}}))
        self.svi = host.svi(model, flowvi.numpyro.adaptive(guide, elbo) if host is NUMPYRO else guide, elbo)
        self.state = None

    def step(self, size):
        data = self.host.array(np.linspace(-1, 1, np.prod(size)).reshape(size))
        if self.host is PYRO:
            return self.svi.step(data)
        self.state = self.svi.init(jax.random.key(0), data) if self.state is None else self.state
        self.state, loss = self.svi.update(self.state, data)
        return float(loss)

    def try_step(self, size):
        """Try a step; in NumPyro only its shapes."""
        if self.host is PYRO:
            return self.step(size)
        data = self.host.array(np.zeros(size))
        self.state = jax.eval_shape(self.svi.init, jax.random.key(0), data) if self.state is None else self.state
        jax.eval_shape(self.svi.update, self.state, data)

    def learned(self, name):
        return pyro.param(name).shape if self.host is PYRO else self.svi.get_params(self.state)[name].shape


@each("estimator", list(LEARNED), slow_in_numpyro=lambda estimator: isinstance(estimator, AdaptiveFlow))
def test_batches_of_changing_size(host, estimator):
    steps = Steps(host, *programs(host), estimator)
    assert np.isfinite([steps.step(size) for size in SIZES]).all()
    name, shape = LEARNED[estimator]
    assert steps.learned(name) == shape


@each("subsample", [None, 5], slow_in_numpyro=lambda subsample: subsample is None)
def test_elements_that_are_the_same_data_have_their_own(host, subsample):
    steps = Steps(host, *programs(host, 20, subsample), RP(control_variate="diagonal"))
    steps.step(20)
    assert steps.learned("z.control_variate") == (20, 1, 2)


def test_a_row_for_each_element_of_another_plate_is_refused(host):
    def guide(data):
        rows = host.param("rows", host.array(np.zeros(20)))  # so that the plate has rows of its own
        with host.plate("data", len(data)):
            host.sample("z", host.dist.Normal(rows[: len(data)] + data, 0.7))

    model, _ = programs(host)
    for options in ({"estimators": {"z": RP(control_variate="diagonal")}}, {"control_variate": "quadratic"}):
        pyro.clear_param_store()
        steps = Steps(host, model, guide, **options)
        steps.try_step(20)
        with pytest.raises(ValueError, match=r"site 'z': what the estimator learns \('z.control_variate'\) has a row .* shared=True"):
            steps.try_step(10)
    pyro.clear_param_store()
    steps = Steps(host, model, guide, RP(control_variate="diagonal", shared=True))
    assert np.isfinite([steps.step(size) for size in SIZES]).all()


def of_four(h, *shape):
    return h.param("w", h.array(np.eye(4) if shape else np.full(4, 0.1)))


MISTAKABLE = {
    "weights": lambda h, data: h.dist.Normal(data @ of_four(h), h.array(0.7)),
    "their sum": lambda h, data: h.dist.Normal(data[:, 0] * of_four(h).sum(), h.array(0.7)),
    "one output of a layer": lambda h, data: h.dist.Normal((data @ of_four(h, 4))[:, 0], h.array(0.7)),
    "an event": lambda h, data: h.dist.Normal(data * of_four(h), h.array(0.7)).to_event(1),
    "a matrix": lambda h, data: h.dist.MultivariateNormal(data, scale_tril=h.math.tril(of_four(h, 4))),
}
COVERED = {
    "its own": {"estimators": {"z": RP(control_variate="diagonal")}, "default": RP()},
    "whole guide": {"control_variate": "quadratic"},
}


@each(
    ("options", "fn"),
    {f"{what}-{how}": (COVERED[what], MISTAKABLE[how]) for what in COVERED for how in MISTAKABLE},
    slow_in_numpyro=lambda value: value != (COVERED["whole guide"], MISTAKABLE["weights"]),
)
def test_a_batch_of_the_size_of_a_parameter(host, options, fn):
    """A parameter whose size happens to be that of the batch gives the elements no rows of their own."""

    def guide(data):
        host.sample("g", host.dist.Normal(host.param("g_loc", host.array(0.1)), host.array(1.0)))
        with host.plate("data", len(data)):
            host.sample("z", fn(host, data))

    def model(data):
        g = host.sample("g", host.dist.Normal(host.array(0.0), host.array(1.0)))
        size = (4,) if fn in (MISTAKABLE["an event"], MISTAKABLE["a matrix"]) else ()
        with host.plate("data", len(data)):
            z = host.sample("z", host.dist.Normal(host.array(np.zeros(size)), host.array(1.0)).to_event(len(size)))
            host.sample("y", host.dist.Normal((z.sum(-1) if size else z) * g, host.array(0.5)), obs=data[:, 0])

    steps = Steps(host, model, guide, **options)
    for size in (4, 3, 4):
        steps.try_step((size, 4))
    assert len(steps.learned("z.control_variate")) == 2  # without a dim for rows


def test_shared_coefficients_get_the_sum(host):
    """The gradient of a shared coefficient is the sum of those of separate coefficients."""

    def gradients(shared):
        model, guide = programs(host, 4)
        data = host.array([0.3, -1.0, 2.0, 0.1])
        learned = np.zeros((1, 2) if shared else (4, 1, 2))
        params = {"loc": np.array([0.1, 0.2, 0.3, 0.4]), "z.control_variate": learned}
        options = {"estimators": {"z": RP(control_variate="diagonal", shared=shared)}}
        return host.loss_and_gradients(params, lambda: model(data), lambda: guide(data), plates=1, **options)[1]

    own, shared = gradients(False), gradients(True)
    np.testing.assert_allclose(shared["loc"], own["loc"], rtol=1e-12)
    np.testing.assert_allclose(shared["z.control_variate"], own["z.control_variate"].sum(0), rtol=1e-10)


# ---- coefficients that are functions of features


def of_loc(p):
    return p.loc[..., None]


def of_loc_of_event(p):
    return p.loc


def identity(h, size):
    """A feature for each element."""
    return lambda p: h.array(np.eye(size))


KINDS = {
    "control variate": lambda **options: RP(control_variate="quadratic", **options),
    "flow": lambda **options: AdaptiveFlow(bumps=2, start=0.5, q="learned", **options),
}


def learning_gradients(h, estimator, learned, data=(0.3, -1.0, 2.0, 0.1)):
    """The loss and its gradients in all parameters, at given values of the learned ones."""
    data = h.array(np.array(data))

    def model():
        with h.plate("data", len(data)):
            z = h.sample("z", h.dist.Normal(0.0, 1.0))
            h.sample("y", h.dist.Normal(z**2, 0.5), obs=data)

    def guide():
        loc = h.param("loc", h.array(np.zeros(4)))
        with h.plate("data", len(data)):
            h.sample("z", h.dist.Normal(loc[: len(data)], h.param("scale", h.array(0.7))))

    params = {"loc": np.array([0.1, 0.2, 0.3, 0.4]), "scale": np.array(0.7), **{f"z.{name}": a for name, a in learned.items()}}
    return h.loss_and_gradients(params, model, guide, plates=1, estimators={"z": estimator}, default=RP())


SHAPES = {"control variate": {"control_variate": (1, 2)}, "flow": {"velocity": (2, 3), "control": (2, 4), "proposal": (2,)}}


@each("kind", list(KINDS), slow_in_numpyro=always)
def test_a_feature_for_each_element(host, kind):
    """One-hot features equal separate coefficients: same loss and gradients, with the sum as the gradient of the constants."""
    rng = np.random.default_rng(0)
    own = {name: 0.3 * rng.normal(size=(4, *shape)) for name, shape in SHAPES[kind].items()}
    amortised = {name: np.concatenate([0 * a[:1], a]) for name, a in own.items()}
    loss, expected = learning_gradients(host, KINDS[kind](), own)
    again, found = learning_gradients(host, KINDS[kind](features=identity(host, 4)), amortised)
    np.testing.assert_allclose(again, loss, rtol=1e-12)
    for name, gradient in expected.items():
        if name in ("loc", "scale"):
            np.testing.assert_allclose(found[name], gradient, rtol=1e-10)
        else:
            np.testing.assert_allclose(found[name][1:], gradient, rtol=1e-10, atol=1e-12)
            np.testing.assert_allclose(found[name][0], gradient.sum(0), rtol=1e-10, atol=1e-12)


@each("kind", list(KINDS), slow_in_numpyro=lambda kind: kind == "flow")
def test_no_features_but_the_constant(host, kind):
    rng = np.random.default_rng(0)
    shared = {name: 0.3 * rng.normal(size=shape) for name, shape in SHAPES[kind].items()}
    loss, expected = learning_gradients(host, KINDS[kind](shared=True), shared)
    amortised = {name: a[None] for name, a in shared.items()}
    again, found = learning_gradients(host, KINDS[kind](features=lambda p: p.loc[..., None][..., :0]), amortised)
    np.testing.assert_allclose(again, loss, rtol=1e-12)
    for name, gradient in expected.items():
        np.testing.assert_allclose(found[name].reshape(gradient.shape), gradient, rtol=1e-10, atol=1e-12)


@each("size", [4, 3], slow_in_numpyro=lambda size: size == 3)
def test_an_element_that_has_not_been_seen_before(host, size):
    """If the gradient of the cost is affine in the features, the right coefficients remove all noise at every element."""
    data = host.array(np.linspace(-1, 1, 4)[:size])

    def guide():
        with host.plate("data", size):
            host.sample("z", host.dist.Normal(data, host.param("scale", host.array(0.7))).mask(False))

    def model():
        with host.plate("data", size):
            z = host.sample("z", host.dist.Normal(0.0, 1.0).mask(False))
            host.factor("cost", (2.0 + 3.0 * data) * z)

    w = 0.7 * np.array([[[2.0, 0.0]], [[3.0, 0.0]]])  # in units of the scale
    for learned, exact in ((w, True), (0 * w, False)):
        estimator = RP(control_variate="diagonal", features=of_loc)
        params = {"scale": np.array(0.7), "z.control_variate": learned}
        gradient = host.loss_and_gradients(params, model, guide, plates=1, estimators={"z": estimator})[1]["scale"]
        assert (abs(gradient) < 1e-10) == exact


@each("kind", list(KINDS), slow_in_numpyro=always)
def test_batches_of_changing_size_with_features(host, kind):
    estimator = KINDS[kind](features=of_loc)
    steps = Steps(host, *programs(host), estimator)
    assert np.isfinite([steps.step(size) for size in SIZES]).all()
    for name, shape in SHAPES[kind].items():
        assert steps.learned(f"z.{name}") == (2, *shape)


def test_features_of_another_shape(host):
    model, guide = programs(host)
    for features in (lambda p: p.loc, lambda p: host.array(np.ones((3, 20, 2)))):
        with pytest.raises(ValueError, match=r"site 'z': features\(p\) must return .* \(20, number of features\), found"):
            Steps(host, model, guide, RP(control_variate="diagonal", features=features)).step(20)


def test_features_of_nothing():
    with pytest.raises(TypeError, match="RP: features is for the coefficients of a control variate"):
        RP(features=of_loc)


@each("estimator", [RP(control_variate="diagonal"), RP(control_variate="diagonal", features=of_loc_of_event)], slow_in_numpyro=always)
def test_a_full_rank_site_shares_too(host, estimator):
    def guide(data):
        factor = host.math.exp(host.param("log_scale", host.array(0.1))) * host.array(np.eye(2))
        with host.plate("data", len(data)):
            host.sample("z", host.dist.MultivariateNormal(data[:, None] + host.array([0.0, 1.0]), scale_tril=factor))

    def model(data):
        with host.plate("data", len(data)):
            z = host.sample("z", host.dist.Normal(host.array([0.0, 0.0]), 1.0).to_event(1))
            host.sample("y", host.dist.Normal(z[..., 0] * z[..., 1], 0.5), obs=data)

    steps = Steps(host, model, guide, estimator)
    assert np.isfinite([steps.step(size) for size in (6, 3)]).all()
    assert steps.learned("z.control_variate") == ((2, 2) if estimator.features is None else (3, 2, 2))


def test_the_first_loss_is_without_derivatives():
    """A first loss without derivatives also finds, in Pyro, that the elements have rows."""
    data = PYRO.array(np.ones((4, 4)))

    def guide():
        with PYRO.plate("data", 4):
            PYRO.sample("z", PYRO.dist.Normal(PYRO.param("loc", PYRO.array(np.zeros(4))), 0.7))
            PYRO.sample("x", MISTAKABLE["weights"](PYRO, data))

    pyro.clear_param_store()
    elbo = PYRO.flow.TraceFlow_ELBO(control_variate="quadratic")
    assert elbo.loss(guide, guide) == 0
    assert [pyro.param(f"{site}.control_variate").shape for site in "zx"] == [(4, 1, 3), (1, 3)]
