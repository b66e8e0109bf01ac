"""Pyro's enumeration: runs a model with the values of each marginalised site along a separate dim, and sums these dims out."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from pyro.distributions import MaskedDistribution
from pyro.distributions.util import scale_and_mask
from pyro.ops.contract import contract_tensor_tree
from pyro.ops.packed import pack, unpack
from pyro.ops.rings import LogRing

from flowvi.dependence import Frame
from flowvi.marginal import Factor


def marginalised_sites(sites: Mapping[str, Any], guide: Any) -> tuple[str, ...]:
    """The sites of a trace that Pyro's ``EnumMessenger`` has enumerated (not sampled, as in Tensor Monte Carlo)."""
    return tuple(
        name
        for name, site in sites.items()
        if site["infer"].get("_enumerate_dim") is not None and name not in guide and site["infer"].get("num_samples") is None
    )


def factors_of(trace: Any, sites: Mapping[str, Any], marginalised: Sequence[str]) -> list[Factor]:
    """The statements of an enumerated trace that depend on its marginalised sites."""
    trace.symbolize_dims()
    plates = set(trace.plate_to_symbol.values())
    factors = []
    for name, site in sites.items():
        symbols = site["infer"]["_dim_to_symbol"]
        log_density = _unmasked(site) if name in marginalised else scale_and_mask(site["unscaled_log_prob"], mask=site["mask"])
        shape = log_density.shape if name in marginalised else site["log_prob"].shape  # its scale may depend on a site, too
        dims = frozenset(symbols[dim] for dim, size in zip(range(-len(shape), 0), shape, strict=True) if size > 1)
        frames = frozenset(Frame(f.name, f.dim, f.size) for f in site["cond_indep_stack"] if f.vectorized)
        if name in marginalised:
            own = symbols[site["infer"]["_enumerate_dim"]]
            own = own if own in dims else name  # a single value has no dim
            factors.append(Factor(name, frames, (dims - plates) | {own}, pack(log_density, symbols), own))
        elif dims - plates:
            factors.append(Factor(name, frames, dims - plates, pack(log_density, symbols)))
    return factors


def _unmasked(site: Any) -> torch.Tensor:
    """The log density of a site without the masks of its distribution."""
    fn = site["fn"]
    while isinstance(fn, MaskedDistribution):
        fn = fn.base_dist
    return site["unscaled_log_prob"] if fn is site["fn"] else fn.log_prob(site["value"])


def contraction(trace: Any):
    """The ``contract`` of :func:`flowvi.marginal.with_marginals` for a trace, by Pyro's tensor variable elimination."""

    def contract(component: Sequence[Factor], frames: frozenset[Frame]) -> torch.Tensor:
        tree: OrderedDict[frozenset[str], list[torch.Tensor]] = OrderedDict()
        sizes: dict[str, int] = {}
        for factor in component:
            plates = frozenset(trace.plate_to_symbol[frame.name] for frame in factor.frames)
            tree.setdefault(plates, []).append(factor.log_density)
            sizes.update(zip(factor.log_density._pyro_dims, factor.log_density.shape, strict=True))
        dims = set().union(*(factor.dims for factor in component))
        ((_, (marginal,)),) = contract_tensor_tree(tree, dims, ring=LogRing(dim_to_size=sizes)).items()
        return unpack(marginal, {trace.plate_to_symbol[frame.name]: frame.dim for frame in frames})

    return contract
