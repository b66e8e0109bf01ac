"""NumPyro's distributions as the core sees them, and the wrapper :class:`Estimated`."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import contextmanager
from contextvars import ContextVar
from importlib.metadata import version
from inspect import signature
from typing import Any, ClassVar
from zlib import crc32

import jax
import jax.numpy as jnp
import numpyro.distributions as dist
from jax import random
from jax.core import Tracer
from jax.lax import stop_gradient
from multipledispatch import dispatch
from numpyro.distributions.batch_util import promote_batch_shape
from numpyro.distributions.flows import BlockNeuralAutoregressiveTransform
from numpyro.distributions.transforms import ComposeTransform, Transform, _InverseTransform

import flowvi.ops.jax as ops
from flowvi.estimated import ForwardsToBase, forwarded, name_of_site, require_parts
from flowvi.estimators import Draw, Estimator, attach
from flowvi.numpyro.threefry import is_unrolled, rolled, takes
from flowvi.rebuild import rebuild
from flowvi.target import OWN_STANDARDIZATION, Target

VALIDATION_IS_OPT_IN = version("numpyro").startswith("0.19.")  # so it tells nothing there, and flowvi's own checks run always
WRAPPERS_PASS_INTERMEDIATES = "intermediates" in signature(dist.MaskedDistribution.log_prob).parameters  # not before NumPyro 0.22


def unwrap(fn: dist.Distribution) -> dist.Distribution:
    """Remove the wrappers that do not change the family: independent, expanded, masked, estimated."""
    while isinstance(fn, WRAPPERS):
        fn = fn.base_dist  # type: ignore[attr-defined]
    return fn


class NumPyroTarget(Target):
    """See :class:`flowvi.target.Target`; the size of each of ``frames`` is the number of rows of the plate.

    Attributes:
        rng_key: The key of the draw; None if nothing is drawn.
    """

    rng_key: jax.Array | None = None
    plain_transformed = (dist.TransformedDistribution,)
    transformed = (dist.TransformedDistribution, dist.FoldedDistribution)
    unwrap = staticmethod(unwrap)

    @property
    def plate_rows(self):
        return {frame.dim: frame.size for frame in self.frames}

    def __init__(self, name: str, fn: Any, *args: Any, **kwargs: Any):
        super().__init__(name, fn, *args, **kwargs)
        self._pushed: list[tuple[Any, list]] = []
        self._takes_intermediates = WRAPPERS_PASS_INTERMEDIATES or not isinstance(fn, WRAPPERS)

    def push(self, x):
        intermediates = []
        for transform in self.transforms:
            y, intermediate = transform.call_with_intermediates(x)
            intermediates.append([x, intermediate])
            x = y
        self._pushed.append((x, intermediates))
        return x

    def intermediates(self, y: Any) -> list | None:
        """What the transforms computed on the way to ``y``, in NumPyro's form; None if they are not known or cannot be used."""
        if not self._takes_intermediates:
            return None
        return next((intermediates for value, intermediates in self._pushed if value is y), None) or None

    @staticmethod
    def lacks_inverse(transform):
        if isinstance(transform, ComposeTransform):
            return any(map(NumPyroTarget.lacks_inverse, transform.parts))
        inverts = isinstance(transform, _InverseTransform) or type(transform)._inverse is not Transform._inverse
        return isinstance(transform, BlockNeuralAutoregressiveTransform) or not inverts

    @staticmethod
    def host_validates():
        return VALIDATION_IS_OPT_IN or bool(dist.Distribution._validate_args)

    def detach(self, p):
        p = jax.tree.map(stop_gradient, jax.tree.map(_as_array, p))
        p._validate_args = False
        return p

    @property
    def of_arrays(self):
        return jax.tree.map(_as_array, self.p)

    def is_live(self, value):
        return any(isinstance(leaf, Tracer) for leaf in jax.tree.leaves(value))

    def _scores(self, x, names):
        batch_ndim = len(self.p.batch_shape)
        live = [jnp.asarray(theta, jnp.result_type(theta, float)) for theta in (getattr(self.p, name) for name in names)]
        live = [jnp.broadcast_to(theta, self.batch_shape + jnp.shape(theta)[batch_ndim:]) for theta in live]

        def log_prob(arrays):
            return rebuild(self.p0, dict(zip(names, arrays, strict=True)), validate=False).log_prob(x).sum()

        return list(zip(map(ops.tether, live), jax.grad(log_prob)(stop_gradient(live)), strict=True))

    def lacks_rsample(self):
        p = unwrap(self.p.base_dist) if type(self.p) is dist.TransformedDistribution else self.p
        if not p.arg_constraints and type(p).has_rsample is dist.Distribution.has_rsample:  # so a mixture in NumPyro 0.19
            return f"{type(p).__name__} does not say that it has one (it has no arg_constraints)"
        if p.has_rsample:
            return None
        missing = sorted(set(p.arg_constraints) - set(p.reparametrized_params))
        return f"{type(p).__name__} has none" + (f" for {missing}" if missing else "")

    def live(self, *names):
        """Under ``jit`` every parameter is traced; it is constant if no parameter, draw or argument influences it."""
        traced = super().live(*names)
        if not traced or (moves := self._moving_leaves(arguments=True)) is None:
            return traced
        moving = jax.tree.unflatten(jax.tree.structure(self.p), moves)
        return [name for name in traced if getattr(moving, name)]

    def cdf(self, x, p, what="ImplicitRP", instead=OWN_STANDARDIZATION):
        try:
            return p.cdf(x)
        except NotImplementedError:
            self.refuse(f"{what} needs a cdf, but {self.family} has none; {instead}.")
        except (ValueError, ImportError) as error:
            self.refuse(f"the cdf of {self.family} cannot be differentiated in its live parameters ({error}); {instead}.")

    def expand(self, q):
        if not isinstance(q, dist.Distribution):
            self.refuse(f"q(p) must return a NumPyro distribution, found {type(q).__name__}.")
        return self.detach(q.expand(self.batch_shape))

    def clip(self, x):
        inside = self.p0.support(x)
        feasible = self.p0.support.feasible_like(x)
        return inside, jnp.where(inside.reshape(inside.shape + (1,) * self.event_ndim), x, feasible)

    @contextmanager
    def probe(self, x):
        """Under ``jit`` no value is known, so made-up numbers replace the traced ones."""
        with jax.ensure_compile_time_eval():
            yield _made_up(x), jax.tree.map(_made_up, self.p0)

    def moving_bounds(self):
        """Under ``jit`` every bound is traced; it is fixed if no parameter and no draw influences it."""
        bounds = super().moving_bounds()
        if not bounds or (moves := self._moving_leaves()) is None:
            return bounds
        leaves, tree = jax.tree.flatten(self.p)
        with jax.ensure_compile_time_eval():
            p = jax.tree.unflatten(tree, [leaf if moving else _made_up(leaf) for leaf, moving in zip(leaves, moves, strict=True)])
            return NumPyroTarget(self.name, p, enters=False, validate=False)._traced_bounds()

    def _moving_leaves(self, arguments=False):
        """For each array of p, whether a parameter of the guide or a draw (or an argument) influences it; None if not known."""
        moving_leaves = _ATTACHING.get()
        moves = None if moving_leaves is None else moving_leaves(self.name, bool(self.transforms), arguments)
        return moves if moves is not None and len(moves) == len(jax.tree.leaves(self.p)) else None

    def _traced_bounds(self):
        """The bounds that are traced."""
        return super().moving_bounds()

    def uniforms(self, shape, like):
        if self.rng_key is None:
            self.refuse(
                "the estimator needs random numbers, which a site has only under flowvi.numpyro.TraceFlow_ELBO and outside cond; "
                "use LR() there."
            )
        return random.uniform(random.fold_in(self.rng_key, crc32(self.name.encode())), shape, like.dtype)

    def sample(self, q: Any, key: jax.Array) -> jax.Array:
        """Draw x, of the full shape, from p0 or from an expanded proposal."""
        return stop_gradient(q.expand(self.batch_shape)(rng_key=key, sample_shape=()))


