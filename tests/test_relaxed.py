"""The biased estimators GumbelSoftmax, StraightThrough and ReinMax: their derivatives, and the cases in which the mean is right."""

import numpy as np
import numpyro
import pyro
import pytest
import torch
from hosts import HOSTS, Program, each, z_scores
from numpyro.contrib.control_flow import scan
from test_alternatives_formulas import sigmoid, softmax
from test_surrogate import BITS, LAWS, OF_HOSTS

import flowvi.numpyro
import flowvi.pyro
from flowvi import LR, Auto, GumbelSoftmax, ReinMax, StraightThrough, check_estimator, plot
from flowvi.estimators import attach

ALL = {"straight through": StraightThrough(), "ReinMax": ReinMax(), "Gumbel-softmax": GumbelSoftmax(0.7)}
CAN_MOVE = [param for param in OF_HOSTS if "-Categorical" not in param.id]


def covariance(q):
    return np.diag(q) - np.outer(q, q)


def by_the_paper(name, binary, logits, x, v):
    """dx/dlogits by the formula of the paper, for three Bernoullis or one one-hot vector."""
    if not binary:
        return _by_the_paper(name, logits, x, relaxed(False, logits, x, v))
    slopes = []
    for logit, b, sample in zip(logits, x, relaxed(True, logits, x, v), strict=True):  # a Bernoulli is the first of two categories
        slopes.append(_by_the_paper(name, np.array([logit, 0.0]), np.array([b, 1 - b]), sample)[0, 0])
    return np.diag(slopes)


def relaxed(binary, logits, x, v):
    """The relaxed draw: a softmax at temperature 0.7, with a pair of entries for each Bernoulli."""
    if binary:
        p = sigmoid(logits)
        u = np.where(x == 1, 1 - p + v * p, (1 - v) * (1 - p))
        return [softmax(np.array([z / 0.7, 0.0])) for z in logits + np.log(u) - np.log(1 - u)]
    e, k = -np.log(v), x.argmax()
    return softmax(np.where(x == 1, -np.log(e[k]), -np.log(e / softmax(logits) + e[k])) / 0.7)


def _by_the_paper(name, logits, x, sample):
    pi = softmax(logits)
    if name == "straight through":
        return covariance(pi)
    if name == "ReinMax":  # 2 pi_1 - pi_0 / 2, where pi_1 is the softmax of logits shifted to (x + pi) / 2
        return 2 * covariance((x + pi) / 2) - covariance(pi) / 2
    return covariance(sample) / 0.7


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize(("host", "law"), CAN_MOVE)
def test_how_the_value_moves(host, law, name):
    """The value is the draw as a float, and its derivative is that of the paper."""
    x, binary = np.stack(law.draws), law.draws is BITS
    v = np.random.default_rng(4).uniform(size=x.shape)

    def value(values, i):
        target = host.target("x", law.make(host, values["theta"]), False)
        target.uniforms = lambda shape, like: host.array(v)
        found = attach(host.ops, target, ALL[name], host.array(x) if host.name == "pyro" else host.integers(x)).value
        return found[:, i].sum(), found

    theta = {"theta": np.tile(law.theta, (len(x), 1))}
    found = [host.value_and_gradient(lambda t, i=i: value(t, i), theta, has_aux=True) for i in range(3)]
    assert np.array_equal(host.numpy(found[0][0][1]), x)
    slopes = np.stack([g["theta"] for _, g in found], 1)
    probs = binary and np.allclose(law.theta, LAWS["Bernoulli, probs"].theta)
    logits = np.log(law.theta) - np.log(1 - law.theta) if probs else law.theta
    for i in range(len(x)):
        expected = by_the_paper(name, binary, logits, x[i], v[i])
        if probs:
            expected = expected / (law.theta * (1 - law.theta))
        np.testing.assert_allclose(slopes[i], expected, rtol=1e-10, atol=1e-12)


# ---- means, weighted by the probability of each value


class Outcomes:
    """The gradient in the logits at each value of a site. The derivative in a last parameter, of value 0, shows the value."""

    def __init__(self, host, program, estimator, probs, **options):
        samples = host.gradients(program, 100, estimators={"x": estimator}, **options)
        self.at = [samples[np.isclose(samples[:, -1], k)][0, :-1] for k in range(len(probs))]
        self.mean = sum(p * g for p, g in zip(probs, self.at, strict=True))


P = sigmoid(0.4)


def quadratic(x):
    return (x - 0.3) ** 2 + x


