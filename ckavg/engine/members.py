"""Stage *engine*: a small file for each process of a job, which says that the process is there and what it is doing.

The file is held with a lock while its process lives, and rewritten as work goes on. What is read is not trusted: it is
one line of JSON with its checksum, of a bounded size, and every value has its type.
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
    """What a process tells of itself.

    Attributes:
        job: a word that no other job has; that of the first process, which the others repeat.
        launch: what the launcher calls the job, the same in all of its processes.
        rank, world: which process this is, and of how many.
        host, pid: where it runs.
        locks: what processes have in common that see each other's locks for sure: the machine since it was started, and
            the file system as it is mounted. Empty where that is not known.
        beat: grows whenever it has come further, or waits.
        at: what it is doing, for a message.
        state: whether it works, has no file of the job open any more, or has failed.
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
    """The file of this process. It appears locked and complete.

    Args:
        path: of the file; one that a process has left is replaced.
        status: what it says at first.

    Raises:
        FileExistsError: what is there is no file of ours.
        BlockingIOError: a process that lives holds it.
        OSError: the system would not let us write.
    """

    def __init__(self, path: Path, status: Status) -> None:
        if check_own(path) and (other := look_at(path)) is not None and other[1]:
            raise BlockingIOError(f"process {other[0].pid} on {other[0].host}")
        self._handle, name = tempfile.mkstemp(dir=path.parent, prefix=".ckavg-partial.")
        self.status = status
        try:
            with suppress(OSError):  # a file system without locks: changes tell that the process lives
                fcntl.flock(self._handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                self.status = dataclasses.replace(status, locks=_common_locks(self._handle))
            self.tell()
            os.rename(name, path)  # noqa: PTH104 - a name that mkstemp gave
        except BaseException:
            os.unlink(name)  # noqa: PTH108
            os.close(self._handle)
            raise

    def tell(self, **changes: Any) -> None:
        """Rewrite it. It is no loss where it cannot be: the others take this process for silent then."""
        self.status = dataclasses.replace(self.status, **changes)
        if self._handle >= 0:
            line = as_line(dataclasses.asdict(self.status))
            with suppress(OSError):
                os.pwrite(self._handle, line, 0)
                os.truncate(self._handle, len(line))
                os.fsync(self._handle)

    def close(self) -> None:
        """Let go of the lock."""
        if self._handle >= 0:
            os.close(self._handle)
        self._handle = -1


def look_at(path: Path) -> tuple[Status, bool] | None:
    """What the file of a process says, and whether a process holds it; None where it is not there, or no such file.

    It is opened anew, since network file systems look again then. Where the lock is free, it is read once more: what a
    process says last, it says before it lets go.
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
