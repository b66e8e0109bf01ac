"""The conditions of :func:`flowvi.check_estimator` on u and psi, and on the whole; those on q are in :mod:`flowvi.checks.coverage`."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from operator import attrgetter
from typing import Any

import numpy as np

from flowvi.checks import Condition, coverage
from flowvi.checks.case import CHUNKS, STENCIL, STEP, Case, at, difference, number, worst
from flowvi.checks.coverage import Z
from flowvi.checks.quadrature import Chart
from flowvi.estimators import Flow, ImplicitRP
from flowvi.ops import Array
from flowvi.tangents import Tangents, unknown_parameter

QUANTILES = (0.06, 0.2, 0.37, 0.55, 0.75, 0.93)
NEAR = 28.0  # how far the log of the mass falls on the way to an end of the support
FACES = (1e-8, 1e-7, 1e-6)  # distances from a face of the simplex


def conditions(case: Case) -> Iterator[Condition]:
    """Every condition that applies; those that others rest on come first."""
    estimator = case.estimator
    try:
        case.find_steps()
        case.estimator = estimator = estimator.resolve(case.still)
        estimator.at_p().proposal(case.ops, case.still)
    except ValueError as error:
        yield _refusal("requirements", error)
        return
    if estimator.q is not None:
        try:
            estimator.proposal(case.ops, case.target(case.moved(), 1))
        except ValueError as error:
            yield _refusal("support of q", error)
            return
    by_sampler = estimator.uses_sampler
    if not by_sampler:
        try:
            case.field(case.draws[:1])
        except ValueError as error:
            yield _refusal("requirements", error)
            return
    yield Condition("requirements", True, "accepted")
    x = _points(case)
    yield _log_prob(case, x)
    if estimator.q is not None:
        covered = coverage.support(case)
        yield covered
        if not covered.holds:
            return
    if not by_sampler:
        if isinstance(estimator, Flow) and estimator.velocity.elementwise is None:
            yield _linear(case, x)
        if isinstance(estimator, ImplicitRP) and estimator.standardization is not None:
            yield _standardization(case, x)
        finite = _finite(case)
        yield finite
        if not finite.holds:
            yield Condition("unbiased", None, "not checked: the field is not finite")
            return
        yield _elementwise(case, x)
        yield from _psi(case, x)
        yield from _boundary(case)
        if estimator.q is not None:
            yield coverage.second_moment(case)
    yield coverage.sampler(case)
    yield from _means(case)


def _refusal(name: str, error: ValueError) -> Condition:
    found = str(error).removeprefix("site 'x': ")
    return Condition(name, False, f"{found} (A parameter that is a constant may be left out of `parameters`.)")


def _points(case: Case) -> np.ndarray:
    """A few x that are not special."""
    if case.chart(case.still) is None or case.draws.shape[-1] > 1:
        return case.draws[: len(QUANTILES)]
    return np.quantile(case.draws, QUANTILES, axis=0)


def _compare(
    case: Case, name: str, x: np.ndarray, pair: tuple[np.ndarray, np.ndarray], scale: np.ndarray, words: tuple[str, str]
) -> Condition:
    """Two arrays (n, *batch, D), found and expected at each x, relative to ``scale``; in words: what they are, and what to do."""
    found, expected = pair
    error, i = worst(abs(found - expected) / np.maximum(scale, 1e-12))
    where = f"{at(x[i[:-1]])}, " + (f"parameter {case.labels[i[-1]]}" if i[-1] < case.size else f"coordinate {i[-1] - case.size} of x")
    if error <= case.tolerance:
        return Condition(name, True, f"{error:.1e} at {where}")
    what, do = words
    return Condition(name, False, f"at {where}: {what} is {found[i] + 0.0:.6g}, expected {expected[i]:.6g} by differences; {do}.")


# ---- at a few points


def _moves(case: Case, x: np.ndarray) -> tuple[np.ndarray, np.ndarray] | None:
    """Directions (m, d) in which x may move, and steps (m, n, *batch) of differences; None where they are not known."""
    chart, d = case.chart(case.still), x.shape[-1]
    if case.discrete or (chart is None and case.still.chart() is not None):
        return None
    if chart is not None and chart.simplex:
        return (np.eye(d) - np.eye(d)[-1])[:-1], STEP * np.moveaxis(np.minimum(x, x[..., -1:])[..., :-1], -1, 0)
    low, high = np.quantile(case.draws, [0.25, 0.75], axis=0)
    size = np.broadcast_to(np.where(high > low, high - low, 1.0), x.shape)
    if chart is not None and not case.on_circle:
        size = np.minimum(size, np.minimum(abs(x - chart.low), abs(chart.high - x)))
    return np.eye(d), STEP * np.moveaxis(size, -1, 0)


def _log_prob(case: Case, x: np.ndarray) -> Condition:
    """The automatic derivatives of log p, in the parameters and in x, against differences."""
    e, h = _moves(case, x) or (np.zeros((0, 1)), np.zeros((0, 1)))

    def f(move: Array) -> list[Array]:
        target, live = case.target(move[: case.size], len(x)), case.shaped(x)
        for i in range(len(e)):
            live = live + move[case.size + i] * case.shaped(np.broadcast_to(e[i], x.shape))
        return [target.to_batch(target.p.log_prob(live))]

    def along_x(i: int) -> np.ndarray:
        slope = difference(lambda k: case.log_prob(case.moved(), x + k * h[i][..., None] * e[i])) / h[i]
        return slope[..., None]

    automatic = case.host.jacobian(f, case.size + len(e))()[0]
    exact = np.concatenate([case.along(lambda eta: case.log_prob(eta, x)), *map(along_x, range(len(e)))], -1)
    units = np.broadcast_to(1 / case.unit, (*x.shape[:-1], case.size))
    scale = abs(exact) + np.concatenate([units, *(STEP / step[..., None] for step in h)], -1)
    do = "an automatic derivative is cut or wrong: see whether log_prob (or the function that builds the distribution) detaches it"
    return _compare(case, "log_prob", x, (automatic, exact), scale, ("its derivative", do))


class _Numbers(Tangents):
    """Parameter tangents that are numbers: a combination of the parameters' units."""

    def __init__(self, case: Case, target: Any, direction: np.ndarray, part: Callable[[Any], Any] = lambda p: p):
        super().__init__(case.ops, target, part)
        self._case, self._direction = case, direction

    def __getattr__(self, name: str) -> Array:
        if name not in self.p.arg_constraints:
            self.target.refuse(unknown_parameter(self.p, name))
        return self.of(attrgetter(name))

    def of(self, f: Callable[[Any], Array]) -> Array | None:
        case, n = self._case, self.target.shape[0]
        return difference(lambda k: f(self._part(case.target(k * case.steps * self._direction, n).p0))) / STEP

    def within(self, part: Callable[[Any], Any]) -> Tangents:
        return _Numbers(self._case, self.target, self._direction, lambda p: part(self._part(p)))


