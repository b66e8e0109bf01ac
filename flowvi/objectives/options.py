"""The options of objectives: what they may be, and where they are refused."""

from __future__ import annotations

from typing import Literal

from flowvi.baselines import ParticleMean

LeaveOneOut = Literal["loo"] | None
Entropy = Literal["full", "stl", "analytic"]
Dependencies = Literal["graph", "plates"]
Gradient = Literal["plain", "dreg"]


def particle_baseline(baseline: LeaveOneOut) -> ParticleMean | None:
    """The baseline of an ELBO's scores that have none of their own."""
    return ParticleMean() if baseline == "loo" else None


def require_options(entropy: Entropy, baseline: LeaveOneOut, dependencies: Dependencies) -> None:
    """Refuse options of an objective that do not exist."""
    for name, found, known in (
        ("entropy", entropy, ("full", "stl", "analytic")),
        ("baseline", baseline, ("loo", None)),
        ("dependencies", dependencies, ("graph", "plates")),
    ):
        if found not in known:
            raise ValueError(f"{name}: expected {' or '.join(map(repr, known))}, found {found!r}.")


def require_bound_options(baseline: LeaveOneOut, gradient: Gradient) -> None:
    """Refuse options of a bound that do not exist."""
    if baseline not in ("loo", None):
        raise ValueError(f"baseline: expected 'loo' or None, found {baseline!r}.")
    if gradient not in ("plain", "dreg"):
        raise ValueError(f"gradient: expected 'plain' or 'dreg', found {gradient!r}.")


def require_one_order(guide: list[str], model: list[str]) -> None:
    """Refuse closed-form divergences where the latent sites of guide and model come in different orders.

    The divergence at a site is the expectation over the site given its parents; a parent in the model must not come after it in the
    guide.
    """
    in_guide, in_model = ([name for name in one if name in other] for one, other in ((guide, model), (model, guide)))
    for first, second in zip(in_guide, in_model, strict=True):
        if first != second:
            raise ValueError(
                f"site '{first}': entropy='analytic' needs the latent sites in one order in guide and model, expected {in_model} as in "
                f"the model, found {in_guide}; reorder the guide, or use entropy='full'."
            )
