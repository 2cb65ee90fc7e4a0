"""What goes to stderr: messages, and text from outside made safe to show."""

from __future__ import annotations

import os
import sys

import typer

_COLOURS = {"error": typer.colors.RED, "warning": typer.colors.YELLOW, "interrupted": typer.colors.YELLOW}


def warn(kind: str, message: str, hint: str = "") -> None:
    """Print `kind: message` and the hint below it to stderr."""
    label = f"{kind}:"
    if not os.environ.get("NO_COLOR"):
        label = typer.style(label, fg=_COLOURS[kind], bold=True)
    typer.echo(f"{label} {printable(message)}", err=True)
    if hint:
        typer.echo(printable(hint), err=True)


def printable(text: str) -> str:
    r"""The text without control characters, which names of files and tensors may hold; newlines stay.

    >>> printable("a\x1b[31mb\nc")
    'a\\x1b[31mb\nc'
    """
    return "".join(char if char.isprintable() or char == "\n" else repr(char)[1:-1] for char in text)


def stderr_is_terminal() -> bool:
    """Whether a person is likely to watch stderr."""
    return sys.stderr.isatty()
