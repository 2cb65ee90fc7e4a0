"""Everything ckavg refuses, as one tree. Each error says what, where, what was expected, and what to do next.

CkavgError
├── RunError                     what was named cannot be averaged as one run
│   ├── NoCheckpointsError       nothing in it is a checkpoint
│   ├── TooFewCheckpointsError   an average needs an anchor and one checkpoint more
│   ├── UnsupportedFormatError   weights are there, in a format that is not read
│   ├── DuplicateStepError       two checkpoints claim one optimizer step
│   ├── MixedOrderError          steps, epochs or stages that have no common order
│   └── MismatchError            names, shapes or dtypes differ between checkpoints
├── CheckpointError              one checkpoint is damaged
│   ├── MissingShardError        a file that belongs to it is not there
│   ├── TruncatedShardError      a file is shorter than its header says
│   ├── CorruptFileError         a file is not what its name promises
│   ├── ChangedError             a file is not what it was when the work began
│   └── NonFiniteError           NaN or infinity among the weights
├── RecordError                  a result has no record, or one that cannot be understood
├── ReadError                    the system would not let us read
├── SettingError                 a setting outside its domain (also a ValueError)
├── OutputError                  the result cannot be put where it was asked for
│   ├── OutputExistsError        something is there already
│   └── WriteError               the system would not let us write
├── RanksError                   the processes of one job cannot work together any more
│   └── MissingPartsError        parts of a piece of work are missing that are done by themselves
├── HubError                     the Hugging Face Hub refused, or cannot be reached
├── EvaluationError              no evaluation of a result succeeded, or a model cannot be evaluated
└── CombinedError               more than one of the above, all listed
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

    Messages and hints name settings as options of the command line, `--force`; the text of the exception, which is what
    Python shows, names them as arguments, `force=True`.

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
        """The same text for those who type commands, with options."""
        return "\n".join(filter(None, (self.message, self.hint, self.command)))

    def __reduce__(self) -> tuple[Callable[..., CkavgError], tuple[Any, ...], dict[str, Any]]:
        return functools.partial(type(self), hint=self.hint), (self.message,), self.__dict__


class RunError(CkavgError):
    """What was named cannot be averaged as one run."""


class NoCheckpointsError(RunError):
    """Nothing in the source is a checkpoint."""


class TooFewCheckpointsError(RunError):
    """An average needs an anchor and at least one checkpoint more."""


class UnsupportedFormatError(RunError):
    """Weights are there, in a format that is not read.

    Args:
        message, hint, command: as of any error.
        unread: the checkpoints that hold no others.
    """

    def __init__(
        self, message: str, *, hint: str = "", command: str = "", unread: Collection[os.PathLike[str]] = ()
    ) -> None:
        super().__init__(message, hint=hint, command=command)
        self.unread = tuple(unread)


class DuplicateStepError(RunError):
    """Two checkpoints claim the same optimizer step."""


class MixedOrderError(RunError):
    """Steps, epochs or stages without a common order."""


class MismatchError(RunError):
    """Tensor names, shapes or dtypes differ between checkpoints."""


class CheckpointError(CkavgError):
    """One checkpoint is damaged."""


class MissingShardError(CheckpointError):
    """A file that belongs to a checkpoint is not there."""


class TruncatedShardError(CheckpointError):
    """A file is shorter than its header says: still being written, or cut off."""


class CorruptFileError(CheckpointError):
    """A file is not what its name promises."""


class ChangedError(CheckpointError):
    """A file is not what it was when the work began."""


class NonFiniteError(CheckpointError):
    """NaN or infinity among the weights."""


class RecordError(CkavgError):
    """The record of a result is not there, or not what a record must be."""


class ReadError(CkavgError):
    """The system would not let us read a file."""


class SettingError(CkavgError, ValueError):
    """A setting outside its domain."""


class OutputError(CkavgError):
    """The result cannot be put where it was asked for."""


class OutputExistsError(OutputError):
    """Something is already where the result should go."""


class WriteError(OutputError):
    """The system would not let us write the result."""


class RanksError(CkavgError):
    """One of the processes of a job ended, did not come, or sees something else than the others."""


class MissingPartsError(RanksError):
    """Parts that are done by themselves have not finished yet.

    Args:
        parts: which, from 0.
        count: of how many.
        what: of which work.
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
            hint="Run what is missing, and then this command again; a part can also wait for the others, with --wait.",
        )

    def __reduce__(self) -> tuple[Callable[..., CkavgError], tuple[Any, ...], dict[str, Any]]:
        return type(self), (self.parts, self.count, self.what), self.__dict__


class HubError(CkavgError):
    """The Hugging Face Hub refused what was asked of it, or cannot be reached."""


class EvaluationError(CkavgError):
    """No evaluation of a result succeeded, or a model cannot be evaluated."""


class CombinedError(CkavgError):
    """More than one problem, all of them listed.

    Args:
        errors: the problems, worst first; at least two.
    """

    def __init__(self, errors: Sequence[CkavgError]) -> None:
        self.errors = tuple(errors)
        super().__init__(f"{len(self.errors)} problems:\n" + "\n".join(f"- {_indented(error)}" for error in errors))

    def __reduce__(self) -> tuple[Callable[..., CkavgError], tuple[Any, ...], dict[str, Any]]:
        return type(self), (self.errors,), self.__dict__


def is_passing(error: BaseException) -> bool:
    """Whether the same work may well succeed when it is tried again, and what was done of it is worth keeping."""
    return isinstance(error, KeyboardInterrupt | ReadError | WriteError | RanksError | HubError)


def listed(names: Sequence[str], most: int = 4) -> str:
    """The first few of some names, for a message.

    >>> listed(["a", "b", "c"], most=2), listed(["a", "b"], most=2)
    ('a, b, …', 'a, b')
    """
    return ", ".join(names[:most]) + (", …" if len(names) > most else "")


def printable(text: str) -> str:
    r"""The text in one line, as it is but for characters that a terminal would obey or not show: control characters,
    bytes that are no text, and Unicode's invisible ones, among them those that reverse the order of what follows.

    >>> printable("a\x1b[31mb\nc\u202ed [red]é")
    'a\\x1b[31mb\\nc\\u202ed [red]é'
    """
    if text.isprintable():
        return text
    return "".join(char if char.isprintable() else repr(char)[1:-1] for char in text)


def raise_all(errors: Sequence[CkavgError]) -> None:
    """Raise the one error as itself, several as `CombinedError`, none not at all."""
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
"""A command, which stays as it is, or an option and, where it can be told from prose, its value."""


def as_arguments(text: str) -> str:
    """A text that speaks of options of the command line, with arguments in their place; commands stay as they are.

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
    """The repr of a dataclass in which long values are cut: as `__repr__` of what holds numbers of every checkpoint."""
    fields = (f"{each.name}={_SHORT.repr(getattr(value, each.name))}" for each in dataclasses.fields(value))
    return f"{type(value).__qualname__}({', '.join(fields)})"
