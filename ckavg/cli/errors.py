"""How a command ends: one message on stderr and an exit status, in a job of several processes by one of them alone."""

from __future__ import annotations

import difflib
import json
import os
import re
import signal
import sys
import time
import traceback
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

import typer

from ckavg.cli.help import usage
from ckavg.cli.text import Stdout, say, say_labelled, warn
from ckavg.engine.distributed import SECONDS_WITHOUT_PROGRESS
from ckavg.engine.failures import OTHER_PROCESS, is_from_another
from ckavg.errors import (
    CkavgError,
    CombinedError,
    EvaluationError,
    MissingPartsError,
    OutputExistsError,
    RanksError,
    SettingError,
    printable,
)

if TYPE_CHECKING:
    from ckavg.engine.distributed import Ranks

FAILED, USAGE, UNFINISHED, INTERRUPTED = 1, 2, 3, 130
_AS_IT_WAS = "No result was left in part; the checkpoints are as they were."
_BEGINS_ANEW = "Nothing is finished yet: the same command begins anew."
_STDOUT, _STDERR = 1, 2
_LONGEST_LINE = 10_000
"""Characters; twice the longest path."""

_SECONDS_FOR_THE_FIRST = 2.0

_voice: list[int] = []
"""Where stderr led before this process was muted."""

_command = ["ckavg"]
"""The command that runs, as a hint names it."""


@contextmanager
def failures(*, verbose: bool) -> Iterator[None]:
    """Turn errors that ckavg raises on purpose into a message and a status; a bug keeps its traceback."""
    try:
        yield
    except (CkavgError, OSError, MemoryError) as error:
        if verbose:
            with suppress(OSError, ValueError):
                traceback.print_exception(error, file=sys.stderr)
        if isinstance(error, CkavgError):
            message, hint, command = message_of(error)
            if isinstance(error, SettingError):
                hint = hint or f"See: {' '.join(_command)} --help"
            say_labelled("unfinished" if isinstance(error, MissingPartsError) else "error", message)
            _say_hints(hint)
            if command:
                say(f"  {command}")
            if isinstance(error, EvaluationError):  # with what the user's command said
                for line in _notes(error):
                    say(line)
            else:
                _say_hints(*_notes(error))
        elif isinstance(error, MemoryError):
            warn("error", f"There is not enough memory. {_AS_IT_WAS}")
        elif not isinstance(error, BrokenPipeError):  # nobody reads stdout any more, and so nobody misses it
            warn("error", system_error(error))
        statuses = {SettingError: USAGE, MissingPartsError: UNFINISHED}
        raise typer.Exit(next((each for kind, each in statuses.items() if isinstance(error, kind)), FAILED)) from error
    except KeyboardInterrupt as error:
        warn("interrupted", _AS_IT_WAS)
        _say_hints(*(_notes(error) or [_BEGINS_ANEW]))
        raise typer.Exit(INTERRUPTED) from error


@contextmanager
def interrupted_with(message: str) -> Iterator[None]:
    """Have an interrupt end the command with this message, for work that was complete before it."""
    try:
        yield
    except KeyboardInterrupt as error:
        warn("interrupted", message)
        raise typer.Exit(INTERRUPTED) from error


def message_of(error: CkavgError) -> tuple[str, str, str]:
    r"""The message, the hint and the command of an error, fit for a terminal; several problems have some lines each.

    >>> message_of(CkavgError("a\nb is no file.", hint="Name another."))
    ('a\\nb is no file.', 'Name another.', '')
    """
    own = printable(error.hint), printable(error.command)
    if not isinstance(error, CombinedError):
        return _shortened(printable(error.message)), *own
    lines = [f"{len(error.errors)} problems:"]
    for each in error.errors:
        message, hint, command = message_of(each)
        lines += [f"- {message}", *([f"  hint: {hint}"] if hint else []), *([f"  {command}"] if command else [])]
    return "\n".join(lines), *own


