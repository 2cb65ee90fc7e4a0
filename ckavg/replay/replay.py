"""Pass 2: stream every checkpoint once through the update rules and hand on each finished tile.

Floating tensors are averaged; all others are copied from the last checkpoint. Several averages are formed from one
reading, each tile being widened once for all of them.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from ckavg.engine.blocks import Block, cut_blocks
from ckavg.engine.checksums import checksums
from ckavg.engine.stream import Ledger, Settings, stream
from ckavg.engine.tiles import TORCH_DTYPES, TileReader, all_finite
from ckavg.errors import NonFiniteError
from ckavg.replay.rounding import round_into
from ckavg.replay.rules import RULES, State
from ckavg.run.values import ITEM_BYTES, Entry, Run
from ckavg.schemes import Coefficients


class Sink(Protocol):
    """Takes finished bytes; called from several threads, each byte of a tensor once."""

    def put(self, name: str, offset: int, values: Tensor) -> None:
        """Take the bytes of tensor `name` from byte `offset` on: (n,) uint8 in CPU memory, valid during the call."""


@dataclass(frozen=True, slots=True)
class Average:
    """One average to form: its coefficients, its dtypes, and where its bytes go.

    Attributes:
        coefficients: β and α of every checkpoint.
        dtypes: output dtype of every floating tensor, as a safetensors code.
        sinks: take the average as it stands after a checkpoint, by the index of that checkpoint.
    """

    coefficients: Coefficients
    dtypes: Mapping[str, str]
    sinks: Mapping[int, Sink]


@dataclass(frozen=True, slots=True)
class Replayed:
    """What pass 2 read.

    Attributes:
        bytes_read: how much, in this attempt.
        checksums: of the averaged tensors of each checkpoint; None where it was not read.
        nonfinite: how many elements of each average are NaN or infinite.
    """

    bytes_read: int
    checksums: tuple[str | None, ...]
    nonfinite: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Formed:
    """Of one finished block: its hash for each checkpoint, and how much of each average is not finite."""

    digests: tuple[str, ...]
    nonfinite: tuple[int, ...]

    def to_json(self) -> list[list[Any]]:
        """The same as JSON values."""
        return [list(self.digests), list(self.nonfinite)]

    @classmethod
    def from_json(cls, values: list[list[Any]]) -> Formed:
        """The same from such values."""
        digests, nonfinite = values
        return cls(tuple(digests), tuple(nonfinite))


def replay(
    run: Run,
    averages: Sequence[Average],
    *,
    wide: bool = False,
    allow_nonfinite: bool = False,
    settings: Settings | None = None,
    ledger: Ledger[Formed] | None = None,
) -> Replayed:
    """Form all averages of a run in one reading.

    Args:
        run: the checkpoints, the anchor first.
        averages: what to form.
        wide: accumulate in float64; float64 checkpoints always do.
        allow_nonfinite: let NaN and infinity through instead of ending the pass.
        settings: how the pass runs.
        ledger: which of `replay_blocks` are in their place already.

    Raises:
        NonFiniteError: a checkpoint holds NaN or infinity and may not, or a value does not fit the output dtype.
        TruncatedShardError, ReadError: a file changed or cannot be read.
        OutputError: a sink could not take its bytes.
    """
    settings = settings or Settings()
    first = first_read(average.coefficients for average in averages)
    read = run.checkpoints[first:]
    copied = {name: entry for name, entry in run.tensors.items() if not entry.is_floating}

    def average_worker(reader: TileReader) -> _AverageWorker:
        return _AverageWorker(
            run, reader, averages, first=first, wide=wide, allow_nonfinite=allow_nonfinite, settings=settings
        )

    written = sorted({index for average in averages for index in average.sinks})
    sinks = [[average.sinks[index] for average in averages if index in average.sinks] for index in written]

    def copy_worker(reader: TileReader) -> _CopyWorker:
        return _CopyWorker(reader, run.tensors, sinks, tile=settings.tile)

    blocks = replay_blocks(run)
    averaged = stream("replay", read, blocks, average_worker, settings, ledger)
    nbytes = averaged.bytes_read
    if copied:
        quiet = Settings(threads=settings.threads, tile=settings.tile, ranks=settings.ranks, remote=settings.remote)
        of_written = [run.checkpoints[index] for index in written]
        nbytes += stream("replay", of_written, cut_blocks(copied), copy_worker, quiet).bytes_read
    digests = [formed.digests for formed in averaged.results]
    nonfinite = [sum(formed.nonfinite[place] for formed in averaged.results) for place in range(len(averages))]
    return Replayed(nbytes, (None,) * first + checksums(read, blocks, digests), tuple(nonfinite))


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
        settings: Settings,
    ) -> None:
        self._allow_nonfinite = allow_nonfinite
        self._nonfinite = [0] * len(averages)
        self._run = run
        self._reader = reader
        self._averages = averages
        self._first = first
        self._wide = wide
        self._tile = settings.tile
        self._device = settings.device
        self._work: dict[torch.dtype, tuple[Tensor, list[State]]] = {}
        reader.compute_on(settings.device)
        # Pinned where the arithmetic is elsewhere: a GPU writes into such memory by itself.
        size = settings.tile * _widest(run, averages)
        self._out = torch.empty(size, dtype=torch.uint8, pin_memory=settings.device != "cpu")
        # β = 1 forgets all that was before, NaN and infinity included; elsewhere they last to the end.
        self._forgets = not allow_nonfinite and any(
            1.0 in betas
            for average in averages
            for betas in (average.coefficients.betas, *average.coefficients.tensor_betas.values())
        )

    def __call__(self, block: Block) -> Formed:
        buffer, states = self._workspace(self._accumulate_dtype(block.name))
        sums = self._reader.sum_up(block)
        for state in states:
            state.turn_to(block.name)
        self._nonfinite = [0] * len(self._averages)
        for start, stop in block.tiles(self._tile):
            self._average_tile(block.name, start, stop, buffer[: stop - start], states)
        return Formed(sums.digests(), tuple(self._nonfinite))

    def _average_tile(self, name: str, start: int, stop: int, theta: Tensor, states: Sequence[State]) -> None:
        last = len(self._run.checkpoints) - 1
        sums: list[Tensor] = []
        for index in range(self._first, last + 1):
            self._reader.load(index - self._first, name, start, theta)
            if self._forgets:
                sums.append(theta.sum())  # looked at once a tile: a look waits for a GPU to come that far
            for place, (state, average) in enumerate(zip(states, self._averages, strict=True)):
                state.take(index, theta)
                if index in average.sinks:
                    count = self._hand_on(average, average.sinks[index], name, start, state.output(index, theta))
                    self._nonfinite[place] += count if index == last else 0
        if sums and not bool(torch.isfinite(torch.stack(sums)).all()):
            self._reader.refuse_nonfinite(name, start, stop)

    def _hand_on(self, average: Average, sink: Sink, name: str, start: int, result: Tensor) -> int:
        """Round a finished tile and hand it on; how many of its elements are not finite."""
        dtype = TORCH_DTYPES[average.dtypes[name]]
        stored = self._out[: result.numel() * dtype.itemsize]
        rounded = stored.view(dtype)
        if result.device.type == "cpu":
            round_into(result, rounded)
        else:  # rounded first: fewer bytes come back, and by themselves
            rounded.copy_(round_into(result, torch.empty_like(result, dtype=dtype)))
        count = 0 if all_finite(rounded) else self._judge(name, start, result, rounded, average.dtypes[name])
        sink.put(name, start * dtype.itemsize, stored)
        return count

    def _judge(self, name: str, start: int, result: Tensor, rounded: Tensor, dtype: str) -> int:
        """Refuse a tile that is not finite, or count what is not where that is allowed."""
        finite = torch.isfinite(result)
        if not (self._allow_nonfinite or bool(finite.all())):
            self._reader.refuse_nonfinite(name, start, start + result.numel())
            raise NonFiniteError(
                f"tensor {name!r}: the weights are finite, but their average overflows while it is formed.",
                hint="Accumulate with more room: --accumulate float64.",
            )
        kept = torch.isfinite(rounded)
        if bool((finite.to(kept.device) & ~kept).any()):
            raise NonFiniteError(
                f"tensor {name!r}: a value of the average does not fit {dtype} "
                f"(largest {torch.finfo(rounded.dtype).max:.4g}).",
                hint="Choose an output dtype with more room: --dtype bfloat16 or --dtype float32.",
            )
        return int((~kept).sum())

    def _accumulate_dtype(self, name: str) -> torch.dtype:
        return torch.float64 if self._wide or self._run.is_wide(name) else torch.float32

    def _workspace(self, dtype: torch.dtype) -> tuple[Tensor, list[State]]:
        if dtype not in self._work:
            theta, scratch = (torch.empty(self._tile, dtype=dtype, device=self._device) for _ in range(2))
            states = [RULES[each.coefficients.rule](each.coefficients, scratch) for each in self._averages]
            self._work[dtype] = theta, states
        return self._work[dtype]


class _CopyWorker:
    """Copies what is not averaged, byte for byte: each checkpoint's to the sinks of that checkpoint."""

    def __init__(
        self, reader: TileReader, entries: Mapping[str, Entry], sinks: Sequence[Sequence[Sink]], *, tile: int
    ) -> None:
        self._reader = reader
        self._entries = entries
        self._sinks = sinks
        self._tile = tile

    def __call__(self, block: Block) -> None:
        item = self._entries[block.name].item_bytes
        for start, stop in block.tiles(self._tile):
            for index, sinks in enumerate(self._sinks):
                stored = self._reader.raw(index, block.name, start * item, stop * item)
                for sink in sinks:
                    sink.put(block.name, start * item, stored)


def first_read(coefficients: Iterable[Coefficients]) -> int:
    """Index of the first checkpoint that any of the averages takes in."""
    return min(each.start for each in coefficients)


def _widest(run: Run, averages: Sequence[Average]) -> int:
    """Bytes of an element in the widest of the output dtypes."""
    floating = [name for name, entry in run.tensors.items() if entry.is_floating]
    return max((ITEM_BYTES[average.dtypes[name]] for average in averages for name in floating), default=1)
