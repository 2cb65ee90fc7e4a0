"""Journals of finished work on disk, so that an interrupted command can continue.

A journal is a text file. Each line holds a JSON value and its CRC-32: the first line the key of the work, every other
line the number and the result of a finished part. A line that was cut off is skipped.
"""

from __future__ import annotations

import contextlib
import json
import os
import zlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from ckavg.storage.atomic import open_own
from ckavg.storage.local import open_regular, read_small

_MOST_BYTES = 1 << 30
_as_text = json.JSONEncoder(separators=(",", ":")).encode  # one for all lines: to make one takes longer than most lines


def read_journal(path: Path, key: str) -> dict[int, Any]:
    """The finished parts of a journal, by number; empty if it is missing or has another key."""
    try:
        lines = read_small(path, _MOST_BYTES, follow=False).split(b"\n")
    except OSError:
        return {}
    return _numbered(lines[1:]) if parsed_line(lines[0]) == {"key": key} else {}


def is_of(path: Path, key: str) -> bool:
    """Whether a journal has this key, with or without finished parts."""
    with contextlib.suppress(OSError), open_regular(path, follow=False) as file:
        return bool(parsed_line(file.readline(1 << 16).rstrip(b"\n")) == {"key": key})
    return False


class JournalReader:
    """Reads what was added to a journal since the last read; another process may be writing it, on any machine.

    Args:
        path: the file; it need not exist yet.
        key: of the work; a journal with another key counts as empty.
    """

    def __init__(self, path: Path, key: str) -> None:
        self._path = path
        self._head = as_line({"key": key})
        self._inode = self._read_bytes = 0

    def read(self) -> dict[int, Any]:
        """Newly finished parts, by number. The file is reopened: a network file system refreshes it only then."""
        with contextlib.suppress(OSError), open_regular(self._path, follow=False) as file:
            status = os.fstat(file.fileno())
            if status.st_ino != self._inode or status.st_size < self._read_bytes:  # replaced
                self._inode, self._read_bytes = status.st_ino, 0
            if self._read_bytes == 0 and file.read(len(self._head)) != self._head:
                return {}
            file.seek(max(self._read_bytes, len(self._head)))
            text = file.read(_MOST_BYTES)
            text = text[: text.rfind(b"\n") + 1]
            self._read_bytes = max(self._read_bytes, len(self._head)) + len(text)
            return _numbered(text.split(b"\n"))
        return {}


class Journal:
    """A journal to write. An existing one is continued if it has the same key, else replaced.

    Args:
        path: the file.
        key: of the work; it covers everything that can change the result of a part.

    Raises:
        FileExistsError: the file there is not ours.
        OSError: it cannot be written.
    """

    def __init__(self, path: Path, key: str) -> None:
        continues = is_of(path, key)
        self.handle = open_own(path, os.O_WRONLY | os.O_APPEND)
        if not continues:
            os.truncate(self.handle, 0)
        self._append(b"\n" if continues else as_line({"key": key}))  # ends a line that was cut off

    def add(self, finished: Mapping[int, Any]) -> None:
        """Add the results of finished parts, by number, as JSON values; they are on disk when this returns."""
        self._append(b"".join(as_line([number, value]) for number, value in finished.items()))

    def close(self) -> None:
        """Close the file."""
        os.close(self.handle)

    def _append(self, data: bytes) -> None:
        done = 0
        while done < len(data):
            done += os.write(self.handle, data[done:])
        os.fsync(self.handle)


def _numbered(lines: Iterable[bytes]) -> dict[int, Any]:
    """The numbers and values of lines; damaged lines are skipped."""
    values = map(parsed_line, lines)
    return {
        value[0]: value[1] for value in values if isinstance(value, list) and len(value) == 2 and type(value[0]) is int
    }


def as_line(value: object) -> bytes:
    """A line that holds a JSON value, and the checksum of its text."""
    text = _as_text(value).encode()
    return b"%08x %s\n" % (zlib.crc32(text), text)


def parsed_line(line: bytes) -> Any:
    """The value of a line; None if it is damaged."""
    head, _, text = line.partition(b" ")
    try:
        return json.loads(text) if int(head, 16) == zlib.crc32(text) else None
    except (ValueError, RecursionError):
        return None
