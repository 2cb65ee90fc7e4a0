"""Stage *discover*: fingerprints of the files of a run, which tell one state of them from another.

Looks at sizes and times; opens no file. A remote file has the identity that its storage states instead.

A fingerprint is made of the size, the inode, and the times of last modification (mtime) and last change (ctime) of
every weight file, and of the tensors that its header declares. The system sets ctime whenever content, name or
attributes change, and it cannot be set back. So a file that was changed and then given its old size and mtime still has
another fingerprint.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from ckavg.checkpoints.run import Checkpoint, Run, Shard
from ckavg.errors import ChangedError, CkavgError, ReadError, raise_all
from ckavg.storage.base import RemotePath

_FINE_CLOCK_NS = 20_000_000
_COARSE_CLOCK_NS = 2_000_000_000

_ENCODED_AT_ONCE = 4096
_RUN_AGAIN = "Run again when nothing writes to the checkpoints any more, or leave this one out with --to-step."

Fingerprints = tuple[str | None, ...]
"""The fingerprint of each checkpoint of a run; None if a later change might go unnoticed."""


def fingerprint_run(run: Run) -> Fingerprints:
    """The current fingerprint of each checkpoint."""
    return tuple(
        None if (states := _states(checkpoint)) is None else _digest(states, tensors)
        for checkpoint, tensors in with_tensors(run)
    )


def with_tensors(run: Run) -> Iterator[tuple[Checkpoint, Sequence[bytes]]]:
    """Each checkpoint with the tensors its headers declare, in pieces; built once for neighbours that share a table."""
    before, tensors = run.checkpoints[0], _tensors(run.checkpoints[0])
    for checkpoint in run.checkpoints:
        if checkpoint.entries is not before.entries:
            before, tensors = checkpoint, _tensors(checkpoint)
        yield checkpoint, tensors


def fingerprint(checkpoint: Checkpoint) -> str | None:
    """The fingerprint of a checkpoint; None if it changed too recently for a later change to be noticed."""
    states = _states(checkpoint)
    return None if states is None else _digest(states, _tensors(checkpoint))


def file_fingerprints(run: Run) -> Fingerprints:
    """The fingerprints of the files of each checkpoint, without their headers; None if changed too recently."""
    return tuple(
        None
        if (states := _states(each)) is None or any(_is_unknown(shard) for shard in each.shards)
        else _digest(states)
        for each in run.checkpoints
    )


def fingerprint_files(paths: Iterable[Path]) -> str:
    """The fingerprint of local files, even if they changed recently.

    Raises:
        OSError: a file cannot be accessed.
    """
    return _digest([_state(path.stat()) for path in paths])


def _states(checkpoint: Checkpoint) -> list[object] | None:
    states: list[object] = []
    for shard in checkpoint.shards:
        if isinstance(shard.path, RemotePath):
            states.append([shard.nbytes, shard.identity])
            continue
        try:
            status = shard.path.stat()
        except OSError:
            return None
        if not _is_old_enough(status.st_ctime_ns):
            return None
        states.append(_state(status))
    return states


def _is_unknown(shard: Shard) -> bool:
    """Whether the storage states no identity that changes with the file."""
    return isinstance(shard.path, RemotePath) and shard.identity is None


def _state(status: os.stat_result) -> list[int]:
    return [status.st_size, status.st_ino, status.st_mtime_ns, status.st_ctime_ns]


def _tensors(checkpoint: Checkpoint) -> list[bytes]:
    """The tensors that the headers of a checkpoint declare, as the end of a JSON list."""
    entries, text = checkpoint.entries, []
    names = sorted(entries)
    for first in range(0, len(names), _ENCODED_AT_ONCE):
        some = [(name, entries[name]) for name in names[first : first + _ENCODED_AT_ONCE]]
        stated = [
            [name, each.dtype, each.shape, each.shard, each.offset, *map(dataclasses.astuple, each.pieces)]
            for name, each in some
        ]
        text.append(f", {json.dumps(stated)[1:-1]}".encode())
    return [*text, b"]"]


def _digest(states: list[object] | list[list[int]], tensors: Sequence[bytes] = (b"]",)) -> str:
    digest = hashlib.sha256(json.dumps(states)[:-1].encode())
    for piece in tensors:
        digest.update(piece)
    return digest.hexdigest()[:32]


def check_unchanged(checkpoints: Iterable[Checkpoint]) -> None:
    """Raise if files have changed since their headers were read.

    Raises:
        ChangedError: a file has changed.
        ReadError: a file cannot be accessed any more.
        CombinedError: more than one of these.
    """
    errors: list[CkavgError] = []
    for shard in (shard for checkpoint in checkpoints for shard in checkpoint.shards):
        if isinstance(shard.path, RemotePath):  # checked by its storage
            continue
        try:
            status = shard.path.stat()
        except OSError as error:
            what = f"{shard.path} cannot be read: {error.strerror}."
            errors.append(ReadError(what, hint="It existed when the run was opened."))
            continue
        if shard.state and (shard.nbytes, *shard.state) != (status.st_size, status.st_ino, status.st_mtime_ns):
            what = f"{shard.path} was changed or replaced while it was read."
            errors.append(ChangedError(what, hint=_RUN_AGAIN))
    raise_all(errors)


def _is_old_enough(changed: int) -> bool:
    """Whether a change from now on would get another time; waits a little for it, not long."""
    age, tick = time.time_ns() - changed, _tick(changed)
    if 0 <= age < tick <= _FINE_CLOCK_NS:
        time.sleep((tick - age) / 1e9)
        return True
    return age >= tick


def _tick(changed: int) -> int:
    """The resolution of the clock that gave a file this time."""
    return _FINE_CLOCK_NS if changed % 1_000_000 else _COARSE_CLOCK_NS
