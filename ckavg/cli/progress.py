"""The progress of a command: bars in a terminal that can draw them, a few plain lines otherwise."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from rich.filesize import decimal

from ckavg.cli.text import Output, is_plain, say, stderr_is_terminal
from ckavg.engine.context import OnProgress, Progress
from ckavg.errors import printable

if TYPE_CHECKING:
    from rich.progress import Progress as Bars
    from rich.progress import TaskID

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
_COUNTED = ("fetch", "path", "replay")
"""Stages that are passes over the checkpoints."""

_TITLE_OF_OWN_FILES, _AFTER_OWN_FILES = "syncing and hashing", "writing card and record"
"""The stage of a new result's own files, and what follows it."""

_TENTHS, _SECONDS_BETWEEN_LINES = 10, 10.0
_NARROW = 80


@dataclass(slots=True)
class _Stage:
    """The current stage: its title, when it began, and the latest news."""

    title: str
    begun: float
    news: Progress

    @property
    def is_done(self) -> bool:
        return self.news.done >= self.news.total

    def numbers(self, *, brief: bool = False) -> str:
        """Bytes, rate and time left."""
        done, total = self.news.done, self.news.total
        rate = done / max(time.monotonic() - self.begun, 1e-9)
        speed = [f"{decimal(int(rate))}/s"] if done and not brief else []
        left = "done" if self.is_done else f"{_as_time((total - done) / rate)} left" if done else ""
        whole, part = decimal(total), decimal(done)
        part = part.split()[0] if part.split()[1] == whole.split()[1] else part
        return ", ".join([f"{part} of {whole}", *speed, *filter(None, [left])])


def _as_time(seconds: float) -> str:
    """A time to wait.

    >>> _as_time(7.4), _as_time(100), _as_time(7300)
    ('7 s', '1 min 40 s', '2 h 1 min')
    """
    minutes, rest = divmod(round(seconds), 60)
    if minutes >= 60:
        return f"{minutes // 60} h {minutes % 60} min"
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"


class _Listener:
    """Receives progress and divides it into stages."""

    def __init__(self, passes: int) -> None:
        self._passes = passes
        self._counted = 0
        self._has_averaged = False
        self._stage: _Stage | None = None

    def __call__(self, news: Progress) -> None:
        stage = self._stage
        if stage is None or news.stage != stage.news.stage or news.done < stage.news.done:
            self._has_averaged = self._has_averaged or news.stage == "replay"
            self._stage = stage = _Stage(self._title(news), time.monotonic(), news)
            self.begin(stage)
        elif stage.is_done:
            return
        stage.news = news
        self.go_on(stage)
        if stage.is_done and stage.title == _TITLE_OF_OWN_FILES:
            self.end(_AFTER_OWN_FILES)

    def begin(self, stage: _Stage) -> None:
        """Show a new stage."""

    def go_on(self, stage: _Stage) -> None:
        """Show the progress of the stage."""

    def end(self, what: str) -> None:
        """Show what follows the last byte."""

    def _title(self, news: Progress) -> str:
        title = _TITLES[news.stage]
        if news.stage == "files" and self._has_averaged:
            return _TITLE_OF_OWN_FILES
        if news.stage not in _COUNTED:
            return title
        self._counted += 1
        return f"pass {self._counted} of {self._passes}, {title}" if self._passes > 1 else title


class _Lines(_Listener):
    """A line at the beginning and the end of each stage, and at every tenth or every ten seconds between."""

    def __init__(self, passes: int) -> None:
        super().__init__(passes)
        self._tenth, self._said = 0, 0.0

    def begin(self, stage: _Stage) -> None:
        self._tenth, self._said = 0, time.monotonic()
        say(f"{stage.title}: {decimal(stage.news.total)}{_kept(stage.news)}")

    def go_on(self, stage: _Stage) -> None:
        news, now = stage.news, time.monotonic()
        tenth = _TENTHS * news.done // max(news.total, 1)
        is_next = tenth > self._tenth and now - self._said >= 1
        if stage.is_done and stage.title == _TITLE_OF_OWN_FILES:  # what follows is said at once
            return
        if stage.is_done or is_next or now - self._said >= _SECONDS_BETWEEN_LINES:
            self._tenth, self._said = tenth, now
            say(f"{stage.title}: {100 * news.done // max(news.total, 1)} %, {stage.numbers()}")

    def end(self, what: str) -> None:
        say(what)


class _BarListener(_Listener):
    """A bar for each stage, and below them work that is not counted in bytes."""

    def __init__(self, passes: int, bars: Bars, first: str) -> None:
        super().__init__(passes)
        self._bars = bars
        self._is_narrow = bars.console.width < _NARROW
        self._task: TaskID | None = None
        self._status = bars.add_task(first, total=None, numbers="")

    def begin(self, stage: _Stage) -> None:
        if kept := _kept(stage.news):
            say(f"{stage.title}{kept}")
        self._bars.remove_task(self._status)
        title = stage.title.partition(",")[0] if self._is_narrow else stage.title
        self._task = self._bars.add_task(title, total=stage.news.total, numbers="")
        self._status = self._bars.add_task("", total=None, numbers="", visible=False)

    def go_on(self, stage: _Stage) -> None:
        if self._task is not None:
            self._bars.update(self._task, completed=stage.news.done, numbers=stage.numbers(brief=self._is_narrow))

    def end(self, what: str) -> None:
        self._bars.update(self._status, description=what, visible=True)


def _kept(news: Progress) -> str:
    return f"; {decimal(news.kept)} more were done before it was interrupted" if news.kept else ""


@contextmanager
def show_progress(passes: int, *, quiet: bool, first: str = "") -> Iterator[OnProgress | None]:
    """Yield a listener that shows the progress of passes: bytes, rate, time left.

    A bar for each in a terminal, plain lines elsewhere.

    Args:
        passes: over the checkpoints; they are numbered.
        quiet: show nothing.
        first: shown at once, before the first progress.
    """
    first = printable(first)
    if quiet:
        yield None
    elif not stderr_is_terminal() or is_plain():
        if first:
            say(first)
        yield _Lines(passes)
    else:
        with _bars() as bars:
            yield _BarListener(passes, bars, first or "starting")


@contextmanager
def show_status(what: str, *, quiet: bool) -> Iterator[None]:
    """Show in a terminal what is being done while it lasts."""
    if quiet or not stderr_is_terminal() or is_plain():
        yield
        return
    with _bars() as bars:
        bars.add_task(printable(what), total=None, numbers="")
        yield


def _bars() -> Bars:
    from rich.progress import BarColumn, SpinnerColumn, Task, TextColumn
    from rich.progress import Progress as Bars

    class BytesColumn(BarColumn):
        """A bar for tasks with a total, otherwise nothing."""

        def render(self, task: Task) -> Any:
            return "" if task.total is None else super().render(task)

    console = Output(stderr=True)
    spinner = "dots" if console.encoding.startswith("utf") else "line"
    title, numbers = (TextColumn(text, markup=False) for text in ("{task.description}", "{task.fields[numbers]}"))
    columns = title, BytesColumn(bar_width=None), numbers
    return Bars(SpinnerColumn(spinner), *columns, console=console, transient=True)
