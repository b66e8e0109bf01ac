"""The guide with the parameters that its estimators learn, so that NumPyro's ``SVI`` finds them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
from jax import random
from numpyro.primitives import Messenger

from flowvi.assignment import Assignment
from flowvi.numpyro.distributions import is_attaching
from flowvi.numpyro.elbo import TraceFlow_ELBO
from flowvi.numpyro.handlers import hidden
from flowvi.numpyro.host import HOST, as_found
from flowvi.numpyro.parameters import LearningInScan, Sizes, declare, target_of
from flowvi.numpyro.run import NumPyroProgram
from flowvi.numpyro.scans import is_scan
from flowvi.run import couple_sites
from flowvi.sites import GuideSites, find_estimated, not_random


class adaptive(Messenger):
    """The guide together with the parameters that its estimators learn: pass it to ``SVI`` instead of the guide.

    NumPyro's ``SVI`` first runs guide and model without the objective, and trains the parameters that it finds in this run. This
    handler adds the parameters of estimators that are given in the objective, in the guide or by ``Estimated``, and of
    those that the model annotates if it gets the model.

    **Requirements**: reverse-mode differentiation (no ``forward_mode_differentiation``), because learning uses the backward pass.

    Args:
        guide: The guide: a function or an autoguide. It is not changed; an autoguide's methods, such as ``median``, are passed on.
        elbo: The :class:`TraceFlow_ELBO` that ``SVI`` gets.
        model: The model, where it annotates estimators and something learns; then it runs once more before the first step.
        rng_key: The random key of this run, and of that in which a control variate for the whole guide finds its sites. The fit does
            not depend on it. Give a ``jax.random.PRNGKey`` if the program needs raw keys.

    Raises:
        TypeError: ``elbo`` is another objective.
        ValueError: From the objective, naming the site, if ``SVI`` was given the guide itself.

    Example:
        >>> import jax, numpyro, numpyro.distributions as dist
        >>> from flowvi import RP
        >>> from flowvi.numpyro import TraceFlow_ELBO, adaptive
        >>> def model():
        ...     x = numpyro.sample("x", dist.Normal(0.0, 1.0))
        ...     numpyro.sample("y", dist.Normal(x, 0.8), obs=1.1)
        >>> def guide():
        ...     scale = numpyro.param("s", 0.7, constraint=dist.constraints.positive)
        ...     numpyro.sample("x", dist.Normal(numpyro.param("m", 0.2), scale))
        >>> elbo = TraceFlow_ELBO(estimators={"x": RP(control_variate="quadratic")})
        >>> svi = numpyro.infer.SVI(model, adaptive(guide, elbo), numpyro.optim.Adam(0.02), elbo)
        >>> sorted(svi.run(jax.random.key(0), 100, progress_bar=False).params)
        ['m', 's', 'x.control_variate']

    References:
        Parmas and Sugiyama 2021, eq. 19; Geffner and Domke 2020.
    """

    def __init__(
        self,
        guide: Callable[..., Any],
        elbo: TraceFlow_ELBO,
        model: Callable[..., Any] | None = None,
        *,
        rng_key: jax.Array | None = None,
    ):
        if not hasattr(elbo, "assignment"):
            raise TypeError(f"adaptive: expected a TraceFlow_ELBO, found {type(elbo).__name__}; no other objective learns.")
        self.assignment: Assignment = elbo.assignment
        self.model = model
        self.rng_key = random.key(0) if rng_key is None else rng_key
        self.sizes: Any = None  # outside of a run, whose arguments may be tracers
        super().__init__(guide)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        program = NumPyroProgram(self.rng_key, {}, self.model or self.fn, self.fn, args, kwargs)
        outer, self.sizes = self.sizes, Sizes(program.own_rows)  # the run of a guide may run it once more
        try:
            if not is_attaching():
                with hidden(), as_found(self.fn, self.model, args, kwargs):
                    if self.model is not None:
                        self.assignment.remember(program.annotations())
                    if self.assignment.control_variate is not None:
                        couple_sites(program, program.run(GuideSites(self.assignment), with_model=False).sites)
            return super().__call__(*args, **kwargs)
        finally:
            self.sizes = outer

    def __getattr__(self, name: str) -> Any:
        """The attributes of the guide, such as ``median``, ``quantiles`` and ``sample_posterior``."""
        if name.startswith("__") or "fn" not in vars(self):  # copying and pickling ask for attributes that do not exist
            raise AttributeError(name)
        return getattr(self.fn, name)

    def process_message(self, msg: dict[str, Any]) -> None:
        if is_scan(msg) and not is_attaching():
            LearningInScan(msg, self.sizes)
        if msg["type"] != "sample" or msg.get("_control_flow_done") or not_random(HOST, msg) or is_attaching():
            return
        choice = self.assignment.choose(msg, msg["name"], find_estimated(HOST, msg["fn"]))
        target = target_of(msg, True, self.sizes)
        declare(msg, target, self.assignment.coupled(msg["name"], choice.estimator.resolve(target)), own_density=0.0)

    def postprocess_message(self, msg: dict[str, Any]) -> None:
        self.sizes.read(msg)
