"""What goes to stdout and stderr: messages, paragraphs, numbers as text; plain where a terminal shows no more."""

from __future__ import annotations

import codecs
import io
import json
import os
import re
import sys
import textwrap
import unicodedata
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, TextIO

import typer
from rich.console import Console
from rich.text import Text
from rich.theme import Theme

from ckavg.errors import printable

if TYPE_CHECKING:
    from ckavg.cli.tables import Table

_WIDTH = 120
"""Columns where stdout is no terminal."""

MOST_ROWS, _FEWEST_ROWS = 40, 8
"""Rows of a table by checkpoint; of a longer one, those in the middle are left out."""

_BESIDE = 12
"""Lines of a screen beside such a table."""

_LABEL = 9
"""Columns of the word before a fact, such as `result`."""

_THEME = Theme(
    {
        **{"good": "green", "bad": "bold red", "warning": "yellow", "path": "cyan", "command": "", "number": "bold"},
        **{"bar": "cyan", "bar.negative": "yellow"},
        **{"bar.complete": "cyan", "bar.finished": "green", "bar.pulse": "cyan", "progress.spinner": "cyan"},
    }
)
"""All colours there are."""

_COLOURS = {"unfinished": typer.colors.YELLOW, "error": typer.colors.RED, "warning": typer.colors.YELLOW}
_COLOURS |= {"interrupted": typer.colors.YELLOW, "hint": typer.colors.CYAN}

_COUNTS = ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k"))
_NUMBER = r"(?<![\w./-])\d[\d,]*(?:\.\d+)?(?: (?:%|[kMGT]?B(?:/s)?))?(?![\w/-])"
_UNIT = re.compile(r"(?<=\d) (?=(?:%|[kMGT]?B(?:/s)?|s|±)\b|%)|(?<=±) (?=\d)")
_TYPED = re.compile(r"(?<=: )(?:ckavg|env|hf|pip|python3?|unset) .*|(?<!\S)--[a-z][\w-]* [^\s-]\S*|`[^`]*`")
"""What is typed: a command, with which a sentence ends after a colon, an option with its value, a quotation."""

ASCII = "ckavg.ascii"
"""How a stream encodes what its encoding does not have: the name of a handler of errors, for `open` and the like."""

_SPELLED = {
    **dict(zip("▏▎▍▌▋▊▉█▐│─·•", "   ######|-.*", strict=True)),
    **dict(zip("▁▂▃▄▅▆▇", "_,:=+*%", strict=True)),
    **dict.fromkeys("├└┌┐┘┤┬┴┼╭╮╰╯", "+"),
    **dict(zip("−–—×‖‘’“”⁄", ("-", "-", "--", "x", "||", "'", "'", '"', '"', "/"), strict=True)),
    **{"→": "->", "←": "<-", "↑": "^", "±": "+/-", "≤": "<=", "≥": ">=", "≈": "~", "√": "sqrt ", "✓": "ok"},
}
"""What stands for a character in ASCII; those of drawings are as wide."""


def _spell(error: UnicodeError) -> tuple[str, int]:
    if not isinstance(error, UnicodeEncodeError):
        raise error
    return "".join(map(_in_ascii, error.object[error.start : error.end])), error.end


def _in_ascii(char: str) -> str:
    r"""A character as one would type it; as its number where nobody could.

    >>> "".join(map(_in_ascii, "ℓ β² … ± 模"))
    'l beta2 ... +/- \\u6a21'
    """
    name = unicodedata.name(char, "")
    plain = name.rsplit(" ", 1)[-1].lower() if name.startswith("GREEK") else unicodedata.normalize("NFKC", char)
    plain = "".join(_SPELLED.get(each, each) for each in (char if char in _SPELLED else plain))
    return plain if plain.isascii() else char.encode("ascii", "backslashreplace").decode()


codecs.register_error(ASCII, _spell)


def as_encoded(text: str, stream: TextIO | None = None) -> str:
    """The text as a stream shows it, or stdout, so that what is laid out has the width that it will have."""
    encoding = getattr(stream or sys.stdout, "encoding", None) or "utf-8"
    return text.encode(encoding, ASCII).decode(encoding, "replace")


def is_plain() -> bool:
    """Whether the terminal, if there is one, shows no more than text, or its user wants no more."""
    return os.environ.get("TERM", "").lower() in ("", "dumb", "unknown") or bool(os.environ.get("NO_COLOR"))


def say(line: str) -> None:
    """Print a line to stderr. Where nobody reads that any more, or its disk is full, the work continues without."""
    with suppress(OSError, ValueError):
        print(line, file=sys.stderr, flush=True)  # noqa: T201 - typer's would say it in UTF-8 whatever the locale


def warn(kind: str, message: str) -> None:
    """Print `kind: message` to stderr."""
    say_labelled(kind, printable(message))


def warn_of(warnings: Iterable[str]) -> None:
    """Print warnings to stderr, each of them once."""
    for warning in dict.fromkeys(warnings):
        warn("warning", warning)


def say_labelled(kind: str, text: str) -> None:
    """Print `kind: text` to stderr, where `text` is fit for a terminal already and may have several lines."""
    label = f"{kind}:"
    if stderr_is_terminal():
        text = as_encoded(text, sys.stderr)
        width = Output(stderr=True).width
        lines = text.split("\n")  # what is indented is a command, to be copied
        text = "\n".join(line if line.startswith("  ") else wrapped(line, width, len(label) + 1) for line in lines)
    if stderr_is_terminal() and not is_plain():
        label = typer.style(label, fg=_COLOURS[kind], bold=True)
    say(f"{label} {text}")


