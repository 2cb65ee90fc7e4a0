"""Whole files, downloaded piece after piece, several at once: each goes on where an attempt before it ended."""

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
"""How many files are asked for at the same time."""

PIECE_BYTES = 16 << 20
"""How much is asked for at once: what an interrupt costs of each file at most."""

_SECONDS_BETWEEN_LOOKS = 0.1


class Stopped(Exception):  # noqa: N818 - nothing is wrong with what it stops
    """The work is over, whatever is left of it; raised in a thread of it, and seen by nobody else."""


def complete(
    read: Callable[[int, int], bytes],
    nbytes: int,
    target: Path,
    on_bytes: OnBytes,
    *,
    url: str,
    sha256: str | None = None,
) -> None:
    """Download what is missing of a file, and give it its name once it is there as a whole.

    Two processes that want the same file download it once: the second waits, and finds it.

    Args:
        read: gives the bytes from one place to another.
        nbytes: size of the file.
        target: where it goes. What there is of it lies beside that, with `.incomplete` after the name.
        on_bytes: told how many bytes came.
        url: its address, for a message.
        sha256: what its content must hash to; None where that is not known.

    Raises:
        ReadError: it is not what its hash promises, or the system would not let us write.
        HubError: it could not be downloaded. What came of it stays.
    """
    partial = target.with_name(f"{target.name}.incomplete")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with os.fdopen(open_own(partial, os.O_RDWR), "r+b") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            if target.exists():
                on_bytes(nbytes)
                with suppress(OSError):  # of the process that held it until now
                    if os.fstat(file.fileno()).st_ino == partial.stat().st_ino:
                        partial.unlink()
                return
            digest = _fill(file, read, nbytes, on_bytes)
            if sha256 not in (None, digest):
                partial.unlink()
                raise ReadError(
                    f"{url} came with other content than its SHA-256 promises.",
                    hint="Something changed it on the way. It was removed; run the command again.",
                )
            partial.replace(target)
    except OSError as error:
        raise ReadError(
            f"{partial} cannot be written: {error.strerror or error}.",
            hint="Free some space, or fetch less to disk with --max-disk.",
        ) from error


def _fill(file: BinaryIO, read: Callable[[int, int], bytes], nbytes: int, on_bytes: OnBytes) -> str:
    """Go on after what is there of a file, and return the SHA-256 of all of it."""
    begun, digest = min(os.fstat(file.fileno()).st_size, nbytes), hashlib.sha256()
    for start in range(0, begun, PIECE_BYTES):
        digest.update(file.read(min(PIECE_BYTES, begun - start)))
    file.truncate(begun)
    on_bytes(begun)
    for start in range(begun, nbytes, PIECE_BYTES):
        data = read(start, min(start + PIECE_BYTES, nbytes))
        file.write(data)
        digest.update(data)
        on_bytes(len(data))
    file.flush()
    os.fsync(file.fileno())
    return digest.hexdigest()


class ShortAnswerError(OSError):
    """Fewer or more bytes came than were asked for."""


def exactly(data: bytes, start: int, stop: int, size: int) -> bytes:
    """The bytes from `start` to `stop` of a file of `size` bytes, where something between may have ignored the range.

    Raises:
        ShortAnswerError: they are not these.
    """
    if len(data) == size != stop - start:
        return data[start:stop]
    if len(data) != stop - start:
        raise ShortAnswerError(f"{len(data):,} bytes came, where {stop - start:,} were asked for")
    return data


def thread_map(
    do: Callable[[Item], Result], items: Sequence[Item], *, meanwhile: Callable[[], None] = lambda: None
) -> list[Result]:
    """What a function returns for each item, a few at a time. The first error ends it, and so does an interrupt.

    What is under way then is not waited for, since a request may take minutes to fail: not even by a process that ends.

    Args:
        do: called in other threads.
        items: all of them.
        meanwhile: called in this thread now and then, and when all is done.

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
        except BaseException as error:  # who waits raises it
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
