"""Streamed reading: the bytes of the files, each fetched once, within the memory limit, in any order of work."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ckavg.checkpoints.run import Checkpoint, Shard, TensorInfo
from ckavg.engine.blocks import Block, SampledBlock
from ckavg.engine.remote import RemoteReader
from ckavg.errors import ReadError
from ckavg.storage.address import Address
from ckavg.storage.base import AnyPath, FileInfo, RemotePath
from ckavg.storage.download import Stopped
from ckavg.storage.remote import RemoteStorage

HEAD = 64


class Far:
    """Remote files that record all requests."""

    url = pinned_url = "s3://far"
    is_shared = is_offline = False
    directory = Path("/nowhere")

    def __init__(self) -> None:
        self.contents: dict[str, bytes] = {}
        self.here: frozenset[str] = frozenset()
        self.asked: list[tuple[str, int, int]] = []
        self.broken: tuple[str, int] | None = None
        self.wait: Callable[[], object] = lambda: None

    @property
    def files(self) -> Mapping[str, FileInfo]:
        return {name: FileInfo(len(data)) for name, data in self.contents.items()}

    def local(self, name: str) -> Path | None:
        return self.directory if name in self.here else None

    def read(self, name: str, start: int, stop: int) -> bytes:
        self.asked.append((name, start, stop))
        self.wait()
        if self.broken is not None and self.broken[0] == name and start <= self.broken[1] < stop:
            raise ReadError("broken", hint="")
        return self.contents[name][start:stop]

    def download(self, name: str, on_bytes: Callable[[int], None]) -> Path:
        raise NotImplementedError

    def check_unchanged(self) -> None:
        raise NotImplementedError

    def remove_downloads(self) -> None:
        raise NotImplementedError


def a_run(sizes: Sequence[int], checkpoints: int, seed: int = 0) -> tuple[Far, list[Checkpoint]]:
    """Checkpoints of bfloat16 tensors of these sizes in two files each; in every other one, in another order."""
    generator = random.Random(seed)
    far, run = Far(), []
    root = RemoteStorage(Address("s3", "far"), {"": far}).root
    for step in range(checkpoints):
        entries: dict[str, TensorInfo] = {}
        shards = []
        order = list(enumerate(sizes))
        if step % 2:
            order.reverse()
        for shard in range(2):
            path = root / f"{step}/{shard}"
            offset = HEAD
            for place, numel in order[shard::2]:
                entries[str(place)] = TensorInfo("BF16", (numel,), shard, offset)
                offset += 2 * numel
            far.contents[f"{step}/{shard}"] = generator.randbytes(offset)
            shards.append(Shard(path, offset))
        run.append(Checkpoint(step, root / str(step), "model", tuple(shards), (), entries))
    return far, run


def name_of(path: AnyPath) -> str:
    assert isinstance(path, RemotePath)
    return str(path.inner)


def blocks_of(sizes: Sequence[int], length: int) -> list[Block]:
    return [
        Block(str(place), start, min(start + length, numel))
        for place, numel in enumerate(sizes)
        for start in range(0, numel, length)
    ]


@contextmanager
def opened(run: Sequence[Checkpoint], blocks: Sequence[Block], nbytes: int) -> Iterator[RemoteReader]:
    with RemoteReader(run, blocks, lambda: False, nbytes=nbytes, connections=4) as window:
        yield window


def read_block(window: RemoteReader, far: Far, run: Sequence[Checkpoint], block: Block, tile: int) -> None:
    """Read a block like a worker: tile after tile, of every checkpoint."""
    for start, stop in block.ranges:
        for low in range(start, stop, tile):
            high = min(low + tile, stop)
            for checkpoint in run:
                entry = checkpoint.entries[block.name]
                path = checkpoint.shards[entry.shard].path
                offset, size = entry.offset + 2 * low, 2 * (high - low)
                buffer = bytearray(size)
                if window.has(path):
                    window.read_into(path, offset, memoryview(buffer))
                    assert bytes(buffer) == far.contents[name_of(path)][offset : offset + size]


def read_blocks(window: RemoteReader, far: Far, run: Sequence[Checkpoint], blocks: Sequence[Block], tile: int) -> None:
    for block in blocks:
        read_block(window, far, run, block, tile)


@given(
    sizes=st.lists(st.integers(1, 900_000), min_size=1, max_size=6),
    checkpoints=st.integers(1, 4),
    length=st.sampled_from([50_000, 300_000, 1 << 20]),
    tile=st.sampled_from([7_000, 40_000, 1 << 20]),
    nbytes=st.sampled_from([1, 1 << 20, 64 << 20]),
    seed=st.integers(0, 100),
)
@settings(max_examples=40, deadline=None)
def test_what_is_read_is_what_the_files_hold(
    sizes: list[int], checkpoints: int, length: int, tile: int, nbytes: int, seed: int
) -> None:
    far, run = a_run(sizes, checkpoints, seed)
    blocks = blocks_of(sizes, length)
    with opened(run, blocks, nbytes) as window:
        threads = [
            threading.Thread(target=read_blocks, args=(window, far, run, blocks[half::2], tile)) for half in range(2)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert window.held_bytes == 0


@pytest.mark.parametrize("nbytes", [4 << 20, 64 << 20])
def test_each_byte_is_fetched_once_and_within_the_window(nbytes: int) -> None:
    sizes = [600_000] * 12
    far, run = a_run(sizes, 3)
    blocks = blocks_of(sizes, 200_000)
    most = 0
    with opened([run[0], run[2]], blocks, nbytes) as window:  # of one order
        for block in blocks:
            read_block(window, far, [run[0], run[2]], block, 50_000)
            most = max(most, window.held_bytes)
    assert sum(stop - start for _, start, stop in far.asked) == 2 * 2 * sum(sizes)
    assert most <= 2 * nbytes
    assert len(far.asked) <= 2 * 2 * sum(sizes) / (1 << 20) + 8


def test_work_in_another_order_than_the_files_holds_little() -> None:
    sizes = [400_000] * 16
    far, run = a_run(sizes, 4)
    blocks = blocks_of(sizes, 400_000)
    most = 0
    with opened(run, blocks, 4 << 20) as window:
        for block in random.Random(0).sample(blocks, len(blocks)):
            read_block(window, far, run, block, 100_000)
            most = max(most, window.held_bytes)
    assert most <= 2 * (4 << 20) + (1 << 20)


def test_strips_are_fetched_without_what_lies_between() -> None:
    far, run = a_run([1_000_000], 2)
    starts = tuple(range(10_000, 900_000, 100_000))
    strips = SampledBlock("0", starts[0], starts[-1] + 1000, starts, 1000)
    with opened(run, [strips], 64 << 20) as window:
        read_block(window, far, run, strips, 1000)
    assert sum(stop - start for _, start, stop in far.asked) == 2 * 2 * 1000 * len(starts)
    assert len(far.asked) == 2 * len(starts)


def test_what_is_read_twice_is_fetched_again() -> None:
    far, run = a_run([500_000], 1)
    block = Block("0", 0, 500_000)
    with opened(run, [block], 64 << 20) as window:
        read_block(window, far, run, block, 100_000)
        read_block(window, far, run, block, 100_000)
        assert window.held_bytes == 0
    assert sum(stop - start for _, start, stop in far.asked) == 2 * 1_000_000


def test_bytes_outside_of_the_plan_are_fetched_by_themselves() -> None:
    far, run = a_run([500_000, 500_000], 1)
    path = run[0].shards[0].path
    with opened(run, [Block("1", 0, 500_000)], 64 << 20) as window:
        buffer = bytearray(10)
        window.read_into(path, 3, memoryview(buffer))
    assert bytes(buffer) == far.contents[name_of(path)][3:13]
    assert (name_of(path), 3, 13) in far.asked


def test_files_that_are_here_are_left_to_others() -> None:
    far, run = a_run([500_000, 500_000], 2)
    far.here = frozenset(name_of(shard.path) for shard in run[1].shards)
    blocks = blocks_of([500_000, 500_000], 500_000)
    with opened(run, blocks, 64 << 20) as window:
        assert not any(window.has(shard.path) for shard in run[1].shards)
        for block in blocks:
            read_block(window, far, run, block, 500_000)
    assert {path for path, _, _ in far.asked} == {name_of(shard.path) for shard in run[0].shards}


def test_an_error_reaches_who_needs_the_bytes_and_nobody_else() -> None:
    sizes = [3_000_000, 3_000_000]
    far, run = a_run(sizes, 1)
    far.broken = "0/1", 2_000_000
    blocks = blocks_of(sizes, 3_000_000)
    with opened(run, blocks, 4 << 20) as window:
        read_block(window, far, run, blocks[0], 100_000)
        with pytest.raises(ReadError, match="broken"):
            read_block(window, far, run, blocks[1], 100_000)


def test_whoever_waits_is_let_go_when_the_pass_is_over() -> None:
    far, run = a_run([500_000], 1)
    released, over = threading.Event(), threading.Event()
    far.wait = released.wait
    block = Block("0", 0, 500_000)
    outcome: list[BaseException] = []

    def work() -> None:
        try:
            read_block(window, far, run, block, 1000)
        except Stopped as stopped:
            outcome.append(stopped)

    with RemoteReader(run, [block], over.is_set, nbytes=1 << 20, connections=1) as window:
        thread = threading.Thread(target=work)
        thread.start()
        time.sleep(0.05)
        over.set()
        thread.join()
        released.set()
    assert len(outcome) == 1
