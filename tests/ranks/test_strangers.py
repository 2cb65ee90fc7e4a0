"""Somebody else on the machine, who can read the store of a job: nothing of theirs runs, and the job says why it ends.

Processes are real, and so are the store and the connections.
"""

from __future__ import annotations

import json
import os
import pickle
import re
import shlex
import socket
import struct
import subprocess
import threading
from collections.abc import Callable
from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed

from ckavg.engine import joining, links
from ckavg.engine.distributed import Ranks
from ckavg.engine.links import Links
from ckavg.engine.messages import FAILED, HEAD, LEFT, VALUE, packed
from ckavg.errors import RanksError
from tests.exhaustive import all_but
from tests.ranks.launch import SECONDS, free_port, start

distributed: Any = torch.distributed
SOON = "from ckavg.engine import links; links._SECONDS_OF_A_TICK, links._SECONDS_QUIET = 0.1, 0.5\n"


class Canary:
    """Leaves a file where it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {shlex.quote(str(self.path))}",)


def store_of(port: int, *, is_master: bool = False) -> Any:
    """The store of a job, as anybody may open it."""
    store = distributed.TCPStore(
        "127.0.0.1", port, 2, is_master, timedelta(seconds=SECONDS), wait_for_workers=False, multi_tenant=True
    )
    return distributed.PrefixStore("ckavg-0", store)


def told_by(store: Any) -> tuple[bytes, int, bool]:
    """Token and port of a job that somebody seems to have joined, and whether the port is that of the loopback."""
    store.set("1", joining._machine())
    store.wait(["ckavg"])
    token, port, on_one_machine = joining._PORT.unpack(store.get("ckavg"))
    return token, port, on_one_machine


def send(connection: socket.socket, data: bytes) -> None:
    with suppress(OSError):  # the other end hangs up as soon as it has heard enough
        connection.sendall(data)


def message(kind: bytes, text: bytes) -> bytes:
    return HEAD.pack(kind, len(text)) + text


MOST = 10_000
"""How much a process takes here, so that too much is made soon."""


NO_MESSAGE = "has sent what is no message of ckavg"
ANOTHER = "tells something else than rank 0 asks for"
FRAMES: dict[str, tuple[bytes | Callable[[bytes, str], bytes], str]] = {
    "pickle": (lambda evil, _: evil, NO_MESSAGE),
    "pickle as a value": (lambda evil, _: message(VALUE, evil), NO_MESSAGE),
    "pickle as an error": (lambda evil, _: message(FAILED, evil), NO_MESSAGE),
    "call": (lambda _, touch: message(VALUE, json.dumps({"os.system": touch}).encode()), NO_MESSAGE),
    "error that is a call": (
        lambda _, touch: message(FAILED, json.dumps({"error": ["os.system", [touch], "", []]}).encode()),
        "os.system: touch",
    ),
    "failure that is none": (message(FAILED, b"7"), NO_MESSAGE),
    "other kind": (message(b"?", b"null"), NO_MESSAGE),
    "too long": (HEAD.pack(VALUE, 2**32 - 1) + b"[" * 1000, NO_MESSAGE),
    "too many values": (message(VALUE, b"[" + b"[]," * (MOST // 2) + b"[]]"), NO_MESSAGE),
    "more than is taken": (packed(VALUE, ("host", {})) + packed(VALUE, "x" * 3200) * (MOST // 100 + 1), NO_MESSAGE),
    "deep": (message(VALUE, b"[" * 100_000), NO_MESSAGE),
    "noise": (bytes(range(1, 256)) * 40, NO_MESSAGE),
    "half of one, and then nothing": (HEAD.pack(VALUE, 1000) + b'"', "has shown no sign of life for 1 s"),
    "another value than asked for": (message(VALUE, b"7"), ANOTHER),
    "another tuple than asked for": (packed(VALUE, ("host", {}, 7)), ANOTHER),
    "leaves at once": (packed(LEFT), "has finished while this one has not"),
}
"""What a stranger sends, some of it made of a pickle and a command that leave a file, and what ends the job."""


def hostile(name: str, canary: Path) -> bytes:
    frame, _ = FRAMES[name]
    if isinstance(frame, bytes):
        return frame
    return frame(pickle.dumps(Canary(canary)), f"touch {shlex.quote(str(canary))}")


@pytest.mark.parametrize("name", all_but(FRAMES.keys() - {"leaves at once"}, FRAMES))
def test_nothing_that_comes_over_a_connection_runs(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, name: str) -> None:
    for constant, seconds in {"OF_A_TICK": 0.1, "QUIET": 0.5, "SILENT": 1.0}.items():
        monkeypatch.setattr(links, f"_SECONDS_{constant}", seconds)
    monkeypatch.setattr(links, "MOST", MOST)
    canary = tmp_path / "canary"
    ours, theirs = socket.socketpair()
    first = Links({1: ours}, {1: "Rank 1"})
    stranger = threading.Thread(target=send, args=(theirs, hostile(name, canary)))
    stranger.start()
    ranks = Ranks(0, 2, _links=first)

    def meet() -> None:
        with ranks.fail_together():
            ranks.gather(("host", {}))
            while name == "more than is taken":
                ranks.check()

    with pytest.raises((RanksError, RuntimeError), match=FRAMES[name][1]):
        meet()
    first.close()
    stranger.join(SECONDS)
    theirs.close()
    assert not canary.exists()


def one_message(err: str, name: str) -> bool:
    """Whether a process has said once why it ended: an error of ours, or an exception that it was sent."""
    if name == "error that is a call":
        return err.count("RuntimeError: os.system: touch") == 1 and "error:" not in err.replace("RuntimeError:", "")
    return len(re.findall("^error: Rank ", err, re.MULTILINE)) == 1 and "Traceback" not in err


@pytest.mark.parametrize(
    "name",
    all_but(
        ("pickle", "error that is a call"),
        ["pickle", "pickle as a value", "error that is a call", "too long", "another value than asked for"],
    ),
)
def test_who_takes_the_place_of_a_rank_runs_nothing(
    jobs: list[subprocess.Popen[str]], run: Path, tmp_path: Path, name: str
) -> None:
    canary = tmp_path / "canary"
    port = free_port()
    jobs.append(start(0, 2, port, "ema", run, before=SOON))
    token, port, _ = told_by(store_of(port))
    with socket.create_connection(("127.0.0.1", port)) as connection:
        connection.sendall(joining._CALL.pack(token, 1, b"somewhere"))
        send(connection, hostile(name, canary))
        _, err = jobs[0].communicate(timeout=SECONDS)
    assert not canary.exists()
    assert jobs[0].returncode == 1
    assert one_message(err, name), err
    assert not (run / "averaged").exists()


@pytest.mark.parametrize("name", all_but(("pickle",), ["pickle", "noise"]))
def test_who_takes_the_place_of_the_first_runs_nothing(
    jobs: list[subprocess.Popen[str]], run: Path, tmp_path: Path, name: str
) -> None:
    canary = tmp_path / "canary"
    port = free_port()
    store = store_of(port, is_master=True)
    with socket.create_server(("127.0.0.1", 0)) as server:
        jobs.append(start(1, 2, port, "ema", run, before=SOON))
        store.set("ckavg", joining._PORT.pack(bytes(32), server.getsockname()[1], True))
        server.settimeout(SECONDS)
        connection = server.accept()[0]
        with connection:
            send(connection, hostile(name, canary))
            _, err = jobs[0].communicate(timeout=SECONDS)
    assert not canary.exists()
    assert jobs[0].returncode == 1
    assert one_message(err, name), err


@pytest.mark.parametrize(
    "port", all_but((b"short",), [b"", b"short", joining._PORT.pack(bytes(32), 1, True) + b"more"])
)
def test_what_anybody_may_leave_in_the_store(jobs: list[subprocess.Popen[str]], run: Path, port: bytes) -> None:
    place = free_port()
    store = store_of(place, is_master=True)
    store.set("ckavg", port)
    jobs.append(start(1, 2, place, "ema", run))
    _, err = jobs[0].communicate(timeout=SECONDS)
    assert jobs[0].returncode == 1
    assert err.startswith("error: Rank 1 of 2 cannot join the others: ")
    assert "Traceback" not in err


def test_who_does_not_know_the_token_is_passed_over(
    jobs: list[subprocess.Popen[str]], run: Path, tmp_path: Path
) -> None:
    """Whatever they send, and however they leave; the job does its work."""
    canary = tmp_path / "canary"
    place = free_port()
    jobs.append(start(0, 2, place, "ema", run))
    token, port, _ = told_by(store_of(place))
    evil = pickle.dumps(Canary(canary))
    calls = [b"", evil, evil * 10, joining._CALL.pack(bytes(32), 1, b"somewhere") + evil]
    calls += [joining._CALL.pack(token, rank, b"somewhere") + evil for rank in (0, 2, 2**32 - 1)]
    for call in calls:
        with socket.create_connection(("127.0.0.1", port)) as connection:
            connection.sendall(call)
    jobs.append(start(1, 2, place, "ema", run))
    assert [each.communicate(timeout=SECONDS) and each.returncode for each in jobs] == [0, 0]
    assert not canary.exists()
    assert list((run / "averaged").iterdir())


@pytest.mark.exhaustive
def test_two_of_one_rank_end_the_job(jobs: list[subprocess.Popen[str]], run: Path) -> None:
    jobs.append(start(0, 3, place := free_port(), "ema", run))
    store = store_of(place)
    store.set("2", joining._machine())
    token, port, _ = told_by(store)
    call = joining._CALL.pack(token, 1, b"somewhere")
    with (
        socket.create_connection(("127.0.0.1", port)) as one,
        socket.create_connection(("127.0.0.1", port)) as other,
    ):
        one.sendall(call)
        other.sendall(call)
        _, err = jobs[0].communicate(timeout=SECONDS)
    assert jobs[0].returncode == 1
    assert "error: Rank 0 of 3 cannot join the others: two processes call themselves rank 1.\n" in err


# --- what a job listens on ---


def listening(port: int) -> set[str]:
    """The addresses at which this machine listens on a port, as the system lists them."""
    found = set()
    for table in ("tcp", "tcp6"):
        for line in Path("/proc/net", table).read_text().splitlines()[1:]:
            _, local, _, state, *_ = line.split()
            address, _, number = local.partition(":")
            if state == "0A" and int(number, 16) == port:
                found.add(address)
    return found


needs_proc = pytest.mark.skipif(not Path("/proc/net/tcp").exists(), reason="no /proc/net/tcp here")


@needs_proc
@pytest.mark.exhaustive
@pytest.mark.parametrize(("named", "local_world"), [("127.0.0.1", None), (socket.gethostname(), "1")])
def test_one_machine_listens_to_itself_alone(
    jobs: list[subprocess.Popen[str]],
    run: Path,
    named: str,
    local_world: str | None,
) -> None:
    """Whatever the machine is called in MASTER_ADDR, and whoever has started the processes."""
    before = f"import os; os.environ['MASTER_ADDR'] = {named!r}\n"
    if local_world is not None:
        before += f"os.environ['LOCAL_WORLD_SIZE'] = {local_world!r}\n"
    jobs.append(start(0, 2, place := free_port(), "ema", run, before=before))
    _, port, on_one_machine = told_by(store_of(place))
    assert on_one_machine
    assert listening(port) == {f"{struct.unpack('=I', socket.inet_aton('127.0.0.1'))[0]:08X}"}


@needs_proc
def test_several_machines_listen_to_each_other(jobs: list[subprocess.Popen[str]], run: Path) -> None:
    """So that the test above can fail."""
    jobs.append(start(0, 2, place := free_port(), "ema", run))
    store = store_of(place)
    store.set("1", b"another machine")
    store.wait(["ckavg"])
    _, port, on_one_machine = joining._PORT.unpack(store.get("ckavg"))
    assert not on_one_machine
    assert listening(port) & {"0" * 32, "0" * 8}
