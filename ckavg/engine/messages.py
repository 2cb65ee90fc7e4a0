"""Stage *engine*: what the processes of one job tell each other, as bytes. Knows no connection.

A message is a letter for its kind, a length, and JSON. What comes over a connection is not trusted: JSON makes values
and runs nothing, and only the classes named here come of it.
"""

from __future__ import annotations

import dataclasses
import importlib
import json
import struct
import traceback
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ckavg import errors
from ckavg.errors import CkavgError, CombinedError, RanksError

HEAD = struct.Struct("!cI")
"""What comes first: the kind of the message, and the length of its JSON."""

VALUE, FAILED, LEFT, ALIVE = b"v", b"f", b"l", b"a"
"""A value; the error that ends the job; that the sender sends no more and has no file of the result open; nothing."""

MOST = 1 << 26
"""The greatest `weight` of what one process is told and has not taken yet: some 4 GB of memory, or 2 GiB of text."""

ELSEWHERE = "In another process:\n"
"""How the note begins that holds the traceback of an error from another process."""

_CLASSES = {
    "CachedPath": "ckavg.path.cache",
    "Record": "ckavg.output.record",
    "Evaluation": "ckavg.output.record",
    "BlockResult": "ckavg.averaging.replay",
    "Input": "ckavg.output.record",
    "Output": "ckavg.output.record",
    "PathPlan": "ckavg.path.plan",
    "Seconds": "ckavg.output.record",
    "_Partial": "ckavg.path.measure",
    "_Sums": "ckavg.path.estimate",
}
"""The dataclasses that are exchanged, and where each is. No other is looked for."""


def packed(kind: bytes, value: object = None) -> bytes:
    """A message.

    Raises:
        RanksError: the value is larger than the others would take.
        TypeError: it is of a kind that is not exchanged.
    """
    text = json.dumps(_plain(value), separators=(",", ":")).encode()
    if weight(text) > MOST:
        raise RanksError(
            f"What the processes must tell each other is too large ({len(text):,} bytes).",
            hint="Average fewer checkpoints at once, or in one process.",
        )
    return HEAD.pack(kind, len(text)) + text


def unpacked(text: bytes) -> Any:
    """The value of a message.

    Raises:
        Exception: it is none.
    """
    return json.loads(text, object_hook=_built)


def weight(text: bytes) -> int:
    """What a message costs, before it is parsed: about one for 64 bytes of memory or 32 of text."""
    return len(text) // 32 + text.count(b",") + text.count(b"[") + text.count(b"{")


def _plain(value: Any) -> Any:
    """The same in JSON, which has no other objects than those that name a kind and what it is made of."""
    match value:
        case None | str() | int() | float():
            return value
        case list():
            return [_plain(each) for each in value]
        case tuple():
            return {"tuple": [_plain(each) for each in value]}
        case Mapping():
            return {"dict": [[_plain(key), _plain(each)] for key, each in value.items()]}
        case Path():
            return {"Path": str(value)}
        case BaseException():
            return {"error": _parts(value)}
    kind = type(value)
    if _CLASSES.get(kind.__name__) == kind.__module__:
        fields = [field.name for field in dataclasses.fields(value)]
        return {kind.__name__: [[name, _plain(getattr(value, name))] for name in fields]}
    if kind.__name__ == "Tensor" and str(value.dtype) == "torch.float64":
        return {"Tensor": value.tolist()}
    raise TypeError(f"{kind.__name__} is not among what processes tell each other.")


def _built(found: dict[str, Any]) -> Any:
    ((kind, content),) = found.items()
    match kind:
        case "tuple":
            return tuple(content)
        case "dict":
            return dict(content)
        case "Path":
            return Path(content)
        case "Tensor":
            import torch

            return torch.tensor(content, dtype=torch.float64)
        case "error":
            return _error(*content)
    return getattr(importlib.import_module(_CLASSES[kind]), kind)(**dict(content))


def _parts(error: BaseException) -> list[Any]:
    """The name of an error, what it is made of, its hint and its notes, the last of which is its traceback."""
    name, hint = type(error).__name__, ""
    made_of: list[Any] = [_said(error)]
    match error:
        case CombinedError():
            made_of, hint = [_plain(each) for each in error.errors], error.hint
        case CkavgError():
            made_of, hint = [error.message], error.hint
        case OSError(errno=int()):
            name, made_of = "OSError", [error.errno, str(error.strerror), error.filename and str(error.filename)]
        case OSError():
            name = "OSError"
        case SystemExit():
            made_of = [error.code if isinstance(error.code, int) else int(error.code is not None)]
    notes = [*getattr(error, "__notes__", ()), ELSEWHERE + "".join(traceback.format_exception(error))]
    return [name, made_of, hint, notes]


def _error(name: str, made_of: list[Any], hint: str, notes: list[str]) -> BaseException:
    """An error as what it was where it is one of ours, or no bug; any other as a `RuntimeError`.

    What an exception from outside says is shown as it is: what a terminal would obey is taken from it here.
    """
    error: BaseException
    kind = getattr(errors, name, None)
    if kind is CombinedError:
        error = CombinedError([each for each in made_of if isinstance(each, CkavgError)])
        error.hint = str(hint)
    elif isinstance(kind, type) and issubclass(kind, CkavgError):
        error = kind(str(made_of[0]), hint=str(hint))
    elif name == "OSError":
        error = OSError(*(each if isinstance(each, int) else each and str(each) for each in made_of))
    elif name == "SystemExit":
        error = SystemExit(int(made_of[0]))
    elif name in ("KeyboardInterrupt", "MemoryError"):
        error = KeyboardInterrupt() if name == "KeyboardInterrupt" else MemoryError()
    else:
        error = RuntimeError(_harmless(f"{name}: {made_of[0]}"))
    for note in notes:
        error.add_note(_harmless(note))
    return error


def _said(error: BaseException) -> str:
    try:
        return str(error)
    except Exception:  # whatever an exception from outside makes of being asked
        return ""


def _harmless(text: str) -> str:
    return "".join(char if char.isprintable() or char == "\n" else repr(char)[1:-1] for char in text)
