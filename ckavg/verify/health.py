"""`inspect --deep`: what one reading of all weights reveals of a run.

Four checks: NaN and infinity, saves that hold what the one before holds, tensors that never move, and checkpoints that
stand out. Nothing is compared with an absolute size, so that neither a warm-up, nor a decaying learning rate, nor
uneven intervals, nor the rounding of 16-bit weights count as damage.
"""

from __future__ import annotations

import itertools
import math
import statistics
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from ckavg.checkpoints.fingerprints import check_unchanged
from ckavg.checkpoints.run import Checkpoint
from ckavg.checkpoints.statistics import running_statistics
from ckavg.engine.context import OnProgress, Progress
from ckavg.output.weight_files import sha256_of
from ckavg.path.table import fsum
from ckavg.storage.base import AnyPath
from ckavg.storage.remote import local_path
from ckavg.verify.findings import Finding
from ckavg.verify.health_statistics import TensorStatistics, measure_tensors

_DETOUR = 8.0
"""How many times the way past a checkpoint the way to it must be, from both sides, for it to stand out. In units of the
way past it, noise about one point has 1, a random walk 0.7, a straight line 0.5. The first and the last have one side:
their interval must be so many times all others."""

_FEWEST_ELEMENTS = 64
"""Fewer elements may by chance return to where they were."""

_FEWEST_INTERVALS = 3
"""Others in which a tensor moves, for the first or the last interval to be compared with them."""

_MOST_TENSORS = 0.5
"""Part of the tensors in which a checkpoint must stand out to be named as a whole."""

_HASHED_TOGETHER = 8


@dataclass(frozen=True, slots=True)
class Health:
    """What one reading of all weights revealed.

    Attributes:
        steps: optimizer step of every checkpoint that was read.
        findings: problems first, then by kind and in the order of the steps.
        path: ℓ_k − ℓ_{k−1} of each checkpoint but the first; None where weights are not finite or none count.
        sha256: SHA-256 of every weight file, in hexadecimal, by its path below the source; empty unless asked for.
        bytes_read: bytes of checkpoints read.
    """

    steps: tuple[int, ...]
    findings: tuple[Finding, ...]
    path: tuple[float | None, ...]
    sha256: Mapping[str, str]
    bytes_read: int


def examine(
    source: AnyPath,
    checkpoints: Sequence[Checkpoint],
    *,
    sha256: bool = False,
    on_progress: OnProgress | None = None,
) -> Health:
    """Read all weights of some checkpoints, whose tensors may differ, and say what they reveal.

    Args:
        source: the directory that the names of files are relative to.
        checkpoints: ordered by step, the anchor first.
        sha256: also hash every weight file, which reads it once more; those elsewhere must have been downloaded.
        on_progress: called in this thread now and then.

    Raises:
        ChangedError, TruncatedShardError, ReadError: a file changed or cannot be read.
    """
    to_hash = sum(checkpoint.nbytes for checkpoint in checkpoints) if sha256 else 0
    tensors, bytes_read = measure_tensors(checkpoints, on_progress=on_progress, more_bytes=to_hash)
    hashes = _hashes(source, checkpoints, bytes_read, on_progress) if sha256 else {}
    check_unchanged(checkpoints)
    steps = tuple(checkpoint.step for checkpoint in checkpoints)
    path = tuple(_path_between(tensors, *pair) for pair in itertools.pairwise(range(len(steps))))
    return Health(steps, find(steps, tensors), path, hashes, bytes_read + to_hash)


def _hashes(
    source: AnyPath, checkpoints: Sequence[Checkpoint], before: int, on_progress: OnProgress | None
) -> dict[str, str]:
    """SHA-256 of every weight file, by the name it is known by."""
    shards = [shard for checkpoint in checkpoints for shard in checkpoint.shards]
    total = before + sum(shard.nbytes for shard in shards)
    hashes: dict[str, str] = {}
    for place in range(0, len(shards), _HASHED_TOGETHER):
        some = shards[place : place + _HASHED_TOGETHER]
        paths = [local_path(shard.path) or Path(shard.path) for shard in some]
        for shard, digest in zip(some, sha256_of(paths), strict=True):
            hashes[_name_of(shard.path, source)] = digest
            before += shard.nbytes
        if on_progress is not None:
            on_progress(Progress("health", before, total))
    return hashes


def _name_of(path: AnyPath, source: AnyPath) -> str:
    try:
        return path.relative_to(source).as_posix()
    except ValueError:
        return str(path)


def _path_between(tensors: Sequence[TensorStatistics], before: int, after: int) -> float | None:
    """What the path length grows by: (1/N) Σ_p ‖θ_k,p − θ_{k−1},p‖₁ / σ_p, over the tensors that both hold."""
    moves, counted = [], 0
    left_out = running_statistics(tensor.name for tensor in tensors)
    for tensor in tensors:
        if tensor.name in left_out or tensor.held[0] != 0 or not {before, after} <= {*tensor.held}:
            continue
        place = tensor.held.index(after)
        if not tensor.is_finite(place - 1, place):
            return None
        if math.isfinite(tensor.sigma) and tensor.sigma > 0:
            moves.append(tensor.distance[place] / tensor.sigma)
            counted += tensor.numel
    length = fsum(moves) / counted if counted else math.inf
    return length if math.isfinite(length) else None


