"""The program: its verbs, and what a process does before and after one."""

from __future__ import annotations

import gc
import io
import itertools
import os
import resource
import signal
import sys
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer
from typer.core import TyperGroup

from ckavg import __version__
from ckavg.cli.errors import FAILED, INTERRUPTED, USAGE, failures, mute_others, system_error, unknown, usage_errors
from ckavg.cli.help import program_screen
from ckavg.cli.text import ASCII, Stdout, warn
from ckavg.cli.verbs import GROUPS, VERBS, Verb
from ckavg.engine.launchers import slurm_environment

_STDERR = 2
_MANY_FILES = 10_240
"""The most that macOS allows, and enough for any run."""


class _Program(TyperGroup):
    """The verbs, and what is wrong with a command line."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        self.commands.update({name: Verb(name, help=text) for name, text in VERBS.items()})

    def make_context(self, *arguments: Any, **options: Any) -> Any:
        with failures(verbose=False), usage_errors(self):
            return super().make_context(*arguments, **options)

    def invoke(self, *arguments: Any) -> Any:
        with failures(verbose=False), usage_errors(self):
            return super().invoke(*arguments)

    def resolve_command(self, context: Any, args: list[str]) -> Any:
        if args[0] not in self.commands and not context.resilient_parsing:
            raise unknown("ckavg", "verb", args[0], self.commands)
        return super().resolve_command(context, args)

    def format_help(self, _context: Any, formatter: Any) -> None:
        formatter.write(program_screen(GROUPS, self.params))


app = typer.Typer(
    name="ckavg",
    cls=_Program,
    invoke_without_command=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _show_version(asked: bool) -> None:
    if asked:
        typer.echo(f"ckavg {__version__}")
        raise typer.Exit


@app.callback()
def _program(
    context: typer.Context,
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    if context.invoked_subcommand is None:
        typer.echo(context.get_help())
        raise typer.Exit(USAGE)


def main() -> None:
    """Run the program on the arguments of the process, and exit with its status."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # what a cluster sends first: clean up as after Ctrl-C
    gc.disable()  # a short life with bounded memory: looking for cycles in torch's modules costs a tenth of a second
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors=ASCII)  # a terminal that has no ℓ shows an l, not a traceback
    if isinstance(sys.stdout, io.TextIOWrapper):
        of_stdout = {name: getattr(sys.stdout, name) for name in ("encoding", "line_buffering", "write_through")}
        sys.stdout = Stdout(sys.stdout.detach(), errors=ASCII, **of_stdout)
    _occupy_standard_streams()
    _allow_many_files()
    if "slurm" in _values_of("--distributed"):
        os.environ.update(slurm_environment(os.environ))
    mute_others()
    _check_directory()
    try:
        app(prog_name="ckavg")
    except SystemExit as error:
        _leave(error.code)
    except KeyboardInterrupt:
        _leave(INTERRUPTED)
    except OSError as error:  # from --help or --version; verbs look after theirs
        warn("error", system_error(error))
        _leave(FAILED)


def _values_of(option: str) -> list[str]:
    """What was typed for an option, before anything is parsed: of several processes, most are mute by then."""
    words = sys.argv[1:]
    separate = [word for before, word in itertools.pairwise(words) if before == option]
    return separate + [word.partition("=")[2] for word in words if word.startswith(f"{option}=")]


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
            warn("error", system_error(error))
        status = status or FAILED
    with suppress(OSError):
        if sys.stderr is not None:
            sys.stderr.flush()
    os._exit(status or 0)
