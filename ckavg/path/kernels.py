"""Pass 1 compiled: differences of neighbours, widened and summed while they are in the processor's nearest cache.

The plain path walks over the memory four times for each pair. Sums are formed in its order, those of 16 numbers here
and the rest by torch, so they are equal to the bit; a kernel that gives others for a sample is not used.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ckavg.checkpoints.run import ITEM_BYTES
from ckavg.engine.blocks import CHUNK, COLUMNS
from ckavg.engine.compiled import DTYPES, LANES, Program, load, piece_of, read_cached
from ckavg.engine.tiles import TileReader

if TYPE_CHECKING:
    from llvmlite import ir

    Terms = Callable[[ir.Value], Sequence[ir.Value]]

_UNROLLED = 4 * LANES
_SUMMED_BYTES = 2 << 20


class Kernel:
    """Sums of one dtype of checkpoints, read from files; may be shared by threads.

    Args:
        stored: the dtype, as a safetensors code.

    Raises:
        Exception: it cannot be compiled here.
    """

    def __init__(self, stored: str) -> None:
        self._item = ITEM_BYTES[stored]
        self._read = read_cached()
        self._program = Program()
        _emit(self._program, stored)
        self._run = self._program.compile("sums", pointers=8, integers=8)

    def __call__(
        self,
        files: tuple[NDArray[np.int32], NDArray[np.int64]],
        pairs: NDArray[np.int64],
        anchors: tuple[NDArray[np.int64], NDArray[np.float64]],
        columns: NDArray[np.float32],
        moments: NDArray[np.float64],
        buffer: NDArray[np.uint8],
        *,
        waits: bool = False,
    ) -> int:
        """Sum up some chunks by columns, and return how many of them were, in order: it ends before the first that is
        not in the page cache as a whole.

        Args:
            files: (checkpoints,) open files, and where the elements begin in each, in bytes.
            pairs: (pairs, 2) the checkpoints of which |after − before| is summed.
            anchors: (anchors,) those of which moments are summed, and what each element is taken less.
            columns: (pairs, chunks, COLUMNS) to fill.
            moments: (anchors, 2, chunks, COLUMNS) to fill with sums and sums of squares.
            buffer: room for a piece of each checkpoint; see `piece_of`.
            waits: read what is not in the page cache, too.
        """
        checkpoints, chunks = len(files[0]), columns.shape[1]
        arrays = (*files, pairs, *anchors, columns, moments, buffer)
        piece = piece_of(CHUNK, checkpoints * self._item)
        counts = checkpoints, len(pairs), len(anchors[0]), piece, chunks, columns.strides[0] // columns.strides[1]
        read, flag = self._read
        return self._run(*(each.ctypes.data for each in arrays), read, 0 if waits else flag, *counts)


def load_kernel(stored: str) -> Kernel | None:
    """The kernel for a dtype; None if it has none, see also `compiled.load`."""
    return load(Kernel, stored, _is_right) if stored in DTYPES else None


def _is_right(kernel: Kernel, stored: str) -> bool:
    """Whether a sample comes out as the plain way forms it."""
    numbers = np.random.default_rng(0).standard_normal((2, CHUNK), np.float32)
    values = torch.from_numpy(numbers).to(DTYPES[stored])
    columns, moments = torch.empty(1, 1, COLUMNS), torch.empty(1, 2, 1, COLUMNS, dtype=torch.float64)
    with tempfile.TemporaryFile() as file:
        file.write(values.view(torch.uint8).numpy().tobytes())
        file.flush()
        files = np.full(2, file.fileno(), np.int32), np.array([0, values[0].nbytes])
        buffer = np.empty(values.nbytes, np.uint8)
        anchors = np.zeros(1, np.int64), np.full(1, 0.1)
        if kernel(files, np.array([[0, 1]]), anchors, columns.numpy(), moments.numpy(), buffer, waits=True) != 1:
            return False
    before, after = values.float().view(2, -1, COLUMNS)
    shifted = before.double() - 0.1
    wanted = (after - before).abs().sum(0), shifted.sum(0), shifted.square().sum(0)
    return all(map(torch.equal, (columns.view(-1), *moments.view(2, -1)), wanted))


class CompiledSums:
    """Sums of chunks that lie in the page cache; for one thread.

    Args:
        reader: of the checkpoints.
        pairs: those of which distances are measured.
        anchors: those of which moments are.
    """

    def __init__(self, reader: TileReader, pairs: Sequence[tuple[int, int]], anchors: Sequence[int]) -> None:
        self._reader = reader
        self._pairs = np.array(pairs, np.int64).reshape(-1, 2)
        self._anchors = np.array(anchors, np.int64)
        self._chunks = 0
        self._buffer = np.empty(0, np.uint8)
        self._columns = torch.empty(0)
        self._moments = torch.empty(0, dtype=torch.float64)

    def form(self, kernel: Kernel, name: str, start: int, stop: int, item: int) -> Tensor | None:
        """(pairs + 4 × anchors + 4, chunks) float64 sums as of `measure`, of as many chunks from `start` on as are
        there, at most up to `stop`; None where that is none.
        """
        first = np.array([self._reader.first_finite(name, place) for place in self._anchors.tolist()])
        files = self._reader.locate(name)
        if files is None:
            return None
        count, pairs, anchors = len(files[0]), len(self._pairs), len(self._anchors)
        chunks = min((stop - start) // CHUNK, max(1, _SUMMED_BYTES // (4 * COLUMNS * (pairs + 4 * anchors))))
        if self._chunks < chunks or len(self._buffer) < piece_of(CHUNK, count * item) * count * item:
            self._chunks = chunks
            self._columns = torch.empty(pairs * chunks * COLUMNS)
            self._moments = torch.empty(anchors * 2 * chunks * COLUMNS, dtype=torch.float64)
            self._buffer = np.empty(piece_of(CHUNK, count * item) * count * item, np.uint8)
        columns = self._columns[: pairs * chunks * COLUMNS].view(pairs, chunks, COLUMNS)
        moments = self._moments[: anchors * 2 * chunks * COLUMNS].view(anchors, 2, chunks, COLUMNS)
        files = files[0], files[1] + start * item
        done = kernel(files, self._pairs, (self._anchors, first), columns.numpy(), moments.numpy(), self._buffer)
        if not done:
            return None
        self._reader.count(done * CHUNK * item * count)
        sums = torch.zeros(pairs + 4 * anchors + 4, done, dtype=torch.float64)
        torch.sum(columns[:, :done], 2, dtype=torch.float64, out=sums[:pairs])
        sums[pairs:-4].view(anchors, 4, done)[:, :2] = torch.sum(moments[:, :, :done], 3)
        return sums


def _emit(p: Program, stored: str) -> None:
    """The function `sums`."""
    i64, item = p.i64, p.vi16 if stored == "BF16" else p.vi32
    arrays = (p.i32, i64, i64, i64, p.f64, p.f32, p.f64, p.i8)
    arguments = p.begin("sums", *(each.as_pointer() for each in arrays), *[i64] * 8, returns=i64)
    handles, offsets, pairs, anchors, firsts, columns, moments, buffer = arguments[:8]
    read, flags, checkpoints, pair_count, anchor_count, piece, chunks, stride = arguments[8:]
    b, bytes_ = p.builder, ITEM_BYTES[stored]
    base = b.ptrtoint(buffer, i64)
    reading = p.reading(read, flags, (handles, offsets, checkpoints), base)
    stopped = b.append_basic_block()

    def tile(which: ir.Value) -> ir.Value:
        return b.inttoptr(b.add(base, b.mul(b.mul(which, piece), i64(bytes_))), item.element.as_pointer())

    def walk(rows: Sequence[tuple[ir.Value, ir.Value]], part: ir.Value, kind: Any, terms: Terms) -> None:
        """Add to each row of columns what `terms` makes of the elements at a place, one row after the other."""
        totals = [[p.slot(kind) for _ in range(_UNROLLED // LANES)] for _ in rows]
        is_first = b.icmp_unsigned("==", part, i64(0))
        with p.loop(i64(COLUMNS), _UNROLLED) as column:
            places = [(b.add(column, i64(LANES * number)), number) for number in range(_UNROLLED // LANES)]
            for total, (pointer, begin) in zip(totals, rows, strict=True):
                for place, number in places:
                    before = p.load(pointer, b.add(begin, place), kind)
                    b.store(b.select(is_first, p.constant(kind, 0.0), before), total[number])
            with p.loop(piece, COLUMNS) as row:
                for place, number in places:
                    for total, term in zip(totals, terms(b.add(row, place)), strict=True):
                        slot = total[number]
                        b.store(b.fadd(b.load(slot), term), slot)
            for total, (pointer, begin) in zip(totals, rows, strict=True):
                for place, number in places:
                    p.store(b.load(total[number]), pointer, b.add(begin, place))

    with p.loop(chunks) as chunk, p.loop(b.udiv(i64(CHUNK), piece)) as part:
        p.read(reading, b.add(b.mul(chunk, i64(CHUNK)), b.mul(part, piece)), piece, bytes_, stopped)
        with p.loop(pair_count) as pair:
            one, other = (tile(b.load(b.gep(pairs, [b.add(b.mul(pair, i64(2)), i64(end))]))) for end in range(2))

            def distance(at: ir.Value) -> list[ir.Value]:
                difference = b.fsub(p.widened(p.load(other, at, item)), p.widened(p.load(one, at, item)))
                bits = b.and_(b.bitcast(difference, p.vi32), p.constant(p.vi32, (1 << 31) - 1))
                return [b.bitcast(bits, p.vf32)]

            begin = b.mul(b.add(b.mul(pair, stride), chunk), i64(COLUMNS))
            walk([(columns, begin)], part, p.vf32, distance)
        with p.loop(anchor_count) as anchor:
            own, first = tile(b.load(b.gep(anchors, [anchor]))), p.spread(b.load(b.gep(firsts, [anchor])))

            def powers(at: ir.Value) -> list[ir.Value]:
                shifted = b.fsub(b.fpext(p.widened(p.load(own, at, item)), p.vf64), first)
                return [shifted, b.fmul(shifted, shifted)]

            row = b.mul(anchor, b.mul(chunks, i64(2)))
            begins = [b.mul(b.add(b.add(row, each), chunk), i64(COLUMNS)) for each in (i64(0), chunks)]
            walk([(moments, begin) for begin in begins], part, p.vf64, powers)
    b.ret(chunks)
    b.position_at_end(stopped)
    b.ret(chunk)
