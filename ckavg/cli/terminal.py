"""What goes to stderr: messages."""

from __future__ import annotations

import os
import sys
from contextlib import suppress

import typer

from ckavg.report.text import printable

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
