"""Progress on stderr: bars in a terminal, plain lines elsewhere."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from ckavg.cli.text import say, stderr_is_terminal
from ckavg.engine.context import OnProgress, Progress

if TYPE_CHECKING:
    from rich.progress import Progress as Bars
    from rich.progress import ProgressColumn, TaskID

OnStep = Callable[[int, int, float], None]
"""Called with steps done, steps to do, and the training loss."""

_TITLES = {
    "path": "measuring the path",
    "replay": "averaging",
    "health": "examining",
    "files": "hashing the files",
    "weights": "looking for NaN",
    "elements": "computing elements again",
    "sources": "reading the sources",
    "fetch": "fetching",
    "upload": "uploading",
}
_TO_DO = {"upload": "to send", "fetch": "to fetch"}
_SECONDS_BETWEEN_LINES = 5.0


@contextmanager
def show_progress(passes: int, *, quiet: bool) -> Iterator[OnProgress | None]:
    """Yield a listener that shows how far each of so many passes has come: bytes, GB/s, time left."""
    if quiet:
        yield None
    elif not stderr_is_terminal():
        yield _Lines(passes)
    else:
        from rich.progress import DownloadColumn, TransferSpeedColumn

        with _bars(DownloadColumn(), TransferSpeedColumn()) as bars:
            yield _listener(bars, passes)


def _listener(bars: Bars, passes: int) -> OnProgress:
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


@contextmanager
def show_steps(title: str) -> Iterator[OnStep]:
    """Yield a listener for a training run."""
    if stderr_is_terminal():
        from rich.progress import MofNCompleteColumn, TextColumn

        with _bars(MofNCompleteColumn(), TextColumn("loss {task.fields[loss]}")) as bars:
            task = bars.add_task(title, total=None, loss="")
            yield lambda done, total, loss: bars.update(task, completed=done, total=total, loss=f"{loss:.3f}")
        return
    shown = 0

    def listen(done: int, total: int, loss: float) -> None:
        nonlocal shown
        if done * 10 // total > shown or done == total:
            shown = done * 10 // total
            say(f"{title}: step {done} of {total}, loss {loss:.3f}")

    yield listen


def _bars(*columns: ProgressColumn) -> Bars:
    from rich.console import Console
    from rich.progress import BarColumn, TextColumn, TimeRemainingColumn
    from rich.progress import Progress as Bars

    return Bars(
        TextColumn("{task.description}"),
        BarColumn(bar_width=None),
        *columns,
        TimeRemainingColumn(),
        console=Console(stderr=True),
        transient=True,
    )
