"""One torch optimizer for all parameters, where Pyro has one for each."""

from __future__ import annotations

import inspect
import math
from typing import Any

import torch
from pyro.optim import PyroOptim
from pyro.optim.clipped_adam import ClippedAdam

IMPLEMENTATIONS = {"fused", "foreach", "capturable", "differentiable"}  # options of the implementation, not of the algorithm


class JointOptimizer:
    """One torch optimizer for all parameters, with the constructor, the options and the clipping of a Pyro optimizer.

    Parameters with equal options form a group. It is torch's fused version if there is one, unless the options name another. The Pyro
    optimizer can still save and load the state, also the state of a :class:`pyro.infer.SVI`.

    Args:
        optim: The Pyro optimizer.

    Attributes:
        torch: The torch optimizer; None before the first step.
    """

    def __init__(self, optim: PyroOptim):
        if type(optim) is not PyroOptim:
            raise TypeError(
                "optim: expected an optimizer of pyro.optim without a scheduler, such as pyro.optim.Adam({'lr': 0.01}) or "
                f"PyroOptim(torch.optim.AdamW, {{'lr': 0.01}}), found {type(optim).__name__}; ClippedAdam has a decaying rate (lrd)."
            )
        self.optim = optim
        self.torch: Any = None
        self._leaves: dict[str, torch.Tensor] = {}
        self._options: list[dict[str, Any]] = []

    def step(self, leaves: dict[str, torch.Tensor]) -> None:
        """Update parameters by their ``.grad``, and clear the gradients.

        Args:
            leaves: The unconstrained parameters by name.
        """
        for name, leaf in leaves.items():
            if self._leaves.get(name) is not leaf:
                self._add(name, leaf)
            if (clip := self.optim.grad_clip[leaf]) is not None and leaf.grad is not None:
                clip(leaf)
        if self.torch is not None:
            self.torch.step()
        for leaf in leaves.values():
            leaf.grad = None

    def _add(self, name: str, leaf: torch.Tensor) -> None:
        if (old := self._leaves.pop(name, None)) is not None:
            for group in self.torch.param_groups:
                group["params"][:] = [p for p in group["params"] if p is not old]
            self.torch.state.pop(old, None)
            self.optim.optim_objs.pop(old, None)  # another step with the same optimizer may have dropped it
            self.optim.grad_clip.pop(old, None)
        alone = self._optimizer_of(leaf)
        options = {key: value for key, value in alone.param_groups[0].items() if key != "params"}
        if self.torch is None:
            self.torch = alone
            self._options.append(options)
        elif (group := self._group_for(options)) is not None:
            group["params"].append(leaf)
        else:
            self.torch.add_param_group(alone.param_groups[0])
            self._options.append(options)
        if leaf in alone.state:
            self.torch.state[leaf] = alone.state[leaf]
        if (known := self.optim.optim_objs.get(leaf)) is not None:  # shared with another step that uses the same optimizer
            self.torch.state[leaf] = (known.joint.torch if isinstance(known, _StateOf) else known).state[leaf]
        self._leaves[name] = leaf
        self.optim.grad_clip[leaf] = self.optim._get_grad_clip(leaf)  # type: ignore[arg-type]
        self.optim.optim_objs[leaf] = state = _StateOf(self, leaf)
        if (saved := self.optim._state_waiting_to_be_consumed.pop(name, None)) is not None:
            state.load_state_dict(saved)

    def _group_for(self, options: dict[str, Any]) -> dict[str, Any] | None:
        """The group of a new parameter with these options; its rate must not have decayed, as that of ClippedAdam does."""
        for known, group in zip(self._options, self.torch.param_groups, strict=True):
            if known == options and ("lrd" not in options or group["lr"] == options["lr"]):
                return group
        return None

    def _optimizer_of(self, leaf: torch.Tensor) -> torch.optim.Optimizer:
        constructor: Any = self.optim.pt_optim_constructor
        if constructor is ClippedAdam:
            constructor = JointClippedAdam
        options = dict(self.optim._get_optim_args(leaf))
        if "fused" in inspect.signature(constructor).parameters and not IMPLEMENTATIONS & set(options):
            options["fused"] = True
        return constructor([leaf], **options)


class _StateOf:
    """The state of one parameter in the form of a separate optimizer, as a Pyro optimizer saves it."""

    def __init__(self, joint: JointOptimizer, leaf: torch.Tensor):
        self.joint, self.leaf = joint, leaf

    @property
    def _group(self) -> dict[str, Any]:
        return next(group for group in self.joint.torch.param_groups if any(p is self.leaf for p in group["params"]))

    def state_dict(self) -> dict[str, Any]:
        state = self.joint.torch.state.get(self.leaf)
        return {"state": {0: state} if state else {}, "param_groups": [{**self._group, "params": [0]}]}

    def load_state_dict(self, saved: dict[str, Any]) -> None:
        (group,) = saved["param_groups"]
        self._group.update({key: value for key, value in group.items() if key not in IMPLEMENTATIONS | {"params"}})
        if state := saved["state"].get(0):
            self.joint.torch.state[self.leaf] = dict(state)


class JointClippedAdam(ClippedAdam):
    """Pyro's ClippedAdam, all parameters of a group at once."""

    @torch.no_grad()
    def step(self, closure=None):
        """Performs a single optimization step.

        Args:
            closure: Evaluates the loss.

        Returns:
            The loss, if there is a closure.
        """
        loss = None if closure is None else closure()
        for group in self.param_groups:
            group["lr"] *= group["lrd"]
            beta1, beta2 = group["betas"]
            params = [p for p in group["params"] if p.grad is not None]
            if not params:
                continue
            grads: Any = [p.grad for p in params]
            for p in params:
                if not self.state[p]:
                    self.state[p].update(step=0, exp_avg=torch.zeros_like(p), exp_avg_sq=torch.zeros_like(p))
                self.state[p]["step"] += 1
            steps, means, squares = ([self.state[p][key] for p in params] for key in ("step", "exp_avg", "exp_avg_sq"))
            torch._foreach_clamp_min_(grads, -group["clip_norm"])
            torch._foreach_clamp_max_(grads, group["clip_norm"])
            if group["weight_decay"] != 0:
                grads = torch._foreach_add(grads, params, alpha=group["weight_decay"])
            torch._foreach_mul_(means, beta1)
            torch._foreach_add_(means, grads, alpha=1 - beta1)
            deviations = torch._foreach_sub(grads, means) if group.get("centered_variance") else grads  # since Pyro 1.9.2
            torch._foreach_mul_(squares, beta2)
            torch._foreach_addcmul_(squares, deviations, deviations, value=1 - beta2)
            scales = torch._foreach_sqrt(squares)
            torch._foreach_add_(scales, group["eps"])
            sizes = [-group["lr"] * math.sqrt(1 - beta2**t) / (1 - beta1**t) for t in steps]
            torch._foreach_addcdiv_(params, means, scales, sizes)
        return loss
