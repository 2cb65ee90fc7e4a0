"""Stage *engine*: how a pass runs and reports its progress. Imports nothing heavy, so that it is ready early."""

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
    """The progress of a pass.

    Attributes:
        stage: `path` for pass 1, `replay` for pass 2; `files` for syncing and hashing what was written; `health` for
            `inspect --deep`; `files`, `weights`, `elements` or `sources` for what `verify` reads; `difference` for
            `diff`; `fetch` for downloads, `upload` for uploads.
        done: bytes done.
        total: bytes to do.
        kept: bytes done by an interrupted attempt, not counted in these.
    """

    stage: Pass
    done: int
    total: int
    kept: int = 0


OnProgress = Callable[[Progress], None]


@contextmanager
def listening(progress: bool | OnProgress, passes: int = 1) -> Iterator[OnProgress | None]:
    """The listener for `progress`: the caller's own, none, or with True the command line's bars on stderr."""
    if progress is not True:
        yield progress or None
        return
    from ckavg import show_progress  # of the last room

    with show_progress(passes, quiet=False) as listener:
        yield listener


COMPILED_FROM_BYTES = 1 << 30
"""A pass over so many saves twice what compiling costs."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Context:
    """How a pass runs. Nothing here changes what it computes.

    Attributes:
        device: the device that computes, as torch names it.
        threads: how many threads read and compute, each on one core; None: one for each core.
        tile: elements computed at once: a power of two.
        on_progress: called in the caller's thread now and then.
        ranks: the processes that share the work.
        compiled_from_bytes: a pass that reads so much of large tensors, or more, is compiled if llvmlite is installed.
    """

    device: str = "cpu"
    threads: int | None = None
    tile: int = TILE
    on_progress: OnProgress | None = None
    ranks: Ranks = ALONE
    compiled_from_bytes: int = COMPILED_FROM_BYTES
