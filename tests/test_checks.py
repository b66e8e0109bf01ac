"""check_estimator: it names faults, and passes everything in flowvi."""

import math
import re

import jax
import numpy as np
import numpyro
import numpyro.distributions
import pyro.distributions
import pytest
import torch
from faults import FAULTS, dirichlet, exponential, gamma, normal, truncated, uniform, vector, von_mises
from field_rows import ROWS, VECTORS, normal_mixture
from hosts import HOSTS, each
from proposal_rows import ROWS as PROPOSALS
from proposal_rows import SYMMETRIC
from proposal_rows import distribution as made

import flowvi
from flowvi import LR, RP, AdaptiveFlow, Auto, Flow, ImplicitRP, fields, proposals
from flowvi.checks import EstimatorError, check_estimator
from flowvi.families import FAMILIES
from flowvi.numpyro.host import enable_x64

QUICK = {"num_samples": 5000}


SLOW_FAULTS = (
    "a divergence that does not see x",
    "q that vanishes where the field does not",
    "q whose sampler is not its density's",
    "a discrete q with lighter tails",
    "u through the ends of a Beta",
    "u through a face of the simplex",
    "u with a wrong seam",
    "a vector field of the wrong sign",
    "a velocity that is not pathwise",
    "a velocity that mixes a batch",
    "a mask that mixes coordinates",
    "an S with a wrong parameter",
)


@each("name", list(FAULTS), SLOW_FAULTS.__contains__, lambda name: FAULTS[name].hosts)
def test_fault(host, name):
    """Each fault fails its condition, with the right message."""
    fault = FAULTS[name]
    p = fault.distribution(host)
    arguments = p if isinstance(p, tuple) else (p, fault.parameters)
    with pytest.raises(EstimatorError, match="conditions fail") as error:
        check_estimator(arguments[0], fault.estimator(host), arguments[1], **QUICK)
    found = {c.name: c.found for c in error.value.report.failed}
    assert fault.condition in found
    assert f"- {fault.condition}: {found[fault.condition]}" in str(error.value)
    assert re.search(fault.message, found[fault.condition]), found[fault.condition]


# ---- what passes


def accepts(host, distribution, estimator, parameters=None, **options):
    report = check_estimator(distribution, estimator, parameters, **{**QUICK, **options})
    assert report.conditions
    return report


QUICK_FIELDS = ("Gamma concentration gamma_implicit()", "Uniform high uniform()", "Normal scale masked")


@each("name", list(ROWS), lambda name: name not in QUICK_FIELDS, lambda name: ROWS[name].hosts)
def test_fields_pass(host, name):
    row = ROWS[name]
    report = accepts(host, lambda t: row.distribution(host, t), Flow(row.field()), {"t": host.array(row.theta)})
    assert {"boundary flux", "mean of psi", "unbiased"} <= {c.name for c in report.conditions if c.holds}


@each("name", list(VECTORS), lambda name: name != "Dirichlet scaled")
def test_vector_fields_pass(host, name):
    distribution, field, _ = VECTORS[name]
    accepts(host, lambda t: distribution(host, t), Flow(field()), {"t": host.array(0.1)})


PURE = {  # the parameter whose score vanishes where the density does
    **{key: "loc" for key in PROPOSALS if key[1] in ("slice_by_mass 0", "slice_by_height 0", "optimal loc")},
    **{key: FAMILIES[key[0]].stretch.parameter for key in PROPOSALS if key[1] == "optimal stretch 0"},
}
LIGHT = {("Cauchy", "student_t"), ("Laplace", "slice_by_mass 0")}  # weights without a second moment
# Pure slices are of no use if no parameter shifts the family.
NO_USE = [key for key, parameter in PURE.items() if parameter == "loc" and key[0] not in (*SYMMETRIC, "Gumbel")]


@each("key", [key for key in PROPOSALS if key not in NO_USE], lambda key: key != ("Normal", "tempered 2.0"))
def test_proposals_pass(host, key):
    parameters = [PURE[key]] if key in PURE else None
    options = {**QUICK, "raise_exception": key not in LIGHT}
    report = check_estimator(made(host, key[0]), LR(q=PROPOSALS[key]), parameters, **options)
    held = {c.name for c in report.conditions if c.holds}
    assert {"support of q", "mean of psi", "unbiased"} <= held
    assert ("second moment" in held) == (key not in LIGHT)


def exp_transformed(h):
    return h.dist.TransformedDistribution(normal(h), [h.dist.transforms.ExpTransform()])


def affine(h):
    """An affine transform of a base without a reparameterized sampler, so that LR acts on the outermost value."""
    return h.dist.TransformedDistribution(von_mises(h), [h.dist.transforms.AffineTransform(1.0, 2.0)])


def stick_breaking(h):
    base = h.dist.Normal(h.array([0.3, 0.1]), h.array([0.7, 1.0])).to_event(1)
    return h.dist.TransformedDistribution(base, [h.dist.transforms.StickBreakingTransform()])


