"""Fields that are computed from the cdf: for any scalar family with a cdf, and for mixtures."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from flowvi.family import families_with, family_of
from flowvi.fields.field import Elementwise, Field, Part, _total
from flowvi.ops import Array, Ops
from flowvi.tangents import Tangents


def implicit() -> Field:
    r"""The general field of a scalar distribution with a cdf F: u = -(d_theta F) / p; psi = 0.

    It does what ``ImplicitRP()`` does, as a field that can be scaled and masked. It is the only pathwise field without flux at the ends
    of the support, and moves with the bounds. For univariate mixtures (``MixtureSameFamily``, NumPyro's ``MixtureGeneral``) it has
    velocities for the mixing logits and for the components; :func:`mixture` works in any number of dimensions.

    **Requirements**: a cdf that the host can differentiate in the parameters that need a gradient; a cost without jumps.

    Returns:
        The field.

    Raises:
        ValueError: At the first run, naming the site: there is no cdf, or it has no derivative in a parameter that needs a gradient.

    Example:
        For a location, u is 1:

        >>> import numpyro.distributions as dist
        >>> import flowvi.numpyro
        >>> from flowvi import Flow, fields, plot
        >>> samples = plot.gradient_samples(dist.Logistic(0.5, 2.0), Flow(fields.implicit()), "loc", lambda x: 3.0 * x)
        >>> samples[:3].round(2).tolist()
        [3.0, 3.0, 3.0]

    References:
        Figurnov, Mohamed and Mnih 2018. Parmas and Sugiyama 2021, section 2.3.
    """

    def velocity(x: Array, p: Any, dtheta: Tangents) -> Array:
        ops, cdf = dtheta.ops, dtheta.target.cdf
        right = cdf(x, p) > 0.5
        dcdf = dtheta.of(lambda p: ops.where(right, -_survival(dtheta.target.cdf, x, p), cdf(x, p)))
        return ops.asarray(0.0, x) if dcdf is None else -dcdf / ops.exp(p.log_prob(x))

    return Field(velocity, "pathwise", rides=True, name="fields.implicit()")


def _survival(cdf: Callable[[Array, Any], Array], x: Array, p: Any) -> Array:
    """1 - cdf, for symmetric families (and mixtures of them) without a loss of digits in the right tail."""
    if family_of(p).symmetric:
        return cdf(2 * p.loc - x, p)
    if type(p).__name__ == "MixtureSameFamily":
        return (_mixing(p).probs * _survival(cdf, x[..., None], _unwrapped(p.component_distribution))).sum(-1)
    return 1 - cdf(x, p)


def mixture(orders: Sequence[Sequence[int]] | None = None, *, components: Field | None = None) -> Field:
    r"""The field of a mixture of product components, in any number of dimensions; psi = 0.

    For mixing logit j it is pi_j sum_k pi_k v_jk, where v_jk moves component k to component j one coordinate after the other,

        v_jk,i = -(F_j,i - F_k,i) (prod_{l before i} p_k,l) (prod_{l after i} p_j,l) / p,

    and for the parameters of component k it is r_k u_k with r_k = pi_k p_k / p. In one dimension v_jk = -(F_j - F_k) / p. The order of
    the coordinates only changes the variance; an average over several orders usually lowers it. A constant added to all logits also
    changes the variance, unless every order comes with its reverse (Pyro's logits are normalised).

    **Requirements**: ``MixtureSameFamily`` or NumPyro's ``MixtureGeneral`` over scalar components, or over vectors of independent
    coordinates (``to_event(1)``), whose cdf the host has; a cost without jumps.

    Args:
        orders: Orders of the coordinates to average over, such as ``[(0, 1), (1, 0)]``; the default is the given order and its
            reverse.
        components: A pathwise field for the components' own parameters, if the host cannot differentiate their cdf. The default is
            -(d_theta F) / p in each coordinate.

    Returns:
        The field.

    Raises:
        ValueError: At the first run, naming the site: components that are not products, or have no cdf.

    Example:
        E[x] of a mixture of Normals at -1 and 1 with the logits t and 0 has the derivative -1/2 in t, at t = 0:

        >>> import jax.numpy as jnp
        >>> import numpyro.distributions as dist
        >>> import flowvi.numpyro
        >>> from flowvi import Flow, fields, plot
        >>> def move(t):
        ...     components = dist.Normal(jnp.array([-1.0, 1.0]), 0.5)
        ...     return dist.MixtureSameFamily(dist.Categorical(logits=t * jnp.array([1.0, 0.0])), components)
        >>> samples = plot.gradient_samples(move(0.0), Flow(fields.mixture()), move, lambda x: x)
        >>> bool(abs(samples.mean() + 0.5) < 0.02)
        True

    References:
        Jankowiak and Karaletsos 2019, for pairs of components. Parmas and Sugiyama 2021, eq. 19.
    """
    if components is not None and components.divergence != "pathwise":
        raise TypeError(f"mixture takes a pathwise field for its components; found {components}; give one such as location_scale().")

    def velocity(x: Array, p: Any, dtheta: Tangents) -> Array:
        ops = dtheta.ops
        scalar = len(p.event_shape) == 0
        _require_products(p, dtheta)

        def at_x(f: Callable[[Array, Any], Array], p: Any) -> Array:
            """An elementwise f(x, component), over components and coordinates."""
            if hasattr(p, "component_distribution"):
                a = f(x[..., None] if scalar else x[..., None, :], _unwrapped(p.component_distribution))
            else:
                a = ops.stack([f(x, _unwrapped(part)) for part in p.component_distributions], len(x.shape) - (not scalar))
            return a[..., None] if scalar else a

        cdf = dtheta.target.cdf
        density = at_x(lambda x, part: part.log_prob(x), p)
        log_pi = ops.log_softmax(_mixing(p).logits, -1)
        joint = log_pi + density.sum(-1)
        log_p = p.log_prob(x)[..., None]

        terms = []
        dlogits = dtheta.of(lambda p: _mixing(p).logits)
        if dlogits is not None:
            below, above = at_x(cdf, p), at_x(lambda x, part: _survival(cdf, x, part), p)
            there = range(density.shape[-1])
            each = [
                _telescope(ops, dlogits, log_pi, density, below, above, log_p, order)
                for order in orders or ([there] if len(there) == 1 else [there, there[::-1]])
            ]
            terms.append(_total(each) / len(each))
        if components is not None:
            part = dtheta.within(lambda p: _unwrapped(p.component_distribution))
            if type(part.p).__name__ not in (components.families or [type(part.p).__name__]):
                dtheta.target.refuse(f"the field {components} is for {', '.join(components.families)}; found {type(part.p).__name__}.")
            u = ops.broadcast_to(at_x(lambda x, component: components.velocity(x, component, part), p), density.shape)
            terms.append((ops.exp(joint - log_p)[..., None] * u).sum(-2))
        else:
            dcdf = dtheta.of(lambda p: at_x(cdf, p))
            if dcdf is not None:
                terms.append((ops.exp((joint - log_p)[..., None] - density) * -dcdf).sum(-2))  # in logs: the density may underflow
        if not terms:
            return ops.asarray(0.0, x)
        return _total(terms)[..., 0] if scalar else _total(terms)

    def parts(p: Any) -> dict[str, Part]:
        return {} if len(p.event_shape) else _mixture_parts(p, components)

    arguments = [f"orders={orders}"] * (orders is not None) + [f"components={components}"] * (components is not None)
    return Field(velocity, "pathwise", families=families_with(mixture), name=f"fields.mixture({', '.join(arguments)})", parts=parts)


def _mixture_parts(p: Any, field: Field | None) -> dict[str, Part]:
    """The parts of a scalar mixture of one family: logit k, and the parameters of component k."""
    if not hasattr(p, "component_distribution"):
        return {}
    component = _unwrapped(p.component_distribution)
    field = field or family_of(component).pathwise
    own = {} if field is None or field.parts is None else field.parts(component)
    if not own:
        return {}

    def components(p: Any) -> Any:
        return _unwrapped(p.component_distribution)

    def of_logit(k: int, ops: Ops, x: Array, p: Any) -> Array:
        """-pi_k (F_k - F) / p, from the nearer tail."""
        pi, x_ = _mixing(p).probs, x[..., None]
        below, above = components(p).cdf(x_), _survival(_cdf, x_, components(p))
        right = (pi * below).sum(-1) > 0.5
        gap = ops.where(right, (pi * above).sum(-1) - above[..., k], below[..., k] - (pi * below).sum(-1))
        return -pi[..., k] * gap / ops.exp(p.log_prob(x))

    def of_component(u: Elementwise, k: int | None, ops: Ops, x: Array, p: Any) -> Array:
        """r_k u_k, or the sum over the components that share a parameter."""
        x_ = x[..., None]
        log_joint = ops.log(_mixing(p).probs) + components(p).log_prob(x_)
        moved = ops.exp(log_joint - p.log_prob(x)[..., None]) * u(ops, x_, components(p))
        return moved.sum(-1) if k is None else moved[..., k]

    def logit(k: int, p: Any) -> Array:
        return _mixing(p).logits[..., k]

    def parameter(part: Part, k: int, p: Any) -> Array:
        value = part.parameter(components(p))
        return value[..., k] if value.ndim else value

    size = _mixing(p).logits.shape[-1]
    parts = {f"logits[{k}]": Part(partial(logit, k), partial(of_logit, k)) for k in range(size)}
    for name, part in own.items():
        shape = part.parameter(component).shape
        if shape and shape[-1] == size:
            each = {f"{name}[{k}]": Part(partial(parameter, part, k), partial(of_component, part.u, k)) for k in range(size)}
        else:
            each = {name: Part(partial(parameter, part, 0), partial(of_component, part.u, None))}
        parts |= each
    return parts


def _cdf(x: Array, p: Any) -> Array:
    return p.cdf(x)


def _telescope(
    ops: Ops,
    dlogits: Array,
    log_pi: Array,
    density: Array,
    below: Array,
    above: Array,
    log_p: Array,
    order: Sequence[int],
) -> Array:
    """sum_jk dlogit_j pi_j pi_k v_jk, with the coordinates in ``order``; densities and cdfs over components and coordinates."""
    order = list(order)
    density, below, above = (a[..., order] for a in (density, below, above))
    before = density.cumsum(-1) - density
    after = density.sum(-1)[..., None] - density.cumsum(-1)
    log_pi = ops.broadcast_to(log_pi, density.shape[:-1])[..., None]
    j, k = (..., slice(None), None, slice(None)), (..., None, slice(None), slice(None))
    weight = ops.exp((log_pi + after)[j] + (log_pi + before)[k] - log_p[..., None, None])
    gap = ops.where(below[j] + below[k] > 1, above[j] - above[k], below[k] - below[j])
    u = (dlogits[..., None, None] * weight * gap).sum(-2).sum(-2)
    return u[..., [order.index(i) for i in range(len(order))]]


def _mixing(p: Any) -> Any:
    """The distribution over components; the hosts name it differently."""
    return p.mixture_distribution if hasattr(p, "mixture_distribution") else p.mixing_distribution


def _unwrapped(p: Any) -> Any:
    """A distribution over the coordinates of an independent or expanded one."""
    while type(p).__name__ in ("Independent", "ExpandedDistribution"):
        p = p.base_dist
    return p


def _require_products(p: Any, dtheta: Tangents) -> None:
    parts = [p.component_distribution] if hasattr(p, "component_distribution") else p.component_distributions
    for part in map(_unwrapped, parts):
        if len(part.event_shape) or len(p.event_shape) > 1:
            dtheta.target.refuse(
                f"the field mixture() needs scalar components or vectors of independent coordinates, found {type(part).__name__} "
                f"with event shape {tuple(p.event_shape)}; use LR()."
            )
