"""Waits of one process for another: each says whom it waits for, can be interrupted, and has an end."""

from __future__ import annotations

import os
import re
import shlex
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.exhaustive import all_but, thinned
from tests.ranks.launch import SECONDS, environment, free_port, start

SOON = """
from ckavg.engine import joining, links
joining._SECONDS_TO_TELL = 0.5
links._SECONDS_OF_A_TICK, links._SECONDS_TO_TELL, links._SECONDS_QUIET, links._SECONDS_SILENT = 0.2, 0.6, 1.2, {silent}
"""
IN_A_PASS = """
import os, pathlib, signal, time
from ckavg.engine.tiles import TileReader
load, calls = TileReader.load, iter(range(10**9))
def held_up(self, index, name, start, out):
    if next(calls) == 2:
        {act}
    return load(self, index, name, start, out)
TileReader.load = held_up
"""
STOPPED = IN_A_PASS.format(act="os.kill(os.getpid(), signal.SIGSTOP)")
HOST = re.escape(socket.gethostname())


def soon(silent: float = 1000.0) -> str:
    return SOON.format(silent=silent)


def said(process: subprocess.Popen[str], pattern: str) -> str:
    """What a process says up to a line of this kind."""
    assert process.stderr is not None
    lines = ""
    while not re.search(pattern, lines):
        line = process.stderr.readline()
        assert line, lines
        lines += line
    return lines


# --- nobody else comes ---


@pytest.mark.parametrize(("rank", "sent"), thinned([0, 1], [signal.SIGINT, signal.SIGTERM], every=2))
def test_what_a_shell_remembers_of_another_job(
    jobs: list[subprocess.Popen[str]], run: Path, rank: int, sent: signal.Signals
) -> None:
    """The process says whom it waits for, muted or not, and how to do without; and it can be interrupted."""
    port = free_port()
    jobs.append(start(rank, 2, port, "ema", run, before=soon()))
    others = "rank 1" if rank == 0 else f"rank 0 at 127.0.0.1:{port}"
    line = said(jobs[0], "waits for")
    assert line.startswith(f"Rank {rank} of 2 waits for {others}. RANK, WORLD_SIZE and LOCAL_RANK are set")
    assert line.endswith("to run one process by itself: env -u RANK ckavg …\n")

    begun = time.monotonic()
    jobs[0].send_signal(sent)
    out, err = jobs[0].communicate(timeout=SECONDS)
    assert time.monotonic() - begun < 15
    assert (jobs[0].returncode, out) == (130, "")
    assert err == "interrupted: No result was left in part; the checkpoints are as they were.\n"

    told = {"RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_RANK": "0"}
    alone = f"env -u RANK {shlex.quote(sys.executable)} -m ckavg ema {shlex.quote(str(run))}"
    subprocess.run(alone, shell=True, check=True, env=environment() | told, timeout=SECONDS, capture_output=True)
    assert (run / "averaged").is_dir()


@pytest.mark.exhaustive
def test_torchrun_that_is_gone_is_named(jobs: list[subprocess.Popen[str]], run: Path) -> None:
    port = free_port()
    before = soon() + "import os; os.environ['TORCHELASTIC_USE_AGENT_STORE'] = 'True'"
    jobs.append(start(1, 2, port, "ema", run, before=before))
    assert said(jobs[0], "waits for").startswith(f"Rank 1 of 2 waits for torchrun at 127.0.0.1:{port}. ")


def test_the_first_names_those_who_have_not_come(jobs: list[subprocess.Popen[str]], run: Path) -> None:
    port = free_port()
    jobs += [start(rank, 4, port, "ema", run, before=soon()) for rank in (0, 2)]
    assert "Rank 0 of 4 waits for rank 1, 3. " in said(jobs[0], "waits for rank 1, 3")


@pytest.mark.exhaustive
def test_the_wait_has_an_end(jobs: list[subprocess.Popen[str]], run: Path) -> None:
    port = free_port()
    for rank, seconds in ((0, 9), (2, 3)):  # the first one stays until the other has given up
        before = soon() + f"joining._JOIN_SECONDS = {seconds}.0"
        jobs.append(start(rank, 3, port, "ema", run, before=before))
    for rank, missing, process in zip((0, 2), ("rank 1", f"rank 0 at 127.0.0.1:{port}"), jobs, strict=True):
        _, err = process.communicate(timeout=SECONDS)
        waited = 3 if rank else 9
        assert f"error: Rank {rank} of 3 cannot join the others: after {waited} s, {missing} had not come.\n" in err
        assert "env -u RANK ckavg …" in err
        assert process.returncode == 1


