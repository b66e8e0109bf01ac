# Pyro's types do not know infer={"estimator": ...}.

from typing import Any

def __getattr__(name: str) -> Any: ...