def _linear(case: Case, x: np.ndarray) -> Condition:
    """Whether velocity(x, p, dtheta) is 0 at 0, and adds up."""
    assert isinstance(case.estimator, Flow)
    name, velocity, live = "linear in dtheta", case.estimator.velocity.velocity, case.shaped(x)
    target = case.target(case.moved(), len(x))

    def dx(direction: np.ndarray) -> np.ndarray:
        u = velocity(live, target.p0, _Numbers(case, target, direction))
        return case.flat(number(target.in_shape(case.ops, u, live, "the velocity")))

    at_zero = dx(np.zeros(case.size))
    size, i = worst(abs(at_zero), of_nan=-1.0)
    if size > 1e-12:
        found = f"velocity(x, p, 0) is {at_zero[i]:.4g} at {at(x[i[:-1]])}, expected 0; multiply every term by a dtheta."
        return Condition(name, False, found)
    a, b = np.random.default_rng(case.seed).normal(size=(2, case.size))
    of_a, of_b, of_both = dx(a), dx(b), dx(a - 2 * b)
    error, i = worst(abs(of_both - of_a + 2 * of_b) / np.maximum(abs(of_a) + abs(of_b), 1e-12), of_nan=-1.0)
    if error <= case.tolerance:
        return Condition(name, True, f"{error:.1e} at {at(x[i[:-1]])}")
    found = (
        f"velocity(x, p, a - 2 b) differs from velocity(x, p, a) - 2 velocity(x, p, b) by {error:.2g} of its size at {at(x[i[:-1]])}; "
    )
    return Condition(name, False, found + "only the first order in dtheta may enter.")


