"""No buffer is used again before it is free, whenever the device gets round to its tasks."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import ckavg
from ckavg.engine import tiles
from ckavg.engine.blocks import CHUNK
from ckavg.engine.devices import Uploader
from ckavg.engine.reader import Files
from ckavg.engine.tiles import TileReader
from ckavg.errors import TruncatedShardError
from tests.gpu.fake import LazyStreams, Mark
from tests.runs import random_run, write_run

ROOM = 64


def carried(streams: LazyStreams, sizes: list[int], *, buffers: int = 2) -> bool:
    """Whether tiles of these sizes all arrive as they were read."""
    uploader = Uploader(streams, buffers=buffers)
    generator = torch.Generator().manual_seed(len(sizes))
    sent = [torch.randn(size, generator=generator).bfloat16() for size in sizes]
    arrived = [torch.zeros(size) for size in sizes]
    for tile, out in zip(sent, arrived, strict=True):
        stored = tile.view(torch.uint8).numpy()

        def fill(buffer: memoryview, stored: memoryview = stored.data) -> None:
            buffer[:] = stored

        uploader.upload(fill, stored.nbytes, torch.bfloat16, out, room=max(ROOM, stored.nbytes))
    streams.finish()
    return all(torch.equal(out, tile.float()) for tile, out in zip(sent, arrived, strict=True))


@given(
    sizes=st.lists(st.integers(1, 64), min_size=1, max_size=20),
    buffers=st.integers(1, 4),
    data=st.data(),
)
def test_every_tile_arrives(sizes: list[int], buffers: int, data: st.DataObject) -> None:
    def advance(streams: LazyStreams) -> None:
        queue = data.draw(st.sampled_from(["copying", "computing"]))
        left = len(streams.asked[queue]) - streams.done[queue]
        streams.reach(Mark(queue, streams.done[queue] + data.draw(st.integers(0, min(left, 2)))))

    assert carried(LazyStreams(advance=advance), sizes, buffers=buffers)


def test_every_tile_arrives_at_the_last_moment() -> None:
    assert carried(LazyStreams(), [32] * 9)


@pytest.mark.parametrize("careless", ["wait", "send", "widen"])
def test_without_one_of_the_marks_it_would_not(careless: str) -> None:
    assert not carried(LazyStreams(careless=frozenset({careless})), [32] * 9)


def test_nothing_is_waited_for_before_the_buffers_are_all_in_use() -> None:
    streams = LazyStreams()
    assert carried(streams, [1, 2])
    waiting = LazyStreams()
    uploader = Uploader(waiting)
    for _ in range(2):
        uploader.upload(lambda buffer: None, 2, torch.bfloat16, torch.zeros(1), room=ROOM)
    assert waiting.done == {"copying": 0, "computing": 0}
    uploader.upload(lambda buffer: None, 2, torch.bfloat16, torch.zeros(1), room=ROOM)
    assert waiting.done["copying"] == 1


def test_after_a_reading_that_failed_the_buffers_are_as_good_as_before() -> None:
    streams = LazyStreams()
    uploader = Uploader(streams)
    out = torch.zeros(4)
    stored = torch.ones(4).view(torch.uint8).numpy().data

    def fill(buffer: memoryview) -> None:
        buffer[:] = stored

    def fail(buffer: memoryview) -> None:
        raise TruncatedShardError("shorter than it was")

    for reading in (fill, fill, fill):
        with pytest.raises(TruncatedShardError):
            uploader.upload(fail, 16, torch.float32, out, room=16)
        uploader.upload(reading, 16, torch.float32, out, room=16)
    streams.finish()
    assert torch.equal(out, torch.ones(4))


def test_a_reader_sends_what_is_not_for_this_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every tile as the file has it, whatever its dtype; tiles for the CPU do not go that way."""
    arrived: list[Tensor] = []

    class Recording(LazyStreams):
        def widen(self, source: Tensor, out: Tensor, *, after: Mark) -> Mark:
            assert out.device.type == "meta"
            assert out.shape == source.shape
            place = len(arrived)
            arrived.append(torch.empty(0))

            def keep() -> None:
                arrived[place] = source.clone()

            return self._ask("computing", after, keep)

    streams = Recording()
    monkeypatch.setattr(tiles, "CudaStreams", lambda device: streams)
    name = "chunk_and_a_bit"
    dtypes = (torch.bfloat16, torch.float64, torch.float16, torch.float32)
    weights = [{name: random_run(1, 1, dtype)[0][name]} for dtype in dtypes]
    checkpoints = [
        ckavg.open_run(write_run(tmp_path / str(place), [each, each], (0, 1))).checkpoints[0]
        for place, each in enumerate(weights)
    ]
    with Files(threads=1) as files:
        reader = TileReader(checkpoints, files, tile=CHUNK)
        reader.compute_on("meta")
        expected = []
        for start, stop in ((0, CHUNK), (CHUNK, 16_389), (5, 6)):
            for index, each in enumerate(weights):
                reader.load(index, name, start, torch.empty(stop - start, device="meta"))
                expected.append(each[name][start:stop])
                here = torch.empty(stop - start)
                reader.load(index, name, start, here)
                assert torch.equal(here, expected[-1].float())
        streams.finish()
        assert len(arrived) == len(expected)
        for got, want in zip(arrived, expected, strict=True):
            assert got.dtype == want.dtype
            assert torch.equal(got, want)
