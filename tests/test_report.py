"""``gradient_report``: its numbers against exact ones, in both hosts."""

import math

import matplotlib
import numpy as np
import pyro
import pytest
import torch
from cases import EXACT
from hosts import HOSTS, slow_in_pyro

from flowvi import LR, RP, Flow
from flowvi.assignment import Description, SiteDescription
from flowvi.report import GradientReport, Measured, ParameterGradient, by_label

matplotlib.use("agg")
CASE = EXACT["elbo-normal-normal-off"]
N = 800


@pytest.fixture
def program(host):
    """Guide N(m, exp(ls)), prior N(0, 1), observation N(x, 0.8) = 1.1, and a second site on which nothing depends."""
    m, log_scale = CASE["theta"]["value"]
    pyro.clear_param_store()

    def model():
        x = host.sample("x", host.dist.Normal(host.array(0.0), host.array(1.0)))
        host.sample("k", host.dist.Bernoulli(host.array(0.5)))
        host.sample("y", host.dist.Normal(x, host.array(0.8)), obs=host.array(1.1))

    def guide():
        scale = host.param("scale", host.array(math.exp(log_scale)), constraint=host.dist.constraints.positive)
        host.sample("x", host.dist.Normal(host.param("m", host.array(m)), scale))
        host.sample("k", host.dist.Bernoulli(logits=host.param("logits", host.array(0.0))))

    return model, guide


def report(host, program, **options):
    return host.flow.gradient_report(*program, **options)


@slow_in_pyro
def test_against_the_exact_variances(host, program):
    wide = lambda p: host.dist.Normal(p.loc, 1.3 * p.scale)
    candidates = {
        "LR total": {"x": LR()},
        "RP total": {"x": RP()},
        "LR wide": {"x": LR(q=wide)},
    }
    found = report(host, program, estimators=candidates, num_samples=N, options={"dependencies": "graph"})
    records = {(r.candidate, r.parameter): r for r in found.parameters}
    for label, row in (("LR total", 0), ("LR wide", 1), ("RP total", 8)):
        exact = CASE["estimators"][row]
        assert exact["estimator"].split()[0] == label.split()[0]
        for i, name in enumerate(("m", "scale")):  # the unconstrained scale is its log in both hosts
            r = records[label, name]
            assert r.sites == ("x",)
            assert abs(-r.mean - CASE["gradient"][i]) < 5 * math.sqrt(exact["variance"][i] / N)
            assert abs(r.variance / exact["variance"][i] - 1) < 0.5
        assert records[label, "logits"].sites == ("k",)
        assert math.isclose(sum(r.share for r in found.parameters if r.candidate == label), 1)
    w = {label: weights["x"] for label, weights in found.effective_samples.items()}
    assert w["LR total"] == w["RP total"] == 1
    np.testing.assert_allclose(w["LR wide"], 1 / (1.3**2 / math.sqrt(2 * 1.3**2 - 1)), rtol=0.05)  # 1 / E_q[w^2]
    assert all(s > 0 for s in found.seconds.values())


def test_what_is_learned_is_no_parameter_of_the_report(host, program):
    found = report(host, program, estimators={"x": RP(control_variate="diagonal")}, num_samples=20)
    assert {r.parameter for r in found.parameters} == {"m", "scale", "logits"}


def test_one_candidate(host, program):
    (plain,) = {r.candidate for r in report(host, program, num_samples=20).parameters}
    assert plain == ""
    found = report(host, program, estimators={"x": Flow(loc=lambda x, p: 0.5)}, num_samples=20)
    assert "Flow(velocity=fields.per_element(loc=<lambda>))" in str(found)
    assert {r.candidate for r in found.parameters} == {""}


def test_ways_to_show_it(host, program, capsys):
    found = report(host, program, estimators={"a": {"x": LR()}, "b": {"x": RP()}}, num_samples=50, progress_bar=True)
    assert capsys.readouterr().err.count("gradients") >= 2
    frame = found.to_pandas()
    assert list(frame.columns[:4]) == ["candidate", "parameter", "site", "estimator"]
    assert len(frame) == 6
    assert found.to_rich().row_count == 6
    assert len(str(found).splitlines()) == 7
    figure = found.plot()
    assert [text.get_text() for text in figure.axes[0].get_legend().get_texts()] == ["a", "b"]
    matplotlib.pyplot.close(figure)


