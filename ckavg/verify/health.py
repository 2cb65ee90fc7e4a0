"""`inspect --deep`: reads all weights of a run once and checks them.

There are four checks: NaN and infinity, saves equal to the one before, tensors that never move, and checkpoints that
stand out. All comparisons are relative, so a warm-up, a decaying learning rate, uneven intervals and the rounding of
16-bit weights do not count as damage.

Differences are taken in float32 (float64 if any checkpoint is), summed by tile, then in float64. A tile with NaN or
infinity is measured again in float64, without those elements.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import statistics
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ckavg.checkpoints.fingerprints import check_unchanged
from ckavg.checkpoints.run import Checkpoint, TensorInfo, running_statistics
from ckavg.engine.blocks import TILE, Block, cut_blocks
from ckavg.engine.context import Context, OnProgress, Progress
from ckavg.engine.stream import by_tensor, stream
from ckavg.engine.tiles import TORCH_DTYPES, TileReader
from ckavg.errors import ReadError, short_repr
from ckavg.path.sums import EXTREME, scaled, times_power
from ckavg.path.table import fsum
from ckavg.storage.base import AnyPath
from ckavg.storage.remote import local_path
from ckavg.verify.files import hashes
from ckavg.verify.findings import Finding

_DETOUR = 8.0
"""A checkpoint stands out if its distance to both neighbours is this many times the distance between those. That ratio
is 1 for noise about one point, 0.7 for a random walk, 0.5 for a straight line. The first and the last checkpoint have
one neighbour: their interval must be this many times all others."""

_FEWEST_ELEMENTS = 64
"""Smaller tensors are not compared: they may return to earlier values by chance."""

_FEWEST_INTERVALS = 3
"""How many other intervals with movement are needed to judge the first or the last interval."""

_MOST_TENSORS = 0.5
"""The fraction of tensors in which a checkpoint must stand out to be reported as a whole."""

_TIMES = "times the usual distance from its neighbours"
_NAN, _INFINITE, _SIZE, _DISTANCE, _ACROSS = range(5)


@dataclass(frozen=True, slots=True)
class Health:
    """The outcome of reading all weights once.

    Attributes:
        steps: optimizer step of every checkpoint that was read.
        findings: problems first, then by kind and in the order of the steps.
        path: ℓ_k − ℓ_{k−1} of each checkpoint except the first; None if weights are not finite or none count.
        sha256: SHA-256 of every weight file, in hexadecimal, by its path below the source; empty unless asked for.
        bytes_read: bytes of checkpoints read.
    """

    steps: tuple[int, ...]
    findings: tuple[Finding, ...]
    path: tuple[float | None, ...]
    sha256: Mapping[str, str]
    bytes_read: int

    __repr__ = short_repr


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorStatistics:
    """Measurements of a floating tensor. Every tuple has one number for each checkpoint that has the tensor.

    Elements that are NaN or infinite in either of two checkpoints do not count in their distance.

    Attributes:
        name: the tensor's name.
        numel: its number of elements.
        held: index of each checkpoint that has it in this shape.
        epsilon: machine epsilon of the coarsest dtype in which it is stored.
        sigma: standard deviation of its finite elements in the first checkpoint, ddof = 1; 0 for fewer than two.
        nan: how many elements are NaN.
        infinite: how many are infinite, except those with the same infinity in all checkpoints.
        size: ‖θ_k‖₁.
        distance: ‖θ_k − θ_{k−1}‖₁; 0 at the first.
        across: ‖θ_{k+1} − θ_{k−1}‖₁; 0 at both ends.
    """

    name: str
    numel: int
    held: tuple[int, ...]
    epsilon: float
    sigma: float
    nan: tuple[int, ...]
    infinite: tuple[int, ...]
    size: tuple[float, ...]
    distance: tuple[float, ...]
    across: tuple[float, ...]

    def is_finite(self, *places: int) -> bool:
        """Whether the checkpoints at these positions of `held` (none given: all) have neither NaN nor infinity."""
        return not any(self.nan[place] or self.infinite[place] for place in places or range(len(self.held)))


@dataclass(frozen=True, slots=True)
class _Partial:
    """Sums over some elements.

    Attributes:
        rows: (5, checkpoints) float64, numbered as above.
        moments: count, Σ and Σ² of the finite elements of the first checkpoint, minus the first element, in units of
            2^exponent.
        exponent: from the first finite element.
    """

    rows: NDArray[np.float64]
    moments: NDArray[np.float64]
    exponent: int = 0

    @property
    def is_finite(self) -> bool:
        return bool(np.isfinite(self.rows).all())


def examine(
    source: AnyPath,
    checkpoints: Sequence[Checkpoint],
    *,
    sha256: bool = False,
    on_progress: OnProgress | None = None,
) -> Health:
    """Read all weights of some checkpoints, whose tensors may differ, and check them.

    Args:
        source: the directory to which names of files are relative.
        checkpoints: ordered by step, the anchor first.
        sha256: also hash every weight file, which reads it again; remote files must have been downloaded.
        on_progress: called from time to time in this thread.

    Raises:
        ChangedError, TruncatedShardError, ReadError: a file changed or cannot be read.
    """
    shards = [shard for checkpoint in checkpoints for shard in checkpoint.shards] if sha256 else []
    tensors, done = measure_tensors(checkpoints, on_progress, more_bytes=sum(shard.nbytes for shard in shards))
    bytes_read = done + sum(shard.nbytes for shard in shards)
    named: dict[str, str] = {}
    files = (local_path(shard.path) or Path(shard.path) for shard in shards)
    for shard, digest in zip(shards, hashes(files), strict=True):
        if isinstance(digest, ReadError):
            raise digest
        try:
            named[shard.path.relative_to(source).as_posix()] = digest
        except ValueError:  # an anchor outside the run
            named[str(shard.path)] = digest
        done += shard.nbytes
        if on_progress is not None:
            on_progress(Progress("health", done, bytes_read))
    check_unchanged(checkpoints)
    steps = tuple(checkpoint.step for checkpoint in checkpoints)
    path = tuple(_path_between(tensors, *pair) for pair in itertools.pairwise(range(len(steps))))
    return Health(steps, find(steps, tensors), path, named, bytes_read)


def _path_between(tensors: Sequence[TensorStatistics], before: int, after: int) -> float | None:
    """The growth of the path length: (1/N) Σ_p ‖θ_k,p − θ_{k−1},p‖₁ / σ_p, over the tensors that both have."""
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
    """All findings: non-finite values first, then by kind, each in the order of the steps. Pure."""
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
            kinds = {"NaN": nan, "infinite": infinite}
            counts = " and ".join(f"{count:,} {kind}" for kind, count in kinds.items() if count)
            message = f"step {steps[index]}: tensor {tensor.name!r} holds {counts} of {tensor.numel:,}."
            yield Finding("nonfinite", message, step=steps[index], tensor=tensor.name)


def _stale(steps: Sequence[int], tensors: Sequence[TensorStatistics]) -> Iterator[Finding]:
    """Checkpoints in which every tensor equals that of the one before."""
    has_moved: dict[tuple[int, int], bool] = {}
    for tensor in tensors:
        for place, pair in enumerate(itertools.pairwise(tensor.held), start=1):
            moved = tensor.distance[place] > 0 or not tensor.is_finite(place - 1, place)
            has_moved[pair] = has_moved.get(pair, False) or moved
    for (before, after), moved in sorted(has_moved.items()):
        if after == before + 1 and not moved:
            message = f"step {steps[after]}: all weights equal those of step {steps[before]}: a stale save?"
            yield Finding("stale", message, is_problem=False, step=steps[after])


def _frozen(tensors: Sequence[TensorStatistics]) -> list[Finding]:
    """Tensors that never move, if others do."""
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
            message = (
                f"step {step}: the checkpoint stands out: {statistics.median(named.values()):.3g} {_TIMES}{where}."
            )
            yield Finding("foreign", message, is_problem=False, step=step)
            continue
        for name, factor in sorted(named.items()):
            message = f"step {step}: tensor {name!r} stands out: {factor:.3g} {_TIMES}."
            yield Finding("foreign", message, is_problem=False, step=step, tensor=name)


def _detour(steps: Sequence[int], tensor: TensorStatistics, place: int) -> float:
    """The distance of a checkpoint from its neighbours in multiples of the usual one; 0 if that is unknown.

    Distances below one rounding of every element are ignored.
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
    """The first or the last distance, and the largest of the others scaled to the same number of steps.

    A distance grows with the steps by a power between 0 (noise about one point) and 1 (a straight line). The power that
    gives the larger value is used.
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


def measure_tensors(
    checkpoints: Sequence[Checkpoint], on_progress: OnProgress | None = None, *, more_bytes: int = 0
) -> tuple[list[TensorStatistics], int]:
    """Measure every floating tensor of some checkpoints, which may have different tensors.

    Args:
        checkpoints: ordered by step.
        on_progress: called from time to time in this thread.
        more_bytes: bytes that will be read later, for the total of the progress.

    Returns:
        The statistics of each tensor, and the bytes read.

    Raises:
        TruncatedShardError, ReadError: a file changed or cannot be read.
    """
    groups = _groups(checkpoints)
    total = more_bytes + sum(
        checkpoints[index].entries[name].nbytes
        for held, tensors in groups.items()
        for index in held
        for name in tensors
    )
    measured: list[TensorStatistics] = []
    bytes_read = 0
    for held, tensors in groups.items():

        def tell(news: Progress, before: int = bytes_read) -> None:
            if on_progress is not None:
                on_progress(Progress("health", before + news.done, total))

        some, blocks = [checkpoints[index] for index in held], cut_blocks(tensors)

        def make_worker(reader: TileReader, some: Sequence[Checkpoint] = some) -> Callable[[Block], _Partial]:
            return _Worker(some, reader)

        streamed = stream("health", some, blocks, make_worker, Context(on_progress=tell))
        for name, parts in by_tensor(blocks, streamed.results).items():
            dtypes = [each.entries[name].dtype for each in some]
            measured.append(_statistics(name, tensors[name].numel, held, dtypes, parts))
        bytes_read += streamed.bytes_read
    return measured, bytes_read


def _groups(checkpoints: Sequence[Checkpoint]) -> dict[tuple[int, ...], dict[str, TensorInfo]]:
    """The floating tensors with elements, by the checkpoints that have them in one shape. A sound run has one group."""
    held: dict[tuple[str, tuple[int, ...]], list[int]] = {}
    for index, checkpoint in enumerate(checkpoints):
        for name, entry in checkpoint.entries.items():
            if entry.is_floating and entry.numel:
                held.setdefault((name, entry.shape), []).append(index)
    groups: dict[tuple[int, ...], dict[str, TensorInfo]] = {}
    for (name, _), indices in held.items():
        groups.setdefault(tuple(indices), {})[name] = checkpoints[indices[-1]].entries[name]
    return groups


def _statistics(
    name: str, numel: int, held: tuple[int, ...], dtypes: Sequence[str], parts: Sequence[_Partial]
) -> TensorStatistics:
    rows = sum((part.rows for part in parts[1:]), start=parts[0].rows).tolist()
    return TensorStatistics(
        name=name,
        numel=numel,
        held=held,
        epsilon=max(torch.finfo(TORCH_DTYPES[dtype]).eps for dtype in dtypes),
        sigma=_sigma(parts),
        nan=tuple(map(int, rows[_NAN])),
        infinite=tuple(map(int, rows[_INFINITE])),
        size=tuple(rows[_SIZE]),
        distance=tuple(rows[_DISTANCE]),
        across=tuple(rows[_ACROSS]),
    )


def _sigma(parts: Sequence[_Partial]) -> float:
    """σ from moments about one element of the tensor, so it is exactly 0 if all elements are equal."""
    count, total, squares = (fsum(part.moments[place] for part in parts) for place in range(3))
    if count < 2 or not math.isfinite(squares):
        return 0.0 if count < 2 else math.inf
    sigma = math.sqrt(max(0.0, squares - total * total / count) / (count - 1))
    return scaled(sigma, parts[0].exponent)


def _exponent(first: float) -> int:
    """The exponent of the unit for squares in float64, so that extreme values do not overflow; 0 for usual values."""
    exponent = math.frexp(first)[1]
    return exponent if abs(exponent) > EXTREME else 0


class _Worker:
    """Measures blocks one after another in one thread. Memory does not grow with the number of checkpoints."""

    def __init__(self, checkpoints: Sequence[Checkpoint], reader: TileReader) -> None:
        self._checkpoints = checkpoints
        self._reader = reader
        self._buffer = torch.empty(4 * TILE, dtype=torch.float64)

    def __call__(self, block: Block) -> _Partial:
        is_wide = any(each.entries[block.name].dtype == "F64" for each in self._checkpoints)
        dtype = torch.float64 if is_wide else torch.float32
        whole = _Partial(np.zeros((5, len(self._checkpoints))), np.zeros(3))
        for start, stop in block.tiles(TILE):
            part = self._measure(block.name, start, stop, dtype)
            if not part.is_finite:  # NaN, infinity, or a sum that overflows float32
                same = self._reader.same_infinities(block.name, start, stop, range(len(self._checkpoints)))
                part = self._measure(block.name, start, stop, torch.float64, same)
            whole = _Partial(whole.rows + part.rows, whole.moments + part.moments)
        return dataclasses.replace(whole, exponent=_exponent(self._reader.first_finite(block.name)))

    def _measure(self, name: str, start: int, stop: int, dtype: torch.dtype, same: Tensor | None = None) -> _Partial:
        """The sums over elements `start` to `stop`, computed in `dtype`.

        If some are not finite, `same` (n,) has the infinities that are equal in all checkpoints.
        """
        rows = np.zeros((5, len(self._checkpoints)))
        moments = np.zeros(3)
        *thetas, spare = self._buffer.view(dtype).view(4, -1)[:, : stop - start]
        for place in range(len(self._checkpoints)):
            now, before, earlier = (thetas[(place - back) % 3] for back in range(3))
            self._reader.load(place, name, start, now)
            if same is not None:
                rows[_NAN, place] = int(now.isnan().sum())
                rows[_INFINITE, place] = int((now.isinf() & (now != same)).sum())
                now.masked_fill_(now.isinf(), math.nan)
            if place == 0:
                moments = self._moments(name, now if same is None else now[~now.isnan()])
            rows[_SIZE, place] = _sum(torch.abs(now, out=spare), same)
            if place > 0:
                rows[_DISTANCE, place] = _sum(torch.sub(now, before, out=spare).abs_(), same)
            if place > 1:
                rows[_ACROSS, place - 1] = _sum(torch.sub(now, earlier, out=spare).abs_(), same)
        return _Partial(rows, moments)

    def _moments(self, name: str, values: Tensor) -> NDArray[np.float64]:
        first = self._reader.first_finite(name)
        exponent = _exponent(first)
        shifted = times_power(values.double(), -exponent).sub_(math.ldexp(first, -exponent))
        return np.array([len(shifted), float(shifted.sum()), float(shifted.square_().sum())])


def _sum(values: Tensor, same: Tensor | None) -> float:
    """The sum; with `same`, without NaN."""
    return float(values.sum() if same is None else values.nansum())
