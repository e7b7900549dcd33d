"""Tables that fit: no head and no number is cut, whatever the width of the terminal or of a pipe (80 columns)."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence

from rich.box import Box
from rich.cells import cell_len
from rich.console import Console
from rich.table import Table
from rich.text import Text

from fedllm.report.formatting import printable

LONG = 18  # letters of a word in a text: a longer one may be folded into lines

Row = Sequence[str]


def show(
    console: Console,
    heads: Row,
    rows: Iterable[Row],
    *,
    numbers: bool = False,
    bold: Collection[str] = (),
    box: Box | None = None,
) -> None:
    """Print rows under their heads. Columns that do not fit stand in a further table below, behind the first column.

    Args:
        numbers: all columns but the first are numbers, at the right edge. bold: heads of columns that stand out.
    """
    listed = [[printable(cell) for cell in row] for row in rows]
    gap, edges = (2, 0) if box is None else (3, 2)
    columns = [[head, *(row[at] for row in listed)] for at, head in enumerate(heads)]
    least = [max(_longest(head), _least(cells, whole=numbers and at > 0)) for at, (head, *cells) in enumerate(columns)]
    for part in _parts(least, console.width - edges, gap):
        table = Table(box=box, header_style="bold", pad_edge=False)
        room = console.width - edges - gap * (len(part) - 1)
        widths = _spread([least[at] for at in part], [max(map(cell_len, columns[at])) for at in part], room)
        for at, width in zip(part, widths, strict=True):
            style = "bold" if heads[at] in bold else ""
            table.add_column(heads[at], justify="right" if numbers and at else "left", style=style, width=width)
        for row in listed:
            table.add_row(*(Text(row[at], overflow="fold") for at in part))
        console.print(table)


def _parts(least: Sequence[int], width: int, gap: int) -> list[list[int]]:
    """The columns of each table: the first one, and as many others as fit."""
    parts, taken = [[0]], least[0]
    for at in range(1, len(least)):
        if len(parts[-1]) > 1 and taken + gap + least[at] > width:
            parts.append([0])
            taken = least[0]
        parts[-1].append(at)
        taken += gap + least[at]
    return parts


def _spread(least: Sequence[int], natural: Sequence[int], room: int) -> list[int]:
    """Widths between the least and the natural ones: what is left of the room goes to those that want it."""
    widths = list(least)
    left = room - sum(widths)
    while left > 0 and (wanting := [at for at, width in enumerate(widths) if width < natural[at]]):
        share = max(1, left // len(wanting))
        for at in wanting[:left]:
            more = min(share, natural[at] - widths[at])
            widths[at] += more
            left -= more
    return widths


def _least(cells: Sequence[str], *, whole: bool) -> int:
    """Columns that cells need: their longest word, or all of a number."""
    if whole:
        return max(map(cell_len, cells), default=0)
    return min(LONG, max(map(_longest, cells), default=0))


def _longest(text: str) -> int:
    return max(map(cell_len, text.split()), default=0)
