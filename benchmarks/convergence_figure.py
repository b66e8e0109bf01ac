"""The figure of the tables of ``convergence.py``: seconds until the ELBO is close to the best known, by side.

It reads docs/tables/convergence_numpyro.md and convergence_pyro.md, and writes docs/figures/convergence.png:

    python benchmarks/convergence_figure.py
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import matplotlib.pyplot as plt
from tables import TABLES

from flowvi import plot

FIGURE = Path(__file__).parent.parent / "docs" / "figures" / "convergence.png"
SIDES = {"the host's best": "o", "flowvi's default": "^", "chosen by hand": "s", "by recommend": "D"}
KINDS = {"TraceFlow": "flowvi's default", "best": "chosen by hand", "recommended": "by recommend"}  # by how a row's objective starts


class Time(NamedTuple):
    """The seconds that a side takes to the target, or a lower bound if it never reaches the target."""

    is_bound: bool
    seconds: float


def times(table: str) -> dict[str, dict[str, Time]]:
    """The shortest time of each kind of side, by program."""
    found: dict[str, dict[str, Time]] = {}
    for line in table.splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if not line.startswith("| ") or cells[0] in ("Program", "---") or cells[0].startswith("median"):
            continue
        program, objective, *_ = cells
        side = next((kind for start, kind in KINDS.items() if objective.startswith(start)), "the host's best")
        time = Time(cells[5].startswith(">"), float(cells[5].lstrip("> ")))
        of_program = found.setdefault(program, {})
        of_program[side] = min(time, of_program.get(side, time))
    return found


def draw(tables: dict[str, str], path: Path) -> None:
    """Draw the tables of both hosts, one below the other, so that a phone shows them large enough."""
    with plt.rc_context(plot.STYLE):
        picture, axes = plt.subplots(len(tables), 1, figsize=(5.2, 7.2))
        for ax, (host, table) in zip(axes, tables.items(), strict=True):
            of_host = times(table)
            for y, of_program in enumerate(of_host.values()):
                _draw_program(ax, y, of_program)
            ax.set_yticks(range(len(of_host)), list(of_host))
            ax.invert_yaxis()
            ax.set_xscale("log")
            ax.margins(x=0.12)
            ax.grid(axis="x", color="0.9")
            ax.set_axisbelow(True)
            ax.set_title(host)
        axes[-1].set_xlabel("seconds of training")
        handles = [plt.Line2D([], [], ls="", marker=marker, color=f"C{i}") for i, marker in enumerate(SIDES.values())]
        picture.legend(handles, list(SIDES), loc="outside lower center", ncols=2)
        picture.savefig(path, dpi=150)
        plt.close(picture)


def _draw_program(ax: Any, y: int, of_program: dict[str, Time]) -> None:
    ax.plot([min(t.seconds for t in of_program.values()), max(t.seconds for t in of_program.values())], [y, y], color="0.8", zorder=1)
    for i, (side, marker) in enumerate(SIDES.items()):
        time = of_program[side]
        ax.plot(time.seconds, y, marker, color=f"C{i}", fillstyle="none" if time.is_bound else "full")
        if time.is_bound:
            ax.annotate("", (1.6 * time.seconds, y), (time.seconds, y), arrowprops={"arrowstyle": "->", "color": f"C{i}"})


def main() -> None:
    draw({host: (TABLES / f"convergence_{host.lower()}.md").read_text() for host in ("NumPyro", "Pyro")}, FIGURE)


if __name__ == "__main__":
    main()
