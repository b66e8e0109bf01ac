"""The options of objectives, and their validation."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

from flowvi.baselines import ParticleMean
from flowvi.learned.coupling import JointKind
from flowvi.particles import Particles
from flowvi.sites import Entropy
from flowvi.tape import Dependencies

LeaveOneOut = Literal["loo"] | None
Gradient = Literal["plain", "dreg"]


def particle_baseline(baseline: LeaveOneOut) -> ParticleMean | None:
    """The baseline of scores of an ELBO that have none of their own."""
    return ParticleMean() if baseline == "loo" else None


def require_options(
    entropy: Entropy, baseline: LeaveOneOut, dependencies: Dependencies, control_variate: JointKind | None, particles: Particles
) -> None:
    """Refuse options of an objective that do not exist or exclude each other."""
    for name, found, known in (
        ("entropy", entropy, ("full", "stl", "analytic")),
        ("baseline", baseline, ("loo", None)),
        ("dependencies", dependencies, ("graph", "plates")),
        ("control_variate", control_variate, ("quadratic", "cubic", None)),
    ):
        if found not in known:
            raise ValueError(f"{name}: expected {' or '.join(map(repr, known))}, found {found!r}.")
    if control_variate is not None and particles == "fixed":
        raise ValueError(
            "control_variate: expected None under particles='fixed', which needs the derivative of the loss at fixed draws, found "
            f"{control_variate!r}, whose mean is 0 only over all draws."
        )


def require_bound_options(alpha: float, baseline: LeaveOneOut, gradient: Gradient) -> None:
    """Refuse options of a bound that do not exist."""
    if isinstance(alpha, Mapping):
        raise TypeError(f"alpha: expected a number, found {alpha!r}; did you mean estimators=...?")
    if alpha == 1:
        raise ValueError(f"alpha: expected a number other than 1, found {alpha}; use TraceFlow_ELBO, which is the bound at 1.")
    if baseline not in ("loo", None):
        raise ValueError(f"baseline: expected 'loo' or None, found {baseline!r}.")
    if gradient not in ("plain", "dreg"):
        raise ValueError(f"gradient: expected 'plain' or 'dreg', found {gradient!r}.")
