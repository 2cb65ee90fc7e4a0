"""A device that does nothing until somebody waits for it, and so shows what was overwritten too early."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

_GARBAGE = 0xA5


class Mark(NamedTuple):
    """So many tasks of a queue are done."""

    queue: str
    tasks: int


@dataclass
class LazyStreams:
    """Two queues of tasks, each done as late as it may be. The memory of the device is that of the machine.

    Attributes:
        careless: which of `wait`, `send` and `widen` ignore the mark they are given.
        advance: called before every request; it may do some of the tasks, as a device in a hurry would.
    """

    careless: frozenset[str] = frozenset()
    advance: Callable[[LazyStreams], None] = lambda _: None
    asked: dict[str, list[tuple[Mark | None, Callable[[], object]]]] = field(
        default_factory=lambda: {"computing": [], "copying": []}
    )
    done: dict[str, int] = field(default_factory=lambda: {"computing": 0, "copying": 0})

    def pinned(self, nbytes: int) -> Tensor:
        return torch.full((nbytes,), _GARBAGE, dtype=torch.uint8)

    def resident(self, nbytes: int) -> Tensor:
        memory = torch.empty(nbytes, dtype=torch.uint8)
        self._ask("computing", None, lambda: memory.fill_(_GARBAGE))  # by whom it was freed, and is still used
        return memory

    def mark(self) -> Mark:
        return Mark("computing", len(self.asked["computing"]))

    def wait(self, mark: Mark) -> None:
        self.advance(self)
        if "wait" not in self.careless:
            self.reach(mark)

    def send(self, source: Tensor, target: Tensor, *, after: Mark) -> Mark:
        return self._ask("copying", None if "send" in self.careless else after, lambda: target.copy_(source))

    def widen(self, source: Tensor, out: Tensor, *, after: Mark) -> Mark:
        return self._ask("computing", None if "widen" in self.careless else after, lambda: out.copy_(source))

    def reach(self, mark: Mark) -> None:
        """Do what it takes, and no more."""
        while self.done[mark.queue] < mark.tasks:
            after, task = self.asked[mark.queue][self.done[mark.queue]]
            if after is not None:
                self.reach(after)
            task()
            self.done[mark.queue] += 1

    def finish(self) -> None:
        """Do all that was asked, computing first."""
        for queue, tasks in self.asked.items():
            self.reach(Mark(queue, len(tasks)))

    def _ask(self, queue: str, after: Mark | None, task: Callable[[], object]) -> Mark:
        self.advance(self)
        self.asked[queue].append((after, task))
        return Mark(queue, len(self.asked[queue]))