def test_records_have_the_shape_of_the_parameter(host):
    """Records have the shape of the parameter; here the gradient in w is the draw itself, Normal(w, 1)."""
    w = 10.0 * np.arange(6.0).reshape(2, 3)

    def model():
        host.sample("x", host.dist.Normal(host.array(np.zeros((2, 3))), host.array(1.0)).to_event(2))

    def guide():
        host.sample("x", host.dist.Normal(host.param("w", host.array(w)), host.array(1.0)).to_event(2))

    (record,) = report(host, (model, guide), num_samples=100).parameters
    assert record.mean.shape == record.variance.shape == (2, 3)
    assert np.abs(record.mean - w).max() < 5 / math.sqrt(100)
    assert np.abs(record.mean - w.reshape(3, 2).T).max() > 5 / math.sqrt(100)


def test_as_a_dataset():
    """The Dataset has two candidates, a matrix and a number. An element without noise has an infinite ratio."""
    pytest.importorskip("xarray", reason="an optional dependency, in the extra 'report'")
    numbers = np.random.default_rng(0).normal(size=(2, 2, 2, 3)) ** 2
    numbers[0, 1, 0, 0] = 0.0
    records = [
        ParameterGradient(label, name, sites, (LR(), RP())[: len(sites)], mean, variance, 0.5, 10)
        for label, (means, variances) in zip(("a", "b"), numbers, strict=True)
        for name, sites, mean, variance in (("w", ("x",), means, variances), ("m", ("x", "k"), means[1, 2], variances[1, 2]))
    ]
    found = GradientReport(tuple(records), {"a": {"x": 0.25, "k": 1.0}, "b": {"x": 0.5, "k": 1.0}}, {"a": 1e-3, "b": 2e-3}, 10)
    data = found.to_xarray()
    assert data["w"].dims == ("candidate", "statistic", "w_dim_0", "w_dim_1")
    assert data["m"].attrs["sites"] == ["x", "k"]
    for r in records:
        at = data[r.parameter].sel(candidate=r.candidate)
        np.testing.assert_array_equal(at.sel(statistic="mean"), r.mean)
        np.testing.assert_array_equal(at.sel(statistic="std"), np.sqrt(r.variance))
        assert float(at["seconds"]) == found.seconds[r.candidate]
        if r.parameter == "m":  # the ratio of a number's only element is that of the record
            np.testing.assert_allclose(at.sel(statistic="snr"), r.snr)
    assert data["w"].sel(candidate="a", statistic="snr", w_dim_0=0, w_dim_1=0) == np.inf
    assert data["effective_samples"].sel(candidate="b", site="x") == 0.5


def test_parameters_with_the_names_of_dims_and_coordinates():
    """They keep their names, and dims and coordinates get other ones."""
    names = ("candidate", "statistic", "site", "seconds", "effective_samples", "site_", "w", "w_dim_0")
    records = [ParameterGradient("a", name, ("x",), (RP(),), np.arange(3.0) + i, np.ones(3), 0.1, 10) for i, name in enumerate(names)]
    data = GradientReport(tuple(records), {"a": {"x": 0.5}}, {"a": 2e-5}, 10).to_xarray()
    assert set(data.data_vars) == set(names)
    for i, name in enumerate(names):
        found = data[name].sel(candidate_="a", statistic_="mean")
        np.testing.assert_array_equal(found, np.arange(3.0) + i)
    assert data["w"].dims == ("candidate_", "statistic_", "w_dim_0_")
    assert data["effective_samples_"].sel(candidate_="a", site__="x") == 0.5
    assert float(data["seconds_"][0]) == 2e-5


def test_labels():
    assert by_label(None) == {"": None}
    assert by_label({"x": LR()}) == {"": {"x": LR()}}
    assert by_label({"one": {"x": LR()}, "two": None}) == {"one": {"x": LR()}, "two": None}


def test_pyro_a_loss_that_is_nan():
    """Its gradient may be finite."""
    host = HOSTS["pyro"]

    def model():
        host.factor("cost", torch.log(host.sample("x", host.dist.Normal(0.0, 1.0))))

    def guide():
        host.sample("x", host.dist.Normal(host.param("m", torch.tensor(0.1)), 1.0))

    with pyro.validation_enabled(False), pytest.warns(UserWarning, match="NaN: loss"):
        report = host.flow.gradient_report(model, guide, num_samples=9)
    assert np.isfinite(report.parameters[0].mean)


def test_effective_samples():
    """Kish's (sum w)^2 / sum w^2 as a fraction: 1 for equal weights, 1 / n for a single weight among n."""
    sites = [SiteDescription(name, LR(), "", "", (), ()) for name in ("equal", "one", "plain")]
    measured = Measured(Description(sites), {})
    measured.add({}, {"equal": np.zeros((4, 2)), "one": np.array([0.0, -np.inf, -np.inf, -np.inf])})
    assert measured.effective_samples() == {"equal": 1.0, "one": 0.25, "plain": 1.0}
