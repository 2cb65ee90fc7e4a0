"""Stage *engine*: telling the system what will be read next, far enough ahead to keep the storage busy.

Nothing is announced while everything is in memory. With the first byte that is not, a thread begins to announce the
block it belongs to and those after it, and stays a fixed number of bytes ahead of the block that was begun last. The
thread is its own, because the system takes an announcement no faster than the storage takes the reads.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Sequence
from types import TracebackType

from ckavg.checkpoints.run import Checkpoint
from ckavg.engine.blocks import Block
from ckavg.engine.reader import Files

PREFETCH_BYTES = 256 << 20
"""How much is announced before it is read: several large reads in flight, and a small part of any memory."""


def announcer(
    checkpoints: Sequence[Checkpoint], files: Files, stopped: Callable[[], bool] = lambda: False
) -> Callable[[Sequence[Block]], None]:
    """What has the system fetch all that some blocks read of every checkpoint, in large pieces and at once.

    Args:
        checkpoints: what is read of every block.
        files: for nobody else.
        stopped: whether the pass is over; then nothing more is fetched.
    """

    def announce(blocks: Sequence[Block]) -> None:
        ranges: dict[int, list[tuple[int, int, int]]] = {}
        for checkpoint in checkpoints:
            table = checkpoint.entries
            if id(table) not in ranges:
                ranges[id(table)] = _joined(
                    each
                    for block in blocks
                    for start, stop in block.ranges
                    for each in table[block.name].ranges(start, stop)
                )
            for shard, begin, end in ranges[id(table)]:
                if stopped():
                    return
                files.announce(checkpoint.shards[shard].path, begin, end - begin)

    return announce


def _joined(ranges: Iterable[tuple[int, int, int]]) -> list[tuple[int, int, int]]:
    """Ranges of bytes by shard, those that touch made one."""
    joined: list[tuple[int, int, int]] = []
    for shard, begin, end in sorted(ranges):
        if joined and joined[-1][0] == shard and joined[-1][2] == begin:
            joined[-1] = shard, joined[-1][1], end
        else:
            joined.append((shard, begin, end))
    return joined


class Prefetch:
    """What is announced of a pass; shared by its threads. A context: on leaving it, nothing more is.

    Args:
        sizes: bytes of each unit of work, in the order in which they are begun.
        announce: has the system fetch the unit with a number; called from the thread of its own.
        nbytes: how far ahead, in bytes; the unit that was begun last is announced in any case.
    """

    def __init__(self, sizes: Sequence[int], announce: Callable[[int], None], nbytes: int = PREFETCH_BYTES) -> None:
        self._sizes = sizes
        self._announce = announce
        self._nbytes = nbytes
        self._changed = threading.Condition()
        self._thread: threading.Thread | None = None
        self._begun = 0
        self._announced = 0
        self._ended = False

    def begin(self, place: int) -> None:
        """Say that unit number `place` is begun."""
        with self._changed:
            self._begun = max(self._begun, place)
            self._changed.notify()

    def miss(self, place: int) -> None:
        """Say that unit number `place` is not in memory as a whole."""
        with self._changed:
            if self._thread is None and not self._ended:
                self._announced = place
                self._thread = threading.Thread(target=self._run, name="ckavg-ahead", daemon=True)
                self._thread.start()

    def close(self) -> None:
        """Announce nothing more, and wait until the thread has ended."""
        with self._changed:
            self._ended = True
            self._changed.notify()
        if self._thread is not None:
            self._thread.join()

    def __enter__(self) -> Prefetch:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _run(self) -> None:
        while (place := self._next()) is not None:
            self._announce(place)

    def _next(self) -> int | None:
        """The unit to announce now, once it is near enough; None at the end."""
        with self._changed:
            self._changed.wait_for(lambda: self._ended or self._is_near())
            place = max(self._announced, self._begun)
            if self._ended or place >= len(self._sizes):
                return None
            self._announced = place + 1
            return place

    def _is_near(self) -> bool:
        place = max(self._announced, self._begun)
        return place >= len(self._sizes) or sum(self._sizes[self._begun : place]) < self._nbytes
