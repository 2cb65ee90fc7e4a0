"""Pass 2: stream every checkpoint once through the update rules and hand on each finished tile.

Floating tensors are averaged; all others are copied from the last checkpoint. Several averages are formed from one
reading, each tile being widened once for all of them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ckavg.averaging.adapters import Products
from ckavg.averaging.copying import TensorWriter, copy_tensors, put_whole
from ckavg.averaging.kernels import CompiledTiles
from ckavg.averaging.products import replay_products
from ckavg.averaging.rules import RULES, NegativeZeros, State, round_into, too_large
from ckavg.checkpoints.run import ITEM_BYTES, Run
from ckavg.engine.blocks import Block, cut_blocks
from ckavg.engine.checksums import checksums
from ckavg.engine.coalescing import Group, GroupSums, Key, by_dtype
from ckavg.engine.context import Context
from ckavg.engine.distributed import PassJournal
from ckavg.engine.stream import is_worth_compiling, stream_groups
from ckavg.engine.tiles import TORCH_DTYPES, TileReader, all_finite
from ckavg.errors import MissingPartsError, raise_all
from ckavg.schemes import Coefficients


@dataclass(frozen=True, slots=True)
class Average:
    """One average to form: its coefficients, its dtypes, and where its bytes go.

    Attributes:
        coefficients: β and α of every checkpoint that it visits.
        dtypes: output dtype of every floating tensor, as a safetensors code.
        writers: take the average as it stands after a checkpoint, by the index of that checkpoint among those.
        places: indices of those checkpoints in the run that is read; empty: it visits all of them.
    """

    coefficients: Coefficients
    dtypes: Mapping[str, str]
    writers: Mapping[int, TensorWriter]
    places: tuple[int, ...] = ()

    @property
    def read(self) -> tuple[int, ...]:
        """Indices in the run of the checkpoints that have a part in it."""
        return self.places[self.coefficients.start :]


@dataclass(frozen=True, slots=True)
class Replayed:
    """What pass 2 read.

    Attributes:
        bytes_read: how much, in this attempt.
        checksums: of the averaged tensors of each checkpoint; None where it was not read.
        nonfinite: how many elements of each average are NaN or infinite, for some of the checkpoints are.
        infinite: of each average, the tensors that hold infinities, the same in all its checkpoints, by name.
        discarded: of each average, what was cut off its products; see `ReplayedProducts`.
    """

    bytes_read: int
    checksums: tuple[str | None, ...]
    nonfinite: tuple[int, ...]
    infinite: tuple[tuple[str, ...], ...]
    discarded: tuple[Mapping[int, float], ...]


@dataclass(frozen=True, slots=True)
class BlockResult:
    """Of one finished block: its hash for each checkpoint that is read, how much of each average is not finite for some
    of its checkpoints are not, and how many elements are the same infinity in all of them.
    """

    hashes: bytes
    nonfinite: tuple[int, ...]
    infinite: tuple[int, ...]

    def to_json(self) -> list[Any]:
        """The same as JSON values."""
        return [self.hashes.hex(), self.nonfinite, self.infinite]

    @classmethod
    def from_json(cls, values: list[Any]) -> BlockResult:
        """The same from such values."""
        hashes, *counts = values
        return cls(bytes.fromhex(hashes), *map(tuple, counts))


Journals = Callable[[str, Callable[[Any], Any], Callable[[Any], Any]], PassJournal[Any]]
"""From the name of a pass, and the way of what comes of a block to JSON values and back, to the journal of the pass."""


def replay(
    run: Run,
    averages: Sequence[Average],
    *,
    products: Products | None = None,
    wide: bool = False,
    allow_nonfinite: bool = False,
    context: Context | None = None,
    journals: Journals | None = None,
) -> Replayed:
    """Form all averages of a run in one reading. A checkpoint that has a part in none of them is not read.

    Args:
        run: all checkpoints that any average visits, by step.
        averages: what to form.
        products: factors that are averaged by their products; None: tensor by tensor, like all others.
        wide: accumulate in float64; float64 checkpoints always do.
        allow_nonfinite: let NaN and infinity through instead of ending the pass.
        context: how the pass runs.
        journals: what is in its place already.

    Raises:
        MissingPartsError: this process has done its part, and others have not; it does not wait for them.
        NonFiniteError: a checkpoint holds NaN or infinity and may not, or a value does not fit the output dtype.
        TruncatedShardError, ReadError: a file changed or cannot be read.
        OutputError: a writer could not take its bytes.
    """
    context = context or Context()
    everywhere = tuple(range(len(run.checkpoints)))
    averages = [dataclasses.replace(each, places=each.places or everywhere) for each in averages]
    places = sorted({place for average in averages for place in average.read})
    read = [run.checkpoints[place] for place in places]
    paired = products.names if products is not None else frozenset()
    copied = {name: entry for name, entry in run.tensors.items() if not entry.is_floating and name not in paired}

    def average_worker(reader: TileReader) -> _AverageWorker:
        return _AverageWorker(
            run,
            reader,
            averages,
            places=places,
            wide=wide,
            allow_nonfinite=allow_nonfinite,
            compiled=compiled,
            context=context,
        )

    writers: dict[int, list[TensorWriter]] = {}
    for average in averages:
        for index, writer in average.writers.items():
            writers.setdefault(average.places[index], []).append(writer)
    blocks = tuple(block for block in replay_blocks(run) if block.name not in paired)
    compiled = is_worth_compiling(read, blocks, context)
    journals = journals or _no_journals
    nbytes = 0
    unfinished: list[MissingPartsError] = []
    if copied:
        with _put_off(unfinished):
            nbytes = copy_tensors(run, copied, writers, context, journals("copy", _as_it_is, _as_it_is))
    discarded: tuple[Mapping[int, float], ...] = ({},) * len(averages)
    of_pairs = None
    if products is not None:
        with _put_off(unfinished):
            journal = journals("products", _as_it_is, _as_it_is)
            of_pairs = replay_products(run, products, averages, places=places, context=context, journal=journal)
    averaged = stream_groups(
        "replay",
        read,
        blocks,
        average_worker,
        _by_average(run, averages),
        context,
        journals("average", BlockResult.to_json, BlockResult.from_json),
    )
    raise_all(unfinished)
    nbytes += averaged.bytes_read
    results = averaged.results
    hashes = [each.hashes for each in results]
    numbers = range(len(averages))
    nonfinite = tuple(sum(each.nonfinite[number] for each in results) for number in numbers)
    infinite = tuple(
        tuple(sorted({block.name for block, each in zip(blocks, results, strict=True) if each.infinite[number]}))
        for number in numbers
    )
    if of_pairs is not None:
        nbytes, discarded = nbytes + of_pairs.bytes_read, of_pairs.discarded
        blocks, hashes = blocks + of_pairs.blocks, hashes + list(of_pairs.hashes)
    of_places = dict(zip(places, checksums(read, blocks, hashes), strict=True))
    return Replayed(nbytes, tuple(map(of_places.get, everywhere)), nonfinite, infinite, discarded)


@contextmanager
def _put_off(unfinished: list[MissingPartsError]) -> Iterator[None]:
    """Go on with the rest of a part where other parts have not finished this."""
    try:
        yield
    except MissingPartsError as error:
        unfinished.append(error)


def _as_it_is(value: Any) -> Any:
    return value


def _no_journals(*_: object) -> PassJournal[Any]:
    return PassJournal({}, (), lambda _: None)


def _by_average(run: Run, averages: Sequence[Average]) -> Key:
    """The key of small tensors that are averaged alike: by dtypes and coefficients."""
    same_dtype = by_dtype(run.checkpoints)
    alike = [
        (each.dtypes, each.coefficients.tensor_betas, frozenset(each.coefficients.uncorrected)) for each in averages
    ]

    def key(block: Block) -> object:
        name, dtype = block.name, same_dtype(block)
        if dtype is None:
            return None
        return dtype, [(dtypes[name], betas.get(name), name in uncorrected) for dtypes, betas, uncorrected in alike]

    return key


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
        places: Sequence[int],
        wide: bool,
        allow_nonfinite: bool,
        compiled: bool,
        context: Context,
    ) -> None:
        self._allow_nonfinite = allow_nonfinite
        self._nonfinite = [0] * len(averages)
        self._infinite = [0] * len(averages)
        self._run = run
        self._reader = reader
        self._averages = averages
        at = {place: number for number, place in enumerate(places)}
        # By average: at which places among those that are read its checkpoints are, from that on with which it begins.
        self._read = [tuple(at[place] for place in average.read) for average in averages]
        # By such a place: the averages that take the checkpoint in, and which of theirs it is.
        self._takers: list[list[tuple[int, int]]] = [[] for _ in places]
        for number, average in enumerate(averages):
            for index, place in enumerate(average.places):
                if index >= average.coefficients.start:
                    self._takers[at[place]].append((number, index))
        # Likewise: which sets of checkpoints it belongs to.
        members = {read: frozenset(read) for read in self._read}
        self._reads = [[read for read, own in members.items() if number in own] for number in range(len(places))]
        self._wide = wide
        self._tile = context.tile
        self._device = context.device
        self._work: dict[torch.dtype, tuple[Tensor, list[State]]] = {}
        reader.compute_on(context.device)
        # Pinned where the arithmetic is elsewhere: a GPU writes into such memory by itself.
        size = context.tile * _widest(averages)
        self._out = torch.empty(size, dtype=torch.uint8, pin_memory=context.device != "cpu")
        # β = 1 forgets all that was before, NaN and infinity included; elsewhere they last to the end.
        self._forgetful = {
            read
            for read, average in zip(self._read, averages, strict=True)
            for betas in (average.coefficients.betas, *average.coefficients.tensor_betas.values())
            if 1.0 in betas and not allow_nonfinite
        }
        self._compiled: CompiledTiles | None = None
        if compiled and not wide and not self._forgetful:
            indices: list[list[int | None]] = [
                [dict(takers).get(number) for number in range(len(averages))] for takers in self._takers
            ]
            writers = [
                (place, number, averages[number].writers[index].put)
                for place, takers in enumerate(self._takers)
                for number, index in takers
                if index in averages[number].writers
            ]
            read = [run.checkpoints[place] for place in places]
            of_averages = [(average.coefficients, average.dtypes) for average in averages]
            self._compiled = CompiledTiles(read, reader, of_averages, indices, writers, tile=context.tile)

    def __call__(self, blocks: Sequence[Block]) -> Sequence[BlockResult]:
        found = self._average_group(blocks) if len(blocks) > 1 else None
        return [self._average_block(block) for block in blocks] if found is None else found

    def _average_group(self, blocks: Sequence[Block]) -> list[BlockResult] | None:
        """Average several small tensors as one tile. None where not all is finite: then each must be looked at, and
        what was handed on is handed on again.
        """
        group = Group(blocks)
        buffer, states = self._workspace(self._accumulate_dtype(blocks[0].name))
        theta, sums, totals = buffer[: group.size], GroupSums(group, len(self._takers)), []
        zeros = {read: NegativeZeros() for read in self._read}
        for state in states:
            state.set_tensor(blocks[0].name)
        for place, takers in enumerate(self._takers):
            self._reader.load_group(place, group, theta, sums)
            for read in self._reads[place]:
                zeros[read].take(theta)
            if self._forgetful:
                totals.append(theta.sum())
            for number, index in takers:
                states[number].take(index, theta)
                if index in self._averages[number].writers:
                    result = zeros[self._read[number]].kept_in(states[number].output(index, theta))
                    if not self._hand_on_group(number, index, group, result):
                        return None
        if totals and not bool(torch.isfinite(torch.stack(totals)).all()):
            return None
        none = (0,) * len(self._averages)
        return [BlockResult(hashes, none, none) for hashes in sums.hashes()]

    def _hand_on_group(self, number: int, index: int, group: Group, result: Tensor) -> bool:
        """Round finished tensors of average `number` and hand them on; whether all of them are finite."""
        average = self._averages[number]
        dtype = TORCH_DTYPES[average.dtypes[group.blocks[0].name]]
        stored = self._out[: group.size * dtype.itemsize]
        if not all_finite(round_into(result, stored.view(dtype))):
            return False
        put_whole(average.writers[index], group, stored)
        return True

    def _average_block(self, block: Block) -> BlockResult:
        buffer, states = self._workspace(self._accumulate_dtype(block.name))
        sums = self._reader.sum_up(block)
        for state in states:
            state.set_tensor(block.name)
        self._nonfinite, self._infinite = [0] * len(self._averages), [0] * len(self._averages)
        form = self._compiled.begin(block, sums) if self._compiled is not None else None
        for start, stop in block.tiles(self._tile):
            if form is not None:
                start = form(start, stop)
            if start < stop:
                self._average_tile(block.name, start, stop, buffer[: stop - start], states)
        return BlockResult(sums.hashes(), tuple(self._nonfinite), tuple(self._infinite))

    def _average_tile(self, name: str, start: int, stop: int, theta: Tensor, states: Sequence[State]) -> None:
        sums: list[Tensor] = []
        zeros = {read: NegativeZeros() for read in self._read}
        for place, takers in enumerate(self._takers):
            self._reader.load(place, name, start, theta)
            for read in self._reads[place]:
                zeros[read].take(theta)
            if self._forgetful:
                sums.append(theta.sum())  # looked at once a tile: a look waits for a GPU to come that far
            for number, index in takers:
                state = states[number]
                state.take(index, theta)
                if index in self._averages[number].writers:
                    result = zeros[self._read[number]].kept_in(state.output(index, theta))
                    self._hand_on(number, index, name, start, result)
        if sums and not bool(torch.isfinite(torch.stack(sums)).all()):
            for read in self._forgetful:
                self._reader.refuse_nonfinite(name, start, stop, read)

    def _hand_on(self, number: int, index: int, name: str, start: int, result: Tensor) -> None:
        """Round a finished tile of average `number` and hand it on."""
        average = self._averages[number]
        dtype = TORCH_DTYPES[average.dtypes[name]]
        stored = self._out[: result.numel() * dtype.itemsize]
        rounded = stored.view(dtype)
        if result.device.type == "cpu":
            round_into(result, rounded)
        else:  # rounded first: fewer bytes come back, and by themselves
            rounded.copy_(round_into(result, torch.empty_like(result, dtype=dtype)))
        if not all_finite(rounded):
            self._put_right(number, index, name, start, result.cpu(), rounded)
        average.writers[index].put(name, start * dtype.itemsize, stored)

    def _put_right(self, number: int, index: int, name: str, start: int, result: Tensor, rounded: Tensor) -> None:
        """Form again what is not finite in a tile, with more room; keep what is the same infinity in all checkpoints.
        Refuse what is not finite then, or count it where that is allowed.
        """
        average, stop = self._averages[number], start + result.numel()
        if not self._allow_nonfinite:
            self._reader.refuse_nonfinite(name, start, stop, self._read[number])
        same = self._reader.same_infinities(name, start, stop, self._read[number])
        again = self._formed_again(number, index, name, start, same)
        result = torch.where(torch.isfinite(result), result.double(), again)
        round_into(result, rounded)
        kept, finite = torch.isfinite(rounded), torch.isfinite(result)
        is_too_large = bool((finite & ~kept).any()) or not (self._allow_nonfinite or bool((finite | (same != 0)).all()))
        if is_too_large:
            raise too_large(name, average.dtypes[name])
        if index == len(average.places) - 1:
            self._infinite[number] += int((same != 0).sum())
            self._nonfinite[number] += int((~kept & (same == 0)).sum())

    def _formed_again(self, number: int, index: int, name: str, start: int, same: Tensor) -> Tensor:
        """(n,) a tile of an average in float64, a part of its size while it is formed, so that nothing overflows."""
        part = 2.0**-64 if self._run.is_wide(name) else 1.0
        theta = torch.empty_like(same)
        coefficients = self._averages[number].coefficients
        state = RULES[coefficients.rule](coefficients, torch.empty_like(same))
        state.set_tensor(name)
        for own in range(coefficients.start, index + 1):
            self._reader.load(self._read[number][own - coefficients.start], name, start, theta)
            state.take(own, theta.masked_fill_(same != 0, 0.0).mul_(part))
        return torch.where(same != 0, same, state.output(index, theta) / part)

    def _accumulate_dtype(self, name: str) -> torch.dtype:
        return torch.float64 if self._wide or self._run.is_wide(name) else torch.float32

    def _workspace(self, dtype: torch.dtype) -> tuple[Tensor, list[State]]:
        if dtype not in self._work:
            theta, scratch = (torch.empty(self._tile, dtype=dtype, device=self._device) for _ in range(2))
            states = [RULES[each.coefficients.rule](each.coefficients, scratch) for each in self._averages]
            self._work[dtype] = theta, states
        return self._work[dtype]


def _widest(averages: Sequence[Average]) -> int:
    """Bytes of an element in the widest of the output dtypes."""
    return max((ITEM_BYTES[code] for average in averages for code in average.dtypes.values()), default=1)
