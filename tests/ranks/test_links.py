"""What processes tell each other, with threads in their place: values, errors, and that one is gone."""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import ckavg
from ckavg.checkpoints.run import Checkpoint, Shard, TensorInfo
from ckavg.engine.blocks import Block
from ckavg.engine.context import Progress
from ckavg.engine.distributed import Ranks
from ckavg.engine.links import Links
from ckavg.engine.stream import GlobalProgress, partition
from ckavg.errors import NonFiniteError, RanksError, SettingError
from tests.cli.runner import run_cli

SECONDS = 20


def in_each(world: int, body: Callable[[Ranks, Links], Any]) -> list[Any]:
    """What each of some ranks returns or raises."""
    pairs = {rank: socket.socketpair() for rank in range(1, world)}
    names = {rank: f"Rank {rank}" for rank in range(world)}
    links = [Links({rank: pair[0] for rank, pair in pairs.items()}, names)]
    links += [Links({0: pair[1]}, names) for pair in pairs.values()]

    def run(rank: int) -> Any:
        try:
            return body(Ranks(rank, world, _links=links[rank]), links[rank])
        except BaseException as error:
            return error
        finally:
            links[rank].close()

    with ThreadPoolExecutor(world) as threads:
        return [each.result(SECONDS) for each in [threads.submit(run, rank) for rank in range(world)]]


def test_values_by_rank() -> None:
    def body(ranks: Ranks, _: Links) -> Any:
        with ranks.fail_together():
            every = [ranks.gather(("large " * 10**6 * ranks.rank, number)) for number in range(5)]
            assert [[number for _, number in values] for values in every] == [[number] * 3 for number in range(5)]
            assert [len(text) for text, _ in every[0]] == [0, 6_000_000, 12_000_000]
            ranks.wait()
            return ranks.first(lambda: f"of {ranks.rank}")

    assert in_each(3, body) == ["of 0"] * 3


@pytest.mark.parametrize("failing", [0, 1, 2])
def test_an_error_of_one_is_that_of_all(failing: int) -> None:
    """Whether they wait for a value, or look now and then."""

    def body(ranks: Ranks, _: Links) -> Any:
        with ranks.fail_together(), ranks.fail_together():
            ranks.wait()
            if ranks.rank == failing:
                raise NonFiniteError("a tensor holds NaN", hint="Stop before it.")
            while ranks.rank == 1:
                ranks.check()
            ranks.first(ranks.wait)

    raised = in_each(3, body)
    assert [str(error) for error in raised] == ["a tensor holds NaN\nStop before it."] * 3
    assert {type(error) for error in raised} == {NonFiniteError}
    for rank, error in enumerate(raised):
        assert any("in body" in note for note in getattr(error, "__notes__", ())) == (rank != failing)


def test_the_first_leaves_when_the_others_have_closed_their_files() -> None:
    closed: list[int] = []
    may_close = threading.Event()

    def body(ranks: Ranks, _: Links) -> Any:
        try:
            with ranks.fail_together():
                try:
                    ranks.wait()
                    if ranks.is_first:
                        raise SettingError("no")
                    ranks.wait()
                finally:
                    if ranks.rank == 1:
                        may_close.wait(SECONDS)
                    closed.append(ranks.rank)
                    if ranks.rank == 2:
                        may_close.set()
        except SettingError:
            return sorted(closed)

    assert in_each(3, body)[0] == [0, 1, 2]


def test_one_that_is_gone_ends_the_job() -> None:
    def body(ranks: Ranks, links: Links) -> Any:
        if ranks.rank == 1:
            links.close()  # as the system does for one that is killed
            return None
        with ranks.fail_together():
            ranks.wait()

    first, _, third = in_each(3, body)
    assert type(first) is type(third) is RanksError
    assert first.message == third.message == "Rank 1 is gone without a word; the others give up."


def test_an_interrupt_that_follows_from_something_else_is_not_taken_for_its_cause() -> None:
    def body(ranks: Ranks, links: Links) -> Any:
        if ranks.rank == 1:
            links.close()
            return None
        with ranks.fail_together():
            raise KeyboardInterrupt

    first, _ = in_each(2, body)
    assert type(first) is RanksError


def test_an_interrupt_of_one_interrupts_all() -> None:
    def body(ranks: Ranks, _: Links) -> Any:
        with ranks.fail_together():
            if ranks.rank == 1:
                raise KeyboardInterrupt
            ranks.wait()

    assert [type(each) for each in in_each(3, body)] == [KeyboardInterrupt] * 3


def test_one_that_has_finished_early_is_not_waited_for() -> None:
    def body(ranks: Ranks, links: Links) -> Any:
        with ranks.fail_together():
            if ranks.rank == 1:
                links.leave()
                links.wait_for_leave()
            else:
                ranks.wait()

    assert "Rank 1 has finished while this one has not" in str(in_each(2, body)[0])


