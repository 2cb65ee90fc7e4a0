"""The program: its verbs, and what a process does before and after one."""

from __future__ import annotations

import gc
import io
import itertools
import os
import resource
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from importlib import import_module
from pathlib import Path
from typing import Annotated, Any, NoReturn, cast

import typer
from typer.core import TyperCommand, TyperGroup

from ckavg import __version__
from ckavg.cli.errors import FAILED, INTERRUPTED, mute_others, system_error
from ckavg.cli.text import ASCII, Stdout, warn
from ckavg.engine.launchers import slurm_environment
from ckavg.errors import printable
from ckavg.schemes import SCHEMES
from ckavg.schemes.parse import described

_STDERR = 2
_MANY_FILES = 10_240
"""The most that macOS allows, and enough for any run."""

_VERBS = {
    **{scheme.name: described(scheme.name) for scheme in SCHEMES if scheme.has_verb},
    "sweep": "Form many averages from one reading of the checkpoints: every value of every scheme.",
    "watch": "Average a run anew whenever a checkpoint of it is complete, while training goes on.",
    "best": "Search for the average that your own command finds best, and compare it with the last checkpoint.",
    "join": "Put the parts of an average together that were done with --part.",
    "path": "Measure how far the weights travelled: pass 1 alone, kept for later runs.",
    "inspect": "Show what was found, in which order, and what is wrong with it. Reads no weights without --deep.",
    "eval": "Compute the held-out loss of a causal language model on a text, in nats per token.",
    "verify": "Read a result again and check it against its record: files, weights, numbers.",
    "ls": "List the results of a run: recipe, evaluation, what their weights say. Reads no weights.",
    "diff": "Compare two results, or a result with a checkpoint: recipe, weights, distance by tensor.",
    "push": "Upload a finished average to the Hugging Face Hub.",
    "demo": "Train a small model, save its checkpoints, average them, and compare.",
}
"""What `ckavg --help` says of each verb, without importing its file; a verb itself begins with the same sentence."""


class Verb(TyperCommand):
    """A verb whose file is imported when it is run, so that `ckavg --help` need not wait for all of them."""

    def load(self) -> TyperCommand:
        """The verb itself, with its options."""
        name = str(self.name)
        if name in {scheme.name for scheme in SCHEMES}:
            function = import_module("ckavg.cli.average").scheme_verb(name)
        else:
            function = getattr(import_module(f"ckavg.cli.{name}"), name)
        alone = typer.Typer(add_completion=False)
        alone.command(name)(function)
        return cast(TyperCommand, typer.main.get_command(alone))

    def make_context(self, *arguments: Any, **options: Any) -> Any:
        """As of the verb itself."""
        return self.load().make_context(*arguments, **options)


class _Program(TyperGroup):
    """The verbs. What is wrong with a command line is said in one line, and without obeying what was typed."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        self.commands.update({name: Verb(name, help=text) for name, text in _VERBS.items()})

    def make_context(self, *arguments: Any, **options: Any) -> Any:
        with _in_one_line():
            return super().make_context(*arguments, **options)

    def invoke(self, *arguments: Any) -> Any:
        with _in_one_line():
            return super().invoke(*arguments)


@contextmanager
def _in_one_line() -> Iterator[None]:
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
