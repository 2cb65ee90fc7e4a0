"""Stage *health*: from statistics to findings. Pure; what a sound run does must not be among them.

Nothing is compared with an absolute size. A value that one checkpoint changed and the next changed back is held
against what such values are in the other checkpoints of the same tensor, each in units of the tensor's mean change
there, so that neither a warm-up, nor a decaying learning rate, nor uneven intervals count. A checkpoint that lies far
from both neighbours, which lie near each other, is foreign.
"""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Iterable, Sequence

from ckavg.health.single import single_values
from ckavg.health.values import Finding, TensorStatistics

_DETOUR = 4.0
"""How many times the way past a checkpoint the way through it must be on both sides. A random walk has 0.7, a straight
line 0.5, noise about one point 1."""

_ABRUPT = 10.0
"""How many times all others the first or last interval must be, with which no neighbour on the other side compares."""

_FEWEST_INTERVALS = 5
"""Intervals that tell whether the first or the last is abrupt."""

_FEWEST_ELEMENTS = 64
"""Elements of which a sum is steady enough to be compared; fewer may by chance return to where they were."""

_ROUNDING = 64.0
"""Distance, in units of the last place at the largest value, below which it may be a few elements that were rounded to
and fro."""

_MOST_OF = 0.5
"""Part of the tensors that must be foreign for the whole checkpoint to be."""


def find(steps: Sequence[int], tensors: Sequence[TensorStatistics]) -> tuple[Finding, ...]:
    """All findings: what is not finite first, then by kind, each in the order of the steps.

    Args:
        steps: optimizer step of every checkpoint.
        tensors: what was measured of each tensor.
    """
    filled = [tensor for tensor in tensors if tensor.numel]
    foreign = [_foreign_places(steps, tensor) for tensor in filled]
    single = [
        finding
        for tensor, places in zip(filled, foreign, strict=True)
        for finding in single_values(steps, tensor)
        if finding.step not in {steps[index] for index in places}
    ]
    return (
        *_in_order(finding for tensor in filled for finding in _nonfinite(steps, tensor)),
        *_told_foreign(steps, filled, foreign),
        *_in_order(single),
        *_stale(steps, filled),
        *_frozen(filled),
    )


def _in_order(findings: Iterable[Finding]) -> list[Finding]:
    return sorted(findings, key=lambda finding: finding.step or 0)


def _nonfinite(steps: Sequence[int], tensor: TensorStatistics) -> list[Finding]:
    found = []
    for index, nan, infinite in zip(tensor.held, tensor.nan, tensor.infinite, strict=True):
        if nan or infinite:
            counts = [f"{count:,} {what}" for count, what in ((nan, "NaN"), (infinite, "infinite")) if count]
            message = f"step {steps[index]}: tensor {tensor.name!r} holds {' and '.join(counts)} of {tensor.numel:,}."
            found.append(Finding("nonfinite", steps[index], tensor.name, message))
    return found


def _stale(steps: Sequence[int], tensors: Sequence[TensorStatistics]) -> list[Finding]:
    """Checkpoints in which every tensor is that of the one before."""
    moved: dict[tuple[int, int], bool] = {}
    for tensor in tensors:
        for place, pair in enumerate(itertools.pairwise(tensor.held), start=1):
            finite = not any((*tensor.nan[place - 1 : place + 1], *tensor.infinite[place - 1 : place + 1]))
            moved[pair] = moved.get(pair, False) or tensor.distance[place] > 0 or not finite
    return [
        Finding(
            "stale",
            steps[after],
            None,
            f"step {steps[after]}: all weights are those of step {steps[before]}: a stale save?",
        )
        for (before, after), has_moved in sorted(moved.items())
        if after == before + 1 and not has_moved
    ]


