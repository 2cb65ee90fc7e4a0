"""Pass 1: stream every checkpoint once and measure σ of the anchor and the L1 distance of every step.

Differences are taken in float32 (float64 for float64 checkpoints). Sums are formed in one fixed order, whatever the
tile size and the number of threads: 16 absolute differences in float32, then everything in float64.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from ckavg.engine.blocks import CHUNK, Block, cut_blocks
from ckavg.engine.stream import Settings, stream
from ckavg.engine.tiles import TORCH_DTYPES, TileReader
from ckavg.path.fused import DTYPES as KERNEL_DTYPES
from ckavg.path.fused import Distances, load_kernel
from ckavg.path.known import Known, Measured, ToMeasure
from ckavg.path.table import PathLength, ZeroSigma, counts
from ckavg.run.values import Entry, Run

_LANES = 1024
_SUMMED_IN_WORK_DTYPE = CHUNK // _LANES
_ROWS = 16
"""Steps whose lanes are kept until they are summed: 1 MiB each in a tile of a whole block."""


@dataclass(frozen=True, slots=True)
class _Partial:
    """Of one block: the L1 distances that were measured, and the moments of θ_0 about the tensor's first element."""

    distances: tuple[float, ...]
    shifted_sum: float
    shifted_squares: float


def measure(
    run: Run,
    *,
    exclude: tuple[str, ...] = (),
    zero_sigma: ZeroSigma = "exclude",
    known: Known | None = None,
    settings: Settings | None = None,
) -> PathLength:
    """Measure the path length of a run, or what is not known of it.

    Args:
        run: the checkpoints, the anchor first.
        exclude: shell patterns of tensor names that do not count.
        zero_sigma: what becomes of tensors without spread; see `PathLength`.
        known: what was measured before; the checkpoints it covers on both sides are not read.
        settings: how the pass runs.

    Raises:
        NonFiniteError: a checkpoint holds NaN or infinity.
        TruncatedShardError, ReadError: a file changed or cannot be read.
    """
    settings = settings or Settings()
    entries = {name: entry for name, entry in run.tensors.items() if entry.is_floating and counts(name, exclude)}
    work = (known or Known.nothing(run)).left_to_measure(name for name, entry in entries.items() if entry.numel)
    if not work.to_read:
        return PathLength(run.steps, work.completed(entries, {}), zero_sigma, 0, kernel=None)
    blocks = cut_blocks(entries)
    kernel = _kernel(run, entries, work, settings)

    def make_worker(reader: TileReader) -> _Worker:
        return _Worker(run, work, reader, kernel, tile=settings.tile, device=settings.device)

    streamed = stream("path", [run.checkpoints[index] for index in work.to_read], blocks, make_worker, settings)
    measured = _merged(entries, blocks, streamed.results, work)
    how: Literal["torch", "numba"] = "torch" if kernel is None else "numba"
    return PathLength(run.steps, work.completed(entries, measured), zero_sigma, streamed.bytes_read, kernel=how)


def _kernel(run: Run, entries: Mapping[str, Entry], work: ToMeasure, settings: Settings) -> Distances | None:
    """The compiled kernel, where it works, in all processes, and is worth loading."""
    nbytes = sum(run.checkpoints[index].entries[name].nbytes for index in work.to_read for name in work.names)
    if settings.device != "cpu" or nbytes < settings.compiled_from_bytes:
        return None
    kernel = load_kernel()
    return kernel if all(settings.ranks.gather(kernel is not None)) else None


def _merged(
    entries: Mapping[str, Entry], blocks: Sequence[Block], partials: Sequence[_Partial], work: ToMeasure
) -> Mapping[str, Measured]:
    of_tensor: dict[str, list[_Partial]] = defaultdict(list)
    for block, partial in zip(blocks, partials, strict=True):
        of_tensor[block.name].append(partial)
    return {
        name: Measured(
            _sigma(entries[name].numel, parts),
            {step: math.fsum(part.distances[place] for part in parts) for place, step in enumerate(work.steps)},
        )
        for name, parts in of_tensor.items()
    }


def _sigma(numel: int, partials: Sequence[_Partial]) -> float:
    """Standard deviation from moments about an element of the tensor.

    About an element rather than 0, so that a tensor of equal values gives exactly 0; and since no element is further
    than √n standard deviations from the mean, little is lost to cancellation whichever element it is.
    """
    if numel < 2:
        return 0.0
    total = math.fsum(part.shifted_sum for part in partials)
    squares = math.fsum(part.shifted_squares for part in partials)
    return math.sqrt(max(0.0, squares - total * total / numel) / (numel - 1))


