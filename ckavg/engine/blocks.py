"""Stage *plan*: the tensors of a model cut into blocks, the unit of work. Pure arithmetic.

Three sizes, in elements. A *chunk* is the unit of summation and a *block* the unit of work: both are fixed, so that
sums are formed in the same order whatever else is tuned. A *tile* is what is computed at once; it is a whole number of
chunks, divides a block, and changes nothing but the speed.

A chunk is summed as rows of so many *columns*, one row after the other.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from ckavg.checkpoints.run import Checkpoint, TensorInfo, distinct_tables
from ckavg.errors import SettingError

CHUNK = 1 << 14
COLUMNS = 1 << 10
BLOCK = 1 << 22
TILE = 1 << 18


@dataclass(frozen=True, slots=True)
class Block:
    """Elements `start` to `stop` of one tensor, at most `BLOCK` of them."""

    name: str
    start: int
    stop: int

    @property
    def ranges(self) -> tuple[tuple[int, int], ...]:
        """The element ranges that are read."""
        return ((self.start, self.stop),)

    @property
    def size(self) -> int:
        """How many elements are read."""
        return self.stop - self.start

    def tiles(self, tile: int) -> Iterator[tuple[int, int]]:
        """The block's element range in steps of `tile`.

        >>> list(Block("w", 0, 40_000).tiles(CHUNK))
        [(0, 16384), (16384, 32768), (32768, 40000)]
        """
        for start in range(self.start, self.stop, tile):
            yield start, min(start + tile, self.stop)


@dataclass(frozen=True, slots=True)
class SampledBlock(Block):
    """Of the elements `start` to `stop`, only strips of equal length that begin at `starts`; at most `TILE` in all.

    >>> SampledBlock("w", 0, 40_000, starts=(100, 30_000), length=512).size
    1024
    """

    starts: tuple[int, ...]
    length: int

    @property
    def size(self) -> int:
        """How many elements are read."""
        return len(self.starts) * self.length

    @property
    def ranges(self) -> tuple[tuple[int, int], ...]:
        """The element ranges that are read."""
        return tuple((start, start + self.length) for start in self.starts)


def cut_blocks(entries: Mapping[str, TensorInfo]) -> tuple[Block, ...]:
    """Cut tensors into blocks, in the order in which their bytes lie in the files.

    >>> cut_blocks({"w": TensorInfo("F32", (2, 3), 0, 80), "empty": TensorInfo("F32", (0,), 0, 80)})
    (Block(name='w', start=0, stop=6),)
    """
    in_file_order = sorted(entries, key=lambda name: entries[name].offset)
    in_file_order.sort(key=lambda name: entries[name].shard)
    sizes = ((name, entries[name].numel) for name in in_file_order)
    return tuple(
        Block(name, start, min(start + BLOCK, numel)) for name, numel in sizes for start in range(0, numel, BLOCK)
    )


def sizes_of(checkpoints: Sequence[Checkpoint], blocks: Sequence[Block]) -> Sequence[int]:
    """Bytes that are read of each block."""
    tables = distinct_tables(checkpoints)
    if len(tables) == 1:  # mostly; there may be a million blocks
        table, count = tables[0]
        return array("q", (count * table[block.name].item_bytes * block.size for block in blocks))
    items = {
        name: sum(count * table[name].item_bytes for table, count in tables) for name in {each.name for each in blocks}
    }
    return array("q", (items[block.name] * block.size for block in blocks))


def check_tile(tile: int) -> int:
    """Return a tile size that divides a block into whole chunks, or refuse it."""
    if tile < CHUNK or BLOCK % tile or tile % CHUNK:
        raise SettingError(f"tile is {tile} elements; it must be a power of two from {CHUNK} to {BLOCK}.")
    return tile
