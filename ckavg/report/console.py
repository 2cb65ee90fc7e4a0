"""Stage *report*: the console that results are printed to, and tables in the house's plain manner."""

from __future__ import annotations

import json
import sys

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from ckavg.errors import printable
from ckavg.output.record import as_json

_WIDTH_WITHOUT_TERMINAL = 120


def stdout_console() -> Console:
    """Stdout: as wide as the terminal, wide enough for a table where there is none. Names are never read as markup."""
    console = Console(markup=False, highlight=False, soft_wrap=False)
    return console if console.is_terminal else Console(markup=False, highlight=False, width=_WIDTH_WITHOUT_TERMINAL)


def plain_table(*columns: str, left: tuple[str, ...] = ()) -> Table:
    """A table without rules; numbers to the right, the columns in `left` to the left."""
    table = Table(box=None, pad_edge=False, header_style="bold", padding=(0, 2, 0, 0))
    for column in columns:
        table.add_column(column, justify="left" if column in left else "right", no_wrap=column not in left)
    return table


def quoted(text: object) -> Text:
    """Text from outside, shown as it is: no markup, no control characters."""
    return Text(printable(str(text)))


def print_json(value: object) -> None:
    """One JSON object on stdout, in ASCII where stdout has no more."""
    text = as_json(value)
    try:
        text.encode(getattr(sys.stdout, "encoding", None) or "ascii")
    except UnicodeEncodeError:
        text = json.dumps(json.loads(text), indent=2)
    typer.echo(text)
