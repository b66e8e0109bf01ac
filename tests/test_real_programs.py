"""Problems found in real programs, in both hosts."""

import numpy as np
import pytest
from hosts import HOSTS

from flowvi import LR, RP


def test_a_site_that_is_observed_in_some_batches(host):
    """A site may be observed in some batches, like the label of a semi-supervised autoencoder; its estimator applies in the others."""

    def model(y=None):
        y = host.sample("y", host.dist.Bernoulli(host.array(0.3)), obs=y)
        host.sample("x", host.dist.Normal(2.0 * y, host.array(1.0)), obs=host.array(1.2))

    def guide(y=None):
        if y is None:
            host.sample("y", host.dist.Bernoulli(host.array(0.4)))

    elbo = host.flow.TraceFlow_ELBO(estimators={"y": LR()})
    label = host.array(1.0)
    assert [site.name for site in elbo.describe(model, guide)] == ["y"]
    assert len(elbo.describe(model, guide, label)) == 0
    with pytest.raises(ValueError, match="site 'w': estimators names no site"):
        host.flow.TraceFlow_ELBO(estimators={"w": LR()}).describe(model, guide, label)


@pytest.mark.parametrize("kind", ["the same array", "equal arrays", "numbers"])
def test_closed_forms_under_equal_masks(host, kind):
    """With equal masks that leave two of three rows, KL(Normal(1, 0.5) || Normal(0, 1)) is 4 (log 2 + 1.25 / 2 - 1 / 2)."""
    mask = host.array([[1.0, 1.0], [0.0, 0.0], [1.0, 1.0]]) > 0

    def of(loc, scale):
        fn = host.dist.Normal(host.array(np.full((3, 2), loc)), host.array(scale))
        one = mask if kind == "the same array" else host.array([[1.0, 1.0], [0.0, 0.0], [1.0, 1.0]]) > 0
        return fn.mask(True).to_event(2) if kind == "numbers" else fn.mask(one).to_event(2)

    exact = (6 if kind == "numbers" else 4) * (np.log(2) + 1.25 / 2 - 0.5)
    elbo = host.flow.TraceFlow_ELBO(entropy="analytic", default=RP())
    losses = [
        float(host.loss(elbo, lambda: host.sample("x", of(0.0, 1.0)), lambda: host.sample("x", of(1.0, 0.5)), seed=seed))
        for seed in range(2)
    ]
    np.testing.assert_allclose(losses, exact, rtol=1e-10)


def test_pyro_a_baseline_of_its_own_under_a_bound():
    h = HOSTS["pyro"]

    def guide():
        h.sample("k", h.dist.Bernoulli(h.array(0.4)), infer={"baseline": {"use_decaying_avg_baseline": True}})

    def model():
        h.sample("k", h.dist.Bernoulli(h.array(0.5)))

    with pytest.raises(ValueError, match="site 'k': expected no infer\\['baseline'\\] under a Rényi bound"):
        h.flow.TraceFlow_RenyiELBO().loss(model, guide)