def _standardization(case: Case, x: np.ndarray) -> Condition:
    """Whether S is invertible in x: monotone, or of a Jacobian whose determinant has one sign."""
    assert isinstance(case.estimator, ImplicitRP)
    s, name = case.estimator.standardization, "standardization"
    assert s is not None
    if x.shape[-1] == 1:
        x = np.sort(case.massive[0], 0)
    target = case.target(case.moved(), len(x))
    if x.shape[-1] > 1:
        jacobian = case.ops.jacobian(lambda x: s(x, target.p0), case.shaped(x), target.event_ndim, False)[1]
        signs, logs = np.linalg.slogdet(number(jacobian))
        if np.isfinite(logs).all() and abs(signs.sum()) == signs.size:
            return Condition(name, True, "det dS/dx has one sign")
        return Condition(name, False, "det dS/dx is 0, or its sign is not the same for all x; S must be invertible in x.")
    values = case.flat(number(s(case.shaped(x), target.p0)))[..., 0]
    size = values.max(0) - values.min(0)
    if not (size > 0).all():
        return Condition(name, False, "S does not depend on x; it must be invertible in x.")
    slopes = np.diff(values, axis=0) / size
    turned = np.minimum(np.maximum(slopes, 0).max(0), np.maximum(-slopes, 0).max(0))
    if turned.max() < 1e-12:
        return Condition(name, True, "monotone in x")
    signs = np.sign(slopes)
    i = np.unravel_index((signs[1:] * signs[:-1] < 0).argmax(), signs[1:].shape)
    return Condition(
        name, False, f"S is not monotone in x: its slope changes its sign near {at(x[1:-1][i])}; S must be invertible in x."
    )


def _finite(case: Case) -> Condition:
    """Value, score and weight at every point that has mass."""
    x, mass = case.massive
    bad = ~np.isfinite(sum(case.drawn(x)))
    if not bad.any():
        return Condition("finite", True, f"at {len(x)} points")
    _, i = worst(np.where(bad, mass, -1.0))
    share = (mass * bad).sum(0).max()
    found = f"the velocity or the score is NaN or infinite, for example at {at(x[i])}, on a share {share:.2g} of the mass of p; "
    return Condition("finite", False, found + "define it on the whole support (a where needs a safe argument in both branches).")


def _elementwise(case: Case, x: np.ndarray) -> Condition:
    """Whether u and psi at some elements change where the others do."""
    name, s = "elementwise", getattr(case.estimator, "standardization", None)
    if s is not None and case.still.event_ndim == 0:
        target = case.target(case.moved(), len(x))
        if not case.ops.is_elementwise(lambda x: s(x, target.p0), case.shaped(x)):
            found = (
                "S at one element of the batch reads x at another; only an event of the distribution may be standardized as a whole."
            )
            return Condition(name, False, found)
    keep = np.indices(x.shape[:-1]).sum(0) % 2 == 0
    moved = np.where(keep[..., None], x, case.draws[len(x) : 2 * len(x)])
    (u, psi), (u_moved, psi_moved) = case.field(x), case.field(moved)
    change = np.maximum(
        (abs(u - u_moved) / (1e-9 + abs(u) + abs(u_moved))).max(-2), abs(psi - psi_moved) / (1e-9 + abs(psi) + abs(psi_moved))
    )
    error, i = worst(np.where(keep[..., None], change, 0.0))
    if error <= 1e-6:
        return Condition(name, True, f"{error:.1e} at {at(x[i[:-1]])}")
    found = f"at {at(x[i[:-1]])} the velocity or the score changes by {error:.2g} of its size when x changes at another element of the "
    return Condition(name, False, found + "batch; a field reads x at its own element only (and its own event).")


PSI = {
    "pathwise": (
        "psi is declared 0 (the field as pathwise, or the law of S(x) as free of the parameters); as it was declared it",
        "give the divergence or leave it to the default, or say exact=False; or mend the field",
    ),
    "score": ("psi", "see log_prob"),
    "divergence": (
        "psi = div u + u . grad log p + d_theta log p",
        "mend divergence(x, p, dtheta), or leave it out: the default is exact",
    ),
}


