"""The build fails if a public name of flowvi is missing from the API reference."""

import inspect
from collections.abc import Iterable, Iterator
from importlib import import_module

from sphinx.util import logging

MODULES = ("flowvi", "flowvi.fields", "flowvi.proposals", "flowvi.numpyro", "flowvi.pyro", "flowvi.report", "flowvi.plot")
logger = logging.getLogger(__name__)


def public_names(module: str) -> Iterator[str]:
    """The full names of the public functions and classes of a module: its ``__all__``, or what it defines."""
    found = import_module(module)
    defined = [n for n, o in vars(found).items() if not n.startswith("_") and getattr(o, "__module__", "") == module]
    for name in getattr(found, "__all__", defined):
        value = getattr(found, name)
        if inspect.isclass(value) or inspect.isfunction(value):
            yield f"{module}.{name}"


def missing(documented: Iterable[str]) -> list[str]:
    """The public names that are not among the ``documented`` ones."""
    return sorted({name for module in MODULES for name in public_names(module)}.difference(documented))


def check(app, env):
    for name in missing(env.domaindata["py"]["objects"]):
        logger.warning("%s is public, but is not in the API reference", name)


def setup(app):
    app.connect("env-check-consistency", check)
    return {"version": "1", "parallel_read_safe": True, "parallel_write_safe": True}
