"""The tables that the commands print and write: Markdown, for the documentation."""

from __future__ import annotations

import argparse
import os
import platform
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import NamedTuple

TABLES = Path(__file__).parent.parent / "docs" / "tables"


class Options(NamedTuple):
    """The options of a command. A table is written only if all of its rows were computed."""

    command: str
    smoke: bool
    only: list[str]
    study: str | None = None

    def wants(self, *words: object) -> bool:
        """Whether ``--only`` selects a row with these words."""
        return set(self.only) <= set(map(str, words))


def options(file: str, doc: str | None, argv: Sequence[str] | None, studies: Sequence[str] = ()) -> Options:
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--smoke", action="store_true", help="print a few short rows, to see that the command runs, and write nothing")
    parser.add_argument("--only", nargs="+", default=[], metavar="WORD", help="print the rows of this host or program; write nothing")
    if studies:
        parser.add_argument("--study", choices=studies, help="run only this study")
    return Options(f"python benchmarks/{Path(file).name}", **vars(parser.parse_args(argv)))


def figure(x: float, form: str = ".3g") -> str:
    return format(x, form).replace("-", "\N{MINUS SIGN}")


@contextmanager
def table(name: str, options_given: Options, columns: Sequence[str], about: str) -> Iterator[Callable[..., None]]:
    """Print a table row by row. When it is complete, write it to docs/tables, in place of the old one.

    Yields:
        A function that takes the cells of a row.
    """
    versions = ", ".join(f"{package} {version(package)}" for package in ("numpyro", "jax", "pyro-ppl", "torch"))
    where = f"Python {platform.python_version()}, {versions}; {os.cpu_count()} cores ({platform.machine()})."
    lines = [f"    {options_given.command}", "", f"{about} {where}", "", f"| {' | '.join(columns)} |", "| --- " * len(columns) + "|"]
    rows: list[str] = []

    def row(*cells: object) -> None:
        if len(cells) != len(columns):
            raise ValueError(f"table {name}: expected {len(columns)} cells, found {len(cells)}.")
        rows.append(f"| {' | '.join(map(str, cells))} |")
        print(*([] if rows[1:] else ["", *lines]), rows[-1], sep="\n", flush=True)

    yield row
    if not options_given.smoke and not options_given.only:
        TABLES.mkdir(parents=True, exist_ok=True)
        unfinished = TABLES / f".{name}.md"
        unfinished.write_text("\n".join([*lines, *rows, ""]))
        unfinished.replace(TABLES / f"{name}.md")
