"""Stage *engine*: a small status file for each process of a job, which says that it lives and what it is doing.

The process locks its file while it lives, and rewrites it as work goes on. The content is not trusted: it is one line
of JSON with a checksum, of bounded size, and every value is checked for its type.
"""

from __future__ import annotations

import dataclasses
import fcntl
import os
import tempfile
import typing
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from ckavg.storage.atomic import check_own
from ckavg.storage.journal import as_line, parsed_line
from ckavg.storage.local import open_regular

_MOST_BYTES = 1 << 22

State = Literal["working", "left", "failed"]


@dataclass(frozen=True, slots=True)
class Status:
    """The status of a process.

    Attributes:
        job: a unique id of the job, set by the first process and repeated by the others.
        launch: the launcher's name for the job, the same in all its processes.
        rank, world: which process this is, and of how many.
        host, pid: where it runs.
        locks: identifies the boot of the machine and the mount of the file system: processes with the same value see
            each other's locks. Empty if unknown.
        beat: a counter that grows when the process makes progress or waits.
        at: what it is doing, for messages.
        state: whether it is working, has closed all files of the job, or has failed.
        error: how it failed, as JSON; see `failures.py`.
    """

    job: str
    launch: str
    rank: int
    world: int
    host: str
    pid: int
    locks: str = ""
    beat: int = 0
    at: str = ""
    state: State = "working"
    error: list[Any] | None = None


_KINDS: dict[str, tuple[type, ...]] = {
    name: typing.get_args(kind) or (kind,) if name != "state" else (str,)
    for name, kind in typing.get_type_hints(Status).items()
} | {"error": (list, type(None))}


class Member:
    """The status file of this process. It appears locked and complete.

    Args:
        path: of the file; one left by a dead process is replaced.
        status: the initial status.

    Raises:
        FileExistsError: the file there is not ours.
        BlockingIOError: a living process holds it.
        OSError: it cannot be written.
    """

    def __init__(self, path: Path, status: Status) -> None:
        if check_own(path) and (other := look_at(path)) is not None and other[1]:
            raise BlockingIOError(f"process {other[0].pid} on {other[0].host}")
        self._handle, name = tempfile.mkstemp(dir=path.parent, prefix=".ckavg-partial.")
        self.status = status
        try:
            with suppress(OSError):  # a file system without locks: changes show that the process lives
                fcntl.flock(self._handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                self.status = dataclasses.replace(status, locks=_common_locks(self._handle))
            self.tell()
            os.rename(name, path)  # noqa: PTH104 - a name that mkstemp gave
        except BaseException:
            os.unlink(name)  # noqa: PTH108
            os.close(self._handle)
            raise

    def tell(self, **changes: Any) -> None:
        """Rewrite it. If that fails, the others notice the missing progress."""
        self.status = dataclasses.replace(self.status, **changes)
        if self._handle >= 0:
            line = as_line(dataclasses.asdict(self.status))
            with suppress(OSError):
                os.pwrite(self._handle, line, 0)
                os.truncate(self._handle, len(line))
                os.fsync(self._handle)

    def close(self) -> None:
        """Release the lock."""
        if self._handle >= 0:
            os.close(self._handle)
        self._handle = -1


def look_at(path: Path) -> tuple[Status, bool] | None:
    """The status in a file, and whether a process holds its lock; None if it does not exist or is not valid.

    The file is reopened each time: a network file system refreshes it only then. If the lock is free, it is read again,
    since a process writes its last status before it releases the lock.
    """
    with suppress(OSError, ValueError), open_regular(path, follow=False) as file:
        text = file.read(_MOST_BYTES)
        is_held = _is_held(file.fileno())
        if not is_held:
            file.seek(0)
            text = file.read(_MOST_BYTES)
        status = _validated(parsed_line(text.rstrip(b"\n")))
        return None if status is None else (status, is_held)
    return None


def _common_locks(handle: int) -> str:
    with suppress(OSError):
        started = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        return f"{started} {os.fstat(handle).st_dev}"
    return ""


def _is_held(handle: int) -> bool:
    try:
        fcntl.flock(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return False
    fcntl.flock(handle, fcntl.LOCK_UN)
    return False


def _validated(values: Any) -> Status | None:
    if not isinstance(values, dict) or values.keys() != _KINDS.keys():
        return None
    if not all(type(value) in _KINDS[name] for name, value in values.items()):
        return None
    return Status(**values) if values["state"] in typing.get_args(State) else None
