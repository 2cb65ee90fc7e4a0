"""What goes to stdout and stderr: messages, tables, numbers as text, progress."""

from __future__ import annotations

import io
import json
import math
import os
import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING

import typer
from rich.bar import Bar
from rich.console import Console
from rich.table import Table
from rich.text import Text

from ckavg.engine.context import OnProgress, Progress
from ckavg.errors import printable

if TYPE_CHECKING:
    from rich.progress import Progress as Bars
    from rich.progress import TaskID

_MOST_ROWS = 40
"""Rows of a table by checkpoint; of a longer one, those in the middle are left out."""

_BAR_WIDTH = 32
_WIDTH = 120
"""Columns where stdout is no terminal."""

_COLOURS = {
    "unfinished": typer.colors.YELLOW,
    "error": typer.colors.RED,
    "warning": typer.colors.YELLOW,
    "interrupted": typer.colors.YELLOW,
    "hint": typer.colors.CYAN,
}
_HEIGHTS = "▁▂▃▄▅▆▇█"
_COUNTS = ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k"))

_TITLES = {
    "path": "measuring the path",
    "replay": "averaging",
    "health": "examining",
    "files": "hashing the files",
    "weights": "looking for NaN",
    "elements": "computing elements again",
    "sources": "reading the sources",
    "difference": "comparing",
    "fetch": "fetching",
    "upload": "uploading",
}
_TO_DO = {"upload": "to send", "fetch": "to fetch"}
_SECONDS_BETWEEN_LINES = 5.0


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
        with self._naming():
            return super().write(text)

    def flush(self) -> None:
        """As of any text stream."""
        with self._naming():
            super().flush()

    @contextmanager
    def _naming(self) -> Iterator[None]:
        try:
            yield
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


@contextmanager
def show_progress(passes: int, *, quiet: bool) -> Iterator[OnProgress | None]:
    """Yield a listener that shows how far each of so many passes has come: bytes, GB/s, time left.

    A bar for each in a terminal, plain lines elsewhere.
    """
    if quiet:
        yield None
    elif not stderr_is_terminal():
        yield _Lines(passes)
    else:
        from rich.progress import BarColumn, DownloadColumn, TextColumn, TimeRemainingColumn, TransferSpeedColumn
        from rich.progress import Progress as Bars

        columns = (BarColumn(bar_width=None), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
        with Bars(TextColumn("{task.description}"), *columns, console=Console(stderr=True), transient=True) as bars:
            yield _bar_listener(bars, passes)


def _bar_listener(bars: Bars, passes: int) -> OnProgress:
    starting = bars.add_task("starting", total=None)
    tasks: dict[str, TaskID] = {}

    def listen(news: Progress) -> None:
        if news.stage not in tasks:
            bars.update(starting, visible=False)
            tasks[news.stage] = bars.add_task(_title(news, len(tasks) + 1, passes), total=news.total)
        bars.update(tasks[news.stage], completed=news.done)

    return listen


class _Lines:
    """A line at the beginning and the end of each pass, and every few seconds between."""

    def __init__(self, passes: int) -> None:
        self._passes = passes
        self._begun: dict[str, float] = {}
        self._shown = 0.0

    def __call__(self, news: Progress) -> None:
        now = time.monotonic()
        is_new = news.stage not in self._begun
        begun = self._begun.setdefault(news.stage, now)
        if not is_new and news.done != news.total and now - self._shown < _SECONDS_BETWEEN_LINES:
            return
        self._shown = now
        title = _title(news, len(self._begun), self._passes)
        if is_new:
            kept = f"; {news.kept / 1e9:.2f} GB more were done before it was interrupted" if news.kept else ""
            say(f"{title}: {news.total / 1e9:.2f} GB {_TO_DO.get(news.stage, 'to read')}{kept}")
            return
        rate = news.done / max(now - begun, 1e-9)
        left = "done" if news.done == news.total else f"{(news.total - news.done) / rate:.0f} s left"
        say(f"{title}: {news.done / 1e9:.2f} of {news.total / 1e9:.2f} GB, {rate / 1e9:.2f} GB/s, {left}")


def _title(news: Progress, number: int, passes: int) -> str:
    title = f"continuing {_TITLES[news.stage]}" if news.kept else _TITLES[news.stage]
    return f"pass {number} of {passes}, {title}" if passes > 1 else title
