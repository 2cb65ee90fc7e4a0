"""Stage *remote*: the same request again, after a while, where it may go better then."""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from typing import TypeVar

from ckavg.storage.hub_errors import LONGEST_WAIT, retry_after

Value = TypeVar("Value")

TRIES = 5
_FIRST_WAIT, _LONGEST_WAIT = 0.5, 8.0
_PATIENCE_SECONDS = 20
"""From when on nothing is asked again: by then, the client has done so by itself."""


class ShortAnswerError(OSError):
    """Fewer or more bytes came than were asked for."""


def exactly(data: bytes, start: int, stop: int, size: int) -> bytes:
    """The bytes from `start` to `stop` of a file of `size` bytes, where something between may have ignored the range.

    Raises:
        ShortAnswerError: they are not these.
    """
    if len(data) == size != stop - start:
        return data[start:stop]
    if len(data) != stop - start:
        raise ShortAnswerError(f"{len(data):,} bytes came, where {stop - start:,} were asked for")
    return data


def with_retries(ask: Callable[[], Value], *, passes: Callable[[Exception], bool]) -> Value:
    """What `ask` returns; it is called again, up to 5 times in all, where it raises what may pass.

    Args:
        ask: the request.
        passes: whether what it raised may pass.

    Raises:
        Exception: whatever it raised the last time, or at once where another try would end alike.
    """
    wait, begun = _FIRST_WAIT, time.monotonic()
    for _ in range(TRIES - 1):
        try:
            return ask()
        except Exception as error:
            asked = retry_after(error) or 0.0
            if not passes(error) or time.monotonic() - begun > _PATIENCE_SECONDS or asked > LONGEST_WAIT:
                raise
            pause = wait * random.uniform(0.5, 1)  # noqa: S311 - so that many do not come back at once
            time.sleep(max(asked, pause))
            wait = min(2 * wait, _LONGEST_WAIT)
    return ask()
