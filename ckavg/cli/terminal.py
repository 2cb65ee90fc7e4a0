"""What goes to stderr: messages. And what becomes of a stdout that takes nothing."""

from __future__ import annotations

import io
import os
import sys
from contextlib import suppress

import typer

from ckavg.errors import printable

_COLOURS = {"error": typer.colors.RED, "warning": typer.colors.YELLOW, "interrupted": typer.colors.YELLOW}


def say(line: str) -> None:
    """Print a line to stderr. Where nobody reads that any more, or its disk is full, the work goes on without."""
    with suppress(OSError, ValueError):
        typer.echo(line, err=True)


def warn(kind: str, message: str) -> None:
    """Print `kind: message` to stderr, in one line."""
    say_labelled(kind, printable(message))


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
    """Stdout, whose errors bear its name, so that a message can say what it is that cannot be written."""

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
