"""Effect handlers: attach estimators to the draws of the guide, and read the annotations of the model."""

from __future__ import annotations

from contextlib import nullcontext
from operator import attrgetter
from typing import Any

from pyro.distributions.torch_distribution import TorchDistributionMixin
from pyro.poutine.messenger import Messenger
from pyro.poutine.replay_messenger import ReplayMessenger
from pyro.poutine.util import site_is_subsample

import flowvi.ops.torch as ops
from flowvi.assignment import Settled
from flowvi.estimators import Draw, Estimator, attach
from flowvi.flows import held_base
from flowvi.learned.coupling import CoupledRP
from flowvi.particles import Particles, at_uniforms, can_be_joint
from flowvi.pyro.baselines import require_baseline_options
from flowvi.pyro.distributions import PARTICLES, PyroTarget, draw, is_partly_reparameterized
from flowvi.pyro.host import HOST
from flowvi.pyro.module import learned_parameters
from flowvi.pyro.particles import uniforms
from flowvi.pyro.provenance import not_followed
from flowvi.pyro.special_points import SAFE, with_right_derivative
from flowvi.sites import GuideSites, Visit, annotation, is_masked, weight_of_density

_NAMES_AN_ESTIMATOR = frozenset({"estimator", "enumerate", "baseline"})  # the keys of infer
_name_of = attrgetter("name")


def _is_as_before(msg, settled: Settled) -> bool:
    """Whether a settled site is as in an earlier run. This has to be fast, because it is true at most sites."""
    fn: Any = msg["fn"]
    for family in settled.families:
        if type(fn) is not family:
            return False
        fn = getattr(fn, "base_dist", None)
    return (
        msg["fn"].has_rsample
        and msg["value"] is None  # neither observed nor held
        and _NAMES_AN_ESTIMATOR.isdisjoint(msg["infer"])
        and tuple(map(_name_of, msg["cond_indep_stack"])) == settled.description.plates
    )


class attach_estimators(Messenger):
    """Draw at every random site of the guide with the site's estimator."""

    settles = True  # whether a later run may skip the decisions at settled sites

    def __init__(self, sites: GuideSites):
        super().__init__()
        self.sites = sites
        self.params: list[Any] = []
        self.settled = sites.assignment.settled if self.settles and not (sites.held or sites.replaced) else {}

    def _pyro_post_param(self, msg):
        self.params.append(msg["value"])

    def _pyro_sample(self, msg):
        settled = self.settled.get(msg["name"])
        if settled is not None and _is_as_before(msg, settled):
            self.sites.random[msg["name"]], self.sites.aliases[msg["name"]] = settled.description, settled.alias
            return
        if site_is_subsample(msg):
            if msg["name"] in self.sites.held:
                self._hold(msg)
            return
        # an auxiliary site of an autoguide corresponds to the model site without the suffix
        alias = msg["name"].removesuffix("_unconstrained") if msg["infer"].get("is_auxiliary") else msg["name"]
        try:
            what = self.sites.visit(HOST, msg, alias, self._target, self._draw)
            if what == "a factor" and not msg["fn"].has_rsample:  # pyro.factor(..., has_rsample=False): a score, not a path
                self.sites.draws[msg["name"]] = Draw(msg["value"], score=msg["fn"].log_prob(msg["value"]))
            if what is None and msg["value"] is None:  # not at a given value, as in a second run, where the estimator was not used
                self.sites.settle(msg)
        except (AttributeError, TypeError) as error:
            _require_distribution(msg["name"], msg["fn"], error)
            raise

    def _target(self, msg, enters: bool) -> PyroTarget:
        first_use = msg["name"] not in self.sites.assignment.seen
        target = PyroTarget(msg["name"], msg["fn"], enters, frames=msg["cond_indep_stack"], first_use=first_use)
        target.params, target.own_rows = self.params, self.sites.assignment.own_rows
        return target

    def _draw(self, msg, visit: Visit) -> Draw | None:
        drawn = self._drawn(msg, visit)
        return self._hold(msg) if msg["name"] in self.sites.held else drawn

    def _hold(self, msg) -> Draw | None:
        """Give the site the value of another run; a draw only advances the generators."""
        if msg["value"] is None:
            msg["fn"](*msg["args"], **msg["kwargs"])
        msg["value"], drawn = self.sites.held[msg["name"]]
        msg["done"] = True
        self.sites.log_probs.pop(msg["name"], None)
        return drawn

    def _drawn(self, msg, visit: Visit) -> Draw | None:
        target: Any = visit.target
        estimator: Any = visit.estimator
        if "baseline" in msg["infer"]:
            require_baseline_options(msg["name"], msg["infer"]["baseline"])
            if estimator.baseline is not None:
                target.refuse(f"expected one baseline, found {estimator.baseline} and infer['baseline']; keep one of them.")
            if estimator.compares:
                target.refuse(f"expected no infer['baseline'], because {estimator} has no score; remove the baseline, or use LR().")
        if msg["value"] is not None:
            if type(target.p) in SAFE:
                msg["fn"] = with_right_derivative(msg["fn"])
            if (base := self.sites.bases.get(msg["name"])) is not None:
                self.sites.log_probs[msg["name"]] = msg["fn"].log_prob(target.push(held_base(ops, target, base)))
            return None
        if not estimator.uses_sampler:
            if type(target.p) in SAFE:
                msg["fn"] = with_right_derivative(msg["fn"])
                target = self._target(msg, estimator.enters)
            drawn = self._attach(msg, target, estimator)
            return drawn._replace(instead=None) if "baseline" in msg["infer"] else drawn  # a baseline needs the score
        if is_partly_reparameterized(target.p):  # a path and a score
            p = target.p.expand(target.batch_shape)
            x = p.rsample()
            score = target.to_batch(p.score_parts(x).score_function)
            msg["value"], msg["done"] = target.push(x), True
            return Draw(msg["value"], score)
        if visit.wrapped is not None or estimator.force:
            msg["value"], msg["done"] = target.push(target.p.expand(target.batch_shape).rsample()), True
        return None

    def _attach(self, msg, target, estimator) -> Draw:
        name = msg["name"]
        # a sample of CoupledRP is computed from the distribution alone, of which it gets the tags
        with not_followed() if isinstance(estimator, CoupledRP) else nullcontext():
            drawn = self._draw_at(self._with_learned(msg, target, estimator), estimator)
        self.sites.assignment.seen.add(name)
        if name in self.sites.replaced:  # the draw has only advanced the generators
            msg["value"], msg["done"] = self.sites.replaced[name], True
            return drawn._replace(value=msg["value"])
        msg["value"], msg["done"] = drawn.value, True
        if drawn.log_prob is not None and not target.transforms and not is_masked(msg["fn"]):
            self.sites.log_probs[name] = drawn.log_prob
        return drawn

    def _draw_at(self, target, estimator) -> Draw:
        return draw(target, estimator)

    def _with_learned(self, msg, target, estimator):
        """Register the parameters that the estimator learns; returns the target with their values."""
        if not (learns := estimator.learns(ops, target)):
            return target
        with target.registering(learns):
            values = learned_parameters(msg["name"], learns)
        self.sites.learned |= {f"{msg['name']}.{name}": msg["name"] for name in learns}
        return target.with_learned(learns, values, weight_of_density(msg) if self.sites.entropy == "full" else 0.0)


