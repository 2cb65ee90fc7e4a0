"""How a command ends: one message on stderr and an exit status, in a job of several processes by one of them alone."""

from __future__ import annotations

import json
import os
import signal
import sys
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING

import typer

from ckavg.cli.text import Stdout, say, say_labelled, warn
from ckavg.engine.distributed import SECONDS_WITHOUT_PROGRESS
from ckavg.engine.failures import OTHER_PROCESS, is_from_another
from ckavg.errors import (
    CkavgError,
    CombinedError,
    MissingPartsError,
    OutputExistsError,
    RanksError,
    SettingError,
    printable,
)

if TYPE_CHECKING:
    from ckavg.engine.distributed import Ranks

FAILED, USAGE, UNFINISHED, INTERRUPTED = 1, 2, 3, 130
_AS_IT_WAS = "No result was left in part; the checkpoints are as they were."
_STDOUT, _STDERR = 1, 2
_LONGEST_LINE = 10_000
"""Characters; twice the longest path."""

_SECONDS_FOR_THE_FIRST = 2.0

_voice: list[int] = []
"""Where stderr led before this process was muted."""


@contextmanager
def failures(*, verbose: bool) -> Iterator[None]:
    """Turn errors that ckavg raises on purpose into a message and a status; a bug keeps its traceback."""
    try:
        yield
    except (CkavgError, OSError, MemoryError) as error:
        if verbose:
            with suppress(OSError, ValueError):
                traceback.print_exception(error, file=sys.stderr)
        if isinstance(error, CkavgError):
            message, *rest = message_of(error)
            say_labelled("unfinished" if isinstance(error, MissingPartsError) else "error", message)
            _say_all(*rest, *_notes(error))
        elif isinstance(error, MemoryError):
            warn("error", f"There is not enough memory. {_AS_IT_WAS}")
        elif not isinstance(error, BrokenPipeError):  # nobody reads stdout any more, and so nobody misses it
            warn("error", system_error(error))
        statuses = {SettingError: USAGE, MissingPartsError: UNFINISHED}
        raise typer.Exit(next((each for kind, each in statuses.items() if isinstance(error, kind)), FAILED)) from error
    except KeyboardInterrupt as error:
        warn("interrupted", _AS_IT_WAS)
        _say_all(*_notes(error))
        raise typer.Exit(INTERRUPTED) from error


@contextmanager
def interrupted_with(message: str) -> Iterator[None]:
    """Have an interrupt end the command with this message, for work that was complete before it."""
    try:
        yield
    except KeyboardInterrupt as error:
        warn("interrupted", message)
        raise typer.Exit(INTERRUPTED) from error


def message_of(error: CkavgError) -> tuple[str, str, str]:
    r"""The message, the hint and the command of an error, fit for a terminal; several problems have some lines each.

    >>> message_of(CkavgError("a\nb is no file.", hint="Name another."))
    ('a\\nb is no file.', 'Name another.', '')
    """
    own = printable(error.hint), printable(error.command)
    if not isinstance(error, CombinedError):
        return _shortened(printable(error.message)), *own
    lines = [f"{len(error.errors)} problems:"]
    for each in error.errors:
        message, *rest = message_of(each)
        lines += [f"- {message}", *(f"  {line}" for line in rest if line)]
    return "\n".join(lines), *own


def system_error(error: OSError) -> str:
    """What the system refused, and with which file or stream."""
    why = error.strerror or error
    if error.filename == Stdout.NAME:
        return f"stdout cannot be written: {why}. What was written elsewhere is complete."
    return f"{os.fsdecode(error.filename) if error.filename else 'The system'}: {why}."


def mute_others() -> None:
    """Take stdout and stderr from this process, whatever writes to them, if another one speaks for the job."""
    if "RANK" not in os.environ:
        return
    from ckavg.engine.distributed import Ranks

    try:
        if Ranks.from_environment().is_first:
            return
    except RanksError:  # raised again by the verb, and shown then
        return
    _voice.append(os.dup(_STDERR))
    nowhere = os.open(os.devnull, os.O_WRONLY)
    for stream in (_STDOUT, _STDERR):
        os.dup2(nowhere, stream)
    os.close(nowhere)


@contextmanager
def distributed(*, verbose: bool, timeout: float = SECONDS_WITHOUT_PROGRESS) -> Iterator[Ranks]:
    """The processes of this job, if there are any others. An error in one ends all of them, and is shown once."""
    from ckavg.engine.distributed import all_ranks

    with failures(verbose=verbose):
        ranks = None
        try:
            with all_ranks(_say_aloud, timeout=timeout) as ranks:
                if ranks.world > 1:
                    _interrupt_once(ranks)
                yield ranks
        except BaseException as error:
            _tell_torchrun(error)
            if _voice and (ranks is None or ranks.speaks or _speaks_for_itself(error, ranks)):
                os.dup2(_voice.pop(), _STDERR)
            raise


def _speaks_for_itself(error: BaseException, ranks: Ranks) -> bool:
    """Whether a process is to show an error that it had before it came to the others, who do not know of it.

    Most often, the first process has the same error at the same time, and what has started them ends this one.
    """
    same_for_all = isinstance(error, SettingError | OutputExistsError)
    if ranks.has_met or same_for_all or not isinstance(error, CkavgError | OSError):
        return False
    try:
        time.sleep(_SECONDS_FOR_THE_FIRST)
    except KeyboardInterrupt:
        return False
    return True


def _tell_torchrun(error: BaseException) -> None:
    """Leave what ended this process where torchrun looks for it, so that its summary tells; not what others told."""
    file = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if file and isinstance(error, Exception) and not (isinstance(error, typer.Exit) or is_from_another(error)):
        shown = error.as_typed if isinstance(error, CkavgError) else f"{type(error).__name__}: {error}"
        more = {"py_callstack": "".join(traceback.format_exception(error)), "timestamp": str(int(time.time()))}
        with suppress(OSError):
            Path(file).write_text(json.dumps({"message": {"message": shown, "extraInfo": more}}), encoding="utf-8")


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


def _shortened(line: str) -> str:
    """A line without its middle, where a name in it is longer than any name should be."""
    hidden, end = len(line) - _LONGEST_LINE, _LONGEST_LINE // 2
    return line if hidden <= 0 else f"{line[:end]} … ({hidden:,} more characters) … {line[-end:]}"


def _notes(error: BaseException) -> list[str]:
    """What was added to an exception on its way here: what is kept of the work it ended."""
    return [printable(note) for note in getattr(error, "__notes__", ()) if not note.startswith(OTHER_PROCESS)]


def _say_all(*lines: str) -> None:
    for line in filter(None, lines):
        say(line)
