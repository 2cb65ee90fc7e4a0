"""Cached tables: JSON with a checksum, ignored if damaged or edited."""

from __future__ import annotations

import hashlib
import json
import math
from array import array
from collections.abc import Iterator
from typing import Any

from ckavg.errors import CkavgError
from ckavg.storage.atomic import write_pieces
from ckavg.storage.base import AnyPath, RemotePath
from ckavg.storage.local import parse_json, read_small

_CHECKSUM = "sha256"


def load_table(file: AnyPath, version: int, *, most_bytes: int, follow: bool = True) -> dict[str, Any] | None:
    """Load a table; empty if it cannot be read, None if it was damaged or edited.

    Args:
        file: a local or remote file.
        version: the expected `format`.
        most_bytes: a larger file is not read.
        follow: whether the file may be a link.
    """
    try:
        if isinstance(file, RemotePath):
            data = file.storage.read_small(file, most_bytes)
        else:
            data = read_small(file, most_bytes, follow=follow)
        table: dict[str, Any] = parse_json(data)
        checksum = table.pop(_CHECKSUM)
        return table if table["format"] == version and checksum == _checksum(table) else None
    except (OSError, CkavgError):
        return {}
    except (ValueError, RecursionError, AttributeError, TypeError, KeyError):
        return None


def save_table(file: AnyPath, table: dict[str, Any]) -> None:
    """Save a table with its `format`, whole or not at all. A file that is not ours is never replaced. A row of numbers
    may be an array.

    Raises:
        OSError, CkavgError: it cannot be written.
    """
    pieces = _signed(table)
    if isinstance(file, RemotePath):
        file.storage.put(file, b"".join(pieces))
    else:
        file.parent.mkdir(parents=True, exist_ok=True)
        write_pieces(file, pieces, follow=False)


def not_believed(file: AnyPath, again: str) -> str:
    """The warning about a table that was damaged or edited; `again` says what happens, such as `measured`."""
    return (
        f"{file} is damaged, edited, or from another version of ckavg. It is ignored, and its values are {again} again."
    )


def _signed(table: dict[str, Any]) -> Iterator[bytes]:
    """The JSON of a table with its checksum as the last entry."""
    digest, before = hashlib.sha256(), b""
    for piece in _encoded(table):
        digest.update(piece)
        yield before
        before = piece
    yield f',"{_CHECKSUM}":"{digest.hexdigest()}"}}'.encode()  # the last piece was the closing brace


def _checksum(table: dict[str, Any]) -> str:
    digest = hashlib.sha256()
    for piece in _encoded(table):
        digest.update(piece)
    return digest.hexdigest()


def _encoded(value: Any) -> Iterator[bytes]:
    """JSON row by row: json holds each number of what it encodes as a text. NaN in an array is null."""
    if isinstance(value, dict):
        for number, (key, each) in enumerate(value.items()):
            yield f"{',' if number else '{'}{json.dumps(key)}:".encode()
            yield from _encoded(each)
        yield b"}" if value else b"{}"
        return
    if isinstance(value, array):
        value = [None if math.isnan(each) else each for each in value]
    yield json.dumps(value, separators=(",", ":")).encode()
