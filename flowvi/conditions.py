"""The conditions of :func:`flowvi.check_estimator`, each a short function of a :class:`~flowvi.case.Case`."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from functools import partial
from operator import attrgetter
from typing import Any

import numpy as np

from flowvi.case import CHUNKS, SEEN, STEP, Case, difference, number
from flowvi.checks import Condition
from flowvi.estimators import Flow, ImplicitRP
from flowvi.ops import Array
from flowvi.quadrature import FAR
from flowvi.target import Tangents, unknown_parameter

Z = 5.0  # the largest z-score
QUANTILES = (0.06, 0.2, 0.37, 0.55, 0.75, 0.93)
NEAR = 28.0  # the log of the mass, over that of the densest panel, up to which an end is approached
NOT_FINITE = "not checked: the field is not finite"


def conditions(case: Case) -> Iterator[Condition]:
    """Every condition that applies, in the order of the docstring; those that others rest on come first."""
    try:
        case.find_steps()
        case.estimator = case.estimator.resolve(case.still)
        if not case.estimator.uses_sampler:
            _attach_once(case)
    except _NotCovered as error:
        yield Condition("support of q", False, f"{error}")
        return
    except ValueError as error:
        yield Condition("requirements", False, f"{_bare(error)} (Or leave a parameter that is a constant out of `parameters`.)")
        return
    yield Condition("requirements", True, "accepted")
    x = _points(case)
    yield _log_prob(case, x)
    if case.estimator.q is not None:
        covered = _covered(case)
        yield covered
        if not covered.holds:
            return
    finite = True
    if not case.estimator.uses_sampler:
        if isinstance(case.estimator, Flow) and case.estimator.velocity is not None:
            yield _linear(case, x)
        if isinstance(case.estimator, ImplicitRP) and case.estimator.standardization is not None:
            yield _standardization(case, x)
        found = _finite(case, x)
        yield found
        finite = bool(found.holds)
        if finite:
            yield _elementwise(case, x)
            yield from _psi(case, x)
            yield from _boundary(case)
            if case.estimator.q is not None:
                yield _second_moment(case)
    yield _sampler(case)
    if finite:
        yield from _unbiased(case)
    else:
        yield Condition("unbiased", None, NOT_FINITE)


# ---- what flowvi itself refuses


class _NotCovered(Exception):
    """What is wrong with a q."""


def _bare(error: Exception) -> str:
    return str(error).removeprefix("site 'x': ")


def _attach_once(case: Case) -> None:
    target = case.target(case.moved(), 1)
    try:
        case.estimator.proposal(case.ops, target)
    except ValueError as error:
        raise _NotCovered(_bare(error)) from error
    case.field(case.draws[:1])


def _points(case: Case) -> np.ndarray:
    """A few x that are not special."""
    chart = case.chart(case.still)
    if chart is None or case.draws.shape[-1] > 1:
        return case.draws[: len(QUANTILES)]
    return np.quantile(case.draws, QUANTILES, axis=0)


def _at(x: np.ndarray) -> str:
    x = np.asarray(x).reshape(-1)
    return f"x = {x[0]:.4g}" if x.size == 1 else f"x = [{', '.join(f'{v:.4g}' for v in x[:6])}{', ...' if x.size > 6 else ''}]"


def _compare(
    case: Case, name: str, x: np.ndarray, found: np.ndarray, expected: np.ndarray, scale: np.ndarray, what: str, do: str
) -> Condition:
    """``found`` and ``expected`` (n, *batch, D) at each x, relative to ``scale``."""
    with np.errstate(invalid="ignore"):
        error = abs(found - expected) / np.maximum(scale, 1e-12)
    error = np.where(np.isnan(error), np.inf, error)
    at = np.unravel_index(error.argmax(), error.shape)
    of = f"parameter {case.labels[at[-1]]}" if at[-1] < case.size else f"coordinate {at[-1] - case.size} of x"
    where = f"{_at(x[at[:-1]])}, {of}"
    if error.max() <= case.tolerance:
        return Condition(name, True, f"{error.max():.1e} at {where}")
    return Condition(name, False, f"at {where}: {what} is {found[at] + 0.0:.6g}, expected {expected[at]:.6g} by differences; {do}.")


# ---- derivatives of log p


def _x_moves(case: Case, x: np.ndarray) -> tuple[np.ndarray, np.ndarray] | None:
    """Directions (m, d) in which x may move, and steps (m, n, *batch) for differences; None on an unknown thin support."""
    d = x.shape[-1]
    low, high = np.quantile(case.draws, [0.25, 0.75], axis=0)
    size = np.broadcast_to(np.where(high > low, high - low, 1.0), x.shape)
    chart = case.chart(case.still)
    if chart is None and case.still.chart() is not None:
        return None
    if chart is not None and chart.simplex:
        e = (np.eye(d) - np.eye(d)[-1])[:-1]
        size = np.minimum(x, x[..., -1:])[..., :-1]
    else:
        e = np.eye(d)
        if chart is not None and not case.on_circle:
            size = np.minimum(size, np.minimum(abs(x - chart.low), abs(chart.high - x)))
    return e, STEP * np.moveaxis(size, -1, 0)


def _log_prob(case: Case, x: np.ndarray) -> Condition:
    """The automatic derivatives of log p, in the parameters and in x, against differences."""
    moves = None if case.discrete else _x_moves(case, x)
    e, h = (np.zeros((0, 1)), np.zeros((0, 1))) if moves is None else moves

    def f(move: Array) -> list[Array]:
        target = case.target(move[: case.size], len(x))
        live = case.shaped(x)
        for i in range(len(e)):
            live = live + move[case.size + i] * case.shaped(np.broadcast_to(e[i], x.shape))
        return [target.to_batch(target.p.log_prob(live))]

    automatic = case.host.jacobian(f, case.size + len(e))()[0]
    in_x = [difference(lambda k, i=i: case.log_prob(case.moved(), x + k * h[i][..., None] * e[i])) / h[i] for i in range(len(e))]
    exact = np.concatenate([case.along(lambda eta: case.log_prob(eta, x)), *(d[..., None] for d in in_x)], -1)
    units = np.broadcast_to(STEP / case.steps, (*x.shape[:-1], case.size))
    scale = abs(exact) + np.concatenate([units, *(STEP / step[..., None] for step in h)], -1)
    do = "an automatic derivative is cut or wrong: see whether log_prob (or the function that builds the distribution) detaches it"
    return _compare(case, "log_prob", x, automatic, exact, scale, "its derivative", do)


# ---- the field at a point


class _Numbers(Tangents):
    """Parameter tangents with numbers for values: a multiple of one parameter's unit, or of several."""

    def __init__(self, case: Case, target: Any, direction: np.ndarray, part: Callable[[Any], Any] = lambda p: p):
        super().__init__(case.ops, target, part)
        self._case, self._direction = case, direction

    def __getattr__(self, name: str) -> Array:
        if name not in self.p.arg_constraints:
            self.target.refuse(unknown_parameter(self.p, name))
        return self.of(attrgetter(name))

    def of(self, f: Callable[[Any], Array]) -> Array | None:
        case = self._case

        def at(k: int) -> Array:
            target = case.target(k * case.steps * self._direction, self.target.shape[0])
            return f(self._part(target.p0))

        return difference(at) / STEP

    def within(self, part: Callable[[Any], Any]) -> Tangents:
        return _Numbers(self._case, self.target, self._direction, lambda p: part(self._part(p)))