class Estimated(ForwardsToBase, dist.Distribution):
    r"""A distribution that carries its own gradient estimator: ``Estimated(dist.Normal(loc, scale), LR())``.

    ``TraceFlow_ELBO`` uses ``estimator`` at the site, also in ``scan`` and ``cond``, where handlers do not reach. Everywhere else
    ``Estimated`` behaves like ``base_dist``: it draws from p (never from a proposal q), and its ``log_prob`` is that of p. NumPyro's
    own ELBOs ignore score terms, so they treat it like ``base_dist``.

    **Requirements**: those of the estimator. It wraps a whole distribution; ``to_event``, ``expand`` and ``mask`` may follow.

    Args:
        base_dist: The distribution p, of any batch and event shape.
        estimator: The estimator of the site.

    Raises:
        TypeError: ``base_dist`` is not a distribution of NumPyro, or ``estimator`` is not an estimator.

    Example:
        >>> import numpyro.distributions as dist
        >>> from flowvi import LR
        >>> from flowvi.numpyro import Estimated
        >>> Estimated(dist.Normal(0.0, 1.0), LR()).expand([3]).to_event(1).event_shape
        (3,)

    References:
        Parmas and Sugiyama 2021, eq. 19.
    """

    arg_constraints: ClassVar[dict[str, Any]] = {}
    pytree_data_fields: tuple[str, ...] = ("base_dist",)
    pytree_aux_fields: tuple[str, ...] = ("estimator",)

    def __init__(self, base_dist: dist.Distribution, estimator: Estimator, *, validate_args: bool | None = None):
        require_parts(base_dist, estimator, dist.Distribution, "NumPyro")
        self.base_dist: dist.Distribution = base_dist
        self.estimator: Estimator = estimator
        super().__init__(base_dist.batch_shape, base_dist.event_shape, validate_args=validate_args)

    support: property = forwarded("support")
    has_rsample: property = forwarded("has_rsample")

    def sample(self, key: jax.Array, sample_shape: tuple[int, ...] = ()) -> Any:
        name = name_of_site(unwrap(self))
        estimator = self.estimator.resolve(NumPyroTarget(name, self.base_dist, enters=True))
        if not is_attaching() or estimator.uses_sampler:
            return self.base_dist.sample(key, sample_shape)
        fn = self.base_dist.expand_by(sample_shape) if sample_shape else self.base_dist
        target = NumPyroTarget(name, fn, estimator.enters)  # inside scan or cond; otherwise the handler draws
        return attach(ops, target._with(rng_key=key), estimator, propose(target, estimator, key)).value

    def log_prob(self, value: Any, intermediates: list[Any] | None = None) -> Any:
        return self.base_dist.log_prob(value)


