"""Stage *engine*: the cores of this machine, and how many threads share them. Imports nothing heavy."""

from __future__ import annotations

import dataclasses
import heapq
import os
import platform
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeVar

from ckavg.engine.links import Links
from ckavg.errors import RanksError

MOST_THREADS = 16
"""More do not read faster; each has its own buffers."""


def available_cores(processes: int = 1) -> int:
    """How many cores this process may use, where so many share them."""
    try:
        cores = len(os.sched_getaffinity(0))
    except AttributeError:  # macOS
        cores = os.cpu_count() or 1
    return max(1, cores // processes)


def worker_threads(processes: int = 1) -> int:
    """How many threads read and compute: one for each core, where so many processes share them."""
    return min(available_cores(processes), MOST_THREADS)


Value = TypeVar("Value")


@dataclass(frozen=True, slots=True)
class Ranks:
    """The processes of a job, as one of them sees them. Every one of them calls the same methods in the same order.

    Attributes:
        rank: which of them this is, from 0.
        world: how many there are.
        local_rank: which of those on this machine.
        local_world: how many there are on this machine.
    """

    rank: int = 0
    world: int = 1
    local_rank: int = 0
    local_world: int = 1
    _links: Links | None = None

    @classmethod
    def from_environment(cls) -> Ranks:
        """What torchrun tells a process in its environment, with no connection yet; elsewhere, one process alone."""
        names = "RANK", "WORLD_SIZE", "LOCAL_RANK"
        if any(name not in os.environ for name in names):
            return cls()
        try:
            rank, world, local_rank = (int(os.environ[name]) for name in names)
            local_world = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        except ValueError as error:
            raise RanksError(
                f"{', '.join(names)} in the environment are not all numbers.", hint="torchrun sets them."
            ) from error
        return cls(rank, world, local_rank, local_world) if world > 1 else cls()

    @property
    def is_first(self) -> bool:
        """Whether this process speaks for all, and makes what is made once."""
        return self.rank == 0

    @property
    def speaks(self) -> bool:
        """Whether this process is to show messages: the first or, where that is gone, the one after it."""
        return self.is_first or (self.rank == 1 and self._links is not None and self._links.has_lost(0))

    @property
    def is_ending(self) -> bool:
        """Whether this process is giving up already."""
        return self._links is not None and self._links.is_ending

    def share(self, sizes: Sequence[int]) -> tuple[int, ...]:
        """Indices of what falls to this process: each in turn goes to whoever has least by then, the same in each pass.

        >>> Ranks(0, 2).share([8, 1, 8, 1]), Ranks(1, 2).share([8, 1, 8, 1])
        ((0, 3), (1, 2))
        """
        if self.world == 1:
            return tuple(range(len(sizes)))
        loads = [(0, rank) for rank in range(self.world)]
        own = []
        for index, size in enumerate(sizes):
            load, rank = loads[0]
            heapq.heapreplace(loads, (load + size, rank))
            if rank == self.rank:
                own.append(index)
        return tuple(own)

    def check(self) -> None:
        """Raise what ended the job in another process, if something has."""
        if self._links is not None:
            self._links.check()

    def gather(self, value: Value) -> list[Value]:
        """What every process gives here, by rank."""
        if self._links is None:
            return [value]
        if not self.is_first:
            self._links.send(value)
            return list(self._links.receive()[0])
        of_others = self._links.receive()
        values = [value, *(of_others[rank] for rank in range(1, self.world))]
        for rank, theirs in of_others.items():
            if not _alike(value, theirs):
                raise RanksError(
                    f"Rank {rank} tells something else than rank 0 asks for.",
                    hint="Give all processes of a job the same command, and the same version of ckavg.",
                )
        self._links.send(values)
        return values

    def wait(self) -> None:
        """Wait until all processes are here."""
        self.gather(None)

    def first(self, function: Callable[[], Value]) -> Value:
        """What the first process gets from a function, in all of them; the others wait for it."""
        if self._links is None:
            return function()
        if not self.is_first:
            value: Value = self._links.receive()[0]
            return value
        self._links.check()
        value = function()
        self._links.send(value)
        return value

    def check_same(self, seen: Mapping[str, str]) -> None:
        """Refuse to go on where one process sees something else than the first.

        Args:
            seen: by what it is, such as `checkpoints`, what matters most first.

        Raises:
            RanksError: one does; in all processes.
        """
        (first_host, by_first), *others = self.gather((platform.node(), dict(seen)))
        for rank, (host, by_other) in enumerate(others, start=1):
            differing = next((what for what, value in by_first.items() if by_other.get(what) != value), None)
            if differing is not None:
                raise RanksError(
                    f"Rank {rank} on {host} has other {differing} than rank 0 on {first_host}.",
                    hint="Start the same command on every machine, with a file system that all of them share.",
                )

    def own_device(self, device: str) -> str:
        """The device of this process: with `cuda`, a GPU of its own, as far as its machine has enough.

        Where one process has found none, nobody takes any: sums are formed in another order there.
        """
        if self.world == 1:
            return device
        if "cpu" in self.gather(device):
            return "cpu"
        if device != "cuda":
            return device
        import torch

        return f"cuda:{self.local_rank % torch.cuda.device_count()}"

    @contextmanager
    def fail_together(self) -> Iterator[None]:
        """An error that leaves this block in one process leaves it in all of them, and ends the job.

        The first process leaves it last, when the others have closed their files.
        """
        try:
            yield
        except BaseException as error:
            if self._links is None:
                raise
            reason = self._links.end(error)
            if reason is error:
                raise
            raise reason from error


def _alike(value: object, other: object) -> bool:
    """Whether two values are of one kind; those in a tuple, too."""
    if not (isinstance(value, tuple) and isinstance(other, tuple)):
        return type(value) is type(other)
    return len(value) == len(other) and all(map(_alike, value, other))


ALONE = Ranks()
"""One process, for which nothing of this does anything."""


@contextmanager
def all_ranks(on_wait: Callable[[str], None] | None = None) -> Iterator[Ranks]:
    """The job that torchrun has started, with this process in it; this process alone where there is no such job.

    Every process of the job enters this, and leaves it when all have come to its end.

    Args:
        on_wait: called in this thread with a sentence on who is waited for, after a while and then seldom. Once all
            have come, the first process tells of the others, and the second of the first.

    Raises:
        RanksError: the others do not come.
    """
    ranks = Ranks.from_environment()
    if ranks.world == 1:
        yield ranks
        return
    from ckavg.engine.joining import join

    links = join(ranks.rank, ranks.world, on_wait)
    try:
        joined = dataclasses.replace(ranks, _links=links)
        with joined.fail_together():
            yield joined
            links.leave()
            if not ranks.is_first:
                links.wait_for_leave()
                links.check()
    finally:
        links.close()
