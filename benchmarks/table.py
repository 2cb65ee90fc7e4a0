"""Plain-text tables and the format of their cells. Pure."""

from __future__ import annotations

from collections.abc import Iterable

from benchmarks.measure import spread

Row = tuple[str, ...]


def render(header: Row, rows: Iterable[Row]) -> str:
    """Columns padded to their widest cell: the first to the left, the others to the right.

    >>> print(render(("", "seconds"), [("one", "1.0")]))
         seconds
    one      1.0
    """
    lines = [header, *rows]
    widths = [max(len(line[column]) for line in lines) for column in range(len(header))]
    return "\n".join(
        "  ".join([line[0].ljust(widths[0]), *map(str.rjust, line[1:], widths[1:])]).rstrip() for line in lines
    )


def median(values: Iterable[float | None], digits: int) -> str:
    """The median of the known values, or an empty text.

    >>> median([2.0, None, 1.0], 1), median([None], 1)
    ('1.5', '')
    """
    present = [value for value in values if value is not None]
    return f"{spread(present).median:.{digits}f}" if present else ""


def with_spread(values: Iterable[float], digits: int) -> str:
    """The median, and the extremes where there are several values.

    >>> with_spread([3.0, 1.0, 2.0], 1), with_spread([3.0], 1)
    ('2.0 (1.0–3.0)', '3.0')
    """
    present = list(values)
    of = spread(present)
    extremes = f" ({of.least:.{digits}f}–{of.most:.{digits}f})" if len(present) > 1 else ""
    return f"{of.median:.{digits}f}{extremes}"


def most(values: Iterable[int | None], unit: float, digits: int = 0) -> str:
    """The largest of several numbers of bytes, in a unit; empty if they are unknown.

    >>> most([1_500_000, 1_000_000], 1e6), most([None], 1e6)
    ('2', '')
    """
    present = [value for value in values if value is not None]
    return f"{max(present) / unit:.{digits}f}" if present else ""
