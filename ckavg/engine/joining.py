"""Stage *engine*: how the processes of one job find each other: through the store of torchrun.

The first opens a port and leaves its number there, with a token; the others call. The token keeps out who calls by
chance; who can read the store knows it, and so nothing that comes over a connection is trusted further than
`messages.py` tells. torch.distributed is imported here alone, where there are several processes.
"""

from __future__ import annotations

import hmac
import importlib
import os
import secrets
import socket
import struct
import threading
import time
import uuid
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import ExitStack, suppress
from datetime import timedelta
from pathlib import Path
from typing import Any

from ckavg.engine.links import Links
from ckavg.errors import RanksError, listed

_JOIN_SECONDS = 300.0
_CALL_SECONDS = 10.0
_SECONDS_TO_TELL = 5.0
_SECONDS_BETWEEN_LOOKS = 0.02
_BACKLOG = 4096
_KEY = "ckavg"
_PORT = struct.Struct("!32sH?")
"""What the first leaves in the store: the token of the job, its port, and whether only this machine can call it."""

_CALL = struct.Struct("!32sI64s")
"""What the others say first: the token, their rank, the name of their machine."""

_LOOPBACK = "127.0.0.1"
_ALIVE = {"TCP_KEEPIDLE": 15, "TCP_KEEPINTVL": 5, "TCP_KEEPCNT": 9, "TCP_USER_TIMEOUT": 60_000}
"""A machine that lost its power or its network says nothing: after a minute it is taken for gone."""

_BY_ITSELF = (
    "RANK, WORLD_SIZE and LOCAL_RANK are set in the environment; to run one process by itself: env -u RANK ckavg …"
)


def join(rank: int, world: int, on_wait: Callable[[str], None] | None = None) -> Links:
    """Connect the processes of a job. Each of them calls this.

    What it waits for is waited for in a thread, since much of it is in C, where Ctrl-C is not heard.

    Args:
        rank: of this process, from 0.
        world: how many there are.
        on_wait: called after a while, and then seldom, with a sentence on who is waited for.

    Raises:
        RanksError: they do not come together.
    """
    importlib.import_module("torch.distributed")  # takes seconds, in which nobody is waited for
    meeting = _Meeting(rank, world)
    done: Future[tuple[dict[int, socket.socket], dict[int, str]]] = Future()

    def meet() -> None:
        try:
            done.set_result(meeting.connect())
        except BaseException as error:
            done.set_exception(error)

    begun, tell_after = time.monotonic(), _SECONDS_TO_TELL
    threading.Thread(target=meet, name="ckavg-joining", daemon=True).start()
    try:
        while not done.done():
            time.sleep(_SECONDS_BETWEEN_LOOKS)
            waited = time.monotonic() - begun
            if waited > _JOIN_SECONDS:
                raise RuntimeError(f"after {_JOIN_SECONDS:.0f} s, {meeting.waits_for} had not come.")
            if waited > tell_after:
                tell_after *= 4
                if on_wait is not None:
                    on_wait(f"Rank {rank} of {world} waits for {meeting.waits_for}. {_BY_ITSELF}")
        sockets, names = done.result()
    except BaseException as error:
        meeting.is_over = True
        done.add_done_callback(_close)
        if isinstance(error, OSError | RuntimeError | ValueError | struct.error):  # torch's own are RuntimeErrors
            raise RanksError(
                f"Rank {rank} of {world} cannot join the others: {str(error).partition(chr(10))[0]}", hint=_BY_ITSELF
            ) from error
        raise
    return Links(sockets, names, on_wait if rank < 2 else None)


def _close(done: Future[tuple[dict[int, socket.socket], dict[int, str]]]) -> None:
    """Close what came of a meeting that nobody waits for any more."""
    if done.exception() is None:
        for connection in done.result()[0].values():
            connection.close()


