"""Stage *health*, its plan: in which order all tensors are read, so that most files are read from front to back.

Pure: opens no file. A file is hashed on the way if its tensors come in the order of its bytes; checkpoints that were
written by the same program agree about that. Files of another order are read once more, for their hash alone.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from ckavg.checkpoints.run import Checkpoint, TensorInfo

PIECE = 1 << 17
"""Elements of a tensor that are read at once: what a thread compares, six times 512 KiB, is near a core's cache."""

WeightFile = tuple[int, int]
"""Index of a checkpoint, and of one of its shards."""

_Key = tuple[str, tuple[int, ...], bool]


@dataclass(frozen=True, slots=True)
class Tensor:
    """A tensor of one name and shape, in every checkpoint that holds it so.

    Attributes:
        name: its name.
        held: index of each such checkpoint, ascending.
        entries: what the header of each declares.
    """

    name: str
    held: tuple[int, ...]
    entries: tuple[TensorInfo, ...]

    @property
    def numel(self) -> int:
        """Number of elements."""
        return self.entries[0].numel

    @property
    def is_floating(self) -> bool:
        """Whether its values are compared; those of all others are only hashed."""
        return self.entries[0].is_floating


@dataclass(frozen=True, slots=True)
class Piece:
    """Elements `start` to `stop` of a tensor, in all checkpoints that hold it; `place` counts all pieces of a walk."""

    place: int
    tensor: Tensor
    start: int
    stop: int


@dataclass(frozen=True, slots=True)
class Walk:
    """The order of the reading.

    Attributes:
        tensors: every tensor of any checkpoint, in the order in which they are read.
        on_the_way: the files whose bytes come in their own order by that.
        apart: the files that must be read once more to be hashed.
    """

    tensors: tuple[Tensor, ...]
    on_the_way: tuple[WeightFile, ...]
    apart: tuple[WeightFile, ...]

    def pieces(self) -> Iterator[Piece]:
        """All tensors cut into pieces, in order."""
        place = 0
        for tensor in self.tensors:
            for start in range(0, tensor.numel, PIECE):
                yield Piece(place, tensor, start, min(start + PIECE, tensor.numel))
                place += 1


def plan_walk(checkpoints: Sequence[Checkpoint]) -> Walk:
    """Go through the tensors in the order that most checkpoints have; what those lack comes last.

    A tensor whose shape differs between two checkpoints counts as two tensors.
    """
    orders = [tuple(map(_key_of, _in_file_order(checkpoint))) for checkpoint in checkpoints]
    most_common = Counter(orders).most_common(1)[0][0] if orders else ()
    places = {key: place for place, key in enumerate(dict.fromkeys((*most_common, *_chained(orders))))}
    tensors: dict[_Key, Tensor] = {}
    for index, checkpoint in enumerate(checkpoints):
        for name, entry in checkpoint.entries.items():
            key = _key_of((name, entry))
            before = tensors.get(key, Tensor(name, (), ()))
            tensors[key] = Tensor(name, (*before.held, index), (*before.entries, entry))
            places.setdefault(key, len(places))  # an empty tensor
    in_order, apart = [], []
    for index, checkpoint in enumerate(checkpoints):
        latest = [-1] * len(checkpoint.shards)
        wrong: set[int] = set()
        for item in _in_file_order(checkpoint):
            shard, place = item[1].shard, places[_key_of(item)]
            if place < latest[shard]:
                wrong.add(shard)
            latest[shard] = place
        in_order += [(index, shard) for shard in range(len(checkpoint.shards)) if shard not in wrong]
        apart += [(index, shard) for shard in sorted(wrong)]
    return Walk(tuple(tensors[key] for key in sorted(tensors, key=places.__getitem__)), tuple(in_order), tuple(apart))


def data_start(checkpoint: Checkpoint, shard: int) -> int:
    """Where the header of a file ends and the bytes of its tensors begin."""
    offsets = (entry.offset for entry in checkpoint.entries.values() if entry.shard == shard)
    return min(offsets, default=checkpoint.shards[shard].nbytes)


def _in_file_order(checkpoint: Checkpoint) -> list[tuple[str, TensorInfo]]:
    """Tensors with elements, as their bytes lie."""
    filled = [item for item in checkpoint.entries.items() if item[1].nbytes]
    return sorted(filled, key=lambda item: (item[1].shard, item[1].offset))


def _key_of(item: tuple[str, TensorInfo]) -> _Key:
    name, entry = item
    return name, entry.shape, entry.is_floating


def _chained(orders: Sequence[tuple[_Key, ...]]) -> Iterator[_Key]:
    for order in orders:
        yield from order
