# Pyro makes its optimizers from those of torch when it is imported.

from typing import Any

def __getattr__(name: str) -> Any: ...
