# SciPy has no types; pyright takes an argument whose default is 1 for an integer.

from typing import Any

def __getattr__(name: str) -> Any: ...
