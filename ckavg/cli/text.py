"""What goes to stdout and stderr: messages, tables, and numbers as text."""

from __future__ import annotations

import io
import json
import math
import os
import sys
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress

import typer
from rich.bar import Bar
from rich.console import Console
from rich.table import Table
from rich.text import Text

from ckavg.errors import printable

_MOST_ROWS = 40
"""Rows of a table by checkpoint; of a longer one, those in the middle are left out."""

_BAR_WIDTH = 32
_WIDTH = 120
"""Columns where stdout is no terminal."""

_COLOURS = {"error": typer.colors.RED, "warning": typer.colors.YELLOW, "interrupted": typer.colors.YELLOW}
_HEIGHTS = "▁▂▃▄▅▆▇█"
_COUNTS = ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k"))


def say(line: str) -> None:
    """Print a line to stderr. Where nobody reads that any more, or its disk is full, the work continues without."""
    with suppress(OSError, ValueError):
        typer.echo(line, err=True)


def warn(kind: str, message: str) -> None:
    """Print `kind: message` to stderr, in one line."""
    say_labelled(kind, printable(message))


def warn_of(warnings: Iterable[str]) -> None:
    """Print warnings to stderr, each of them once."""
    for warning in dict.fromkeys(warnings):
        warn("warning", warning)


def say_labelled(kind: str, text: str) -> None:
    """Print `kind: text` to stderr, where `text` is fit for a terminal already and may have several lines."""
    label = f"{kind}:"
    if not os.environ.get("NO_COLOR"):
        label = typer.style(label, fg=_COLOURS[kind], bold=True)
    say(f"{label} {text}")


def stderr_is_terminal() -> bool:
    """Whether a person is likely to watch stderr."""
    return sys.stderr is not None and sys.stderr.isatty()


class Stdout(io.TextIOWrapper):
    """Stdout, whose errors bear its name, so that a message can say what cannot be written."""

    NAME = "stdout"

    def write(self, text: str) -> int:
        """As of any text stream."""
        try:
            return super().write(text)
        except OSError as error:
            error.filename = self.NAME
            raise

    def flush(self) -> None:
        """As of any text stream."""
        try:
            super().flush()
        except OSError as error:
            error.filename = self.NAME
            raise


class Output(Console):
    """Stdout for people: as wide as the terminal, wide enough for a table where there is none. Nothing is markup."""

    def __init__(self) -> None:
        super().__init__(markup=False, highlight=False)
        if not self.is_terminal:
            self.width = _WIDTH

    def line(self, text: object = "", *, style: str = "", wrap: bool = False) -> None:
        """Print a line as it is, whatever its length: it may hold a command to copy. With `wrap`, a paragraph."""
        self.print(quoted(text), style=style, soft_wrap=not wrap)

    def problem(self, message: str, more: Iterable[str] = (), *, wrap: bool = False) -> None:
        """Print a problem, and what helps; with `wrap`, the problem as a paragraph."""
        self.print(Text.assemble(("problem: ", "bold red"), quoted(message)), soft_wrap=not wrap)
        for line in filter(None, more):
            self.line(line)

    def warning(self, message: str) -> None:
        """Print an empty line and a warning."""
        self.line()
        self.line(f"warning: {message}", style="yellow", wrap=True)


def plain_table(*columns: str, left: tuple[str, ...] = ()) -> Table:
    """A table without rules; numbers to the right, the columns in `left` to the left."""
    table = Table(box=None, pad_edge=False, header_style="bold", padding=(0, 2, 0, 0))
    for column in columns:
        table.add_column(column, justify="left" if column in left else "right", no_wrap=column not in left)
    return table


def table_by_step(columns: Mapping[str, Sequence[str]], values: Sequence[float], *, sums: str = "") -> Table:
    """A table with a row for each checkpoint and a bar for its value; of a long one, without those in the middle.

    Args:
        columns: texts by title, the step first.
        values: whose bars come last.
        sums: title of the column that shows the sum of the values that are left out.
    """
    table = plain_table(*columns, " ", left=(" ",))
    largest = max(map(abs, values))
    rows = [(*texts, bar(value, largest)) for *texts, value in zip(*columns.values(), values, strict=True)]
    hidden = slice(_MOST_ROWS // 4, len(rows) - _MOST_ROWS + _MOST_ROWS // 4)
    if len(rows) > _MOST_ROWS:
        left_out = {"step": "…", sums: f"{sum(values[hidden]):.4f}"}
        count = f"{len(rows[hidden])} more"
        rows[hidden] = [(*(left_out.get(title, "") for title in columns), count)]
    for row in rows:
        table.add_row(*row)
    return table


def quoted(text: object) -> Text:
    """Text from outside, shown as it is: no markup, no control characters."""
    return Text(printable(str(text)))


def print_json(value: object) -> None:
    """Print a JSON object, in ASCII where stdout has no more."""
    from ckavg.output.record import as_json

    text = as_json(value)
    try:
        text.encode(getattr(sys.stdout, "encoding", None) or "ascii")
    except UnicodeEncodeError:
        text = json.dumps(json.loads(text), indent=2)
    typer.echo(text)


def as_count(count: int) -> str:
    """A number of parameters, as models are named.

    >>> as_count(245366784), as_count(12)
    ('245.4M', '12')
    """
    return next((f"{count / size:.1f}{unit}" for size, unit in _COUNTS if count >= size), str(count))


def plural(count: int, noun: str) -> str:
    """A number of things.

    >>> plural(1, "problem"), plural(3, "warning")
    ('1 problem', '3 warnings')
    """
    return f"{count} {noun}{'' if count == 1 else 's'}"


def bar(value: float, largest: float) -> Bar:
    """A bar whose length is that of `value` on a scale up to `largest`, rounded to an eighth of a character."""
    half_an_eighth = largest / (2 * 8 * _BAR_WIDTH)  # rich cuts off what is less than an eighth
    return Bar(largest, 0, abs(value) + half_an_eighth, width=_BAR_WIDTH)


def sparkline(values: Sequence[float]) -> str:
    """A character for each value, its height on a scale up to the largest; a minus sign for what is negative.

    >>> sparkline([0.0, 0.5, 1.0, -0.25])
    '▁▅█-'
    """
    largest = max((abs(value) for value in values), default=0.0) or 1.0
    top = len(_HEIGHTS) - 1
    return "".join("-" if value < 0 else _HEIGHTS[math.ceil(value / largest * top)] for value in values)
