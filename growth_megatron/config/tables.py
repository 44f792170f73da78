"""Tables as text, the same wherever they go.

Owns: how a ``rich`` table is turned into plain lines of whatever width its cells need.
Does not own: what is in a table.
"""

from __future__ import annotations

import io
from collections.abc import Iterable, Sequence

from rich.console import Console
from rich.table import Table

_WIDE = 100_000  # columns: no cell is ever folded


def plain_lines(table: Table) -> list[str]:
    """The lines of ``table`` without colours, none folded or with spaces at its end."""
    buffer = io.StringIO()
    console = Console(file=buffer, width=_WIDE, no_color=True, highlight=False, force_terminal=False, markup=False)
    console.print(table)
    return [line.rstrip() for line in buffer.getvalue().splitlines()]


def columns(rows: Iterable[Sequence[str]], right: Iterable[int] = ()) -> list[str]:
    """``rows`` of cells as lines with columns two spaces apart, those numbered in ``right`` flush right."""
    rows = list(rows)
    table = Table.grid(padding=(0, 2, 0, 0))
    right = set(right)
    for number in range(max((len(row) for row in rows), default=0)):
        table.add_column(justify="right" if number in right else "left", no_wrap=True)
    for row in rows:
        table.add_row(*row)
    return plain_lines(table)
