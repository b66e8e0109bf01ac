"""``python -m flowvi`` prints versions, host libraries and devices, for a bug report."""

from __future__ import annotations

import platform
from collections.abc import Iterator
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version

import flowvi

PACKAGES = {"flowvi.numpyro": ("numpyro", "jax", "jaxlib"), "flowvi.pyro": ("pyro-ppl", "torch")}


def report() -> Iterator[str]:
    """The lines to print. A library that is missing, or that cannot be imported, gets a line too."""
    yield f"flowvi {flowvi.__version__}, Python {platform.python_version()}, {platform.platform()}"
    for adapter, packages in PACKAGES.items():
        try:
            versions = ", ".join(f"{package} {version(package)}" for package in packages)
            devices = ", ".join(import_module(f"{adapter}.host").HOST.devices())
        except PackageNotFoundError as error:
            yield f"{adapter}: {error.name} is not installed"
        except Exception as error:  # a broken library is what a bug report is about
            yield f"{adapter}: {versions}; cannot be imported: {type(error).__name__}: {error}"
        else:
            yield f"{adapter}: {versions}; devices: {devices}"


if __name__ == "__main__":
    print(*report(), sep="\n")
