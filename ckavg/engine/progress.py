"""Stage *engine*, its news: how far a pass has come. Imports nothing heavy, so that a listener can be made early."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

Pass = Literal["path", "replay", "health"]


@dataclass(frozen=True, slots=True)
class Progress:
    """How far a pass has come.

    Attributes:
        stage: `path` for pass 1, `replay` for pass 2, `health` for `inspect --deep`.
        done: bytes of checkpoints worked through.
        total: bytes of checkpoints in the whole pass.
    """

    stage: Pass
    done: int
    total: int


OnProgress = Callable[[Progress], None]