def _psi(case: Case, x: np.ndarray) -> Iterator[Condition]:
    """The score term against its definition, by differences."""
    u, psi = case.field(x)
    moves, chart = _moves(case, x), case.chart(case.still)
    if chart is not None and chart.simplex:
        out, i = worst(abs(u.sum(-2)) / np.maximum(abs(u).sum(-2), 1e-12))
        where, ok = f"{at(x[i[:-1]])}, parameter {case.labels[i[-1]]}", out <= case.tolerance
        found = f"at {where}: the coordinates of u sum to {u.sum(-2)[i]:.4g}, expected 0; u must stay on the simplex."
        yield Condition("tangent", bool(ok), f"{out:.1e} at {where}" if ok else found)
    still = not abs(u).any()
    name = "pathwise" if case.estimator.psi_is_zero(case.still) else "score" if still else "divergence"
    if moves is None and not still:
        yield Condition(name, None, "not checked: no chart of this support is known")
        return
    divergence = np.zeros(psi.shape)
    if not still:
        e, h = moves  # type: ignore[misc]
        stencil = np.concatenate([x + k * h[i][..., None] * e[i] for i in range(len(e)) for k in STENCIL])
        fields = case.field(stencil)[0].reshape((len(e), len(STENCIL), *u.shape))
        for m in range(len(e)):
            slopes = sum(c * fields[m, j][..., m, :] for j, c in enumerate(STENCIL.values()))
            divergence = divergence + slopes / h[m][..., None]

    def moved(i: int, k: int) -> np.ndarray:
        return case.log_prob(case.moved(i, k), x if still else x + k * case.steps[i] * u[..., i])

    along = np.stack([difference(lambda k, i=i: moved(i, k)) / case.steps[i] for i in range(case.size)], -1)  # type: ignore[misc]
    scale = abs(divergence) + abs(along) + 1 / case.unit
    yield _compare(case, name, x, (psi, divergence + along), scale, PSI[name])


# ---- the ends of the support


def _boundary(case: Case) -> Iterator[Condition]:
    chart, name = case.chart(case.still), "boundary flux"
    if chart is None:
        return
    if chart.simplex:
        yield _faces(case)
    elif case.draws.shape[-1] > 1:
        if np.isfinite(chart.low).any() or np.isfinite(chart.high).any():
            yield Condition(name, None, "not checked: an event of several bounded coordinates")
    elif case.points is not None:
        yield _ends(case, chart)


def _ends(case: Case, chart: Chart) -> Condition:
    """The flux p (u - v) on the way to both ends, v their speed."""
    name = "boundary flux"
    y, log_w = case.points  # type: ignore[misc]
    log_mass = case.riding(case.moved(), y)[1] + log_w
    seen = (log_mass > log_mass.max(0) - NEAR)[..., None]
    limits = chart.limits()
    ends = np.maximum(np.where(seen, y, np.inf).min(0), limits[0]), np.minimum(np.where(seen, y, -np.inf).max(0), limits[1])
    x = chart.to_x(np.stack([end + s * (case.coordinates.centre - end) for end in ends for s in (0.0, 0.08, 0.16)]))
    speeds = case.along(lambda eta: _bounds(case.chart(case.target(eta, 1))))  # type: ignore[arg-type]
    density = np.exp(case.log_prob(case.moved(), x))[..., None]
    flux = density * (case.field(x)[0][..., 0, :] - np.repeat(speeds, 3, axis=0)) * case.unit  # as a share of the mass
    if case.on_circle:
        return _seam(case, flux[0], flux[3])
    for side in (0, 1):
        f = flux[3 * side : 3 * side + 3]
        size, i = worst(np.where(_vanishes(case, *f), -1.0, abs(f[0])))
        if size < 0:
            continue
        end, moves = (chart.low, chart.high)[side][(*i[:-1], 0)], abs(speeds[side][i]) > 0
        where = f"at the {('lower', 'upper')[side]} end x = {end:.4g}, parameter {case.labels[i[-1]]}"
        do = "this end is fixed: u must vanish there"
        if not np.isfinite(end):
            do = "at infinity u carries mass away: p u must vanish there"
        elif moves:
            do = "this end moves: u must ride it (be its speed there)"
        return Condition(name, False, f"{where}: p (u - v) is {f[0][i] / case.unit[i[-1]]:.4g}, expected 0; {do}.")
    return Condition(name, True, f"{abs(flux[[0, 3]]).max():.1e} of the mass")


def _bounds(chart: Chart) -> np.ndarray:
    bounds = np.stack([chart.low[..., 0], chart.high[..., 0]])
    return np.where(np.isfinite(bounds), bounds, 0.0)


