"""Calls of the public interface with the right and with wrong types; pyright checks this file (``make lint``), and nothing runs it.

A call that ends in ``# pyright: ignore[...]`` is wrong, and pyright has to report it: an ignore without a report is itself reported.
"""

from collections.abc import Mapping
from typing import Any, assert_type

import jax
import numpyro.distributions
import pyro.distributions
import pyro.infer
import torch
from matplotlib.figure import Figure
from pyro.optim import PyroOptim

import flowvi
import flowvi.numpyro
import flowvi.pyro
from flowvi import (
    LR,
    RP,
    AdaptiveFlow,
    Baseline,
    DisARM,
    Enumerate,
    FiniteDifference,
    Flow,
    GumbelSoftmax,
    HalfSpace,
    ImplicitRP,
    MeasureValued,
    Surrogate,
    check_estimator,
    fields,
    plot,
    proposals,
)
from flowvi.assignment import Description
from flowvi.checks import EstimatorReport
from flowvi.estimators import Estimator
from flowvi.fields import Field
from flowvi.guidance import ProgramCheck, Recommendation
from flowvi.report import GradientReport


def program(y: float = 0.0) -> None: ...


class Module(torch.nn.Module): ...


def estimators():
    LR(baseline="plate")
    LR(baseline="optimal", q=proposals.tempered(2.0))
    LR(baseline=Baseline(lambda x: x, 0.0), jumps=[0.0, lambda p: p.loc])
    LR(baseline="loo")  # pyright: ignore[reportArgumentType]
    LR(jumps=0.0)  # pyright: ignore[reportArgumentType]
    RP(control_variate="cubic", shared=True)
    RP(jumps=HalfSpace([1.0, 0.0]))
    RP(control_variate="cubik")  # pyright: ignore[reportArgumentType]
    RP(baseline="plate")  # pyright: ignore[reportCallIssue]
    ImplicitRP(lambda x, p: (x - p.loc) / p.scale, exact=False)
    ImplicitRP("cdf")  # pyright: ignore[reportArgumentType]
    Flow(loc=lambda x, p: 0.5, scale=lambda x, p: x)
    Flow(lambda x, p, dtheta: dtheta.loc, divergence="pathwise", baseline="plate")
    Flow(fields.scaled(0.5, fields.location_scale()))
    Flow(lambda x, p, dtheta: dtheta.loc, divergence="pathwize")  # pyright: ignore[reportArgumentType]
    Flow(loc=0.5)  # pyright: ignore[reportArgumentType]
    AdaptiveFlow(bumps=3, q="learned")
    AdaptiveFlow(q="learnt")  # pyright: ignore[reportArgumentType]
    Enumerate(lanes="random")
    Enumerate(lanes="one")  # pyright: ignore[reportArgumentType]
    Enumerate(3)  # pyright: ignore[reportArgumentType]
    FiniteDifference(downwards=True)
    FiniteDifference(lanes="one")  # pyright: ignore[reportArgumentType]
    MeasureValued(lanes="random")
    MeasureValued(lanes="one")  # pyright: ignore[reportArgumentType]
    DisARM(num_values=4)
    DisARM(num_values="4")  # pyright: ignore[reportArgumentType]
    GumbelSoftmax(0.5)
    GumbelSoftmax()  # pyright: ignore[reportCallIssue]
    Surrogate(lambda x: x, temperature=0.5)
    Surrogate()  # pyright: ignore[reportCallIssue]
    assert_type(fields.von_mises(), Field)
    flowvi.Reparam()  # pyright: ignore[reportAttributeAccessIssue]
    flowvi.numpyro.TraceELBO()  # pyright: ignore[reportAttributeAccessIssue]
    flowvi.pyro.TraceELBO()  # pyright: ignore[reportAttributeAccessIssue]
    assert_type(flowvi.check_estimator("Normal", RP(), raise_exception=False), flowvi.checks.EstimatorReport)


