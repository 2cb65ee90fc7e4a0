"""Pass 1: stream every checkpoint once and measure σ of the anchor and the L1 distance of every step.

Differences are taken in float32 (float64 for float64 checkpoints). Sums are formed in one fixed order, whatever the
tile size and the number of threads: 16 absolute differences in float32, then everything in float64.
"""

from __future__ import annotations

import itertools
import math
import sys
from array import array
from collections.abc import Iterator, Sequence
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ckavg.checkpoints.run import ITEM_BYTES, Run, distinct_tables
from ckavg.engine.blocks import BLOCK, CHUNK, COLUMNS, Block, cut_blocks
from ckavg.engine.coalescing import Group, by_dtype
from ckavg.engine.context import Context
from ckavg.engine.stream import is_worth_compiling, stream_groups
from ckavg.engine.tiles import TileReader
from ckavg.path.coalesced import GroupDistances
from ckavg.path.journal import PathJournal
from ckavg.path.kernels import CompiledSums, Kernel, load_kernel
from ckavg.path.plan import PathPlan, PathReading, plan_path
from ckavg.path.table import PathLength, TensorPaths, ZeroSigma, fsum, refuse_infinite

_SUMMED_IN_WORK_DTYPE = CHUNK // COLUMNS
EXTREME = 400
"""Exponents beyond which, either way, squares of float64 numbers are formed in another unit."""

_LARGE = 2.0**1000
_ROWS = 16
"""Steps whose lanes are kept until they are summed: 1 MiB each in a tile of a whole block."""

_MOMENTS = 4
"""What follows the distances of a path in a row: Σ and Σ² of θ_0 about its first element, in units of 2^exponent, then
that exponent, which is 0 but for extreme spreads, and how many infinities are not in them."""


def measure(
    run: Run,
    plan: PathPlan | None = None,
    *,
    zero_sigma: ZeroSigma = "exclude",
    allow_nonfinite: bool = False,
    context: Context | None = None,
    path_journal: PathJournal | None = None,
) -> PathLength:
    """Measure the path length of a run, or what is not cached of it.

    Args:
        run: the checkpoints, the anchor first.
        plan: which tensors count, and what need not be measured; None: all tensors, all checkpoints.
        zero_sigma, allow_nonfinite, context, path_journal: as of `measure_paths`.

    Raises:
        CkavgError: as of `measure_paths`.
    """
    reading = PathReading.single(plan or plan_path(run, anew=True))
    (path,) = measure_paths(
        run,
        reading,
        zero_sigma=zero_sigma,
        allow_nonfinite=allow_nonfinite,
        context=context,
        path_journal=path_journal,
    )
    return path


def measure_paths(
    run: Run,
    reading: PathReading,
    *,
    zero_sigma: ZeroSigma = "exclude",
    allow_nonfinite: bool = False,
    context: Context | None = None,
    path_journal: PathJournal | None = None,
) -> tuple[PathLength, ...]:
    """Measure the paths of several selections from a run in one reading, each as it would be by itself.

    Args:
        run: all checkpoints that any of them visits, by step.
        reading: which tensors count, which checkpoints each path visits, and what need not be measured.
        zero_sigma: what becomes of tensors without spread; see `PathLength`.
        allow_nonfinite: tensors that hold NaN or infinity do not count, instead of ending the pass.
        context: how the pass runs.
        path_journal: where single blocks are kept until all are measured.

    Raises:
        NonFiniteError: a checkpoint holds NaN or infinity, and may not.
        TruncatedShardError, ReadError: a file changed or cannot be read.
    """
    context = context or Context()
    names = reading.plans[0].names
    blocks = cut_blocks({name: run.tensors[name] for name in names})
    read = [run.checkpoints[index] for index in reading.to_read]
    compiled = is_worth_compiling(read, blocks, context) and any(
        map(load_kernel, {table[name].dtype for table, _ in distinct_tables(read) for name in names})
    )
    rows, bytes_read = np.empty((0, 0)), 0
    if read:

        def make_worker(reader: TileReader) -> _Worker:
            return _Worker(run, reading, reader, allow_nonfinite=allow_nonfinite, compiled=compiled, context=context)

        measured = [
            (places, plan.steps, plan.needs_sigma) for plan, places in zip(reading.plans, reading.places, strict=True)
        ]
        asked = BLOCK, names, measured, allow_nonfinite, torch.device(context.device).type
        journal = path_journal.journal(asked, _to_json, _from_json) if path_journal else None
        streamed = stream_groups("path", read, blocks, make_worker, by_dtype(run.checkpoints), context, journal)
        rows, bytes_read = np.frombuffer(b"".join(streamed.results)).reshape(len(blocks), -1), streamed.bytes_read
        del streamed  # as large as all rows
    all_steps, paths, end = run.steps, [], 0
    for plan, places in zip(reading.plans, reading.places, strict=True):
        begin, end = end, end + len(plan.steps) + _MOMENTS
        tensors = _completed(run, plan, blocks, rows[:, begin:end] if plan.to_read else None)
        if plan.to_read and not allow_nonfinite:
            refuse_infinite(tensors)
        kernel: Literal["torch", "llvm"] = "llvm" if compiled else "torch"
        steps, is_new = tuple(all_steps[index] for index in places), bool(plan.to_read)
        paths.append(PathLength(steps, tensors, zero_sigma, is_new * bytes_read, kernel=kernel if is_new else None))
    return tuple(paths)


