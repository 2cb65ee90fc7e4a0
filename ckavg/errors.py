"""All errors of ckavg, as one tree. Each says what is wrong, where, what was expected, and what to do next.

CkavgError
├── RunError                     the source cannot be averaged as one run
│   ├── NoCheckpointsError       the source has no checkpoints
│   ├── TooFewCheckpointsError   an average needs an anchor and one more checkpoint
│   ├── UnsupportedFormatError   the weights have a format that is not supported
│   ├── DuplicateStepError       two checkpoints have the same optimizer step
│   ├── MixedOrderError          steps, epochs or stages without a common order
│   └── MismatchError            names, shapes or dtypes differ between checkpoints
├── CheckpointError              one checkpoint is damaged
│   ├── MissingShardError        one of its files is missing
│   ├── TruncatedShardError      a file is shorter than its header says
│   ├── CorruptFileError         the content of a file is not what its name says
│   ├── ChangedError             a file changed during the work
│   └── NonFiniteError           the weights contain NaN or infinity
├── RecordError                  the record of a result is missing or invalid
├── ReadError                    a file cannot be read
├── SettingError                 a setting is invalid (also a ValueError)
├── OutputError                  the result cannot go where it was asked for
│   ├── OutputExistsError        something exists there already
│   └── WriteError               a file cannot be written
├── RanksError                   the processes of a job cannot continue together
│   └── MissingPartsError        independent parts of a job have not finished
├── HubError                     the Hugging Face Hub refused, or cannot be reached
├── EvaluationError              no evaluation succeeded, or a model cannot be evaluated
└── CombinedError               several of the above, all listed
"""

from __future__ import annotations

import dataclasses
import functools
import os
import re
import reprlib
from collections.abc import Callable, Collection, Sequence
from typing import Any


class CkavgError(Exception):
    """Root of every error ckavg raises on purpose.

    Messages and hints name settings as command-line options, `--force`. The text that Python shows for the exception
    names them as arguments, `force=True`.

    Args:
        message: what is wrong, where, and what was expected.
        hint: what to do next; a sentence, possibly with a command to type.
        command: a command that is too long for a sentence; one line for a shell.
    """

    def __init__(self, message: str, *, hint: str = "", command: str = "") -> None:
        super().__init__(message, hint)
        self.message = message
        self.hint = hint
        self.command = command

    def __str__(self) -> str:
        return "\n".join(filter(None, (as_arguments(self.message), as_arguments(self.hint), self.command)))

    @property
    def as_typed(self) -> str:
        """The text for the command line, with options."""
        return "\n".join(filter(None, (self.message, self.hint, self.command)))

    def __reduce__(self) -> tuple[Callable[..., CkavgError], tuple[Any, ...], dict[str, Any]]:
        return functools.partial(type(self), hint=self.hint), (self.message,), self.__dict__


class RunError(CkavgError):
    """The source cannot be averaged as one run."""


class NoCheckpointsError(RunError):
    """The source has no checkpoints."""


class TooFewCheckpointsError(RunError):
    """An average needs an anchor and at least one more checkpoint."""


class UnsupportedFormatError(RunError):
    """The weights have a format that is not supported.

    Args:
        message, hint, command: see `CkavgError`.
        unread: the checkpoints that have no other weights.
    """

    def __init__(
        self, message: str, *, hint: str = "", command: str = "", unread: Collection[os.PathLike[str]] = ()
    ) -> None:
        super().__init__(message, hint=hint, command=command)
        self.unread = tuple(unread)


class DuplicateStepError(RunError):
    """Two checkpoints have the same optimizer step."""


class MixedOrderError(RunError):
    """Steps, epochs or stages without a common order."""


class MismatchError(RunError):
    """Tensor names, shapes or dtypes differ between checkpoints."""


class CheckpointError(CkavgError):
    """One checkpoint is damaged."""


class MissingShardError(CheckpointError):
    """A file of a checkpoint is missing."""


class TruncatedShardError(CheckpointError):
    """A file is shorter than its header says: still being written, or cut off."""


class CorruptFileError(CheckpointError):
    """The content of a file is not what its name says."""


class ChangedError(CheckpointError):
    """A file changed during the work."""


class NonFiniteError(CheckpointError):
    """The weights contain NaN or infinity."""


class RecordError(CkavgError):
    """The record of a result is missing or invalid."""


class ReadError(CkavgError):
    """A file cannot be read."""


class SettingError(CkavgError, ValueError):
    """A setting is invalid."""


class OutputError(CkavgError):
    """The result cannot go where it was asked for."""


class OutputExistsError(OutputError):
    """Something already exists where the result should go."""


class WriteError(OutputError):
    """A file cannot be written."""


class RanksError(CkavgError):
    """A process of a job ended or did not start, or the processes disagree on what they see."""


