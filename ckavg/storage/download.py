"""Download whole files in pieces, several files at once; each continues where an earlier attempt ended."""

from __future__ import annotations

import fcntl
import hashlib
import os
import threading
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import BinaryIO, TypeVar

from ckavg.errors import ReadError
from ckavg.storage.atomic import open_own
from ckavg.storage.base import OnBytes

Item = TypeVar("Item")
Result = TypeVar("Result")

CONNECTIONS = 8
"""Files downloaded at the same time."""

PIECE_BYTES = 16 << 20
"""Bytes of one request: an interrupt loses at most that much of each file."""

_SECONDS_BETWEEN_LOOKS = 0.1


class Stopped(Exception):  # noqa: N818 - not an error
    """The work is over; ends a worker thread and never leaves it."""


def complete(
    read: Callable[[int, int], bytes],
    nbytes: int,
    target: Path,
    on_bytes: OnBytes,
    *,
    url: str,
    sha256: str | None = None,
) -> None:
    """Download the missing part of a file, and give the file its name once it is complete.

    Two processes that want the same file download it once: the second waits, then finds it.

    Args:
        read: returns the bytes from one offset to another.
        nbytes: size of the file.
        target: where it goes. An incomplete file is beside it, with the suffix `.incomplete`.
        on_bytes: called with the number of bytes received.
        url: its address, for messages.
        sha256: the expected SHA-256; None if unknown.

    Raises:
        ReadError: it does not have this SHA-256, or cannot be written.
        HubError: it cannot be downloaded. The part received so far stays.
    """
    partial = target.with_name(f"{target.name}.incomplete")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with os.fdopen(open_own(partial, os.O_RDWR), "r+b") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            if target.exists():
                on_bytes(nbytes)
                with suppress(OSError):  # the process that held it may have removed it
                    if os.fstat(file.fileno()).st_ino == partial.stat().st_ino:
                        partial.unlink()
                return
            digest = _fill(file, read, nbytes, on_bytes)
            if sha256 not in (None, digest):
                partial.unlink()
                raise ReadError(
                    f"{url} does not have its SHA-256: the download is corrupt.",
                    hint="It was removed; run the command again.",
                )
            partial.replace(target)
    except OSError as error:
        raise ReadError(
            f"{partial} cannot be written: {error.strerror or error}.",
            hint="Free some space, or download less with --max-disk.",
        ) from error


def _fill(file: BinaryIO, read: Callable[[int, int], bytes], nbytes: int, on_bytes: OnBytes) -> str:
    """Download the rest of a file; return the SHA-256 of all of it."""
    present, digest = min(os.fstat(file.fileno()).st_size, nbytes), hashlib.sha256()
    for start in range(0, present, PIECE_BYTES):
        digest.update(file.read(min(PIECE_BYTES, present - start)))
    file.truncate(present)
    on_bytes(present)
    for start in range(present, nbytes, PIECE_BYTES):
        data = read(start, min(start + PIECE_BYTES, nbytes))
        file.write(data)
        digest.update(data)
        on_bytes(len(data))
    file.flush()
    os.fsync(file.fileno())
    return digest.hexdigest()


class ShortAnswerError(OSError):
    """A response has fewer or more bytes than requested."""


def exactly(data: bytes, start: int, stop: int, size: int) -> bytes:
    """The bytes from `start` to `stop` of a file of `size` bytes, also from a response that ignored the range.

    Raises:
        ShortAnswerError: the response has another length.
    """
    if len(data) == size != stop - start:
        return data[start:stop]
    if len(data) != stop - start:
        raise ShortAnswerError(f"{len(data):,} bytes received, {stop - start:,} requested")
    return data


def thread_map(
    do: Callable[[Item], Result], items: Sequence[Item], *, meanwhile: Callable[[], None] = lambda: None
) -> list[Result]:
    """Apply a function to items in a few threads; return the results. The first error or an interrupt ends it.

    Calls in progress are not waited for then, not even when the process ends: a request may take minutes to fail.

    Args:
        do: called in other threads.
        items: all of them.
        meanwhile: called in this thread now and then, and at the end.

    Raises:
        Exception: what `do` or `meanwhile` raised.
    """
    left, changed = deque(enumerate(items)), threading.Condition()
    results: dict[int, Result] = {}
    errors: list[BaseException] = []

    def work() -> None:
        with suppress(IndexError):
            while True:
                run_one(*left.popleft())

    def run_one(place: int, item: Item) -> None:
        try:
            results[place] = do(item)
        except BaseException as error:  # raised in the calling thread
            errors.append(error)
        with changed:
            changed.notify_all()

    for _ in range(min(CONNECTIONS, len(items))):
        threading.Thread(target=work, name="ckavg-fetch", daemon=True).start()
    try:
        while len(results) < len(items) and not errors:
            with changed:
                changed.wait_for(lambda: errors or len(results) == len(items), _SECONDS_BETWEEN_LOOKS)
            meanwhile()
        if errors:
            raise errors[0]
        return [results[place] for place in range(len(items))]
    finally:
        left.clear()
