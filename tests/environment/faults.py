"""A system that fails at the n-th call: what a full disk, a quota, a bad cable or a remounted file system do."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

CALLS = (
    "pwrite", "write", "fsync", "rename", "replace", "mkdir", "open", "truncate", "unlink", "rmdir", "chmod",
    "posix_fallocate",
)  # fmt: skip
"""What os offers and averaging uses."""

ERRORS = (errno.ENOSPC, errno.EIO, errno.EDQUOT, errno.EROFS)


class Faults:
    """Counts calls of the system, and lets one of them fail.

    Args:
        at: which call of all, from 0 on, fails; None: none.
        error: how it fails.
        below: only calls that name something below this directory, or an open file, count.
        lasting: all calls that write fail from then on, as on a file system that became read-only.
    """

    def __init__(self, at: int | None, error: int, *, below: str, lasting: bool = False) -> None:
        self.calls: list[str] = []
        self._at, self._error, self._below, self._lasting = at, error, below, lasting

    def meet(self, name: str, arguments: tuple[Any, ...]) -> None:
        """Count a call, and raise where it is to fail."""
        if not self._counts(arguments):
            return
        self.calls.append(name)
        place = len(self.calls) - 1
        if self._at is not None and (place == self._at or (self._lasting and place > self._at)):
            raise OSError(self._error, os.strerror(self._error))

    def _counts(self, arguments: tuple[Any, ...]) -> bool:
        named = arguments[0] if arguments else None
        return isinstance(named, int) or (
            isinstance(named, str | bytes | os.PathLike) and os.fsdecode(named).startswith(self._below)
        )


@contextmanager
def faults(at: int | None, error: int, *, below: os.PathLike[str], lasting: bool = False) -> Iterator[Faults]:
    """Within this, the system fails as `Faults` says. Reading is left alone, and so is what leads elsewhere."""
    state = Faults(at, error, below=os.fspath(below), lasting=lasting)
    real: dict[str, Callable[..., Any]] = {name: getattr(os, name) for name in CALLS}

    def failing(name: str) -> Callable[..., Any]:
        def call(*arguments: Any, **options: Any) -> Any:
            writes = name != "open" or arguments[1] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
            if writes:
                state.meet(name, arguments)
            return real[name](*arguments, **options)

        return call

    try:
        for name in CALLS:
            setattr(os, name, failing(name))
        yield state
    finally:
        for name in CALLS:
            setattr(os, name, real[name])
