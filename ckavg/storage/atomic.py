"""Files that appear under their name complete or not at all, and where a name leads.

A name that a user gave may be a link of theirs, and is followed. What has a name that we derive may have been planted,
in an archive say, to lead to somebody's checkpoint: it is written to only where it is a real directory, or a plain file
without another name, of this user.
"""

from __future__ import annotations

import errno
import fcntl
import os
import stat
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path


def resolved(path: os.PathLike[str]) -> Path:
    """The path without links, as far as there are any that lead somewhere; a link in a circle stays as it is."""
    return Path(os.path.realpath(path))


def check_own(path: Path, *, directory: bool = False) -> bool:
    """Whether something of ours is there: a plain file without another name or, if asked for, a real directory.

    Raises:
        FileExistsError: something else is there.
    """
    try:
        _check(path, path.lstat(), directory=directory)
    except FileNotFoundError:
        return False
    return True


def _check(path: Path, status: os.stat_result, *, directory: bool = False) -> None:
    if stat.S_ISLNK(status.st_mode):
        why = "a symbolic link"
    elif directory and not stat.S_ISDIR(status.st_mode):
        why = "no directory"
    elif not (directory or stat.S_ISREG(status.st_mode)):
        why = "no plain file"
    elif not directory and status.st_nlink > 1:
        why = "a file that has other names, too"
    elif not _is_of_this_user(path, status):
        why = "another user's"
    else:
        return
    raise FileExistsError(errno.EEXIST, f"what is there is {why}, and not ckavg's", str(path))


def make_own_directory(path: Path) -> None:
    """Make a directory, and those above it; the last one may be there already, as one of ours.

    Raises:
        FileExistsError: something else is there.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        path.mkdir()
    except FileExistsError:
        check_own(path, directory=True)


def open_own(path: Path, flags: int, mode: int = 0o666) -> int:
    """A handle of a new file, or of a plain file of this user without another name; see `os.open`.

    Raises:
        FileExistsError: something else is there.
    """
    flags |= os.O_CLOEXEC | os.O_NOFOLLOW
    while True:
        is_there = check_own(path)
        with suppress(FileNotFoundError if is_there else FileExistsError):  # removed or made this very moment
            if not is_there:
                return os.open(path, flags | os.O_CREAT | os.O_EXCL, mode)
            handle = os.open(path, flags & ~os.O_TRUNC | os.O_NONBLOCK)
            break
    try:
        _check(path, os.fstat(handle))
        if flags & os.O_TRUNC:
            os.truncate(handle, 0)
    except BaseException:
        os.close(handle)
        raise
    return handle


def _is_of_this_user(path: Path, status: os.stat_result) -> bool:
    """Whether a file has the owner that our own have there: some network file systems give them another than us."""
    if status.st_uid == os.geteuid():
        return True
    with tempfile.TemporaryFile(dir=path.parent) as ours:
        return os.fstat(ours.fileno()).st_uid == status.st_uid


@contextmanager
def replacing(path: Path, *, follow: bool = True) -> Iterator[Path]:
    """Yield another name in the same directory, of the same suffix; what is there in the end takes the place of `path`.

    Args:
        path: the file. Where it leads to something else than a plain file, such as a pipe or a device, that itself is
            yielded.
        follow: whether it is a user's own name, rather than one of ours, which leads nowhere else.

    Raises:
        FileExistsError: what has a name of ours is no plain file, or has another name, too.
        OSError: the system would not let us write; `path` is as it was.
    """
    if follow:
        path = resolved(path)
    else:
        check_own(path)
    if path.exists() and not path.is_file():
        yield path
        return
    with _held(path) as partial:
        try:
            yield partial
            partial.chmod(0o666 & ~_umask())  # that of any new file; this one was made for its owner alone
            partial.replace(path)
        except BaseException:
            partial.unlink(missing_ok=True)
            raise


def _umask() -> int:
    umask = os.umask(0)
    os.umask(umask)
    return umask


def write_bytes(path: Path, data: bytes, *, follow: bool = True) -> None:
    """Write a file whole, on the disk before it has its name; see `replacing`."""
    with replacing(path, follow=follow) as partial, partial.open("wb") as file:
        file.write(data)
        file.flush()
        if partial.is_file():
            os.fsync(file.fileno())


def create_whole(path: Path, data: bytes, *, nbytes: int = 0) -> bool:
    """Make a file that appears complete; False where one is there already, of whichever process came first.

    Args:
        path: the file.
        data: its first bytes.
        nbytes: its size, where that is larger.

    Raises:
        OSError: the system would not let us write, or has no hard links there.
    """
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=".ckavg-partial.")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            if nbytes:
                file.truncate(nbytes)
                os.fchmod(handle, 0o666 & ~_umask())
            os.fsync(handle)
        os.link(name, path, follow_symlinks=False)
    except FileExistsError:
        return False
    finally:
        os.unlink(name)  # noqa: PTH108 - a name that mkstemp gave
    return True


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
        handle = open_own(path, os.O_RDWR, 0o600)
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


def cache_directory() -> Path:
    """The directory for what can be had again: `$XDG_CACHE_HOME/ckavg`, or `~/.cache/ckavg`. It need not exist."""
    cache = os.environ.get("XDG_CACHE_HOME") or Path(os.path.expanduser("~")) / ".cache"  # noqa: PTH111 - never raises
    return Path(cache) / "ckavg"
