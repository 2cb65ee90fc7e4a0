"""Stage *engine*, its news: how far a pass has come. Imports nothing heavy, so that a listener can be made early."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

Pass = Literal["path", "replay", "health", "files", "weights", "elements", "sources", "fetch", "upload"]


@dataclass(frozen=True, slots=True)
class Progress:
    """How far a pass has come.

    Attributes:
        stage: `path` for pass 1, `replay` for pass 2, `health` for `inspect --deep`; of a result that is verified, what
            is read of it: its `files`, its `weights`, single `elements`, or all of its `sources`; `fetch` of files that
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
