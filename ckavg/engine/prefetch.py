"""Stage *engine*: announce to the system what will be read next, far enough ahead to keep the storage busy.

Nothing is announced while everything is in the page cache. The first miss starts a thread that announces that block and
the following ones, a fixed number of bytes ahead of the newest block in work. It needs its own thread because an
announcement blocks for as long as the storage needs to queue the reads.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from types import TracebackType

from ckavg.checkpoints.run import Checkpoint
from ckavg.engine.blocks import Block, sizes_of
from ckavg.engine.reader import Files

PREFETCH_BYTES = 256 << 20
"""Bytes announced ahead: enough for several large reads in flight, and a small part of any memory."""


def announcer(
    checkpoints: Sequence[Checkpoint], files: Files, stopped: Callable[[], bool] = lambda: False
) -> Callable[[Block], None]:
    """A function that announces all that a block reads from every checkpoint, in large pieces.

    Args:
        checkpoints: read for every block.
        files: used only by this function.
        stopped: whether the pass is over; then nothing more is announced.
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
    """Announces the blocks of a pass; shared by its threads. A context: nothing is announced after it.

    Args:
        checkpoints: read for every block.
        blocks: in the order in which work on them begins.
        announce: announces a block; called in the thread of this object.
        nbytes: how far ahead, in bytes; the newest block in work is announced in any case.
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
        """Note that work on block number `place` begins."""
        with self._changed:
            self._begun = max(self._begun, place)
            self._changed.notify()

    def miss(self, place: int) -> None:
        """Note that block number `place` is not completely in the page cache."""
        with self._changed:
            if self._thread is None and not self._ended:
                self._announced = place
                self._thread = threading.Thread(target=self._run, name="ckavg-ahead", daemon=True)
                self._thread.start()

    def close(self) -> None:
        """Stop, and wait for the thread to end."""
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
        """Wait until the next block is near enough, and return it; None at the end."""
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
