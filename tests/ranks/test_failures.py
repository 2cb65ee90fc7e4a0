"""How a job ends if a process is killed, fails or hangs: what the others print and when, and what a rerun does."""

from __future__ import annotations

import re
import shlex
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.exhaustive import all_but, unless
from tests.ranks.launch import SECONDS, environment, start, torchrun

HOST = re.escape(socket.gethostname())
NAME = "pema-gamma0.15"
ACT = """
import os, pathlib, signal, time
def act():
    pathlib.Path({mark!r}).touch()
    {act}
    time.sleep(0)
def before(owner, name, count=0):
    original, calls = getattr(owner, name), iter(range(10**9))
    def replaced(*args, **more):
        if next(calls) == count:
            act()
        return original(*args, **more)
    setattr(owner, name, replaced)
"""
MOMENTS = {
    "before joining": "from ckavg.averaging import pipeline; before(pipeline, 'file_fingerprints')",
    "joining": "from ckavg.engine import job; before(job.Job, '_wait_to_join', 0 if os.environ['RANK'] == '0' else 1)",
    "joined": "from ckavg.averaging import prepare; before(prepare, 'agreed_fingerprints')",
    "pass 1": "from ckavg.path import measure; before(measure._Worker, '__call__')",
    "after pass 1": "from ckavg.averaging import prepare; before(prepare, '_timeline')",
    "opening the files": "from ckavg.averaging import distributed; before(distributed.WeightFiles, '__init__')",
    # Rank 0 has written the header of the file before.
    "pass 2": "from ckavg.output import weight_files as w; before(w, '_write_at', int(os.environ.get('RANK') == '0'))",
    "noting": "from ckavg.output.weight_files import WeightFiles; before(WeightFiles, 'sync')",
    "hashing": "from ckavg.averaging import distributed; before(distributed, 'sha256_of')",
    "leaving": "from ckavg.engine.distributed import Ranks; before(Ranks, 'leave')",
    "publishing": "from ckavg.averaging import pipeline; before(pipeline, 'publish')",
    "renaming": "from ckavg.output.staging import Staging; before(Staging, 'commit')",
}
"""Code after which a process acts at that moment."""

OF_THE_FIRST = {"publishing", "renaming"}
KILL, FAIL = "os.kill(os.getpid(), signal.SIGKILL)", "raise OSError(5, 'broken', 'disk')"
STOP = "time.sleep(1.5); os.kill(os.getpid(), signal.SIGSTOP)"
"""After a beat, in which it says what it is doing."""


def sabotage(run: Path, moment: str, act: str) -> str:
    return ACT.format(mark=str(run.parent / "acted"), act=act) + MOMENTS[moment] + "\n"


def wait_for(condition: Callable[[], object]) -> None:
    end = time.monotonic() + SECONDS
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)


def said(process: subprocess.Popen[str], pattern: str) -> str:
    """The output of a process up to a line of this kind."""
    assert process.stderr is not None
    lines = ""
    while not re.search(pattern, lines):
        line = process.stderr.readline()
        assert line, lines
        lines += line
    return lines


def result_of(run: Path) -> bytes:
    directory = run / "averaged" / NAME
    assert not list((run / "averaged").glob(".*partial"))
    return (directory / "model.safetensors").read_bytes()


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """The result of a single process."""
    import torch

    from tests.cli.runner import run_cli
    from tests.runs import random_run, write_run

    run = write_run(
        tmp_path_factory.mktemp("alone") / "run", random_run(seed=1, count=4, dtype=torch.bfloat16), (0, 10, 20, 30)
    )
    assert run_cli("pema", str(run)).exit_code == 0
    return result_of(run)


USUAL = {("pass 1", 1, KILL), ("pass 2", 0, KILL), ("joined", 1, FAIL), ("hashing", 1, KILL), ("renaming", 0, FAIL)}
CASES = [
    pytest.param(moment, rank, act, marks=unless((moment, rank, act) in USUAL), id=f"{moment}-{rank}-{act[:2]}")
    for moment in MOMENTS
    for rank in ((0,) if moment in OF_THE_FIRST else (0, 1))
    for act in (KILL, FAIL)
]


