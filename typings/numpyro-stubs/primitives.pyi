# By NumPyro's types a sample or a parameter may be a Python number, which has no shape and no elements.

from typing import Any

def __getattr__(name: str) -> Any: ...
