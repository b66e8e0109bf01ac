"""The common part of ``recommend`` and ``check_program``, which choose the estimators and check a program for bias.

The adapters measure gradients and costs (:mod:`flowvi.guidance.bench`); everything else is here.
"""

from __future__ import annotations

from time import perf_counter

from flowvi.guidance.bench import Batch, Bench, Draw, Probe, Setting, are_apart, batch_size, objective, plates, statements
from flowvi.guidance.bias import BiasTest
from flowvi.guidance.candidates import GuideSite
from flowvi.guidance.jumps import Place
from flowvi.guidance.program_check import Checker, ProgramCheck, SiteCheck
from flowvi.guidance.recommendation import Gain, Recommendation, SiteAdvice, advise
from flowvi.guidance.search import Search, Tried
from flowvi.progress import Bar

__all__ = [
    "Batch",
    "Bench",
    "BiasTest",
    "Checker",
    "Draw",
    "Gain",
    "GuideSite",
    "Place",
    "Probe",
    "ProgramCheck",
    "Recommendation",
    "Search",
    "Setting",
    "SiteAdvice",
    "SiteCheck",
    "Tried",
    "Watch",
    "advise",
    "are_apart",
    "batch_size",
    "objective",
    "plates",
    "statements",
]


class Watch:
    """A countdown with a progress bar.

    Args:
        seconds: The total time.
        progress_bar: Whether to show the bar.
    """

    def __init__(self, seconds: float, progress_bar: bool):
        self.seconds, self.start = seconds, perf_counter()
        self.bar = Bar(total=round(seconds, 1), unit="s", disable=not progress_bar, bar_format="{desc}{bar} {n:.0f}/{total:.0f} s")

    def __enter__(self) -> Watch:
        """Begin."""
        return self

    def __exit__(self, *error: object) -> None:
        """End the bar."""
        self.bar.close()

    def left(self) -> float:
        """The seconds that are left; negative after the end."""
        spent = perf_counter() - self.start
        self.bar.update(min(spent, self.seconds) - self.bar.n)
        return self.seconds - spent

    def show(self, what: str) -> None:
        """Show what is being done."""
        self.bar.set_description(what)
