"""``recommend`` and ``check_program``: the test of two means, and tiny programs with known answers, in both hosts."""

import math
import time

import jax
import matplotlib
import matplotlib.pyplot
import numpy as np
import numpyro
import pyro
import pytest
import torch
from hosts import HOSTS, slow_in_numpyro, slow_in_pyro

import flowvi.guidance
from flowvi import LR, RP, AdaptiveFlow, Auto, DisARM, Enumerate, Flow
from flowvi.guidance import Batch, Search, Setting, Watch
from flowvi.guidance.bias import MeanTest
from flowvi.guidance.candidates import ROWS, GuideSite, candidates
from flowvi.guidance.noise import Scale, Trial
from flowvi.host import host_of
from flowvi.pyro.guidance import PyroBench

matplotlib.use("agg")


@pytest.fixture(autouse=True)
def _own_time(monkeypatch):
    """Use the CPU time of this process, so that a busy machine changes nothing."""
    monkeypatch.setattr(flowvi.guidance, "perf_counter", time.process_time)


# ---- the test of two means


def draws(law, shift=0.0, seed=0):
    """Gradients of six elements, and a reference whose mean differs by ``shift`` in two of them."""

    def own(number):
        rng = np.random.default_rng([seed, number])
        return Batch(1.0 + 0.1 * rng.normal(size=(16, 6)), 1.0)

    def reference(number):
        rng = np.random.default_rng([seed, number, 1])
        noise = {
            "normal": lambda: rng.normal(size=(16, 6)),
            "heavy": lambda: rng.standard_t(3, size=(16, 6)),
            "skew": lambda: rng.lognormal(0, 1, size=(16, 6)) - math.exp(0.5),
            "rare": lambda: (rng.uniform(size=(16, 6)) < 0.02) / 0.02 - 1.0,
        }[law]()
        return Batch(1.0 + noise - shift * np.array([1, 1, 0, 0, 0, 0]), 1.0)

    return own, reference


@pytest.mark.parametrize("law", ["normal", "heavy", "skew", "rare"])
def test_false_alarms(law):
    """At a level of 5% hardly one in 200 tests gives a false alarm, because a finding must be confirmed."""
    alarms = 0
    for seed in range(200):
        test = MeanTest(*draws(law, seed=seed), 0.05, 0.0)
        for _ in range(2):
            test.look()
        alarms += test.result.biased
    assert alarms <= 1


@pytest.mark.parametrize("law", ["normal", "heavy", "skew", "rare"])
def test_power(law):
    """The test finds a bias, its element and its size."""
    test = MeanTest(*draws(law, shift=1.5), 0.001, 0.0)
    while not test.is_decided and test.num_looks < 7:
        test.look()
    assert test.result.biased
    assert test.result.element in (0, 1)
    assert abs(test.result.bias / (1.5 * math.sqrt(2 / 6)) - 1) < 0.3


def test_what_would_have_been_found():
    """The test finds most biases along the gradient that are as large as the reported detectable bias."""
    test = MeanTest(*draws("normal"), 0.001, 0.1)
    while not test.is_decided:
        test.look()
    detectable = test.result.detectable
    assert not test.result.biased
    assert 0.02 < detectable < 0.1
    found = 0
    for seed in range(20):
        own, reference = draws("normal", seed=seed)
        again = MeanTest(own, lambda i, r=reference: Batch(r(i).gradients - detectable, 1.0), 0.001, 0.0)
        for _ in range(test.num_looks):
            again.look()
        found += again.result.biased
    assert found > 12


def test_elements_that_the_reference_leaves_alone():
    """Elements whose reference gradient is 0 are ignored, such as the parameters of a baseline."""

    def gradients(fill):
        return lambda number: Batch(np.random.default_rng(number).normal(size=(8, 2)) * [1.0, 0.0] + [1.0, fill], 1.0)

    test = MeanTest(gradients(5.0), gradients(0.0), 0.01, 0.01)
    test.look()
    assert test.is_decided
    assert not test.result.biased


# ---- the criterion


