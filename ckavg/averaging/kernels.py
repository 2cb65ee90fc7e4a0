"""Pass 2 compiled: one walk over a tile of all checkpoints, from stored bytes to rounded averages.

A row of each checkpoint in turn is widened, summed for the checksum, and added to the states of all averages, which
stay in the L1 cache; only results are written to memory. The operations and their order are those of `rules` and
torch, fused where torch fuses them, so the bytes are the same: a kernel that gives others for a sample is not used.
"""

from __future__ import annotations

import itertools
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ckavg.averaging.rules import RULES, round_into
from ckavg.checkpoints.run import ITEM_BYTES, Checkpoint
from ckavg.engine.blocks import CHUNK, Block
from ckavg.engine.checksums import BlockSums
from ckavg.engine.compiled import DTYPES, LANES, Program, load, piece_of, read_cached
from ckavg.engine.tiles import TileReader
from ckavg.schemes import Coefficients
from ckavg.schemes.base import Rule

if TYPE_CHECKING:
    from llvmlite import ir

_LONGEST_ROW = 1 << 11
_NEAREST = 6 << 10
_SKIP, _BEGIN, _REPLACE, _NEAR, _FAR = range(5)
_TILES = {"ema": 1, "bema": 2, "ouema": 2, "dema": 2, "sum": 2}
_SIGN = 1 << 31
_WRITTEN_BYTES = 4 << 20


@dataclass(frozen=True, slots=True)
class Kind:
    """What a kernel is compiled for: the dtype of the checkpoints and, of each average, its rule and its dtype."""

    stored: str
    averages: tuple[tuple[Rule, str], ...]


@dataclass(frozen=True, slots=True)
class Steps:
    """What averages do with the checkpoints of a tensor, in order.

    Attributes:
        operations: (checkpoints, averages) int32, one of `_SKIP` and so on.
        numbers: (checkpoints, averages, 2) float32: the factor of an update, and that of a correction.
    """

    operations: NDArray[np.int32]
    numbers: NDArray[np.float32]


class Kernel:
    """Averages of one kind, formed from files; may be shared by threads.

    Args:
        kind: of what.

    Raises:
        Exception: it cannot be compiled here.
    """

    def __init__(self, kind: Kind) -> None:
        self._kind = kind
        self._read = read_cached()
        self._program = Program()
        _Emitter(self._program, kind).emit()
        self._run = self._program.compile("average", pointers=7, integers=6)
        self.work_size = _row(kind) * sum(_TILES[rule] for rule, _ in kind.averages)

    def __call__(
        self,
        files: tuple[NDArray[np.int32], NDArray[np.int64]],
        steps: Steps,
        outputs: NDArray[np.uint64],
        sums: NDArray[np.int64],
        memory: tuple[NDArray[np.float32], NDArray[np.uint8]],
        *,
        waits: bool = False,
    ) -> int:
        """Form all averages of some chunks, and return how many of them were formed, in order.

        It ends before the first chunk that is not in the page cache as a whole, or of which an average is not finite.

        Args:
            files: (checkpoints,) open files, and where the elements begin in each, in bytes.
            steps: what each average does with each checkpoint.
            outputs: (checkpoints, averages) address for the average as it stands after a checkpoint; 0: nowhere.
            sums: (checkpoints, chunks) to fill with the sums of the words of the chunks; see `checksums`.
            memory: `work_size` numbers to compute in, and room for a piece of each checkpoint; see `piece_of`.
            waits: read what is not in the page cache, too.
        """
        checkpoints, chunks = sums.shape
        work, buffer = memory
        arrays = (*files, steps.operations, steps.numbers, outputs, sums, work)
        piece = piece_of(CHUNK, checkpoints * ITEM_BYTES[self._kind.stored])
        addresses = [each.ctypes.data for each in arrays]
        read, flag = self._read
        flags = 0 if waits else flag
        return self._run(*addresses, read, flags, buffer.ctypes.data, checkpoints, piece, chunks)

    def memory(self, checkpoints: int) -> tuple[NDArray[np.float32], NDArray[np.uint8]]:
        """Memory for one thread."""
        width = checkpoints * ITEM_BYTES[self._kind.stored]
        return np.empty(self.work_size, np.float32), np.empty(piece_of(CHUNK, width) * width, np.uint8)