def test_what_cannot_be_sent_is_told_all_the_same() -> None:
    def body(ranks: Ranks, _: Links) -> Any:
        class OfNobodyElseError(Exception):
            pass

        with ranks.fail_together():
            if ranks.rank == 1:
                raise OfNobodyElseError("what it was")
            ranks.wait()

    first, _ = in_each(2, body)
    assert (type(first), str(first)) == (RuntimeError, "OfNobodyElseError: what it was")


def test_others_must_see_the_same() -> None:
    def body(ranks: Ranks, _: Links) -> Any:
        with ranks.fail_together():
            ranks.check_same({"checkpoints": "a", "options": "b" if ranks.rank < 2 else "c"})

    for error in in_each(3, body):
        assert isinstance(error, RanksError)
        assert error.message.startswith("Rank 2 on ")
        assert "has other options than rank 0 on" in error.message


# --- shares ---


@given(sizes=st.lists(st.integers(1, 1 << 23), max_size=60), world=st.integers(1, 7))
def test_everything_falls_to_one_and_nobody_has_much_more(sizes: list[int], world: int) -> None:
    shares = [Ranks(rank, world).share(sizes) for rank in range(world)]
    assert sorted(index for share in shares for index in share) == list(range(len(sizes)))
    loads = [sum(sizes[index] for index in share) for share in shares]
    assert max(loads) - min(loads) <= max(sizes, default=0)


def blocks_of(sizes: Sequence[int]) -> tuple[Checkpoint, list[Block]]:
    entries = {f"w{place}": TensorInfo("F32", (size,), 0, 4 * sum(sizes[:place])) for place, size in enumerate(sizes)}
    checkpoint = Checkpoint(0, Path(), "model", (Shard(Path("model.safetensors"), 0),), (), entries)
    return checkpoint, [Block(name, 0, entry.numel) for name, entry in entries.items()]


@given(sizes=st.lists(st.integers(1, 1 << 22), min_size=1, max_size=30), world=st.integers(2, 5))
def test_a_block_falls_to_the_same_process_in_either_direction(sizes: list[int], world: int) -> None:
    checkpoint, blocks = blocks_of(sizes)
    for rank in range(world):
        forwards = partition([checkpoint] * 4, blocks, Ranks(rank, world))
        backwards = partition([checkpoint] * 3, blocks[::-1], Ranks(rank, world))
        assert {blocks[place] for place in forwards} == {blocks[::-1][place] for place in backwards}
        assert forwards == sorted(forwards)


def test_progress_is_done_when_all_are() -> None:
    checkpoint, blocks = blocks_of([100, 100, 100, 100])
    told: list[ckavg.Progress] = []
    listener = GlobalProgress("path", [checkpoint], blocks, told.append)
    for done in (0, 400, 800):  # of the half that falls to this process
        listener.on_own_progress(Progress("path", done, 800))
    listener.end()
    assert told == [Progress("path", done, 1600) for done in (0, 800, 1600)]


# --- the environment ---


def test_what_torchrun_tells(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "4"}.items():
        monkeypatch.setenv(name, value)
    assert Ranks.from_environment() == Ranks(5, 8, 1, 4)
    monkeypatch.setenv("LOCAL_RANK", "one")
    with pytest.raises(RanksError, match="not all numbers"):
        Ranks.from_environment()
    monkeypatch.delenv("LOCAL_RANK")  # as where a cluster tells of its machines, and not of processes
    assert Ranks.from_environment() == Ranks()
    with ckavg.all_ranks() as ranks:
        assert ranks == Ranks()


def test_training_the_demo_is_for_one_process(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name, value in {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0"}.items():
        monkeypatch.setenv(name, value)
    done = run_cli("demo", tmp_path / "demo")
    assert done.exit_code == 2
    assert "error: demo: this is work for one process." in done.stderr
    assert not (tmp_path / "demo").exists()


@pytest.mark.parametrize(
    ("found", "taken"),
    [
        (("cpu", "cpu", "cpu"), ["cpu", "cpu", "cpu"]),
        (("cuda", "cuda", "cuda"), ["cuda:0", "cuda:1", "cuda:0"]),
        (("cuda", "cpu", "cuda"), ["cpu", "cpu", "cpu"]),
        (("cuda:3", "cuda:3", "cuda:3"), ["cuda:3", "cuda:3", "cuda:3"]),
    ],
)
def test_a_gpu_for_each_or_for_none(monkeypatch: pytest.MonkeyPatch, found: Sequence[str], taken: list[str]) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)

    def body(ranks: Ranks, links: Links) -> Any:
        return Ranks(ranks.rank, 3, ranks.rank, 3, links).own_device(found[ranks.rank])

    assert in_each(3, body) == taken
