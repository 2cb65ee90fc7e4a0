"""Stage *engine*: telling the system what will be read next, far enough ahead to keep the storage busy.

Nothing is announced while everything is in memory. With the first byte that is not, a thread begins to announce the
block it belongs to and those after it, and stays a fixed number of bytes ahead of the block that was begun last. The
thread is its own, because the system takes an announcement no faster than the storage takes the reads.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from types import TracebackType

from ckavg.checkpoints.run import Checkpoint
from ckavg.engine.blocks import Block, sizes_of
from ckavg.engine.reader import Files

PREFETCH_BYTES = 256 << 20
"""How much is announced before it is read: several large reads in flight, and a small part of any memory."""


def announcer(
    checkpoints: Sequence[Checkpoint], files: Files, stopped: Callable[[], bool] = lambda: False
) -> Callable[[Block], None]:
    """What has the system fetch all that a block reads of every checkpoint, in large pieces and at once.

    Args:
        checkpoints: what is read of every block.
        files: for nobody else.
        stopped: whether the pass is over; then nothing more is fetched.
    """

    def announce(block: Block) -> None:
        for checkpoint in checkpoints:
            if stopped():
                return
            for start, stop in block.ranges:
                for path, begin, end in checkpoint.ranges(block.name, start, stop):
                    files.announce(path, begin, end - begin)

    return announce


class Prefetch:
    """What is announced of the blocks of a pass; shared by its threads. A context: on leaving it, nothing more is.

    Args:
        checkpoints: what is read of every block.
        blocks: in the order in which they are begun.
        announce: has the system fetch a block; called from the thread of its own.
        nbytes: how far ahead, in bytes; the block that was begun last is announced in any case.
    """

    def __init__(
        self,
        checkpoints: Sequence[Checkpoint],
        blocks: Sequence[Block],
        announce: Callable[[Block], None],
        nbytes: int = PREFETCH_BYTES,
    ) -> None:
        self._blocks = blocks
        self._sizes = sizes_of(checkpoints, blocks)
        self._announce = announce
        self._nbytes = nbytes
        self._changed = threading.Condition()
        self._thread: threading.Thread | None = None
        self._begun = 0
        self._announced = 0
        self._ended = False

    def begin(self, place: int) -> None:
        """Say that block number `place` is begun."""
        with self._changed:
            self._begun = max(self._begun, place)
            self._changed.notify()

    def miss(self, place: int) -> None:
        """Say that block number `place` is not in memory as a whole."""
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
        while (block := self._next()) is not None:
            self._announce(block)

    def _next(self) -> Block | None:
        """The block to announce now, once it is near enough; None at the end."""
        with self._changed:
            self._changed.wait_for(lambda: self._ended or self._is_near())
            place = max(self._announced, self._begun)
            if self._ended or place >= len(self._blocks):
                return None
            self._announced = place + 1
            return self._blocks[place]

    def _is_near(self) -> bool:
        place = max(self._announced, self._begun)
        return place >= len(self._blocks) or sum(self._sizes[self._begun : place]) < self._nbytes
