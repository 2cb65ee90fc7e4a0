"""Stage *remote*: how much of a run is fetched whole, to the disk, and how much as it is read."""

from __future__ import annotations

import shutil
from collections.abc import Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from ckavg.checkpoints.run import Fetching
from ckavg.remote.store import RemoteFile, Tree
from ckavg.storage.atomic import cache_directory

_LEFT_FREE = 1 << 30
"""What is left of a disk whatever happens."""


@dataclass(frozen=True, slots=True)
class Origin:
    """What a path in the mirror stands for: a file of a tree."""

    tree: Tree
    name: str

    @property
    def file(self) -> RemoteFile:
        """What the tree says of it."""
        return self.tree.files[self.name]


def plan_fetching(
    origins: Mapping[Path, Origin],
    far: Collection[Path],
    readings: Mapping[Path, float],
    *,
    max_disk: int | None,
    other_bytes: int,
) -> Fetching:
    """Say what is fetched whole: what a disk is of use for, as far as there is room.

    It is of use where it saves a second reading, or where the file is of use to others, too. Without a bound, all of it
    goes to the disk or nothing does: nobody asked to fill it.

    Args:
        origins: what the weight files of the run stand for.
        far: those that are not on this machine.
        readings: how often each is read.
        max_disk: how many bytes may be fetched to the disk; None: as many as there is room for.
        other_bytes: what else will be written to the disk.
    """
    sizes = {path: origin.file.size for path, origin in origins.items()}
    wanted = [path for path in origins if path in far and readings[path] >= (1 if origins[path].tree.keeps else 2)]
    directory = next((origin.tree.directory for origin in origins.values()), cache_directory())
    room = free_bytes(directory) - other_bytes - _LEFT_FREE
    if max_disk is not None:
        room = min(room, max_disk)
    whole = _that_fit(wanted, sizes, room)
    if max_disk is None and len(whole) < len(wanted):
        whole = []
    streamed = {path: readings[path] for path in origins if path in far and path not in whole}
    return Fetching(
        whole=tuple(whole),
        whole_bytes=sum(sizes[path] for path in whole),
        kept_bytes=sum(size for path, size in sizes.items() if readings[path] and path not in far),
        streamed_bytes=int(sum(sizes[path] * count for path, count in streamed.items())),
        directory=directory,
        room=max(0, room),
    )


def free_bytes(directory: Path) -> int:
    """How much room there is where a directory is, or will be."""
    for each in (directory, *directory.parents):
        with suppress(OSError):
            return shutil.disk_usage(each).free
    return 0


def _that_fit(paths: Sequence[Path], sizes: Mapping[Path, int], room: int) -> list[Path]:
    fit: list[Path] = []
    for path in paths:
        if sizes[path] <= room:
            room -= sizes[path]
            fit.append(path)
    return fit
