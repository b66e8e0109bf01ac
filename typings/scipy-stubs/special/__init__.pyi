# SciPy has no types; logsumexp returns a tuple only if it is asked for one.

from typing import Any

def __getattr__(name: str) -> Any: ...