WRAPPERS = (dist.Independent, dist.ExpandedDistribution, dist.MaskedDistribution, Estimated)

MovingLeaves = Callable[[str, bool, bool], list[bool] | None]
_ATTACHING: ContextVar[MovingLeaves | None] = ContextVar("attaching", default=None)


def is_attaching() -> bool:
    return _ATTACHING.get() is not None


@contextmanager
def attaching(moving_leaves: MovingLeaves | None):
    """A context in which :class:`Estimated` attaches derivatives when it is sampled: one of flowvi's objectives runs a program.

    Args:
        moving_leaves: ``moving_leaves(name, enters, arguments)`` returns which arrays of a site's family a parameter influences; see
            :meth:`flowvi.numpyro.run.NumPyroProgram.moving_leaves`; None: no objective runs.
    """
    token = _ATTACHING.set(moving_leaves)
    try:
        yield
    finally:
        _ATTACHING.reset(token)


def _as_array(leaf: Any) -> Any:
    """A float as an array, which NumPyro leaves as it is outside of ``jit``; anything else unchanged."""
    return jnp.asarray(leaf) if isinstance(leaf, float) else leaf


def _made_up(leaf: Any) -> Any:
    """Made-up numbers instead of a traced array; any other value unchanged."""
    if not isinstance(leaf, Tracer):
        return leaf
    if not jnp.issubdtype(leaf.dtype, jnp.floating):
        return jnp.ones(leaf.shape, leaf.dtype)
    return ops.ramp(jax.ShapeDtypeStruct(leaf.shape, leaf.dtype))


def propose(target: NumPyroTarget, estimator: Estimator, key: jax.Array) -> jax.Array:
    """A draw of x, of the full shape, from the estimator's proposal; detached."""
    q, _ = estimator.proposal(ops, target)
    if estimator.q is not None and is_unrolled(key) and not takes(q, key):
        key = rolled(key)
    return target.sample(q, key)


def draw(target: NumPyroTarget, estimator: Estimator, key: jax.Array) -> Draw:
    """Draw at a site from the estimator's proposal and attach derivatives and weight."""
    return attach(ops, target._with(rng_key=key), estimator, ops.computed_once(propose(target, estimator, key)))


@promote_batch_shape.register
def _promote_estimated(d: Estimated):
    return Estimated(promote_batch_shape(d.base_dist), d.estimator)


def _kl_divergence(p, q):
    return dist.kl_divergence(*(d.base_dist if isinstance(d, Estimated) else d for d in (p, q)))


_kl_divergence.__name__ = "kl_divergence"  # the name by which NumPyro dispatches; every pair, so that none is ambiguous
for _other in (dist.Distribution, dist.ExpandedDistribution, dist.Independent, dist.MaskedDistribution, dist.Delta):
    dispatch(Estimated, _other)(_kl_divergence)
    dispatch(_other, Estimated)(_kl_divergence)
dispatch(Estimated, Estimated)(_kl_divergence)
