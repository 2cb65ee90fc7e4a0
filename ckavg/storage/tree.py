"""What the Hub and object stores have in common: directories whose files do not change while they are read."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Protocol, TypeVar

from ckavg.storage.base import FileInfo, OnBytes

Item = TypeVar("Item")
Result = TypeVar("Result")

CONNECTIONS = 8
"""How many files are asked for at the same time."""

_SECONDS_BETWEEN_LOOKS = 0.1


class Tree(Protocol):
    """A directory elsewhere. Every method raises HubError or ReadError where it is refused, or cannot be reached."""

    @property
    def url(self) -> str:
        """Its address, as a user may type it."""
        ...

    @property
    def pinned_url(self) -> str:
        """Its address by what cannot come to mean something else, where there is such a thing."""
        ...

    @property
    def is_shared(self) -> bool:
        """Whether what is downloaded goes into a cache that other programs share, and stays there."""
        ...

    @property
    def is_offline(self) -> bool:
        """Whether nothing can be read but what was downloaded before."""
        ...

    @property
    def files(self) -> Mapping[str, FileInfo]:
        """All files in it, by relative path; listed once."""
        ...

    def read(self, name: str, start: int, stop: int) -> bytes:
        """The bytes from `start` to `stop` of a file: all of them, or an error."""
        ...

    def read_whole(self, name: str) -> bytes:
        """All bytes of a small file."""
        ...

    def local(self, name: str) -> Path | None:
        """Where a file is on this machine, if it was downloaded."""
        ...

    def download(self, name: str, on_bytes: OnBytes) -> Path:
        """Download a file, or what is missing of it; return where it is then."""
        ...

    @property
    def directory(self) -> Path:
        """Where what is downloaded goes."""
        ...

    def remove_downloads(self) -> None:
        """Remove what was downloaded, where nobody else knows of it."""
        ...

    def check_unchanged(self) -> None:
        """Raise ChangedError where a file is another one than when it was listed."""
        ...


class ShortAnswerError(OSError):
    """Fewer or more bytes came than were asked for."""


def exactly(data: bytes, start: int, stop: int, size: int) -> bytes:
    """The bytes from `start` to `stop` of a file of `size` bytes, where something between may have ignored the range.

    Raises:
        ShortAnswerError: they are not these.
    """
    if len(data) == size != stop - start:
        return data[start:stop]
    if len(data) != stop - start:
        raise ShortAnswerError(f"{len(data):,} bytes came, where {stop - start:,} were asked for")
    return data


def thread_map(
    do: Callable[[Item], Result], items: Sequence[Item], *, meanwhile: Callable[[], None] = lambda: None
) -> list[Result]:
    """What a function returns for each item, a few at a time. The first error ends it, and so does an interrupt.

    What is under way then is not waited for, since a request may take minutes to fail: not even by a process that ends.

    Args:
        do: called in other threads.
        items: all of them.
        meanwhile: called in this thread now and then, and when all is done.

    Raises:
        Exception: what `do` or `meanwhile` raised.
    """
    left, changed = deque(enumerate(items)), threading.Condition()
    results: dict[int, Result] = {}
    errors: list[BaseException] = []

    def work() -> None:
        while True:
            try:
                place, item = left.popleft()
            except IndexError:
                return
            try:
                results[place] = do(item)
            except BaseException as error:  # who waits raises it
                errors.append(error)
            with changed:
                changed.notify_all()

    for _ in range(min(CONNECTIONS, len(items))):
        threading.Thread(target=work, name="ckavg-fetch", daemon=True).start()
    try:
        while len(results) < len(items) and not errors:
            with changed:
                changed.wait_for(lambda: errors or len(results) == len(items), _SECONDS_BETWEEN_LOOKS)
            meanwhile()
        if errors:
            raise errors[0]
        return [results[place] for place in range(len(items))]
    finally:
        left.clear()