def _to_json(numbers: bytes) -> list[float]:
    return array("d", numbers).tolist()


def _from_json(numbers: list[float]) -> bytes:
    return array("d", numbers).tobytes()


def _completed(run: Run, plan: PathPlan, blocks: Sequence[Block], rows: NDArray[np.float64] | None) -> TensorPaths:
    """What is cached and what was measured, a row for each block in the order of the file, together."""
    numels = array("q", (run.tensors[name].numel for name in plan.names))
    sigmas, distances = plan.cached.sigmas, list(plan.cached.distances)
    if rows is not None:
        begins = [number for number, block in enumerate(blocks) if block.start == 0]
        bounds = list(zip(begins, [*begins[1:], len(blocks)], strict=True))
        bounds.sort(key=lambda each: blocks[each[0]].name)
        found = rows[[begin for begin, _ in bounds]]
        for numbers, (begin, end) in zip(found, bounds, strict=True):
            if end - begin > 1:
                numbers[:-_MOMENTS] = [fsum(each) for each in rows[begin:end, :-_MOMENTS].T.tolist()]
        for step, row in zip(plan.steps, found.T, strict=False):
            distances[step - 1] = array("d", row.tobytes())
        if plan.needs_sigma:
            moments = (rows[begin:end, -_MOMENTS:].tolist() for begin, end in bounds)
            sigmas = array("d", map(_sigma, numels, moments))
    return TensorPaths(plan.names, numels, sigmas, distances)


def _sigma(numel: int, moments: Sequence[Sequence[float]]) -> float:
    """Standard deviation from moments about an element of the tensor.

    About an element rather than 0, so that a tensor of equal values gives exactly 0; and since no element is further
    than √n standard deviations from the mean, little is lost to cancellation whichever element it is.
    """
    if len(moments) == 1:  # nothing to add up, as of any small tensor
        total, squares, exponent, infinite = moments[0]
        return _deviation(numel - infinite, total, squares, int(exponent))
    numel -= int(sum(infinite for *_, infinite in moments))
    if not all(math.isfinite(squares) for _, squares, _, _ in moments):
        return 0.0 if numel < 2 else math.nan
    unit = int(max((exponent for _, squares, exponent, _ in moments if squares), default=0))
    total = math.fsum(math.ldexp(total, int(exponent) - unit) for total, _, exponent, _ in moments)
    squares = math.fsum(math.ldexp(squares, 2 * (int(exponent) - unit)) for _, squares, exponent, _ in moments)
    return _deviation(numel, total, squares, unit)


def _deviation(numel: float, total: float, squares: float, unit: int) -> float:
    """σ from Σ and Σ² in units of 2^unit."""
    if numel < 2:
        return 0.0
    if not math.isfinite(squares):
        return math.nan
    deviation = math.sqrt(max(0.0, squares - total * total / numel) / (numel - 1))
    return scaled(deviation, unit) if unit else deviation