@pytest.mark.parametrize(("moment", "rank", "act"), CASES)
def test_one_fails_and_all_end(
    jobs: list[subprocess.Popen[str]],
    run: Path,
    expected: bytes,
    moment: str,
    rank: int,
    act: str,
) -> None:
    timeout = 6 if moment in ("before joining", "joining") else 60
    for each in range(2):
        before = sabotage(run, moment, act) if each == rank else ""
        jobs.append(start(each, 2, "pema", run, "--rank-timeout", timeout, before=before))
    wait_for((run.parent / "acted").exists)
    acted = time.monotonic()
    errors = [process.communicate(timeout=SECONDS)[1] for process in jobs]
    seconds = time.monotonic() - acted
    other = 1 - rank
    assert seconds < 30
    assert jobs[rank].returncode == (-9 if act == KILL else 1)
    all_said = [line for error in errors for line in error.splitlines() if line.startswith("error:")]
    print(f"{moment}, rank {rank}, {act[:2]}: {seconds:.1f} s, {all_said}")  # noqa: T201 - the table in clusters.md
    if jobs[other].returncode == 0:  # all was done by then
        assert (moment, rank) in (("hashing", 1), ("leaving", 1)) or moment == "renaming"
    else:
        assert jobs[other].returncode == 1
        if moment == "before joining":
            expecting = rf"Rank {other} of 2 waited 6 s for rank {rank}, which did not join in "
        elif act == KILL:
            expecting = rf"Rank {rank} on {HOST} disconnected; stopping all ranks\."
        else:
            expecting = r"(disk: |.* cannot be written: )broken\."
        if (moment, rank) == ("joining", 0):  # the other one may have come too late to have seen it
            expecting = rf"({expecting}|Rank 1 of 2 waited 6 s for rank 0, which did not join in )"
        assert re.search(f"^error: {expecting}", "\n".join(all_said), re.MULTILINE), errors
        assert len(all_said) <= 1 + (act == FAIL and moment in ("before joining", "joining"))
    assert "Traceback" not in "".join(errors)

    again = subprocess.run(
        [sys.executable, "-m", "ckavg", "pema", str(run)], env=environment(), capture_output=True, timeout=SECONDS
    )
    assert again.returncode == 0, again.stderr
    assert result_of(run) == expected


@pytest.mark.parametrize("rank", all_but((1,), [0, 1]))
@pytest.mark.parametrize("moment", all_but(("pass 2",), ["joined", "pass 1", "pass 2", "hashing"]))
def test_a_stopped_process_is_named_with_what_it_was_doing(
    jobs: list[subprocess.Popen[str]], run: Path, rank: int, moment: str
) -> None:
    """The other process names it, quiet or not. The stopped process ends too, once it continues."""
    for each in range(2):
        before = sabotage(run, moment, STOP) if each == rank else ""
        jobs.append(start(each, 2, "pema", run, "--rank-timeout", 4, before=before))
    _, error = jobs[1 - rank].communicate(timeout=SECONDS)
    at = r", at '\w+', elements 0 to [\d,]+" if moment.startswith("pass") else ""
    assert re.search(rf"^error: Rank {rank} on {HOST} made no progress for 4 s{at}", error, re.MULTILINE), error
    assert jobs[1 - rank].returncode == 1
    jobs[rank].send_signal(signal.SIGCONT)
    jobs[rank].communicate(timeout=SECONDS)
    assert jobs[rank].returncode == 1
    assert not list(run.glob("averaged/pema*"))