def _frozen(tensors: Sequence[TensorStatistics]) -> list[Finding]:
    """Tensors that never move, where others do."""
    still = [tensor for tensor in tensors if len(tensor.held) > 1 and tensor.is_finite and not any(tensor.distance)]
    if len(still) == len(tensors):
        return []
    return [
        Finding("frozen", None, tensor.name, f"tensor {tensor.name!r} is the same in all checkpoints.")
        for tensor in still
    ]


def _foreign_places(steps: Sequence[int], tensor: TensorStatistics) -> dict[int, float]:
    """Checkpoints, by index, that are far from all others in this tensor, and how many times as far as is usual."""
    if tensor.numel < _FEWEST_ELEMENTS:
        return {}
    least = _ROUNDING * tensor.precision * statistics.median(tensor.largest)
    found: dict[int, float] = {}
    for place in range(1, len(tensor.held) - 1):
        near = min(tensor.rest[place], tensor.rest[place + 1])
        if near > least and near > _DETOUR * tensor.across[place]:
            found[tensor.held[place]] = near / max(tensor.across[place], least / _ROUNDING)
    if not found:
        intervals = [later - earlier for earlier, later in itertools.pairwise(steps[index] for index in tensor.held)]
        for place, index in ((0, tensor.held[0]), (len(intervals) - 1, tensor.held[-1])):
            factor = _abruptness(tensor.rest[1:], intervals, place, least)
            if factor > _ABRUPT:
                found[index] = factor
    return found


def _abruptness(distances: Sequence[float], intervals: Sequence[int], place: int, least: float) -> float:
    """How many times what the others let expect the first or the last distance is; 0 where that cannot be told.

    A distance grows with the number of steps to a power from 0 (noise about one point) to 1 (a straight line): the
    largest expectation counts. The two next to it count by themselves, since a run that begins fast slows down.
    """
    if len(distances) < _FEWEST_INTERVALS or distances[place] <= least:
        return 0.0
    beside = [place + 1, place + 2] if place == 0 else [place - 1, place - 2]
    others = [other for other in range(len(distances)) if other != place]
    expected = max(
        expectation
        for power in (0.0, 0.5, 1.0)
        for expectation in _expectations(distances, intervals, place, others, beside, power)
    )
    return distances[place] / expected if expected > 0 else 0.0


def _expectations(
    distances: Sequence[float],
    intervals: Sequence[int],
    place: int,
    others: Sequence[int],
    beside: Sequence[int],
    power: float,
) -> tuple[float, float]:
    """What a distance should be, by the median of the others and by the larger of the two beside it."""
    scale = max(1, intervals[place]) ** power
    speeds = {other: distances[other] / max(1, intervals[other]) ** power for other in others}
    return scale * statistics.median(speeds.values()), scale * max(speeds[other] for other in beside)


def _told_foreign(
    steps: Sequence[int], tensors: Sequence[TensorStatistics], foreign: Sequence[dict[int, float]]
) -> list[Finding]:
    """One finding for a checkpoint most of whose tensors are foreign, otherwise one for each of them."""
    comparable = [tensor for tensor in tensors if tensor.numel >= _FEWEST_ELEMENTS and any(tensor.distance)]
    by_index: dict[int, list[tuple[float, str]]] = {}
    for tensor, places in zip(tensors, foreign, strict=True):
        for index, factor in places.items():
            by_index.setdefault(index, []).append((factor, tensor.name))
    found = []
    for index, named in sorted(by_index.items()):
        step = steps[index]
        if len(named) >= max(2, _MOST_OF * len(comparable)):
            factor = statistics.median(factor for factor, _ in named)
            message = (
                f"step {step}: the checkpoint is foreign: {_far(factor)}, in {len(named)} of {len(comparable)} tensors."
            )
            found.append(Finding("foreign", step, None, message))
            continue
        found += [
            Finding(
                "foreign",
                step,
                name,
                f"step {step}: tensor {name!r} is foreign: {_far(factor)}.",
            )
            for factor, name in sorted(named, key=lambda each: each[1])
        ]
    return found


def _far(factor: float) -> str:
    return f"{factor:.3g} times as far from the checkpoints beside it as is usual"