def _linear(case: Case, x: np.ndarray) -> Condition:
    assert isinstance(case.estimator, Flow)
    velocity = case.estimator._field.velocity
    target = case.target(case.moved(), len(x))

    def dx(direction: np.ndarray) -> np.ndarray:
        live = case.shaped(x)
        u = velocity(live, target.p0, _Numbers(case, target, direction))
        return case.flat(number(target.in_shape(case.ops, u, live, "the velocity")))

    at_zero = dx(np.zeros(case.size))
    if abs(at_zero).max() > 1e-12:
        at = np.unravel_index(abs(at_zero).argmax(), at_zero.shape)
        return Condition(
            "linear in dtheta",
            False,
            f"velocity(x, p, 0) is {at_zero[at]:.4g} at {_at(x[at[:-1]])}, expected 0; multiply every term by a dtheta.",
        )
    rng = np.random.default_rng(case.seed)
    worst, where = 0.0, ""
    for _ in range(2):
        a, b = rng.normal(size=(2, case.size))
        parts = dx(a), dx(b)
        error = abs(dx(a - 2 * b) - parts[0] + 2 * parts[1]) / np.maximum(abs(parts[0]) + abs(parts[1]), 1e-12)
        at = np.unravel_index(np.nan_to_num(error).argmax(), error.shape)
        if error[at] >= worst:
            worst, where = float(error[at]), _at(x[at[:-1]])
    if worst <= case.tolerance:
        return Condition("linear in dtheta", True, f"{worst:.1e} at {where}")
    return Condition(
        "linear in dtheta",
        False,
        f"velocity(x, p, a - 2 b) differs from velocity(x, p, a) - 2 velocity(x, p, b) by {worst:.2g} of its size at {where}; "
        "only the first order in dtheta may enter.",
    )


