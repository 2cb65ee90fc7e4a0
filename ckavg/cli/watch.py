"""`ckavg watch`."""

from __future__ import annotations

import dataclasses
import gc
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

from ckavg.averaging.sources import inspect_source
from ckavg.checkpoints.run import Checkpoint
from ckavg.cli.completion import scheme_words
from ckavg.cli.errors import distributed, interrupted_with
from ckavg.cli.evaluation import criterion_from
from ckavg.cli.options import with_options
from ckavg.cli.sweep import Sweeping, average_words
from ckavg.cli.text import say, warn
from ckavg.engine.distributed import Ranks
from ckavg.errors import CkavgError, NoCheckpointsError, SettingError, TooFewCheckpointsError, is_passing
from ckavg.schemes.parse import Word, parse_words
from ckavg.storage.address import address_of

_NOT_HERE = (
    *("source", "dry_run", "part", "wait", "skip_incomplete", "max_disk", "revisions", "force"),
    *("push_to_hub", "private", "revision", "commit_message", "create_pr"),
)

State = tuple[tuple[str, int, int], ...]
"""Every file of some checkpoints: its path, size and time of modification."""


@dataclass(frozen=True, slots=True)
class Watching(Sweeping):
    """The options of `watch`."""

    words: Annotated[
        list[str],
        typer.Argument(
            metavar="RUN SCHEME...",
            help="Directory of the run, and schemes such as pema:gamma=0.1,0.15 mean:last=10.",
            autocompletion=scheme_words,
        ),
    ] = dataclasses.field(kw_only=True)
    until: Annotated[int | None, typer.Option(help="End when the average has reached step N.", metavar="N")] = None
    poll: Annotated[float, typer.Option(help="Look for checkpoints so often.", metavar="SECONDS", min=0.01)] = 10.0


@with_options(Watching, without=_NOT_HERE)
def watch(options: Watching) -> None:
    """Average a run anew whenever a checkpoint of it is complete, while training goes on.

    The results are those of `ckavg sweep` with the same words, and are replaced each time. Ctrl-C ends it.
    """
    with distributed(verbose=options.verbose, timeout=options.rank_timeout) as ranks:
        source, *words = options.words
        if ranks.world > 1 or address_of(source) is not None:
            raise SettingError("watch: it runs in one process, and on a directory.", hint="Use ckavg sweep.")
        if not words or not Path(source).is_dir():
            raise SettingError(
                f"watch: expected a directory and a scheme, got {' '.join(options.words)}.",
                hint="For example: ckavg watch ./checkpoints pema mean:last=5",
            )
        criterion_from(options)  # what is wrong with it is told at once
        options = dataclasses.replace(options, source=Path(source), skip_incomplete=True, force=True)
        _watch(options, parse_words(words), ranks)


def _watch(options: Watching, words: Sequence[Word], ranks: Ranks) -> None:
    reached, told = -1, ""
    before: State | None = None
    done: State | None = None
    while options.until is None or reached < options.until:
        with interrupted_with(_ended(reached)):
            found = _complete(options)
            state, news = _state(found), _news(reached, found)
            if not options.quiet and news != told:
                say(news)
                told = news
            if not found or state == done or state != before:  # what still changes is still being written
                before = state
                time.sleep(options.poll)
                continue
        try:
            average_words(words, options, ranks)
            reached = found[-1].step
        except CkavgError as error:
            is_last = options.until is not None and found[-1].step >= options.until
            if is_last and not is_passing(error):
                raise
            warn("warning", f"step {found[-1].step}: {error}")
            done = None if is_passing(error) else state
        else:
            done = state
        before = None
        gc.collect()  # the program has switched it off, for commands that end sooner


def _ended(reached: int) -> str:
    return "There are no results yet." if reached < 0 else f"The results are those of step {reached}."


def _news(reached: int, found: Sequence[Checkpoint]) -> str:
    if not found:
        return "waiting for two complete checkpoints"
    newest = found[-1].step
    return f"waiting for a checkpoint after step {newest}" if newest == reached else f"found step {newest}"


def _complete(options: Watching) -> tuple[Checkpoint, ...]:
    """The checkpoints that are chosen and complete; none as long as they are too few to be averaged."""
    try:
        found = inspect_source(options.source, options.selection())
    except NoCheckpointsError:
        return ()
    if any(isinstance(problem, TooFewCheckpointsError | NoCheckpointsError) for problem in found.problems):
        return ()
    return found.checkpoints


def _state(checkpoints: tuple[Checkpoint, ...]) -> State:
    """The files of checkpoints, those beside the weights included: a result has a copy of them."""
    files = []
    for each in checkpoints:
        place = Path(str(each.path))
        for path in sorted(place.rglob("*")) if place.is_dir() else [place]:
            try:
                status = path.stat()
            except OSError:  # it is being renamed or removed
                continue
            files.append((str(path), status.st_size, status.st_mtime_ns))
    return tuple(files)
