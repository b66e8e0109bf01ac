"""``describe`` in NumPyro, at given parameters and with a given random key."""

from __future__ import annotations

from abc import abstractmethod
from typing import Any

import jax
from jax import random
from numpyro.infer import SVI
from numpyro.optim import SGD

from flowvi.assignment import Describes, Description
from flowvi.numpyro.host import as_found
from flowvi.numpyro.run import NumPyroProgram


class DescribesProgram(Describes):
    """An objective that can describe the estimator of each site of a :class:`~flowvi.numpyro.run.NumPyroProgram`."""

    def describe(
        self, model, guide, *args, params: dict[str, Any] | None = None, rng_key: jax.Array | None = None, **kwargs
    ) -> Description:
        """A table of the random sites: the estimator, where it was given, the distribution's parameters and the plates.

        Lines below the table show, if they apply: the number of evaluations of the program, the sites that the host sums out, the sites
        whose particles are drawn together, the sites that a control variate for the whole guide covers, and under
        ``entropy="analytic"`` the sites whose divergence has a closed form.

        It runs guide and model, and then traces the loss once, so that it raises the errors that the fit would raise. It leaves what
        the program holds as it was: autoguides, modules, random generators.

        Args:
            model: The model.
            guide: The guide.
            *args: Passed to both.
            params: Values of the (constrained) parameters, for instance ``svi_result.params``; their initial values by default.
            rng_key: The random key, ``jax.random.key(0)`` by default. Give a ``jax.random.PRNGKey`` if the program needs raw keys.
            **kwargs: Passed to model and guide.

        Returns:
            A tuple of records that prints as a table.

        Raises:
            ValueError: Whatever the loss raises at the first step of a fit.
        """
        return self._described(model, guide, args, kwargs, params, rng_key)

    def _describe(self, model, guide, args, kwargs, params=None, rng_key=None) -> Description:
        program = NumPyroProgram(random.key(0) if rng_key is None else rng_key, params or {}, model, guide, args, kwargs)
        with as_found(model, guide, args, kwargs, self):
            return self._describe_program(program)

    @abstractmethod
    def _describe_program(self, program: NumPyroProgram) -> Description:
        """What :meth:`describe` returns; the program need not have the parameters that estimators learn."""

    def _try_loss(self, model, guide, args, kwargs, params=None, rng_key=None) -> None:
        """Trace the loss as a step of ``SVI`` does."""
        svi = SVI(model, guide, SGD(0.0), self)

        def loss(params):
            loss_with_state = self.loss_with_mutable_state  # type: ignore[attr-defined]
            return loss_with_state(state.rng_key, params | mutable_state, model, guide, *args, **kwargs)["loss"]

        with as_found(model, guide, args, kwargs, self):
            state = svi.init(random.key(0) if rng_key is None else rng_key, *args, init_params=params, **kwargs)
            mutable_state = state.mutable_state or {}
            jax.eval_shape(loss, svi.get_params(state))
