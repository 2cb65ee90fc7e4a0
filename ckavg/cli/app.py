"""The program: its verbs, and what becomes of an error."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from ckavg.cli.bema import bema
from ckavg.cli.demo import demo
from ckavg.cli.ema import ema
from ckavg.cli.inspect import inspect
from ckavg.cli.pema import pema
from ckavg.version import __version__

app = typer.Typer(
    name="ckavg",
    help="Average the saved checkpoints of a training run into one better model, without retraining.",
    epilog="Begin with: ckavg inspect ./checkpoints",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
for verb in (pema, bema, ema, inspect, demo):
    app.command()(verb)


def _show_version(asked: bool) -> None:
    if asked:
        typer.echo(f"ckavg {__version__}")
        raise typer.Exit


@app.callback()
def _program(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    pass


def main() -> None:
    """Run the program on the arguments of the process, and exit with its status."""
    try:
        app(prog_name="ckavg")
    except KeyboardInterrupt:
        sys.exit(130)
