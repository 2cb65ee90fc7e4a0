"""A table that is kept for the next time, as JSON with a checksum: it is believed only as it was written."""

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
    """A table as it was written; empty where none can be read, None where it is not as it was written.

    Args:
        file: where it is kept, on this machine or elsewhere.
        version: which its `format` must be.
        most_bytes: a larger file is none.
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
    """Keep a table, with its `format`, whole or not at all. What has the name and is not ours stays.

    Raises:
        OSError, CkavgError: the system, or the storage, would not let us.
    """
    text = _as_bytes(table)
    data = b'%s,"%s":"%s"}' % (text[:-1], _CHECKSUM.encode(), hashlib.sha256(text).hexdigest().encode())
    if isinstance(file, RemotePath):
        file.storage.put(file, data)
    else:
        file.parent.mkdir(parents=True, exist_ok=True)
        write_bytes(file, data, follow=False)


def not_believed(file: AnyPath, again: str) -> str:
    """The warning where a table is not as it was written; what it held is, say, `measured` again."""
    return (
        f"{file} is not as this version of ckavg writes it: damaged, edited, or of another version. It is not "
        f"believed; what it held is {again} again."
    )


def _checksum(table: Mapping[str, Any]) -> str:
    return hashlib.sha256(_as_bytes(table)).hexdigest()


def _as_bytes(table: Mapping[str, Any]) -> bytes:
    return json.dumps(table, separators=(",", ":")).encode()