def _vanishes(case: Case, f0: np.ndarray, f1: np.ndarray, f2: np.ndarray) -> np.ndarray:
    """Whether a flux goes to 0, from three points whose distances from the end are in proportion, the nearest first.

    Where it falls like a power, its relative change from point to point stays; with another limit that change goes to 0.
    """
    with np.errstate(divide="ignore", invalid="ignore"):
        near, far = abs(f1 / f0) - 1, abs(f2 / f1) - 1
        return (abs(f0) <= case.tolerance) | ((near > 0.02) & (near > 0.7 * far))


def _seam(case: Case, after: np.ndarray, before: np.ndarray) -> Condition:
    gap, i = worst(abs(before - after))
    if gap > case.tolerance:
        found = (
            f"at the seam, parameter {case.labels[i[-1]]}: p u is {before[i]:.4g} of the mass before pi and {after[i]:.4g} after -pi; "
        )
        return Condition("boundary flux", False, found + "what leaves must come in again, or vanish.")
    case.periodic_only = bool(abs(after).max() > case.tolerance)
    return Condition(
        "boundary flux", True, "crosses the seam: right for periodic costs only" if case.periodic_only else "0 at the seam"
    )


def _faces(case: Case) -> Condition:
    """The normal velocity times p, where one coordinate of the simplex goes to 0."""
    x = case.draws[:3]
    d, largest = x.shape[-1], 0.0
    for j in range(d):
        others = x * (np.arange(d) != j)
        others = others / others.sum(-1, keepdims=True)
        near = np.concatenate([others * (1 - distance) + distance * np.eye(d)[j] for distance in FACES])
        flux = np.exp(case.log_prob(case.moved(), near))[..., None] * case.field(near)[0][..., j, :] * case.unit
        f = flux.reshape((3, *x.shape[:-1], case.size))
        size, i = worst(np.where(_vanishes(case, *f), -1.0, abs(f[0])))
        if size >= 0:
            found = f"where coordinate {j} of x is 0, parameter {case.labels[i[-1]]}: p u is {f[0][i]:.3g}, expected 0; "
            return Condition("boundary flux", False, found + "u must vanish there.")
        largest = max(largest, abs(f[0]).max())
    return Condition("boundary flux", True, f"{largest:.1e} at the faces")


# ---- means


def _means(case: Case) -> Iterator[Condition]:
    """E[psi] = 0 (the constant cost), and the derivative of the mean of the other costs."""
    exact = case.points is not None and not case.estimator.uses_sampler
    if exact:
        (estimate, doubt), truth = case.estimate(), case.truth()
        truth[0] = 0.0  # of a density that is normalized
        scale = abs(truth).max(0) + 1 / case.unit
        if (doubt / scale).max() > case.tolerance:
            case.points, exact = None, False
    if not exact:
        estimates, truths = case.sampled()
        truths[0] = 0.0
        estimate, truth = estimates.mean(1), truths.mean(1)
        scale = (estimates - truths).std(1, ddof=1) / math.sqrt(CHUNKS) + case.tolerance / Z / case.unit
    error = abs(estimate - truth) / scale
    by = f"over {case.num_samples} samples" if not exact else "by summation" if case.discrete else "by quadrature"
    if not case.estimator.uses_sampler:
        size, i = worst(error[:1])
        who = f"parameter {case.labels[i[-1]]}"
        found = f"{who}: E_p[psi] is {estimate[i]:.6g}, expected 0 {by}; u jumps inside the support or crosses its boundary, or "
        found += f"log_prob is not normalised{'' if exact else ' or not that of the sampler'}."
        yield _mean("mean of psi", case, exact, size, found, f"at {who}, {by}")
    size, i = worst(error[1:])
    i = (i[0] + 1, *i[1:])
    who, z = f"parameter {case.labels[i[-1]]}", "" if exact else f" (|z| = {size:.1f})"
    found = f"{who}: at the cost {case.said(i[0])} of the {'angle' if case.on_circle else 'standardized value'} the mean estimate is "
    found += f"{estimate[i]:.6g}, the derivative of the mean cost {truth[i]:.6g} {by}{z}; mend the other conditions first."
    yield _mean("unbiased", case, exact, size, found, f"at {who}, {by}")


def _mean(name: str, case: Case, exact: bool, size: float, found: str, where: str) -> Condition:
    holds = size <= (case.tolerance if exact else Z)
    return Condition(name, holds, (f"{size:.1e} " if exact else f"|z| = {size:.1f} ") + where if holds else found)