class _Meeting:
    """What one process does to meet the others.

    Attributes:
        waits_for: whom, at the moment.
        is_over: set where nobody waits any more for what comes of it.
    """

    def __init__(self, rank: int, world: int) -> None:
        self._rank = rank
        self._world = world
        self._host, self._port = (os.environ.get(name, "") for name in ("MASTER_ADDR", "MASTER_PORT"))
        self._has_agent = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
        self.waits_for = f"{'torchrun' if self._has_agent else 'rank 0'} at {self._host}:{self._port}"
        self.is_over = False

    def connect(self) -> tuple[dict[int, socket.socket], dict[int, str]]:
        """Connections to the others, and what to call them, by rank."""
        if not (self._host and self._port.isdecimal() and int(self._port) < 1 << 16 and 0 <= self._rank < self._world):
            raise ValueError("RANK must be less than WORLD_SIZE, MASTER_ADDR a host, and MASTER_PORT a port.")
        store = self._store()
        if self._rank == 0:
            return self._answer_all(store)
        return self._call_first(store)

    def _store(self) -> Any:
        distributed: Any = importlib.import_module("torch.distributed")
        if not distributed.is_available():
            raise RuntimeError("this torch was built without torch.distributed.")
        store = distributed.TCPStore(
            self._host,
            int(self._port),
            self._world,
            is_master=self._rank == 0 and not self._has_agent,
            timeout=timedelta(seconds=_JOIN_SECONDS),
            wait_for_workers=False,
            multi_tenant=True,
        )
        attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
        return distributed.PrefixStore(f"{_KEY}-{attempt}", store)

    def _answer_all(self, store: Any) -> tuple[dict[int, socket.socket], dict[int, str]]:
        missing = set(range(1, self._world))
        while missing := {rank for rank in missing if not store.check([str(rank)])}:
            self._look(missing)
            time.sleep(_SECONDS_BETWEEN_LOOKS)
        here = _machine()
        on_one_machine = all(store.get(str(rank)) == here for rank in range(1, self._world))
        token = secrets.token_bytes(32)
        sockets: dict[int, socket.socket] = {}
        names: dict[int, str] = {}
        with ExitStack() as undo, _open_port(on_one_machine=on_one_machine) as server:
            server.settimeout(1.0)
            store.set(_KEY, _PORT.pack(token, server.getsockname()[1], on_one_machine))
            while missing := set(range(1, self._world)) - set(sockets):
                self._look(missing)
                with suppress(OSError, ValueError), ExitStack() as stranger:  # who says nothing, or something else
                    connection = stranger.enter_context(server.accept()[0])
                    rank, machine = _heard(connection, token, self._world)
                    if rank in sockets:
                        raise RuntimeError(f"two processes call themselves rank {rank}.")
                    sockets[rank], names[rank] = _kept_alive(connection), f"Rank {rank} on {machine}"
                    undo.push(stranger.pop_all())
            store.delete_key(_KEY)  # for the next job of the same torchrun
            undo.pop_all()
        return sockets, names

    def _look(self, missing: set[int]) -> None:
        if self.is_over:
            raise RuntimeError("nobody waits for the others any more.")
        self.waits_for = f"rank {listed([str(rank) for rank in sorted(missing)])}"

    def _call_first(self, store: Any) -> tuple[dict[int, socket.socket], dict[int, str]]:
        self.waits_for = f"rank 0 at {self._host}:{self._port}"
        store.set(str(self._rank), _machine())
        while not store.check([_KEY]):
            if self.is_over:
                raise RuntimeError("nobody waits for the first any more.")
            time.sleep(_SECONDS_BETWEEN_LOOKS)
        token, port, on_one_machine = _PORT.unpack(store.get(_KEY))
        host = _LOOPBACK if on_one_machine else self._host
        try:
            connection = socket.create_connection((host, port), timeout=_JOIN_SECONDS)
        except OSError as error:
            raise RuntimeError(f"rank 0 does not answer on {host}, port {port}: {error.strerror or error}.") from error
        connection.sendall(_CALL.pack(token, self._rank, socket.gethostname().encode()[:64]))
        name = socket.gethostname() if on_one_machine else host
        return {0: _kept_alive(connection)}, {0: f"Rank 0 on {name}"}


def _machine() -> bytes:
    """What tells whether two processes reach each other over the loopback: the start of the system, and its network."""
    own: object = uuid.getnode()
    with suppress(OSError):
        own = Path("/proc/sys/kernel/random/boot_id").read_text(), Path("/proc/self/ns/net").readlink()
    return f"{socket.gethostname()} {own}".encode()


def _heard(connection: socket.socket, token: bytes, world: int) -> tuple[int, str]:
    connection.settimeout(_CALL_SECONDS)
    heard = b""
    while len(heard) < _CALL.size:
        part = connection.recv(_CALL.size - len(heard))
        if not part:
            raise ValueError("a call that ends before it has begun")
        heard += part
    theirs, rank, machine = _CALL.unpack(heard)
    if not (hmac.compare_digest(theirs, token) and 0 < rank < world):
        raise ValueError("a call from elsewhere")
    return rank, machine.rstrip(b"\0").decode(errors="replace")


def _open_port(*, on_one_machine: bool) -> socket.socket:
    if on_one_machine:
        return socket.create_server((_LOOPBACK, 0), backlog=_BACKLOG)
    if socket.has_dualstack_ipv6():
        return socket.create_server(("", 0), family=socket.AF_INET6, backlog=_BACKLOG, dualstack_ipv6=True)
    return socket.create_server(("", 0), backlog=_BACKLOG)


def _kept_alive(connection: socket.socket) -> socket.socket:
    connection.settimeout(None)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in _ALIVE.items():
        if hasattr(socket, name):
            connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
    return connection
