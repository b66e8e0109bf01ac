"""The places to give an estimator: the mapping, an annotation in the guide or the model, the wrapper, the default."""

import numpyro
import pytest
from hosts import HOSTS
from kinds import HALF

from flowvi import LR, RP, Flow, ImplicitRP


def described(host, guide, model, **options):
    elbo = host.flow.TraceFlow_ELBO(**options)
    return {d.name: (type(d.estimator).__name__, d.source) for d in elbo.describe(model, guide)}


def annotated(host, guide_infer=None, model_infer=None, wrapper=None):
    def guide():
        d = host.dist.Normal(host.param("m", host.array(0.1)), host.array(1.0))
        host.sample("x", host.flow.Estimated(d, wrapper) if wrapper else d, infer=guide_infer)

    def model():
        host.sample("x", host.dist.Normal(host.array(0.0), host.array(1.0)), infer=model_infer)

    return guide, model


def test_precedence(host):
    """The order is: the mapping or function, the guide's annotation, the wrapper, the model's annotation, the default."""
    everything = {"guide_infer": {"estimator": LR()}, "model_infer": {"estimator": ImplicitRP()}, "wrapper": HALF}
    places = [
        ({"estimators": {"x": RP()}}, {}, "RP", "estimators['x']"),
        ({"estimators": lambda site: RP() if site["name"] == "x" else None}, {}, "RP", "estimators(site)"),
        ({"estimators": lambda site: None}, {}, "LR", "guide"),
        ({}, {"guide_infer": None}, "Flow", "Estimated"),
        ({}, {"guide_infer": None, "wrapper": None}, "ImplicitRP", "model"),
        ({"default": LR()}, {"guide_infer": None, "wrapper": None, "model_infer": None}, "LR", "default"),
        ({}, {"guide_infer": None, "wrapper": None, "model_infer": None}, "RP", "default"),
    ]
    for options, removed, estimator, said in places:
        guide, model = annotated(host, **{**everything, **removed})
        assert described(host, guide, model, **options) == {"x": (estimator, said)}


def test_a_model_annotation_costs_no_run_after_the_first(host):
    runs = []

    def guide():
        runs.append("guide")
        host.sample("x", host.dist.Normal(host.param("m", host.array(0.1)), host.array(1.0)))

    def model():
        wide = 1.5  # an inline function with a closure is a new object at every run
        estimator = Flow(loc=lambda x, p: 0.5 * wide / 1.5)
        host.sample("x", host.dist.Normal(host.array(0.0), host.array(1.0)), infer={"estimator": estimator})

    elbo = host.flow.TraceFlow_ELBO()
    for expected in (2, 3, 4):
        assert elbo._describe(model, guide, (), {})[0].source == "model"
        assert len(runs) == expected


def test_a_model_annotation_mends_what_the_default_refuses(host):
    def guide():
        loc = host.param("m", host.array(0.1))
        host.sample("x", host.dist.VonMises(loc, host.array(1.0)))

    def model():
        d = host.dist.VonMises(host.array(0.0), host.array(1.0))
        host.sample("x", d, infer={"estimator": LR()})

    assert described(host, guide, model, default=RP()) == {"x": ("LR", "model")}


def regression(host, annotate):
    def model():
        infer = {"estimator": LR()} if annotate else None
        w = host.sample("w", host.dist.Normal(host.array(0.0), host.array(1.0)), infer=infer)
        s = host.sample("s", host.dist.LogNormal(host.array(0.0), host.array(1.0)))
        host.sample("y", host.dist.Normal(w, s), obs=host.array(0.5))

    return model


def autoguide(host, name, model):
    guide = getattr(host.library.infer.autoguide, name)(model)
    if host.name == "numpyro":
        with numpyro.handlers.seed(rng_seed=0), numpyro.handlers.trace():
            guide()
    return guide


def test_autonormal_takes_names_of_model_sites(host):
    suffix = "_unconstrained" if host.name == "pyro" else ""
    model = regression(host, annotate=False)
    guide = autoguide(host, "AutoNormal", model)
    got = described(host, guide, model, estimators={"w": LR(), "s": HALF})
    assert got == {f"w{suffix}": ("LR", "estimators['w']"), f"s{suffix}": ("Flow", "estimators['s']")}
    model = regression(host, annotate=True)
    guide = autoguide(host, "AutoNormal", model)
    assert described(host, guide, model) == {f"w{suffix}": ("LR", "model"), f"s{suffix}": ("RP", "default")}


def test_two_names_for_one_site():
    host = HOSTS["pyro"]
    model = regression(host, annotate=False)
    guide = autoguide(host, "AutoNormal", model)
    with pytest.raises(ValueError, match="site 'w_unconstrained': the keys .* both name this site"):
        described(host, guide, model, estimators={"w": LR(), "w_unconstrained": RP()})