def test_noise_counts_elements_in_the_units_of_adam():
    rng = np.random.default_rng(0)
    units = np.array([1e-4, 1.0, 1e5])
    gradients = [units * (1.0 + rng.normal(size=(64, 3))) for _ in range(200)]
    scale = Scale.of(gradients)
    trial = Trial(lambda number: Batch(gradients[number], 2.0 + number), scale)
    for _ in gradients:
        trial.run()
    assert abs(trial.noise - 0.5) < 0.02  # variance 1 over second moment 2, in any units
    assert trial.seconds == 2.0
    assert abs(trial.excess(trial)[0]) < 1e-12
    halved = Trial(lambda number: Batch(gradients[number] / 2, 1.0), scale)
    for _ in gradients:
        halved.run()
    excess, error = trial.excess(halved)
    assert abs(excess - 7) < 5 * max(error, 1e-6) + 0.5  # four times the variance and twice the time


def test_elements_without_a_gradient_do_not_count():
    scale = Scale.of([np.array([[1.0, 0.0], [3.0, 0.0]])])
    np.testing.assert_allclose(scale.weights, [1 / 5, 0.0])
    np.testing.assert_allclose(scale.signal, 3 / 5)  # the product of the two samples is the unbiased squared mean


class Seldom:
    """A program whose default has noise 1. Another entropy has less noise in most samples, but more on average."""

    sites: dict = {}
    parameters = {"loc": 2}
    marginalises = False
    drawn = (("independent", False),)

    def gradients(self, setting):
        def draw(number):
            rng = np.random.default_rng([number + 10, setting.entropy == "full"])
            noise = rng.normal(size=(8, 2))
            seldom = 0.5 * noise + 15.0 * rng.normal(size=(8, 2)) * (rng.uniform(size=(8, 2)) < 0.01)
            return Batch(1.0 + (noise if setting.entropy == "full" else seldom), 1.0)

        return draw


class Particles:
    """A program whose gradient is a mean and noise; the time of a step grows with the particles."""

    sites: dict = {}
    parameters = {"loc": 2}
    marginalises = False
    drawn = (("independent", False),)

    def __init__(self, mean, time):
        self.mean, self.time = mean, time

    def gradients(self, setting):
        n = setting.num_particles

        def draw(number):
            noise = np.random.default_rng([number + 10, n]).normal(size=(64, 2))
            return Batch(self.mean + noise / math.sqrt(n), self.time[n])

        return draw


@pytest.mark.parametrize(
    ("mean", "time", "expected"),
    [
        (0.0, {1: 1.0, 4: 2.0, 16: 6.0}, 16),  # half the noise x time at each step
        (1.0, {1: 1.0, 4: 2.0, 16: 6.0}, 1),  # signal + noise times time: 2, 2.5, 6.4
        (1.0, {1: 1.0, 4: 1.1, 16: 1.4}, 4),  # 2, 1.4, 1.5
        (3.0, {1: 1.0, 4: 1.2, 16: 1.3}, 1),
        (0.0, {1: 1.0, 4: 5.0, 16: 20.0}, 1),
    ],
)
def test_particles_that_shorten_a_fit(mean, time, expected):
    """More particles save steps only where the noise is large beside the mean gradient."""
    with Watch(10.0, False) as clock:
        search = Search(Particles(mean, time), (1, 4, 16), clock)
        assert abs(search.scale.signal - mean**2 / (1 + mean**2)) < 0.1
        search.run(5.0)
        assert search.best.num_particles == expected
        search.best = search.best._replace(num_particles=16)
        search.keep_default(1.0)
        assert search.best.num_particles == (16 if expected > 1 else 1)


class Jittery(Particles):
    """Noise that is the same in every batch, and times of steps that vary."""

    def __init__(self, seed, time):
        super().__init__(0.0, time)
        self.seed = seed

    def gradients(self, setting):
        n = setting.num_particles

        def draw(number):
            rng = np.random.default_rng([number + 10, n, self.seed])
            return Batch(np.tile([[1.0], [-1.0]], (32, 2)) / math.sqrt(n), self.time[n] * (1.0 + rng.exponential(0.5)))

        return draw


@pytest.mark.parametrize(
    ("numbers", "time", "expected"),
    [
        ((1, 4, 16), {1: 1.0, 4: 4.0, 16: 16.0}, 1),  # equal noise x time
        ((4, 16, 1), {1: 1.0, 4: 4.0, 16: 16.0}, 4),  # the default has the first number
        ((1, 16, 4), {1: 1.0, 4: 2.0, 16: 8.0}, 4),  # the smaller one of two better ones
        ((1, 4, 16), {1: 1.0, 4: 2.0, 16: 4.0}, 16),
    ],
)
def test_the_jitter_of_times_does_not_choose_the_particles(numbers, time, expected):
    """Of numbers with the same noise x time, the default's is chosen, or the smallest."""
    found = []
    for seed in range(6):
        with Watch(10.0, False) as clock:
            search = Search(Jittery(seed, time), numbers, clock)
            search.run(5.0)
            search.keep_default(1.0)
        found.append(search.best.num_particles)
    assert found == [expected] * 6


