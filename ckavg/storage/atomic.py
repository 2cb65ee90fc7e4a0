"""Write files that appear complete or not at all, and check where a name leads.

A path from the user may be a link, and is followed. A path that we derive may have been planted, in an archive say, to
overwrite somebody's checkpoint: it is written to only if it is a real directory, or a plain file without another hard
link, of this user.
"""

from __future__ import annotations

import errno
import fcntl
import os
import stat
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path


def resolved(path: os.PathLike[str]) -> Path:
    """The path with links resolved; a link in a circle stays as it is."""
    return Path(os.path.realpath(path))


def check_own(path: Path, *, directory: bool = False) -> bool:
    """Whether our own file exists: a plain file without another hard link or, with `directory`, a real directory.

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
        why = "not a directory"
    elif not (directory or stat.S_ISREG(status.st_mode)):
        why = "not a plain file"
    elif not directory and status.st_nlink > 1:
        why = "a file with other hard links"
    elif not _is_of_this_user(path, status):
        why = "another user's"
    else:
        return
    raise FileExistsError(errno.EEXIST, f"it is {why}, so not made by ckavg", str(path))


def make_own_directory(path: Path) -> None:
    """Make a directory and its parents; it may exist already if it is ours.

    Raises:
        FileExistsError: something else is there.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        path.mkdir()
    except FileExistsError:
        check_own(path, directory=True)


def open_own(path: Path, flags: int, mode: int = 0o666) -> int:
    """Open a new file, or a plain file of this user without another hard link; see `os.open`.

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
    """Whether a file belongs to this user; some network file systems give our own files another owner."""
    if status.st_uid == os.geteuid():
        return True
    with tempfile.TemporaryFile(dir=path.parent) as ours:
        return os.fstat(ours.fileno()).st_uid == status.st_uid


@contextmanager
def replacing(path: Path, *, follow: bool = True) -> Iterator[Path]:
    """Yield a temporary name in the same directory, with the same suffix; its file replaces `path` at the end.

    Args:
        path: the file. If it leads to something other than a plain file, such as a pipe or a device, that is yielded.
        follow: whether a link may be followed: a user may name one, but a name of ours is never a link.

    Raises:
        FileExistsError: a name of ours is not a plain file, or has another hard link.
        OSError: the file cannot be written; `path` is unchanged.
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
            partial.chmod(0o666 & ~_umask())  # the usual mode: mkstemp makes files for their owner only
            partial.replace(path)
        except BaseException:
            partial.unlink(missing_ok=True)
            raise


def _umask() -> int:
    umask = os.umask(0)
    os.umask(umask)
    return umask


def write_bytes(path: Path, data: bytes, *, follow: bool = True) -> None:
    """Write a file whole: it is on disk before it gets its name; see `replacing`."""
    write_pieces(path, (data,), follow=follow)


def write_pieces(path: Path, pieces: Iterable[bytes], *, follow: bool = True) -> None:
    """As `write_bytes`, from pieces."""
    with replacing(path, follow=follow) as partial, partial.open("wb") as file:
        file.writelines(pieces)
        file.flush()
        if partial.is_file():
            os.fsync(file.fileno())


def create_whole(path: Path, data: bytes, *, nbytes: int = 0) -> bool:
    """Create a file that appears complete; False if another process has created it first.

    Args:
        path: the file.
        data: its first bytes.
        nbytes: its size, if larger.

    Raises:
        OSError: it cannot be written, or the file system has no hard links.
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
    """A locked empty file with the same suffix beside `path`.

    It has the same name every time unless another process holds that, so a file left by a killed process is reused.
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
    """A locked handle of the empty file at `path`; None if another process holds it."""
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
    """The user's cache directory: `$XDG_CACHE_HOME/ckavg`, or `~/.cache/ckavg`. It need not exist."""
    cache = os.environ.get("XDG_CACHE_HOME") or Path(os.path.expanduser("~")) / ".cache"  # noqa: PTH111 - never raises
    return Path(cache) / "ckavg"