def steps_of(averages: Sequence[Coefficients], indices: Sequence[Sequence[int | None]]) -> Steps:
    """What averages do with each checkpoint of a tensor.

    Args:
        averages: their coefficients for that tensor.
        indices: by checkpoint and average, which of those of the average the checkpoint is; None: none.
    """
    shape = len(indices), len(averages)
    operations, numbers = np.zeros(shape, np.int32), np.zeros((*shape, 2), np.float32)
    for number, each in enumerate(averages):
        for place, row in enumerate(indices):
            index = row[number]
            if index is None or index < each.start:
                continue
            beta, operation = each.betas[index], _BEGIN
            beta = 1.0 if beta is None else beta
            factor = np.float32(beta)
            if index > each.start:
                operation = _NEAR if each.rule == "sum" or abs(factor) < np.float32(0.5) else _FAR
                if operation == _FAR:
                    operation, factor = (_REPLACE if beta == 1.0 else _FAR), factor - np.float32(1)
            alpha = each.alphas[index] if each.alphas is not None else None
            other = each.complement(index) if each.rule == "ouema" else alpha or 0.0
            operations[place, number], numbers[place, number] = operation, (factor, other)
    return Steps(operations, numbers)


def load_kernel(kind: Kind) -> Kernel | None:
    """The kernel of a kind; see `compiled.load`."""
    return load(Kernel, kind, _is_right)


def _is_right(kernel: Kernel, kind: Kind) -> bool:
    """Whether a sample comes out as the plain way forms it."""
    betas, alphas = (None, 0.3, 0.7, 1.0, 0.123), (0.0, 0.1, 0.2, 0.3, 0.4)
    numbers = np.random.default_rng(0).standard_normal((len(betas), CHUNK), np.float32)
    stored = torch.from_numpy(numbers).to(DTYPES[kind.stored])
    stored[:, :99] = -0.0
    averages = [Coefficients(rule, 0, betas, alphas) for rule, _ in kind.averages]
    steps = steps_of(averages, [[index] * len(averages) for index in range(len(betas))])
    results = [torch.empty(CHUNK, dtype=DTYPES[code]) for _, code in kind.averages]
    outputs = np.zeros((len(betas), len(averages)), np.uint64)
    outputs[-1] = [result.data_ptr() for result in results]
    sums = np.zeros((len(betas), 1), np.int64)
    with tempfile.TemporaryFile() as file:
        file.write(stored.view(torch.uint8).numpy().tobytes())
        file.flush()
        offsets = np.arange(len(betas)) * stored[0].nbytes
        handles = np.full(len(betas), file.fileno(), np.int32)
        if not kernel((handles, offsets), steps, outputs, sums, kernel.memory(len(betas)), waits=True):
            return False
    words = stored.view(torch.int64).sum(dim=1)
    return sums[:, 0].tolist() == words.tolist() and all(
        torch.equal(result.view(torch.uint8), _plain(stored, each, result.dtype).view(torch.uint8))
        for each, result in zip(averages, results, strict=True)
    )


def _plain(stored: Tensor, coefficients: Coefficients, dtype: torch.dtype) -> Tensor:
    state = RULES[coefficients.rule](coefficients, torch.empty(CHUNK))
    for index, theta in enumerate(stored.float()):
        state.take(index, theta)
    result = state.output(index, theta)
    zero = (stored == 0).all(dim=0) & torch.signbit(stored).all(dim=0)
    return round_into(result.masked_fill(zero, -0.0), torch.empty(CHUNK, dtype=dtype))


def _row(kind: Kind) -> int:
    """Elements of a row: as many as the nearest cache has room for, of all states."""
    row = _LONGEST_ROW
    while row > CHUNK // 128 and row * sum(_TILES[rule] for rule, _ in kind.averages) > _NEAREST:
        row //= 2
    return row