@pytest.mark.parametrize("seconds", [0.0, 10.0])
def test_the_default_is_kept_where_another_choice_is_seldom_noisy(seconds):
    """In eight of ten samples the other choice looks better; over more samples, measured side by side, it does not."""
    with Watch(10.0, False) as clock:
        search = Search(Seldom(), 1, clock)
        search.best = search.default._replace(entropy="stl")
        search.keep_default(seconds)
    assert (search.best == search.default) == (seconds > 0)


# ---- check_program


def normal_program(host, cost, name="x"):
    pyro.clear_param_store()

    def model():
        cost(host.sample(name, host.dist.Normal(host.array(0.0), host.array(1.0))))

    def guide():
        host.sample(name, host.dist.Normal(host.param("loc", host.array(0.2)), host.param("scale", host.array(0.9))))

    return model, guide


def jump(host):
    return lambda x: host.factor("cost", host.math.where(x > 0.5, 2.0, 0.0) + 0.3 * x)


def test_a_jump(host):
    check = host.flow.check_program(*normal_program(host, jump(host)), seconds=20)
    (found,) = check.failed
    assert found.site == "x"
    assert found.estimator == RP()
    assert found.place.statement == "statement 'cost'"
    assert abs(found.place.x - 0.5) < 1e-6
    assert "jumps by 2 where 'x' crosses 0.5" in str(check)
    assert list(check.to_pandas()["result"]) == ["biased"]


@pytest.mark.slow
def test_a_hidden_path_at_the_second_of_two_sites(host):
    """The second site is at fault. The gradient of the first is wrong too, because its path goes through the second."""
    pyro.clear_param_store()

    def model():
        x = host.sample("x", host.dist.Normal(host.array(0.0), host.array(1.0)))
        z = host.sample("z", host.dist.Normal(x, host.array(1.0)))
        hidden = z.detach() if host.name == "pyro" else jax.lax.stop_gradient(z)
        host.sample("y", host.dist.Normal(hidden, host.array(0.5)), obs=host.array(2.0))

    def guide():
        x = host.sample("x", host.dist.Normal(host.param("loc", host.array(0.2)), host.array(0.8)))
        host.sample("z", host.dist.Normal(x + host.param("shift", host.array(0.1)), host.array(0.8)))

    check = host.flow.check_program(model, guide, seconds=20)
    assert [(one.site, one.place.statement) for one in check.failed] == [("z", "statement 'y'")]
    assert check.sites[0].note == "its path leads through 'z', whose bias it has"


@pytest.mark.slow
def test_elements_that_read_each_other(host):
    """If elements read each other, a score in the plate is biased, because it multiplies only its own element's cost. A path is not."""
    pyro.clear_param_store()
    y = host.array([1.0, 0.2, 1.4])

    def model():
        with host.plate("data", 3):
            x = host.sample("x", host.dist.Normal(host.array(0.0), host.array(1.0)))
            neighbour = host.math.roll(x, 1, -1)
            host.sample("y", host.dist.Normal(x + 1.5 * neighbour, host.array(0.7)), obs=y)

    def guide():
        loc = host.param("loc", host.array([0.1, -0.4, 0.3]))
        with host.plate("data", 3):
            host.sample("x", host.dist.Normal(loc, host.array(0.9)))

    (found,) = host.flow.check_program(model, guide, estimators={"x": LR()}, seconds=20).failed
    assert str(found.place) == "statement 'y' reads '{site}' at other elements of the plate 'data'"
    check = host.flow.check_program(model, guide, estimators={"x": RP()}, seconds=3)
    assert not check.failed
    assert check.sites[0].reference == "LR() of all costs"


@pytest.mark.slow
def test_no_bias(host):
    program = normal_program(host, lambda x: host.sample("y", host.dist.Normal(x, host.array(0.8)), obs=host.array(1.1)))
    check = host.flow.check_program(*program, estimators={"x": Flow(loc=lambda x, p: 0.5)}, seconds=3)
    (one,) = check.sites
    assert one.verdict == "no bias found"
    assert 0 < one.test.detectable < 1
    (one,) = host.flow.check_program(*program, estimators={"x": LR()}).sites
    assert one.verdict == "right"


