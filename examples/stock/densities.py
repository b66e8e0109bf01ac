"""Log densities with a wrong derivative at special points in a host: the exact derivative and the host's.

python examples/stock/densities.py [--markdown]

With --markdown it prints the table in docs/_measured/densities.md, which docs/stock.md includes. The points and the exact derivatives
are those of tests/test_densities.py.
"""

import sys
import warnings
from pathlib import Path

import numpyro
import torch

sys.path.insert(0, str(Path(__file__).parents[2] / "tests"))

from test_densities import HOSTS, LEFT, MENDED, wrong

HEAD = ("host", "family", "at", "derivative in", "exact", "host's")


def rows():
    """A row for each family and variable: the first point with a wrong derivative."""
    for host in HOSTS:
        found = wrong(host)
        for family, variable in [*MENDED[host], *LEFT[host]]:
            point, exact, of_host = found[family, variable][0]
            at = ", ".join(f"{name} = {value:g}" for name, value in point.items())
            yield host, family, at, variable, f"{exact:.3g}", f"{of_host:.3g}"


def main(markdown):
    numpyro.enable_x64()
    torch.set_default_dtype(torch.float64)
    warnings.simplefilter("ignore")  # NumPyro warns about values at the end of a support
    if markdown:
        for cells in (HEAD, ("---",) * 4 + ("---:",) * 2, *rows()):
            print("| " + " | ".join(cells) + " |")
    else:
        for cells in (HEAD, *rows()):
            print("  ".join(cell.ljust(width) for cell, width in zip(cells, (8, 24, 56, 15, 8, 8), strict=True)).rstrip())


if __name__ == "__main__":
    main(markdown="--markdown" in sys.argv)
