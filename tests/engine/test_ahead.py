"""Announcing what will be read: nothing while all is in memory, then far enough ahead and never twice."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

import ckavg
from ckavg.engine import reader as files
from ckavg.engine.prefetch import Prefetch
from tests.runs import random_run, write_run

NBYTES = 100
BLOCKS = list(range(20))
SIZES = [20] * len(BLOCKS)


class Announced:
    """Collects what is announced, and lets the test wait for it."""

    def __init__(self) -> None:
        self.blocks: list[int] = []
        self._more = threading.Condition()

    def __call__(self, block: int) -> None:
        with self._more:
            self.blocks.append(block)
            self._more.notify()

    def wait_for(self, count: int) -> list[int]:
        with self._more:
            assert self._more.wait_for(lambda: len(self.blocks) >= count, timeout=20)
            return self.blocks


@contextmanager
def announcing(nbytes: int = NBYTES) -> Iterator[tuple[Prefetch, Announced]]:
    announced = Announced()
    with Prefetch(SIZES, announced, nbytes) as ahead:
        yield ahead, announced


def test_nothing_is_announced_while_all_is_in_memory() -> None:
    with announcing() as (ahead, announced):
        for place in range(20):
            ahead.begin(place)
    assert announced.blocks == []


def test_the_first_miss_announces_its_block_and_those_within_reach() -> None:
    with announcing() as (ahead, announced):
        ahead.begin(3)
        ahead.miss(3)
        announced.wait_for(5)
        ahead.miss(3)
    assert announced.blocks == BLOCKS[3:8]


def test_every_block_that_is_begun_announces_another() -> None:
    with announcing() as (ahead, announced):
        ahead.begin(0)
        ahead.miss(0)
        announced.wait_for(5)
        for place in range(1, 20):
            ahead.begin(place)
            announced.wait_for(min(place + 5, 20))
    assert announced.blocks == BLOCKS


def test_blocks_that_were_begun_in_the_meantime_are_passed_over() -> None:
    with announcing() as (ahead, announced):
        ahead.begin(0)
        ahead.miss(0)
        announced.wait_for(5)
        ahead.begin(12)
        announced.wait_for(10)
    assert announced.blocks[5:] == BLOCKS[12:17]


def test_a_block_is_announced_however_large() -> None:
    with announcing(nbytes=1) as (ahead, announced):
        ahead.begin(0)
        ahead.miss(0)
        announced.wait_for(1)
        ahead.begin(1)
        announced.wait_for(2)
    assert announced.blocks == BLOCKS[:2]


def test_nothing_is_announced_after_the_end() -> None:
    with announcing() as (ahead, announced):
        pass
    ahead.miss(0)
    ahead.begin(5)
    assert announced.blocks == []


def test_a_pass_over_files_that_are_not_in_memory_announces_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = ckavg.open_run(write_run(tmp_path, random_run(0, 3, torch.bfloat16), (0, 1, 2)))
    want = ckavg.path_length(run)
    (tmp_path / "averaged" / "path.json").unlink()
    announced: set[Path] = set()
    monkeypatch.setattr(files.Files, "_read_cached", lambda *_: 0)
    monkeypatch.setattr(files.Files, "announce", lambda self, path, offset, nbytes: announced.add(path))
    assert ckavg.path_length(run).lengths == want.lengths
    assert announced == {shard.path for point in run.checkpoints for shard in point.shards}