def one_bernoulli(cost, masked):
    def guide(h, t):
        return h.sample("x", h.dist.Bernoulli(logits=t[0]).mask(not masked))

    def model(h, t):
        x = h.sample("x", h.dist.Bernoulli(h.array(0.3)).mask(not masked))
        h.factor("cost", cost(x) + t[1] * x)

    return Program(guide, model, (0.4, 0.0))


def require_right(host, estimator, cost, masked):
    exact = P * (1 - P) * (cost(1) - cost(0) + (0 if masked else np.log(0.3 / 0.7) - 0.4))
    np.testing.assert_allclose(Outcomes(host, one_bernoulli(cost, masked), estimator, [1 - P, P]).mean, [exact], rtol=1e-10)


@each("masked", {"cost": True, "ELBO": False}, slow_in_numpyro=bool)
def test_reinmax_is_right_for_a_quadratic_cost(host, masked):
    """ReinMax is exact for a quadratic cost, unlike StraightThrough, but not for a cubic one. The log densities are linear in x."""
    require_right(host, ReinMax(), quadratic, masked)
    for estimator, cost in ((StraightThrough(), quadratic), (GumbelSoftmax(0.5), quadratic), (ReinMax(), lambda x: x**4)):
        with pytest.raises(AssertionError, match="Not equal to tolerance"):
            require_right(host, estimator, cost, masked)


A, B = np.array([[0.5, -0.2, 0.3], [-0.2, 1.0, 0.4], [0.3, 0.4, -0.7]]), np.array([0.2, -0.9, 0.5])
LOGITS = np.array([0.3, 1.2, -0.8])


def test_one_hot_vectors():
    """Pyro's density of a one-hot vector reads an index, so that its derivative in the vector comes from flowvi."""

    def site(h, logits):
        with h.scale(1.7):
            return h.sample("x", h.dist.OneHotCategorical(logits=logits))

    def model(h, t):
        x = site(h, h.array([0.1, 0.4, -0.3]))
        h.factor("cost", ((x @ h.array(A)) * x).sum(-1) + x @ h.array(B) + t[3] * (x @ h.array([0.0, 1.0, 2.0])))

    program = Program(lambda h, t: site(h, h.math.stack(t[:3], -1)), model, (*LOGITS, 0.0))
    pi, prior = softmax(LOGITS), softmax(np.array([0.1, 0.4, -0.3]))
    costs = np.diag(A) + B + 1.7 * np.log(prior / pi)
    exact = pi * (costs - pi @ costs)
    np.testing.assert_allclose(Outcomes(HOSTS["pyro"], program, ReinMax(), pi).mean, exact, rtol=1e-10)
    with pytest.raises(AssertionError, match="Not equal to tolerance"):
        np.testing.assert_allclose(Outcomes(HOSTS["pyro"], program, StraightThrough(), pi).mean, exact, rtol=1e-10)


@pytest.mark.parametrize("as_event", [False, True], ids=["plate", "event"])
def test_masked_one_hot_vectors(as_event):
    """With a mask, each of two vectors has the derivative that it would have if both had its mask."""
    host = HOSTS["pyro"]

    def gradient(mask):
        def site(logits):
            fn = host.dist.OneHotCategorical(logits=logits).mask(host.integers(mask))
            with host.plate("n", 2 if not as_event else 1):
                return host.sample("x", fn.expand([1, 2]).to_event(1) if as_event else fn)

        def guide():
            site(host.param("logits", host.array(np.stack([LOGITS, -LOGITS]))))

        def model():
            x = site(host.array(np.zeros((2, 3))))
            host.factor("cost", (x * x * host.array(B)).sum())

        return host.loss_and_gradients({"logits": np.stack([LOGITS, -LOGITS])}, model, guide, default=StraightThrough())[1]["logits"]

    both, none = gradient([True, True]), gradient([False, False])
    assert np.abs(both - none).min() > 1e-3
    np.testing.assert_allclose(gradient([True, False]), [both[0], none[1]], rtol=1e-12)


# ---- ReinMax at costs that are quadratic in each value: several particles, plates, sites below, scan


def in_a_plate(h):
    """A subsampled plate of equal elements, in which a Normal with a score reads each value, and the exact gradient."""

    def local(h, t):
        with h.plate("n", 6, subsample_size=2):
            x = h.sample("x", h.dist.Bernoulli(logits=t[0]).mask(False))
            return x, h.sample("y", h.dist.Normal(2.0 * x, h.array(0.5)).mask(False))

    def model(h, t):
        with h.plate("n", 6, subsample_size=2):
            x = h.sample("x", h.dist.Bernoulli(h.array(0.5)).mask(False))
            y = h.sample("y", h.dist.Normal(h.array(0.0), h.array(1.0)).mask(False))
            h.factor("cost", 0.3 * y**2 + x)

    return Program(local, model, (0.4,), 1), 6 * P * (1 - P) * (0.3 * 4 + 1)