@pytest.mark.slow
def test_a_divergence_that_is_wrong(host):
    """A psi whose mean is not 0 causes a bias without a baseline, but none with the leave-one-out mean."""
    program = normal_program(host, lambda x: host.sample("y", host.dist.Normal(x, host.array(0.8)), obs=host.array(1.1)))
    velocity = lambda x, p, dtheta: 0.5 * (dtheta.loc + (x - p.loc) / p.scale * dtheta.scale)
    wrong = Flow(velocity, divergence=lambda x, p, dtheta: 0.2 * dtheta.scale / p.scale)
    (found,) = host.flow.check_program(*program, estimators={"x": wrong}, seconds=20).failed
    assert found.parameter == "scale"


def some_branches(host):
    """A program whose site x is drawn in half of the runs."""
    pyro.clear_param_store()

    def branch(p, q, cost):
        if host.sample("b", host.dist.Bernoulli(p)):
            with host.plate("d", 2):
                cost(host.sample("x", host.dist.Normal(q, 1.0)))

    def model():
        branch(0.5, 0.0, lambda x: host.factor("cost", torch.where(x > 0.5, 4.0, 0.0)))

    def guide():
        branch(host.param("p", torch.tensor(0.5)), host.param("m", torch.tensor(0.2)), lambda x: None)

    return model, guide


def test_pyro_runs_that_draw_a_site():
    drawn = 0
    for seed in range(5):
        with PyroBench.opened(*some_branches(HOSTS["pyro"]), (), {}, None, Auto(), seed) as bench:
            if "x" in bench.sites:
                drawn += 1
                probe = bench.probe("x")
                assert len({tuple(probe.value(number)) for number in range(4)}) == 4
    assert 0 < drawn < 5


@pytest.mark.slow
def test_pyro_a_jump_in_a_branch():
    check = HOSTS["pyro"].flow.check_program(*some_branches(HOSTS["pyro"]), seconds=2, seed=4)
    assert [one.place.statement for one in check.failed] == ["statement 'cost'"]


def test_pyro_sparse_gradients():
    host, rows = HOSTS["pyro"], torch.nn.Embedding(3, 1, sparse=True)

    def guide():
        host.sample("x", host.dist.Normal(pyro.module("rows", rows)(torch.tensor(1)).sum(), 1.0))

    pyro.clear_param_store()
    check = host.flow.check_program(lambda: host.sample("x", host.dist.Normal(0.0, 1.0)), guide, seconds=0.2)
    assert not check.failed
    assert rows.weight.grad is None


@pytest.mark.parametrize("function", [pytest.param("recommend", marks=pytest.mark.slow), "check_program"])
def test_pyro_a_loss_that_is_not_finite(function):
    """The path then has a gradient, which means nothing; the score has none."""
    host = HOSTS["pyro"]
    program = normal_program(host, lambda x: host.factor("cost", torch.where(x > -1.0, 0.0, -torch.inf)))
    if function == "recommend":
        with pytest.raises(
            ValueError, match=r"site 'x': .* not that of LR\(\), which is NaN or infinite; look for a value that the model"
        ):
            host.flow.recommend(*program, seconds=2, progress_bar=False)
        return
    (found,) = host.flow.check_program(*program, seconds=1).failed
    assert "LR(), which is NaN or infinite" in found.note


# ---- recommend


@slow_in_numpyro
def test_an_exact_sum(host):
    pyro.clear_param_store()

    def model():
        k = host.sample("k", host.dist.Categorical(probs=host.array([0.1, 0.2, 0.3, 0.4])))
        host.sample("y", host.dist.Normal(1.0 * k, host.array(1.0)), obs=host.array(2.0))

    def guide():
        host.sample("k", host.dist.Categorical(logits=host.param("logits", host.array([0.4, 0.1, 0.0, 0.2]))))

    advice = host.flow.recommend(model, guide, seconds=6, progress_bar=False)
    assert advice.estimators == {"k": Enumerate()}
    assert "LR() would be noisy where this is exact" in advice.sites[0].reason
    assert "discrete, 4 values" in advice.sites[0].reason
    assert advice.gain_over_default.ratio > 10
    assert advice.gain_over_host.ratio > 10
    assert not advice.check.failed
    assert "check_program" not in str(advice)
    assert len(advice.to_pandas()) == advice.to_rich().row_count == 1
    matplotlib.pyplot.close(advice.plot())
    elbo = host.flow.TraceFlow_ELBO(estimators=advice.estimators, **advice.options)
    assert np.isfinite(host.loss(elbo, model, guide))