def _require_distribution(name: str, fn: Any, error: Exception) -> None:
    """Refuse what lacks the methods of Pyro's distributions, after an error that this may have caused."""
    if not isinstance(fn, TorchDistributionMixin):
        raise TypeError(
            f"site '{name}': expected a distribution of Pyro with a batch and an event shape, such as pyro.distributions.Normal(0, 1), "
            f"found {fn!r} of {type(fn).__module__}."
        ) from error


class attach_together(attach_estimators):
    """Draw the particles, which are a plate, together at the sites of ``RP`` if possible."""

    settles = False

    def __init__(self, sites: GuideSites, how: Particles):
        super().__init__(sites)
        self.how = how

    def _drawn(self, msg, visit: Visit) -> Draw | None:
        given, drawn = msg["value"] is not None, super()._drawn(msg, visit)
        target: Any = visit.target
        if not given and visit.estimator.uses_sampler and can_be_joint(target) and (x := self._together(target)) is not None:
            msg["value"], msg["done"] = target.push(x), True
        return drawn

    def _draw_at(self, target, estimator) -> Draw:
        if isinstance(estimator, CoupledRP) and (x := self._together(target)) is not None:
            return attach(ops, target, estimator, x)
        return super()._draw_at(target, estimator)

    def _together(self, target) -> Any:
        """X of all particles; None while ``describe`` runs the program, without a plate of particles."""
        self.sites.together.append(target.name)
        for frame in target.frames:
            if frame.name == PARTICLES:
                like = getattr(target.p, target.parameters[0])
                u = uniforms(self.how, target.shape, target.batch_ndim + frame.dim, like)
                return at_uniforms(ops, target, u)
        return None


class hold_values(Messenger):
    """Set sites to given values."""

    def __init__(self, values: dict[str, Any]):
        super().__init__()
        self.values = values

    def _pyro_sample(self, msg):
        if msg["name"] in self.values and not (msg["is_observed"] and not site_is_subsample(msg)):
            msg["value"], msg["done"] = self.values[msg["name"]], True


class replay_and_read(ReplayMessenger):
    """Replay the guide's values in the model, and collect ``infer={"estimator": ...}`` before replay overwrites ``infer``.

    Attributes:
        annotations: The estimators annotated in the model, by site.
    """

    def __init__(self, trace=None):
        super().__init__(trace)
        self.annotations: dict[str, Estimator] = {}

    def _pyro_sample(self, msg):
        if "estimator" in msg["infer"] and not site_is_subsample(msg):
            self.annotations[msg["name"]] = annotation(HOST, msg)
        super()._pyro_sample(msg)


class share_subsamples(Messenger):
    """Let every run inside use the subsample that the first one drew at a plate."""

    def __init__(self):
        super().__init__()
        self.subsamples: dict[str, Any] = {}

    def _pyro_sample(self, msg):
        if site_is_subsample(msg) and msg["name"] in self.subsamples:
            msg["value"], msg["done"] = self.subsamples[msg["name"]], True

    def _pyro_post_sample(self, msg):
        if site_is_subsample(msg):
            self.subsamples[msg["name"]] = msg["value"]
