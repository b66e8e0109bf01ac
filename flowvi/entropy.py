"""How the guide's own log density is differentiated: sticking the landing, divergences in closed form."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from flowvi.host import Host
from flowvi.ops import Ops
from flowvi.refusals import refusal
from flowvi.run import Held, Run, Statement
from flowvi.sites import Entropy, masks


def apply_entropy(host: Host, run: Run, entropy: Entropy) -> Run:
    """Apply the ``entropy`` option of an objective to a run."""
    if entropy == "stl":
        return stick_the_landing(host, run, held_values(host, run), "entropy='stl'")
    return use_closed_forms(host, run) if entropy == "analytic" else run


def stick_the_landing(host: Host, run: Run, values: Mapping[str, Held], what: str) -> Run:
    """Subtract from the guide's log densities their derivative in the parameters at fixed values of the sites and their parents.

    Args:
        host: The host library.
        run: The run.
        values: The :func:`held_values` of the run.
        what: The option, for messages.

    Raises:
        ValueError: The support of a random site moves, so the mean of what is subtracted is not 0.
    """
    require_fixed_supports(host, run, what)
    held = run.again(values, with_model=False)
    tethered = {
        name: run.guide[name].with_log_density(run.guide[name].log_density - host.ops.tether(held.guide[name].log_density))
        for name in run.sites.random
    }
    return replace(run, guide=run.guide | tethered, held_entropy=True)


def held_values(host: Host, run: Run) -> dict[str, Held]:
    """The values of the guide's random sites, detached."""
    detach = host.ops.stop_gradient
    return {name: Held(detach(run.guide[name].value), host.base_sample(run.guide[name])) for name in run.sites.random}


def require_fixed_supports(host: Host, run: Run, what: str) -> None:
    """Refuse the option ``what``, which drops the guide's scores, if the support of a random site moves with a parameter."""
    for name in run.sites.random:
        host.target(name, run.guide[name].fn, False).require_fixed_support(what)


def use_closed_forms(host: Host, run: Run) -> Run:
    """Replace the two log densities of a site by minus their divergence in closed form, at each site for which the host knows it.

    Raises:
        ValueError: Model and guide have latent sites in different orders, so the divergence may depend on the site's draw.
    """
    _require_one_order(*([name for name, s in program.items() if not s.observed] for program in (run.guide, run.model)))
    guide, model = dict(run.guide), dict(run.model)
    for name in run.sites.random:
        of_guide, of_model = guide[name], model.get(name)
        if (
            of_model is None
            or of_model.log_density is None
            or of_guide.in_control_flow
            or not _count_alike(host.ops, of_guide, of_model)
        ):
            continue
        if (divergence := host.divergence(of_guide, of_model)) is not None:
            guide[name] = of_guide.with_log_density(None)
            model[name] = of_model.with_log_density(-divergence)
    closed = frozenset(name for name in run.sites.random if guide[name].log_density is None)
    return replace(run, guide=guide, model=model, closed_forms=closed)


def _count_alike(ops: Ops, one: Statement, other: Statement) -> bool:
    """Whether the two log densities are known to have the same scale and mask, as a divergence in closed form needs."""
    weights = [[1.0 if s.scale is None else s.scale, *(m for m in (s.mask, *masks(s.fn)) if m is not None)] for s in (one, other)]
    return len(weights[0]) == len(weights[1]) and all(map(ops.is_known_equal, *weights))


def _require_one_order(guide: list[str], model: list[str]) -> None:
    """Refuse closed-form divergences if the latent sites of guide and model come in different orders.

    The divergence at a site is the expectation over the site given its parents, so a parent in the model must not come after the site
    in the guide.
    """
    in_guide, in_model = ([name for name in one if name in other] for one, other in ((guide, model), (model, guide)))
    for first, second in zip(in_guide, in_model, strict=True):
        if first != second:
            raise refusal(
                first,
                f"entropy='analytic' needs the latent sites in the same order in guide and model, expected {in_model} as in "
                f"the model, found {in_guide}; reorder the guide, or use entropy='full'.",
            )