@slow_in_pyro
def test_nothing_biased_is_recommended(host, monkeypatch):
    """If the cost jumps, RP has the least noise and the wrong mean, so it is not recommended."""
    monkeypatch.setattr(flowvi.guidance.candidates, "ROWS", ROWS[:2])
    cost = lambda x: host.factor("cost", host.math.where(x > 0.5, 3.0, 0.0) + 3.0 * x)
    advice = host.flow.recommend(*normal_program(host, cost), seconds=12, progress_bar=False)
    assert advice.estimators == {"x": LR()}
    assert "RP() would be biased on this program" in advice.sites[0].reason
    assert advice.biased == {"the default", "the host's own objective"}
    assert str(advice).count("times that of this choice, but is biased") == 2


@slow_in_numpyro
def test_particles_in_mirrored_pairs(host, monkeypatch):
    """At a linear cost, mirrored pairs leave no noise in the gradient of a location."""
    monkeypatch.setattr(flowvi.guidance.candidates, "ROWS", ROWS[:2])
    pyro.clear_param_store()

    def model():
        x = host.sample("x", host.dist.Normal(host.array(0.0), host.array(1.0)))
        host.sample("y", host.dist.Normal(x, host.array(1.0)), obs=host.array(1.5))

    def guide():
        host.sample("x", host.dist.Normal(host.param("loc", host.array(0.2)), host.array(0.9)))

    advice = host.flow.recommend(model, guide, num_particles=2, seconds=3 if host.name == "pyro" else 20, progress_bar=False)
    assert advice.options["particles"] == "antithetic"
    assert advice.options.get("vectorize_particles", False) == (host.name == "pyro")
    assert advice.gain_over_default.ratio > 100  # the interval is wide on a busy machine
    elbo = host.flow.TraceFlow_ELBO(estimators=advice.estimators, **advice.options)
    assert np.isfinite(host.loss(elbo, model, guide))
    assert ("CompiledSVI" in str(advice)) == (host.name == "pyro")


def test_pyro_does_not_recommend_a_plate_that_mixes_particles_a_little(monkeypatch):
    """The plate changes the gradient by about 1%, too little to see in the noise. NumPyro maps over particles, which mixes nothing."""
    host = HOSTS["pyro"]
    monkeypatch.setattr(flowvi.guidance.candidates, "ROWS", ROWS[:1])
    cost = lambda x: host.sample("y", host.dist.Normal(x - 0.01 * x.mean(0), host.array(0.8)), obs=host.array(1.1))
    options = host.flow.recommend(*normal_program(host, cost), num_particles=4, seconds=1, progress_bar=False).options
    assert options == {"num_particles": 4, "entropy": options["entropy"]}


def observed(mean):
    """A cost whose mean is a function of a plate of three latent values."""
    host = HOSTS["pyro"]

    def program(loc, observes):
        scale = pyro.sample("scale", host.dist.LogNormal(host.array(0.0), 0.3))
        with pyro.plate("data", 3):
            x = pyro.sample("x", host.dist.Normal(loc, 1.0))
            if observes:
                pyro.sample("y", host.dist.Normal(mean(x), scale), obs=host.array([0.3, 1.2, -0.4]))

    pyro.clear_param_store()
    return lambda: program(host.array([0.0, 0.0, 0.0]), True), lambda: program(pyro.param("loc", host.array([0.1, -0.2, 0.4])), False)


PLATES = {
    "by itself": (torch.sin, True),
    "each element": (lambda x: x - x.mean(-1, keepdim=True), True),
    "centred": (lambda x: x - x.mean(0), False),
    "a small sum": (lambda x: x + 1e-3 * x.sum(), False),
    "batch norm": (lambda x: torch.nn.functional.batch_norm(x.reshape(-1, 1), None, None, training=True).reshape(x.shape), False),
    "the rows": (lambda x: x * (torch.arange(len(x)) + 1.0).reshape((-1,) + (1,) * (x.ndim - 1)), False),
    "a branch": (lambda x: x if (x > 0.5).any() else 2 * x, False),
    "an item": (lambda x: x * (1.0 if x[0].item() > 0 else 2.0), False),
    "other draws": (lambda x: torch.nn.functional.dropout(x), False),
}


