"""Small files and JSON that are not to be trusted: nothing here waits, or takes more memory than it should."""

from __future__ import annotations

import errno
import json
import os
import stat
from pathlib import Path
from typing import Any, BinaryIO

MOST_SMALL_BYTES = 100_000_000
"""What is read whole into memory is no larger than this."""


def open_regular(path: Path, *, follow: bool = True) -> BinaryIO:
    """Open a plain file for reading. A pipe, a device or a directory is an error instead of a wait without end.

    Args:
        path: its name.
        follow: whether that may be a link.

    Raises:
        OSError: it is none, or the system would not let us.
        ValueError: no file can have this name.
    """
    flags = os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK  # nobody need write to a pipe for it to open
    handle = os.open(path, flags if follow else flags | os.O_NOFOLLOW)
    if not stat.S_ISREG(os.fstat(handle).st_mode):
        os.close(handle)
        raise OSError(errno.EINVAL, "not a plain file", str(path))
    return os.fdopen(handle, "rb")


def read_small(path: Path, most: int = MOST_SMALL_BYTES, *, follow: bool = True) -> bytes:
    """The bytes of a plain file of at most `most` bytes; `follow` as of `open_regular`.

    Raises:
        OSError: it is none, is larger, or the system would not let us read it.
        ValueError: no file can have this name.
    """
    with open_regular(path, follow=follow) as file:
        if os.fstat(file.fileno()).st_size > most:
            raise OSError(errno.EFBIG, f"larger than {most:,} bytes", str(path))
        return file.read()


def parse_json(text: str | bytes) -> Any:
    """The value of a JSON text, in which no object has a name twice and every number is finite.

    Raises:
        ValueError, RecursionError: it is none.
    """
    return json.loads(text, object_pairs_hook=_no_duplicates, parse_constant=_no_constant)


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a name appears twice")
    return found


def _no_constant(name: str) -> float:
    raise ValueError(f"{name} is no JSON")