def _finite(case: Case, x: np.ndarray) -> Condition:
    """Value, score and weight at every point that has mass."""
    mass = np.full(x.shape[:-1], 1 / len(x))
    if case.points is not None:
        y, log_w = case.points
        x, log_p = case.riding(case.moved(), y)
        mass = np.exp(log_p + log_w)
        x = np.where((mass > SEEN)[..., None], x, case.middle)
    elif not case.discrete:
        x = case.draws
        mass = np.full(x.shape[:-1], 1 / len(x))
    bad = ~np.isfinite(sum(case.drawn(x)))
    if not bad.any():
        return Condition("finite", True, f"at {len(x)} points")
    at = np.unravel_index(np.where(bad, mass, -1).argmax(), bad.shape)
    share = mass[(slice(None), *at[1:])][bad[(slice(None), *at[1:])]].sum()
    return Condition(
        "finite",
        False,
        f"the velocity or the score is NaN or infinite, for example at {_at(x[at])}, on a share {share:.2g} of the mass of p; "
        "define it on the whole support (a where needs a safe argument in both branches).",
    )


def _elementwise(case: Case, x: np.ndarray) -> Condition:
    """Whether u and psi at some elements change where the others do."""
    if isinstance(case.estimator, ImplicitRP) and (s := case.estimator.standardization) is not None and case.still.event_ndim == 0:
        target = case.target(case.moved(), len(x))
        if not case.ops.is_elementwise(lambda v: s(v, target.p0), case.shaped(x)):
            found = "S at one element of the batch reads x at another; for an event, S of a distribution with event dims may."
            return Condition("elementwise", False, found)
    keep = np.indices(x.shape[:-1]).sum(0) % 2 == 0
    other = case.draws[len(x) : 2 * len(x)]
    moved = np.where(keep[..., None], x, other)
    worst, at = 0.0, (0,)
    for mine, changed in zip(case.field(x), case.field(moved), strict=True):
        mask = keep.reshape((*keep.shape, *[1] * (mine.ndim - keep.ndim)))
        error = np.where(mask, abs(mine - changed) / (1e-9 + abs(mine) + abs(changed)), 0.0)
        if error.max() > worst:
            worst, at = error.max(), np.unravel_index(error.argmax(), error.shape)[: keep.ndim]
    if worst <= 1e-6:
        return Condition("elementwise", True, f"{worst:.1e} at {_at(x[at])}")
    return Condition(
        "elementwise",
        False,
        f"at {_at(x[at])} the velocity or the score changes by {worst:.2g} of its size when x changes at another element of the batch; "
        "a field reads x at its own element only (and its own event).",
    )