def in_numpyro():
    normal = numpyro.distributions.Normal(0.0, 1.0)
    elbo = flowvi.numpyro.TraceFlow_ELBO(4, jax.lax.map, estimators={"x": LR(), "y": RP()}, entropy="stl", baseline=None)
    flowvi.numpyro.TraceFlow_ELBO(estimators=lambda site: None, default=DisARM(), dependencies="plates", particles="fixed")
    flowvi.numpyro.TraceFlow_ELBO(num_particles="3")  # pyright: ignore[reportArgumentType]
    flowvi.numpyro.TraceFlow_ELBO(vectorize_particles="vmap")  # pyright: ignore[reportArgumentType]
    flowvi.numpyro.TraceFlow_ELBO(dependencies="grahp")  # pyright: ignore[reportArgumentType]
    flowvi.numpyro.TraceFlow_ELBO(entropy="exact")  # pyright: ignore[reportArgumentType]
    flowvi.numpyro.TraceFlow_ELBO(baseline="plate")  # pyright: ignore[reportArgumentType]
    flowvi.numpyro.TraceFlow_ELBO(particles="sobol")  # pyright: ignore[reportArgumentType]
    flowvi.numpyro.TraceFlow_ELBO(control_variate="diagonal")  # pyright: ignore[reportArgumentType]
    flowvi.numpyro.TraceFlow_ELBO(default=RP)  # pyright: ignore[reportArgumentType]
    flowvi.numpyro.TraceFlow_ELBO(estimators={"x": RP})  # pyright: ignore[reportArgumentType]
    flowvi.numpyro.TraceFlow_ELBO(max_plate_nesting=1)  # pyright: ignore[reportCallIssue]
    flowvi.numpyro.TraceFlow_RenyiELBO(0.5, gradient="dreg")
    flowvi.numpyro.TraceFlow_RenyiELBO(gradient="stl")  # pyright: ignore[reportArgumentType]
    flowvi.numpyro.Estimated(normal, LR())
    numpyro.infer.SVI(program, flowvi.numpyro.adaptive(program, elbo), numpyro.optim.Adam(0.01), elbo)
    flowvi.numpyro.adaptive(program)  # pyright: ignore[reportCallIssue]

    description = elbo.describe(program, program, 1.0)
    assert_type(description, Description)
    assert_type([site.estimator for site in description], list[Estimator])
    assert_type(description.evaluations, int)
    description.evaluation  # pyright: ignore[reportAttributeAccessIssue]  # noqa: B018

    advice = flowvi.numpyro.recommend(program, program, num_particles=(1, 4), seconds=10, rng_key=jax.random.key(0))
    assert_type(advice, Recommendation)
    assert_type(advice.estimators, Mapping[str, Estimator])
    flowvi.numpyro.TraceFlow_ELBO(estimators=advice.estimators, **advice.options)
    flowvi.numpyro.recommend(program)  # pyright: ignore[reportCallIssue]
    flowvi.numpyro.recommend(program, program, seconds="10")  # pyright: ignore[reportArgumentType]

    report = flowvi.numpyro.gradient_report(program, program, estimators={"LR": {"x": LR()}}, options={"num_particles": 4})
    assert_type(report, GradientReport)
    assert_type(report.parameters[0].std, float)
    assert_type(report.plot(), Figure)
    flowvi.numpyro.gradient_report(program, program, estimators="LR")  # pyright: ignore[reportArgumentType]
    assert_type(flowvi.numpyro.check_program(program, program, default=LR()), ProgramCheck)

    assert_type(check_estimator(normal, RP(), ["loc"]), EstimatorReport)
    check_estimator(normal, "RP")  # pyright: ignore[reportArgumentType]
    assert_type(plot.velocity(normal, {"LR": LR(), "RP": RP()}), Figure)


