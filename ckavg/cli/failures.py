"""From an exception to one message on stderr and an exit status. The only place that knows both."""

from __future__ import annotations

import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager

import typer

from ckavg.cli.terminal import warn
from ckavg.errors import CkavgError, SettingError

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
        if verbose:
            traceback.print_exception(error, file=sys.stderr)
        warn("error", error.message, "\n".join(part for part in (error.hint, *_notes(error)) if part))
        raise typer.Exit(USAGE if isinstance(error, SettingError) else FAILED) from error
    except OSError as error:  # of the environment rather than a bug: a path that is too long, a right that is missing
        if verbose:
            traceback.print_exception(error, file=sys.stderr)
        warn("error", f"{error.filename or 'The system'}: {error.strerror or error}.")
        raise typer.Exit(FAILED) from error
    except KeyboardInterrupt as error:
        warn(
            "interrupted",
            "Nothing was left under the final name; the checkpoints are as they were.",
            "\n".join(_notes(error)),
        )
        raise typer.Exit(INTERRUPTED) from error


def _notes(error: BaseException) -> list[str]:
    """What was added to an exception on its way here: what is kept of the work it ended."""
    return list(getattr(error, "__notes__", ()))
