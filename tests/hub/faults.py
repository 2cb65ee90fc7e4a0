"""Faults on demand, and what went over the wire: the same for every server on loopback."""

from __future__ import annotations

import re
import threading
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

DROPPED = 0
"""In the place of a status: the connection is cut."""
HELD = -1
"""Likewise: there is no answer until the end."""
WHOLE = -2
"""Likewise: the whole file with status 200, whatever range was asked for."""
LOST = -3
"""Likewise: what was asked is done, and the connection is cut in the place of the answer."""
PORTAL = 200
"""Likewise: somebody else answers."""


@dataclass(frozen=True, slots=True)
class Broken:
    """In the place of a status: an answer that begins well, and whose body ends after so many bytes.

    `closed` ends the connection in order, `reset` does not (what was on its way may be lost, too). `short` is a
    complete answer of fewer bytes than it should have, and `stalled` has nothing follow until the end.
    """

    after: int
    how: Literal["closed", "reset", "short", "stalled"]


Fault = int | Broken


@dataclass(kw_only=True)
class Traffic:
    """Faults to come, and what happened."""

    stages: dict[str, str] = field(default_factory=dict)
    """By name: a pattern of the method and the path of the requests that belong to it."""
    faults: dict[str, tuple[Fault, int]] = field(default_factory=dict)
    """By stage: a status, or one of the above, and how many requests it still meets."""
    passes_before: dict[str, int] = field(default_factory=dict)
    """By stage: how many requests are served before its fault."""
    then: dict[str, Callable[[], object]] = field(default_factory=dict)
    """By stage: what is done once, between its next answer and whatever is asked after it."""
    requests: list[str] = field(default_factory=list)
    ranges: list[tuple[str, str]] = field(default_factory=list)
    """Requests that asked for a range, and for which."""
    served: Counter[str] = field(default_factory=Counter)
    """Bytes of content that went out, by file, as in `owner/name@revision/file`."""
    served_by_stage: Counter[str] = field(default_factory=Counter)
    """Bytes of all bodies that went out, lists and messages included."""
    careless: bool = False
    """Whether a fault repeats the token to whoever sent it."""
    held: threading.Event = field(default_factory=threading.Event)
    released: threading.Event = field(default_factory=threading.Event)
    lock: threading.RLock = field(default_factory=threading.RLock)

    def stage(self, line: str) -> str:
        """The stage that a request belongs to; empty where it belongs to none."""
        return next((stage for stage, pattern in self.stages.items() if re.fullmatch(pattern, line)), "")

    def fault(self, line: str) -> Fault | None:
        """The fault that this request meets, if one."""
        stage = self.stage(line)
        fault, left = self.faults.get(stage, (0, 0))
        if not left:
            return None
        if self.passes_before.get(stage, 0):
            self.passes_before[stage] -= 1
            return None
        self.faults[stage] = fault, left - 1
        return fault

    def count(self, stage: str, content: str, size: int) -> None:
        """Take down that so many bytes of a body are out, of the content of a file if it has a name."""
        with self.lock:
            self.served_by_stage[stage] += size
            if content:
                self.served[content] += size

    def forget(self) -> None:
        """Begin to count anew."""
        with self.lock:
            self.requests.clear()
            self.ranges.clear()
            self.served.clear()
            self.served_by_stage.clear()