def find(steps: Sequence[int], tensors: Sequence[TensorStatistics]) -> tuple[Finding, ...]:
    """All findings: what is not finite first, then by kind, each in the order of the steps. Pure.

    Args:
        steps: optimizer step of every checkpoint.
        tensors: what was measured of each tensor.
    """
    nonfinite = [finding for tensor in tensors for finding in _nonfinite(steps, tensor)]
    return (
        *sorted(nonfinite, key=lambda finding: finding.step or 0),
        *_standing_out(steps, tensors),
        *_stale(steps, tensors),
        *_frozen(tensors),
    )


def _nonfinite(steps: Sequence[int], tensor: TensorStatistics) -> Iterator[Finding]:
    for index, nan, infinite in zip(tensor.held, tensor.nan, tensor.infinite, strict=True):
        if nan or infinite:
            counts = " and ".join(
                f"{count:,} {what}" for count, what in ((nan, "NaN"), (infinite, "infinite")) if count
            )
            message = f"step {steps[index]}: tensor {tensor.name!r} holds {counts} of {tensor.numel:,}."
            yield Finding("nonfinite", message, step=steps[index], tensor=tensor.name)


def _stale(steps: Sequence[int], tensors: Sequence[TensorStatistics]) -> Iterator[Finding]:
    """Checkpoints in which every tensor is that of the one before."""
    has_moved: dict[tuple[int, int], bool] = {}
    for tensor in tensors:
        for place, pair in enumerate(itertools.pairwise(tensor.held), start=1):
            moved = tensor.distance[place] > 0 or not tensor.is_finite(place - 1, place)
            has_moved[pair] = has_moved.get(pair, False) or moved
    for (before, after), moved in sorted(has_moved.items()):
        if after == before + 1 and not moved:
            message = f"step {steps[after]}: all weights are those of step {steps[before]}: a stale save?"
            yield Finding("stale", message, is_problem=False, step=steps[after])


def _frozen(tensors: Sequence[TensorStatistics]) -> list[Finding]:
    """Tensors that never move, where others do."""
    still = [tensor for tensor in tensors if len(tensor.held) > 1 and tensor.is_finite() and not any(tensor.distance)]
    if len(still) == len(tensors):
        return []
    return [
        Finding("frozen", f"tensor {each.name!r} is the same in all checkpoints.", is_problem=False, tensor=each.name)
        for each in still
    ]


def _standing_out(steps: Sequence[int], tensors: Sequence[TensorStatistics]) -> Iterator[Finding]:
    """One finding for a checkpoint that stands out in most of its tensors, otherwise one for each of them."""
    comparable = [tensor for tensor in tensors if tensor.numel >= _FEWEST_ELEMENTS and any(tensor.distance)]
    factors: dict[int, dict[str, float]] = {}
    for tensor in comparable:
        for place, index in enumerate(tensor.held):
            factor = _detour(steps, tensor, place)
            if factor > _DETOUR:
                factors.setdefault(index, {})[tensor.name] = factor
    for index, named in sorted(factors.items()):
        step = steps[index]
        if len(named) >= max(2, _MOST_TENSORS * len(comparable)):
            where = f", in {len(named)} of {len(comparable)} tensors"
            message = f"step {step}: the checkpoint stands out: {_far(statistics.median(named.values()))}{where}."
            yield Finding("foreign", message, is_problem=False, step=step)
            continue
        for name, factor in sorted(named.items()):
            message = f"step {step}: tensor {name!r} stands out: {_far(factor)}."
            yield Finding("foreign", message, is_problem=False, step=step, tensor=name)


def _far(factor: float) -> str:
    return f"{factor:.3g} times as far from the checkpoints beside it as is usual"


def _detour(steps: Sequence[int], tensor: TensorStatistics, place: int) -> float:
    """How many times as far as is usual a checkpoint is from those beside it; 0 where that cannot be told.

    Less than what rounding every element once may come to is no distance.
    """
    last = len(tensor.held) - 1
    beside = [other for other in (place - 1, place + 1) if 0 <= other <= last]
    rounding = tensor.epsilon * max((tensor.size[other] for other in beside), default=0.0)
    if 0 < place < last:
        far, usual = min(tensor.distance[place], tensor.distance[place + 1]), tensor.across[place]
    else:
        far, usual = _interval_at_end(steps, tensor, place)
    return far / max(usual, rounding / _DETOUR, sys.float_info.min)


def _interval_at_end(steps: Sequence[int], tensor: TensorStatistics, place: int) -> tuple[float, float]:
    """The first or the last distance, and the largest of the others as it would be over as many steps.

    A distance grows with the steps by a power from 0, for noise about one point, to 1, for a straight line: whichever
    lets expect more counts.
    """
    spans = [after - before for before, after in itertools.pairwise(steps[index] for index in tensor.held)]
    own = 0 if place == 0 else len(spans) - 1
    usual = [
        distance * max(1.0, spans[own] / max(1, span))
        for other, (distance, span) in enumerate(zip(tensor.distance[1:], spans, strict=True))
        if other != own and distance > 0
    ]
    if len(usual) < _FEWEST_INTERVALS:
        return 0.0, 0.0
    return tensor.distance[own + 1], max(usual)
