"""Several processes of one job at the command line: one of them speaks, and what interrupts one interrupts it once."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import FrameType

import typer

from ckavg.cli.failures import failures
from ckavg.cli.terminal import say
from ckavg.engine.distributed import Ranks, all_ranks
from ckavg.errors import RanksError, printable

_STDOUT, _STDERR = 1, 2

_voice: list[int] = []
"""Where stderr led before this process was muted."""


def mute_others() -> None:
    """Take stdout and stderr from this process, whatever writes to them, if another one speaks for the job."""
    try:
        if Ranks.of_environment().is_first:
            return
    except RanksError:  # met again, and shown then
        return
    _voice.append(os.dup(_STDERR))
    nowhere = os.open(os.devnull, os.O_WRONLY)
    for stream in (_STDOUT, _STDERR):
        os.dup2(nowhere, stream)
    os.close(nowhere)


@contextmanager
def together(*, verbose: bool) -> Iterator[Ranks]:
    """Join the other processes, if there are any. An error in one ends all of them, and is shown once; see `failures`.

    Args:
        verbose: show where an error came from, too.
    """
    with failures(verbose=verbose):
        ranks = None
        try:
            with all_ranks(_say_aloud) as ranks:
                if ranks.world > 1:
                    _interrupt_once(ranks)
                try:
                    yield ranks
                except typer.Exit as done:  # nothing that engine/messages.py knows
                    raise SystemExit(done.exit_code) from done
        except BaseException:
            if _voice and (ranks is None or ranks.speaks):
                os.dup2(_voice.pop(), _STDERR)
            raise


def _say_aloud(line: str) -> None:
    """Print a line to stderr, of a process that is muted, too."""
    if not _voice:
        say(printable(line))
        return
    with suppress(OSError):
        os.write(_voice[0], f"{printable(line)}\n".encode(errors="replace"))


def _interrupt_once(ranks: Ranks) -> None:
    """Raise `KeyboardInterrupt` at the first SIGINT or SIGTERM alone, and not while this process gives up already.

    torchrun sends SIGTERM to all as soon as one has ended, when they may be removing what they have written.
    """
    came = False

    def interrupt(_number: int, _frame: FrameType | None) -> None:
        nonlocal came
        if not (came or ranks.is_ending):
            came = True
            raise KeyboardInterrupt

    for each in (signal.SIGINT, signal.SIGTERM):
        signal.signal(each, interrupt)
