"""Stage *engine*: how the processes of one job talk. Each but the first has one connection, to the first.

Small values go over it, and news that nobody asked for: that a process failed, or is gone. Whoever waits or looks
learns of it at once, on whichever machine it happened. Knows neither blocks nor files.
"""

from __future__ import annotations

import pickle
import socket
import threading
import time
import traceback
from collections import deque
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from ckavg.errors import RanksError

_SECONDS_FOR_NEWS = 1.0
_SECONDS_TO_LEAVE = 20.0
_SECONDS_TO_DRAIN = 10.0


@dataclass(frozen=True, slots=True)
class _Value:
    value: Any


@dataclass(frozen=True, slots=True)
class _Failed:
    error: BaseException


@dataclass(frozen=True, slots=True)
class _Left:
    """The sender sends no more values, and has no file of the result open."""


class Links:
    """The connections of one process, each with a thread that listens to it.

    Args:
        sockets: connected, by the rank at the other end.
        names: what messages call those ranks.
    """

    def __init__(self, sockets: Mapping[int, socket.socket], names: Mapping[int, str]) -> None:
        self._sockets = dict(sockets)
        self._names = names
        self._values: dict[int, deque[Any]] = {rank: deque() for rank in sockets}
        self._left: set[int] = set()
        self._lost: set[int] = set()
        self._failure: BaseException | None = None
        self._is_ending = False
        self._news = threading.Condition()
        self._listeners = [
            threading.Thread(target=self._listen, args=(rank,), name=f"ckavg-rank-{rank}", daemon=True)
            for rank in sockets
        ]
        for listener in self._listeners:
            listener.start()

    @property
    def is_ending(self) -> bool:
        """Whether this process is giving up already."""
        return self._is_ending

    def has_lost(self, rank: int) -> bool:
        """Whether the process at that end is gone without a word."""
        return rank in self._lost

    def check(self) -> None:
        """Raise what ended the job, if something has."""
        if self._failure is not None:
            raise self._failure

    def send(self, value: object) -> None:
        """Send a value to everybody at the other ends. That one of them is gone shows later."""
        self._send(_Value(value))

    def receive(self) -> dict[int, Any]:
        """Wait for the next value of everybody at the other ends, by rank.

        Raises:
            BaseException: what ended the job, wherever it happened.
            RanksError: one of them has finished, and will send nothing.
        """
        with self._news:
            self._news.wait_for(lambda: self._all_sent() or self._failure or self._finished_early())
            if not self._all_sent():
                self.check()
                raise RanksError(
                    f"{self._names[self._finished_early()[0]]} has finished while this one has not.",
                    hint="Give all processes of a job the same command.",
                )
            return {rank: values.popleft() for rank, values in self._values.items()}

    def end(self, error: BaseException) -> BaseException:
        """Give up: tell the others, and wait for them, so that no file is open any more. May be called again.

        Returns:
            What ended the job. An interrupt is often but the consequence of what happened elsewhere.
        """
        if self._is_ending:
            return self._failure or error
        self._is_ending = True
        with self._news:
            if isinstance(error, KeyboardInterrupt):
                self._news.wait_for(lambda: self._failure is not None, timeout=_SECONDS_FOR_NEWS)
            if self._failure is None or not isinstance(error, KeyboardInterrupt):
                self._failure = error
            failure = self._failure
        self._send(_Failed(_portable(failure)))
        self.leave()
        self.wait_for_leave(_SECONDS_TO_LEAVE)
        return failure

    def leave(self) -> None:
        """Tell the others that this process has no file of the result open, and sends no more values."""
        self._send(_Left())

    def wait_for_leave(self, seconds: float | None = None) -> None:
        """Wait until everybody at the other ends has left or is gone; no longer than `seconds`, if they are given."""
        with self._news:
            self._news.wait_for(lambda: len(self._left | self._lost) == len(self._sockets), timeout=seconds)

    def close(self) -> None:
        """Close the connections, such that what was sent arrives."""
        for each in self._sockets.values():
            with suppress(OSError):
                each.shutdown(socket.SHUT_WR)
        end = time.monotonic() + _SECONDS_TO_DRAIN
        for listener in self._listeners:
            listener.join(max(0.0, end - time.monotonic()))
        for each in self._sockets.values():
            with suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)  # wakes a listener that waits still

    def _all_sent(self) -> bool:
        return all(self._values.values())

    def _finished_early(self) -> list[int]:
        return sorted(rank for rank in self._left if not self._values[rank])

    def _send(self, message: object) -> None:
        data = pickle.dumps(message)
        for each in self._sockets.values():
            with suppress(OSError):
                each.sendall(data)

    def _listen(self, rank: int) -> None:
        with self._sockets[rank] as connection, connection.makefile("rb") as stream:
            with suppress(Exception):  # its end, a reset, half a message: gone, unless it had left
                while True:
                    self._take(rank, pickle.load(stream))  # noqa: S301 - of this very job: it knew the token
            self._lose(rank)

    def _take(self, rank: int, message: object) -> None:
        with self._news:
            match message:
                case _Value(value):
                    self._values[rank].append(value)
                case _Failed(error):
                    self._failure = self._failure or error
                case _Left():
                    self._left.add(rank)
            self._news.notify_all()

    def _lose(self, rank: int) -> None:
        with self._news:
            if rank not in self._left:
                self._lost.add(rank)
                self._failure = self._failure or RanksError(
                    f"{self._names[rank]} is gone without a word; the others give up.",
                    hint="It was killed, it crashed, or its machine is out of reach. Often memory ran out.",
                )
            self._news.notify_all()


def _portable(error: BaseException) -> BaseException:
    """A copy of an error that can be sent, with its traceback as a note."""
    try:
        copy: BaseException = pickle.loads(pickle.dumps(error))  # noqa: S301 - made here
    except Exception:  # whatever an exception from outside makes of being pickled
        copy = RuntimeError(f"{type(error).__name__}: {error}")
    copy.add_note("In another process:\n" + "".join(traceback.format_exception(error)))
    return copy