def system_error(error: OSError) -> str:
    """What the system refused, and with which file or stream."""
    why = error.strerror or error
    if error.filename == Stdout.NAME:
        return f"stdout cannot be written: {why}. What was written elsewhere is complete."
    return f"{os.fsdecode(error.filename) if error.filename else 'The system'}: {why}."


def mute_others() -> None:
    """Take stdout and stderr from this process, whatever writes to them, if another one speaks for the job."""
    if "RANK" not in os.environ:
        return
    from ckavg.engine.distributed import Ranks

    try:
        if Ranks.from_environment().is_first:
            return
    except RanksError:  # raised again by the verb, and shown then
        return
    _voice.append(os.dup(_STDERR))
    nowhere = os.open(os.devnull, os.O_WRONLY)
    for stream in (_STDOUT, _STDERR):
        os.dup2(nowhere, stream)
    os.close(nowhere)


@contextmanager
def distributed(*, verbose: bool, timeout: float = SECONDS_WITHOUT_PROGRESS) -> Iterator[Ranks]:
    """The processes of this job, if there are any others. An error in one ends all of them, and is shown once."""
    from ckavg.engine.distributed import all_ranks

    with failures(verbose=verbose):
        ranks = None
        try:
            with all_ranks(_say_aloud, timeout=timeout) as ranks:
                if ranks.world > 1:
                    _interrupt_once(ranks)
                yield ranks
        except BaseException as error:
            _tell_torchrun(error)
            if _voice and (ranks is None or ranks.speaks or _speaks_for_itself(error, ranks)):
                os.dup2(_voice.pop(), _STDERR)
            raise


def _speaks_for_itself(error: BaseException, ranks: Ranks) -> bool:
    """Whether a process is to show an error that it had before it came to the others, who do not know of it.

    Most often, the first process has the same error at the same time, and what has started them ends this one.
    """
    same_for_all = isinstance(error, SettingError | OutputExistsError)
    if ranks.has_met or same_for_all or not isinstance(error, CkavgError | OSError):
        return False
    try:
        time.sleep(_SECONDS_FOR_THE_FIRST)
    except KeyboardInterrupt:
        return False
    return True


def _tell_torchrun(error: BaseException) -> None:
    """Leave what ended this process where torchrun looks for it, so that its summary names the first cause.

    torchrun takes the earliest failure, in whole seconds: an error that came from another process is dated after it.
    """
    file = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if file and isinstance(error, Exception) and not isinstance(error, typer.Exit):
        shown = error.as_typed if isinstance(error, CkavgError) else f"{type(error).__name__}: {error}"
        seconds = int(time.time()) + is_from_another(error)
        more = {"py_callstack": "".join(traceback.format_exception(error)), "timestamp": str(seconds)}
        with suppress(OSError):
            Path(file).write_text(json.dumps({"message": {"message": shown, "extraInfo": more}}), encoding="utf-8")


def _say_aloud(line: str) -> None:
    """Print a line to stderr, of a process that is muted, too."""
    if not _voice:
        say(printable(line))
        return
    with suppress(OSError):
        os.write(_voice[0], f"{printable(line)}\n".encode(errors="replace"))


def _interrupt_once(ranks: Ranks) -> None:
    """Raise `KeyboardInterrupt` at the first SIGINT or SIGTERM alone, and not while this process gives up already.

    torchrun sends SIGTERM to all as soon as one has ended, when they may be removing what they have written.
    """
    came = False

    def interrupt(_number: int, _frame: FrameType | None) -> None:
        nonlocal came
        if not (came or ranks.is_ending):
            came = True
            raise KeyboardInterrupt

    for each in (signal.SIGINT, signal.SIGTERM):
        signal.signal(each, interrupt)


def _shortened(line: str) -> str:
    """A line without its middle, where a name in it is longer than any name should be."""
    hidden, end = len(line) - _LONGEST_LINE, _LONGEST_LINE // 2
    return line if hidden <= 0 else f"{line[:end]} … ({hidden:,} more characters) … {line[-end:]}"


def _notes(error: BaseException) -> list[str]:
    """What was added to an exception on its way here: what is kept of the work it ended."""
    return [printable(note) for note in getattr(error, "__notes__", ()) if not note.startswith(OTHER_PROCESS)]