@pytest.mark.parametrize(("mean", "expected"), PLATES.values(), ids=PLATES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_pyro_which_programs_support_a_plate_of_particles(mean, expected, dtype):
    torch.set_default_dtype(dtype)
    try:
        with PyroBench.opened(*observed(mean), (), {}, None, Auto(), 0) as bench:
            assert bench.supports_plate == expected
    finally:
        torch.set_default_dtype(torch.float64)


@pytest.mark.parametrize("kind", ["subsample", "AutoNormal", "AutoMultivariateNormal", "AutoIAFNormal", "AutoDelta"])
def test_pyro_guides_that_support_a_plate_of_particles(kind):
    pyro.clear_param_store()
    program = subsampled(HOSTS["pyro"]) if kind == "subsample" else autoguided(HOSTS["pyro"], kind)
    with PyroBench.opened(*program, (), {}, None, Auto(), 0) as bench:
        assert bench.supports_plate


def test_pyro_what_a_candidate_has_learned_is_kept(monkeypatch):
    """Learned parameters survive while other candidates learn under the same name."""
    monkeypatch.setattr(flowvi.pyro.guidance, "WARM_UP", 300)
    program = normal_program(HOSTS["pyro"], lambda x: HOSTS["pyro"].factor("cost", -(x**2)))
    with PyroBench.opened(*program, (), {}, None, Auto(), 0) as bench:
        learned = bench.gradients(Setting().at({"x": RP(control_variate="quadratic")}))
        before = learned(0).gradients
        for other in (RP(control_variate="cubic"), RP()):
            bench.gradients(Setting().at({"x": other}))(0)
        np.testing.assert_array_equal(learned(0).gradients, before)
        assert before.var(0).max() < 1e-2 * bench.gradients(Setting())(0).gradients.var(0).max()


def test_numpyro_knows_estimators_that_the_model_annotates():
    """The learned parameters of annotated estimators do not count as parameters of the program."""

    def model():
        x = numpyro.sample("x", numpyro.distributions.Normal(0.0, 1.0), infer={"estimator": RP(control_variate="quadratic")})
        numpyro.factor("cost", -(x**2))

    def guide():
        numpyro.sample("x", numpyro.distributions.Normal(numpyro.param("m", 0.4), 1.0))

    def parameters():
        bench = flowvi.numpyro.guidance.NumPyroBench(model, guide, (), {}, None, Auto(), None, None)
        found.append((bench.parameters, bench.learns_already))

    found = []
    jax.eval_shape(parameters)
    assert found == [({"m": 1}, True)]


def test_pyro_is_left_as_it_was(monkeypatch):
    """Pyro's generators, parameters and gradients stay as they were, also those that candidates learn."""
    host = HOSTS["pyro"]
    monkeypatch.setattr(flowvi.pyro.guidance, "WARM_UP", 5)
    program = normal_program(host, lambda x: host.factor("cost", -(x**2)))
    for part in program:
        pyro.poutine.trace(part).get_trace()
    gradient = torch.ones(())
    pyro.param("loc").unconstrained().grad = gradient
    before = torch.get_rng_state(), {name: value.clone() for name, value in pyro.get_param_store().items()}
    host.flow.recommend(*program, seconds=2, progress_bar=False)
    assert torch.equal(torch.get_rng_state(), before[0])
    assert dict(pyro.get_param_store().items()) == before[1]
    assert pyro.param("loc").unconstrained().grad is gradient
    assert gradient == 1


def test_pyro_what_was_learned_before_keeps_its_gradient():
    host = HOSTS["pyro"]
    program, estimators = normal_program(host, lambda x: host.factor("cost", -(x**2))), {"x": RP(control_variate="quadratic")}
    host.flow.TraceFlow_ELBO(estimators=estimators).loss(*program)
    learned = [value.unconstrained() for name, value in pyro.get_param_store().items() if name.startswith("x.")]
    assert learned
    assert all(leaf.grad is None for leaf in learned)
    host.flow.check_program(*program, estimators=estimators, seconds=1)
    assert all(leaf.grad is None for leaf in learned)


def test_pyro_modules_with_parameters_of_their_own(monkeypatch):
    """It works if the parameters are in torch modules and not in the parameter store."""
    from hosts import HOSTS
    from pyro.nn import PyroModule, PyroParam

    host = HOSTS["pyro"]
    monkeypatch.setattr(flowvi.guidance.candidates, "ROWS", ROWS[:2])

    class Guide(PyroModule):
        def __init__(self):
            super().__init__()
            self.net = torch.nn.Linear(1, 1)
            self.scale = PyroParam(torch.tensor(0.8), constraint=host.dist.constraints.positive)

        def forward(self):
            pyro.sample("x", host.dist.Normal(self.net(torch.ones(1)).sum(), self.scale))

    with pyro.settings.context(module_local_params=True):
        model, guide = normal_program(host, lambda x: host.factor("cost", -(x**2)))[0], Guide()
        report = host.flow.gradient_report(model, guide, num_samples=20)
        assert {one.parameter for one in report.parameters} == {"net$$$weight", "net$$$bias", "scale"}
        assert [one.verdict for one in host.flow.check_program(model, guide, seconds=0.2).sites] == ["no bias found"]
        assert set(host.flow.recommend(model, guide, seconds=0.5, progress_bar=False).estimators) == {"x"}


def test_numpyro_inside_scan():
    """Inside scan only the wrapper acts, so nothing is measured, and the advice says so."""
    from numpyro.contrib.control_flow import scan

    def program():
        loc = numpyro.param("loc", jax.numpy.zeros(3))

        def step(x, loc):
            return numpyro.sample("x", numpyro.distributions.Normal(loc, 1.0)), None

        scan(step, 0.0, loc)

    def model():
        scan(lambda x, _: (numpyro.sample("x", numpyro.distributions.Normal(0.5 * x, 1.0)), None), 0.0, None, length=3)

    advice = flowvi.numpyro.recommend(model, program, seconds=1, progress_bar=False)
    assert advice.estimators == {}
    assert "Estimated(distribution, RP())" in advice.sites[0].reason
    assert advice.check.sites[0].verdict == "not checked"


def subsampled(host):
    """A subsampled plate with local parameters, below a global site."""

    def program(loc, y=None):
        w = host.sample("w", host.dist.Normal(loc[0], host.array(0.9)))
        with host.plate("data", 6, subsample_size=3) as i:
            z = host.sample("z", host.dist.Normal(w + loc[i], host.array(0.8)))
            if y is not None:
                host.sample("y", host.dist.Normal(z, host.array(0.7)), obs=y[i])

    y, zeros = host.array([0.3, 1.2, -0.4, 0.8, 1.9, 0.1]), host.array([0.0] * 6)
    return lambda: program(zeros, y), lambda: program(host.param("loc", host.array([0.1] * 6)))


def autoguided(host, kind):
    """A program with an autoguide."""
    guides = pyro.infer.autoguide if host.name == "pyro" else numpyro.infer.autoguide

    def model():
        w = host.sample("w", host.dist.Normal(host.array(0.0), host.array(1.0)))
        scale = host.sample("scale", host.dist.LogNormal(host.array(0.0), host.array(0.5)))
        with host.plate("data", 3):
            z = host.sample("z", host.dist.Normal(w, host.array(1.0)))
            host.sample("y", host.dist.Normal(z, scale), obs=host.array([0.3, 1.2, -0.4]))

    return model, getattr(guides, kind)(model)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["subsample", "AutoNormal", "AutoMultivariateNormal", "AutoLowRankMultivariateNormal", "AutoDelta"])
