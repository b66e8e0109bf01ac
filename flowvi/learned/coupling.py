"""One control variate for the whole guide: the model of the cost at a Gaussian site also reads the noise of other sites.

We say that a site *sees* another one if its model reads the noise of that one. An element sees the elements of another site if the
plates of one site are among those of the other, and if both are in the same element of the shared plates. So a local latent sees the
global latents and those of its own element, and a global latent sees all elements. A site does not see a site from which it was
computed, because the noise that it reads must be independent of its own parameters and noise.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import KW_ONLY, dataclass, field
from functools import partial
from itertools import combinations_with_replacement, product
from math import prod
from typing import Any, Literal, NamedTuple

from flowvi.estimators import RP, Draw, Estimator
from flowvi.learned.cost_model import CostModel
from flowvi.learned.low_rank import LowRankModel, rank_of
from flowvi.learned.parameters import Learned
from flowvi.ops import Array, Ops
from flowvi.refusals import refusal
from flowvi.target import Target

JointKind = Literal["quadratic", "cubic"]
PLAIN = RP()
MOST_PRODUCTS = 2**12  # with more coefficients for an element, a cubic model has squares only
MOST = 2**18  # with more coefficients, an element sees no other site
SAVING = 8  # a matrix of low rank is taken if it has so many times fewer coefficients


class Plate(NamedTuple):
    """A batch dim of a site, in a plate or by itself.

    Attributes:
        name: The name of the plate; for a dim outside of all plates, a name of its own.
        rows: The number of its elements with their own coefficients: all, or 1 if they may be other data at every step.
    """

    name: str
    rows: int


class Block(NamedTuple):
    """A site whose noise other sites see.

    Attributes:
        size: The number of coordinates of an element.
        plates: Its batch dims, by (negative) dim.
    """

    size: int
    plates: Mapping[int, Plate]

    def is_nested(self, other: Block) -> bool:
        """Whether all plates of one are plates of the other."""
        ours, theirs = ({(dim, plate.name) for dim, plate in block.plates.items()} for block in (self, other))
        return ours <= theirs or theirs <= ours


class Feature(NamedTuple):
    """What an element sees of another site.

    Attributes:
        site: Its name.
        size: The number of its coordinates.
        columns: The dims whose elements have their own columns, each with its plate; the first is on the right.
        summed: The dims over which it is summed.
    """

    site: str
    size: int
    columns: tuple[tuple[int, Plate], ...]
    summed: tuple[int, ...]

    def values(self, base: Array) -> Array:
        """The noise of the site with the columns on the right."""
        if self.summed:
            base = base.sum(axis=tuple(dim - 1 for dim in self.summed), keepdims=True)
        for dim, _ in self.columns:
            base = base[..., None, :].swapaxes(dim - 2, -2)
            base = base.reshape((*base.shape[:-2], base.shape[-2] * base.shape[-1]))
        return base

    @property
    def num_columns(self) -> int:
        return self.size * prod(plate.rows for _, plate in self.columns)

    def places(self) -> list[dict[str, int] | None]:
        """For each column, its element by plate; None for a sum over elements."""
        plates = [plate for _, plate in reversed(self.columns)]
        elements = product(*(range(plate.rows) for plate in plates), range(self.size))
        return [None if self.summed else dict(zip([plate.name for plate in plates], i, strict=False)) for i in elements]


class Coupling(NamedTuple):
    """What an element of a site sees.

    Attributes:
        features: Other sites, in the order of the columns of its coefficients.
        own: The number of its own coordinates if there are products, else 0.
        pairs: The products, as pairs of columns; the first ``own`` columns are the site's own coordinates.
        low_rank: Whether the model's matrix is diagonal plus low rank.
    """

    features: tuple[Feature, ...] = ()
    own: int = 0
    pairs: tuple[tuple[int, int], ...] = ()
    low_rank: bool = False

    @property
    def size(self) -> int:
        return sum(feature.num_columns for feature in self.features) + len(self.pairs)

    def control(self, ops: Ops, name: str, context: Array, draws: Mapping[str, Draw]) -> Array:
        """The part of a site's control variate that depends on other sites: ``context``, of value 0, times what the site sees."""
        bases = {site: draw.base for site, draw in draws.items() if draw.base is not None}
        linear = [_over(ops, feature.values(bases[feature.site]), context.shape[:-1]) for feature in self.features]
        if self.pairs:
            both = ops.concatenate([bases[name], *linear], -1)
            i, j = ([pair[k] for pair in self.pairs] for k in (0, 1))
            means = ops.asarray([float(a == b) for a, b in self.pairs], both)
            linear.append(both[..., i] * both[..., j] - means.reshape((*(1,) * (both.ndim - 1), len(self.pairs))))
        return context * (linear[0] if len(linear) == 1 else ops.concatenate(linear, -1))


def _over(ops: Ops, value: Array, batch: tuple[int, ...]) -> Array:
    """Rows of numbers, one for each element of a batch; dims of size 1 that the batch does not have are dropped."""
    if value.shape[:-1] == batch:
        return value
    value = value.reshape(value.shape[max(0, value.ndim - len(batch) - 1) :])
    return ops.broadcast_to(value, (*batch, value.shape[-1]))


class Couplings(NamedTuple):
    """What each site sees.

    Attributes:
        blocks: The sites, by name.
        of: What each site sees.
        estimators: The estimator of each site.
    """

    blocks: Mapping[str, Block]
    of: Mapping[str, Coupling]
    estimators: Mapping[str, CoupledRP]


