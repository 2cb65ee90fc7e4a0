"""Stage *engine*: how the processes of one job talk. Each but the first has one connection, to the first.

Small values go over it, and news that nobody asked for: that a process failed, or is gone. Whoever waits or looks
learns of it at once, on whichever machine it happened. Knows neither blocks nor files.
"""

from __future__ import annotations

import queue
import socket
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Any

from ckavg.engine.messages import ALIVE, FAILED, HEAD, LEFT, MOST, VALUE, packed, unpacked, weight
from ckavg.errors import RanksError, listed

_SECONDS_FOR_NEWS = 1.0
_SECONDS_TO_LEAVE = 20.0
_SECONDS_TO_DRAIN = 10.0
_SECONDS_OF_A_TICK = 2.0
"""How often a process that has nothing to say gives a sign of life, and one that waits looks for those of others."""

_SECONDS_TO_TELL = 30.0
_SECONDS_QUIET = 10.0
_SECONDS_SILENT = 600.0
"""Without a sign of life: a process is told of as silent, and taken for gone. A stopped one gives none."""

_AT_ONCE = 1 << 20

_GONE = "It was killed, it crashed, or its machine is out of reach. Often memory ran out."
_STOPPED = "It was stopped (SIGSTOP, Ctrl-Z), or its machine hangs."
_STRANGE = "Start the same version of ckavg on every machine, where nobody else can reach its ports."


