"""Distributions whose log density NumPyro differentiates wrongly, or to NaN, at special values of their parameters.

* At logits of exactly 0 the derivative of the log density of a Bernoulli at x is x instead of x - 1/2. A Binomial has the same error:
  one term has the derivative from above, another one from below. At all other logits, however small, the derivative is right.
* At a probability of 0 or 1, or a rate of 0, the derivative of a term with a count of 0 is 0 times infinity.

``tests/test_densities.py`` fails when NumPyro fixes this.
"""

from __future__ import annotations

from copy import copy
from typing import Any

import jax.numpy as jnp
import numpyro.distributions as dist
from jax.scipy.special import gammaln

from flowvi.numpyro.distributions import WRAPPERS


class _Bernoulli(dist.BernoulliProbs):
    def log_prob(self, value, intermediates=None):
        return _times_log(value, self.probs) + _times_log_of_other(1 - value, self.probs)


class _Binomial(dist.BinomialProbs):
    def log_prob(self, value, intermediates=None):
        other = self.total_count - value
        ways = gammaln(self.total_count + 1.0) - gammaln(value + 1.0) - gammaln(other + 1.0)
        return ways + _times_log(value, self.probs) + _times_log_of_other(other, self.probs)


class _Geometric(dist.GeometricProbs):
    def log_prob(self, value, intermediates=None):
        return _times_log_of_other(value, self.probs) + jnp.log(self.probs)


class _NegativeBinomial(dist.NegativeBinomialProbs):
    def log_prob(self, value, intermediates=None):
        r = self.total_count
        ways = gammaln(value + r) - gammaln(r) - gammaln(value + 1.0)
        return ways + _times_log(value, self.probs) + r * jnp.log1p(-self.probs)


class _Multinomial(dist.MultinomialProbs):
    def log_prob(self, value, intermediates=None):
        ways = gammaln(self.total_count + 1.0) - gammaln(value + 1.0).sum(-1)
        return ways + _times_log(value, self.probs).sum(-1)


class _Poisson(dist.Poisson):
    def log_prob(self, value, intermediates=None):
        rate = jnp.asarray(self.rate, float)
        return _times_log(value, rate) - gammaln(value + 1.0) - rate


def _times_log(count, p):
    """``count * log(p)``; at a count of 0 it is 0 and has the derivative 0."""
    happened = count > 0
    return jnp.where(happened, count * jnp.log(jnp.where(happened, p, 1.0)), 0.0)


def _times_log_of_other(count, p):
    """``count * log(1 - p)``; at a count of 0 it is 0 and has the derivative 0."""
    happened = count > 0
    return jnp.where(happened, count * jnp.log1p(-jnp.where(happened, p, 0.0)), 0.0)


SAFE = {
    dist.BernoulliProbs: _Bernoulli,
    dist.BinomialProbs: _Binomial,
    dist.GeometricProbs: _Geometric,
    dist.NegativeBinomialProbs: _NegativeBinomial,
    dist.MultinomialProbs: _Multinomial,
    dist.Poisson: _Poisson,
}
for _family, _safe in SAFE.items():
    _safe.__name__ = _family.__name__  # the name under which flowvi.families has its entry


def with_right_derivative(fn: dist.Distribution) -> dist.Distribution:
    """The same distribution, with a log density whose derivative is right for all values of its parameters."""
    if isinstance(fn, WRAPPERS):
        inner = with_right_derivative(fn.base_dist)  # type: ignore[attr-defined]
        return fn if inner is fn.base_dist else _with(fn, base_dist=inner)  # type: ignore[attr-defined]
    if isinstance(fn, dist.BernoulliLogits | dist.BinomialLogits):
        logits = jnp.asarray(fn.logits)
        return _with(fn, logits=logits + jnp.finfo(logits.dtype).tiny)  # changes only 0 and numbers of the same tiny size
    if (safe := SAFE.get(type(fn))) is not None:
        new = _with(fn)
        new.__class__ = safe
        return new
    return fn


def _with(fn: dist.Distribution, **attributes: Any) -> dist.Distribution:
    new = copy(fn)
    new.__dict__.update(attributes)
    return new
