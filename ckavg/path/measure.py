"""Pass 1: stream every checkpoint once and measure σ of the anchor and the L1 distance of every step.

Sums are formed in one fixed order, whatever the tile size and the number of threads; see `sums`.
"""

from __future__ import annotations

import itertools
import math
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
from ckavg.path.sums import MOMENTS, MOST_ROWS, TileDistances, moments, scaled
from ckavg.path.table import PathLength, TensorPaths, ZeroSigma, fsum, refuse_infinite


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
    kernel: Literal["torch", "llvm"] = "llvm" if compiled else "torch"
    all_steps, paths, end = run.steps, [], 0
    for plan, places in zip(reading.plans, reading.places, strict=True):
        begin, end = end, end + len(plan.steps) + MOMENTS
        tensors = _completed(run, plan, blocks, rows[:, begin:end] if plan.to_read else None)
        if plan.to_read and not allow_nonfinite:
            refuse_infinite(tensors)
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
                numbers[:-MOMENTS] = [fsum(each) for each in rows[begin:end, :-MOMENTS].T.tolist()]
        for step, row in zip(plan.steps, found.T, strict=False):
            distances[step - 1] = array("d", row.tobytes())
        if plan.needs_sigma:
            moments = (rows[begin:end, -MOMENTS:].tolist() for begin, end in bounds)
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
        first = len(self._pairs) + MOMENTS * anchor
        return [pairs[places[step - 1], places[step]] for step in plan.steps] + list(range(first, first + MOMENTS))

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
        found = []
        free = self._workspace(dtype)[:]
        held: dict[int, Tensor] = {}
        for visit in self._visits:
            tile = self._take(free, dtype)
            tile[size:padded].zero_()
            self._reader.load(visit.place, name, start, tile[:size])
            if visit.is_anchor:
                found.append(moments(tile[:padded], self._reader.first_finite(name, visit.place), size))
            for first, is_done in visit.pairs:
                before = held.pop(first) if is_done else held[first]
                out = before if is_done else self._take(free, dtype)
                sums.add(before[:padded], tile[:padded], out[:padded])
                free.append(out)
            if visit.is_held:
                held[visit.place] = tile
            else:
                free.append(tile)
        none = torch.zeros(MOMENTS, chunks, dtype=torch.float64, device=self._device)
        return torch.cat([*sums.rows(), *found, none]).cpu()

    def _workspace(self, dtype: torch.dtype) -> list[Tensor]:
        return self._buffers.setdefault(dtype, [])

    def _take(self, free: list[Tensor], dtype: torch.dtype) -> Tensor:
        """A tile that is free: two are enough for one path, and one more for each other that is under way."""
        if not free:
            free.append(torch.empty(self._tile, dtype=dtype, device=self._device))
            self._workspace(dtype).append(free[0])
        return free.pop()

    def _plain_sums(self, dtype: torch.dtype, chunks: int, *, careful: bool) -> TileDistances:
        if dtype not in self._lanes:
            rows = min(len(self._pairs), MOST_ROWS)
            shape = rows, self._tile // CHUNK, COLUMNS
            self._lanes[dtype] = torch.empty(shape, dtype=dtype, device=self._device)
        return TileDistances(self._lanes[dtype][:, :chunks], careful=careful)
