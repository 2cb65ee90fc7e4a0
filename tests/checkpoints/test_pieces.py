"""Tensors in pieces: any cut into boxes, and any range of elements, give what the whole tensor has."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ckavg.checkpoints.pieces import Box, cut, overlapping
from ckavg.checkpoints.run import Checkpoint, Shard, TensorInfo
from ckavg.engine.reader import Files

CODES = {1: "U8", 2: "BF16", 4: "F32", 8: "F64"}


@st.composite
def cut_tensors(draw: st.DrawFn) -> tuple[tuple[int, ...], list[Box]]:
    """A shape, and boxes that fill it: cut again and again by a plane, in any order."""
    shape = tuple(draw(st.lists(st.integers(1, 7), max_size=4)))
    boxes: list[Box] = [(tuple(0 for _ in shape), shape)]
    for _ in range(draw(st.integers(0, 6)) if shape else 0):
        start, sizes = boxes.pop(draw(st.integers(0, len(boxes) - 1)))
        axis = draw(st.integers(0, len(shape) - 1))
        at = draw(st.integers(0, sizes[axis]))  # at an end: one of the two is empty
        low, high = list(sizes), list(sizes)
        low[axis], high[axis] = at, sizes[axis] - at
        above = list(start)
        above[axis] += at
        boxes += [(start, tuple(low)), (tuple(above), tuple(high))]
    return shape, draw(st.permutations(boxes))


def written(path: Path, whole: np.ndarray, boxes: list[Box]) -> Checkpoint:
    """The boxes of a tensor in two files, some bytes between them."""
    files = [bytearray(b"x"), bytearray(b"yy")]
    places: list[tuple[Box, int, int]] = []
    for number, (start, sizes) in enumerate(boxes):
        data = whole[tuple(slice(first, first + size) for first, size in zip(start, sizes, strict=True))].tobytes()
        places.append(((start, sizes), number % 2, len(files[number % 2])))
        files[number % 2] += data + bytes(number % 3)
    shards = []
    for number, content in enumerate(files):
        (path / str(number)).write_bytes(content)
        shards.append(Shard(path / str(number), len(content)))
    pieces = cut(whole.shape, places)
    entry = TensorInfo(CODES[whole.itemsize], whole.shape, pieces[0].shard, pieces[0].offset, pieces=pieces)
    return Checkpoint(1, path, "model", tuple(shards), (), {"w": entry})


@settings(max_examples=300, deadline=None)
@given(cut_tensors(), st.sampled_from(sorted(CODES)), st.data())
def test_any_cut_and_any_range_equal_the_whole(
    tmp_path_factory: pytest.TempPathFactory, tensor: tuple[tuple[int, ...], list[Box]], item: int, data: st.DataObject
) -> None:
    shape, boxes = tensor
    whole = np.random.default_rng(0).integers(0, 200, math.prod(shape)).astype(f"u{item}").reshape(shape)
    checkpoint = written(tmp_path_factory.mktemp("pieces"), whole, boxes)
    start = data.draw(st.integers(0, whole.size - 1))
    stop = data.draw(st.integers(start + 1, whole.size))
    buffer = bytearray((stop - start) * item)
    with Files(threads=1) as files:
        files.read_elements(checkpoint, "w", start, memoryview(buffer), on_miss=lambda: None)
        assert files.bytes_read == len(buffer), "no byte is read that is not needed"
    assert buffer == whole.reshape(-1)[start:stop].tobytes()
    assert sum(end - begin for _, begin, end in checkpoint.ranges("w", start, stop)) == len(buffer)


def test_boxes_that_no_plane_parts() -> None:
    pinwheel = [((0, 0), (1, 2)), ((0, 2), (2, 1)), ((1, 0), (2, 1)), ((2, 1), (1, 2)), ((1, 1), (1, 1))]
    pieces = cut((3, 3), [(box, 0, 0) for box in pinwheel])
    held = [piece.position(place) for piece, first, last in overlapping(pieces, 0, 9) for place in range(first, last)]
    assert sorted(held) == list(range(9))
    with pytest.raises(ValueError, match="no piece holds some"):
        cut((3, 3), [(box, 0, 0) for box in pinwheel[:-1]])


@pytest.mark.parametrize(
    ("boxes", "told"),
    [
        ([((0, 0), (2, 4))], r"no piece holds all of \[0:4, 0:4\]"),
        ([((0, 0), (2, 4)), ((2, 0), (2, 3))], r"no piece holds all of \[2:4, 0:4\]"),
        ([((0, 0), (3, 4)), ((2, 0), (2, 4))], "two pieces hold elements"),
        ([((0, 0), (4, 4)), ((0, 0), (4, 4))], "two pieces hold elements"),
        ([((0, 0), (2, 4)), ((2, 0), (3, 4))], "exceeds"),
        ([((0, 0), (2, 4)), ((2, -1), (2, 5))], "exceeds"),
        ([((0,), (16,))], "1 dimensions in a tensor with 2"),
        ([], "no piece holds"),
    ],
)
def test_what_is_not_exactly_the_tensor_is_refused(boxes: list[Box], told: str) -> None:
    with pytest.raises(ValueError, match=told):
        cut((4, 4), [(box, 0, 0) for box in boxes])


def test_many_pieces_are_checked_and_found_at_once() -> None:
    rows, columns = 64, 512
    grid = [((row, column), (1, 1)) for row in range(rows) for column in range(columns)]
    pieces = cut((rows, columns), [(box, 0, 0) for box in grid])
    assert len(pieces) == rows * columns
    assert [piece.first for piece, _, _ in overlapping(pieces, 1000, 1003)] == [1000, 1001, 1002]