def test_guides_of_many_kinds(host, kind, monkeypatch):
    monkeypatch.setattr(flowvi.guidance.candidates, "ROWS", ROWS[:2])
    pyro.clear_param_store()
    model, guide = subsampled(host) if kind == "subsample" else autoguided(host, kind)
    check = host.flow.check_program(model, guide, seconds=1)
    assert [one.verdict for one in check.sites] == ["no bias found"] * len(check.sites)
    advice = host.flow.recommend(model, guide, seconds=1, progress_bar=False)
    assert set(advice.estimators) == {one.site for one in check.sites}
    assert not advice.check.failed


def test_antithetic_runs_are_tried_where_an_exact_sum_takes_more(host):
    d, logits = host.dist, host.array([0.3, -0.4, 0.8])
    tried = {
        "a Bernoulli": (d.Bernoulli(logits=logits[0]), False),
        "several": (d.Bernoulli(logits=logits).to_event(1), True),
        "a Categorical": (d.Categorical(logits=logits), True),
        "one of two": (d.Categorical(logits=logits[:2]), False),
        "a Binomial": (d.Binomial(5, logits=logits[0]), True),
        "many values": (d.Binomial(500, logits=logits[0]), False),
        "a Poisson": (d.Poisson(logits[2]), False),
        "a Normal": (d.Normal(logits, 1.0), False),
    }
    found = {}
    for name, (fn, _) in tried.items():
        site = GuideSite("k", LR(), host_of(fn).target("k", fn, True), ())
        found[name] = DisARM() in candidates(site, 4)
    assert found == {name: expected for name, (_, expected) in tried.items()}


