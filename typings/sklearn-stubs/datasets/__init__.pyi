# What a loader returns depends on its arguments, and scikit-learn has no types.

from typing import Any

def __getattr__(name: str) -> Any: ...
