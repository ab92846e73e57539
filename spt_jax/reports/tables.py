"""Tables as text, which fit in 80 columns."""

import io
import shutil
import sys
from collections.abc import Sequence

WIDTH = 80
LEAST = 12  # of the first column
GAP = 2


def text_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Returns a table whose first column is aligned to the left and the others to the right.

    It is at most as wide as the terminal, or 80 columns where there is none. Cells of the first column that do not fit
    continue on further lines, and those of the others only if the first would have less than `LEAST` columns.

    Args:
      header: the names of the columns.
      rows: the cells of each row, as many as there are columns.
    """
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    width = shutil.get_terminal_size((WIDTH, 24)).columns if sys.stdout.isatty() else WIDTH
    cells = [*header[1:], *(cell for row in rows for cell in row[1:])]
    needed = sum(max(map(_width, cells[number :: len(header) - 1])) + GAP for number in range(len(header) - 1))
    table = Table(box=SIMPLE_HEAD, padding=(0, GAP - 1, 0, 0), pad_edge=False, show_edge=False)
    for number, name in enumerate(header):
        fits = number > 0 and needed + LEAST <= width
        table.add_column(Text(name), justify="right" if number else "left", overflow="fold", no_wrap=fits)
    for row in rows:
        table.add_row(*map(Text, row))
    written = io.StringIO()
    Console(file=written, width=width, color_system=None, force_terminal=False, force_jupyter=False).print(table)
    return "\n".join(line.rstrip() for line in written.getvalue().rstrip("\n").split("\n"))


def _width(cell: str) -> int:
    return max(map(len, cell.split("\n")))
