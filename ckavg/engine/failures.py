"""Stage *engine*: the error of a process as JSON for the other processes of its job, and back.

The JSON is not trusted: it can only become one of the classes of `errors.py` or a few of Python's own.
"""

from __future__ import annotations

import traceback
from typing import Any

from ckavg import errors
from ckavg.errors import CkavgError, CombinedError, MissingPartsError, RanksError

OTHER_PROCESS = "In another process:\n"
"""The prefix of the note with the traceback from another process."""

_MOST_CHARS = 100_000
"""Longest text of an error."""


def as_json(error: BaseException) -> list[Any]:
    """The class, message, hint, command and notes of an error; the last note is its traceback."""
    name, said = type(error).__name__, _said(error)
    values: list[Any] = [said, "", ""]
    match error:
        case CombinedError():
            values = [[as_json(each) for each in error.errors[:100]], error.hint, error.command]
        case CkavgError():
            values = [error.message, error.hint, error.command]
        case OSError(errno=int()):
            name, values = "OSError", [error.errno, str(error.strerror), error.filename and str(error.filename)]
        case SystemExit():
            values = [error.code if isinstance(error.code, int) else int(error.code is not None), "", ""]
    notes = [*getattr(error, "__notes__", ())][:10]
    if not any(note.startswith(OTHER_PROCESS) for note in notes):
        notes.append(OTHER_PROCESS + "".join(traceback.format_exception(error)))
    return [name, *(each[:_MOST_CHARS] if isinstance(each, str) else each for each in values), *notes]


def from_json(found: Any) -> BaseException:
    """An error from JSON: of its own class if that is ours or not a bug, else a `RuntimeError`.

    Control characters are removed, since the texts are printed as they are.

    Raises:
        Exception: it does not describe an error.
    """
    name, first, second, third, *notes = found
    error: BaseException
    kind = getattr(errors, str(name), None)
    if kind is CombinedError:
        error = CombinedError([each for each in map(from_json, first) if isinstance(each, CkavgError)])
        error.hint, error.command = str(second), str(third)
    elif kind is MissingPartsError:
        error = RanksError(str(first), hint=str(second))
    elif isinstance(kind, type) and issubclass(kind, CkavgError):
        error = kind(str(first), hint=str(second), command=str(third))
    elif name == "OSError" and isinstance(first, int):
        error = OSError(first, str(second), third and str(third))
    elif name == "SystemExit":
        error = SystemExit(int(first))
    elif name in ("KeyboardInterrupt", "MemoryError"):
        error = KeyboardInterrupt() if name == "KeyboardInterrupt" else MemoryError()
    else:
        error = RuntimeError(_harmless(f"{name}: {first}"))
    for note in notes:
        error.add_note(_harmless(str(note)))
    return error


def is_from_another(error: BaseException) -> bool:
    """Whether another process raised it first."""
    return any(note.startswith(OTHER_PROCESS) for note in getattr(error, "__notes__", ()))


def _said(error: BaseException) -> str:
    try:
        return str(error)
    except Exception:  # `__str__` of a foreign exception may raise anything
        return ""


def _harmless(text: str) -> str:
    return "".join(char if char.isprintable() or char == "\n" else repr(char)[1:-1] for char in text)