def half(x, p):
    return 0.5


def standardize(x, p):
    return (x - p.loc) / p.scale


PASSING = {
    "Normal LR": (normal, lambda h: LR()),
    "Normal RP": (normal, lambda h: RP()),
    "Normal Auto": (normal, lambda h: Auto()),
    "Normal half": (normal, lambda h: Flow(loc=half)),
    "Normal ImplicitRP": (normal, lambda h: ImplicitRP()),
    "Normal ImplicitRP(S)": (normal, lambda h: ImplicitRP(standardize)),
    "Normal RP(q)": (normal, lambda h: RP(proposals.student_t(5.0))),
    "Normal with a small scale": (lambda h: h.dist.Normal(h.array(1000.0), h.array(1e-3)), lambda h: LR()),
    "Laplace ImplicitRP(q)": (
        lambda h: h.dist.Laplace(h.array(0.3), h.array(1.2)),
        lambda h: ImplicitRP(q=lambda p: h.dist.Laplace(p.loc, 1.3 * p.scale)),
    ),
    "Uniform RP": (uniform, lambda h: RP()),
    "Uniform ImplicitRP": (uniform, lambda h: ImplicitRP()),
    "Exponential ImplicitRP": (exponential, lambda h: ImplicitRP()),
    "Gamma LR": (gamma, lambda h: LR()),
    "Gamma RP": (gamma, lambda h: RP()),
    "Gamma with a small concentration": (lambda h: gamma(h, 0.1), lambda h: Flow(fields.gamma_implicit())),
    "Gamma generalised": (gamma, lambda h: ImplicitRP(lambda x, p: (x * p.rate) ** 0.5, exact=False)),
    "VonMises Auto": (von_mises, lambda h: Auto()),
    "Cauchy LR": (lambda h: h.dist.Cauchy(h.array(0.3), h.array(1.2)), lambda h: LR()),
    "Beta LR": (lambda h: h.dist.Beta(h.array(1.6), h.array(0.7)), lambda h: LR()),
    "Dirichlet LR": (dirichlet, lambda h: LR()),
    "Dirichlet RP": (dirichlet, lambda h: RP()),
    "Dirichlet with small concentrations": (lambda h: h.dist.Dirichlet(h.array([0.4, 0.3, 0.2])), lambda h: Flow(fields.dirichlet())),
    "MultivariateNormal LR": (vector, lambda h: LR()),
    "MultivariateNormal RP": (vector, lambda h: RP()),
    "MultivariateNormal LR(q)": (vector, lambda h: LR(q=proposals.tempered(1.5))),
    "MultivariateNormal covariance": (
        lambda h: h.dist.MultivariateNormal(h.array([0.3, -0.2]), covariance_matrix=h.array([[0.6, 0.1], [0.1, 0.8]])),
        lambda h: Flow(fields.multivariate_normal()),
    ),
    "a mixture": (lambda h: normal_mixture(h, h.array(0.3), h.array(0.1)), lambda h: Flow(fields.mixture())),
    "a batch": (lambda h: h.dist.Normal(h.array([0.3, 1.0]), h.array(1.2)).to_event(1), lambda h: Flow(fields.location_scale())),
    "a transform": (exp_transformed, lambda h: Flow(loc=half)),
    "LR through a transform": (exp_transformed, lambda h: LR()),
    "Auto through a transform": (affine, lambda h: Auto()),
    "an event of a transform": (stick_breaking, lambda h: Flow(loc=half)),
    "RP through a transform": (stick_breaking, lambda h: RP()),
    "a flow that is learned": (lambda h: h.dist.Normal(h.array(0.3), h.array(1.2)), lambda h: AdaptiveFlow(start=0.4, q="learned")),
    "a control variate": (vector, lambda h: RP(control_variate="cubic")),
    "Bernoulli": (lambda h: h.dist.Bernoulli(logits=h.array(0.4)), lambda h: LR()),
    "Categorical": (lambda h: h.dist.Categorical(probs=h.array([0.4, 0.2, 0.4])), lambda h: LR()),
    "Poisson": (lambda h: h.dist.Poisson(h.array(2.0)), lambda h: LR(q=proposals.tempered(2.0))),
    "Binomial": (lambda h: h.dist.Binomial(5, h.array(0.3)), lambda h: LR()),
    "Multinomial": (lambda h: h.dist.Multinomial(4, h.array([0.3, 0.2, 0.5])), lambda h: LR()),
}
QUICK_PASSING = ("Normal RP", "Dirichlet LR", "MultivariateNormal RP", "a batch", "a flow that is learned", "Categorical")


@each("name", list(PASSING), lambda name: name not in QUICK_PASSING)
def test_passes(host, name):
    distribution, estimator = PASSING[name]
    accepts(host, distribution(host), estimator(host))


