"""The conditions of :func:`flowvi.check_estimator` on log p, u and psi at points inside the support."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from operator import attrgetter
from typing import Any

import numpy as np

from flowvi.checks.attached import Attached
from flowvi.checks.differences import STENCIL, STEP, at, difference, worst
from flowvi.checks.domain import Domain
from flowvi.checks.report import Condition
from flowvi.checks.site import PerturbedSite
from flowvi.estimators import Flow, ImplicitRP
from flowvi.ops import Array
from flowvi.tangents import Tangents, unknown_parameter
from flowvi.target import Target

QUANTILES = (0.06, 0.2, 0.37, 0.55, 0.75, 0.93)


def ordinary_points(domain: Domain) -> np.ndarray:
    """A few x that are not special."""
    draws = domain.site.draws
    if domain.chart is None or draws.shape[-1] > 1:
        return draws[: len(QUANTILES)]
    return np.quantile(draws, QUANTILES, axis=0)


def _compare(
    site: PerturbedSite, name: str, x: np.ndarray, pair: tuple[np.ndarray, np.ndarray], scale: np.ndarray, words: tuple[str, str]
) -> Condition:
    """Compare two arrays (n, *batch, D), found and expected at each x, relative to ``scale``. ``words``: what they are, what to do."""
    found, expected = pair
    error, i = worst(abs(found - expected) / np.maximum(scale, 1e-12))
    where = f"{at(x[i[:-1]])}, " + (f"parameter {site.labels[i[-1]]}" if i[-1] < site.size else f"coordinate {i[-1] - site.size} of x")
    if error <= site.tolerance:
        return Condition(name, True, f"{error:.1e} at {where}")
    what, do = words
    return Condition(name, False, f"at {where}: {what} is {found[i] + 0.0:.6g}, expected {expected[i]:.6g} by differences; {do}.")


def _steps_of_x(domain: Domain, x: np.ndarray) -> tuple[np.ndarray, np.ndarray] | None:
    """Directions (m, d) in which x may move, and steps (m, n, *batch) of differences; None if they are not known."""
    site, chart, d = domain.site, domain.chart, x.shape[-1]
    if site.discrete or (chart is None and site.target.chart() is not None):
        return None
    if chart is not None and chart.simplex:
        return (np.eye(d) - np.eye(d)[-1])[:-1], STEP * np.moveaxis(np.minimum(x, x[..., -1:])[..., :-1], -1, 0)
    low, high = np.quantile(site.draws, [0.25, 0.75], axis=0)
    size = np.broadcast_to(np.where(high > low, high - low, 1.0), x.shape)
    if chart is not None and not site.on_circle:
        size = np.minimum(size, np.minimum(abs(x - chart.low), abs(chart.high - x)))
    return np.eye(d), STEP * np.moveaxis(size, -1, 0)


def log_prob(domain: Domain, x: np.ndarray) -> Condition:
    """The automatic derivatives of log p, in the parameters and in x, against differences."""
    site = domain.site
    e, h = _steps_of_x(domain, x) or (np.zeros((0, 1)), np.zeros((0, 1)))

    def f(move: Array) -> list[Array]:
        target, live = site.target_at(move[: site.size], len(x)), site.shaped(x)
        for i in range(len(e)):
            live = live + move[site.size + i] * site.shaped(np.broadcast_to(e[i], x.shape))
        return [target.to_batch(target.p.log_prob(live))]

    def along_x(i: int) -> np.ndarray:
        slope = difference(lambda k: site.log_prob(site.zero, x + k * h[i][..., None] * e[i])) / h[i]
        return slope[..., None]

    automatic = site.host.jacobian(f, site.size + len(e))()[0]
    exact = np.concatenate([site.along(lambda eta: site.log_prob(eta, x)), *map(along_x, range(len(e)))], -1)
    units = np.broadcast_to(1 / site.unit, (*x.shape[:-1], site.size))
    scale = abs(exact) + np.concatenate([units, *(STEP / step[..., None] for step in h)], -1)
    do = "an automatic derivative is missing or wrong; check whether log_prob (or the function that builds p) detaches it"
    return _compare(site, "log_prob", x, (automatic, exact), scale, ("its derivative", do))


class _Numbers(Tangents):
    """Parameter tangents that are numbers: a combination of the parameters' units."""

    def __init__(self, site: PerturbedSite, target: Target, direction: np.ndarray, part: Callable[[Any], Any] = lambda p: p):
        super().__init__(site.host.ops, target, part)
        self._site, self._direction = site, direction

    def __getattr__(self, name: str) -> Array:
        if name not in self.p.arg_constraints:
            self.target.refuse(unknown_parameter(self.p, name))
        return self.of(attrgetter(name))

    def of(self, f: Callable[[Any], Array]) -> Array | None:
        site, n = self._site, self.target.shape[0]
        return difference(lambda k: f(self._part(site.target_at(k * site.steps * self._direction, n).p0))) / STEP

    def within(self, part: Callable[[Any], Any]) -> Tangents:
        return _Numbers(self._site, self.target, self._direction, lambda p: part(self._part(p)))


