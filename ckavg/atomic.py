"""Files that appear under their name complete or not at all, and where a name leads."""

from __future__ import annotations

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
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=".", suffix=f".{path.name}")
    os.close(handle)
    partial = Path(name)
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


def _usual_mode() -> int:
    """The mode of a new file; temporary ones are made for their owner alone."""
    umask = os.umask(0)
    os.umask(umask)
    return 0o666 & ~umask
