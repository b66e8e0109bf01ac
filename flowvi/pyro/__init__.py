"""flowvi for Pyro."""

try:
    import pyro as _pyro  # noqa: F401
except ImportError as _error:
    _error.add_note("flowvi.pyro needs Pyro: pip install 'flowvi[pyro]'")
    raise

from flowvi.host import register as _register
from flowvi.pyro.distributions import Estimated
from flowvi.pyro.elbo import TraceFlow_ELBO
from flowvi.pyro.guidance import check_program, recommend
from flowvi.pyro.host import HOST as _HOST
from flowvi.pyro.jit import JitTraceFlow_ELBO, JitTraceFlow_RenyiELBO
from flowvi.pyro.renyi import TraceFlow_RenyiELBO
from flowvi.pyro.report import gradient_report
from flowvi.pyro.svi import CompiledSVI

__all__ = [
    "CompiledSVI",
    "Estimated",
    "JitTraceFlow_ELBO",
    "JitTraceFlow_RenyiELBO",
    "TraceFlow_ELBO",
    "TraceFlow_RenyiELBO",
    "check_program",
    "gradient_report",
    "recommend",
]

_register(_HOST)


def __dir__() -> list[str]:
    """The names that tab completion offers, without the modules that define them."""
    return sorted({*__all__, *(name for name in globals() if name.startswith("__"))})