def linear(attached: Attached, x: np.ndarray) -> Condition:
    """Whether velocity(x, p, dtheta) is 0 at 0, and adds up."""
    site = attached.site
    assert isinstance(attached.estimator, Flow)
    name, velocity, live = "linear in dtheta", attached.estimator.velocity.velocity, site.shaped(x)
    target = site.target_at(site.zero, len(x))

    def dx(direction: np.ndarray) -> np.ndarray:
        u = velocity(live, target.p0, _Numbers(site, target, direction))
        return site.flat(site.host.numpy(target.in_shape(site.host.ops, u, live, "the velocity")))

    at_zero = dx(np.zeros(site.size))
    size, i = worst(abs(at_zero), of_nan=-1.0)
    if size > 1e-12:
        found = f"velocity(x, p, 0) is {at_zero[i]:.4g} at {at(x[i[:-1]])}, expected 0; multiply every term by a dtheta."
        return Condition(name, False, found)
    a, b = np.random.default_rng(site.seed).normal(size=(2, site.size))
    of_a, of_b, of_both = dx(a), dx(b), dx(a - 2 * b)
    error, i = worst(abs(of_both - of_a + 2 * of_b) / np.maximum(abs(of_a) + abs(of_b), 1e-12), of_nan=-1.0)
    if error <= site.tolerance:
        return Condition(name, True, f"{error:.1e} at {at(x[i[:-1]])}")
    found = (
        f"velocity(x, p, a - 2 b) differs from velocity(x, p, a) - 2 velocity(x, p, b) by {error:.2g} of its size at {at(x[i[:-1]])}; "
    )
    return Condition(name, False, found + "only the first order in dtheta may enter.")


def standardization(attached: Attached, domain: Domain, x: np.ndarray) -> Condition:
    """Whether S is invertible in x: monotone, or with a Jacobian whose determinant has only one sign."""
    site = attached.site
    assert isinstance(attached.estimator, ImplicitRP)
    s, name = attached.estimator.standardization, "standardization"
    assert s is not None
    if x.shape[-1] == 1:
        x = np.sort(domain.points[0], 0)
    target = site.target_at(site.zero, len(x))
    if x.shape[-1] > 1:
        jacobian = site.host.ops.jacobian(lambda x: s(x, target.p0), site.shaped(x), target.event_ndim, False)[1]
        signs, logs = np.linalg.slogdet(site.host.numpy(jacobian))
        if np.isfinite(logs).all() and abs(signs.sum()) == signs.size:
            return Condition(name, True, "det dS/dx has one sign")
        return Condition(name, False, "det dS/dx is 0, or its sign is not the same for all x; S must be invertible in x.")
    values = site.flat(site.host.numpy(s(site.shaped(x), target.p0)))[..., 0]
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