def slow_program(clock):
    """A program whose model takes 0.1 seconds by a clock."""

    def cost(x):
        clock[0] += 0.1
        pyro.sample("y", pyro.distributions.Normal(x, 1.0), obs=torch.tensor(1.1))

    return normal_program(HOSTS["pyro"], cost)


@pytest.mark.parametrize("seconds", [0.5, 5.0, 15.0])
def test_pyro_keeps_the_time_limit_where_a_program_is_slow(monkeypatch, seconds):
    clock = [0.0]
    for module in (flowvi.guidance, flowvi.pyro.guidance):
        monkeypatch.setattr(module, "perf_counter", lambda: clock[0])
    program = slow_program(clock)
    check = flowvi.pyro.check_program(*program, seconds=seconds)
    assert clock[0] < 1.2 * seconds + 10  # the first looks, and a batch
    (one,) = check.sites
    assert one.verdict == ("no bias found" if seconds > 10 else "not checked")
    assert ("no time" in str(check)) == (seconds < 10)
    clock[0] = 0.0
    advice = flowvi.pyro.recommend(*program, num_particles=(1, 4), seconds=seconds, progress_bar=False)
    assert clock[0] < 1.2 * seconds + 15  # the default, the check of a plate, the first looks, and two batches of each confirmation
    assert "check_program: no time to check 'x'; give more seconds" in str(advice)
    assert "there was no time to try another estimator" in advice.sites[0].reason


def test_numpyro_takes_smaller_batches_where_a_program_is_slow(monkeypatch):
    monkeypatch.setattr(flowvi.numpyro.guidance, "perf_counter", iter(range(100)).__next__)
    program = normal_program(HOSTS["numpyro"], lambda x: HOSTS["numpyro"].factor("cost", -(x**2)))
    bench = flowvi.numpyro.guidance.NumPyroBench(*program, (), {}, None, Auto(), None, None, 400.0)
    gradients = bench.gradients(Setting())(0).gradients  # a second for each batch, so that 64 gradients would leave time for four sites
    assert len(gradients) == bench.size == 64
    bench = flowvi.numpyro.guidance.NumPyroBench(*program, (), {}, None, Auto(), None, None, 10.0)
    assert len(bench.gradients(Setting())(0).gradients) == bench.size == 2


def test_pyro_particles_are_chosen_again_with_an_estimator_that_is_not_biased(monkeypatch):
    """The likelihood ratio needs several particles, for its baseline; the path had hardly any noise."""
    monkeypatch.setattr(flowvi.guidance.candidates, "ROWS", ROWS[:2])
    host = HOSTS["pyro"]
    cost = lambda x: host.factor("cost", host.math.where(x > 0.5, 3.0, 0.0) + x - 40.0)
    with PyroBench.opened(*normal_program(host, cost), (), {}, None, Auto(), 0) as bench, Watch(10.0, False) as clock:
        search = Search(bench, (1, 8), clock)
        search.compilations = [0.01, 3.0, 0.01]  # an estimator that learned for longer than there is time for now
        search.ban("x", 2.0)
    assert search.best.chosen == (("x", LR()),)
    assert search.best.num_particles == 8
    assert search.is_banned("x", RP())


def test_what_misses_jumps():
    from flowvi.guidance.candidates import misses_jumps

    assert [misses_jumps(e) for e in (RP(), AdaptiveFlow(), Flow(loc=lambda x, p: 1.0))] == [True] * 3
    assert [misses_jumps(e) for e in (LR(), Enumerate(), DisARM())] == [False] * 3
