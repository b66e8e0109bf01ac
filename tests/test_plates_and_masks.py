"""Plates, scales, masks, and factors that are scores. test_host_bugs.py has more of them."""

import numpy as np
import pyro
import pytest
import torch
from hosts import HOSTS, Program, expected_under
from kinds import KINDS, half_velocity, wide

from flowvi import LR, RP, Flow


def test_a_cost_outside_the_plate_carries_every_weight(host):
    """At E[(z_1 + z_2)^2] under N(m, 1)^2, each element's score multiplies the joint cost and the joint weight."""

    def site(h, t):
        return h.sample("z", h.dist.Normal(t[0] + h.array([0.0, 0.0]), h.array(1.0)).mask(False))

    def guide(h, t):
        with h.plate("n", 2):
            site(h, t)

    def model(h, t):
        with h.plate("n", 2):
            z = site(h, t)
        h.factor("f", h.over_plate(z) ** 2)

    exact = 2 * 2 * (2 * 0.7)
    for estimator in (LR(q=wide), RP(wide), Flow(half_velocity, q=wide)):
        expected_under(Program(guide, model, (0.7,), plates=1), host, exact, estimators={"z": estimator})


@pytest.mark.parametrize("kind", ["LR", "RP", "half", "LR, q"])
def test_a_scale_for_each_element(host, kind):
    """With a scale c_i for each element, d/dm of -sum_i c_i KL(N(m, 1) || N(0, 1)) is -m sum_i c_i."""

    def part(h, loc):
        with h.plate("n", 3), h.scale(h.array([1.0, 2.0, 4.0])):
            h.sample("x", h.dist.Normal(loc + h.array([0.0, 0.0, 0.0]), h.array(1.0)))

    program = Program(lambda h, t: part(h, t[0]), lambda h, t: part(h, 0 * t[0]), (0.7,), plates=1)
    expected_under(program, host, -0.7 * 7, estimators={"x": KINDS[kind]})


def masked_by_a_handler(h, d, mask):
    with h.handlers.mask(mask=mask):
        return h.sample("x", d)


MASKS = {
    "distribution, False": lambda h, d: h.sample("x", d.mask(False)),
    "distribution, tensor": lambda h, d: h.sample("x", d.mask(h.math.zeros(()) > 0)),
    "distribution, elements": lambda h, d: h.sample("x", d.mask(h.array([1.0, 0.0]) > 0)),
    "handler, False": lambda h, d: masked_by_a_handler(h, d, False),
    "handler, tensor": lambda h, d: masked_by_a_handler(h, d, h.math.zeros(()) > 0),
    "handler, elements": lambda h, d: masked_by_a_handler(h, d, h.array([1.0, 0.0]) > 0),
}


@pytest.mark.parametrize("kind", ["LR", "RP", "half"])
@pytest.mark.parametrize("way", MASKS)
def test_every_mask_leaves_the_score(host, way, kind):
    """With masks on two elements, d/dm E[-x^2 / 2] is -m for each; the entropy of N(m, 1), masked or not, adds nothing."""

    def part(h, sample, loc):
        with h.plate("n", 2):
            sample(h, h.dist.Normal(loc + h.array([0.0, 0.0]), h.array(1.0)))

    program = Program(
        lambda h, t: part(h, MASKS[way], t[0]), lambda h, t: part(h, lambda h, d: h.sample("x", d), 0 * t[0]), (0.7,), plates=1
    )
    expected_under(program, host, -1.4, estimators={"x": KINDS[kind]})


def test_pyro_observations_without_a_plate():
    """A vector observation in an outer plate is one cost and counts once; without a plate, Pyro's validation refuses it."""
    host, data = HOSTS["pyro"], np.array([0.5, -1.0, 2.0])

    def guide(h, t):
        h.sample("z", h.dist.Normal(t[0], h.array(1.0)))

    def model(h, t):
        z = h.sample("z", h.dist.Normal(0 * t[0], h.array(1.0)))
        h.sample("y", h.dist.Normal(z, h.array(1.0)), obs=h.array(data).expand(*t[0].shape[:-1], 3))

    expected_under(Program(guide, model, (0.7,), plates=1), host, -0.7 + (data - 0.7).sum(), estimators={"z": LR()})
    with pytest.raises(ValueError, match='at site "y", invalid log_prob shape'):
        host.flow.TraceFlow_ELBO(default=LR()).loss(*(lambda part=part: part(host, [torch.tensor(0.7)]) for part in (model, guide)))


def test_pyro_a_factor_that_is_a_score():
    """``pyro.factor(..., has_rsample=False)`` is a score: x ~ N(0.7, 1) and a factor log N(x; m, 1) / N(x; 0.7, 1) are LR at m = 0.7.

    d/dm of -KL(N(m, 1) || N(0, 1)) is -m.
    """

    def guide(h, t):
        fixed, moving = h.dist.Normal(0 * t[0] + 0.7, h.array(1.0)), h.dist.Normal(t[0], h.array(1.0))
        x = h.sample("x", fixed)
        pyro.factor("f", moving.log_prob(x) - fixed.log_prob(x), has_rsample=False)

    model = lambda h, t: h.sample("x", h.dist.Normal(0 * t[0], h.array(1.0)))
    expected_under(Program(guide, model, (0.7,)), HOSTS["pyro"], -0.7)


@pytest.mark.parametrize("dependencies", ["graph", "plates"])
def test_pyro_a_factor_that_is_a_score_meets_every_cost(dependencies):
    """Such a factor multiplies every cost, also an earlier one: x ~ N(0, 1) and the factor log N(x; 0, s) / N(x; 0, 1).

    d/ds of -KL(N(0, s) || N(0, 2)) is 1/s - s/4.
    """

    def guide(h, t):
        fixed, moving = h.dist.Normal(0 * t[0], h.array(1.0)), h.dist.Normal(0 * t[0], t[0])
        x = h.sample("x", fixed)
        pyro.factor("f", moving.log_prob(x) - fixed.log_prob(x), has_rsample=False)

    model = lambda h, t: h.sample("x", h.dist.Normal(0 * t[0], h.array(2.0)))
    expected_under(Program(guide, model, (1.0,)), HOSTS["pyro"], 0.75, dependencies=dependencies)
