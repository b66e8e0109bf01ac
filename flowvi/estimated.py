"""What the wrapper ``Estimated`` forwards to the distribution inside, in both hosts."""

from __future__ import annotations

from operator import attrgetter
from typing import Any

from flowvi.estimators import Estimator


def forwarded(name: str) -> property:
    """An attribute of ``base_dist``."""
    return property(attrgetter(f"base_dist.{name}"))


class ForwardsToBase:
    """A distribution that behaves like its ``base_dist``, except when it is sampled."""

    base_dist: Any

    has_enumerate_support: property = forwarded("has_enumerate_support")
    mean: property = forwarded("mean")
    variance: property = forwarded("variance")

    def enumerate_support(self, expand: bool = True) -> Any:
        return self.base_dist.enumerate_support(expand)

    def cdf(self, value: Any) -> Any:
        return self.base_dist.cdf(value)

    def icdf(self, value: Any) -> Any:
        return self.base_dist.icdf(value)

    def entropy(self) -> Any:
        return self.base_dist.entropy()


def require_parts(base_dist: Any, estimator: Any, kind: type, host: str) -> None:
    """Refuse anything but a distribution of the host, an instance of ``kind``, and an estimator."""
    if not isinstance(estimator, Estimator):
        hint = "; the distribution comes first" if isinstance(base_dist, Estimator) else ""
        raise TypeError(f"Estimated: expected an estimator such as flowvi.LR(), found {estimator!r}{hint}")
    if not isinstance(base_dist, kind):
        raise TypeError(f"Estimated: expected a distribution of {host}, found {base_dist!r} of {type(base_dist).__module__}.")


def name_of_site(family: Any) -> str:
    """What messages show instead of the site's name, which a distribution does not know."""
    return f"Estimated({type(family).__name__})"
