"""Stage *engine*, its news: how far a pass has come. Imports nothing heavy, so that a listener can be made early."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

from ckavg.engine.blocks import TILE
from ckavg.engine.distributed import ALONE, Ranks

Pass = Literal["path", "replay", "health", "files", "weights", "elements", "sources", "difference", "fetch", "upload"]


@dataclass(frozen=True, slots=True)
class Progress:
    """How far a pass has come.

    Attributes:
        stage: `path` for pass 1, `replay` for pass 2, `health` for `inspect --deep`; of a result that is verified, what
            is read of it: its `files`, its `weights`, single `elements`, or all of its `sources`; `difference` of two;
            `fetch` of files that
            are fetched whole before they are read, `upload` to the Hub.
        done: bytes worked through.
        total: bytes to work through.
        kept: bytes beside these that an interrupted attempt had worked through.
    """

    stage: Pass
    done: int
    total: int
    kept: int = 0


OnProgress = Callable[[Progress], None]


@contextmanager
def listening(progress: bool | OnProgress, passes: int = 1) -> Iterator[OnProgress | None]:
    """The listener that was asked for: one's own, none, or with True the bars of the command line on stderr."""
    if progress is not True:
        yield progress or None
        return
    from ckavg import show_progress  # of the last room, and loaded for nothing else

    with show_progress(passes, quiet=False) as listener:
        yield listener


COMPILED_FROM_BYTES = 1 << 30
"""A pass over so many saves twice what compiling costs."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Context:
    """How a pass runs. Nothing here changes what it computes.

    Attributes:
        device: where the arithmetic happens, as torch names it.
        threads: how many threads read and compute, each on one core; None: one for each core.
        tile: elements computed at once: a power of two.
        on_progress: called in the caller's thread now and then.
        ranks: the processes that share the work.
        compiled_from_bytes: how much a pass must read to be worth compiling, where there is something to compile with.
    """

    device: str = "cpu"
    threads: int | None = None
    tile: int = TILE
    on_progress: OnProgress | None = None
    ranks: Ranks = ALONE
    compiled_from_bytes: int = COMPILED_FROM_BYTES
