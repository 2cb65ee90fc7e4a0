"""SHA-256 of whole files, several at a time."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from ckavg.errors import ReadError

_MOST_THREADS = 8


def sha256(data: bytes) -> str:
    """SHA-256 in hexadecimal digits."""
    return hashlib.sha256(data).hexdigest()


def sha256_of(paths: Sequence[Path], *, beside: Sequence[Callable[[], None]] = ()) -> list[str]:
    """SHA-256 of files, in hexadecimal digits.

    Args:
        paths: the files.
        beside: what is done at the same time, such as waiting for a disk.

    Raises:
        ReadError: the system would not let us read.
        Exception: whatever was raised beside it.
    """
    with ThreadPoolExecutor(min(_MOST_THREADS, (os.cpu_count() or 1) + len(beside))) as executor:
        try:
            others = [executor.submit(each) for each in beside]
            hashed = [executor.submit(_sha256_of_file, path) for path in paths]
            for each in others:
                each.result()
            return [each.result() for each in hashed]
        except BaseException:
            executor.shutdown(wait=False, cancel_futures=True)
            raise


def _sha256_of_file(path: Path) -> str:
    try:
        with path.open("rb", buffering=0) as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise ReadError(f"{path} cannot be read: {error.strerror}.", hint="Check the disk and the rights.") from error