def _psi(case: Case, x: np.ndarray) -> Iterator[Condition]:
    """The score term against its definition, all by differences."""
    u, psi = case.field(x)
    moves = None if case.discrete else _x_moves(case, x)
    chart = case.chart(case.still)
    if chart is not None and chart.simplex:
        out = abs(u.sum(-2)) / np.maximum(abs(u).sum(-2), 1e-12)
        at = np.unravel_index(out.argmax(), out.shape)
        where = f"{_at(x[at[:-1]])}, parameter {case.labels[at[-1]]}"
        if out.max() > case.tolerance:
            found = f"at {where}: the coordinates of u sum to {u.sum(-2)[at]:.4g}, expected 0; u must stay on the simplex."
            yield Condition("tangent", False, found)
        else:
            yield Condition("tangent", True, f"{out.max():.1e} at {where}")
    still = not abs(u).any()
    name = "pathwise" if case.estimator.psi_is_zero(case.still) else "score" if still else "divergence"
    if moves is None and not still:
        yield Condition(name, None, "not checked: the divergence on this support has no known chart")
        return
    divergence: Any = 0.0
    if not still and moves is not None:
        e, h = moves
        stencil = np.concatenate([x + k * h[i][..., None] * e[i] for i in range(len(e)) for k in (-2, -1, 1, 2)])
        fields = case.field(stencil)[0].reshape((len(e), 4, *u.shape))
        order = {-2: 0, -1: 1, 1: 2, 2: 3}
        divergence = sum(difference(lambda k, i=i: fields[i, order[k]][..., i, :]) / h[i][..., None] for i in range(len(e)))

    def moved(i: int, k: int) -> np.ndarray:
        return case.log_prob(case.moved(i, k), x if still else x + k * case.steps[i] * u[..., i])

    rest = np.stack([difference(partial(moved, i)) / case.steps[i] for i in range(case.size)], -1)
    expected = divergence + rest
    scale = abs(divergence) + abs(rest) + STEP / case.steps
    what, do = {
        "pathwise": (
            "psi is declared 0 (the field as pathwise, or the law of S(x) as free of the parameters), so that this psi",
            "give the divergence or leave it to the default, or exact=False; or mend the field",
        ),
        "score": ("psi", "see log_prob"),
        "divergence": (
            "psi = div u + u . grad log p + d_theta log p",
            "mend divergence(x, p, dtheta), or leave it out: the default is exact",
        ),
    }[name]
    yield _compare(case, name, x, psi, expected, scale, what, do)


def _standardization(case: Case, x: np.ndarray) -> Condition:
    """Whether S increases or decreases throughout."""
    name = "standardization"
    assert isinstance(case.estimator, ImplicitRP)
    s = case.estimator.standardization
    assert s is not None
    d = x.shape[-1]
    if d == 1 and case.points is not None:
        y, log_w = case.points
        x, log_p = case.riding(case.moved(), y)
        mass = np.exp(log_p + log_w)
        x = np.where((mass > SEEN)[..., None], x, np.nan)
        x = np.sort(x, 0)[: int(np.isfinite(x).all((1, *range(2, x.ndim))).sum())]
    target = case.target(case.moved(), len(x))
    if d == 1:
        values = case.flat(number(s(case.shaped(np.sort(x, 0)), target.p0)))[..., 0]
        size = values.max(0) - values.min(0)
        if not (size > 0).all():
            return Condition(name, False, "S does not depend on x; it must be invertible in x.")
        slopes = np.diff(values, axis=0) / size
        rising, falling = (slopes > -1e-12).all(0), (slopes < 1e-12).all(0)
        if (rising | falling).all():
            return Condition(name, True, "monotone in x")
        wrong = slopes * np.sign(values[-1] - values[0] + 1e-300) < -1e-12
        at = np.unravel_index(wrong.argmax(), wrong.shape)
        return Condition(
            name, False, f"S is not monotone in x: its slope changes its sign near {_at(np.sort(x, 0)[at])}; S must be invertible."
        )
    jacobian = case.ops.jacobian(lambda v: s(v, target.p0), case.shaped(x), target.event_ndim, False)[1]
    signs, logs = np.linalg.slogdet(number(jacobian))
    if not np.isfinite(logs).all():
        return Condition(name, False, f"det dS/dx is 0, for example at {_at(x[~np.isfinite(logs)][0])}; S must be invertible in x.")
    if abs(signs.sum()) < signs.size:
        return Condition(name, False, f"det dS/dx changes its sign, for example at {_at(x[signs < 0][0])}; S must be invertible in x.")
    return Condition(name, True, "det dS/dx has one sign")


# ---- the ends of the support


