"""Files that appear under their name complete or not at all, and where a name leads."""

from __future__ import annotations

import fcntl
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def resolved(path: Path) -> Path:
    """The path without links, as far as there are any that lead somewhere; a link in a circle stays as it is."""
    return Path(os.path.realpath(path))


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield another name in the same directory, of the same suffix; what is there in the end takes the place of `path`.

    Where `path` leads to something else than a plain file, such as a pipe or a device, that itself is yielded.

    Raises:
        OSError: the system would not let us write; `path` is as it was.
    """
    path = resolved(path)
    if path.exists() and not path.is_file():
        yield path
        return
    with _held(path) as partial:
        try:
            yield partial
            partial.chmod(_usual_mode())
            partial.replace(path)
        except BaseException:
            partial.unlink(missing_ok=True)
            raise


def write_bytes(path: Path, data: bytes) -> None:
    """Write a file whole, on the disk before it has its name.

    Raises:
        OSError: the system would not let us; `path` is as it was.
    """
    with replacing(path) as partial, partial.open("wb") as file:
        file.write(data)
        file.flush()
        if partial.is_file():
            os.fsync(file.fileno())


@contextmanager
def _held(path: Path) -> Iterator[Path]:
    """An empty file of the same suffix beside `path`, for nobody else.

    It has the same name every time, unless another process holds that: what a killed one has left is used again.
    """
    usual = path.parent / f".ckavg-partial.{path.name}"
    handle = _lock(usual)
    if handle is None:
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=".", suffix=f".{path.name}")
        usual = Path(name)
    try:
        yield usual
    finally:
        os.close(handle)


def _lock(path: Path) -> int | None:
    """A handle of the empty file at `path` that keeps others away until it is closed; None where it is taken."""
    try:
        handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    except OSError:
        return None
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if os.fstat(handle).st_ino == path.stat().st_ino:
            os.truncate(handle, 0)
            return handle
    except OSError:
        pass
    os.close(handle)
    return None


def _usual_mode() -> int:
    """The mode of a new file; temporary ones are made for their owner alone."""
    umask = os.umask(0)
    os.umask(umask)
    return 0o666 & ~umask
