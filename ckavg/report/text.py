"""Stage *report*: numbers and names as text. Pure."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TypeVar

from ckavg.errors import CkavgError, CombinedError, printable

Row = TypeVar("Row")

MOST_ROWS = 40
"""Rows of a table by checkpoint; of a longer one, those in the middle are left out."""

_MOST_OF_A_LINE = 10_000
"""Characters; twice the longest path."""

_EIGHTHS = " ▏▎▍▌▋▊▉█"
_HEIGHTS = "▁▂▃▄▅▆▇█"
_UNITS = ((1e12, " TB"), (1e9, " GB"), (1e6, " MB"), (1e3, " kB"))
_COUNTS = ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k"))


def as_bytes(count: int) -> str:
    """A size in decimal units.

    >>> as_bytes(490807608), as_bytes(17)
    ('490.8 MB', '17 B')
    """
    return _scaled(count, _UNITS) or f"{count} B"


def as_count(count: int) -> str:
    """A number of parameters, as models are named.

    >>> as_count(245366784), as_count(12)
    ('245.4M', '12')
    """
    return _scaled(count, _COUNTS) or str(count)


def bar(value: float, largest: float, width: int) -> str:
    """A bar whose length is `value` on a scale where `largest` fills `width` characters, to an eighth of one.

    >>> bar(0.5, 1.0, 4), bar(0.28125, 1.0, 4), bar(0.0, 1.0, 4)
    ('██', '█▏', '')
    """
    eighths = round(abs(value) / largest * width * 8) if largest > 0 else 0
    whole, rest = divmod(eighths, 8)
    return "█" * whole + _EIGHTHS[rest].strip()


def sparkline(values: Sequence[float]) -> str:
    """A character for each value, its height on a scale up to the largest; a minus sign for what is negative.

    >>> sparkline([0.0, 0.5, 1.0, -0.25])
    '▁▅█-'
    """
    largest = max((abs(value) for value in values), default=0.0) or 1.0
    top = len(_HEIGHTS) - 1
    return "".join("-" if value < 0 else _HEIGHTS[math.ceil(value / largest * top)] for value in values)


def shortened_rows(rows: Sequence[Row], most: int) -> tuple[Sequence[Row], slice, Sequence[Row]]:
    """A long table in three parts: the rows at its head, the place of those in the middle that are left out, the rest.

    >>> shortened_rows("abcdefghij", 4), shortened_rows("abc", 4)
    (('a', slice(1, 7, None), 'hij'), ('abc', slice(3, 3, None), ''))
    """
    hidden = max(0, len(rows) - most)
    middle = slice(most // 4, most // 4 + hidden) if hidden else slice(len(rows), len(rows))
    return rows[: middle.start], middle, rows[middle.stop :]


def told(error: CkavgError) -> tuple[str, str, str]:
    r"""The message, the hint and the command of an error, fit for a terminal; several problems have some lines each.

    >>> told(CkavgError("a\nb is no file.", hint="Name another."))
    ('a\\nb is no file.', 'Name another.', '')
    """
    own = printable(error.hint), printable(error.command)
    if not isinstance(error, CombinedError):
        return _shortened(printable(error.message)), *own
    lines = [f"{len(error.errors)} problems:"]
    for each in error.errors:
        message, *rest = told(each)
        lines += [f"- {message}", *(f"  {line}" for line in rest if line)]
    return "\n".join(lines), *own


def _shortened(line: str) -> str:
    """A line without its middle, where a name in it is longer than any name should be."""
    hidden = len(line) - _MOST_OF_A_LINE
    if hidden <= 0:
        return line
    return f"{line[: _MOST_OF_A_LINE // 2]} … ({hidden:,} more characters) … {line[-(_MOST_OF_A_LINE // 2) :]}"


def _scaled(count: int, units: tuple[tuple[float, str], ...]) -> str:
    return next((f"{count / size:.1f}{unit}" for size, unit in units if count >= size), "")