# --- one that has come is stopped, or its storage hangs ---


@pytest.mark.parametrize("stopped", all_but((1,), [0, 1]))
def test_a_stopped_process_is_named_and_given_up(jobs: list[subprocess.Popen[str]], run: Path, stopped: int) -> None:
    """By the other one, muted or not."""
    port = free_port()
    before = [soon(silent=4) + (STOPPED if rank == stopped else "") for rank in range(2)]
    jobs += [start(rank, 2, port, "ema", run, before=before[rank]) for rank in range(2)]
    waiting = jobs[1 - stopped]
    _, err = waiting.communicate(timeout=SECONDS)
    assert re.search(
        rf"^\d+ s of waiting for rank {stopped} on {HOST}. No sign of life from rank {stopped}; "
        "after 4 s, the job ends.$",
        err,
        re.MULTILINE,
    )
    assert re.findall("^error: .*$", err, re.MULTILINE) == [
        f"error: Rank {stopped} on {socket.gethostname()} has shown no sign of life for 4 s; the others give up."
    ]
    assert waiting.returncode == 1
    assert not list(run.glob("averaged/ema*"))


def test_an_interrupt_is_heard_while_a_process_is_stopped(jobs: list[subprocess.Popen[str]], run: Path) -> None:
    port = free_port()
    jobs += [start(rank, 2, port, "ema", run, before=soon() + (STOPPED if rank else "")) for rank in range(2)]
    said(jobs[0], "No sign of life from rank 1")
    begun = time.monotonic()
    jobs[0].send_signal(signal.SIGINT)
    _, err = jobs[0].communicate(timeout=SECONDS)
    assert time.monotonic() - begun < 15
    assert jobs[0].returncode == 130
    assert "interrupted: No result was left in part" in err
    assert [path.name for path in run.iterdir() if "averaged" in path.name] == []


@pytest.mark.exhaustive
@pytest.mark.parametrize("hung", all_but((0,), [0, 1]))
def test_one_whose_storage_hangs_is_named_and_waited_for(
    jobs: list[subprocess.Popen[str]], run: Path, hung: int
) -> None:
    """It lives. What it is waited for lasts longer than a silence may."""
    go_on = run.parent / "go-on"
    hangs = IN_A_PASS.format(act=f"while not os.path.exists({str(go_on)!r}): time.sleep(0.05)")
    port = free_port()
    before = [soon(silent=2) + (hangs if rank == hung else "") for rank in range(2)]
    jobs += [start(rank, 2, port, "ema", run, before=before[rank]) for rank in range(2)]
    waiting = jobs[1 - hung]
    said(waiting, rf"\d+ s of waiting for rank {hung} on {HOST}\.\n")
    time.sleep(4)
    go_on.touch()
    _, err = waiting.communicate(timeout=SECONDS)
    assert "sign of life" not in err
    assert [each.wait(SECONDS) for each in jobs] == [0, 0]
    assert list(run.glob("averaged/ema*"))


@pytest.mark.exhaustive
def test_a_job_that_was_stopped_as_a_whole_goes_on(jobs: list[subprocess.Popen[str]], run: Path) -> None:
    """As with Ctrl-Z. The others have been as silent as oneself."""
    go_on = run.parent / "go-on"
    hangs = IN_A_PASS.format(act=f"while not os.path.exists({str(go_on)!r}): time.sleep(0.05)")
    port = free_port()
    jobs += [start(rank, 2, port, "ema", run, before=soon(silent=2) + (hangs if rank else "")) for rank in range(2)]
    said(jobs[0], r"s of waiting for rank 1")
    for each in jobs:
        os.kill(each.pid, signal.SIGSTOP)
    time.sleep(4)
    for each in jobs:
        os.kill(each.pid, signal.SIGCONT)
    go_on.touch()
    assert [each.communicate(timeout=SECONDS) and each.returncode for each in jobs] == [0, 0]
