"""A repr pastes back as code, and an error says where to read more."""

import copy
import pickle
import re
from pathlib import Path

import numpy as np
import pyro.distributions
import pytest

import flowvi
import flowvi.checks
import flowvi.pyro
from flowvi import (
    LR,
    RP,
    AdaptiveFlow,
    Auto,
    DisARM,
    Enumerate,
    Flow,
    GumbelSoftmax,
    HalfSpace,
    ImplicitRP,
    LevelSet,
    MeasureValued,
    ReinMax,
    fields,
    proposals,
    refusals,
)
from flowvi.assignment import Description, SiteDescription
from flowvi.checks import report

NAMES = {**{name: getattr(flowvi, name) for name in flowvi.__all__}, "Description": Description, "SiteDescription": SiteDescription}


def velocity(x, p):
    return x


ESTIMATORS = [
    *(
        Auto(),
        LR(),
        LR(baseline="plate"),
        LR(baseline="optimal"),
        LR(q=velocity),
        RP(),
        RP(control_variate="cubic"),
        RP(jumps=[1.0, 2.0]),
    ),
    *(RP(jumps=HalfSpace([1.0, 2.0], 0.5)), ImplicitRP(standardization=velocity), Flow(velocity), AdaptiveFlow(bumps=0, q="learned")),
    *(Enumerate(lanes="random"), MeasureValued(), DisARM(4), GumbelSoftmax(0.5), RP(jumps=LevelSet(velocity, centre=0.0))),
]


@pytest.mark.parametrize("estimator", ESTIMATORS, ids=repr)
def test_estimators(estimator):
    assert eval(repr(estimator), {**NAMES, "velocity": velocity}) == estimator


NAMED = [  # never equal, because each holds new functions
    *(Flow(fields.von_mises()), Flow(loc=velocity), Flow(fields.masked(velocity, fields.location_scale())), Flow(fields.dirichlet())),
    *(Flow(fields.summed(fields.location_scale(), fields.scaled(0.5, fields.location_scale()))), Flow(fields.mixture())),
    *(Flow(fields.multivariate_normal()), Flow(fields.implicit()), LR(q=proposals.tempered(2.0)), LR(q=proposals.student_t(3.0))),
    *(LR(q=proposals.slice_by_height()), RP(q=proposals.defensive(proposals.tempered(2.0), 0.1)), Flow(fields.von_mises(cut=1.0))),
]


@pytest.mark.parametrize("estimator", NAMED, ids=repr)
def test_fields_and_proposals(estimator):
    again = eval(repr(estimator), {**NAMES, "velocity": velocity})
    assert type(again) is type(estimator)
    assert repr(again) == repr(estimator)


@pytest.mark.parametrize("name", ["TraceFlow_ELBO", "TraceFlow_RenyiELBO"])
def test_objectives(host, name):
    make = getattr(host.flow, name)
    names = {**NAMES, name: make}
    assert repr(make()) == f"{name}()"
    shown = f"{name}(0.5, num_particles=4, estimators={{'k': LR(), 'x': RP(jumps=(1.0,))}}, baseline=None)"
    shown = shown.replace("0.5, ", "") if name == "TraceFlow_ELBO" else shown
    objective = eval(shown, names)
    assert objective.num_particles == 4
    for one in (objective, copy.deepcopy(objective), pickle.loads(pickle.dumps(objective))):
        assert repr(one) == shown


def test_descriptions(host):
    def normal():
        host.sample("x", host.dist.Normal(host.array(0.3), 1.0))

    found = host.flow.TraceFlow_ELBO(estimators={"x": LR()}).describe(normal, normal)
    again = eval(repr(found), NAMES)
    assert again == found
    assert str(again) == str(found)


def test_pages():
    """Every page that an error names exists, with its section."""
    pages = [report.PAGE, *(page for page in vars(refusals).values() if isinstance(page, str) and page.startswith("docs/"))]
    assert len(pages) == 8
    for page, _, anchor in (page.partition("#") for page in pages):
        text = (Path(__file__).parent.parent / page).read_text()
        headings = {title.lower().replace(",", "").replace(" ", "-") for title in re.findall(r"^#+ (.+)$", text, re.MULTILINE)}
        assert not anchor or anchor in headings


def test_a_failed_check_names_its_page():
    with pytest.raises(flowvi.checks.EstimatorError) as error:
        flowvi.check_estimator(pyro.distributions.Exponential(1.0), Flow(rate=lambda x, p: 1.0 + 0 * x), num_samples=100)
    assert error.value.__notes__ == [f"What each condition means: {report.PAGE}"]


@pytest.mark.parametrize(
    ("estimator", "family", "page"), [(RP(), "Bernoulli", refusals.PAGE), (ReinMax(), "Exponential", refusals.RELAXATIONS)]
)
def test_a_refusal_names_its_page(host, estimator, family, page):
    elbo = host.flow.TraceFlow_ELBO(estimators={"x": estimator})

    def program():
        host.sample("x", getattr(host.dist, family)(host.array(np.array(0.3))))

    with pytest.raises(ValueError, match="site 'x'") as error:
        elbo.describe(program, program)
    refusal = error.value.__cause__ or error.value  # Pyro raises it again with the shapes of its trace
    assert refusal.__notes__ == [f"The reasons are in flowvi's repository: {page}"]