class _Worker:
    """Pass 1 over one block after another, in one thread."""

    def __init__(
        self, run: Run, work: ToMeasure, reader: TileReader, kernel: Distances | None, *, tile: int, device: str
    ) -> None:
        self._run = run
        self._kernel = kernel
        self._work = work
        self._place = {index: place for place, index in enumerate(work.to_read)}
        self._reader = reader
        self._tile = tile
        self._device = device
        self._buffers: dict[torch.dtype, tuple[Tensor, Tensor, Tensor]] = {}
        self._first: tuple[str, float] | None = None
        reader.compute_on(device)

    def __call__(self, block: Block) -> _Partial:
        wide = any(checkpoint.entries[block.name].dtype == "F64" for checkpoint in self._run.checkpoints)
        dtype = torch.float64 if wide else torch.float32
        chunks = -(-(block.stop - block.start) // CHUNK)
        sums = torch.zeros(len(self._work.steps) + 2, chunks, dtype=torch.float64)
        for start, stop in block.tiles(self._tile):
            first = (start - block.start) // CHUNK
            of_tile = self._measure_tile(block.name, start, stop, dtype)
            sums[:, first : first + of_tile.shape[1]] = of_tile
        *distances, total, squares = sums.sum(dim=1).tolist()
        return _Partial(tuple(distances), total, squares)

    def _measure_tile(self, name: str, start: int, stop: int, dtype: torch.dtype) -> Tensor:
        """(steps + 2, chunks) float64: each distance, then Σ and Σ² of θ_0 less its first element; by chunk."""
        sums = self._sum_tile(name, start, stop, dtype)
        if bool(torch.isfinite(sums).all()):
            return sums
        self._reader.refuse_nonfinite(name, start, stop)
        return self._sum_tile(name, start, stop, torch.float64)  # finite weights whose float32 sum overflowed

    def _sum_tile(self, name: str, start: int, stop: int, dtype: torch.dtype) -> Tensor:
        stored = {TORCH_DTYPES[self._run.checkpoints[index].entries[name].dtype] for index in self._work.to_read}
        if self._kernel is not None and dtype == torch.float32 and len(stored) == 1 and stored <= KERNEL_DTYPES:
            return self._sum_as_stored(self._kernel, name, start, stop, stored.pop())
        before, after, lanes = self._workspace(dtype)
        size = stop - start
        chunks = -(-size // CHUNK)
        padded = chunks * CHUNK
        if size < padded:
            before[size:padded].zero_()
            after[size:padded].zero_()
        moments = torch.zeros(2, chunks, dtype=torch.float64, device=self._device)
        distances = []
        loaded = None
        if self._work.anchor:
            loaded = 0
            self._load(0, name, start, before[:size])
            moments = self._moments(name, before, size, padded)
        for place, step in enumerate(self._work.steps):
            row = place % _ROWS
            if loaded != step - 1:
                self._load(step - 1, name, start, before[:size])
            self._load(step, name, start, after[:size])
            torch.sub(after[:padded], before[:padded], out=before[:padded]).abs_()
            _sum(_in_lanes(before[:padded]), dim=1, out=lanes[row, :chunks])
            before, after, loaded = after, before, step
            if row == _ROWS - 1 or place == len(self._work.steps) - 1:
                distances.append(_sum(lanes[: row + 1, :chunks], dim=2, dtype=torch.float64))
        return torch.cat([*distances, moments]).cpu()

    def _sum_as_stored(self, kernel: Distances, name: str, start: int, stop: int, dtype: torch.dtype) -> Tensor:
        """The same with the compiled kernel, which takes tiles as they are stored."""
        before, after, _ = self._workspace(dtype)
        size = stop - start
        chunks = -(-size // CHUNK)
        padded = chunks * CHUNK
        before[size:padded].zero_()
        after[size:padded].zero_()
        sums = torch.zeros(len(self._work.steps) + 2, chunks, dtype=torch.float64)
        loaded = None
        if self._work.anchor:
            loaded = 0
            self._load(0, name, start, before[:size])
            sums[-2:] = self._moments(name, before[:padded].float(), size, padded)
        for row, step in enumerate(self._work.steps):
            if loaded != step - 1:
                self._load(step - 1, name, start, before[:size])
            self._load(step, name, start, after[:size])
            kernel(before[:padded], after[:padded], sums[row])
            before, after, loaded = after, before, step
        return sums

    def _load(self, index: int, name: str, start: int, out: Tensor) -> None:
        self._reader.load(self._place[index], name, start, out)

    def _moments(self, name: str, anchor: Tensor, size: int, padded: int) -> Tensor:
        shifted = anchor[:padded].to(torch.float64, copy=True)
        shifted[:size] -= self._first_element(name, anchor.dtype)
        total = _sum(_sum(_in_lanes(shifted), dim=1), dim=1)
        squares = _sum(_sum(_in_lanes(shifted.square_()), dim=1), dim=1)
        return torch.stack([total, squares])

    def _first_element(self, name: str, dtype: torch.dtype) -> float:
        if self._first is None or self._first[0] != name:
            first = torch.empty(1, dtype=dtype)
            self._load(0, name, 0, first)
            self._first = (name, float(first))
        return self._first[1]

    def _workspace(self, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
        if dtype not in self._buffers:
            rows = min(len(self._work.steps), _ROWS)
            self._buffers[dtype] = (
                torch.empty(self._tile, dtype=dtype, device=self._device),
                torch.empty(self._tile, dtype=dtype, device=self._device),
                torch.empty(rows, self._tile // CHUNK, _LANES, dtype=dtype, device=self._device),
            )
        return self._buffers[dtype]


def _in_lanes(values: Tensor) -> Tensor:
    return values.view(-1, _SUMMED_IN_WORK_DTYPE, _LANES)


def _sum(values: Tensor, dim: int, *, dtype: torch.dtype | None = None, out: Tensor | None = None) -> Tensor:
    """Sum over a dimension of 2ⁿ elements, always in the same order.

    On a GPU, torch's order hangs on the shape of the whole, and so on the tile: halves are added there instead.
    """
    if values.device.type == "cpu":
        return torch.sum(values, dim, dtype=dtype, out=out)
    total = sum_by_halves(values if dtype is None else values.to(dtype), dim)
    return total if out is None else out.copy_(total)


def sum_by_halves(values: Tensor, dim: int) -> Tensor:
    """Sum over a dimension of 2ⁿ elements: its second half added to its first, until one is left."""
    while values.shape[dim] > 1:
        first, second = values.chunk(2, dim)
        values = first + second
    return values.squeeze(dim)
