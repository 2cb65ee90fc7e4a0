"""Pass 2: stream every checkpoint once through the update rules and hand on each finished tile.

Floating tensors are averaged; all others are copied from the last checkpoint. Several averages are formed from one
reading, each tile being widened once for all of them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence, Set
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from ckavg.averaging.adapters import Products
from ckavg.averaging.products import replay_products
from ckavg.averaging.rules import RULES, State, round_into, too_large
from ckavg.checkpoints.run import ITEM_BYTES, Run, TensorInfo, not_constant
from ckavg.engine.blocks import Block, cut_blocks
from ckavg.engine.checksums import checksums
from ckavg.engine.context import Context
from ckavg.engine.stream import PassJournal, stream
from ckavg.engine.tiles import TORCH_DTYPES, TileReader, all_finite
from ckavg.schemes import Coefficients


class TensorWriter(Protocol):
    """Takes finished bytes; called from several threads, each byte of a tensor once."""

    def put(self, name: str, offset: int, values: Tensor) -> None:
        """Take the bytes of tensor `name` from byte `offset` on: (n,) uint8 in CPU memory, valid during the call."""


@dataclass(frozen=True, slots=True)
class Average:
    """One average to form: its coefficients, its dtypes, and where its bytes go.

    Attributes:
        coefficients: β and α of every checkpoint.
        dtypes: output dtype of every floating tensor, as a safetensors code.
        writers: take the average as it stands after a checkpoint, by the index of that checkpoint.
    """

    coefficients: Coefficients
    dtypes: Mapping[str, str]
    writers: Mapping[int, TensorWriter]


@dataclass(frozen=True, slots=True)
class Replayed:
    """What pass 2 read.

    Attributes:
        bytes_read: how much, in this attempt.
        checksums: of the averaged tensors of each checkpoint; None where it was not read.
        nonfinite: how many elements of each average are NaN or infinite, for some of the checkpoints are.
        infinite: tensors that hold infinities, the same in all checkpoints, by name.
        discarded: of each average, what was cut off its products; see `ReplayedProducts`.
    """

    bytes_read: int
    checksums: tuple[str | None, ...]
    nonfinite: tuple[int, ...]
    infinite: tuple[str, ...] = ()
    discarded: tuple[Mapping[int, float], ...] = ()


@dataclass(frozen=True, slots=True)
class BlockResult:
    """Of one finished block: its hash for each checkpoint, how much of each average is not finite for some of the
    checkpoints are not, and how many elements are the same infinity in all.
    """

    hashes: tuple[str, ...]
    nonfinite: tuple[int, ...]
    infinite: int = 0

    def to_json(self) -> list[Any]:
        """The same as JSON values."""
        return [list(self.hashes), list(self.nonfinite), self.infinite]

    @classmethod
    def from_json(cls, values: list[Any]) -> BlockResult:
        """The same from such values."""
        hashes, nonfinite, *infinite = values
        return cls(tuple(hashes), tuple(nonfinite), *infinite)


def replay(
    run: Run,
    averages: Sequence[Average],
    *,
    products: Products | None = None,
    wide: bool = False,
    allow_nonfinite: bool = False,
    context: Context | None = None,
    journal: PassJournal[BlockResult] | None = None,
) -> Replayed:
    """Form all averages of a run in one reading.

    Args:
        run: the checkpoints, the anchor first.
        averages: what to form.
        products: factors that are averaged by their products; None: tensor by tensor, like all others.
        wide: accumulate in float64; float64 checkpoints always do.
        allow_nonfinite: let NaN and infinity through instead of ending the pass.
        context: how the pass runs.
        journal: which of `replay_blocks` are in their place already.

    Raises:
        NonFiniteError: a checkpoint holds NaN or infinity and may not, or a value does not fit the output dtype.
        TruncatedShardError, ReadError: a file changed or cannot be read.
        OutputError: a writer could not take its bytes.
    """
    context = context or Context()
    first = first_read(average.coefficients for average in averages)
    read = run.checkpoints[first:]
    paired = products.names if products is not None else frozenset()
    copied = {name: entry for name, entry in run.tensors.items() if not entry.is_floating and name not in paired}

    def average_worker(reader: TileReader) -> _AverageWorker:
        return _AverageWorker(
            run, reader, averages, first=first, wide=wide, allow_nonfinite=allow_nonfinite, context=context
        )

    written = sorted({index for average in averages for index in average.writers})
    writers = [[average.writers[index] for average in averages if index in average.writers] for index in written]

    def copy_worker(reader: TileReader) -> _CopyWorker:
        return _CopyWorker(reader, run.tensors, writers, tile=context.tile)

    blocks = tuple(block for block in replay_blocks(run) if block.name not in paired)
    averaged = stream("replay", read, blocks, average_worker, context, journal)
    nbytes = averaged.bytes_read
    if copied:
        quiet = dataclasses.replace(context, on_progress=None)
        of_written = [run.checkpoints[index] for index in written]
        nbytes += stream("replay", of_written, cut_blocks(copied), copy_worker, quiet).bytes_read
    hashes = [block_result.hashes for block_result in averaged.results]
    nonfinite = [
        sum(block_result.nonfinite[place] for block_result in averaged.results) for place in range(len(averages))
    ]
    infinite = sorted(
        {block.name for block, block_result in zip(blocks, averaged.results, strict=True) if block_result.infinite}
    )
    discarded: tuple[Mapping[int, float], ...] = ({},) * len(averages)
    if products is not None:
        of_pairs = replay_products(run, products, averages, places=range(first, len(run.checkpoints)), context=context)
        nbytes, discarded = nbytes + of_pairs.bytes_read, of_pairs.discarded
        blocks, hashes = blocks + of_pairs.blocks, hashes + list(of_pairs.hashes)
    of_checkpoints = (None,) * first + checksums(read, blocks, hashes)
    return Replayed(nbytes, of_checkpoints, tuple(nonfinite), tuple(infinite), discarded)


def check_constant(run: Run, context: Context) -> int:
    """Compare all bytes of the tensors that can only be copied; how many bytes were read.

    Raises:
        UnsupportedFormatError: one is not the same in all checkpoints.
    """
    entries = {name: entry for name, entry in run.tensors.items() if entry.must_be_constant and not entry.kept}

    def compare_worker(reader: TileReader) -> Callable[[Block], None]:
        def compare(block: Block) -> None:
            item = entries[block.name].item_bytes
            for start, stop in block.tiles(context.tile):
                last = reader.raw(len(run.checkpoints) - 1, block.name, start * item, stop * item).clone()
                for index, checkpoint in enumerate(run.checkpoints[:-1]):
                    if not torch.equal(reader.raw(index, block.name, start * item, stop * item), last):
                        raise not_constant(block.name, checkpoint, run.last)

        return compare

    quiet = dataclasses.replace(context, on_progress=None)
    blocks = cut_blocks(entries)
    return stream("replay", run.checkpoints, blocks, compare_worker, quiet).bytes_read if blocks else 0


def replay_blocks(run: Run) -> tuple[Block, ...]:
    """The blocks of pass 2, in its order.

    It goes from the end: what pass 1 read last is still in memory, where memory does not hold the run.
    """
    return cut_blocks({name: entry for name, entry in run.tensors.items() if entry.is_floating})[::-1]


class _AverageWorker:
    """Pass 2 over one block after another, in one thread."""

    def __init__(
        self,
        run: Run,
        reader: TileReader,
        averages: Sequence[Average],
        *,
        first: int,
        wide: bool,
        allow_nonfinite: bool,
        context: Context,
    ) -> None:
        self._allow_nonfinite = allow_nonfinite
        self._nonfinite = [0] * len(averages)
        self._infinite = 0
        self._run = run
        self._reader = reader
        self._averages = averages
        self._first = first
        self._wide = wide
        self._tile = context.tile
        self._device = context.device
        self._work: dict[torch.dtype, tuple[Tensor, list[State]]] = {}
        reader.compute_on(context.device)
        # Pinned where the arithmetic is elsewhere: a GPU writes into such memory by itself.
        size = context.tile * _widest(averages)
        self._out = torch.empty(size, dtype=torch.uint8, pin_memory=context.device != "cpu")
        # β = 1 forgets all that was before, NaN and infinity included; elsewhere they last to the end.
        self._forgets = not allow_nonfinite and any(
            1.0 in betas
            for average in averages
            for betas in (average.coefficients.betas, *average.coefficients.tensor_betas.values())
        )

    def __call__(self, block: Block) -> BlockResult:
        buffer, states = self._workspace(self._accumulate_dtype(block.name))
        sums = self._reader.sum_up(block)
        for state in states:
            state.set_tensor(block.name)
        self._nonfinite, self._infinite = [0] * len(self._averages), 0
        for start, stop in block.tiles(self._tile):
            self._average_tile(block.name, start, stop, buffer[: stop - start], states)
        return BlockResult(sums.hashes(), tuple(self._nonfinite), self._infinite)

    def _average_tile(self, name: str, start: int, stop: int, theta: Tensor, states: Sequence[State]) -> None:
        last = len(self._run.checkpoints) - 1
        sums: list[Tensor] = []
        zeros = _NegativeZeros({average.coefficients.start for average in self._averages})
        for index in range(self._first, last + 1):
            self._reader.load(index - self._first, name, start, theta)
            zeros.take(index, theta)
            if self._forgets:
                sums.append(theta.sum())  # looked at once a tile: a look waits for a GPU to come that far
            for place, (state, average) in enumerate(zip(states, self._averages, strict=True)):
                state.take(index, theta)
                if index in average.writers:
                    result = zeros.kept_in(state.output(index, theta), average.coefficients.start)
                    count = self._hand_on(average, index, name, start, result)
                    self._nonfinite[place] += count if index == last else 0
        if sums and not bool(torch.isfinite(torch.stack(sums)).all()):
            self._reader.refuse_nonfinite(name, start, stop)

    def _hand_on(self, average: Average, index: int, name: str, start: int, result: Tensor) -> int:
        """Round a finished tile and hand it on; how many of its elements are not finite, for checkpoints are not."""
        dtype = TORCH_DTYPES[average.dtypes[name]]
        stored = self._out[: result.numel() * dtype.itemsize]
        rounded = stored.view(dtype)
        if result.device.type == "cpu":
            round_into(result, rounded)
        else:  # rounded first: fewer bytes come back, and by themselves
            rounded.copy_(round_into(result, torch.empty_like(result, dtype=dtype)))
        count = 0 if all_finite(rounded) else self._put_right(average, index, name, start, result.cpu(), rounded)
        average.writers[index].put(name, start * dtype.itemsize, stored)
        return count

    def _put_right(self, average: Average, index: int, name: str, start: int, result: Tensor, rounded: Tensor) -> int:
        """Form again what is not finite in a tile, with more room; keep what is the same infinity in all checkpoints.
        Refuse what is not finite then, or count it where that is allowed.
        """
        stop = start + result.numel()
        if not self._allow_nonfinite:
            self._reader.refuse_nonfinite(name, start, stop)
        same = self._reader.same_infinities(name, start, stop, since=average.coefficients.start - self._first)
        again = self._formed_again(average, index, name, start, same)
        result = torch.where(torch.isfinite(result), result.double(), again)
        round_into(result, rounded)
        kept, finite = torch.isfinite(rounded), torch.isfinite(result)
        is_too_large = bool((finite & ~kept).any()) or not (self._allow_nonfinite or bool((finite | (same != 0)).all()))
        if is_too_large:
            raise too_large(name, average.dtypes[name])
        if index == len(self._run.checkpoints) - 1:
            self._infinite += int((same != 0).sum())
        return int((~kept & (same == 0)).sum())

    def _formed_again(self, average: Average, index: int, name: str, start: int, same: Tensor) -> Tensor:
        """(n,) a tile of an average in float64, a part of its size while it is formed, so that nothing overflows."""
        part = 2.0**-64 if self._run.is_wide(name) else 1.0
        theta = torch.empty_like(same)
        state = RULES[average.coefficients.rule](average.coefficients, torch.empty_like(same))
        state.set_tensor(name)
        for place in range(average.coefficients.start, index + 1):
            self._reader.load(place - self._first, name, start, theta)
            state.take(place, theta.masked_fill_(same != 0, 0.0).mul_(part))
        return torch.where(same != 0, same, state.output(index, theta) / part)

    def _accumulate_dtype(self, name: str) -> torch.dtype:
        return torch.float64 if self._wide or self._run.is_wide(name) else torch.float32

    def _workspace(self, dtype: torch.dtype) -> tuple[Tensor, list[State]]:
        if dtype not in self._work:
            theta, scratch = (torch.empty(self._tile, dtype=dtype, device=self._device) for _ in range(2))
            states = [RULES[each.coefficients.rule](each.coefficients, scratch) for each in self._averages]
            self._work[dtype] = theta, states
        return self._work[dtype]


class _NegativeZeros:
    """Elements of a tile that are −0 in all checkpoints: a difference added to −0 is 0, and they would not stay so.

    Args:
        starts: indices of checkpoints from which they are looked for.
    """

    def __init__(self, starts: Set[int]) -> None:
        self._starts = starts
        self._found: dict[int, Tensor] = {}

    def take(self, index: int, theta: Tensor) -> None:
        """Take in checkpoint `index`; they come in order."""
        if not (self._found or index in self._starts):
            return
        bits = theta.view(torch.int64 if theta.dtype == torch.float64 else torch.int32)
        least = torch.iinfo(bits.dtype).min
        for found in self._found.values():
            found &= bits == least
        # A look at a GPU would wait for it.
        if index in self._starts and (theta.device.type != "cpu" or int(bits.amin()) == least):
            self._found[index] = bits == least

    def kept_in(self, result: Tensor, start: int) -> Tensor:
        """A tile of an average that began at `start`, with those put right."""
        return result.masked_fill_(self._found[start], -0.0) if start in self._found else result


class _CopyWorker:
    """Copies what is not averaged, byte for byte: each checkpoint's to the writers of that checkpoint."""

    def __init__(
        self,
        reader: TileReader,
        entries: Mapping[str, TensorInfo],
        writers: Sequence[Sequence[TensorWriter]],
        *,
        tile: int,
    ) -> None:
        self._reader = reader
        self._entries = entries
        self._writers = writers
        self._tile = tile

    def __call__(self, block: Block) -> None:
        item = self._entries[block.name].item_bytes
        for start, stop in block.tiles(self._tile):
            for index, writers in enumerate(self._writers):
                stored = self._reader.raw(index, block.name, start * item, stop * item)
                for writer in writers:
                    writer.put(block.name, start * item, stored)


def first_read(coefficients: Iterable[Coefficients]) -> int:
    """Index of the first checkpoint that any of the averages takes in."""
    return min(each.start for each in coefficients)


def _widest(averages: Sequence[Average]) -> int:
    """Bytes of an element in the widest of the output dtypes."""
    return max((ITEM_BYTES[code] for average in averages for code in average.dtypes.values()), default=1)
