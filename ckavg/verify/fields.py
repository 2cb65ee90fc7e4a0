"""Stage *verify*: values of an untrusted JSON file, each of the kind it must be, or an error that names it. Pure."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import PurePosixPath
from typing import Any, TypeVar

from ckavg.errors import RecordError
from ckavg.storage.untrusted import parse_json

Value = TypeVar("Value")
Reader = Callable[[Any, str], Value]
"""Takes a value and where it stands; gives it back as what it must be, or raises `RecordError`."""

MOST_VALUES = 1_000_000
"""Some 250 bytes each, once they are parsed."""

_LARGEST = 2**63
_SHOWN = 60
_DIGITS = frozenset("0123456789abcdef")


def parsed(data: bytes) -> dict[str, Any]:
    """One JSON object of a bounded size, in which no name appears twice and every number is finite.

    Raises:
        RecordError: it is not.
    """
    if sum(map(data.count, (b",", b"[", b"{"))) > MOST_VALUES:
        raise RecordError(f"holds more than {MOST_VALUES:,} values.")
    try:
        value = parse_json(data)
    except (ValueError, RecursionError) as error:
        raise RecordError(f"is not JSON: {error}.") from error
    if not isinstance(value, dict):
        raise RecordError("is not a JSON object.")
    return value


def text(value: Any, where: str) -> str:
    """A text that can be written again, without zero bytes."""
    if isinstance(value, str) and "\0" not in value and not any("\ud800" <= each <= "\udfff" for each in value):
        return value
    raise _wrong(value, where, "a text")


def whole(value: Any, where: str) -> int:
    """A whole number of at most 63 bits."""
    if type(value) is int and abs(value) < _LARGEST:
        return value
    raise _wrong(value, where, "a whole number")


def count(value: Any, where: str) -> int:
    """A whole number that is not negative."""
    if whole(value, where) >= 0:
        return int(value)
    raise _wrong(value, where, "0 or more")


def number(value: Any, where: str) -> float:
    """A finite number."""
    if type(value) is float and math.isfinite(value):
        return value
    if type(value) is int and abs(value) < _LARGEST:
        return float(value)
    raise _wrong(value, where, "a finite number")


def flag(value: Any, where: str) -> bool:
    """True or false."""
    if isinstance(value, bool):
        return value
    raise _wrong(value, where, "true or false")


def digest(value: Any, where: str) -> str:
    """64 hexadecimal digits."""
    if isinstance(value, str) and len(value) == 64 and _DIGITS.issuperset(value):
        return value
    raise _wrong(value, where, "64 hexadecimal digits")


def file_name(value: Any, where: str) -> str:
    """The path of a file inside a directory: relative, without `..`, in one way of writing it.

    >>> file_name("text/config.json", "files[0]")
    'text/config.json'
    """
    name = text(value, where)
    plain = PurePosixPath(name)
    if plain.is_absolute() or ".." in plain.parts or str(plain) != name or name == "." or "\\" in name:
        raise _wrong(value, where, "the plain path of a file inside its directory")
    return name


def optional(each: Reader[Value]) -> Reader[Value | None]:
    """Null, or what `each` reads."""
    return lambda value, where: None if value is None else each(value, where)


def sequence(each: Reader[Value]) -> Reader[tuple[Value, ...]]:
    """A list of what `each` reads."""

    def read(value: Any, where: str) -> tuple[Value, ...]:
        if not isinstance(value, list):
            raise _wrong(value, where, "a list")
        return tuple(each(item, f"{where}[{place}]") for place, item in enumerate(value))

    return read


def table(key: Reader[str], each: Reader[Value]) -> Reader[dict[str, Value]]:
    """An object with names that `key` reads and values that `each` reads."""

    def read(value: Any, where: str) -> dict[str, Value]:
        if not isinstance(value, dict):
            raise _wrong(value, where, "an object")
        return {key(name, where): each(item, f"{where}.{_short(name)}") for name, item in value.items()}

    return read


def one_of(*allowed: str) -> Reader[str]:
    """One of some words."""

    def read(value: Any, where: str) -> str:
        if isinstance(value, str) and value in allowed:
            return value
        raise _wrong(value, where, f"one of {', '.join(allowed)}")

    return read


def member(value: Any, name: str, each: Reader[Value], where: str = "") -> Value:
    """What `each` reads of the named member of an object."""
    place = f"{where}.{name}".removeprefix(".")
    if not isinstance(value, dict):
        raise _wrong(value, where, "an object")
    if name not in value:
        raise RecordError(f"{place} is not there.")
    return each(value[name], place)


def _wrong(value: Any, where: str, expected: str) -> RecordError:
    return RecordError(f"{where} is {_short(value)}; it must be {expected}.")


def _short(value: Any) -> str:
    if isinstance(value, dict | list):
        return "a list" if isinstance(value, list) else "an object"
    if type(value) is int and abs(value) >= _LARGEST:
        return "a huge number"
    shown = json.dumps(value)
    return shown if len(shown) <= _SHOWN else f"{shown[:_SHOWN]}…"