def test_a_truncated_normal_with_constant_bounds():
    """Bounds that are not parameters do not move, so LR is right."""
    host = HOSTS["numpyro"]
    accepts(host, truncated(host), LR(), ("loc", "scale"))
    with pytest.raises(EstimatorError, match="requirements: LR is biased where the support moves"):
        check_estimator(truncated(host), LR(), **QUICK)


def test_a_sampler_of_torch_that_is_wrong():
    """Draws of torch's LKJCholesky do not follow its density: at concentration 1.5 the mean of its score is -0.22."""
    with pytest.raises(EstimatorError, match="mean of psi: parameter concentration: .* not that of the sampler"):
        check_estimator(pyro.distributions.LKJCholesky(3, torch.tensor(1.5)), LR())


@pytest.mark.slow
def test_the_same_family_in_numpyro_is_right():
    accepts(HOSTS["numpyro"], numpyro.distributions.LKJCholesky(3, 1.5), LR())


# ---- what is returned and raised


def test_the_report(host):
    report = check_estimator(von_mises(host), Flow(fields.von_mises()), **QUICK)
    lines = str(report).splitlines()
    assert lines[0] == "Flow(velocity=fields.von_mises()) at VonMises(loc, concentration)"
    assert [c.name for c in report.conditions] == [line.split("  ")[0] for line in lines[1:]]
    assert any(line.startswith("boundary flux") and "holds" in line and "periodic costs only" in line for line in lines)
    assert not report.failed


def test_all_failures_are_told(host):
    wrong = Flow(
        lambda x, p, dtheta: 0.1 * x**2 * dtheta.loc, divergence=lambda x, p, dtheta: 0 * x, q=lambda p: host.dist.Normal(p.loc, 0.6)
    )
    report = check_estimator(normal(host), wrong, ("loc",), raise_exception=False, **QUICK)
    assert {c.name for c in report.failed} >= {"divergence", "second moment", "unbiased"}
    with pytest.raises(AssertionError) as error:
        check_estimator(normal(host), wrong, ("loc",), **QUICK)
    assert all(f"- {c.name}: " in str(error.value) for c in report.failed)
    assert str(error.value).startswith("Flow(velocity=Field(<lambda>, <lambda>), q=<lambda>) at Normal(loc): ")


def test_nothing_is_left_behind(host):
    """The check restores the precision, the validation and the generator of the host."""
    torch.set_default_dtype(torch.float32)
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    with enable_x64(False):
        narrow = {"loc": np.float32(0.3), "scale": np.float32(1.2)} if host.name == "numpyro" else {"loc": 0.3, "scale": 1.2}
        report = check_estimator(host.dist.Normal(**narrow), Flow(loc=half), **QUICK)
        assert numpyro.distributions.Normal(0.0, 1.0).sample(jax.random.key(0)).dtype == np.float32
    assert not report.failed
    assert torch.get_default_dtype() == torch.float32
    assert torch.equal(torch.rand(2), expected)
    assert pyro.infer.util.is_validation_enabled()
    assert numpyro.distributions.Distribution._validate_args == numpyro.distributions.Normal(0.0, 1.0)._validate_args


def test_arguments(host):
    with pytest.raises(TypeError, match="expected an estimator such as flowvi.LR.., found 3"):
        check_estimator(normal(host), 3)
    with pytest.raises(TypeError, match=r"Normal has no parameter \['mean'\]; its parameters are: loc, scale"):
        check_estimator(normal(host), LR(), ["mean"])
    with pytest.raises(TypeError, match="a function with its arguments by name"):
        check_estimator(lambda loc: host.dist.Normal(loc, 1.0), LR())
    with pytest.raises(TypeError, match="expected a distribution of Pyro or NumPyro, found float"):
        check_estimator(lambda loc: loc, LR(), {"loc": 0.3})
    with pytest.raises(TypeError, match="has no parameter to check"):
        check_estimator(normal(host), LR(), [])


def test_a_distribution_that_cannot_be_built_again(host):
    class Odd(type(normal(host))):
        def __init__(self, loc, unknown):
            super().__init__(loc, host.array(1.0))

    with pytest.raises(TypeError, match="Odd cannot be built again from loc .*; give a function of its parameters"):
        check_estimator(Odd(host.array(0.3), None), LR())

    class Doubled(type(normal(host))):
        def __init__(self, loc, scale, validate_args=None):
            super().__init__(2 * loc, scale, validate_args=validate_args)

        def expand(self, batch_shape, _instance=None):
            return host.dist.Normal(self.loc, self.scale).expand(batch_shape)

    with pytest.raises(TypeError, match="Doubled cannot be built again from its parameters, because its loc changes"):
        check_estimator(Doubled(host.array(0.3), host.array(1.0)), LR())
    accepts(host, lambda loc: Doubled(loc, host.array(1.0)), LR(), {"loc": host.array(0.3)})


def test_it_is_exported():
    assert flowvi.check_estimator is check_estimator
    assert math.isclose(check_estimator.__kwdefaults__["tolerance"], 1e-4)