def _say_hints(*hints: str) -> None:
    """Print what to do next."""
    for each in filter(None, hints):
        say_labelled("hint", each)


# --- what is wrong with a command line ---


@contextmanager
def usage_errors(command: Any) -> Iterator[None]:
    """Raise what typer finds wrong with a command line as an error of ours.

    Args:
        command: the verb, or the program, whose options are parsed.

    Raises:
        SettingError: something is.
    """
    _command[1:] = [command.name] if command.name != "ckavg" else []
    try:
        yield
    except Exception as error:
        if not hasattr(error, "format_message"):  # typer brings its usage errors under names of its own
            raise
        raise _as_setting_error(error, command) from error


def unknown(command: str, kind: str, typed: str, known: Iterable[str]) -> SettingError:
    """The error of a word that nothing is called, with what was probably meant.

    Args:
        command: what it was typed after, such as `ckavg pema`.
        kind: what it should be, such as an option.
        typed: the word.
        known: what there is.
    """
    near = difflib.get_close_matches(typed, known, n=2)
    meant = f"Did you mean {' or '.join(near)}? " if near else ""
    return SettingError(f"{command} has no {kind} {typed}.", hint=f"{meant}See: {command} --help")


def _as_setting_error(error: Any, command: Any) -> SettingError:
    """The same in our words, by what typer says of it."""
    name = "ckavg" if command.name == "ckavg" else f"ckavg {command.name}"
    options = {each: option for option in command.params for each in (*option.opts, *option.secondary_opts)}
    parameter, message, see = getattr(error, "param", None), str(error.message), f"See: {name} --help"
    if hasattr(error, "possibilities"):
        return unknown(name, "option", error.option_name, options)
    if hasattr(error, "option_name") and error.option_name in options:
        option = options[error.option_name]
        needed = "takes no value" if option.is_flag else f"needs a value: {error.option_name} {option.metavar}"
        return SettingError(f"{error.option_name} {needed}.", hint=see)
    if hasattr(error, "param_type") and parameter is not None:
        return SettingError(f"{name}: {_typed_as(parameter)} is missing.", hint=f"Type: {usage(command)}")
    if parameter is not None:
        return SettingError(f"{_place(error.ctx, parameter)} {_expected(error)}.", hint=see)
    extra = re.fullmatch(r"Got unexpected extra argument.*? \((.*)\)", message)
    if extra:
        return SettingError(f"{name}: too many arguments, {extra[1]}.", hint=f"Type: {usage(command)}")
    return SettingError(f"{name}: {message}", hint=see)


def _typed_as(parameter: Any) -> str:
    return str(parameter.opts[0] if parameter.param_type_name == "option" else parameter.metavar)


def _place(context: Any, parameter: Any) -> str:
    """Where a value was stated: the option, or the variable of the environment."""
    source = context.get_parameter_source(parameter.name) if context is not None else None
    if source is not None and source.name == "ENVIRONMENT":
        return f"The variable {parameter.envvar}"
    return _typed_as(parameter)


_EXPECTED = (
    (r"Input should be a valid number.*", "a number"),
    (r"Input should be a valid integer.*", "a whole number"),
    (r"Input should be a valid boolean.*", "true or false"),
    (r"Input should be greater than or equal to (.+)", r"\1 or more"),
)
"""What pydantic, which typer asks, says of a value, and how we say what was expected."""


def _expected(error: Any) -> str:
    """What a value is, and what it must be."""
    message = str(error.message).removesuffix(".")
    choices = re.fullmatch(r"(?:Value error, )?('.*') is not one of (.+)", message)
    if choices:
        allowed = " or ".join(re.findall("'([^']*)'", choices[2]))
        return f"is {choices[1]}; it must be {allowed}"
    details = error.__cause__.errors() if hasattr(error.__cause__, "errors") else ()
    for pattern, expected in _EXPECTED:
        if details and (found := re.fullmatch(pattern, message)):
            return f"is {str(details[0]['input'])!r}; it must be {found.expand(expected)}"
    return f"cannot be taken: {message}"
