"""``entropy="stl"``: no variance at the optimum, unbiased elsewhere."""

import numpy as np
import pytest
from hosts import Program, expected_under
from kinds import KINDS


def hierarchy(theta):
    """The model is the guide at theta = 0: x1 ~ N(0, 1), a plate of x2 ~ N(x1, 1), nothing observed."""

    def part(h, a, b, c, d):
        x1 = h.sample("x1", h.dist.Normal(a, h.math.exp(b)))
        with h.plate("n", 2):
            h.sample("x2", h.dist.Normal(x1 + c, h.math.exp(d)))

    return Program(lambda h, t: part(h, *t), lambda h, t: part(h, *(0 * p for p in t)), theta, plates=1)


def test_sticking_the_landing_has_no_variance_at_the_optimum(host):
    """At the optimum no variance is left. This needs the paths of parents through a site's own parameters."""
    samples = host.gradients(hierarchy((0.0, 0.0, 0.0, 0.0)), 50, entropy="stl")
    np.testing.assert_allclose(samples, 0.0, atol=1e-12)
    assert host.gradients(hierarchy((0.0, 0.0, 0.0, 0.0)), 50).std() > 0.1  # "full" has variance
    assert host.gradients(hierarchy((0.3, 0.2, -0.1, 0.1)), 50, entropy="stl").std() > 0.1


@pytest.mark.parametrize("kind", ["LR", "RP", "half", "RP, q"])
def test_sticking_the_landing_is_unbiased(host, kind):
    """Away from the optimum the mean is the gradient of -KL in a, b, c and d."""
    a, b, c, d = theta = (0.3, 0.2, -0.1, 0.1)
    exact = [-a, 1 - np.exp(2 * b), -2 * c, 2 * (1 - np.exp(2 * d))]
    expected_under(hierarchy(theta), host, exact, estimators={"x1": KINDS[kind], "x2": KINDS[kind]}, entropy="stl")