def wrapped(text: str, width: int, used: int = 0, indent: int = 0) -> str:
    r"""A paragraph of lines of a width, broken between words alone; a number stays with its unit, a command and a name
    with spaces that was typed in one piece.

    Args:
        text: in one line.
        width: in columns.
        used: columns that the first line has less.
        indent: spaces before all others.

    >>> wrapped("about 12 MB of it", 10)
    'about\n12 MB of\nit'
    """
    joined = _TYPED.sub(lambda found: found[0].replace(" ", "\N{NO-BREAK SPACE}"), text)
    joined = _UNIT.sub("\N{NO-BREAK SPACE}", joined)
    for word in (each for each in map(printable, sys.argv[1:]) if " " in each):
        joined = joined.replace(word, word.replace(" ", "\N{NO-BREAK SPACE}"))
    filled = textwrap.fill(
        joined,
        max(width, 1),
        initial_indent=" " * used,
        subsequent_indent=" " * indent,
        break_long_words=False,
        break_on_hyphens=False,
    )
    return filled[used:].replace("\N{NO-BREAK SPACE}", " ")


def stderr_is_terminal() -> bool:
    """Whether a person is likely to watch stderr."""
    return sys.stderr is not None and sys.stderr.isatty()


class Stdout(io.TextIOWrapper):
    """Stdout, whose errors bear its name, so that a message can say what cannot be written."""

    NAME = "stdout"

    def write(self, text: str) -> int:
        """As of any text stream."""
        with _naming_stdout():
            return super().write(text)

    def flush(self) -> None:
        """As of any text stream."""
        with _naming_stdout():
            super().flush()


@contextmanager
def _naming_stdout() -> Iterator[None]:
    try:
        yield
    except OSError as error:
        error.filename = Stdout.NAME
        raise


class Output(Console):
    """Stdout for people, or stderr: as wide as the terminal, wide enough for a table where there is none. Nothing is
    markup.
    """

    def __init__(self, *, stderr: bool = False) -> None:
        super().__init__(
            stderr=stderr,
            markup=False,
            highlight=False,
            theme=_THEME,
            color_system=None if is_plain() else "auto",
        )
        if not self.is_terminal:
            self.width = _WIDTH

    @property
    def rows(self) -> int:
        """Rows of a table by checkpoint that leave room for the rest on the screen."""
        return min(max(self.height - _BESIDE, _FEWEST_ROWS), MOST_ROWS) if self.is_terminal else MOST_ROWS

    def line(self, text: object = "", *, style: str = "", wrap: bool = False) -> None:
        """Print a line as it is, whatever its length: it may hold a command to copy. With `wrap`, a paragraph."""
        shown = quoted(text)
        self.print(wrapped(shown.plain, self.width) if wrap else shown, style=style, soft_wrap=True)

    def fact(self, label: str, text: object, *, style: str = "") -> None:
        """Print a label and what there is to say, with its numbers emphasized; a path or a command has a `style` and
        stays in one line.
        """
        shown = quoted(text)
        if not style:
            shown = Text(wrapped(shown.plain, self.width, _LABEL, _LABEL))
            shown.highlight_regex(_NUMBER, "number")
        else:
            shown.stylize(style)
        self.print(Text.assemble(f"{label:{_LABEL}}", shown), soft_wrap=True)

    def table(self, table: Table) -> None:
        """Print a table as wide as there is room, and say what had to be left out."""
        lines, left_out = table.laid_out(self.width)
        for line in lines:
            self.print(line, soft_wrap=True)
        if left_out:
            self.line(f"(left out for want of room: {', '.join(left_out)})", wrap=True)

    def problem(self, message: str, more: Iterable[str] = ()) -> None:
        """Print a problem as a paragraph, and what helps."""
        label = "problem: "
        self.print(
            Text.assemble((label, "bad"), wrapped(quoted(message).plain, self.width, len(label))), soft_wrap=True
        )
        for line in filter(None, more):
            self.line(line)

    def warning(self, message: str) -> None:
        """Print an empty line and a warning."""
        self.line()
        self.line(f"warning: {message}", style="warning", wrap=True)


def quoted(text: object) -> Text:
    """Text from outside, shown as it is: no markup, no control characters, in the encoding of stdout."""
    return Text(as_encoded(printable(str(text))))


def print_json(value: object) -> None:
    """Print a JSON object, in ASCII where stdout has no more."""
    from ckavg.output.record import as_json

    text = as_json(value)
    try:
        text.encode(getattr(sys.stdout, "encoding", None) or "ascii")
    except UnicodeEncodeError:
        text = json.dumps(json.loads(text), indent=2)
    typer.echo(text)


def print_places(places: Iterable[object]) -> None:
    """Print where results are, a line for each: to the byte, but in a terminal, which would obey some of them."""
    for place in map(str, places) if sys.stdout is not None else ():
        if sys.stdout.isatty():
            typer.echo(printable(place))
        else:
            with _naming_stdout():
                sys.stdout.buffer.write(os.fsencode(place) + b"\n")
                sys.stdout.buffer.flush()


def as_count(count: int) -> str:
    """A number of parameters, as models are named.

    >>> as_count(245366784), as_count(12)
    ('245.4M', '12')
    """
    return next((f"{count / size:.1f}{unit}" for size, unit in _COUNTS if count >= size), str(count))


def plural(count: int, noun: str) -> str:
    """A number of things.

    >>> plural(1, "problem"), plural(3, "warning")
    ('1 problem', '3 warnings')
    """
    return f"{count} {noun}{'' if count == 1 else 's'}"
