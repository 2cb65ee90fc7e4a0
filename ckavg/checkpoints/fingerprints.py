"""Stage *discover*: which very files a run is made of, so that another state of them is not taken for the same.

Looks at sizes and times; opens no file. What another machine keeps is known by what that tells of it instead.

A stamp is made of size, inode, and the times of last modification and last change of every weight file, and of the
tensors that its header declares. The system sets the time of last change whenever content, name or attributes change,
and offers no way to set it back, so that a file which was changed and given its old size and modification time has
another stamp all the same.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import time
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

from ckavg.checkpoints.run import Checkpoint, Run, Shard, TensorInfo
from ckavg.errors import ChangedError, CkavgError, ReadError, raise_all
from ckavg.storage.base import RemotePath

_FINE_CLOCK_NS = 20_000_000
_COARSE_CLOCK_NS = 2_000_000_000

_declared: tuple[Mapping[str, TensorInfo], bytes] = {}, b""
"""The table that was looked at last, and what it declares: a command asks several times for the stamps of one run."""

_RUN_AGAIN = "Run again once nothing writes to the checkpoints any more, or leave this one out with --to-step."

Fingerprints = tuple[str | None, ...]
"""Of each checkpoint of a run; None where a later change could not be told from the last one."""


def fingerprint_run(run: Run) -> Fingerprints:
    """The stamp of each checkpoint as it is now."""
    return tuple(
        None if (states := _states(checkpoint)) is None else _digest(states, tensors)
        for checkpoint, tensors in with_tensors(run)
    )


def with_tensors(run: Run) -> Iterator[tuple[Checkpoint, bytes]]:
    """Each checkpoint, and what its headers declare as bytes; formed once for neighbours that share their table."""
    before, tensors = run.checkpoints[0], _tensors(run.checkpoints[0])
    for checkpoint in run.checkpoints:
        if checkpoint.entries is not before.entries:
            before, tensors = checkpoint, _tensors(checkpoint)
        yield checkpoint, tensors


def fingerprint(checkpoint: Checkpoint) -> str | None:
    """What tells this state of a checkpoint from any other; None where it changed too recently to tell."""
    states = _states(checkpoint)
    return None if states is None else _digest(states, _tensors(checkpoint))


def file_fingerprints(run: Run) -> Fingerprints:
    """What tells this state of the files of each checkpoint from any other, without their headers; None likewise."""
    return tuple(
        None
        if (states := _states(each)) is None or any(_is_unknown(shard) for shard in each.shards)
        else _digest(states)
        for each in run.checkpoints
    )


def fingerprint_files(paths: Iterable[Path]) -> str:
    """The same of files of this machine, however recently they changed.

    Raises:
        OSError: one cannot be looked at.
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
    """Whether its storage does not tell one state of a file from another of the same size."""
    return isinstance(shard.path, RemotePath) and shard.identity is None


def _state(status: os.stat_result) -> list[int]:
    return [status.st_size, status.st_ino, status.st_mtime_ns, status.st_ctime_ns]


def _tensors(checkpoint: Checkpoint) -> bytes:
    """What the headers of a checkpoint declare, as the end of a JSON list."""
    global _declared
    table, text = _declared
    if table is not checkpoint.entries:
        tensors = [
            [name, entry.dtype, entry.shape, entry.shard, entry.offset, *map(dataclasses.astuple, entry.pieces)]
            for name, entry in sorted(checkpoint.entries.items())
        ]
        text = f", {json.dumps(tensors)[1:]}".encode()
        _declared = checkpoint.entries, text
    return text


def _digest(states: list[object] | list[list[int]], tensors: bytes = b"]") -> str:
    digest = hashlib.sha256(json.dumps(states)[:-1].encode())
    digest.update(tensors)
    return digest.hexdigest()[:32]


def check_unchanged(checkpoints: Iterable[Checkpoint]) -> None:
    """Refuse to go on with what was read of files that have changed since their headers were.

    Raises:
        ChangedError: some have.
        ReadError: some cannot be looked at any more.
        CombinedError: more than one of these.
    """
    errors: list[CkavgError] = []
    for shard in (shard for checkpoint in checkpoints for shard in checkpoint.shards):
        if isinstance(shard.path, RemotePath):  # its storage is asked
            continue
        try:
            status = shard.path.stat()
        except OSError as error:
            what = f"{shard.path} cannot be read: {error.strerror}."
            errors.append(ReadError(what, hint="It was there when the run was opened."))
            continue
        if shard.state and (shard.nbytes, *shard.state) != (status.st_size, status.st_ino, status.st_mtime_ns):
            what = f"{shard.path} was changed or replaced while it was read."
            errors.append(ChangedError(what, hint=_RUN_AGAIN))
    raise_all(errors)


def _is_old_enough(changed: int) -> bool:
    """Whether another change from now on would get another time; it is worth a short wait, not a long one."""
    age, tick = time.time_ns() - changed, _tick(changed)
    if 0 <= age < tick <= _FINE_CLOCK_NS:
        time.sleep((tick - age) / 1e9)
        return True
    return age >= tick


def _tick(changed: int) -> int:
    """Of the clock that gave a file this time."""
    return _FINE_CLOCK_NS if changed % 1_000_000 else _COARSE_CLOCK_NS
