"""Stage *discover*: tensors in pieces, boxes that several processes saved each on its own. Pure arithmetic.

A piece lies in C order at one place of a file. So whatever range of elements of the tensor is asked for, in row-major
order, what a piece has of it is one range of the piece, too: it is read at once, and then spread over the rows.
"""

from __future__ import annotations

import itertools
import math
from bisect import bisect_left
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from operator import attrgetter

Box = tuple[tuple[int, ...], tuple[int, ...]]
"""Where a box begins in a tensor, and its sizes, by dimension."""

_MOST_IRREGULAR, _MOST_CUTS = 300, 50
"""Pieces that no plane parts, and planes one within another: those of real runs are parted by one or two."""


@dataclass(frozen=True, slots=True)
class Piece:
    """A box of a tensor, and where its elements are.

    Attributes:
        shard: index into `Checkpoint.shards`.
        offset: where its bytes begin, counted from the start of the file.
        first: which element of the tensor is its first, in row-major order.
        rows: its dimensions: how many there are, and how far apart in the tensor. Those that lie close together are
            one, so that the last are the elements of a row, with a distance of 1.
        reach: the last element of the tensor that it, or a piece before it, holds.
    """

    shard: int
    offset: int
    first: int
    rows: tuple[tuple[int, int], ...]
    reach: int

    def position(self, element: int) -> int:
        """Which element of the tensor this element of the piece is."""
        position = self.first
        for count, distance in reversed(self.rows):
            element, place = divmod(element, count)
            position += place * distance
        return position

    def count_before(self, position: int) -> int:
        """How many of its elements come before this element of the tensor."""
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
        """Its elements `start` to `stop` as rows of the tensor: the first element, how many rows, how far apart, and
        the elements of each.
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
    """The pieces of a tensor of this shape: of each its box, shard and offset; none where the boxes are not exactly it.

    Raises:
        ValueError: a box leads out of the tensor, two of them overlap, or some of the tensor is in none.

    >>> cut((2, 6), [(((0, 0), (2, 4)), 0, 64), (((0, 4), (2, 2)), 1, 64)])[1]
    Piece(shard=1, offset=64, first=4, rows=((2, 6), (2, 1)), reach=11)
    """
    full = [each for each in boxes if math.prod(each[0][1])]
    for start, sizes in (box for box, _, _ in full):
        if not len(start) == len(sizes) == len(shape):
            raise ValueError(f"a piece with {len(sizes)} dimensions, of a tensor with {len(shape)}")
        if any(not 0 <= first <= first + size <= whole for first, size, whole in zip(start, sizes, shape, strict=True)):
            raise ValueError(f"a piece {list(sizes)} at {list(start)} leads out of a tensor {list(shape)}")
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
    """The pieces that hold some of the elements `start` to `stop` of a tensor, and which of their own these are."""
    end = bisect_left(pieces, stop, key=attrgetter("first"))
    for place in range(bisect_left(pieces, start, hi=end, key=attrgetter("reach")), end):
        piece = pieces[place]
        first, last = piece.count_before(start), piece.count_before(stop)
        if first < last:
            yield piece, first, last


def spread(piece: Piece, start: int, stop: int, data: memoryview, target: memoryview, *, at: int, item: int) -> None:
    """Put the elements `start` to `stop` of a piece, of `item` bytes each, to where they belong in `target`, which
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
    """Refuse boxes that are not exactly the `whole`, which is given by the first and the end in each dimension.

    Planes that cut none of the boxes part them, again and again, as whoever shards a tensor has parted them. What no
    plane parts is compared pair by pair.
    """
    todo, left = [(boxes, whole)], _MOST_CUTS * (len(boxes) + 10)
    while todo:
        boxes, whole = todo.pop()
        left -= len(boxes)
        if left < 0:
            raise ValueError(f"{len(boxes):,} pieces that are cut too often")
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
    """The boxes between planes across an axis, each with what they must fill; empty where there is no plane."""
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
        raise ValueError(f"{len(boxes):,} pieces that no plane parts")
    spans = [_spans(box) for box in boxes]
    for one, other in itertools.combinations(spans, 2):
        if all(low < its_end and its_low < end for (low, end), (its_low, its_end) in zip(one, other, strict=True)):
            raise ValueError(f"two pieces hold elements of {_shown(one)}")
    if sum(math.prod(sizes) for _, sizes in boxes) != math.prod(end - low for low, end in whole):
        raise ValueError(f"no piece holds some of {_shown(whole)}")


def _spans(box: Box) -> tuple[tuple[int, int], ...]:
    return tuple((start, start + size) for start, size in zip(*box, strict=True))


def _shown(spans: tuple[tuple[int, int], ...]) -> str:
    """Part of a tensor, as one types it."""
    return f"[{', '.join(f'{low}:{end}' for low, end in spans)}]"
