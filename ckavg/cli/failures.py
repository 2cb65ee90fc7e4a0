"""From an exception to one message on stderr and an exit status. The only place that knows both."""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, suppress

import typer

from ckavg.cli.terminal import Stdout, say, say_labelled, warn
from ckavg.engine.messages import ELSEWHERE
from ckavg.errors import CkavgError, SettingError, printable
from ckavg.report.text import told

FAILED, USAGE, INTERRUPTED = 1, 2, 130


@contextmanager
def failures(*, verbose: bool) -> Iterator[None]:
    """Turn errors that ckavg raises on purpose into a message and a status; a bug keeps its traceback.

    Args:
        verbose: show where the error came from, too.
    """
    try:
        yield
    except CkavgError as error:
        _trace(error, verbose=verbose)
        message, *rest = told(error)
        say_labelled("error", message)
        _say_all(*rest, *_notes(error))
        raise typer.Exit(USAGE if isinstance(error, SettingError) else FAILED) from error
    except OSError as error:  # of the environment rather than a bug: a path that is too long, a right that is missing
        _trace(error, verbose=verbose)
        if not isinstance(error, BrokenPipeError):  # nobody reads stdout any more, and so nobody misses it
            warn("error", of_system(error))
        raise typer.Exit(FAILED) from error
    except MemoryError as error:
        _trace(error, verbose=verbose)
        warn("error", "There is not enough memory. No result was left in part; the checkpoints are as they were.")
        raise typer.Exit(FAILED) from error
    except KeyboardInterrupt as error:
        warn("interrupted", "No result was left in part; the checkpoints are as they were.")
        _say_all(*_notes(error))
        raise typer.Exit(INTERRUPTED) from error


def _notes(error: BaseException) -> list[str]:
    """What was added to an exception on its way here: what is kept of the work it ended."""
    return [printable(note) for note in getattr(error, "__notes__", ()) if not note.startswith(ELSEWHERE)]


def _say_all(*lines: str) -> None:
    for line in lines:
        if line:
            say(line)


def of_system(error: OSError) -> str:
    """What the system would not do, and with which file or stream."""
    why = error.strerror or error
    if error.filename == Stdout.NAME:
        return f"stdout cannot be written: {why}. What was written elsewhere is complete."
    return f"{os.fsdecode(error.filename) if error.filename else 'The system'}: {why}."


def _trace(error: BaseException, *, verbose: bool) -> None:
    if verbose:
        with suppress(OSError, ValueError):
            traceback.print_exception(error, file=sys.stderr)