@pytest.mark.exhaustive
def test_slow_hashing_is_progress(jobs: list[subprocess.Popen[str]], run: Path, expected: bytes) -> None:
    """A file that takes longer to hash than --rank-timeout ends no job."""
    slowly = """
import time
from ckavg.averaging import distributed as d
from ckavg.output import weight_files as w
w.HASHED_AT_ONCE, original = 1 << 15, d.sha256_of
def slowly(*args, working_on, **more):
    return original(*args, working_on=lambda what: (time.sleep(1), working_on(what))[1], **more)
d.sha256_of = slowly
"""
    jobs += [start(rank, 2, "pema", run, "--rank-timeout", 4, before=slowly) for rank in range(2)]
    begun = time.monotonic()
    for job in jobs:
        _, error = job.communicate(timeout=SECONDS)
        assert job.returncode == 0, error
    assert time.monotonic() - begun > 5
    assert result_of(run) == expected


@pytest.mark.exhaustive
def test_a_job_that_was_stopped_as_a_whole_goes_on(
    jobs: list[subprocess.Popen[str]], run: Path, expected: bytes
) -> None:
    """As with Ctrl-Z: all processes were silent for the same time."""
    go_on = run.parent / "go-on"
    hang = f"while not os.path.exists({str(go_on)!r}): time.sleep(0.05)"
    for rank in range(2):
        jobs.append(start(rank, 2, "pema", run, "--rank-timeout", 3, before=rank * sabotage(run, "pass 2", hang)))
    wait_for((run.parent / "acted").exists)
    for each in jobs:
        each.send_signal(signal.SIGSTOP)
    time.sleep(6)
    for each in jobs:
        each.send_signal(signal.SIGCONT)
    go_on.touch()
    assert [each.communicate(timeout=SECONDS) and each.returncode for each in jobs] == [0, 0]
    assert result_of(run) == expected


@pytest.mark.parametrize("sent", all_but((signal.SIGINT,), [signal.SIGINT, signal.SIGTERM]))
@pytest.mark.parametrize("rank", all_but((1,), [0, 1]))
def test_an_interrupt_is_heard_while_another_hangs(
    jobs: list[subprocess.Popen[str]], run: Path, rank: int, sent: signal.Signals
) -> None:
    for each in range(2):
        jobs.append(start(each, 2, "pema", run, before=sabotage(run, "pass 2", STOP) if each == rank else ""))
    wait_for((run.parent / "acted").exists)
    time.sleep(1)
    jobs[1 - rank].send_signal(sent)
    begun = time.monotonic()
    _, error = jobs[1 - rank].communicate(timeout=SECONDS)
    assert jobs[1 - rank].returncode == 130
    assert time.monotonic() - begun < 25
    assert ("interrupted: No result was left in part" in error) == (rank == 1)  # the first speaks for all


@pytest.mark.parametrize("rank", [0, 1])
def test_what_a_shell_remembers_of_another_job(
    jobs: list[subprocess.Popen[str]], run: Path, rank: int, expected: bytes
) -> None:
    """The process names the ranks it waits for, quiet or not, and how to run alone; it can be interrupted."""
    jobs.append(start(rank, 2, "pema", run))
    place = run / "averaged" / f".{NAME}.ckavg-partial"
    line = said(jobs[0], "waits for").splitlines(keepends=True)[-1]
    assert line.startswith(f"Rank {rank} of 2 waits for rank {1 - rank} in {place}. RANK, WORLD_SIZE and LOCAL_RANK")
    assert line.endswith("to run a single process: env -u RANK ckavg …\n")
    begun = time.monotonic()
    jobs[0].send_signal(signal.SIGINT)
    out, _ = jobs[0].communicate(timeout=SECONDS)
    assert time.monotonic() - begun < 15
    assert (jobs[0].returncode, out) == (130, "")
    assert not list(run.glob("averaged/*"))

    told = {"RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_RANK": "0"}
    alone = f"env -u RANK {shlex.quote(sys.executable)} -m ckavg pema {shlex.quote(str(run))}"
    subprocess.run(alone, shell=True, check=True, env=environment() | told, timeout=SECONDS, capture_output=True)
    assert result_of(run) == expected