def _boundary(case: Case) -> Iterator[Condition]:
    chart, name = case.chart(case.still), "boundary flux"
    if case.discrete or case.points is None and not (chart is not None and chart.simplex):
        return
    assert chart is not None
    if chart.simplex:
        yield _faces(case)
        return
    if case.draws.shape[-1] > 1:
        if np.isfinite(chart.low).any() or np.isfinite(chart.high).any():
            yield Condition(name, None, "not checked: events of several bounded coordinates")
        return
    y, log_w = case.points  # type: ignore[misc]
    low, high = chart.limits()
    centre = case.coordinates.centre
    log_p = case.riding(case.moved(), y)[1] + log_w
    seen = (log_p > log_p.max(0) - NEAR)[..., None]
    ends = np.maximum(np.where(seen, y, np.inf).min(0), low), np.minimum(np.where(seen, y, -np.inf).max(0), high)
    path = np.stack([end + s * (centre - end) for end in ends for s in (0.0, 0.08, 0.16)])
    x = chart.to_x(path)
    log_p = case.log_prob(case.moved(), x)
    u = case.field(x)[0][..., 0, :]
    speeds = _speeds(case)
    flux = (
        np.exp(log_p)[..., None] * (u - np.repeat(np.stack(speeds), 3, axis=0)) * (case.steps / STEP)
    )  # a share of the mass for one unit
    if case.on_circle:
        yield _seam(case, flux)
        return
    worst = Condition(name, True, f"{abs(flux[[0, 3]]).max():.1e}, as a share of the mass")
    for side, (f0, f1, f2) in (("lower", flux[:3]), ("upper", flux[3:])):
        vanishes = _vanishes(case, f0, f1, f2)
        if not vanishes.all():
            bad = np.where(vanishes, -1.0, np.where(np.isfinite(f0), abs(f0), np.inf))
            at = np.unravel_index(bad.argmax(), bad.shape)
            end = (chart.low if side == "lower" else chart.high)[(*at[:-1], 0)]
            bound = "moves" if abs(speeds[side == "upper"][at]) > 0 else "is fixed"
            do = (
                f"at infinity u carries mass away: p u must vanish there"
                if not np.isfinite(end)
                else f"the {side} end of the support {bound}: u must "
                + ("ride it (be its speed there)" if bound == "moves" else "vanish there")
            )
            rate = f0[at] / (case.steps[at[-1]] / STEP)
            found = f"at the {side} end x = {end:.4g}, parameter {case.labels[at[-1]]}: p (u - v) is {rate:.4g}, expected 0; {do}."
            return (yield Condition(name, False, found))
    yield worst


def _vanishes(case: Case, f0: np.ndarray, f1: np.ndarray, f2: np.ndarray) -> np.ndarray:
    """Whether a flux goes to 0 like a power, from three points whose distances from the end are in proportion, the nearest first.

    The relative change from point to point then stays, while with another limit it goes to 0.
    """
    with np.errstate(divide="ignore", invalid="ignore"):
        near, far = abs(f1 / f0) - 1, abs(f2 / f1) - 1
        return (abs(f0) <= case.tolerance) | ((near > 0.02) & (near > 0.7 * far))


def _speeds(case: Case) -> list[np.ndarray]:
    """The derivatives of both bounds, (*batch, D); 0 for those that stay or are infinite."""

    def bound(side: str, eta: np.ndarray) -> np.ndarray:
        values = getattr(case.chart(case.target(eta, 1)), side)[..., 0]
        return np.where(np.isfinite(values), values, 0.0)

    return [case.along(partial(bound, side)) for side in ("low", "high")]


def _seam(case: Case, flux: np.ndarray) -> Condition:
    left, right = flux[0], flux[3]
    gap = abs(right - left)
    at = np.unravel_index(gap.argmax(), gap.shape)
    if not gap.max() <= case.tolerance:
        found = (
            f"at the seam, parameter {case.labels[at[-1]]}: p u is {right[at]:.4g} on the left of pi and {left[at]:.4g} on the right of -pi "
            "(as a share of the mass); what leaves must come in again, or vanish."
        )
        return Condition("boundary flux", False, found)
    case.periodic_only = bool(abs(flux[[0, 3]]).max() > case.tolerance)
    return Condition(
        "boundary flux", True, "mass crosses the seam: right for periodic costs only" if case.periodic_only else "0 at the seam"
    )