@each("particles", [1, 4], slow_in_numpyro=lambda particles: particles == 1)
def test_above_a_score_in_a_subsampled_plate(host, particles):
    program, exact = in_a_plate(host)
    samples = host.gradients(program, 4000, particles=particles, estimators={"x": ReinMax(), "y": LR()})
    assert np.all(np.abs(z_scores(samples, exact)) < 5), samples.mean(0)
    wrong = host.gradients(program, 4000, particles=4, estimators={"x": StraightThrough(), "y": LR()})
    assert np.all(np.abs(z_scores(wrong, exact)) > 5)


SLOPES = np.array([1.0, -0.5, 0.4, 0.8, -1.2, 0.3])


def test_inside_scan():
    host, estimated = HOSTS["numpyro"], flowvi.numpyro.Estimated

    def guide(h, t):
        def body(total, slope):
            return total + numpyro.sample("x", estimated(h.dist.Bernoulli(logits=t[0] * slope), ReinMax()).mask(False)), None

        return scan(body, 0.0, h.array(SLOPES))[0]

    def model(h, t):
        h.factor("cost", guide(h, t) ** 2)

    p = sigmoid(0.7 * SLOPES)
    exact = (SLOPES * p * (1 - p) * (1 + 2 * (p.sum() - p))).sum()
    samples = host.gradients(Program(guide, model, (0.7,)), 10_000)
    assert np.all(np.abs(z_scores(samples, exact)) < 5)


# ---- labels and refusals


def plain(h, family=None):
    def site(h, t):
        h.sample("x", family(h, t[0]) if family else h.dist.Bernoulli(logits=t[0]))

    return Program(site, site, (0.4,))


def test_labelled(host):
    """``describe`` and ``gradient_report`` mark them as biased, and ``Auto`` never takes them."""

    def program():
        host.sample("x", host.dist.Bernoulli(logits=host.param("logit", host.array(0.3))))

    for estimator in ALL.values():
        described = host.flow.TraceFlow_ELBO(default=estimator).describe(program, program)
        assert f"{estimator} (biased)" in str(described)
    report = host.flow.gradient_report(program, program, default=ReinMax(), num_samples=2)
    assert "ReinMax() (biased)" in str(report)
    (site,) = host.flow.TraceFlow_ELBO(default=Auto()).describe(program, program)
    assert not site.estimator.biased


@pytest.mark.parametrize("estimator", ALL.values(), ids=ALL)
def test_refused(host, estimator):
    what = type(estimator).__name__
    for family, message in (
        (lambda h, t: h.dist.Normal(t, h.array(1.0)), f"{what} needs a site whose value can be relaxed, .*found Normal"),
        (lambda h, t: h.dist.Categorical(logits=t[..., None] * h.array([1.0, 2.0])), f"{what} needs a value that can move, .*an index"),
    ):
        with pytest.raises(ValueError, match=f"^site 'x': {message}"):
            host.gradients(plain(host, family), 2, estimators={"x": estimator})
    with pytest.raises(ValueError, match="^site 'x': .* is biased, and its bias under"):
        host.bound_gradients(plain(host), 2, estimators={"x": estimator})
    with pytest.raises(ValueError, match="check_estimator: .* is biased by design"):
        check_estimator(host.dist.Bernoulli(logits=host.array(0.3)), estimator)
    with pytest.raises(ValueError, match="moves a discrete value and has neither"):
        plot.gradient_samples(host.dist.Bernoulli(logits=host.array(0.3)), estimator, "logits", lambda x: x)


def test_under_pyros_own_elbo():
    """Under Pyro's own ELBO they draw from p, and the gradient is refused."""

    def guide():
        pyro.sample("x", flowvi.pyro.Estimated(HOSTS["pyro"].dist.Bernoulli(logits=pyro.param("l", torch.tensor(0.3))), ReinMax()))

    assert pyro.poutine.trace(guide).get_trace().nodes["x"]["value"].item() in (0, 1)
    with pytest.raises(ValueError, match=r"ReinMax\(\) moves a discrete value, which this objective does not"):
        pyro.infer.Trace_ELBO().differentiable_loss(guide, guide)


@pytest.mark.parametrize("temperature", [0.0, -1.0, float("nan"), float("inf")])
def test_refused_temperatures(temperature):
    with pytest.raises(ValueError, match="GumbelSoftmax: expected a positive temperature"):
        GumbelSoftmax(temperature)