class CompiledTiles:
    """Forms averages of tiles that lie in the page cache, in one thread.

    Args:
        run: the checkpoints that are read.
        reader: of theirs.
        averages: their coefficients, and the output dtype of every tensor.
        indices: by checkpoint and average, which of those of the average the checkpoint is; None: none.
        writers: what takes an average as it stands after a checkpoint: checkpoint, average, and its `put`.
        tile: most elements that are formed at once.
    """

    def __init__(
        self,
        run: Sequence[Checkpoint],
        reader: TileReader,
        averages: Sequence[tuple[Coefficients, Mapping[str, str]]],
        indices: Sequence[Sequence[int | None]],
        writers: Sequence[tuple[int, int, Callable[[str, int, Tensor], None]]],
        *,
        tile: int,
    ) -> None:
        self._run = run
        self._reader = reader
        self._averages = averages
        self._indices = indices
        self._writers = writers
        self._tile = tile
        self._out = torch.empty(0, dtype=torch.uint8)
        self._memory: dict[Kernel, tuple[NDArray[np.float32], NDArray[np.uint8]]] = {}

    def begin(self, block: Block, sums: BlockSums) -> Callable[[int, int], int] | None:
        """What forms the tiles of a block: from its first element and that after its last to that after the last which
        is formed; all others are left to the plain way. None where nothing is compiled for such a block.
        """
        stored = {checkpoint.entries[block.name].dtype for checkpoint in self._run}
        codes = [dtypes[block.name] for _, dtypes in self._averages]
        if block.size < CHUNK or len(stored) > 1 or not {*stored, *codes} <= DTYPES.keys():
            return None
        own = [coefficients.for_tensor(block.name) for coefficients, _ in self._averages]
        kind = Kind(stored.pop(), tuple(zip((each.rule for each in own), codes, strict=True)))
        kernel = load_kernel(kind)
        if kernel is None:
            return None
        steps = steps_of(own, self._indices)
        if kernel not in self._memory:
            self._memory[kernel] = kernel.memory(len(self._run))
        width = sum(ITEM_BYTES[codes[number]] for _, number, _ in self._writers)
        step = max(CHUNK, min(self._tile, _WRITTEN_BYTES // width // CHUNK * CHUNK))

        def form(start: int, stop: int) -> int:
            stop -= (stop - start) % CHUNK
            while start < stop:
                last = min(start + step, stop)
                done = self._form(kernel, steps, codes, block.name, start, last, sums)
                start += done
                if start < last:
                    break
            return start

        return form

    def _form(
        self, kernel: Kernel, steps: Steps, codes: Sequence[str], name: str, start: int, stop: int, sums: BlockSums
    ) -> int:
        """Form whole chunks and hand them on, as many as can be; how many elements that were."""
        files = self._reader.locate(name)
        if files is None:
            return 0
        item = self._run[0].entries[name].item_bytes
        handles, offsets = files
        sizes = [ITEM_BYTES[codes[number]] for _, number, _ in self._writers]
        out = self._room((stop - start) * sum(sizes))
        ends = list(itertools.accumulate(sizes, initial=0))
        outputs = np.zeros(steps.operations.shape, np.uint64)
        for (place, number, _), end in zip(self._writers, ends, strict=False):
            outputs[place, number] = out.data_ptr() + end * (stop - start)
        words = np.empty((len(self._run), (stop - start) // CHUNK), np.int64)
        done = kernel((handles, offsets + start * item), steps, outputs, words, self._memory[kernel])
        size = done * CHUNK
        if size:
            self._reader.count(size * item * len(self._run))
            sums.put(start, words[:, :done])
        for (_, _, put), end, each in zip(self._writers, ends, sizes, strict=False):
            if size:
                begin = end * (stop - start)
                put(name, start * each, out[begin : begin + size * each])
        return size

    def _room(self, nbytes: int) -> Tensor:
        if len(self._out) < nbytes:
            self._out = torch.empty(nbytes, dtype=torch.uint8)
        return self._out


class _Place(NamedTuple):
    """A row of what was read of a checkpoint: values of the code that is emitted."""

    buffer: ir.Value
    piece: ir.Value
    at: ir.Value
    checkpoint: ir.Value


class _Emitter:
    """The code of a kernel."""

    def __init__(self, program: Program, kind: Kind) -> None:
        self._program = program
        self._kind = kind
        self._row = _row(kind)
        self._item = program.vi16 if kind.stored == "BF16" else program.vi32

    def emit(self) -> None:
        """Emit the function `average`, and those that it calls for each row."""
        averages = self._kind.averages
        self._emit_update(averages[0][0], is_first=True)
        for rule in sorted({rule for rule, _ in averages[1:]}):
            self._emit_update(rule, is_first=False)
        for rule, code in sorted({*averages}):
            self._emit_output(rule, code)
        self._emit_average()

    def _emit_average(self) -> None:
        p, count = self._program, len(self._kind.averages)
        i64, i32 = p.i64, p.i32
        arrays = (i32, i64, i32, p.f32, i64, i64, p.f32)
        handles, offsets, operations, numbers, outputs, sums, work, read, flags, buffer, checkpoints, piece, chunks = (
            p.begin("average", *(each.as_pointer() for each in arrays), *[i64] * 6, returns=i64)
        )
        b = p.builder
        reading = p.reading(read, flags, (handles, offsets, checkpoints), buffer)
        wrong, stopped = p.slot(i32), b.append_basic_block()
        with p.loop(chunks) as chunk:
            b.store(i32(0), wrong)
            with p.loop(b.udiv(i64(CHUNK), piece)) as part:
                first = b.add(b.mul(chunk, i64(CHUNK)), b.mul(part, piece))
                p.read(reading, first, piece, ITEM_BYTES[self._kind.stored], stopped)
                with p.loop(piece, self._row) as at, p.loop(checkpoints) as checkpoint:
                    tiles, is_first = 0, b.icmp_unsigned("==", b.add(part, at), i64(0))
                    here = _Place(buffer, piece, at, checkpoint)
                    for number, (rule, code) in enumerate(self._kind.averages):
                        which = b.add(b.mul(checkpoint, i64(count)), i64(number))
                        state = b.gep(work, [i64(tiles * self._row)])
                        tiles += _TILES[rule]
                        operation, own = b.load(b.gep(operations, [which])), b.gep(numbers, [b.mul(which, i64(2))])
                        if number == 0:
                            total = p.call_of(f"update_{rule}_first", operation, self._stored(here), state, own)
                            sum_ = b.gep(sums, [b.add(b.mul(checkpoint, chunks), chunk)])
                            b.store(b.add(b.select(is_first, i64(0), b.load(sum_)), total), sum_)
                        else:
                            p.call_of(f"update_{rule}", operation, self._stored(here), state, own)
                        output = b.load(b.gep(outputs, [which]))
                        with b.if_then(b.icmp_unsigned("!=", output, i64(0))):
                            target = b.inttoptr(output, self._element(code).as_pointer())
                            target = b.gep(target, [b.add(first, at)])
                            steps = b.gep(operations, [i64(number)])
                            found = p.call_of(f"output_{rule}_{code}", state, own, target, steps, *here)
                            b.store(b.or_(b.load(wrong), found), wrong)
            with b.if_then(b.icmp_unsigned("!=", b.load(wrong), i32(0)), likely=False):
                b.branch(stopped)
        b.ret(chunks)
        b.position_at_end(stopped)
        b.ret(chunk)

    def _element(self, code: str) -> Any:
        return self._program.i16 if code == "BF16" else self._program.i32

    def _stored(self, place: _Place) -> ir.Value:
        """A pointer to what was read of a checkpoint."""
        b, item = self._program.builder, ITEM_BYTES[self._kind.stored]
        begin = b.add(b.mul(place.checkpoint, place.piece), place.at)
        address = b.add(place.buffer, b.mul(begin, self._program.i64(item)))
        return b.inttoptr(address, self._item.element.as_pointer())

    def _emit_update(self, rule: str, *, is_first: bool) -> None:
        """E, and what else the rule carries, after a checkpoint; see `rules`. That of the first average takes the sum
        of the words on the way.
        """
        p = self._program
        name, returned = (f"update_{rule}_first", p.i64) if is_first else (f"update_{rule}", None)
        pointers = self._item.element.as_pointer(), p.f32.as_pointer(), p.f32.as_pointer()
        operation, stored, state, numbers = p.begin(name, p.i32, *pointers, returns=returned)
        b = p.builder
        other = b.gep(state, [p.i64(self._row)])
        factor, correction = (p.spread(b.load(b.gep(numbers, [p.i64(place)]))) for place in range(2))
        words = self._program.vector(p.i64, LANES * ITEM_BYTES[self._kind.stored] // 8)
        total, done = p.slot(words), b.append_basic_block()
        b.store(p.zero(words), total)
        for which in range(0 if is_first else 1, 5):
            this, after = b.append_basic_block(), b.append_basic_block()
            b.cbranch(b.icmp_unsigned("==", operation, p.i32(which)), this, after)
            b.position_at_end(this)
            with p.loop(p.i64(self._row), LANES) as at:
                raw = p.load(stored, at, self._item)
                if is_first:
                    b.store(b.add(b.load(total), b.bitcast(raw, words)), total)
                value = self._program.widened(raw)
                if which == _BEGIN:
                    p.store(value, state, at)
                    if _TILES[rule] == 2:
                        p.store(value, other, at)
                elif which != _SKIP and rule == "sum":
                    difference = b.fsub(value, p.load(other, at, p.vf32))
                    p.store(b.fadd(p.load(state, at, p.vf32), b.fmul(difference, factor)), state, at)
                elif which != _SKIP:
                    if rule == "ouema":
                        anchor = p.load(other, at, p.vf32)
                        value = b.fadd(b.fdiv(b.fsub(value, anchor), correction), anchor)
                    value = self._step(which, p.load(state, at, p.vf32), value, factor)
                    p.store(value, state, at)
                    if rule == "dema":
                        p.store(self._step(which, p.load(other, at, p.vf32), value, factor), other, at)
            b.branch(done)
            b.position_at_end(after)
        b.branch(done)
        b.position_at_end(done)
        if is_first:
            b.ret(p.sum(b.load(total)))
        else:
            b.ret_void()

    def _step(self, which: int, average: ir.Value, value: ir.Value, factor: ir.Value) -> ir.Value:
        """E + β (θ − E) as `lerp_` forms it: from the end that is nearer, in one rounding after the difference."""
        if which == _REPLACE:
            return value
        difference = self._program.builder.fsub(value, average)
        base = average if which == _NEAR else value
        return self._program.call("llvm.fma.v16f32", factor, difference, base)

    def _emit_output(self, rule: str, code: str) -> None:
        """The average as it stands, rounded; returned is whether any of it is not finite."""
        p, target = self._program, self._element(code)
        pointers = p.f32, p.f32, target, p.i32
        state, numbers, out, steps, *place = p.begin(
            f"output_{rule}_{code}", *(each.as_pointer() for each in pointers), *[p.i64] * 4, returns=p.i32
        )
        here = _Place(*place)
        b = p.builder
        other = b.gep(state, [p.i64(self._row)])
        correction = p.spread(b.load(b.gep(numbers, [p.i64(1)])))
        wrong, slot = p.slot(p.vi1), p.slot(p.vf32)
        b.store(p.constant(p.vi1, 0), wrong)
        largest = 0x7F7F8000 if code == "BF16" else 0x7F800000
        stored = self._stored(here)
        with p.loop(p.i64(self._row), LANES) as at:
            result = p.load(state, at, p.vf32)
            if rule == "bema":
                moved = b.fsub(self._program.widened(p.load(stored, at, self._item)), p.load(other, at, p.vf32))
                result = b.fadd(b.fmul(moved, correction), result)
            elif rule == "dema":
                result = b.fadd(b.fsub(result, p.load(other, at, p.vf32)), result)
            b.store(result, slot)
            zero = b.fcmp_ordered("==", result, p.constant(p.vf32, 0.0))
            with b.if_then(b.icmp_unsigned("!=", b.bitcast(zero, p.i16), p.i16(0)), likely=False):
                kept = self._negative_zeros(here, at, steps)
                b.store(b.select(kept, p.constant(p.vf32, -0.0), result), slot)
                if rule in ("ema", "ouema", "sum"):
                    p.store(b.load(slot), state, at)
            bits = b.bitcast(b.load(slot), p.vi32)
            size = b.and_(bits, p.constant(p.vi32, _SIGN - 1))
            b.store(b.or_(b.load(wrong), b.icmp_unsigned(">=", size, p.constant(p.vi32, largest))), wrong)
            if code == "BF16":  # to nearest, ties to even
                even = b.and_(b.lshr(bits, p.constant(p.vi32, 16)), p.constant(p.vi32, 1))
                bits = b.add(b.add(bits, p.constant(p.vi32, 0x7FFF)), even)
                bits = b.trunc(b.lshr(bits, p.constant(p.vi32, 16)), p.vi16)
            p.store(bits, out, at)
        b.ret(b.zext(b.icmp_unsigned("!=", b.bitcast(b.load(wrong), p.i16), p.i16(0)), p.i32))

    def _negative_zeros(self, place: _Place, at: ir.Value, steps: ir.Value) -> ir.Value:
        """Which elements are −0 in all checkpoints that the average has taken in."""
        p, b = self._program, self._program.builder
        sign = p.constant(self._item, _SIGN if self._kind.stored == "F32" else 1 << 15)
        others = p.slot(self._item)
        b.store(p.constant(self._item, 0), others)
        with p.loop(b.add(place.checkpoint, p.i64(1))) as checkpoint:
            operation = b.load(b.gep(steps, [b.mul(checkpoint, p.i64(len(self._kind.averages)))]))
            with b.if_then(b.icmp_unsigned("!=", operation, p.i32(_SKIP))):
                stored = p.load(self._stored(place._replace(checkpoint=checkpoint)), at, self._item)
                b.store(b.or_(b.load(others), b.xor(stored, sign)), others)
        return b.icmp_unsigned("==", b.load(others), p.constant(self._item, 0))