def _faces(case: Case) -> Condition:
    """p times the normal velocity where one coordinate of the simplex goes to 0."""
    base = case.draws[:3]
    k = base.shape[-1]
    deltas = (1e-8, 1e-7, 1e-6)
    found, worst = None, 0.0
    for i in range(k):
        points = []
        for delta in deltas:
            x = base.copy()
            x[..., i] = 0.0
            points.append(x / x.sum(-1, keepdims=True) * (1 - delta) + delta * np.eye(k)[i])
        x = np.concatenate(points)
        u = case.field(x)[0][..., i, :]
        flux = np.exp(case.log_prob(case.moved(), x))[..., None] * u * (case.steps / STEP)
        f0, f1, f2 = flux.reshape((3, *base.shape[:-1], case.size))
        vanishes = _vanishes(case, f0, f1, f2)
        worst = max(worst, abs(f0).max())
        if not vanishes.all() and found is None:
            at = np.unravel_index(np.where(vanishes, -1, abs(f0)).argmax(), f0.shape)
            found = f"where coordinate {i} of x is 0, parameter {case.labels[at[-1]]}: p u is {f0[at]:.3g} (as a share), expected 0; u must vanish there."
    return Condition("boundary flux", found is None, found or f"{worst:.1e}, as a share of the mass")


# ---- the sampling density


def _log_q(case: Case, x: np.ndarray) -> np.ndarray:
    target = case.target(case.moved(), len(x))
    q, _ = case.estimator.proposal(case.ops, target)
    return np.asarray(number(target.to_batch(q.log_prob(case.shaped(x)))), float)


def _covered(case: Case) -> Condition:
    """Whether the density of q is positive where that of p is."""
    if case.points is None:
        x, log_mass = case.draws, np.zeros(case.draws.shape[:-1])
    else:
        y, log_w = case.points
        x, log_p = case.riding(case.moved(), y)
        log_mass = log_p + log_w
    missed = (log_mass > math.log(SEEN)) & ~(_log_q(case, x) > -np.inf)
    if not missed.any():
        return Condition("support of q", True, f"positive at {len(x)} points of p")
    at = np.unravel_index(np.where(missed, log_mass, -np.inf).argmax(), missed.shape)
    return Condition("support of q", False, f"the density of q is 0 (or NaN) at {_at(x[at])}, where p is positive; widen q.")


