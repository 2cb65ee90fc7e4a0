"""Tables that fit the terminal: numbers stay whole, drawings shrink, the least useful columns are dropped first."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from rich.text import Text

from ckavg.cli.text import MOST_ROWS, as_encoded, quoted, wrapped

_GAP = 2
_HEIGHTS = "▁▂▃▄▅▆▇█"
_EIGHTHS = " ▏▎▍▌▋▊▉"


class Cell(Protocol):
    """What a table shows in a place.

    Attributes:
        least, most: columns that it needs, and those that it would fill.
    """

    @property
    def least(self) -> int: ...  # noqa: D102

    @property
    def most(self) -> int: ...  # noqa: D102

    def as_text(self, width: int) -> Text:
        """As text of at most so many columns, perhaps in several lines."""


@dataclass(frozen=True, slots=True)
class Words:
    """A text; one that `wraps` has several lines where there is no room."""

    text: str
    style: str = ""
    wraps: bool = False

    @property
    def least(self) -> int:
        """As of any cell."""
        return max(map(len, self._plain.split()), default=0) if self.wraps else self.most

    @property
    def most(self) -> int:
        """As of any cell."""
        return quoted(self.text).cell_len

    @property
    def _plain(self) -> str:
        return quoted(self.text).plain

    def as_text(self, width: int) -> Text:
        """As of any cell."""
        return Text(wrapped(self._plain, width) if self.wraps else self._plain, self.style)


@dataclass(frozen=True, slots=True)
class Bar:
    """A bar on a scale from `low` to `high`, to an eighth of a character: to the right of the axis or, of a negative
    value, to its left. There is an axis where the scale has negative values.
    """

    value: float
    low: float
    high: float
    least: int = 8
    most: int = 32

    def as_text(self, width: int) -> Text:
        """As of any cell."""
        low, high = min(self.low, 0.0), max(self.high, 0.0)
        if not low:
            return Text(_to_the_right(self.value / (high or 1.0) * width), "bar")
        left = min(max(round((width - 1) * -low / (high - low)), 1), width - 2 if high else width - 1)
        scale = min(left / -low, (width - 1 - left) / high if high else math.inf)
        length = self.value * scale
        if length >= 0:
            return Text.assemble(" " * left, "│", (_to_the_right(length), "bar"))
        halves = round(-2 * length)
        drawn = "▐" * (halves % 2) + "█" * (halves // 2)
        return Text.assemble((f"{drawn:>{left}}", "bar.negative"), "│")


def _to_the_right(length: float) -> str:
    eighths = round(8 * length)
    return as_encoded("█" * (eighths // 8) + _EIGHTHS[eighths % 8]).rstrip()


@dataclass(frozen=True, slots=True)
class Spark:
    """A character for each value, as of `sparkline`, and a dot for None; of more values than columns, for sums."""

    values: Sequence[float | None]
    least: int = 8

    @property
    def most(self) -> int:
        """As of any cell."""
        return max(len(self.values), self.least)

    def as_text(self, width: int) -> Text:
        """As of any cell."""
        count = len(self.values)
        edges = [math.ceil(place * count / width) for place in range(width + 1)] if count > width else range(count + 1)
        binned = [self.values[begin:end] for begin, end in itertools.pairwise(edges)]
        sums = [sum(known) if (known := [each for each in some if each is not None]) else None for some in binned]
        shown = iter(sparkline([each for each in sums if each is not None]))
        return Text("".join("·" if each is None else next(shown) for each in sums), "bar")


class Table:
    """A table without rules; numbers to the right.

    Args:
        titles: of the columns; where all are blank, none is shown.
        left: those that begin at the left.
        wraps: those whose texts may have several lines.
        spare: those that are left out where there is no room, the first one first.
    """

    def __init__(
        self, *titles: str, left: tuple[str, ...] = (), wraps: tuple[str, ...] = (), spare: tuple[str, ...] = ()
    ) -> None:
        self._titles = titles
        self._left = left
        self._wraps = wraps
        self._spare = spare
        self._rows: list[tuple[list[Cell] | str, str]] = []

    def add_row(self, *cells: str | Cell, style: str = "") -> None:
        """Add a row: texts, with what is to be said of any, or drawings."""
        row = [
            Words(cell, wraps=title in self._wraps) if isinstance(cell, str) else cell
            for title, cell in zip(self._titles, cells, strict=True)
        ]
        self._rows.append((row, style))

    def add_heading(self, text: str) -> None:
        """Add a line of its own above the rows that follow."""
        self._rows.append((text, "bold"))

    def laid_out(self, width: int) -> tuple[list[Text], list[str]]:
        """The lines of the table, and the titles of the columns for which there was no room."""
        kept = list(range(len(self._titles)))
        least = [max([cell.least for cell in self._column(place)], default=0) for place in kept]
        for title in self._spare:
            if sum(least[place] + _GAP for place in kept) - _GAP > width and title in self._titles:
                kept.remove(self._titles.index(title))
        widths = {place: max(cell.most for cell in self._column(place)) for place in kept}
        for place in sorted(kept, key=lambda place: least[place] - widths[place]):  # those that can shrink most
            over = sum(widths.values()) + _GAP * (len(kept) - 1) - width
            widths[place] = max(least[place], widths[place] - max(over, 0))
        titles: list[Cell] = [Words(title) for title in self._titles]
        lines = self._lines(titles, widths, "bold") if any(map(str.strip, self._titles)) else []
        for row, style in self._rows:
            if isinstance(row, str):
                lines += Words(row, style, wraps=True).as_text(width).split()
            else:
                lines += self._lines(row, widths, style)
        return lines, [title for place, title in enumerate(self._titles) if place not in kept and title.strip()]

    def _column(self, place: int) -> list[Cell]:
        return [Words(self._titles[place]), *(cells[place] for cells, _ in self._rows if not isinstance(cells, str))]

    def _lines(self, cells: Sequence[Cell], widths: Mapping[int, int], style: str) -> list[Text]:
        columns = {place: cells[place].as_text(width).split("\n") for place, width in widths.items()}
        lines = []
        for number in range(max(map(len, columns.values()), default=0)):
            line = Text(style=style)
            for place, texts in columns.items():
                text = texts[number] if number < len(texts) else Text()
                room = " " * (widths[place] - text.cell_len)
                is_left = self._titles[place] in self._left
                line.append_text(Text.assemble(*((text, room) if is_left else (room, text)), " " * _GAP))
            line.rstrip()
            lines.append(line)
        return lines


def table_by_step(
    columns: Mapping[str, Sequence[str]], values: Sequence[float], *, sums: str = "", most: int = MOST_ROWS
) -> Table:
    """A table with a row for each checkpoint and a bar for its value; of a long one, without those in the middle.

    Args:
        columns: texts by title, the step first.
        values: whose bars come last.
        sums: title of the column that shows the sum of the values that are left out.
        most: rows.
    """
    table = Table(*columns, " ", left=(" ",), spare=(" ", "±", "α", "β"))
    low, high = min(values), max(values)
    rows: list[tuple[str | Cell, ...]] = [
        (*texts, Bar(value, low, high)) for *texts, value in zip(*columns.values(), values, strict=True)
    ]
    if len(rows) > most:
        hidden = slice(most // 4, len(rows) - most + most // 4)
        left_out = {"step": "…", sums: f"{sum(values[hidden]):.4f}"}
        rows[hidden] = [(*(left_out.get(title, "") for title in columns), f"{len(rows[hidden])} more")]
    for row in rows:
        table.add_row(*row)
    return table


def sparkline(values: Sequence[float]) -> str:
    """A character for each value, its height on a scale up to the largest; a minus sign for what is negative.

    >>> sparkline([0.0, 0.5, 1.0, -0.25])
    '▁▅█-'
    """
    largest = max((abs(value) for value in values), default=0.0) or 1.0
    top = len(_HEIGHTS) - 1
    return "".join("-" if value < 0 else _HEIGHTS[math.ceil(value / largest * top)] for value in values)