def test_two_jobs_on_one_output(jobs: list[subprocess.Popen[str]], run: Path, expected: bytes) -> None:
    go_on = run.parent / "go-on"
    hang = f"while not os.path.exists({str(go_on)!r}): time.sleep(0.05)"
    for rank in range(2):
        jobs.append(start(rank, 2, "pema", run, before=rank * sabotage(run, "pass 2", hang), MASTER_PORT="1"))
    wait_for((run.parent / "acted").exists)
    others = [start(rank, 2, "pema", run, MASTER_PORT="2") for rank in range(2)]
    jobs += others
    first, second = [each.communicate(timeout=SECONDS)[1] for each in others]
    assert [each.returncode for each in others] == [1, 1]
    assert f"error: Another ckavg is writing {NAME}." in first
    assert second == ""
    go_on.touch()
    assert [each.communicate(timeout=SECONDS) and each.returncode for each in jobs[:2]] == [0, 0]
    assert result_of(run) == expected


@pytest.mark.exhaustive
def test_the_agent_of_torchrun_is_killed(run: Path, expected: bytes) -> None:
    """The processes do not need it any more: the job continues to its end."""
    code = run.parent / "code.py"
    go_on = run.parent / "go-on"
    hang = f"while not os.path.exists({str(go_on)!r}): time.sleep(0.05)"
    code.write_text(f"{sabotage(run, 'pass 2', hang)}from ckavg.cli import main\nmain()\n")
    agent = subprocess.Popen(torchrun(2, code, "pema", run), env=environment(), stderr=subprocess.DEVNULL)
    wait_for((run.parent / "acted").exists)
    agent.kill()
    agent.wait(SECONDS)
    go_on.touch()
    wait_for((run / "averaged" / NAME).exists)
    assert result_of(run) == expected


def test_torchrun_shows_the_root_cause(run: Path) -> None:
    code = run.parent / "code.py"
    broken = sabotage(run, "pass 2", FAIL).replace("\n", "\n    ")
    code.write_text(f"import os\nif os.environ['RANK'] == '1':\n    {broken}\nfrom ckavg.cli import main\nmain()\n")
    ran = subprocess.run(
        torchrun(2, code, "pema", run), env=environment(), capture_output=True, text=True, timeout=SECONDS
    )
    assert ran.returncode == 1
    assert len(re.findall(r"error: .* cannot be written: broken\.", ran.stderr)) == 1
    assert re.search(r"Root Cause.*rank +: 1 .*OSError: \[Errno 5\] broken", ran.stderr, re.DOTALL), ran.stderr


def test_leftovers_continue_with_any_number_of_processes(
    jobs: list[subprocess.Popen[str]], run: Path, expected: bytes
) -> None:
    """Two processes begin, three continue and are killed, one finishes."""
    often = "from ckavg.engine import stream; stream.SECONDS_BETWEEN_NOTES = 0\n"
    for world, moment in ((2, "pass 1"), (3, "pass 2")):
        (run.parent / "acted").unlink(missing_ok=True)
        last = [
            start(rank, world, "pema", run, before=often + (rank == 1) * sabotage(run, moment, KILL))
            for rank in range(world)
        ]
        jobs += last
        assert [each.communicate(timeout=SECONDS) and each.returncode for each in last][1] == -9
        assert (run / "averaged" / f".{NAME}.ckavg-partial").is_dir()
    subprocess.run([sys.executable, "-m", "ckavg", "pema", str(run)], check=True, env=environment(), timeout=SECONDS)
    assert result_of(run) == expected


def test_no_process_id_of_another_job_is_believed(jobs: list[subprocess.Popen[str]], run: Path) -> None:
    """Status files of an earlier job, of a hostile one, and invalid ones."""
    partial = run / "averaged" / f".{NAME}.ckavg-partial"
    partial.mkdir(parents=True)
    for rank, text in enumerate((b"{}", b"\xff" * 100_000, b"[" * 100_000)):
        (partial / f".ckavg-rank-{rank}").write_bytes(text)
    jobs += [start(rank, 2, "pema", run) for rank in range(2)]
    assert [each.communicate(timeout=SECONDS) and each.returncode for each in jobs] == [0, 0]
    assert sorted(path.name for path in (run / "averaged").iterdir()) == ["path.json", NAME]