def in_pyro():
    normal = pyro.distributions.Normal(0.0, 1.0)
    elbo = flowvi.pyro.TraceFlow_ELBO(4, 1, estimators={"x": LR(), "y": RP()}, entropy="stl", baseline=None)
    flowvi.pyro.TraceFlow_ELBO(estimators=lambda site: None, default=DisARM(), dependencies="graph", particles="antithetic")
    flowvi.pyro.TraceFlow_ELBO(num_particles="3")  # pyright: ignore[reportArgumentType]
    flowvi.pyro.TraceFlow_ELBO(dependencies="grahp")  # pyright: ignore[reportArgumentType]
    flowvi.pyro.TraceFlow_ELBO(entropy="exact")  # pyright: ignore[reportArgumentType]
    flowvi.pyro.TraceFlow_ELBO(baseline="plate")  # pyright: ignore[reportArgumentType]
    flowvi.pyro.TraceFlow_ELBO(particles="sobol")  # pyright: ignore[reportArgumentType]
    flowvi.pyro.TraceFlow_ELBO(control_variate="diagonal")  # pyright: ignore[reportArgumentType]
    flowvi.pyro.TraceFlow_ELBO(default=RP)  # pyright: ignore[reportArgumentType]
    flowvi.pyro.TraceFlow_ELBO(estimators={"x": RP})  # pyright: ignore[reportArgumentType]
    flowvi.pyro.TraceFlow_ELBO(sum_sites=False)  # pyright: ignore[reportCallIssue]
    flowvi.pyro.TraceFlow_RenyiELBO(0.5, gradient="dreg")
    flowvi.pyro.TraceFlow_RenyiELBO(gradient="stl")  # pyright: ignore[reportArgumentType]
    flowvi.pyro.Estimated(normal, LR())
    flowvi.pyro.Estimated(normal, LR)  # pyright: ignore[reportArgumentType]

    optimizer = PyroOptim(torch.optim.Adam, {"lr": 0.01})
    pyro.infer.SVI(program, program, optimizer, elbo)
    svi = flowvi.pyro.CompiledSVI(program, program, optimizer, elbo, backend="eager")
    assert_type(svi.step(1.0), float)
    assert_type(svi.run(100, progress_bar=False), torch.Tensor)
    flowvi.pyro.CompiledSVI(program, program, optimizer, pyro.infer.Trace_ELBO())  # pyright: ignore[reportArgumentType]
    flowvi.pyro.CompiledSVI(program, program, optimizer, elbo, backend="C")  # pyright: ignore[reportArgumentType]
    flowvi.pyro.JitTraceFlow_ELBO(4, backend="eager", entropy="stl")
    flowvi.pyro.JitTraceFlow_ELBO(backend="C")  # pyright: ignore[reportArgumentType]
    elbo(Module(), Module()).parameters()
    assert_type(elbo.loss(program, program, 1.0), float)
    assert_type(elbo.differentiable_loss(program, program, 1.0), torch.Tensor)

    description = elbo.describe(program, program, 1.0)
    assert_type(description, Description)
    description.evaluation  # pyright: ignore[reportAttributeAccessIssue]  # noqa: B018

    advice = flowvi.pyro.recommend(program, program, num_particles=(1, 4), seconds=10, seed=1)
    assert_type(advice, Recommendation)
    assert_type(advice.options, Mapping[str, Any])
    flowvi.pyro.TraceFlow_ELBO(estimators=advice.estimators, **advice.options)
    flowvi.pyro.recommend(program)  # pyright: ignore[reportCallIssue]
    flowvi.pyro.recommend(program, program, seconds="10")  # pyright: ignore[reportArgumentType]

    assert_type(flowvi.pyro.gradient_report(program, program, estimators={"x": LR()}), GradientReport)
    flowvi.pyro.gradient_report(program, program, estimators="LR")  # pyright: ignore[reportArgumentType]
    assert_type(flowvi.pyro.check_program(program, program, default=LR()), ProgramCheck)