def scaled(value: float, exponent: int) -> float:
    """The value times 2^exponent, infinite where that is too large."""
    return math.ldexp(value, exponent) if math.frexp(value)[1] + exponent <= sys.float_info.max_exp else math.inf


class _Worker:
    """Pass 1 over one block after another, in one thread."""

    def __init__(
        self,
        run: Run,
        reading: PathReading,
        reader: TileReader,
        *,
        allow_nonfinite: bool,
        compiled: bool,
        context: Context,
    ) -> None:
        self._run = run
        self._allow_nonfinite = allow_nonfinite
        self._pairs, self._anchors, self._visits = reading.pairs, reading.anchors, reading.visits
        self._place = {index: place for place, index in enumerate(reading.to_read)}
        self._rows = list(itertools.starmap(self._rows_of, zip(reading.plans, reading.places, strict=True)))
        self._read = [
            [self._place[places[index]] for index in plan.to_read]
            for plan, places in zip(reading.plans, reading.places, strict=True)
        ]
        self._reader = reader
        self._compiled: CompiledSums | None = None
        if compiled:
            pairs = [(self._place[first], self._place[second]) for first, second in self._pairs]
            self._compiled = CompiledSums(reader, pairs, [self._place[index] for index in self._anchors])
        self._tile = context.tile
        self._device = context.device
        self._buffers: dict[torch.dtype, list[Tensor]] = {}
        self._lanes: dict[torch.dtype, Tensor] = {}
        self._groups = GroupDistances(reader, self._visits)
        reader.compute_on(context.device)

    def _rows_of(self, plan: PathPlan, places: tuple[int, ...]) -> list[int]:
        """Which rows of the sums are those of one path: its distances, and the moments of its anchor."""
        pairs = {pair: row for row, pair in enumerate(self._pairs)}
        # After those of all anchors come four rows of zeros, for a path whose σ is known.
        anchor = self._anchors.index(places[0]) if plan.needs_sigma else len(self._anchors)
        first = len(self._pairs) + _MOMENTS * anchor
        return [pairs[places[step - 1], places[step]] for step in plan.steps] + list(range(first, first + _MOMENTS))

    def __call__(self, blocks: Sequence[Block]) -> Sequence[bytes]:
        found = self._measure_group(blocks) if len(blocks) > 1 else None
        return [self._measure(block) for block in blocks] if found is None else found

    def _measure_group(self, blocks: Sequence[Block]) -> list[bytes] | None:
        """What `_measure` gives of each of several small tensors; None where it must take care of them one by one."""
        group, chunk = Group.padded(blocks)
        sums = self._groups.sum(group, chunk, self._dtype(blocks[0].name))
        if sums is None:
            return None
        bounds = list(zip(group.first_chunks.tolist(), group.chunks.tolist(), strict=True))
        by_chunk = sums[list(itertools.chain(*self._rows))].T.contiguous().numpy()
        return [
            by_chunk[first].tobytes()
            if count == 1
            else b"".join(self._partial(sums[rows, first : first + count].contiguous()) for rows in self._rows)
            for first, count in bounds
        ]

    def _measure(self, block: Block) -> bytes:
        chunks = -(-(block.stop - block.start) // CHUNK)
        sums = [torch.zeros(len(rows), chunks, dtype=torch.float64) for rows in self._rows]
        for first, of_tile in self._measured(block):
            for own, found in zip(sums, of_tile, strict=True):
                own[:, first : first + found.shape[1]] = found
        return b"".join(map(self._partial, sums))

    def _measured(self, block: Block) -> Iterator[tuple[int, list[Tensor]]]:
        """The sums of each path by chunk, as of `_measure_tile`, and the first chunk of the block that they are of."""
        kernel, item = self._kernel(block)
        for start, stop in block.tiles(self._tile):
            while self._compiled is not None and kernel is not None and stop - start >= CHUNK:
                sums = self._compiled.form(kernel, block.name, start, stop, item)
                if sums is None or not bool(torch.isfinite(sums).all()):
                    break
                yield (start - block.start) // CHUNK, [sums[rows] for rows in self._rows]
                start += sums.shape[1] * CHUNK
            if start < stop:
                yield (start - block.start) // CHUNK, self._measure_tile(block.name, start, stop)

    def _kernel(self, block: Block) -> tuple[Kernel | None, int]:
        """What is compiled for a block, if anything is, and the bytes of an element."""
        stored = {self._run.checkpoints[index].entries[block.name].dtype for index in self._place}
        if self._compiled is None or len(stored) > 1 or block.size < CHUNK:
            return None, 0
        return load_kernel(code := stored.pop()), ITEM_BYTES[code]

    @staticmethod
    def _partial(sums: Tensor) -> bytes:
        """The numbers of one block and path: the distances that were measured, and the moments."""
        *distances, total, squares = sums[:-2].sum(dim=1).tolist()
        exponents, infinite = sums[-2:]
        exponent = 0.0
        if bool(exponents.any()):
            used = sums[-3] != 0
            exponent = float(exponents[used].max()) if bool(used.any()) else 0.0
            lower = torch.where(used, exponents - exponent, 0.0)
            total, squares = float((sums[-4] * lower.exp2()).sum()), float((sums[-3] * (2 * lower).exp2()).sum())
        return array("d", [*distances, total, squares, exponent, float(infinite.sum())]).tobytes()

    def _dtype(self, name: str) -> torch.dtype:
        return torch.float64 if self._run.is_wide(name) else torch.float32

    def _measure_tile(self, name: str, start: int, stop: int) -> list[Tensor]:
        """(steps + 4, chunks) float64 for each path: each distance, then Σ and Σ² of θ_0 less its first element, in a
        unit of which the exponent comes next, and how many infinities are not in them; by chunk.
        """
        sums, careful = self._sum_tile(name, start, stop, self._dtype(name)), None
        if bool(torch.isfinite(sums).all()):
            return [sums[rows] for rows in self._rows]
        of_paths = []
        for rows, read in zip(self._rows, self._read, strict=True):
            own = sums[rows]
            if not bool(torch.isfinite(own).all()):
                if not self._allow_nonfinite:
                    self._reader.refuse_nonfinite(name, start, stop, read)
                # Finite weights whose float32 sum overflowed, or the same infinities in all checkpoints.
                if careful is None:
                    careful = self._sum_tile(name, start, stop, torch.float64, careful=True)
                own = careful[rows]
            of_paths.append(own)
        return of_paths

    def _sum_tile(self, name: str, start: int, stop: int, dtype: torch.dtype, *, careful: bool = False) -> Tensor:
        size = stop - start
        chunks = -(-size // CHUNK)
        padded = chunks * CHUNK
        sums = self._plain_sums(dtype, chunks, careful=careful)
        moments = []
        free = self._workspace(dtype)[:]
        held: dict[int, Tensor] = {}
        for visit in self._visits:
            tile = self._take(free, dtype)
            tile[size:padded].zero_()
            self._reader.load(visit.place, name, start, tile[:size])
            if visit.is_anchor:
                moments.append(self._moments(name, visit.place, tile, size, padded))
            for first, is_done in visit.pairs:
                before = held.pop(first) if is_done else held[first]
                out = before if is_done else self._take(free, dtype)
                sums.add(before[:padded], tile[:padded], out[:padded])
                free.append(out)
            if visit.is_held:
                held[visit.place] = tile
            else:
                free.append(tile)
        none = torch.zeros(4, chunks, dtype=torch.float64, device=self._device)
        return torch.cat([*sums.rows(), *moments, none]).cpu()

    def _moments(self, name: str, place: int, anchor: Tensor, size: int, padded: int) -> Tensor:
        shifted = anchor[:padded].to(torch.float64, copy=True)
        shifted[:size] -= self._reader.first_finite(name, place)
        exponents, infinite = shifted.new_zeros(2, padded // CHUNK)
        if anchor.dtype == torch.float64 and is_extreme(_largest(_in_lanes(shifted))):
            shifted, exponents, infinite = self._scaled_shift(name, place, anchor[:padded], size)
        total = _sum(_sum(_in_lanes(shifted), dim=1), dim=1)
        squares = _sum(_sum(_in_lanes(shifted.square_()), dim=1), dim=1)
        return torch.stack([total, squares, exponents, infinite])

    def _scaled_shift(self, name: str, place: int, anchor: Tensor, size: int) -> tuple[Tensor, Tensor, Tensor]:
        """θ_0 less its first element in a unit for each chunk, its exponent, and how many infinities are left out."""
        first = self._reader.first_finite(name, place)
        infinite = torch.isinf(anchor)
        values = anchor.masked_fill(infinite, first)
        values[size:] = first
        lanes = _in_lanes(values)
        large = 2.0 * (_largest(lanes).clamp(min=abs(first)) > _LARGE).double()  # no difference may overflow
        unit = torch.exp2(-large)[:, None, None]
        shifted = lanes * unit - first * unit
        exponents = torch.frexp(_largest(shifted)).exponent.double()
        exponents = torch.where(exponents.abs() > EXTREME, exponents, 0.0)
        for part in (exponents / 2).floor(), (exponents / 2).ceil():
            shifted = shifted * torch.exp2(-part)[:, None, None]
        return shifted.view(-1), exponents + large, _in_lanes(infinite).sum(dim=(1, 2)).double()

    def _workspace(self, dtype: torch.dtype) -> list[Tensor]:
        return self._buffers.setdefault(dtype, [])

    def _take(self, free: list[Tensor], dtype: torch.dtype) -> Tensor:
        """A tile that is free: two are enough for one path, and one more for each other that is under way."""
        if not free:
            free.append(torch.empty(self._tile, dtype=dtype, device=self._device))
            self._workspace(dtype).append(free[0])
        return free.pop()

    def _plain_sums(self, dtype: torch.dtype, chunks: int, *, careful: bool) -> _PlainSums:
        if dtype not in self._lanes:
            rows = min(len(self._pairs), _ROWS)
            shape = rows, self._tile // CHUNK, COLUMNS
            self._lanes[dtype] = torch.empty(shape, dtype=dtype, device=self._device)
        return _PlainSums(self._lanes[dtype][:, :chunks], careful=careful)


class _PlainSums:
    """The L1 distances of a tile by chunk, with torch's kernels.

    Args:
        lanes: (steps kept at once, chunks, lanes) memory to compute in.
        careful: as of `moved`.
    """

    def __init__(self, lanes: Tensor, *, careful: bool) -> None:
        self._lanes = lanes
        self._careful = careful
        self._filled = 0
        self._rows: list[Tensor] = []

    def add(self, before: Tensor, after: Tensor, out: Tensor) -> None:
        """Take the next pair; `out` is memory to compute in, which may be that of `before`."""
        _sum(_in_lanes(moved(before, after, out, careful=self._careful)), dim=1, out=self._lanes[self._filled])
        self._filled += 1
        if self._filled == len(self._lanes):
            self._add_up()

    def rows(self) -> list[Tensor]:
        """(steps, chunks) float64, in pieces."""
        if self._filled:
            self._add_up()
        return self._rows

    def _add_up(self) -> None:
        self._rows.append(_sum(self._lanes[: self._filled], dim=2, dtype=torch.float64))
        self._filled = 0


def moved(before: Tensor, after: Tensor, out: Tensor, *, careful: bool) -> Tensor:
    """|after − before|.

    Args:
        before, after: weights of two checkpoints, of one shape and dtype.
        out: where it goes; it may be `before`.
        careful: whether there may be infinities; what is the same one on both sides has not moved.
    """
    same = torch.isinf(after) & (after == before) if careful else None
    torch.sub(after, before, out=out).abs_()
    return out if same is None else out.masked_fill_(same, 0.0)


def times_power(values: Tensor, exponent: int) -> Tensor:
    """The values times 2^exponent, in two steps: the power itself may be beyond float64."""
    return values * 2.0 ** (exponent // 2) * 2.0 ** (exponent - exponent // 2)


def is_extreme(largest: Tensor) -> bool:
    """Whether squares of values may be too large or too small for float64, by the largest absolute values of each."""
    regular = (largest == 0) | ((largest > 2.0**-EXTREME) & (largest < 2.0**EXTREME))
    return not bool(regular.all())


def _largest(lanes: Tensor) -> Tensor:
    """(chunks,) the largest absolute value of each chunk; NaN where it holds any."""
    return lanes.abs().amax(dim=(1, 2))


def _in_lanes(values: Tensor) -> Tensor:
    return values.view(-1, _SUMMED_IN_WORK_DTYPE, COLUMNS)


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