class MissingPartsError(RanksError):
    """Independent parts of a job (`--part`) have not finished yet.

    Args:
        parts: the missing ones, from 0.
        count: the number of parts.
        what: the job.
    """

    def __init__(self, parts: Sequence[int], count: int, what: str) -> None:
        self.parts, self.count, self.what = tuple(parts), count, what
        named = listed([f"{part}/{count}" for part in parts])
        some = (
            f"Parts {named} have not finished their shares"
            if len(parts) > 1
            else f"Part {named} has not finished its share"
        )
        super().__init__(
            f"{some} of {what}.",
            hint="Run the missing parts, then this command again. With --wait, a part waits for the others.",
        )

    def __reduce__(self) -> tuple[Callable[..., CkavgError], tuple[Any, ...], dict[str, Any]]:
        return type(self), (self.parts, self.count, self.what), self.__dict__


class HubError(CkavgError):
    """The Hugging Face Hub refused a request, or cannot be reached."""


class EvaluationError(CkavgError):
    """No evaluation succeeded, or a model cannot be evaluated."""


class CombinedError(CkavgError):
    """Several problems, all listed.

    Args:
        errors: the problems, worst first; at least two.
    """

    def __init__(self, errors: Sequence[CkavgError]) -> None:
        self.errors = tuple(errors)
        super().__init__(f"{len(self.errors)} problems:\n" + "\n".join(f"- {_indented(error)}" for error in errors))

    def __reduce__(self) -> tuple[Callable[..., CkavgError], tuple[Any, ...], dict[str, Any]]:
        return type(self), (self.errors,), self.__dict__


def is_passing(error: BaseException) -> bool:
    """Whether a retry may succeed, so that finished work is worth keeping."""
    return isinstance(error, KeyboardInterrupt | ReadError | WriteError | RanksError | HubError)


def listed(names: Sequence[str], most: int = 4) -> str:
    """The first few of some names, for a message.

    >>> listed(["a", "b", "c"], most=2), listed(["a", "b"], most=2)
    ('a, b, …', 'a, b')
    """
    return ", ".join(names[:most]) + (", …" if len(names) > most else "")


def printable(text: str) -> str:
    r"""The text in one line, with control characters, invalid bytes and invisible Unicode characters escaped.

    Some of the latter reverse the order of what follows them.

    >>> printable("a\x1b[31mb\nc\u202ed [red]é")
    'a\\x1b[31mb\\nc\\u202ed [red]é'
    """
    if text.isprintable():
        return text
    return "".join(char if char.isprintable() else repr(char)[1:-1] for char in text)


def raise_all(errors: Sequence[CkavgError]) -> None:
    """Raise a single error as it is, and several as `CombinedError`; do nothing without any."""
    if len(errors) == 1:
        raise errors[0]
    if errors:
        raise CombinedError(errors)


def _indented(error: CkavgError) -> str:
    return error.as_typed.replace("\n", "\n  ")


_SWITCHES = {
    "allow_anchor",
    "allow_nonfinite",
    "common_only",
    "create_pr",
    "fetch",
    "force",
    "normalize",
    "private",
    "skip_incomplete",
}
_LISTS = {"copy", "path_exclude", "revisions", "skip_step", "steps"}
_OTHER_NAMES = {"rank_timeout": "timeout", "eval": "evaluate", "eval_goal": "goal", "public": "private=False"}
_OPTION = re.compile(
    r"(?P<command>(?:^|[:`] ?)(?:ckavg|hf|pip|python3?) .*)|(?<![^\s(])--(?P<name>[a-z][a-z0-9-]*)(?!\w)"
    r"(?: (?P<value>'[^']*'|\d[\d.,:]*\d|\d|(?:cpu|min|max|product|eval_loss|b?float\d+|GLOB)\b|[^\s']+?(?=\.?$)))?",
    re.MULTILINE,
)
"""A command, which is left unchanged; or an option, with its value if that can be told from prose."""


def as_arguments(text: str) -> str:
    """The text with command-line options replaced by arguments. Commands are left unchanged.

    >>> as_arguments("Add --force, or --skip-step 20; or choose with --out.")
    'Add force=True, or skip_step=[20]; or choose with `out`.'
    """

    def argument(found: re.Match[str]) -> str:
        if found["command"] is not None:
            return found[0]
        name = found["name"].replace("-", "_")
        name, value = _OTHER_NAMES.get(name, name), found["value"]
        if name == "push_to_hub":
            return "result.push_to_hub(…)" if value is None else f"result.push_to_hub('{value}')"
        if value is None:
            return f"{name}=True" if name in _SWITCHES else f"`{name}`"
        shown = value if value.startswith("'") or value.replace(".", "", 1).isdecimal() else f"'{value}'"
        return f"{name}=[{shown}]" if name in _LISTS else f"{name}={shown}"

    return _OPTION.sub(argument, text)


_SHORT = reprlib.Repr()
_SHORT.maxtuple = _SHORT.maxlist = _SHORT.maxset = _SHORT.maxfrozenset = 3
_SHORT.maxdict, _SHORT.maxstring, _SHORT.maxother = 2, 80, 100


def short_repr(value: Any) -> str:
    """The repr of a dataclass, with long values cut. For classes that hold numbers of every checkpoint."""
    fields = (f"{each.name}={_SHORT.repr(getattr(value, each.name))}" for each in dataclasses.fields(value))
    return f"{type(value).__qualname__}({', '.join(fields)})"
