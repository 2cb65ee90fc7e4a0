"""What `inspect --deep` measures: one pass over all floating tensors of some checkpoints, on the engine of the passes.

Differences are taken in float32 (float64 where any checkpoint is) and summed by tile, then in float64. A tile that
holds NaN or infinity is measured once more in float64, without those elements.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ckavg.checkpoints.run import Checkpoint, TensorInfo
from ckavg.engine.blocks import TILE, Block, cut_blocks
from ckavg.engine.context import Context, OnProgress, Progress
from ckavg.engine.stream import by_tensor, stream
from ckavg.engine.tiles import TORCH_DTYPES, TileReader
from ckavg.path.measure import EXTREME, scaled, times_power
from ckavg.path.table import fsum

_NAN, _INFINITE, _SIZE, _DISTANCE, _ACROSS = range(5)


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorStatistics:
    """What was measured of a floating tensor. Every tuple has one number for each checkpoint that holds it.

    Elements that are NaN or infinite in either of two checkpoints add nothing to the distance between them.

    Attributes:
        name: the tensor's name.
        numel: its number of elements.
        held: index of each checkpoint that holds it, in this shape.
        epsilon: distance from 1 to the next number of the coarsest dtype in which it is stored.
        sigma: standard deviation of its finite elements in the first of them, ddof = 1; 0 of fewer than two.
        nan: how many elements are NaN.
        infinite: how many are infinite, but for those that are the same infinity in all checkpoints.
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
        """Whether neither NaN nor infinity was found in the checkpoints at some places of `held`; none: in all."""
        return not any(self.nan[place] or self.infinite[place] for place in places or range(len(self.held)))


@dataclass(frozen=True, slots=True)
class _Partial:
    """Sums over some elements.

    Attributes:
        rows: (5, checkpoints) float64, numbered as above.
        moments: count, Σ and Σ² of the finite elements of the first checkpoint less the first of them, in units of
            2^exponent.
        exponent: by the first of them.
    """

    rows: NDArray[np.float64]
    moments: NDArray[np.float64]
    exponent: int = 0

    @property
    def is_finite(self) -> bool:
        return bool(np.isfinite(self.rows).all())


def measure_tensors(
    checkpoints: Sequence[Checkpoint], *, on_progress: OnProgress | None = None, more_bytes: int = 0
) -> tuple[list[TensorStatistics], int]:
    """Measure every floating tensor of some checkpoints; they need not hold the same ones.

    Args:
        checkpoints: ordered by step.
        on_progress: called now and then in this thread.
        more_bytes: what will be read after this, for the total of the progress.

    Returns:
        The statistics of each tensor, and how many bytes were read.

    Raises:
        TruncatedShardError, ReadError: a file changed or cannot be read.
    """
    groups = _groups(checkpoints)
    sizes = [
        sum(checkpoints[index].entries[name].nbytes for index in held for name in tensors)
        for held, tensors in groups.items()
    ]
    total = sum(sizes) + more_bytes
    measured: list[TensorStatistics] = []
    bytes_read = 0
    for place, (held, tensors) in enumerate(groups.items()):

        def tell(news: Progress, before: int = sum(sizes[:place])) -> None:
            if on_progress is not None:
                on_progress(Progress("health", before + news.done, total))

        of_group, nbytes = _measure_group([checkpoints[index] for index in held], held, tensors, tell)
        measured += of_group
        bytes_read += nbytes
    return measured, bytes_read


def _groups(checkpoints: Sequence[Checkpoint]) -> dict[tuple[int, ...], dict[str, TensorInfo]]:
    """The floating tensors with elements, by the checkpoints that hold them in one shape; one group in a sound run."""
    held: dict[tuple[str, tuple[int, ...]], list[int]] = {}
    for index, checkpoint in enumerate(checkpoints):
        for name, entry in checkpoint.entries.items():
            if entry.is_floating and entry.numel:
                held.setdefault((name, entry.shape), []).append(index)
    groups: dict[tuple[int, ...], dict[str, TensorInfo]] = {}
    for (name, _), indices in held.items():
        groups.setdefault(tuple(indices), {})[name] = checkpoints[indices[-1]].entries[name]
    return groups


def _measure_group(
    checkpoints: Sequence[Checkpoint], held: tuple[int, ...], tensors: Mapping[str, TensorInfo], tell: OnProgress
) -> tuple[list[TensorStatistics], int]:
    blocks = cut_blocks(tensors)

    def make_worker(reader: TileReader) -> Callable[[Block], _Partial]:
        return _Worker(checkpoints, reader)

    streamed = stream("health", checkpoints, blocks, make_worker, Context(on_progress=tell))
    measured = [
        _statistics(name, tensors[name].numel, held, [each.entries[name].dtype for each in checkpoints], parts)
        for name, parts in by_tensor(blocks, streamed.results).items()
    ]
    return measured, streamed.bytes_read


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
    """From moments about an element of the tensor: exactly 0 where all are equal."""
    count, total, squares = (fsum(part.moments[place] for part in parts) for place in range(3))
    if count < 2 or not math.isfinite(squares):
        return 0.0 if count < 2 else math.inf
    sigma = math.sqrt(max(0.0, squares - total * total / count) / (count - 1))
    return scaled(sigma, parts[0].exponent)


def _exponent(first: float) -> int:
    """Of the unit in which squares of float64 numbers are formed; 0 but for extreme ones, by the first of a tensor."""
    exponent = math.frexp(first)[1]
    return exponent if abs(exponent) > EXTREME else 0


class _Worker:
    """Measures one block after another, in one thread. Memory does not grow with the number of checkpoints."""

    def __init__(self, checkpoints: Sequence[Checkpoint], reader: TileReader) -> None:
        self._checkpoints = checkpoints
        self._reader = reader
        self._buffers: dict[torch.dtype, Tensor] = {}

    def __call__(self, block: Block) -> _Partial:
        is_wide = any(each.entries[block.name].dtype == "F64" for each in self._checkpoints)
        dtype = torch.float64 if is_wide else torch.float32
        whole = _Partial(np.zeros((5, len(self._checkpoints))), np.zeros(3))
        for start, stop in block.tiles(TILE):
            part = self._measure(block.name, start, stop, dtype)
            if not part.is_finite:  # NaN or infinity, or a sum that is beyond float32
                same = self._reader.same_infinities(block.name, start, stop)
                part = self._measure(block.name, start, stop, torch.float64, same)
            whole = _Partial(whole.rows + part.rows, whole.moments + part.moments)
        return dataclasses.replace(whole, exponent=_exponent(self._reader.first_finite(block.name)))

    def _measure(self, name: str, start: int, stop: int, dtype: torch.dtype, same: Tensor | None = None) -> _Partial:
        """The sums over elements `start` to `stop`.

        Args:
            name, start, stop: which elements.
            dtype: what is computed in.
            same: (n,) which of them are the same infinity in all checkpoints; given where some are not finite.
        """
        rows = np.zeros((5, len(self._checkpoints)))
        moments = np.zeros(3)
        *thetas, spare = self._workspace(dtype)[:, : stop - start]
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

    def _workspace(self, dtype: torch.dtype) -> Tensor:
        if dtype not in self._buffers:
            self._buffers[dtype] = torch.empty(4, TILE, dtype=dtype)
        return self._buffers[dtype]


def _sum(values: Tensor, same: Tensor | None) -> float:
    """Their sum; where some may be NaN, of the others."""
    return float(values.sum() if same is None else values.nansum())
