"""Stage *publish*: how far a file has come that the Hub's client sends, by byte.

The client has two ways to send. Over HTTP it reads the file through its operation, and reads are counted here. With
hf_xet it reports to a class of its own, which is not part of its interface; where that is another one than is known
here, progress moves on with each file.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

if TYPE_CHECKING:
    from huggingface_hub import CommitOperationAdd

_REPORTERS = ("XetUploadProgressReporter", "XetProgressReporter")
"""Names that the class has had, the latest first."""

_TRIES_AGAIN_SINCE = (1, 5)

_STEP = 1 << 20
"""Bytes between two reports."""


@dataclass(slots=True)
class Transfer:
    """How many bytes are done. Never goes back, though a part that was lost is sent again.

    Attributes:
        on_sent: called with the bytes that are done of all files.
    """

    on_sent: Callable[[int], None]
    _before: int = 0
    _told: int = 0

    def reach(self, position: int) -> None:
        """The file that is sent now is done up to here."""
        self._tell(self._before + position, _STEP)

    def complete(self, size: int) -> None:
        """A file of this size is done, sent or found there."""
        self._before += size
        self._tell(self._before, 1)

    def _tell(self, done: int, step: int) -> None:
        if done >= self._told + step:
            self._told = done
            self.on_sent(done)


class _Counted(io.BufferedReader):
    """A file that tells how far it was read."""

    def __init__(self, path: Path, transfer: Transfer) -> None:
        super().__init__(io.FileIO(path))
        self._transfer = transfer

    def read(self, size: int | None = -1, /) -> bytes:
        data = super().read(size)
        self._transfer.reach(self.tell())
        return data


def operation_of(name: str, path: Path, sha256: str | None, transfer: Transfer) -> CommitOperationAdd:
    """The client's operation that adds a file, and tells how far it is sent.

    Args:
        name: in the repository.
        path: of the file.
        sha256: its SHA-256, where it was read from the file a moment ago: the client does not read it once more then.
        transfer: what is told.
    """
    from huggingface_hub import CommitOperationAdd

    class Told(CommitOperationAdd):
        @contextmanager
        def as_file(self, with_tqdm: bool = False) -> Iterator[BinaryIO]:
            """The file; with a bar, where the client would show one, which tells us."""
            if with_tqdm:
                with _Counted(path, transfer) as file:
                    yield file
            else:
                with super().as_file() as plain:
                    yield plain

    operation = Told(name, str(path))
    if sha256 is not None:
        operation.upload_info.sha256 = bytes.fromhex(sha256)
    return operation


def tries_again() -> bool:
    """Whether the client itself tries again what it asks and sends for a large file; early versions do so in part.

    To try again what it has given up on would be to send a file thirty times.
    """
    from huggingface_hub import __version__

    major, minor, *_ = __version__.split(".")
    return (int(major), int(minor)) >= _TRIES_AGAIN_SINCE


@contextmanager
def told_by_xet(transfer: Transfer) -> Iterator[None]:
    """Have hf_xet tell how far the one file has come that is sent meanwhile."""
    from huggingface_hub import constants
    from huggingface_hub.utils import disable_progress_bars, enable_progress_bars  # type: ignore[attr-defined]

    class Reporter:
        """Takes the place of the client's, which draws bars."""

        def __init__(self, *_: object, **__: object) -> None:
            pass

        def update_progress(self, report: object, *_: object) -> None:
            done: Any = getattr(report, "total_bytes_completed", None)
            if isinstance(done, int):
                transfer.reach(done)

        def close(self, *_: object) -> None:
            pass

    try:
        from huggingface_hub.utils import _xet_progress_reporting as reporting
    except ImportError:
        yield
        return
    known = {name: getattr(reporting, name) for name in _REPORTERS if hasattr(reporting, name)}
    if not known or constants.HF_HUB_DISABLE_PROGRESS_BARS:
        yield
        return
    for name in known:
        setattr(reporting, name, Reporter)
    enable_progress_bars()  # without which it reports nothing
    try:
        yield
    finally:
        disable_progress_bars()
        for name, original in known.items():
            setattr(reporting, name, original)
