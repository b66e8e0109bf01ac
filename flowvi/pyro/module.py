"""Model, guide and objective as one torch module, which owns the parameters that its estimators learn."""

from __future__ import annotations

import weakref
from collections.abc import Mapping
from typing import Any, NoReturn

import pyro
import torch
from pyro.infer.elbo import ELBOModule
from pyro.poutine.messenger import Messenger
from pyro.poutine.runtime import effectful

from flowvi.learned.parameters import Learned
from flowvi.refusals import refusal


class LearningModule(ELBOModule):
    """The module ``TraceFlow_ELBO(...)(model, guide)``. Called with the program's arguments, it computes the loss.

    The parameters that estimators learn are parameters of the module, ``learned.<site>:<name>``, and not in a parameter store. Like
    other parameters of a Pyro program, they exist after the first call.

    Attributes:
        learned: The module of these parameters.
    """

    def __init__(self, model: torch.nn.Module, guide: torch.nn.Module, elbo: Any):
        super().__init__(model, guide, elbo)
        self.learned: torch.nn.Module = torch.nn.Module()

    def forward(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        """The loss as a scalar tensor, as by ``differentiable_loss``."""
        with _own_what_is_learned(self.learned):
            return super().forward(*args, **kwargs)


def learned_parameters(site: str, learns: Mapping[str, Learned]) -> dict[str, torch.Tensor]:
    """The values of the parameters that the estimator of a site ``learns``, from a :class:`LearningModule` or the store."""
    return {
        name: _stored(full := f"{site}.{name}", learned.initial, event_dim=len(learned.event_shape), name=full)
        for name, learned in learns.items()
    }


def _in_the_store(name, initial, event_dim):
    if pyro.settings.get("module_local_params"):
        _refuse(name)
    return pyro.get_param_store().get_param(name, initial, event_dim=event_dim)


_stored = effectful(_in_the_store, type="param")


class _own_what_is_learned(Messenger):
    """Keep the parameters that estimators inside learn as parameters of a module."""

    def __init__(self, owner: torch.nn.Module):
        super().__init__()
        self.owner = owner

    def _pyro_param(self, msg):
        if msg["fn"] is not _in_the_store or msg["done"]:
            return
        name, initial = msg["args"]
        key = name.replace(".", ":")  # torch allows no dot in the name of a parameter
        if not hasattr(self.owner, key):
            self.owner.register_parameter(key, torch.nn.Parameter(initial().contiguous()))
        parameter = getattr(self.owner, key)
        msg["value"], msg["done"] = parameter.view(parameter.shape), True
        msg["value"].unconstrained = weakref.ref(parameter)  # as Pyro's plates expect it


def _refuse(name: str) -> NoReturn:
    site = name.rpartition(".")[0]
    raise refusal(
        site,
        f"with module_local_params=True the learned parameter '{name}' is a parameter of the module "
        "elbo(model, guide), found another caller, such as pyro.infer.SVI; train that module by an optimizer of torch, or set "
        "module_local_params=False.",
    )


def unconstrained(parameter: Any) -> Any:
    """The tensor that is trained. With ``module_local_params=True``, a parameter without a constraint is this tensor itself."""
    return parameter.unconstrained() if hasattr(parameter, "unconstrained") else parameter
