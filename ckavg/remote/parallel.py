"""Stage *remote*: several requests at the same time, and an end of all of them as soon as one has failed."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Sequence
from typing import TypeVar

Item = TypeVar("Item")

AT_ONCE = 8
"""How many files are asked for at the same time."""

_SECONDS_BETWEEN_LOOKS = 0.1


class Stopped(Exception):  # noqa: N818 - nothing is wrong with what it stops
    """The work is over, whatever is left of it; raised in a thread of it, and seen by nobody else."""


def at_once(do: Callable[[Item], None], items: Sequence[Item], *, meanwhile: Callable[[], None] | None = None) -> None:
    """Call a function for all items, a few at a time; the first error ends it, and so does an interrupt.

    What is under way then is not waited for, since a request may take minutes to fail. It ends by itself.

    Args:
        do: what is done with an item, in another thread.
        items: all of them.
        meanwhile: called in this thread now and then, and when all is done.

    Raises:
        Exception: what `do` or `meanwhile` raised, the first of all.
    """
    left, changed = deque(items), threading.Condition()
    errors: list[BaseException] = []
    pending = len(left)

    def work() -> None:
        nonlocal pending
        while True:
            with changed:
                if not left:
                    return
                item = left.popleft()
            try:
                do(item)
            except BaseException as error:  # who waits raises it
                errors.append(error)
            with changed:
                pending -= 1
                changed.notify_all()

    for _ in range(min(AT_ONCE, pending)):
        threading.Thread(target=work, name="ckavg-fetch", daemon=True).start()
    try:
        while pending and not errors:
            with changed:
                changed.wait_for(lambda: errors or not pending, _SECONDS_BETWEEN_LOOKS)
            if meanwhile is not None:
                meanwhile()
        if errors:
            raise errors[0]
    finally:
        left.clear()
