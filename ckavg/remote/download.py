"""Stage *remote*: a file fetched whole, piece after piece, that goes on where an earlier attempt ended."""

from __future__ import annotations

import fcntl
import hashlib
import os
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Protocol

from ckavg.errors import ReadError
from ckavg.remote.store import OnBytes
from ckavg.storage.atomic import open_own

PIECE_BYTES = 16 << 20
"""How much is asked for at once: what an interrupt costs of each file at most."""


class _Hash(Protocol):
    def update(self, data: bytes, /) -> None: ...


class Readable(Protocol):
    """What a file is fetched from: a `Tree`."""

    @property
    def url(self) -> str:
        """Its address."""
        ...

    def read(self, name: str, start: int, stop: int) -> bytes:
        """The bytes from `start` to `stop`."""
        ...


@dataclass(frozen=True, slots=True)
class Partial:
    """A file to be fetched.

    Attributes:
        tree: where it is.
        name: its path there.
        size: in bytes.
        place: where it goes. What there is of it lies beside that, with `.incomplete` after the name.
        sha256: what its content must hash to; None where that is not known.
    """

    tree: Readable
    name: str
    size: int
    place: Path
    sha256: str | None = None


def complete(partial: Partial, on_bytes: OnBytes) -> None:
    """Fetch what is missing of a file, and give it its name once it is there as a whole.

    Two processes that want the same file fetch it once: the second waits, and finds it.

    Raises:
        ReadError: it is not what its hash promises, or the system would not let us write.
        HubError: it could not be fetched. What came of it stays.
    """
    place = partial.place
    unfinished = place.with_name(f"{place.name}.incomplete")
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        with os.fdopen(open_own(unfinished, os.O_RDWR), "r+b") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            if place.exists():
                on_bytes(partial.size)
                with suppress(OSError):  # of the process that held it until now
                    if os.fstat(file.fileno()).st_ino == unfinished.stat().st_ino:
                        unfinished.unlink()
                return
            digest = hashlib.sha256()
            begun = _begun(file, partial, digest)
            on_bytes(begun)
            for start in range(begun, partial.size, PIECE_BYTES):
                data = partial.tree.read(partial.name, start, min(start + PIECE_BYTES, partial.size))
                file.write(data)
                digest.update(data)
                on_bytes(len(data))
            file.flush()
            os.fsync(file.fileno())
            if partial.sha256 is not None and digest.hexdigest() != partial.sha256:
                unfinished.unlink()
                raise ReadError(
                    f"{partial.tree.url}: {partial.name} came with other content than its SHA-256 promises.",
                    hint="Something changed it on the way. It was removed; run the command again.",
                )
            unfinished.replace(place)
    except OSError as error:
        raise ReadError(
            f"{unfinished} cannot be written: {error.strerror or error}.",
            hint="Free some space, or fetch less to disk with --max-disk.",
        ) from error


def _begun(file: BinaryIO, partial: Partial, digest: _Hash) -> int:
    """How much of the file is there already; it goes into the hash, and the file stands at its end."""
    begun = min(os.fstat(file.fileno()).st_size, partial.size)
    for start in range(0, begun, PIECE_BYTES):
        digest.update(file.read(min(PIECE_BYTES, begun - start)))
    file.truncate(begun)
    return begun
