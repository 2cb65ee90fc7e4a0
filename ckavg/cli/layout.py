"""Text laid out for a terminal: its width, paragraphs, columns. What somebody would copy is never broken."""

from __future__ import annotations

import os
import re
import shutil
import textwrap
from collections.abc import Iterable, Iterator

import typer

_WIDEST = 100
"""Columns of a help screen: longer lines are hard to read."""

COLUMN = 26
"""Where the second column of a help screen begins."""

_UNBROKEN = re.compile(r"(?<=: )(?:ckavg|env|hf|pip|python3?|unset) .*|(?<!\S)--[a-z][\w-]* \S+|`[^`]*`")
"""A command, which a message has at its end, an option with its value, and what is quoted as it is typed."""


def help_width() -> int:
    """Columns that a help screen takes."""
    return max(40, min(shutil.get_terminal_size().columns, _WIDEST))


def wrapped(text: str, columns: int, *, indent: str = "", hanging: str | None = None, kept: Iterable[str] = ()) -> str:
    """A paragraph in lines of at most so many columns, broken at spaces alone.

    Commands, options with their values and words that are longer than a line stay whole.

    Args:
        text: a paragraph.
        columns: of the terminal.
        indent: what the first line begins with.
        hanging: what the others begin with, if it is something else.
        kept: further texts that stay whole, such as paths with spaces.

    >>> print(wrapped("Choose one by yourself, with: ckavg push DIR REPO", 30))
    Choose one by yourself, with:
    ckavg push DIR REPO
    """
    glued = _UNBROKEN.sub(lambda found: found[0].replace(" ", "\0"), text)
    for each in kept:
        glued = glued.replace(each, each.replace(" ", "\0"))
    lines = textwrap.wrap(
        glued,
        columns,
        initial_indent=indent,
        subsequent_indent=indent if hanging is None else hanging,
        break_long_words=False,
        break_on_hyphens=False,
    )
    return "\n".join(lines).replace("\0", " ")


def in_columns(rows: Iterable[tuple[str, str]], columns: int, *, first: int = COLUMN) -> Iterator[str]:
    r"""Rows of a name and what it means, the meanings one below the other.

    Args:
        rows: names and meanings.
        columns: of the terminal.
        first: where the meanings begin; a longer name has a line of its own.

    >>> print(*in_columns([("--every F", "Take a checkpoint every F steps.")], 30, first=14), sep="\n")
      --every F   Take a
                  checkpoint every
                  F steps.
    """
    for name, meaning in rows:
        left = f"  {name}"
        lines = wrapped(meaning, columns, indent=" " * first).split("\n")
        if len(left) + 1 < first:
            lines[0] = left.ljust(first) + lines[0][first:]
        else:
            yield left
        yield from lines


def clause(text: str, room: int) -> str:
    """As much of a first sentence as there is room for, up to a colon, semicolon or comma; at least up to the first.

    >>> clause("Mean of the checkpoints: SWA; LAWA of the newest few. As is.", 35)
    'Mean of the checkpoints: SWA'
    """
    whole = re.split(r"\.(?:\s|$)", text)[0].replace("\n", " ")
    ends = [*(found.start() for found in re.finditer(r"[:;,] ", whole)), len(whole)]
    return whole[: max((end for end in ends if end <= room), default=ends[0])]


def emphasized(text: str) -> str:
    """A heading, bold in a terminal that can show it."""
    plain = os.environ.get("NO_COLOR") or os.environ.get("TERM") in ("dumb", "unknown")
    return text if plain else typer.style(text, bold=True)
