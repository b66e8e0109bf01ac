"""A record that is shown as a table: as text, with pandas or with rich."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, ClassVar

if TYPE_CHECKING:
    import pandas as pd
    from rich.table import Table as RichTable


class Table(ABC):
    """A record with rows.

    Attributes:
        columns: The names of the columns.
        num_words: How many columns on the left hold words.
    """

    columns: ClassVar[tuple[str, ...]]
    num_words: ClassVar[int]

    @abstractmethod
    def rows(self) -> Iterator[tuple[Any, ...]]:
        """The rows of the table."""

    @property
    @abstractmethod
    def title(self) -> str:
        """What the table shows."""

    @property
    def footer(self) -> tuple[str, ...]:
        """Lines below the table."""
        return ()

    def to_pandas(self) -> pd.DataFrame:
        """The table as a ``pandas.DataFrame``."""
        import pandas as pd

        return pd.DataFrame(list(self.rows()), columns=list(self.columns))

    def to_rich(self) -> RichTable:
        """The table as a ``rich.table.Table``, for ``rich.print``."""
        from rich.table import Table as RichTable

        table = RichTable(title=self.title, caption="\n".join(self.footer) or None)
        for i, column in enumerate(self.columns):
            table.add_column(column, justify="left" if i < self.num_words else "right")
        for row in self._cells():
            table.add_row(*row)
        return table

    def _cells(self) -> Iterator[tuple[str, ...]]:
        for row in self.rows():
            yield tuple("" if x != x else f"{x:.3g}" if isinstance(x, float) else str(x) for x in row)

    def __str__(self) -> str:
        """The table as plain text."""
        cells = [self.columns, *self._cells()]
        widths = [max(len(row[i]) for row in cells) for i in range(len(self.columns))]
        lines = ["  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in cells]
        return "\n".join([*lines, *self.footer])
