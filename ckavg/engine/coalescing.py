"""Stage *engine*: small tensors that lie side by side, read and computed with as one tile.

Otherwise a model of 100,000 tensors, or a run of 1,000 adapters, would cost Python code for each tensor of each
checkpoint. The sums, hashes and results of each block stay the same.

Every tensor has a slot in the tile, zero behind its elements, and is read straight into it. Slots are *packed* for
element-wise work and *padded* for sums by chunk: zeros change no sum, so the order of the plain path holds.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from operator import itemgetter
from typing import TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ckavg.checkpoints.run import Checkpoint, TensorInfo, distinct_tables
from ckavg.engine.blocks import CHUNK, COLUMNS, Block
from ckavg.engine.checksums import BYTES, WORD

SMALL = 1 << 16
"""Elements of the largest tensor that is joined to others; larger tensors gain nothing."""

_FEWEST_COLUMNS = 128
"""A chunk is padded to a power of two from here, and beyond 1,024 elements to rows of as many."""

_MOST_TENSORS, MOST_ELEMENTS = 1024, 1 << 17
"""Limits of a group, with padded chunks. The system reads into at most 1,024 buffers at once (IOV_MAX)."""

_LEAST_ELEMENTS = 1 << 15
"""A group is not cut smaller than this to occupy more threads."""

_ALIGNMENT = 8
"""Elements: every slot begins at a whole word of 64 bits, whatever the dtype."""

File = TypeVar("File")
Key = Callable[[Block], object]
"""Blocks with equal keys may form a group; a block with the key None stays alone."""


def alone(_: Block) -> None:
    """The key that joins nothing."""


def by_dtype(checkpoints: Sequence[Checkpoint]) -> Key:
    """The key of small whole tensors: the dtype that all checkpoints store them in."""
    tables = [table for table, _ in distinct_tables(checkpoints)]
    first, others = tables[0], tables[1:]

    def key(block: Block) -> str | None:
        if block.start or block.stop > SMALL:
            return None
        entry = first[block.name]
        for table in others:
            other = table[block.name]
            if other.pieces or other.dtype != entry.dtype:
                return None
        return None if entry.pieces else entry.dtype

    return key


def cut_groups(blocks: Sequence[Block], key: Key, *, threads: int = 1, tile: int = MOST_ELEMENTS) -> list[int]:
    """Cut blocks, in their order, into groups that fit a tile; return the end of each.

    >>> cut_groups([Block(name, 0, 9) for name in "abcd"], lambda block: block.name < "c" or None)
    [2, 3, 4]
    """
    small = sum(block.stop for block in blocks if block.stop <= SMALL)
    most = min(tile, MOST_ELEMENTS, max(_LEAST_ELEMENTS, small // threads))
    ends: list[int] = []
    begin = chunks = length = size = more = needed = 0
    common: object = None
    for place, block in enumerate(blocks):
        own, stop = key(block), block.stop
        if stop != size:  # mostly the same again
            size, more, needed = stop, -(-stop // CHUNK), padded_length(stop)
        is_one = own is not None and own == common and place - begin < _MOST_TENSORS
        if place and not (is_one and (chunks + more) * max(length, needed) <= most):
            ends.append(place)
            begin, chunks, length = place, 0, 0
        common, chunks, length = own, chunks + more, max(length, needed)
    return [*ends, len(blocks)] if blocks else []


def padded_length(numel: int) -> int:
    """The number of elements that each chunk of a tensor is padded to.

    >>> [padded_length(numel) for numel in (1, 200, 1024, 1025, 16_384, 50_000)]
    [128, 256, 1024, 2048, 16384, 16384]
    """
    if numel <= COLUMNS:
        return max(_FEWEST_COLUMNS, 1 << (numel - 1).bit_length())
    return min(CHUNK, -(-numel // COLUMNS) * COLUMNS)


@dataclass(frozen=True, slots=True)
class Part:
    """Tensors that lie side by side in a file: where they begin, and the memory that each is read into."""

    shard: int
    offset: int
    buffers: list[memoryview]


def side_by_side(placed: Iterable[tuple[File, int, memoryview]]) -> Iterator[tuple[File, int, list[memoryview]]]:
    """Bytes by file and offset, joined where they touch: the file, where they begin, and their parts.

    >>> [(*place, len(parts)) for *place, parts in side_by_side((0, at, memoryview(b"abc")) for at in (6, 0, 3, 12))]
    [(0, 0, 3), (0, 12, 1)]
    """
    joined: list[tuple[File, int, list[memoryview]]] = []
    end: tuple[File, int] | None = None
    for file, start, data in sorted(placed, key=itemgetter(0, 1)):
        if (file, start) != end:
            joined.append((file, start, []))
        joined[-1][2].append(data)
        end = file, start + len(data)
    yield from joined


class Group:
    """Small tensors of one dtype that are computed with as one, and where each lies in a tile.

    Args:
        blocks: whole tensors.
        chunk: elements that each chunk of each of them takes; 0: the tensors are packed.

    Attributes:
        starts: (blocks,) the first element of each in the tile.
        sizes: (blocks,) elements of each.
        chunks: (blocks,) chunks of each.
        size: elements of the tile that they take.
    """

    def __init__(self, blocks: Sequence[Block], chunk: int = 0) -> None:
        self.blocks = blocks
        self.sizes = np.array([block.stop for block in blocks], dtype=np.int64)
        self.chunks = -(-self.sizes // CHUNK)
        slots = self.chunks * chunk if chunk else -(-self.sizes // _ALIGNMENT) * _ALIGNMENT
        ends = np.cumsum(slots)
        self.starts: NDArray[np.int64] = ends - slots
        self.size = int(ends[-1])
        self._slots: dict[tuple[int, int], list[memoryview]] = {}
        self._parts: dict[tuple[int, int], list[Part]] = {}

    @classmethod
    def padded(cls, blocks: Sequence[Block]) -> tuple[Group, int]:
        """A group of padded chunks, and the elements that each chunk takes."""
        chunk = padded_length(max(block.stop for block in blocks))
        return cls(blocks, chunk), chunk

    @property
    def first_chunks(self) -> NDArray[np.int64]:
        """(blocks,) of all chunks, the first of each tensor."""
        return np.cumsum(self.chunks) - self.chunks

    def slots(self, memory: Tensor) -> list[memoryview]:
        """The bytes of each tensor in (size · bytes of an element,) uint8."""
        key = memory.data_ptr(), len(memory)
        if key not in self._slots:
            item, data = len(memory) // self.size, memory.numpy().data
            begins, ends = (self.starts * item).tolist(), ((self.starts + self.sizes) * item).tolist()
            self._slots[key] = [data[begin:end] for begin, end in zip(begins, ends, strict=True)]
        return self._slots[key]

    def parts(self, table: Mapping[str, TensorInfo], memory: Tensor) -> list[Part]:
        """How the tensors of a file are read into (size · bytes of an element,) uint8, which is zero between them."""
        key = id(table), memory.data_ptr()
        if key not in self._parts:
            memory.zero_()
            entries = [table[block.name] for block in self.blocks]
            slots = zip(entries, self.slots(memory), strict=True)
            placed = side_by_side((entry.shard, entry.offset, slot) for entry, slot in slots)
            self._parts[key] = [Part(*each) for each in placed]
        return self._parts[key]


class GroupSums:
    """The chunk sums of a group in each of some checkpoints; see `checksums.py`.

    Args:
        group: its tensors.
        checkpoints: how many are read.
    """

    def __init__(self, group: Group, checkpoints: int) -> None:
        self._group = group
        inner = np.arange(int(group.chunks.sum())) - np.repeat(group.first_chunks, group.chunks)
        self._starts = np.repeat(group.starts, group.chunks) + inner * CHUNK
        self._sums = np.zeros((checkpoints, len(inner)), dtype=np.int64)

    def take(self, index: int, memory: Tensor) -> None:
        """Take the bytes of checkpoint `index`: (size · bytes of an element,) uint8, zero between the tensors."""
        words = memory.view(torch.int64).numpy()
        item = len(memory) // self._group.size
        np.add.reduceat(words, self._starts * item // WORD, out=self._sums[index])

    def hashes(self) -> list[bytes]:
        """The hashes of each block's chunk sums, 16 bytes for each checkpoint."""
        count, sha256 = len(self._sums), hashlib.sha256
        rows = self._sums.astype("<i8")
        data = rows.T.tobytes()  # by chunk, and of each all checkpoints
        found = []
        for first, chunks in zip(self._group.first_chunks.tolist(), self._group.chunks.tolist(), strict=True):
            if chunks == 1:
                begin, end = first * count * WORD, (first + 1) * count * WORD
                each = [sha256(data[at : at + WORD]).digest()[:BYTES] for at in range(begin, end, WORD)]
            else:
                each = [sha256(row.tobytes()).digest()[:BYTES] for row in rows[:, first : first + chunks]]
            found.append(b"".join(each))
        return found
