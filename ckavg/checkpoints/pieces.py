"""Stage *discover*: tensors in pieces, boxes saved by several processes. Pure arithmetic.

A piece is stored in C order at one place of a file. For any range of elements of the tensor, in row-major order, the
elements in a piece are one range of that piece: they are read in one go, then spread over the rows.
"""

from __future__ import annotations

import itertools
import math
from bisect import bisect_left
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from operator import attrgetter

Box = tuple[tuple[int, ...], tuple[int, ...]]
"""A box in a tensor: its start and its sizes, by dimension."""

_MOST_IRREGULAR, _MOST_CUTS = 300, 50
"""Limits for pieces that no plane separates, and for nested planes; in real runs one or two planes separate them."""


@dataclass(frozen=True, slots=True)
class Piece:
    """A box of a tensor, and the place of its elements.

    Attributes:
        shard: index into `Checkpoint.shards`.
        offset: offset of its bytes in the file.
        first: its first element, as an index into the tensor in row-major order.
        rows: its dimensions, each with its size and its stride in the tensor. Contiguous dimensions are merged; the
            last one is the elements of a row, with stride 1.
        reach: the last element of the tensor that it, or a piece before it, holds.
    """

    shard: int
    offset: int
    first: int
    rows: tuple[tuple[int, int], ...]
    reach: int

    def position(self, element: int) -> int:
        """The index in the tensor of an element of the piece."""
        position = self.first
        for count, distance in reversed(self.rows):
            element, place = divmod(element, count)
            position += place * distance
        return position

    def count_before(self, position: int) -> int:
        """How many of its elements come before an element of the tensor."""
        rest, before = max(0, position - self.first), 0
        inner = math.prod(count for count, _ in self.rows)
        for count, distance in self.rows:
            inner //= count
            place, rest = divmod(rest, distance)
            if place >= count:
                return before + count * inner
            before += place * inner
        return before

    def runs(self, start: int, stop: int) -> Iterator[tuple[int, int, int, int]]:
        """Its elements `start` to `stop` as rows of the tensor: first element, number of rows, stride, and elements per
        row.
        """
        length = self.rows[-1][0]
        count, distance = self.rows[-2] if len(self.rows) > 1 else (1, 0)
        while start < stop:
            row, place = divmod(start, length)
            size, rows = min(length - place, stop - start), 1
            if size == length:
                rows = min((stop - start) // length, count - row % count)
            yield self.position(start), rows, distance, size
            start += rows * size


def cut(shape: tuple[int, ...], boxes: Sequence[tuple[Box, int, int]]) -> tuple[Piece, ...]:
    """The pieces of a tensor of this shape, from the box, shard and offset of each; the boxes must cover it exactly.

    Raises:
        ValueError: a box exceeds the tensor, two boxes overlap, or a part of the tensor is in none.

    >>> cut((2, 6), [(((0, 0), (2, 4)), 0, 64), (((0, 4), (2, 2)), 1, 64)])[1]
    Piece(shard=1, offset=64, first=4, rows=((2, 6), (2, 1)), reach=11)
    """
    full = [each for each in boxes if math.prod(each[0][1])]
    for start, sizes in (box for box, _, _ in full):
        if not len(start) == len(sizes) == len(shape):
            raise ValueError(f"a piece with {len(sizes)} dimensions in a tensor with {len(shape)}")
        if any(not 0 <= first <= first + size <= whole for first, size, whole in zip(start, sizes, shape, strict=True)):
            raise ValueError(f"a piece {list(sizes)} at {list(start)} exceeds a tensor {list(shape)}")
    if math.prod(shape):
        _check_cover([box for box, _, _ in full], tuple((0, size) for size in shape))
    strides = [math.prod(shape[place + 1 :]) for place in range(len(shape))]
    made = sorted((_piece(box, shard, offset, strides) for box, shard, offset in full), key=attrgetter("first"))
    reaches = itertools.accumulate((piece.reach for piece in made), max)
    return tuple(
        Piece(piece.shard, piece.offset, piece.first, piece.rows, reach)
        for piece, reach in zip(made, reaches, strict=True)
    )


def overlapping(pieces: Sequence[Piece], start: int, stop: int) -> Iterator[tuple[Piece, int, int]]:
    """The pieces that hold some of the elements `start` to `stop` of a tensor, each with its own range of them."""
    end = bisect_left(pieces, stop, key=attrgetter("first"))
    for place in range(bisect_left(pieces, start, hi=end, key=attrgetter("reach")), end):
        piece = pieces[place]
        first, last = piece.count_before(start), piece.count_before(stop)
        if first < last:
            yield piece, first, last


def spread(piece: Piece, start: int, stop: int, data: memoryview, target: memoryview, *, at: int, item: int) -> None:
    """Copy the elements `start` to `stop` of a piece, of `item` bytes each, to their positions in `target`, which
    begins with element `at` of the tensor.
    """
    import numpy as np

    stored, out = (np.frombuffer(each, dtype=f"u{item}") for each in (data, target))
    done = 0
    for position, rows, distance, length in piece.runs(start, stop):
        size = rows * length
        wide = np.lib.stride_tricks.as_strided(out[position - at :], (rows, length), (distance * item, item))
        wide[...] = stored[done : done + size].reshape(rows, length)
        done += size


def _piece(box: Box, shard: int, offset: int, strides: Sequence[int]) -> Piece:
    start, sizes = box
    rows: list[tuple[int, int]] = []
    for count, distance in zip(reversed(sizes), reversed(strides), strict=True):
        if count == 1:
            continue
        if rows and rows[0][0] * rows[0][1] == distance:
            rows[0] = (count * rows[0][0], rows[0][1])
        else:
            rows.insert(0, (count, distance))
    if not rows or rows[-1][1] != 1:
        rows.append((1, 1))
    first = sum(place * distance for place, distance in zip(start, strides, strict=True))
    last = first + sum((count - 1) * distance for count, distance in rows)
    return Piece(shard, offset, first, tuple(rows), last)


def _check_cover(boxes: list[Box], whole: tuple[tuple[int, int], ...]) -> None:
    """Refuse boxes that do not cover the `whole` exactly; it is given by begin and end in each dimension.

    Boxes are separated by planes that cut none of them, recursively, in the way a tensor is sharded. Boxes that no
    plane separates are compared pair by pair.
    """
    todo, left = [(boxes, whole)], _MOST_CUTS * (len(boxes) + 10)
    while todo:
        boxes, whole = todo.pop()
        left -= len(boxes)
        if left < 0:
            raise ValueError(f"{len(boxes):,} pieces are nested too deeply")
        if not boxes:
            raise ValueError(f"no piece holds {_shown(whole)}")
        parted = next(filter(None, (_parted(boxes, whole, axis) for axis in range(len(whole)))), None)
        if parted is not None:
            todo += parted
        elif len(boxes) > 1:
            _check_pairs(boxes, whole)
        elif _spans(boxes[0]) != whole:
            raise ValueError(f"no piece holds all of {_shown(whole)}")


def _parted(
    boxes: list[Box], whole: tuple[tuple[int, int], ...], axis: int
) -> list[tuple[list[Box], tuple[tuple[int, int], ...]]]:
    """The boxes between planes across an axis, each group with the part it must cover; empty without a plane."""
    in_order = sorted(boxes, key=lambda box: box[0][axis])
    ends = list(itertools.accumulate((start[axis] + sizes[axis] for start, sizes in in_order), max))
    planes = [place for place in range(1, len(boxes)) if in_order[place][0][axis] >= ends[place - 1]]
    low, high = whole[axis]
    found = []
    for first, last in itertools.pairwise([0, *planes, len(boxes)] if planes else []):
        end = in_order[last][0][axis] if last < len(boxes) else high
        found.append((in_order[first:last], (*whole[:axis], (low, end), *whole[axis + 1 :])))
        low = end
    return found


def _check_pairs(boxes: list[Box], whole: tuple[tuple[int, int], ...]) -> None:
    if len(boxes) > _MOST_IRREGULAR:
        raise ValueError(f"{len(boxes):,} pieces are not separated by any plane")
    spans = [_spans(box) for box in boxes]
    for one, other in itertools.combinations(spans, 2):
        if all(low < its_end and its_low < end for (low, end), (its_low, its_end) in zip(one, other, strict=True)):
            raise ValueError(f"two pieces hold elements of {_shown(one)}")
    if sum(math.prod(sizes) for _, sizes in boxes) != math.prod(end - low for low, end in whole):
        raise ValueError(f"no piece holds some of {_shown(whole)}")


def _spans(box: Box) -> tuple[tuple[int, int], ...]:
    return tuple((start, start + size) for start, size in zip(*box, strict=True))


def _shown(spans: tuple[tuple[int, int], ...]) -> str:
    """A part of a tensor in index notation."""
    return f"[{', '.join(f'{low}:{end}' for low, end in spans)}]"