def couple(blocks: Mapping[str, Block], ancestors: Mapping[str, frozenset[str]], kind: JointKind) -> Couplings:
    """Let every site see the others.

    Args:
        blocks: The sites.
        ancestors: For each draw of the guide, the draws from which it was computed.
        kind: ``"quadratic"``: a site sees the noise of other sites. ``"cubic"``: also products of two such numbers, and of one with the
            site's own noise; only squares if there are too many. With many coordinates, the matrix of either is diagonal plus low rank.
            A site that would have too many coefficients sees no other.
    """
    of = {name: _coupling(name, blocks, ancestors[name], kind) for name in blocks}
    return Couplings(dict(blocks), of, {name: CoupledRP(kind=kind, coupling=coupling) for name, coupling in of.items()})


def _coupling(name: str, blocks: Mapping[str, Block], ancestors: frozenset[str], kind: JointKind) -> Coupling:
    own = blocks[name]
    others = [site for site, block in blocks.items() if site != name and site not in ancestors and block.is_nested(own)]
    features = tuple(_feature(own, site, blocks[site]) for site in others)
    full, of_low_rank = _num_coefficients(own, features)
    if min(full, of_low_rank) > MOST:
        features = ()
        full, of_low_rank = _num_coefficients(own, features)
    if full > min(MOST, SAVING * of_low_rank):
        return Coupling(features, low_rank=True)
    if kind == "quadratic" or not features:
        return Coupling(features)
    places = [*([{}] * own.size), *(place for feature in features for place in feature.places())]
    squares = tuple((i, i) for i in range(own.size, len(places)) if places[i] is not None)
    num_pairs = len(places) * (len(places) + 1) // 2  # at most
    if own.size * num_pairs > MOST_PRODUCTS:
        return Coupling(features, own.size, squares)
    pairs = combinations_with_replacement(range(len(places)), 2)
    return Coupling(features, own.size, tuple((i, j) for i, j in pairs if j >= own.size and _meet(places[i], places[j])))


def _num_coefficients(own: Block, features: tuple[Feature, ...]) -> tuple[int, int]:
    """Those of a full matrix of an element, and of one of low rank."""
    columns = own.size + sum(feature.num_columns for feature in features)
    return own.size * columns, rank_of(own.size) * (own.size + columns)


def _feature(own: Block, site: str, block: Block) -> Feature:
    plates = [(dim, plate) for dim, plate in block.plates.items() if dim not in own.plates]
    columns = tuple((dim, plate) for dim, plate in plates if plate.rows > 1)
    return Feature(site, block.size, columns, tuple(dim for dim, plate in plates if plate.rows == 1))


def _meet(one: dict[str, int] | None, other: dict[str, int] | None) -> bool:
    """Whether two columns belong to the same element of the plates that they share."""
    return one is not None and other is not None and all(other.get(plate, i) == i for plate, i in one.items())


def require_independent(couplings: Couplings, ancestors: Mapping[str, frozenset[str]]) -> None:
    """Refuse a run in which a site is computed from a site that it sees.

    Args:
        couplings: What each site sees.
        ancestors: For each draw of the guide, the draws from which it was computed in this run.
    """
    for name, coupling in couplings.of.items():
        for feature in coupling.features:
            if feature.site in ancestors.get(name, ()):
                raise refusal(
                    name,
                    f"expected this site to be independent of '{feature.site}', as in the first run, because the control variate for "
                    f"the whole guide uses the noise of '{feature.site}' here; found that it was computed from '{feature.site}'. Give "
                    "each form of the guide its own objective, or use RP(control_variate=...) at its sites.",
                )


def block_of(estimator: Estimator, target: Target, frames: Any) -> Block | None:
    """The block of a site; None if a joint control variate does not cover it.

    Args:
        estimator: Its estimator.
        target: Its distribution.
        frames: The host's frames of the plates around it.
    """
    if estimator != PLAIN or target.family not in ("Normal", "MultivariateNormal"):
        return None
    if target.family == "MultivariateNormal" and target.extra_ndim:
        return None
    target = _whole(target)
    names = {frame.dim: frame.name for frame in frames}
    plates, size = {}, 1
    for axis, n in enumerate(target.shape):
        dim = axis - target.batch_ndim
        if dim >= 0:
            size *= n
        elif n > 1 or dim in names:
            rows = target.plate_rows.get(dim, n)
            plates[dim] = Plate(names.get(dim, f"{target.name}[{dim}]"), n if rows == n else 1)
    return Block(size, plates) if size else None


def _whole(target: Target) -> Target:
    """The target with the batch dims of independent Normals outside of all plates as coordinates of one element."""
    if target.family != "Normal" or any(frame.dim is not None for frame in target.frames):
        return target
    return target._with(batch_ndim=0)


@dataclass(frozen=True, repr=False)
class CoupledRP(RP):
    """RP with the site's part of a control variate for the whole guide."""

    _: KW_ONLY
    kind: JointKind = "quadratic"
    coupling: Coupling = field(default_factory=Coupling)

    @property
    def uses_sampler(self) -> bool:
        return False

    def __repr__(self) -> str:
        return repr(RP())

    def learns(self, ops: Ops, target: Target) -> dict[str, Learned]:
        return self._model(ops, target).learns()

    def attach(self, ops: Ops, target: Target, x: Array) -> Draw:
        model = self._model(ops, target)
        value, control, context = model.attach(x)
        joint = partial(self.coupling.control, ops, target.name, context) if self.coupling.features else None
        return Draw(target.push(value), control=control, base=model.base(x), joint_control=joint)

    def _model(self, ops: Ops, target: Target) -> CostModel:
        if self.coupling.low_rank:
            return LowRankModel(ops, _whole(target), self.coupling.size)
        return CostModel(ops, _whole(target), self.kind, num_context=self.coupling.size)
