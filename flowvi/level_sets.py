"""Smooth surfaces g(x) = 0 across which the cost jumps. A random ray is followed to a point on the surface."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import KW_ONLY, dataclass
from functools import partial
from typing import Any, NamedTuple

from flowvi.ops import Array, Ops
from flowvi.surfaces import Crossing, Normals, Surface, evaluated
from flowvi.target import Target

FAR = 40.0  # standard deviations; the density there is 0 in double precision
BISECTIONS = 60
CLOSE = 0.01  # standard deviations; closer to the surface, rounding may decide on which side a point is
SPACING = 0.15  # of the nodes of the trapezoid rule
NODES = [-5.5 + SPACING * i for i in range(97)]


@dataclass(frozen=True, repr=False)
class LevelSet(Surface):
    r"""The surface :math:`g(x, p) = 0` in the space of an event: the cost jumps where x crosses it.

    For ``jumps`` of :class:`RP`, :class:`ImplicitRP`, :class:`Flow` and :class:`LR`. It takes two more evaluations of the program. For
    each sample, a random ray from the centre (or a random line in the given direction) is followed to the point y where g changes its
    sign. With s the distance along the ray, in standard deviations of p, and f(s) the density of s, the term is
    :math:`f(s)\,(u\cdot\nabla g + \partial_\theta g)\,[\phi] / |\partial_s g|`. It is 0 on a ray that does not cross the surface.

    **Requirements**: a MultivariateNormal with a ``scale_tril``, or Normals that are one event by ``to_event(1)``. A smooth g whose
    sign changes at most once on each ray or line: for a ball, any inner point is a centre; for the graph :math:`x_2 = h(x_1)`, use the
    direction (0, 1). This is checked at one random point of each ray.

    Args:
        g: ``g(x, p)``, written with array operations, for x of batch and event shape. It returns an array of the batch shape, element
            by element. p has live parameters. Anything else that g reads may depend on parameters and on earlier draws.
        centre: The starting point of the rays: an array that broadcasts to x, or a function of p.
        along: Instead of a centre, the direction of the lines: an array that broadcasts to x, or a function of p.

    Raises:
        TypeError: ``g`` is not a function; both a centre and a direction, or neither.
        ValueError: At the first run, naming the site: another family, an event that is not a vector, a g of another shape or that reads
            x at other elements of the batch. Later, if a ray or line crosses the surface more than once; in a program that JAX has
            traced, the gradient is NaN instead.

    Example:
        The gradient of P(|x| > 1) under two Normals of scale s = 1 around 0, in s, is exp(-1/2):

        >>> import jax, jax.numpy as jnp, numpyro, numpyro.distributions as dist
        >>> from flowvi import RP, LevelSet
        >>> from flowvi.numpyro import TraceFlow_ELBO
        >>> def model():
        ...     x = numpyro.sample("x", dist.Normal(0.0, 1.0).expand([2]).to_event(1).mask(False))
        ...     numpyro.factor("cost", 1.0 * ((x**2).sum() > 1.0))
        >>> def guide():
        ...     numpyro.sample("x", dist.Normal(jnp.zeros(2), numpyro.param("scale", 1.0)).to_event(1).mask(False))
        >>> circle = LevelSet(lambda x, p: (x**2).sum(-1) - 1.0, centre=jnp.zeros(2))
        >>> elbo = TraceFlow_ELBO(default=RP(jumps=circle))
        >>> gradient = jax.grad(lambda scale, key: -elbo.loss(key, {"scale": scale}, model, guide))
        >>> [round(float(gradient(1.0, jax.random.key(seed))), 4) for seed in range(3)]
        [0.6065, 0.6065, 0.6065]

    References:
        Lee, Yu and Yang 2018.
    """

    g: Callable[[Array, Any], Array]
    _: KW_ONLY
    centre: Array | Callable[[Any], Array] | None = None
    along: Array | Callable[[Any], Array] | None = None

    def __post_init__(self) -> None:
        if not callable(self.g):
            raise TypeError(f"LevelSet: expected a function g(x, p), found {self.g!r}.")
        if (self.centre is None) == (self.along is None):
            raise TypeError(f"LevelSet: expected one of centre and along, found {'neither' if self.centre is None else 'both'}.")

    def crossing(self, ops: Ops, target: Target, p: Normals, z: Array) -> Crossing:
        def g(x: Array, of: Any = target.p0) -> Array:
            return target.in_shape(ops, self.g(x, of), x[..., 0], "g of a LevelSet")

        if target.validate and target.first_use and z.ndim > 1:
            with target.probe(z) as (x, of):
                ok = ops.is_elementwise(lambda t: g(x + t[..., None], of), 0 * x[..., 0])
            target.check(ops, ok, "g of a LevelSet must read x at its own element of the batch only.")
        ray = (self._ray if self.along is None else self._line)(ops, target, p, z)

        def at(s: Array) -> Array:
            return p.loc + p.root(ray.start + s[..., None] * ray.direction)

        def is_positive(s: Array) -> Array:
            return ops.stop_gradient(g(at(s))) > 0

        first, last = is_positive(ray.low), is_positive(ray.high)

        def halve(ends: tuple[Array, Array]) -> tuple[Array, Array]:
            middle = (ends[0] + ends[1]) / 2
            before = is_positive(middle) == first
            return ops.where(before, middle, ends[0]), ops.where(before, ends[1], middle)

        s, _ = ops.iterate(halve, BISECTIONS, (ray.low, ray.high))
        crosses = first != last
        expected = ops.where(crosses & (ray.drawn > s), last, first)
        again = (is_positive(ray.drawn) != expected) & (abs(ray.drawn - s) > CLOSE)
        target.check(
            ops,
            (~again).all(),
            f"g of a LevelSet changes its sign more than once on a {'ray from the centre' if self.along is None else 'line'}; expected "
            "at most once, so choose another centre or direction, or use LR().",
        )
        s = ops.where(crosses, s, ray.drawn)  # on a ray that does not cross the surface: any point, with weight 0
        y = at(s)
        _, normal = ops.gradient(g, y, live=False)
        across = p.root(ray.direction)
        slope = (normal * across).sum(-1)
        safe = ops.where(crosses, slope, 0 * slope + 1)
        weight = ops.where(crosses, ops.exp(ray.log_density(s)) / abs(safe), 0 * s)
        size = 1 + (abs(normal) * (abs(y) + abs(p.loc) + abs(p.root(ray.start)) + abs(s[..., None] * across))).sum(-1)
        weight = ops.where(again, float("nan") + weight, weight)
        return Crossing(y, across / safe[..., None], weight, normal, g(y, target.p), size)

    def _line(self, ops: Ops, target: Target, p: Normals, z: Array) -> Ray:
        """The line in the direction through the point of z."""
        direction = p.whiten(_fixed(ops, target, self.along, z, "the direction of a LevelSet"))
        direction = direction / ops.sqrt((direction**2).sum(-1, keepdims=True))
        s = (z * direction).sum(-1)
        normalizer = math.log(2 * math.pi) / 2
        return Ray(z - s[..., None] * direction, direction, s, 0 * s - FAR, 0 * s + FAR, lambda s: -(s**2) / 2 - normalizer)

    def _ray(self, ops: Ops, target: Target, p: Normals, z: Array) -> Ray:
        """The ray from the centre through the point of z."""
        start = p.whiten(_fixed(ops, target, self.centre, z, "the centre of a LevelSet") - p.loc)
        away = z - start
        s = ops.sqrt((away**2).sum(-1))
        direction = away / s[..., None]
        offset, size = (start * direction).sum(-1), z.shape[-1]
        high = _peak(ops, offset, size) + FAR
        return Ray(start, direction, s, 0 * s, high, partial(_log_density_of_distance, ops, offset, size))


class Ray(NamedTuple):
    """A part of the line in the space of z on which z lies.

    Attributes:
        start: Where s is 0.
        direction: A unit vector.
        drawn: The s at which z lies.
        low: Where the ray begins.
        high: Where the density has become 0.
        log_density: The log density of s given the ray.
    """

    start: Array
    direction: Array
    drawn: Array
    low: Array
    high: Array
    log_density: Callable[[Array], Array]


def _log_density_of_distance(ops: Ops, offset: Array, size: int, s: Array) -> Array:
    r"""Along a ray of points start + s direction of ``size`` standard Normals: s^(size - 1) exp(-(s + offset)^2 / 2), normalized.

    ``offset`` is start . direction. A trapezoid rule gives the integral to thirteen digits, with log s = log(peak) + width (t + 1 -
    exp(-t)). Its nodes t are evenly spaced around the peak of the integrand in log s, and exponentially far to its left.
    """
    peak = _peak(ops, offset, size)
    width = 1 / ops.sqrt(peak**2 + size)
    t = ops.asarray(NODES, s).reshape((len(NODES), *(1,) * s.ndim))
    left = ops.exp(-t)
    log_s = ops.log(peak)[None] + width[None] * (t + 1 - left)
    terms = size * log_s - (ops.exp(log_s) + offset[None]) ** 2 / 2 + ops.log1p(left)
    log_integral = ops.logsumexp(terms, 0) + ops.log(SPACING * width)
    return (size - 1) * ops.log(s) - (s + offset) ** 2 / 2 - log_integral


def _peak(ops: Ops, offset: Array, size: int) -> Array:
    """Where s^size exp(-(s + offset)^2 / 2) is largest."""
    return (ops.sqrt(offset**2 + 4 * size) - offset) / 2


def _fixed(ops: Ops, target: Target, value: Any, x: Array, what: str) -> Array:
    return ops.stop_gradient(target.in_shape(ops, evaluated(value, target), x, what))