def _second_moment(case: Case) -> Condition:
    """Whether the integrals of (w u)^2 q and (w psi)^2 q are finite: in the tails, and where q vanishes inside."""
    name = "second moment"
    if case.discrete and case.points is not None:
        if np.isfinite(np.max(number(case.still.support.upper))) if case.still.support.kind == "coordinates" else True:
            return Condition(name, True, "the support is finite")
        x = case.points[0]
        log_square = 2 * case.log_prob(case.moved(), x) - _log_q(case, x)
        heavy = ~(log_square[-1] < log_square[-2])
        where, which = x[-1], ""
    elif (chart := case.chart(case.still)) is not None:
        d = case.coordinates.centre.shape[-1]
        units = np.concatenate([np.eye(d), np.random.default_rng(case.seed).normal(size=(6 * (d > 1), d))])
        units = units / np.linalg.norm(units, axis=-1, keepdims=True)
        r = np.linspace(1, FAR, 71)
        t = np.stack([case._spread(r[:, None] * unit) for unit in (*units, *-units)])  # (rays, 71, *batch, d)
        y = case.coordinates.to_y(t)
        low, high = chart.limits() if not chart.simplex else (-np.inf, np.inf)
        x, log_p = case.riding(case.moved(), y.reshape((-1, *y.shape[2:])))
        slope = chart.log_slope(y) + 0 * y[..., 0]
        log_p = log_p.reshape(slope.shape)
        with np.errstate(invalid="ignore"):
            log_square = 2 * log_p - slope - _log_q(case, x).reshape(slope.shape) + case.coordinates.log_slope(t)
        ok = np.isfinite(log_square) & ((y > low) & (y < high)).all(-1)
        last = np.where(ok, np.arange(71).reshape(1, -1, *[1] * len(case.batch)), 0).max(1, keepdims=True)
        index = [np.broadcast_to(np.maximum(last - k, 0), (len(t), 1, *case.batch)) for k in (0, 1)]
        x = x.reshape((*slope.shape, -1))
        ends = [
            _with_field(case, np.take_along_axis(x, i[..., None], 1)[:, 0], np.take_along_axis(log_square, i, 1)[:, 0]) for i in index
        ]
        heavy = ~(ends[0] < ends[1])
        at = np.unravel_index(heavy.argmax(), heavy.shape)
        where = x[(at[0], int(last[(at[0], 0, *at[1:-1])]), *at[1:-1])]
        which = f", parameter {case.labels[at[-1]]}"
    else:
        return Condition(name, None, "not checked: a support of an unknown kind")
    if heavy.any():
        return Condition(
            name,
            False,
            f"E_q[w^2 (u^2 + psi^2)] is infinite{which}: towards {_at(where)} its integrand does not decay, as the tail of q is too light; "
            "widen q (proposals.tempered, student_t or defensive).",
        )
    if case.points is None:
        return Condition(name, True, "p^2/q decays in the tails")
    y, log_w = case.points
    x, log_p = case.riding(case.moved(), y)
    log_weight = case.log_prob(case.moved(), x) - _log_q(case, x)
    if (
        not case.discrete
        and y.shape[-1] == 1
        and (where_q := _zero_of_q(case, y, np.where(log_p + log_w > math.log(SEEN), log_weight, -np.inf)))
    ):
        return Condition(name, False, where_q)
    square = np.exp(np.where(log_p > -np.inf, log_weight + log_p + log_w, -np.inf)).sum(0).max()
    return Condition(
        name, True, f"E_q[w^2] = {square:.3g}" if square < 1e6 else "finite for these parameters, though q vanishes somewhere"
    )


def _with_field(case: Case, x: np.ndarray, log_square: np.ndarray) -> np.ndarray:
    """The log of p^2/q (psi^2 + (relative u)^2), (n, *batch, D), as far as the field is known there."""
    u, psi = case.field(x)
    reach = np.quantile(abs(case.draws - case.middle), 0.5, axis=0) + abs(x - case.middle)
    with np.errstate(divide="ignore", invalid="ignore"):
        size = 2 * np.logaddexp(np.log(abs(psi)), np.log(abs(u)).max(-2) - np.log(reach).max(-1, keepdims=True))
    return log_square[..., None] + np.where(np.isnan(size) | (size == np.inf), 0.0, size)


def _zero_of_q(case: Case, y: np.ndarray, log_weight: np.ndarray) -> str | None:
    """What is wrong where q vanishes inside the support: found by looking ever closer at the largest weight."""
    order = np.argsort(y, 0)[..., 0]
    y, log_weight = np.take_along_axis(y, order[..., None], 0), np.take_along_axis(log_weight, order, 0)
    first = log_weight.max(0)
    k = log_weight.argmax(0)[None]
    low, high = (np.take_along_axis(y, np.clip(k + s, 0, len(y) - 1)[..., None], 0)[0] for s in (-1, 1))
    for _ in range(10):
        grid = low + (high - low) * np.linspace(0, 1, 42).reshape(-1, *[1] * low.ndim)
        x = case.riding(case.moved(), grid)[0]
        log_weight = case.log_prob(case.moved(), x) - _log_q(case, x)
        log_weight = np.where(np.isnan(log_weight), -np.inf, log_weight)
        k = log_weight.argmax(0)[None]
        low, high = (np.take_along_axis(grid, np.clip(k + s, 0, 41)[..., None], 0)[0] for s in (-1, 1))
    middle = (low + high) / 2
    if not (log_weight.max(0) > first + 3).any():
        return None
    near = np.stack([middle + side * h * case.coordinates.spread[..., 0] for h in (1e-5, 1e-4) for side in (-1, 1)])
    x, log_p = case.riding(case.moved(), near)
    u, psi = case.field(x)
    with np.errstate(divide="ignore"):
        size = np.log(psi**2 + (u[..., 0, :] / case.coordinates.spread[..., 0]) ** 2)
    log_square = (log_p + case.log_prob(case.moved(), x) - _log_q(case, x))[..., None] + size
    rate = (log_square[:2] - log_square[2:]) / math.log(10)
    rate = np.where(np.isnan(rate), -np.inf, rate)
    if not (rate > 0.95).any():
        return None
    at = np.unravel_index(rate.argmax(), rate.shape)
    return (
        f"q vanishes near {_at(x[at[:-1]])}, where the estimator of {case.labels[at[-1]]} does not: its second moment is infinite; mix p into q "
        "(proposals.defensive), or check only the parameter that q is for."
    )