class Links:
    """The connections of one process, each with a thread that listens to it, and one that speaks.

    Args:
        sockets: connected, by the rank at the other end.
        names: what messages call those ranks.
        on_wait: called in the thread that waits, after a while and then seldom, with a sentence on who is waited for.
    """

    def __init__(
        self,
        sockets: Mapping[int, socket.socket],
        names: Mapping[int, str],
        on_wait: Callable[[str], None] | None = None,
    ) -> None:
        self._sockets = dict(sockets)
        self._names = names
        self._on_wait = on_wait
        self._values: dict[int, deque[Any]] = {rank: deque() for rank in sockets}
        self._unread = dict.fromkeys(sockets, 0)
        self._silence = dict.fromkeys(sockets, 0.0)
        self._outboxes: dict[int, queue.SimpleQueue[bytes | None]] = {rank: queue.SimpleQueue() for rank in sockets}
        self._left: set[int] = set()
        self._lost: set[int] = set()
        self._failure: BaseException | None = None
        self._is_ending = False
        self._news = threading.Condition()
        self._speakers, self._listeners = (
            [threading.Thread(target=of_rank, args=(rank,), name=f"ckavg-rank-{rank}", daemon=True) for rank in sockets]
            for of_rank in (self._speak, self._listen)
        )
        for thread in (*self._speakers, *self._listeners):
            thread.start()

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
        self._send(packed(VALUE, value))

    def receive(self) -> dict[int, Any]:
        """Wait for the next value of everybody at the other ends, by rank.

        Raises:
            BaseException: what ended the job, wherever it happened.
            RanksError: one of them has finished, and will send nothing.
        """
        self._wait(self._owing)
        with self._news:
            if not all(self._values.values()):
                self.check()
                raise RanksError(
                    f"{self._names[self._finished_early()[0]]} has finished while this one has not.",
                    hint="Give all processes of a job the same command.",
                )
            self._unread = {rank: self._unread[rank] * (len(values) > 1) for rank, values in self._values.items()}
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
        self._send(packed(FAILED, failure))
        self.leave()
        self.wait_for_leave(_SECONDS_TO_LEAVE)
        return failure

    def leave(self) -> None:
        """Tell the others that this process has no file of the result open, and sends no more values."""
        self._send(packed(LEFT))

    def wait_for_leave(self, seconds: float | None = None) -> None:
        """Wait until everybody at the other ends has left or is gone.

        Args:
            seconds: no longer than this, and not for one that gives no sign of life.
        """
        self._wait(
            lambda: [rank for rank in self._sockets if rank not in self._left | self._lost], seconds, patient=True
        )

    def close(self) -> None:
        """Close the connections, such that what was sent arrives."""
        for outbox in self._outboxes.values():
            outbox.put(None)
        end = time.monotonic() + _SECONDS_TO_DRAIN
        for rank, speaker, listener in zip(self._sockets, self._speakers, self._listeners, strict=True):
            if not self._is_quiet(rank):
                speaker.join(max(0.0, end - time.monotonic()))
                listener.join(max(0.0, end - time.monotonic()))
            with suppress(OSError):
                self._sockets[rank].shutdown(socket.SHUT_RDWR)  # wakes who waits still
            for thread in (speaker, listener):
                thread.join(_SECONDS_FOR_NEWS)
            self._sockets[rank].close()

    def _owing(self) -> list[int]:
        """Those whose next value is waited for, while it can still come."""
        if self._failure is not None or self._finished_early():
            return []
        return [rank for rank, values in self._values.items() if not values]

    def _finished_early(self) -> list[int]:
        return sorted(rank for rank in self._left if not self._values[rank])

    def _is_quiet(self, rank: int) -> bool:
        return self._silence[rank] >= _SECONDS_QUIET

    def _wait(self, for_whom: Callable[[], list[int]], seconds: float | None = None, *, patient: bool = False) -> None:
        """Wait until nobody is waited for. Counts its own looks, and no clock's seconds: of a process that was stopped
        itself, the others have been silent for as long.

        Args:
            for_whom: those who are waited for, as it stands.
            seconds: no longer than this, and not for one that gives no sign of life.
            patient: say nothing of those who give one.
        """
        waited, tell_at = 0.0, _SECONDS_TO_TELL
        while True:
            with self._news:
                if self._news.wait_for(lambda: not for_whom(), timeout=_SECONDS_OF_A_TICK):
                    return
                waited += _SECONDS_OF_A_TICK
                for rank in self._silence:
                    self._silence[rank] += _SECONDS_OF_A_TICK
                late = for_whom()
                for rank in late:
                    if self._silence[rank] >= _SECONDS_SILENT:
                        self._lose(rank, f"has shown no sign of life for {_SECONDS_SILENT:.0f} s", _STOPPED)
            if seconds is not None and (waited >= seconds or all(map(self._is_quiet, late))):
                return
            if seconds is None and waited >= tell_at:
                tell_at *= 4
                self._tell([rank for rank in late if not patient or self._is_quiet(rank)], waited)

    def _tell(self, late: list[int], waited: float) -> None:
        if self._on_wait is None or not late:
            return
        quiet = [rank for rank in late if self._is_quiet(rank)]
        who = listed([self._names[rank].replace("Rank", "rank", 1) for rank in late])
        silent = listed([str(rank) for rank in quiet])
        self._on_wait(
            f"{waited:.0f} s of waiting for {who}."
            + (f" No sign of life from rank {silent}; after {_SECONDS_SILENT:.0f} s, the job ends." if quiet else "")
        )

    def _send(self, message: bytes) -> None:
        for outbox in self._outboxes.values():
            outbox.put(message)

    def _speak(self, rank: int) -> None:
        """Send what there is to say; a message is sent as a whole, whatever interrupts the work."""
        connection, outbox = self._sockets[rank], self._outboxes[rank]
        with suppress(OSError):
            while True:
                try:
                    message = outbox.get(timeout=_SECONDS_OF_A_TICK)
                except queue.Empty:
                    message = packed(ALIVE)
                if message is None:
                    break
                connection.sendall(message)
            connection.shutdown(socket.SHUT_WR)

    def _listen(self, rank: int) -> None:
        try:
            while True:
                kind, length = HEAD.unpack(self._read(rank, HEAD.size))
                if kind not in (VALUE, FAILED, LEFT, ALIVE) or self._unread[rank] + length // 32 > MOST:
                    raise ValueError("a message of no kind, or one that is too large")
                self._take(rank, kind, self._read(rank, length))
        except (OSError, EOFError):  # its end, a reset, half a message: gone, unless it had left
            self._lose(rank, "is gone without a word", _GONE)
        except Exception as error:  # whatever becomes of reading what anybody may have sent
            self._lose(rank, "has sent what is no message of ckavg", _STRANGE, error)

    def _read(self, rank: int, size: int) -> bytes:
        """So many bytes; no memory is taken for what does not come."""
        data = bytearray()
        while len(data) < size:
            part = self._sockets[rank].recv(min(size - len(data), _AT_ONCE))
            if not part:
                raise EOFError
            self._silence[rank] = 0.0
            data += part
        return bytes(data)

    def _take(self, rank: int, kind: bytes, text: bytes) -> None:
        cost = weight(text)
        if self._unread[rank] + cost > MOST:
            raise ValueError("a message that is too large")
        value = unpacked(text)
        with self._news:
            match kind:
                case b"v":
                    self._unread[rank] += cost
                    self._values[rank].append(value)
                case b"f" if isinstance(value, BaseException):
                    self._failure = self._failure or value
                case b"l":
                    self._left.add(rank)
                case b"f":
                    raise ValueError("an error that is none")
            self._news.notify_all()

    def _lose(self, rank: int, why: str, hint: str, cause: Exception | None = None) -> None:
        with self._news:
            if rank not in self._left:
                self._lost.add(rank)
                lost = RanksError(f"{self._names[rank]} {why}; the others give up.", hint=hint)
                lost.__cause__ = cause
                self._failure = self._failure or lost
            self._news.notify_all()
