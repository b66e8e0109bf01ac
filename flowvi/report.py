"""The records that ``gradient_report`` returns, and how they are shown."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from inspect import signature
from typing import TYPE_CHECKING, Any, cast

import numpy as np

from flowvi.assignment import Description, Estimators, summed_out
from flowvi.estimators import Estimator

if TYPE_CHECKING:
    import pandas as pd
    import xarray as xr
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from rich.table import Table

__all__ = ["GradientReport", "ParameterGradient"]

Candidates = Estimators | Mapping[str, Estimators]


@dataclass(frozen=True)
class ParameterGradient:
    """The gradient of the loss in one parameter of the program, over many samples.

    Attributes:
        candidate: The label of the estimators.
        parameter: The parameter's name.
        sites: The random sites whose distribution reads it.
        estimators: The estimator of each of these sites.
        mean: The mean over samples, of the parameter's (unconstrained) shape; flat where the parameter is a tree of arrays.
        variance: The variance of one sample, of the same shape.
        share: This parameter's share of the variance of the whole gradient, between 0 and 1.
        num_samples: The number of samples.
    """

    candidate: str
    parameter: str
    sites: tuple[str, ...]
    estimators: tuple[Estimator, ...]
    mean: np.ndarray
    variance: np.ndarray
    share: float
    num_samples: int

    @property
    def std(self) -> float:
        """The standard deviation of one sample, the root of the summed variance of the parameter's elements."""
        return float(np.sqrt(self.variance.sum()))

    @property
    def snr(self) -> float:
        """The signal-to-noise ratio of one sample, the norm of the mean (corrected for noise) over the standard deviation."""
        signal = max(float((self.mean**2).sum()) - float(self.variance.sum()) / self.num_samples, 0.0)
        return float(np.sqrt(signal)) / self.std if self.std > 0 else float("inf")

    def _elements(self) -> np.ndarray:
        """The mean, std and snr of each element, along a new first axis."""
        std = np.sqrt(self.variance)
        signal = np.sqrt(np.maximum(self.mean**2 - self.variance / self.num_samples, 0.0))
        return np.stack([self.mean, std, np.divide(signal, std, out=np.full_like(std, np.inf), where=std > 0)])