# ---- means


def _sampler(case: Case) -> Condition:
    """Weighted means of the costs over draws, against those by the rule (the mean weight, where there is none)."""
    x, w = case.proposed
    terms = w * case.costs_at(x)
    if case.points is None:
        expected, terms = np.ones((1, *case.batch)), terms[:1]
    else:
        y, log_w = case.points
        at_y, log_p = case.riding(case.moved(), y)
        expected = (np.exp(log_p + log_w) * case.costs_at(at_y)).sum(1)
    n = terms.shape[1]
    z = (terms.mean(1) - expected) / (terms.std(1) / math.sqrt(n) + case.tolerance / Z)
    at = np.unravel_index(abs(z).argmax(), z.shape)
    if abs(z).max() < Z:
        return Condition("sampler", True, f"z = {z[at]:.1f} over {n} draws")
    what = "q" if case.estimator.q is not None else "p"
    return Condition(
        "sampler",
        False,
        f"the mean of {case.said(at[0])} over draws of {what} is {terms.mean(1)[at]:.4g}, expected {expected[at]:.4g} by its density "
        f"(z = {z[at]:.1f}); sample and log_prob of {what} do not agree, or its weights have no finite variance.",
    )


def _unbiased(case: Case) -> Iterator[Condition]:
    exact = case.points is not None and not case.estimator.uses_sampler
    if exact:
        (estimate, doubt), truth = case.estimate(), case.truth()
        truth[0] = 0.0  # of a normalized density
        unit = abs(truth).max(0) + STEP / case.steps
        error = abs(estimate - truth) / unit
        if (doubt / unit).max() > case.tolerance:
            case.points, exact = None, False
    if not exact:
        estimates, truths = case.sampled()
        truths[0] = 0.0
        estimate, truth = estimates.mean(1), truths.mean(1)
        noise = (estimates - truths).std(1, ddof=1) / math.sqrt(CHUNKS)
        error = abs(estimate - truth) / (noise + case.tolerance / Z * STEP / case.steps)
    error = np.where(np.isnan(error), np.inf, error)
    limit, measure = (case.tolerance, "") if exact else (Z, "|z| = ")
    by = "by quadrature" if exact and not case.discrete else "by summation" if exact else f"over {case.num_samples} samples"
    parts = [("mean of psi", slice(0, 1))] * (not case.estimator.uses_sampler) + [("unbiased", slice(1, None))]
    for name, j in parts:
        at = np.unravel_index(error[j].argmax(), error[j].shape)
        which = (at[0] + (j.start or 0), *at[1:])
        where = f"parameter {case.labels[at[-1]]}"
        if error[j].max() <= limit:
            yield Condition(name, True, f"{measure}{error[which]:.1e} at {where}, {by}")
            continue
        z = "" if exact else f" (|z| = {error[which]:.1f})"
        if name == "mean of psi":
            found = (
                f"{where}: E_p[psi] is {estimate[which]:.6g}, expected 0 {by}{z}; u jumps inside the support or crosses its boundary, or log_prob "
                f"is not normalised{'' if exact else ' or not that of the sampler'}."
            )
        else:
            found = (
                f"{where}: at the cost {case.said(which[0])} of the standardized value z the mean estimate is {estimate[which]:.6g}, the derivative "
                f"of the mean cost {truth[which]:.6g} {by}{z}; mend the conditions above first."
            )
        yield Condition(name, False, found)
