"""The progress bar of long work."""

from __future__ import annotations

import sys
from importlib.util import find_spec
from typing import Any

from tqdm import tqdm


class Bar(tqdm):
    """A bar on the standard error stream, drawn by rich if that is installed, else by tqdm.

    tqdm counts, and says when to draw. No thread does, which would disturb measurements of time. A file gets the last line only.

    Args:
        *args: As for ``tqdm.tqdm``.
        unit: What is counted.
        disable: Whether to show nothing.
        **kwargs: As for ``tqdm.tqdm``.
    """

    def __init__(self, *args: Any, unit: str, disable: bool, **kwargs: Any) -> None:
        self.rich = None if disable else _rich_bar(unit)
        self.moves = sys.stderr.isatty() or "ipykernel" in sys.modules
        super().__init__(*args, unit=unit, disable=disable, leave=self.rich is None, **kwargs)

    def display(self, *args: Any, **kwargs: Any) -> None:
        """Draw the bar."""
        if self.rich is None:
            if self.moves:
                super().display(*args, **kwargs)
        else:
            self.rich.update(self.rich.task_ids[0], description=self.desc.removesuffix(": "), total=self.total, completed=self.n)
            self.rich.start()
            self.rich.refresh()

    def close(self) -> None:
        """Draw the bar for the last time."""
        if not self.disable:
            self.moves = True
            try:
                super().close()
            finally:
                if self.rich is not None:
                    self.rich.stop()


def _rich_bar(unit: str) -> Any:
    try:
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
    except ImportError:
        return None
    count = TextColumn(f"{{task.completed:.0f}}/{{task.total:.0f}} {unit}")
    columns = TextColumn("{task.description}", markup=False), BarColumn(), count, TimeRemainingColumn(elapsed_when_finished=True)
    console = Console(stderr=True)
    if console.is_jupyter and find_spec("ipywidgets") is None:
        return None  # rich would warn and show nothing
    bar = Progress(*columns, console=console, auto_refresh=False)
    bar.add_task("", total=0)
    return bar
