"""Wrong arguments are refused where they are given."""

import numpy as np
import pyro
import pytest
import torch
from hosts import HOSTS

from flowvi import LR, RP, AdaptiveFlow, Flow, GumbelSoftmax, ImplicitRP
from flowvi.guidance import Search


def other(h):
    return HOSTS["pyro" if h.name == "numpyro" else "numpyro"]


def standard(h):
    return h.dist.Normal(h.array(0.0), h.array(1.0))


def bare(h):
    return lambda: None


REFUSED = {
    "no particle": (lambda h: h.flow.TraceFlow_ELBO(0), ValueError, "num_particles: expected an integer of 1 or more, found 0."),
    "half a particle": (lambda h: h.flow.TraceFlow_ELBO(1.5), TypeError, "num_particles: expected an integer .* found 1.5."),
    "estimators first": (lambda h: h.flow.TraceFlow_ELBO({"z": LR()}), TypeError, "num_particles: .*; did you mean estimators="),
    "no particle, bound": (lambda h: h.flow.TraceFlow_RenyiELBO(num_particles=0), ValueError, "num_particles: .* found 0"),
    "estimators first, bound": (lambda h: h.flow.TraceFlow_RenyiELBO({"z": LR()}), TypeError, "alpha: .*; did you mean estimators="),
    "the ELBO as a bound": (
        lambda h: h.flow.TraceFlow_RenyiELBO(1.0),
        ValueError,
        "alpha: expected a .* other than 1.*ELBO",
    ),
    "no particle, recommend": (
        lambda h: Search(None, (1, 0), None),
        ValueError,
        "num_particles: .* found 0",
    ),
    "q is a distribution": (lambda h: LR(q=standard(h)), TypeError, "LR: expected q=q.p., .* found Normal; write q=lambda p"),
    "q is text": (lambda h: RP(q="wide"), TypeError, "RP: expected q=q.p., a function of the distribution, found str"),
    "q, adaptive": (lambda h: AdaptiveFlow(q=standard(h)), TypeError, "AdaptiveFlow: expected q='learned', a function q.p. or None"),
    "a velocity": (lambda h: Flow("x"), TypeError, "Flow: expected a function velocity.x, p, dtheta. or a Field, found 'x'"),
    "a velocity of loc": (lambda h: Flow(loc=1.0), TypeError, "Flow: expected loc=u.x, p., a function, found 1.0; write loc=lambda"),
    "a jump": (lambda h: RP(jumps=["a"]), TypeError, r"RP: expected jumps=\[t, ...\] with numbers, .* found 'a'"),
    "the other host": (
        lambda h: h.flow.Estimated(standard(other(h)), LR()),
        TypeError,
        "Estimated: expected a distribution of .*, found .* of",
    ),
    "another library": (
        lambda h: h.flow.Estimated(torch.distributions.Normal(0.0, 1.0), LR()),
        TypeError,
        r"Estimated: expected a distribution of .*, found Normal\(loc: 0.0, scale: 1.0\) of torch.distributions.normal",
    ),
    "swapped": (lambda h: h.flow.Estimated(LR(), standard(h)), TypeError, "Estimated: .*; the distribution comes first"),
    "one sample": (lambda h: h.flow.gradient_report(bare(h), bare(h), num_samples=1), ValueError, "num_samples: expected 2 or .* 1"),
    "no model": (lambda h: h.flow.gradient_report(3, bare(h)), TypeError, "model: expected a function, found int"),
    "an option": (
        lambda h: h.flow.gradient_report(bare(h), bare(h), num_particles=5),
        TypeError,
        "num_particles: the model takes no such argument; options of the objective go in options={'num_particles': 5}",
    ),
    "a relaxation of a Normal": (
        lambda h: h.flow.TraceFlow_ELBO(default=GumbelSoftmax(0.5)).describe(lambda: normal(h), lambda: normal(h)),
        ValueError,
        "site 'z': GumbelSoftmax needs .* expected one of Bernoulli[^C]*, OneHotCategorical[^,]*, found Normal; use RP",
    ),
}


def normal(h):
    h.sample("z", standard(h))


def test_refused(host):
    for call, error, message in REFUSED.values():
        with pytest.raises(error, match=message):
            call(host)


FUNCTIONS = {
    "features": AdaptiveFlow(features=lambda p: p.loc[..., None]),
    "q": LR(q=lambda p: p.expand(p.loc[...].shape)),
    "velocity": Flow(lambda x, p, dtheta: p.scale[...] * dtheta.loc),
    "standardization": ImplicitRP(lambda x, p: (x - p.loc[...]) / p.scale),
    "a jump": RP(jumps=[lambda p: p.loc[...]]),
}


def test_functions_of_p_get_arrays(host):
    """Also where a program of NumPyro runs eagerly, with floats as parameters."""

    def guide():
        h, number = host, (lambda x: x) if host.name == "numpyro" else host.array
        for name, estimator in FUNCTIONS.items():
            h.sample(name, h.dist.Normal(h.param(f"loc {name}", number(0.3)), number(1.0)), infer={"estimator": estimator})

    def model():
        for name in FUNCTIONS:
            host.sample(name, host.dist.Normal(host.array(0.0), host.array(1.0)))

    elbo = host.flow.TraceFlow_ELBO()
    with_parameters = host.flow.adaptive(guide, elbo) if host.name == "numpyro" else guide
    assert [site.name for site in elbo.describe(model, with_parameters)] == list(FUNCTIONS)


def test_accepted(host):
    """Other integers than int, and a class that makes a distribution of p."""

    class Wider(host.dist.Normal):
        def __init__(self, p):
            super().__init__(p.loc, 2 * p.scale)

    elbo = host.flow.TraceFlow_ELBO(np.int64(2), estimators={"z": LR(q=Wider)})
    assert type(elbo.num_particles) is int
    assert host.flow.TraceFlow_RenyiELBO(num_particles=np.array(3)).num_particles == 3


class Shapeless(pyro.distributions.Distribution):
    def sample(self, *args, **kwargs):
        return torch.zeros(())

    def log_prob(self, x, *args, **kwargs):
        return torch.zeros(())


SHAPELESS = {"Normal": torch.distributions.Normal(0.0, 1.0), "Shapeless": Shapeless(), "type": pyro.distributions.Normal}


@pytest.mark.parametrize("name", SHAPELESS)
def test_pyro_a_site_without_a_distribution_of_pyro(name):
    fn, host = SHAPELESS[name], HOSTS["pyro"]
    with pytest.raises(
        TypeError, match=f"site 'z': expected a distribution of Pyro .*, found .*{'Normal' if name == 'type' else name}"
    ):
        host.flow.TraceFlow_ELBO().describe(lambda: normal_value(host), lambda: pyro.sample("z", fn))
    with pytest.raises(TypeError, match="Estimated: expected a distribution of Pyro, found"):
        host.flow.Estimated(fn, LR())


def test_a_gradient_that_is_not_finite(host):
    def model():
        host.factor("f", (normal_value(host) * 0.0) ** 0.5)  # whose derivative at 0 is infinite

    with pytest.raises(ValueError, match="recommend: expected a finite gradient"):
        host.flow.recommend(model, lambda: normal_value(host, host.param("m", host.array(1.0))), seconds=1, progress_bar=False)


def normal_value(h, loc=0.0):
    return h.sample("z", h.dist.Normal(h.array(0.0) + loc, h.array(1.0)))