def finite(attached: Attached, domain: Domain) -> Condition:
    """Value, score and weight at every point that has mass."""
    x, mass = domain.points
    bad = ~np.isfinite(sum(attached.totals(x)))
    if not bad.any():
        return Condition("finite", True, f"at {len(x)} points")
    _, i = worst(np.where(bad, mass, -1.0))
    share = (mass * bad).sum(0).max()
    found = f"the velocity or the score is NaN or infinite, for example at {at(x[i])}, on a share {share:.2g} of the mass of p; "
    return Condition("finite", False, found + "define it on the whole support (a where needs a safe argument in both branches).")


def elementwise(attached: Attached, x: np.ndarray) -> Condition:
    """Whether u and psi at some elements change when x changes at others."""
    site = attached.site
    name, s = "elementwise", getattr(attached.estimator, "standardization", None)
    if s is not None and site.target.event_ndim == 0:
        target = site.target_at(site.zero, len(x))
        if not site.host.ops.is_elementwise(lambda x: s(x, target.p0), site.shaped(x)):
            found = "S at one element of the batch reads x at another; S may only read its own element (and its own event)."
            return Condition(name, False, found)
    keep = np.indices(x.shape[:-1]).sum(0) % 2 == 0
    moved = np.where(keep[..., None], x, site.draws[len(x) : 2 * len(x)])
    (u, psi), (u_moved, psi_moved) = attached.field(x), attached.field(moved)
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
        "psi is declared 0 (a pathwise field, or an S(x) whose law does not depend on the parameters); psi",
        "give the divergence or leave it to the default, or set exact=False; or correct the field",
    ),
    "score": ("psi", "see log_prob"),
    "divergence": (
        "psi = div u + u . grad log p + d_theta log p",
        "correct divergence(x, p, dtheta), or leave it out: the default is exact",
    ),
}


def psi(attached: Attached, domain: Domain, x: np.ndarray) -> Iterator[Condition]:
    """The score term against its definition, by differences."""
    site = attached.site
    u, score = attached.field(x)
    moves, chart = _steps_of_x(domain, x), domain.chart
    if chart is not None and chart.simplex:
        out, i = worst(abs(u.sum(-2)) / np.maximum(abs(u).sum(-2), 1e-12))
        where, ok = f"{at(x[i[:-1]])}, parameter {site.labels[i[-1]]}", out <= site.tolerance
        found = f"at {where}: the coordinates of u sum to {u.sum(-2)[i]:.4g}, expected 0; u must stay on the simplex."
        yield Condition("tangent", bool(ok), f"{out:.1e} at {where}" if ok else found)
    unmoved = not abs(u).any()
    name = "pathwise" if attached.estimator.psi_is_zero(site.target) else "score" if unmoved else "divergence"
    if moves is None and not unmoved:
        yield Condition(name, None, "not checked: no chart of this support is known")
        return
    divergence = np.zeros(score.shape)
    if not unmoved:
        e, h = moves  # type: ignore[misc]
        stencil = np.concatenate([x + k * h[i][..., None] * e[i] for i in range(len(e)) for k in STENCIL])
        fields = attached.field(stencil)[0].reshape((len(e), len(STENCIL), *u.shape))
        for m in range(len(e)):
            slopes = sum(c * fields[m, j][..., m, :] for j, c in enumerate(STENCIL.values()))
            divergence = divergence + slopes / h[m][..., None]

    def moved(i: int, k: int) -> np.ndarray:
        return site.log_prob(site.moved(i, k), x if unmoved else x + k * site.steps[i] * u[..., i])

    along = np.stack([difference(lambda k, i=i: moved(i, k)) / site.steps[i] for i in range(site.size)], -1)  # type: ignore[misc]
    scale = abs(divergence) + abs(along) + 1 / site.unit
    yield _compare(site, name, x, (score, divergence + along), scale, PSI[name])
