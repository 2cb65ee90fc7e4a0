"""Stage *engine*: the blocks of a pass dealt out to several processes, and its progress as one of them sees it."""

from __future__ import annotations

from collections.abc import Sequence

from ckavg.checkpoints.run import Checkpoint
from ckavg.engine.blocks import Block, sizes_of
from ckavg.engine.context import OnProgress, Pass, Progress
from ckavg.engine.distributed import Ranks


def partition(checkpoints: Sequence[Checkpoint], blocks: Sequence[Block], ranks: Ranks) -> list[int]:
    """Places of the blocks that fall to this process, in their order.

    They are dealt out in the order of the files, whatever the order of the pass: what a machine has read in pass 1, and
    may have in memory still, falls to it in pass 2.
    """
    entries = checkpoints[-1].entries
    sizes = sizes_of(checkpoints, blocks)
    in_files = sorted(
        range(len(blocks)),
        key=lambda place: (
            entries[blocks[place].name].shard,
            entries[blocks[place].name].offset,
            blocks[place].start,
        ),
    )
    return sorted(in_files[each] for each in ranks.share([sizes[place] for place in in_files]))


class GlobalProgress:
    """Tells how far a pass is for all processes, taking this one to be as far as the others.

    Args:
        stage: which pass it is.
        checkpoints, blocks: all that is read in it.
        listener: whom to tell, if anybody.
        kept: bytes that an earlier attempt has read.
    """

    def __init__(
        self,
        stage: Pass,
        checkpoints: Sequence[Checkpoint],
        blocks: Sequence[Block],
        listener: OnProgress | None,
        *,
        kept: int = 0,
    ) -> None:
        self._stage = stage
        self._kept = kept
        self._total = sum(sizes_of(checkpoints, blocks))
        self._listener = listener

    def on_own_progress(self, news: Progress) -> None:
        """Hear how far this process is with its own share. That it is done is not passed on: others may not be."""
        if news.done == 0 or news.done < news.total:
            self._tell(self._total * news.done // max(1, news.total))

    def end(self) -> None:
        """Tell that all are done."""
        self._tell(self._total)

    def _tell(self, done: int) -> None:
        if self._listener is not None:
            self._listener(Progress(self._stage, done, self._total, self._kept))
