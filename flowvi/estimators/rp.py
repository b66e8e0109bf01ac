"""Reparameterization: the velocity of the host's own sampler, without a score."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import KW_ONLY, dataclass, replace
from typing import Any

from flowvi.estimators.estimator import Draw, Estimator
from flowvi.estimators.implicit import ImplicitRP
from flowvi.jumps import Jumps, JumpsField
from flowvi.learned.amortised import Features
from flowvi.learned.cost_model import CostModel, Kind
from flowvi.learned.parameters import Learned
from flowvi.ops import Array, Ops
from flowvi.target import Target


@dataclass(frozen=True, repr=False)
class RP(Estimator):
    r"""Reparameterization (pathwise): the derivative of the cost through the sampler, at fixed random numbers.

    The estimate is :math:`E = w\,\nabla_\theta\,\phi(T(\epsilon;\theta))`, with the cost :math:`\phi`, the sample x = T(epsilon;
    theta) and the weight w = p/q. u is the velocity of the host's own sampler and psi = 0. With a proposal, the sampler is inverted
    at the sample of q: through a known standardization of the family (location-scale, LogNormal, MultivariateNormal, ...) or
    through the cdf of a scalar.

    A control variate adds :math:`\nabla_\theta (E_p[f] - f(T(\epsilon;\theta)))`. f is a polynomial model of the cost, whose mean under
    a Normal is known. Its coefficients are parameters of the program. The user's optimizer trains them while SVI runs, from the same
    backward pass, to minimize the second moment of the gradient in the site's parameters. In NumPyro, pass
    ``flowvi.numpyro.adaptive(guide, elbo)`` to ``SVI`` as the guide.

    **Requirements**: a reparameterized sampler with an unbiased derivative, and a cost without jumps in x (on a circle also periodic).
    With ``q``, a known standardization or a differentiable cdf. With ``control_variate``, a Normal or MultivariateNormal and
    reverse-mode differentiation.

    Args:
        q: ``q(p) -> distribution`` to sample from instead of p (p has detached parameters); its support must cover that of p.
        force: Trust the derivative of the host's sampler even if the distribution's flag says that there is none.
        control_variate: The model of the cost. ``"quadratic"`` has a coefficient for each pair of coordinates of the site's event,
            ``"diagonal"`` one for each coordinate, and ``"cubic"`` adds to the quadratic model up to four directions along which the
            curvature changes. No model couples the elements of a batch dim, in a plate or not (NumPyro's AutoDiagonalNormal has such
            a dim). None: no control variate.
        shared: Whether the elements of the site's plates share the coefficients of the control variate. By default they do in a plate
            that may be another mini-batch at every step: a plate that is not subsampled, if no parameter of the guide has an axis of
            the plate's size. Inside NumPyro's ``scan``, give this or ``features``; then all steps share them.
        features: ``features(p)``, with detached parameters: an array of the site's batch shape with a dim of features f on the right,
            such as parameters of p, or covariates of its data. The coefficients of an element are then :math:`W_0 + \sum_k f_k W_k`,
            with one learned W for all elements, so it also works for mini-batches. At first :math:`W_k = 0` for k > 0.
        jumps: Where the cost jumps as x crosses a number t: numbers, arrays that broadcast to x, or functions of p (with live
            parameters). Each takes two more evaluations of the program, and adds the surface term p(t) (u(t) - dt/dtheta) [phi]. For
            an event, a surface, :class:`~flowvi.HalfSpace` or :class:`~flowvi.LevelSet`, or several of them.

    Raises:
        TypeError: A control variate that does not exist, or one together with ``q``; ``shared`` or ``features`` without one.
        ValueError: At the first run, naming the site: the sampler has no right derivative or cannot be inverted, or there is no control
            variate for the family.

    Example:
        The gradient of E[x^2] under a Normal, in its location, is 2 x for each sample.

        >>> import numpyro.distributions as dist
        >>> import flowvi.numpyro
        >>> from flowvi import RP, plot
        >>> samples = plot.gradient_samples(dist.Normal(0.5, 1.0), RP(), "loc", lambda x: x**2)
        >>> bool(abs(samples.mean() - 1.0) < 0.1), round(float(samples.std()), 1)
        (True, 2.0)

    References:
        Kingma and Welling 2014; Rezende, Mohamed and Wierstra 2014. Parmas and Sugiyama 2021, eq. 19 with psi = 0. Miller, Foti,
        D'Amour and Adams 2017; Geffner and Domke 2020 (quadratic control variates).
    """

    q: Callable[[Any], Any] | None = None
    _: KW_ONLY
    force: bool = False
    control_variate: Kind | None = None
    shared: bool = False
    features: Features | None = None
    jumps: Jumps = JumpsField()  # type: ignore[assignment]  # noqa: RUF009

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.control_variate not in ("cubic", "quadratic", "diagonal", None):
            raise TypeError(f"RP: expected control_variate='cubic', 'quadratic', 'diagonal' or None, found {self.control_variate!r}.")
        if self.control_variate is None and self.shares:
            given = "shared=True" if self.shared else "features"
            raise TypeError(f"RP: {given} is for the coefficients of a control variate, found control_variate=None; remove it.")
        if self.control_variate is not None and self.q is not None:
            raise TypeError(
                "RP takes a control variate or q, found both; remove one, as the mean of the control variate is only known under p."
            )

    @property
    def shares(self) -> bool:
        return self.shared or self.features is not None

    @property
    def uses_sampler(self) -> bool:
        return self.q is None and self.control_variate is None and not self.jumps

    def resolve(self, target: Target) -> Estimator:
        if self.q is None and not self.force and (why := target.lacks_rsample()):
            target.refuse(f"RP needs a reparameterized sampler, but {why}; use LR() or ImplicitRP().")
        if self.control_variate is not None and 0 in target.shape:  # nothing to learn
            return replace(self, control_variate=None, shared=False, features=None)
        return self

    def psi_is_zero(self, target: Target) -> bool:
        return True

    def learns(self, ops: Ops, target: Target) -> dict[str, Learned]:
        return {} if (model := self._cost_model(ops, target)) is None else model.learns()

    def attach(self, ops: Ops, target: Target, x: Array) -> Draw:
        model = self._cost_model(ops, target)
        if model is None or target.learned is None:  # without learned values its coefficients are 0
            return ImplicitRP(target.standardization(ops)).attach(ops, target, x)
        value, control, _ = model.attach(x)
        return Draw(target.push(value), control=control)

    def _cost_model(self, ops: Ops, target: Target) -> CostModel | None:
        kind = self.control_variate
        return None if kind is None else CostModel(ops, target, kind, self.shared, self.features)