@pytest.mark.parametrize("annotate", [True, False])
def test_a_joint_site_is_named(host, annotate):
    model = regression(host, annotate)
    guide = autoguide(host, "AutoDiagonalNormal", model)
    joint = next(iter(described(host, guide, regression(host, annotate=False))))
    assert "latent" in joint
    with pytest.raises(ValueError, match=f"site 'w': .* names a site that is not a random choice.*The random sites are: '{joint}'"):
        described(host, guide, model, estimators=None if annotate else {"w": LR()})


def test_a_site_that_was_plain_is_chosen_anew_where_it_changes(host):
    """If the guide changes from step to step, an objective chooses the same estimators as a new objective would."""

    def normal():
        return host.dist.Normal(host.param("m", host.array(0.1)), host.array(1.0))

    def in_a_plate():
        with host.plate("rows", 2):
            host.sample("x", normal())

    def observed():
        host.sample("x", normal(), obs=host.array(0.3), infer={"is_auxiliary": True})
        host.sample("z", normal())

    guides = {
        "annotated": lambda: host.sample("x", normal(), infer={"estimator": LR()}),
        "marked": lambda: host.sample("x", normal(), infer={"chosen": True}),
        "discrete": lambda: host.sample("x", host.dist.Poisson(host.array(2.0))),
        "wrapped": lambda: host.sample("x", host.flow.Estimated(normal(), LR())),
        "wrapped inside": lambda: host.sample("x", host.flow.Estimated(normal().expand((2,)), LR()).to_event(1)),
        "event": lambda: host.sample("x", normal().expand((2,)).to_event(1)),
        "plate": in_a_plate,
        "observed": observed,
    }
    plain = guides["plain"] = lambda: host.sample("x", normal())
    chosen = {"estimators": lambda site: LR() if "chosen" in site["infer"] else None}
    for options in ({}, chosen, {"default": LR()}, {"estimators": {"x": LR()}}):
        elbo = host.flow.TraceFlow_ELBO(**options)
        for guide in guides.values():
            for program in (plain, guide, plain):
                model = plain if program is guides["annotated"] else program
                assert elbo.describe(model, program) == host.flow.TraceFlow_ELBO(**options).describe(model, program)


def test_a_model_that_starts_to_annotate_a_plain_site(host):
    guide, plain = annotated(host)
    _, marked = annotated(host, model_infer={"estimator": LR()})
    elbo = host.flow.TraceFlow_ELBO()
    assert [type(elbo.describe(model, guide)[0].estimator) for model in (plain, plain, marked, plain)] == [RP, RP, LR, RP]


@pytest.mark.parametrize("options", [{}, {"control_variate": "quadratic"}], ids=["annotations", "control variate"])
def test_a_program_that_runs_again_takes_the_same_branch(options):
    """The second run takes the branch of the first, also if branches differ in annotations or in the sites of a control variate."""
    host = HOSTS["pyro"]

    def part(**infer):
        k = host.sample("k", host.dist.Bernoulli(host.array(0.3)), infer={})
        host.sample("x" if k > 0 else "y", host.dist.Normal(host.array(0.0), host.array(1.0)), infer=infer)
        host.factor("cost", 2.0 * k)

    def guide():
        k = host.sample("k", host.dist.Bernoulli(host.array(0.3)))
        host.sample("x" if k > 0 else "y", host.dist.Normal(host.array(0.0), host.array(1.0)))

    elbo, plain = host.flow.TraceFlow_ELBO(**options), host.flow.TraceFlow_ELBO()
    infer = {} if options else {"estimator": LR()}
    losses = [[round(host.loss(elbo, lambda: part(**infer), guide, i)), round(host.loss(plain, part, guide, i))] for i in range(20)]
    assert all(loss == other for loss, other in losses)
    assert {loss for loss, _ in losses} == {0, -2}


def test_an_annotation_that_first_appears_later():
    """An annotation may first appear in a branch that a second run, with other draws, would not take."""
    host = HOSTS["pyro"]

    def guide():
        if host.sample("k", host.dist.Bernoulli(host.array(0.3))) > 0:
            host.sample("x", host.dist.Normal(host.array(0.0), host.array(1.0)))

    def model():
        if host.sample("k", host.dist.Bernoulli(host.array(0.3))) > 0:
            host.sample("x", host.dist.Normal(host.array(0.0), host.array(1.0)), infer={"estimator": LR()})

    for first in (0, 2, 4, 8, 10):
        elbo = host.flow.TraceFlow_ELBO()
        for seed in range(first, first + 10):
            host.loss(elbo, model, guide, seed)
