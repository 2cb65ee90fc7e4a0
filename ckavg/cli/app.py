"""The program: its verbs, and what becomes of an error."""

from __future__ import annotations

import gc
import io
import os
import resource
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer
from typer.core import TyperGroup

from ckavg.cli.bema import bema
from ckavg.cli.dema import dema
from ckavg.cli.demo import demo
from ckavg.cli.ema import ema
from ckavg.cli.failures import FAILED, INTERRUPTED, of_system
from ckavg.cli.inspect import inspect
from ckavg.cli.mean import mean
from ckavg.cli.ouema import ouema
from ckavg.cli.path import path
from ckavg.cli.pema import pema
from ckavg.cli.push import push
from ckavg.cli.ranks import mute_others
from ckavg.cli.sweep import sweep
from ckavg.cli.terminal import Stdout, warn
from ckavg.cli.verify import verify
from ckavg.report.text import printable
from ckavg.version import __version__

_STDERR = 2
_MANY_FILES = 10_240
"""The most that macOS allows, and enough for any run."""


class _Program(TyperGroup):
    """The verbs. What is wrong with a command line is said in one line, and without obeying what was typed."""

    def make_context(self, *arguments: Any, **options: Any) -> Any:
        with _told_in_one_line():
            return super().make_context(*arguments, **options)

    def invoke(self, *arguments: Any) -> Any:
        with _told_in_one_line():
            return super().invoke(*arguments)


@contextmanager
def _told_in_one_line() -> Iterator[None]:
    try:
        yield
    except Exception as error:
        if hasattr(error, "format_message"):  # a usage error: typer brings its own, under names of its own
            vars(error).update(message=printable(str(vars(error).get("message", ""))))
        raise


app = typer.Typer(
    name="ckavg",
    cls=_Program,
    help="Average the saved checkpoints of a training run into one better model, without retraining.",
    epilog="Begin with: ckavg inspect ./checkpoints",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
for verb in (pema, bema, ema, ouema, dema, mean, sweep, path, inspect, verify, push, demo):
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
    if isinstance(sys.stdout, io.TextIOWrapper):
        of_stdout = {name: getattr(sys.stdout, name) for name in ("encoding", "line_buffering", "write_through")}
        sys.stdout = Stdout(sys.stdout.detach(), errors="replace", **of_stdout)
    _occupy_standard_streams()
    _allow_many_files()
    mute_others()
    _check_directory()
    try:
        app(prog_name="ckavg")
    except SystemExit as error:
        _leave(error.code)
    except KeyboardInterrupt:
        _leave(INTERRUPTED)
    except OSError as error:  # from --help or --version; verbs look after theirs
        warn("error", of_system(error))
        _leave(FAILED)


def _occupy_standard_streams() -> None:
    """Let no file take the place of a stream that the caller has closed: what a library prints would go into it."""
    with suppress(OSError):
        while (handle := os.open(os.devnull, os.O_RDWR)) <= _STDERR:
            os.set_inheritable(handle, True)
        os.close(handle)


def _check_directory() -> None:
    """Refuse to begin in a directory that was removed: no relative name means anything there, and MKL ends the process
    in the middle of the work.
    """
    try:
        Path.cwd()
    except OSError:
        warn("error", "The current directory does not exist any more. Change to one that does.")
        _leave(FAILED)


def _allow_many_files() -> None:
    """Open as many files as the system allows: shells start programs with a fraction of it, for old ones' sake."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = _MANY_FILES if hard == resource.RLIM_INFINITY else min(hard, _MANY_FILES)
    if soft != resource.RLIM_INFINITY and soft < most:
        with suppress(OSError, ValueError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))


def _leave(status: str | int | None) -> NoReturn:
    """Exit without taking torch apart module by module, which costs up to half a second and frees nothing of use."""
    if not (status is None or isinstance(status, int)):
        raise SystemExit(status)
    try:
        if sys.stdout is not None:
            sys.stdout.flush()
    except BrokenPipeError:  # nobody reads it any more
        status = status or FAILED
    except OSError as error:
        if not status:  # else it was said before
            warn("error", of_system(error))
        status = status or FAILED
    with suppress(OSError):
        if sys.stderr is not None:
            sys.stderr.flush()
    os._exit(status or 0)