@dataclass(frozen=True)
class GradientReport:
    """What ``gradient_report`` found; prints as a table.

    Attributes:
        parameters: One record for each candidate and parameter.
        effective_samples: For each candidate, the effective sample size of each site's importance weights, as a fraction of the number
            of samples (1 if q = p).
        seconds: For each candidate, the time of one sample of the gradient.
        num_samples: The number of samples.
        marginalised: The sites of the model that the host sums out.

    References:
        The effective sample size is Kish's, (sum w)^2 / sum w^2; see Owen 2013, chapter 9.
    """

    parameters: tuple[ParameterGradient, ...]
    effective_samples: dict[str, dict[str, float]]
    seconds: dict[str, float]
    num_samples: int
    marginalised: tuple[str, ...] = ()
    _columns: tuple[str, ...] = field(
        default=("candidate", "parameter", "site", "estimator", "|mean|", "std", "snr", "share", "ess", "us"), repr=False
    )

    def rows(self) -> Iterator[tuple[Any, ...]]:
        """The table: candidate, parameter, sites, estimators, norm of the mean, std, snr, share of the variance, ess, us per sample."""
        for p in self.parameters:
            weights = self.effective_samples[p.candidate]
            ess = min((weights[site] for site in p.sites), default=1.0)
            yield (
                *(p.candidate, p.parameter, ", ".join(p.sites), ", ".join(e.label for e in p.estimators)),
                *(float(np.sqrt((p.mean**2).sum())), p.std, p.snr, p.share, ess, 1e6 * self.seconds[p.candidate]),
            )

    def to_pandas(self) -> pd.DataFrame:
        """The table as a ``pandas.DataFrame``."""
        import pandas as pd

        return pd.DataFrame(list(self.rows()), columns=list(self._columns))

    def to_xarray(self) -> xr.Dataset:
        """The mean, std and snr of each element of the parameters, as an ``xarray.Dataset`` with the layout of ArviZ.

        Each parameter is a variable with the dims ``candidate``, ``statistic`` and its own ``<parameter>_dim_0``, ...; its attribute
        ``sites`` names the sites that read it. The coordinate ``seconds`` has the dim ``candidate``, and ``effective_samples`` the dims
        ``candidate`` and ``site``. A dim or coordinate that has the name of a parameter gets an underscore at its end.

        Example:
            >>> import numpy as np
            >>> from flowvi import LR
            >>> from flowvi.report import GradientReport, ParameterGradient
            >>> loc = ParameterGradient("plain", "loc", ("x",), (LR(),), np.array([3.0, 0.0]), np.array([4.0, 1.0]), 1.0, 100)
            >>> report = GradientReport((loc,), {"plain": {"x": 1.0}}, {"plain": 2e-5}, 100)
            >>> report.to_xarray()["loc"].sel(candidate="plain", statistic="std").values.tolist()
            [2.0, 1.0]
        """
        import xarray as xr

        records: dict[str, list[ParameterGradient]] = {}
        for p in self.parameters:
            records.setdefault(p.parameter, []).append(p)

        def free(name: str) -> str:
            return free(f"{name}_") if name in records else name

        candidate, statistic, site = map(free, ("candidate", "statistic", "site"))
        variables = {}
        for name, of_parameter in records.items():
            axes = (free(f"{name}_dim_{i}") for i in range(of_parameter[0].mean.ndim))
            values = np.stack([p._elements() for p in of_parameter])
            variables[name] = ((candidate, statistic, *axes), values, {"sites": list(of_parameter[0].sites)})
        weights = [list(of_sites.values()) for of_sites in self.effective_samples.values()]
        coordinates = {
            candidate: list(self.seconds),
            statistic: ["mean", "std", "snr"],
            site: list(next(iter(self.effective_samples.values()))),
            free("seconds"): (candidate, list(self.seconds.values())),
            free("effective_samples"): ((candidate, site), weights),
        }
        return xr.Dataset(variables, coordinates, {"num_samples": self.num_samples, "marginalised": list(self.marginalised)})

    def to_rich(self) -> Table:
        """The table as a ``rich.table.Table``, for ``rich.print``."""
        from rich.table import Table

        table = Table(title=f"gradient of the loss, {self.num_samples} samples")
        for i, column in enumerate(self._columns):
            table.add_column(column, justify="left" if i < 4 else "right")
        for row in self._cells():
            table.add_row(*row)
        return table

    def plot(self, ax: Axes | None = None) -> Figure:
        """Bars of the variance of each parameter's gradient, candidates side by side, as a ``matplotlib`` figure.

        Args:
            ax: The axes to draw into; new ones by default.

        Returns:
            The figure.
        """
        import matplotlib.pyplot as plt

        ax = plt.subplots(layout="constrained")[1] if ax is None else ax
        names = list(dict.fromkeys(p.parameter for p in self.parameters))
        labels = list(self.seconds)
        for i, label in enumerate(labels):
            variances = {p.parameter: p.std**2 for p in self.parameters if p.candidate == label}
            ax.barh(np.arange(len(names)) + i * 0.8 / len(labels), [variances[n] for n in names], 0.8 / len(labels), label=label)
        ax.set_yticks(np.arange(len(names)) + 0.4 - 0.4 / len(labels), names)
        ax.set_xscale("log")
        ax.set_xlabel("variance of one sample of the gradient")
        ax.invert_yaxis()
        if len(labels) > 1:
            ax.legend()
        return ax.figure.figure  # the whole figure, also for axes in a part of it

    def _cells(self) -> Iterator[tuple[str, ...]]:
        for *names, mean, std, snr, share, ess, microseconds in self.rows():
            yield (*names, f"{mean:.4g}", f"{std:.4g}", f"{snr:.3g}", f"{share:.1%}", f"{ess:.2f}", f"{microseconds:.1f}")

    def __str__(self) -> str:
        """The table as plain text."""
        cells = [self._columns, *self._cells()]
        widths = [max(len(row[i]) for row in cells) for i in range(len(self._columns))]
        lines = ["  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in cells]
        return "\n".join([*lines, summed_out(self.marginalised)] if self.marginalised else lines)


def by_label(estimators: Candidates) -> dict[str, Estimators]:
    """The candidates by label: a mapping whose values are not estimators, or a single candidate without a label."""
    if isinstance(estimators, Mapping) and not any(isinstance(value, Estimator) for value in estimators.values()):
        return dict(cast(Mapping[str, Estimators], estimators)) or {"": None}
    return {"": cast(Estimators, estimators)}


def require_measurable(
    objective: Callable, model: Any, guide: Any, kwargs: Mapping[str, Any], num_samples: int, options: Mapping[str, Any]
) -> None:
    """Refuse arguments with which ``gradient_report`` cannot measure the noise; ``objective`` is the constructor of the loss."""
    for what, program in (("model", model), ("guide", guide)):
        if not callable(program):
            raise TypeError(f"{what}: expected a function, found {type(program).__name__}.")
        accepted = signature(program, follow_wrapped=False).parameters.values()
        for name in kwargs if all(p.kind is not p.VAR_KEYWORD for p in accepted) else ():
            if name in signature(objective).parameters and all(p.name != name for p in accepted):
                raise TypeError(
                    f"{name}: the {what} takes no such argument; options of the objective go in options={ {name: kwargs[name]} }."
                )
    if num_samples < 2:
        raise ValueError(f"num_samples: expected 2 or more, found {num_samples}.")
    if options.get("particles") == "fixed":
        raise ValueError(
            "options: expected an objective that draws anew at every step, found particles='fixed', under which every sample of the "
            "gradient is the same; remove it to measure the noise of independent draws."
        )


class Measured:
    """Running moments of the gradients and weights of one candidate.

    Args:
        description: The random sites.
        readers: For each parameter, the sites whose distribution reads it.
    """

    def __init__(self, description: Description, readers: Mapping[str, tuple[str, ...]]) -> None:
        self.estimators: dict[str, Estimator] = {site.name: site.estimator for site in description}
        self.marginalised: tuple[str, ...] = description.marginalised
        self.readers = readers
        self.gradients: dict[str, list[np.ndarray]] = {}
        self.log_weights: dict[str, list[np.ndarray]] = {}
        self.seconds: float = 0.0

    def add(self, gradients: Mapping[str, Any], log_weights: Mapping[str, Any]) -> None:
        """Add a batch: arrays with the samples along their first axis."""
        for mine, new in ((self.gradients, gradients), (self.log_weights, log_weights)):
            for name, array in new.items():
                mine.setdefault(name, []).append(np.asarray(array, dtype=float))

    def records(self, candidate: str) -> Iterator[ParameterGradient]:
        stacked = {name: np.concatenate(batches) for name, batches in self.gradients.items()}
        variances = {name: g.var(0, ddof=1) for name, g in stacked.items()}
        total = sum(float(v.sum()) for v in variances.values()) or 1.0
        for name, g in stacked.items():
            sites = self.readers[name]
            estimators = tuple(self.estimators[site] for site in sites)
            share = float(variances[name].sum()) / total
            yield ParameterGradient(candidate, name, sites, estimators, g.mean(0), variances[name], share, len(g))

    def effective_samples(self) -> dict[str, float]:
        """The effective sample size by site, averaged over the elements of its plates."""
        fractions = dict.fromkeys(self.estimators, 1.0)
        for name, batches in self.log_weights.items():
            w = np.exp(np.concatenate(batches))
            fractions[name] = float((w.sum(0) ** 2 / (w**2).sum(0)).mean() / len(w))
        return fractions


def compare(estimators: Candidates, measure: Callable[[Estimators], Measured], num_samples: int) -> GradientReport:
    """The report over all candidates, each measured by ``measure``."""
    measured = {label: measure(choice) for label, choice in by_label(estimators).items()}
    return GradientReport(
        tuple(record for label, one in measured.items() for record in one.records(label)),
        {label: one.effective_samples() for label, one in measured.items()},
        {label: one.seconds / num_samples for label, one in measured.items()},
        num_samples,
        next(iter(measured.values())).marginalised,
    )
