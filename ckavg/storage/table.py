"""Cached tables: JSON with a checksum, ignored if damaged or edited."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

from ckavg.errors import CkavgError
from ckavg.storage.atomic import write_bytes
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


def save_table(file: AnyPath, table: Mapping[str, Any]) -> None:
    """Save a table with its `format`, whole or not at all. A file that is not ours is never replaced.

    Raises:
        OSError, CkavgError: it cannot be written.
    """
    text = _as_bytes(table)
    data = b'%s,"%s":"%s"}' % (text[:-1], _CHECKSUM.encode(), hashlib.sha256(text).hexdigest().encode())
    if isinstance(file, RemotePath):
        file.storage.put(file, data)
    else:
        file.parent.mkdir(parents=True, exist_ok=True)
        write_bytes(file, data, follow=False)


def not_believed(file: AnyPath, again: str) -> str:
    """The warning about a table that was damaged or edited; `again` says what happens, such as `measured`."""
    return (
        f"{file} is damaged, edited, or from another version of ckavg. It is ignored, and its values are {again} again."
    )


def _checksum(table: Mapping[str, Any]) -> str:
    return hashlib.sha256(_as_bytes(table)).hexdigest()


def _as_bytes(table: Mapping[str, Any]) -> bytes:
    return json.dumps(table, separators=(",", ":")).encode()
