"""What goes to stderr: messages."""

from __future__ import annotations

import os
import sys

import typer

from ckavg.report.text import printable

_COLOURS = {"error": typer.colors.RED, "warning": typer.colors.YELLOW, "interrupted": typer.colors.YELLOW}


def warn(kind: str, message: str, hint: str = "") -> None:
    """Print `kind: message` and the hint below it to stderr."""
    label = f"{kind}:"
    if not os.environ.get("NO_COLOR"):
        label = typer.style(label, fg=_COLOURS[kind], bold=True)
    typer.echo(f"{label} {printable(message)}", err=True)
    if hint:
        typer.echo(printable(hint), err=True)


def stderr_is_terminal() -> bool:
    """Whether a person is likely to watch stderr."""
    return sys.stderr.isatty()
