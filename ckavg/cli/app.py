"""The program: its verbs, and what becomes of an error."""

from __future__ import annotations

import gc
import io
import os
import signal
import sys
from typing import Annotated, NoReturn

import typer

from ckavg.cli.bema import bema
from ckavg.cli.dema import dema
from ckavg.cli.demo import demo
from ckavg.cli.ema import ema
from ckavg.cli.failures import FAILED, INTERRUPTED
from ckavg.cli.inspect import inspect
from ckavg.cli.mean import mean
from ckavg.cli.ouema import ouema
from ckavg.cli.path import path
from ckavg.cli.pema import pema
from ckavg.cli.ranks import mute_others
from ckavg.cli.sweep import sweep
from ckavg.cli.verify import verify
from ckavg.version import __version__

app = typer.Typer(
    name="ckavg",
    help="Average the saved checkpoints of a training run into one better model, without retraining.",
    epilog="Begin with: ckavg inspect ./checkpoints",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
for verb in (pema, bema, ema, ouema, dema, mean, sweep, path, inspect, verify, demo):
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
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # what a cluster sends first: clean up as after Ctrl-C
    gc.disable()  # a short life with bounded memory: looking for cycles in torch's modules costs a tenth of a second
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # a terminal that has no ℓ shows a question mark, not a traceback
    mute_others()
    try:
        app(prog_name="ckavg")
    except SystemExit as error:
        _leave(error.code)
    except KeyboardInterrupt:
        _leave(INTERRUPTED)


def _leave(status: str | int | None) -> NoReturn:
    """Exit without taking torch apart module by module, which costs up to half a second and frees nothing of use."""
    if not (status is None or isinstance(status, int)):
        raise SystemExit(status)
    try:
        sys.stdout.flush()
        sys.stderr.flush()
    except OSError:  # nobody reads it any more
        status = status or FAILED
    os._exit(status or 0)
