"""Stage *publish*: which failures pass by themselves, and how often what met one is tried again. Knows no client.

The client tries again what it sends as large files. Its questions, and the commit, it asks once.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, TypeVar

from ckavg.errors import CkavgError
from ckavg.hub.answers import chain_of

Answer = TypeVar("Answer")

WAITS = (1.0, 2.0, 4.0, 8.0)
"""Seconds before each further attempt."""

LONGEST = 60.0
"""The most seconds that the Hub may ask to wait for, before it is for the user to wait."""

_PASSING = frozenset({429, 500, 502, 503, 504})
_OFFLINE = "OfflineModeIsEnabled"  # which is a ConnectionError, and stays
_NOT_SENT = frozenset({"ConnectError", "ConnectTimeout", "NewConnectionError", "ConnectionRefusedError", "gaierror"})
_LOST = frozenset(
    {"ConnectionError", "NetworkError", "RemoteProtocolError", "TimeoutException", "Timeout", "ProtocolError"}
)


def tried(ask: Callable[[], Answer], *, settled: Callable[[], Answer | None] | None = None) -> Answer:
    """What `ask` returns, asked again a few times where it fails with what passes.

    Args:
        ask: one request, or several.
        settled: called before each further attempt, for requests that must not be carried out twice: what the last
            attempt has led to, though its answer was lost; None where it has led to nothing.

    Raises:
        Exception: what `ask` raised last, or the first that does not pass.
    """
    for wait in (*WAITS, None):
        try:
            return ask()
        except Exception as error:
            pause = None if wait is None else pause_after(error, wait)
            if pause is None:
                raise
            time.sleep(pause)
            if settled is not None and (answer := settled()) is not None:
                return answer
    raise AssertionError  # the last attempt has returned or raised


def pause_after(error: Exception, wait: float) -> float | None:
    """Seconds to wait before another attempt; None where another would fail in the same way, or much later."""
    if not is_passing(error):
        return None
    asked = asked_pause(error)
    return max(asked or 0.0, wait) if asked is None or asked <= LONGEST else None


def asked_pause(error: BaseException) -> float | None:
    """Seconds for which the Hub asks to be left alone; None where it does not say."""
    response = _response(error)
    asked = str(response.headers.get("Retry-After") or "") if response is not None else ""
    return float(asked) if asked.isdigit() else None


def is_passing(error: BaseException) -> bool:
    """Whether the same request may well succeed in a moment: a limit, a fault of the Hub, a lost connection."""
    if isinstance(error, CkavgError):  # somebody has made up their mind about it
        return False
    response = _response(error)
    if response is not None:
        return bool(response.status_code in _PASSING)
    names = _names(error)
    return _OFFLINE not in names and not names.isdisjoint(_LOST | _NOT_SENT)


def may_have_arrived(error: BaseException) -> bool:
    """Whether the Hub may have done what it was asked for, though its answer did not come."""
    response = _response(error)
    if response is not None:
        return bool(response.status_code >= 500)
    return _names(error).isdisjoint(_NOT_SENT)


def status_of(error: BaseException) -> int | None:
    """The status with which the Hub has answered; None where it has not."""
    response = _response(error)
    return None if response is None else int(response.status_code)


def _response(error: BaseException) -> Any:
    responses = (getattr(each, "response", None) for each in chain_of(error))
    return next((each for each in responses if getattr(each, "status_code", None) is not None), None)


def _names(error: BaseException) -> set[str]:
    return {kind.__name__ for each in chain_of(error) for kind in type(each).__mro__}
