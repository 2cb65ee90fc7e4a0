"""Stage *engine*: how the processes of one job find each other: through the store of torchrun.

The first opens a port and leaves its number there, with a token that only the job knows; the others call. What comes
without the token is never unpickled. torch.distributed is imported here alone, where there are several processes.
"""

from __future__ import annotations

import hmac
import os
import secrets
import socket
import struct
import time
from contextlib import ExitStack, suppress
from datetime import timedelta
from typing import Any

from ckavg.engine.links import Links
from ckavg.errors import RanksError

_JOIN_SECONDS = 300.0
_CALL_SECONDS = 10.0
_BACKLOG = 4096
_KEY = "ckavg"
_PORT = struct.Struct("!32sH")
"""What the first leaves in the store: the token of the job, and its port."""

_CALL = struct.Struct("!32sI64s")
"""What the others say first: the token, their rank, the name of their machine."""

_LOOPBACK = "127.0.0.1"
_ALIVE = {"TCP_KEEPIDLE": 15, "TCP_KEEPINTVL": 5, "TCP_KEEPCNT": 9, "TCP_USER_TIMEOUT": 60_000}
"""A machine that lost its power or its network says nothing: after a minute it is taken for gone."""


def join(rank: int, world: int, *, on_one_machine: bool) -> Links:
    """Connect the processes of a job. Each of them calls this.

    Args:
        rank: of this process, from 0.
        world: how many there are.
        on_one_machine: whether all of them are on this machine, so that no other can connect.

    Raises:
        RanksError: they do not come together.
    """
    deadline = time.monotonic() + _JOIN_SECONDS
    try:
        store = _store(rank, world)
        if rank == 0:
            return _answer_all(store, world, deadline, on_one_machine=on_one_machine)
        return _call_first(store, rank, deadline, _LOOPBACK if on_one_machine else os.environ["MASTER_ADDR"])
    except (OSError, RuntimeError, ValueError) as error:  # torch's own errors are RuntimeErrors
        raise RanksError(
            f"Rank {rank} of {world} cannot join the others: {str(error).partition(chr(10))[0]}",
            hint="Where one process is to work by itself, start it without torchrun, or unset WORLD_SIZE.",
        ) from error


def _store(rank: int, world: int) -> Any:
    from torch import distributed

    if not distributed.is_available():
        raise RuntimeError("this torch was built without torch.distributed.")
    from torch.distributed.rendezvous import rendezvous

    store, _, _ = next(rendezvous("env://", rank, world, timeout=timedelta(seconds=_JOIN_SECONDS)))
    return store


def _answer_all(store: Any, world: int, deadline: float, *, on_one_machine: bool) -> Links:
    token = secrets.token_bytes(32)
    sockets: dict[int, socket.socket] = {}
    names: dict[int, str] = {}
    with ExitStack() as undo, _open_port(on_one_machine=on_one_machine) as server:
        store.set(_KEY, _PORT.pack(token, server.getsockname()[1]))
        while missing := set(range(1, world)) - set(sockets):
            server.settimeout(max(0.01, deadline - time.monotonic()))
            try:
                connection = undo.enter_context(server.accept()[0])
            except TimeoutError as error:
                who = ", ".join(map(str, sorted(missing)))
                raise RuntimeError(f"after {_JOIN_SECONDS:.0f} s, rank {who} had not come.") from error
            with suppress(OSError, ValueError):  # a stranger who says nothing, or something else
                rank, machine = _heard(connection, token)
                sockets[rank], names[rank] = _kept_alive(connection), f"Rank {rank} on {machine}"
        store.delete_key(_KEY)  # for the next job of the same torchrun
        undo.pop_all()
    return Links(sockets, names)


def _heard(connection: socket.socket, token: bytes) -> tuple[int, str]:
    connection.settimeout(_CALL_SECONDS)
    heard = b""
    while len(heard) < _CALL.size:
        part = connection.recv(_CALL.size - len(heard))
        if not part:
            raise ValueError("a call that ends before it has begun")
        heard += part
    theirs, rank, machine = _CALL.unpack(heard)
    if not hmac.compare_digest(theirs, token):
        raise ValueError("a call from elsewhere")
    return rank, machine.rstrip(b"\0").decode(errors="replace")


def _call_first(store: Any, rank: int, deadline: float, host: str) -> Links:
    while not store.check([_KEY]):  # rather than wait in C, where Ctrl-C is not heard
        if time.monotonic() > deadline:
            raise RuntimeError(f"after {_JOIN_SECONDS:.0f} s, rank 0 had not come.")
        time.sleep(0.02)
    token, port = _PORT.unpack(store.get(_KEY))
    try:
        connection = socket.create_connection((host, port), timeout=max(1.0, deadline - time.monotonic()))
    except OSError as error:
        raise RuntimeError(f"rank 0 does not answer on {host}, port {port}: {error.strerror or error}.") from error
    connection.sendall(_CALL.pack(token, rank, socket.gethostname().encode()[:64]))
    return Links({0: _kept_alive(connection)}, {0: f"Rank 0 on {host}"})


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
