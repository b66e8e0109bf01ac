"""What :func:`flowvi.check_estimator` found."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Condition:
    """One condition of an unbiased estimator.

    Attributes:
        name: Its name.
        holds: Whether it holds; None if it was not checked.
        found: The largest discrepancy and where it is, or why it was not checked.
    """

    name: str
    holds: bool | None
    found: str


@dataclass(frozen=True)
class EstimatorReport:
    """What :func:`flowvi.check_estimator` found; prints as a table.

    Attributes:
        title: The estimator and the distribution.
        conditions: Every condition, in the order in which they were checked.
    """

    title: str
    conditions: tuple[Condition, ...]

    @property
    def failed(self) -> tuple[Condition, ...]:
        """The conditions that do not hold."""
        return tuple(c for c in self.conditions if c.holds is False)

    def __str__(self) -> str:
        """The table as plain text."""
        width = max(len(c.name) for c in self.conditions)
        results = {True: "holds", False: "FAILS", None: "-"}
        return "\n".join([self.title, *(f"{c.name.ljust(width)}  {results[c.holds]:5}  {c.found}" for c in self.conditions)])


PAGE = "docs/checking.md"


class EstimatorError(AssertionError):
    """Conditions of an estimator that do not hold.

    Attributes:
        report: The whole :class:`EstimatorReport`.
    """

    def __init__(self, report: EstimatorReport):
        self.report = report
        lines = (f"- {c.name}: {c.found}" for c in report.failed)
        super().__init__("\n".join([f"{report.title}: {len(report.failed)} of {len(report.conditions)} conditions fail.", *lines]))
        self.add_note(f"What each condition means: {PAGE}")
