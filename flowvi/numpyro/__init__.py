"""flowvi for NumPyro."""

try:
    import numpyro as _numpyro  # noqa: F401
except ImportError as _error:
    _error.add_note("flowvi.numpyro needs NumPyro: pip install 'flowvi[numpyro]'")
    raise

from flowvi.host import register as _register
from flowvi.numpyro.distributions import Estimated
from flowvi.numpyro.elbo import TraceFlow_ELBO
from flowvi.numpyro.guidance import check_program, recommend
from flowvi.numpyro.host import HOST as _HOST
from flowvi.numpyro.learning import adaptive
from flowvi.numpyro.renyi import TraceFlow_RenyiELBO
from flowvi.numpyro.report import gradient_report

__all__ = ["Estimated", "TraceFlow_ELBO", "TraceFlow_RenyiELBO", "adaptive", "check_program", "gradient_report", "recommend"]

_register(_HOST)


def __dir__() -> list[str]:
    """The names that tab completion offers, without the modules that define them."""
    return sorted({*__all__, *(name for name in globals() if name.startswith("__"))})
