"""What is finished of a long piece of work, on the disk: so that what was interrupted can be continued.

A journal is a text file. Each line holds the CRC-32 of the rest of it and a JSON value: the first the key of the work,
every other a number and what came of the part with that number. A line that was cut off is passed over.
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
    """What a journal says is finished, by number; empty where it is not there, or of the work with another key."""
    try:
        lines = read_small(path, _MOST_BYTES, follow=False).split(b"\n")
    except OSError:
        return {}
    return _numbered(lines[1:]) if parsed_line(lines[0]) == {"key": key} else {}


def is_of(path: Path, key: str) -> bool:
    """Whether a journal is of this work, finished parts or none."""
    with contextlib.suppress(OSError), open_regular(path, follow=False) as file:
        return bool(parsed_line(file.readline(1 << 16).rstrip(b"\n")) == {"key": key})
    return False


class JournalReader:
    """Reads of a journal what was written since it was last read; another process may be writing it on another machine.

    Args:
        path: the file, which need not be there yet.
        key: of the work; a journal of other work counts as empty.
    """

    def __init__(self, path: Path, key: str) -> None:
        self._path = path
        self._head = as_line({"key": key})
        self._inode = self._read_bytes = 0

    def read(self) -> dict[int, Any]:
        """What is newly finished, by number. The file is opened anew, since network file systems look again then."""
        with contextlib.suppress(OSError), open_regular(self._path, follow=False) as file:
            status = os.fstat(file.fileno())
            if status.st_ino != self._inode or status.st_size < self._read_bytes:  # begun anew
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
    """A journal that is being written; what is there of the same work is kept, of other work replaced.

    Args:
        path: the file.
        key: of the work; whatever could change what comes of a part is in it.

    Raises:
        FileExistsError: what is there is no file of ours.
        OSError: the system would not let us write.
    """

    def __init__(self, path: Path, key: str) -> None:
        continues = is_of(path, key)
        self.handle = open_own(path, os.O_WRONLY | os.O_APPEND)
        if not continues:
            os.truncate(self.handle, 0)
        self._append(b"\n" if continues else as_line({"key": key}))  # what was cut off ends here

    def add(self, finished: Mapping[int, Any]) -> None:
        """Note what came of finished parts, by number, as JSON values; they are on the disk when this returns."""
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
    """The numbers and values of lines; damaged ones are passed over."""
    values = map(parsed_line, lines)
    return {
        value[0]: value[1] for value in values if isinstance(value, list) and len(value) == 2 and type(value[0]) is int
    }


def as_line(value: object) -> bytes:
    """A line that holds a JSON value, and the checksum of its text."""
    text = _as_text(value).encode()
    return b"%08x %s\n" % (zlib.crc32(text), text)


def parsed_line(line: bytes) -> Any:
    """The value of a line; None where it is damaged."""
    head, _, text = line.partition(b" ")
    try:
        return json.loads(text) if int(head, 16) == zlib.crc32(text) else None
    except (ValueError, RecursionError):
        return None
