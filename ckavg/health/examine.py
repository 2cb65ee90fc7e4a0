"""Stage *health*, all of it in order: every weight file is read, hashed and measured, then judged."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

from ckavg.checkpoints.fingerprints import check_unchanged
from ckavg.checkpoints.run import Checkpoint
from ckavg.checkpoints.statistics import running_statistics
from ckavg.engine.context import OnProgress
from ckavg.engine.distributed import worker_threads
from ckavg.health.findings import find
from ckavg.health.reading import read_all
from ckavg.health.values import Health, TensorStatistics
from ckavg.path.table import fsum
from ckavg.storage.base import AnyPath


def examine(
    source: AnyPath,
    checkpoints: Sequence[Checkpoint],
    *,
    threads: int | None = None,
    on_progress: OnProgress | None = None,
) -> Health:
    """Read all weights of some checkpoints once, and tell what they reveal. Their tensors may differ.

    Args:
        source: the directory that the names of files are told from.
        checkpoints: ordered by step, the anchor first.
        threads: how many threads read, hash and compute; None: one for each core, at least 2.
        on_progress: called in the caller's thread now and then.

    Raises:
        ChangedError, TruncatedShardError, ReadError: a file changed or cannot be read.
    """
    threads = threads or max(2, worker_threads())
    reading = read_all(checkpoints, threads=threads, on_progress=on_progress)
    check_unchanged(checkpoints)
    steps = tuple(checkpoint.step for checkpoint in checkpoints)
    return Health(
        steps,
        find(steps, reading.tensors),
        tuple(_path_between(reading.tensors, pair) for pair in itertools.pairwise(range(len(steps)))),
        {
            _shown(checkpoints[index].shards[shard].path, source): reading.sha256[index, shard]
            for index, checkpoint in enumerate(checkpoints)
            for shard in range(len(checkpoint.shards))
        },
        reading.bytes_read,
    )


def _path_between(tensors: Sequence[TensorStatistics], pair: tuple[int, int]) -> float | None:
    """What the path length grows by: (1/N) Σ_p ‖θ_k,p − θ_{k−1},p‖₁ / σ_p, over the tensors that both hold."""
    parts, counted = [], 0
    left_out = running_statistics(tensor.name for tensor in tensors)
    for tensor in tensors:
        if tensor.name in left_out or tensor.held[0] != 0 or not {*pair} <= {*tensor.held}:
            continue
        place = tensor.held.index(pair[1])
        around = slice(place - 1, place + 1)
        if any(tensor.nan[around]) or any(tensor.infinite[around]):
            return None
        if math.isfinite(tensor.sigma) and tensor.sigma > 0:
            parts.append(tensor.distance[place] / tensor.sigma)
            counted += tensor.numel
    length = fsum(parts) / counted if counted else math.inf
    return length if math.isfinite(length) else None


def _shown(path: AnyPath, source: AnyPath) -> str:
    try:
        return path.relative_to(source).as_posix()
    except ValueError:
        return str(path)
