"""Stage *remote*: what every place has in common that holds files of a run."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol


@dataclass(frozen=True, slots=True)
class RemoteFile:
    """One file, as its place lists it.

    Attributes:
        size: in bytes.
        identity: the same for the same content, as far as the place tells: a hash, or what changes with every change.
        is_hash: whether the same identity in two places means the same content.
    """

    size: int
    identity: str | None
    is_hash: bool = False


GO_ONLINE = "Unset HF_HUB_OFFLINE and TRANSFORMERS_OFFLINE, then run the command again."
"""What to do where something is not in the cache, and nothing else may be read."""

OnBytes = Callable[[int], None]
"""Called with the number of bytes that have come since the last call."""


class Tree(Protocol):
    """A directory that is not here, and does not change while it is read.

    Every method raises HubError or ReadError where the place refuses, or cannot be reached.
    """

    @property
    def url(self) -> str:
        """Its address, as a user may type it."""
        ...

    @property
    def pinned_url(self) -> str:
        """Its address by what cannot come to mean something else, where there is such a thing."""
        ...

    @property
    def keeps(self) -> bool:
        """Whether what is fetched whole stays in a cache that other programs share."""
        ...

    @property
    def is_offline(self) -> bool:
        """Whether nothing can be read but what was fetched before."""
        ...

    @property
    def files(self) -> Mapping[str, RemoteFile]:
        """All files in it, by relative path."""
        ...

    def read(self, name: str, start: int, stop: int) -> bytes:
        """The bytes from `start` to `stop` of a file: all of them, or an error."""
        ...

    def kept(self, name: str) -> Path | None:
        """Where a file is on this machine, if it was fetched whole before."""
        ...

    def fetch(self, name: str, on_bytes: OnBytes) -> Path:
        """Fetch a file whole, or what is missing of it; return where it is now."""
        ...

    @property
    def directory(self) -> Path:
        """Where what is fetched whole goes."""
        ...

    def drop(self) -> None:
        """Remove what was fetched whole, where nobody else knows of it."""
        ...

    def check_unchanged(self) -> None:
        """Raise ChangedError where a file is another one than when it was listed."""
        ...
