"""Sites of the model that the host sums out."""

import pytest
from marginal_programs import PROGRAMS, introduction
from svi_programs import assert_same

import flowvi


def by_both(host, program, nesting=1, seed=0, **options):
    """Loss and gradients under the host's own objective and under flowvi's, from the same random numbers."""
    model, guide = program(host)
    if host.name == "pyro":
        options["max_plate_nesting"] = nesting
    ours = {name: options.pop(name) for name in ("estimators", "default", "entropy", "dependencies") if name in options}
    elbos = host.library.infer.TraceEnum_ELBO(**options), host.flow.TraceFlow_ELBO(**options, **ours)
    return host.evaluate(elbos, model, guide, seed)


def test_introduction(host):
    theirs, ours = by_both(host, introduction, 0, num_particles=3)
    assert_same(theirs, ours)


@pytest.mark.parametrize("name", [pytest.param(n, marks=[] if n == "nested" else pytest.mark.slow) for n in PROGRAMS])
def test_as_the_host(host, name):
    program, nesting = PROGRAMS[name]
    assert_same(*by_both(host, program, nesting))
