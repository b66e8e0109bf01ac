"""Effect handlers: attach estimators where the guide draws, and read annotations where the model runs."""

from __future__ import annotations

from typing import Any

import pyro
import torch
from pyro.distributions import Delta, Unit
from pyro.poutine.messenger import Messenger
from pyro.poutine.replay_messenger import ReplayMessenger
from pyro.poutine.util import site_is_subsample

import flowvi.ops.torch as ops
from flowvi.assignment import Assignment, SiteDescription, require_estimator, require_random
from flowvi.estimators import Draw, Estimator
from flowvi.objectives import Entropy
from flowvi.pyro.baselines import require_baseline_options
from flowvi.pyro.distributions import (
    PyroTarget,
    draw,
    find_estimated,
    is_kind,
    is_masked,
    is_partly_reparameterized,
    masks,
    unwrap,
)


def _fixed(msg) -> str | None:
    """What the statement is, if it is no random choice."""
    family = unwrap(msg["fn"])
    if is_kind(family, Unit):
        return "a factor"
    if msg["is_observed"]:
        return "observed"
    return "a Delta" if is_kind(family, Delta) else None


class attach_estimators(Messenger):
    """Serve every random site of the guide by its estimator.

    Attributes:
        random: The random sites in program order, and what each was served by.
        aliases: For each random site, the model site for which it stands.
        draws: The draws of the sites to which something is attached.
        fixed: Names of the statements that are no random choice.
        learned: Names of the parameters that estimators learn.
    """

    def __init__(self, assignment: Assignment, entropy: Entropy = "full"):
        super().__init__()
        self.assignment, self.entropy = assignment, entropy
        self.learned: list[str] = []
        self.random: dict[str, SiteDescription] = {}
        self.aliases: dict[str, str] = {}
        self.draws: dict[str, Draw] = {}
        self.fixed: list[str] = []

    def _pyro_sample(self, msg):
        if site_is_subsample(msg):
            return
        name, wrapped = msg["name"], find_estimated(msg["fn"])
        if what := _fixed(msg):
            require_random(msg, wrapped, what)
            self.fixed.append(name)
            if what == "a factor" and not msg["fn"].has_rsample:  # pyro.factor(..., has_rsample=False): a score, not a path
                self.draws[name] = Draw(msg["value"], score=msg["fn"].log_prob(msg["value"]))
            return
        if msg["infer"].get("enumerate"):
            raise ValueError(
                f"site '{name}': expected a site that is sampled, found infer['enumerate']; enumerate with TraceEnum_ELBO."
            )
        if "baseline" in msg["infer"]:
            require_baseline_options(name, msg["infer"]["baseline"])
        alias = name.removesuffix("_unconstrained") if msg["infer"].get("is_auxiliary") else name
        choice = self.assignment.choose(msg, alias, wrapped)
        frames, first_use = msg["cond_indep_stack"], name not in self.assignment.met
        target = PyroTarget(name, msg["fn"], enters=True, frames=frames, first_use=first_use)
        estimator = choice.estimator.resolve(target)
        if estimator.baseline is not None and "baseline" in msg["infer"]:
            target.refuse(f"expected one baseline, found {estimator.baseline} and infer['baseline']; keep one of them.")
        if target.transforms and not estimator.enters:
            target = PyroTarget(name, msg["fn"], enters=False, frames=frames, first_use=first_use)
        if msg["value"] is None:
            self._draw(msg, target, estimator, wrapped)
        plates = tuple(frame.name for frame in msg["cond_indep_stack"])
        self.random[name] = SiteDescription(name, estimator, choice.said, target.family, target.parameters, plates)
        self.aliases[name] = alias

    def _draw(self, msg, target, estimator, wrapped):
        name = msg["name"]
        if not estimator.uses_sampler:
            target = self._declare(msg, target, estimator)
            self.draws[name] = drawn = draw(target, estimator)
            self.assignment.met.add(name)
            msg["value"], msg["done"] = drawn.value, True
            if drawn.log_prob is not None and not target.transforms and not is_masked(msg["fn"]):
                msg["unscaled_log_prob"] = drawn.log_prob  # which Pyro would compute again
        elif is_partly_reparameterized(target.p):  # a path and a score
            p = target.p.expand(target.batch_shape)
            x = p.rsample()
            score = target.to_batch(p.score_parts(x).score_function)
            self.draws[name] = Draw(target.push(x), score)
            msg["value"], msg["done"] = self.draws[name].value, True
        elif wrapped is not None or estimator.force:
            msg["value"], msg["done"] = target.push(target.p.expand(target.batch_shape).rsample()), True

    def _declare(self, msg, target, estimator):
        """Make what the estimator learns parameters of the program: the target with their values."""
        if not (learns := estimator.learns(ops, target)):
            return target
        values = {
            name: pyro.param(f"{msg['name']}.{name}", learned.initial, event_dim=len(learned.event_shape))
            for name, learned in learns.items()
        }
        self.learned += [f"{msg['name']}.{name}" for name in learns]
        return target.with_learned(learns, values, _own_density(msg) if self.entropy == "full" else 0.0)


def _own_density(msg) -> Any:
    """By how much the objective counts the site's log density: its scale, where it is not masked."""
    weight = msg["scale"]
    for mask in (msg["mask"], *masks(msg["fn"])):
        if mask is not None:
            weight = weight * torch.as_tensor(mask)
    return weight


class replay_and_read(ReplayMessenger):
    """Replay the guide's values in the model; before that overwrites ``infer``, collect ``infer={"estimator": ...}``.

    Attributes:
        annotations: The estimators annotated in the model, by the name of the statement.
    """

    def __init__(self, trace=None):
        super().__init__(trace)
        self.annotations: dict[str, Estimator] = {}

    def _pyro_sample(self, msg):
        if "estimator" in msg["infer"] and not site_is_subsample(msg):
            if what := _fixed(msg):
                require_random(msg, None, what)
            where = f"site '{msg['name']}': infer['estimator']"
            self.annotations[msg["name"]] = require_estimator(msg["infer"]["estimator"], where)
        super()._pyro_sample(msg)


class share_subsamples(Messenger):
    """Let every run inside draw the subsample that the first one drew at a plate."""

    def __init__(self):
        super().__init__()
        self.subsamples: dict[str, Any] = {}

    def _pyro_sample(self, msg):
        if site_is_subsample(msg) and msg["name"] in self.subsamples:
            msg["value"], msg["done"] = self.subsamples[msg["name"]], True

    def _pyro_post_sample(self, msg):
        if site_is_subsample(msg):
            self.subsamples[msg["name"]] = msg["value"]
