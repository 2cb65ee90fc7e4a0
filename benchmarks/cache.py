"""The page cache, brought to the same state before each measurement."""

from __future__ import annotations

import enum
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

_DROP = Path("/proc/sys/vm/drop_caches")
_MEMORY = Path("/proc/meminfo")
_READERS = 4
_BUFFER = 1 << 20


class State(enum.Enum):
    """Whether the files of a run are in the page cache before a command starts."""

    WARM = "in the page cache"
    COLD = "on the disk alone"


def prepare(state: State, files: Sequence[Path]) -> None:
    """Write everything to the disk, then load the files into the page cache, or empty it."""
    os.sync()
    if state is State.COLD:
        _DROP.write_text("3\n", encoding="ascii")
    else:
        # Every time: the system may have evicted some of them.
        with ThreadPoolExecutor(_READERS) as executor:
            list(executor.map(_read, files))


def can_drop() -> bool:
    """Whether the page cache can be emptied: only root on Linux can."""
    return os.access(_DROP, os.W_OK)


def available_bytes() -> int:
    """Memory that the system could still give to processes, including the page cache. Only on Linux."""
    return parse_available(_MEMORY.read_text(encoding="ascii"))


def parse_available(text: str) -> int:
    """The figure in the text of `/proc/meminfo`, in bytes.

    >>> parse_available("MemTotal:  24 kB\\nMemAvailable:   2 kB\\n")
    2048
    """
    fields = dict(line.split(":") for line in text.splitlines())
    return int(fields["MemAvailable"].split()[0]) * 1024


def _read(file: Path) -> None:
    buffer = bytearray(_BUFFER)
    with file.open("rb", buffering=0) as opened:
        while opened.readinto(buffer):
            pass
