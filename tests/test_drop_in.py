"""TraceFlow_ELBO as the loss of the hosts' SVI: if every site is reparameterized, it equals Trace_ELBO to the last digit."""

import numpy as np
import pytest
from hosts import HOSTS, Program
from svi_programs import (
    MIXED,
    OPTIONS,
    PROGRAMS,
    assert_same,
    both,
    fit,
    mixed,
    observe,
)

from flowvi import LR


def pairs():
    """Every program with one particle and with four, and one program with four particles in every way to run them."""
    for name, options in OPTIONS.items():
        for program in PROGRAMS:
            for option in options if program == "plain" else ("one", "four"):
                yield pytest.param(HOSTS[name], program, options[option], id=f"{name}-{program}-{option}".replace(" ", "_"))


@pytest.mark.parametrize(("h", "program", "options"), list(pairs()))
def test_the_same_as_trace_elbo(h, program, options):
    assert_same(*both(h, PROGRAMS[program], **options))


def test_subclass(host):
    assert issubclass(host.flow.TraceFlow_ELBO, host.library.infer.Trace_ELBO)
    assert isinstance(host.flow.TraceFlow_ELBO(), host.library.infer.elbo.ELBO)


def test_svi_takes_the_same_steps(host):
    theirs, ours = (
        fit(host, PROGRAMS["subsampled plate"], elbo(2), 5) for elbo in (host.library.infer.Trace_ELBO, host.flow.TraceFlow_ELBO)
    )
    assert_same(theirs, ours)


def test_a_mixed_program_trains_and_is_deterministic(host):
    losses, params = fit(host, MIXED, mixed(host, num_particles=4), 200)
    assert_same(losses[:5], fit(host, MIXED, mixed(host, num_particles=4), 5)[0], rtol=0)
    assert np.isfinite(losses).all()
    assert losses[-50:].mean() < losses[:20].mean() - 1
    assert params["logit"] > 0.5
    assert params["a"] > -0.8


def test_lr_alone_trains(host):
    losses, params = fit(host, MIXED, host.flow.TraceFlow_ELBO(num_particles=8, default=LR()), 100)
    assert losses[-20:].mean() < losses[:10].mean() - 1
    assert params["logit"] > 0.5


def test_a_site_that_is_said_not_to_be_enumerated(host):
    def gradients(infer):
        def guide(h, t):
            h.sample("k", h.dist.Bernoulli(logits=t[0]), infer=infer)

        def model(h, t):
            observe(h, h.sample("k", h.dist.Bernoulli(h.array(0.5))))

        return host.gradients(Program(guide, model, (0.3,)), 3)

    assert_same(gradients({}), gradients({"enumerate": None}), rtol=0)  # Pyro's config_enumerate(default=None) writes this
