"""A process that is told to stop stops soon, says how to continue, and leaves nothing that looks like a result."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from tests.cli.runner import run_cli, visible

WARM = """
import json, os, sys, time
import ckavg.averaging.pipeline, ckavg.averaging.replay, ckavg.cli.average, ckavg.path.measure
from ckavg.cli import main
from ckavg.engine import reader, stream

read = reader.Files.read_into
def slowly(*arguments, **options):
    time.sleep(0.04)
    read(*arguments, **options)
reader.Files.read_into = slowly

for line in sys.stdin:
    job = json.loads(line)
    pid = os.fork()
    if not pid:
        os.dup2(os.open(os.devnull, os.O_RDWR), 1)
        os.dup2(os.open(job["stderr"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC), 2)
        stream.SECONDS_BETWEEN_NOTES = job["seconds"]
        sys.argv = ["ckavg", *job["words"]]
        main()
    print(pid, flush=True)
    print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)
"""
"""The program on storage on which half a megabyte takes 40 ms, started from a process that has torch already."""


@pytest.fixture(scope="module")
def warm() -> Iterator[subprocess.Popen[str]]:
    words = [sys.executable, "-c", WARM]
    with subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        yield process
        process.communicate()


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("signals") / "run"
    generator = torch.Generator().manual_seed(0)
    for step in range(10):
        (root / f"checkpoint-{step}").mkdir(parents=True)
        weights = {name: torch.randn(1 << 19, generator=generator).bfloat16() for name in "abcdefghijkl"}
        save_file(weights, root / f"checkpoint-{step}" / "model.safetensors")
    return root


@pytest.fixture
def run(source: Path) -> Iterator[Path]:
    yield source
    shutil.rmtree(source / "averaged", ignore_errors=True)


def journals(run: Path) -> list[Path]:
    """Notes of what is finished: their first line says of what."""
    return [path for path in run.glob("averaged/**/.*") if path.is_file() and re.search("journal|path-", path.name)]


def stopped(warm: subprocess.Popen[str], run: Path, verb: str, number: signal.Signals, seconds: float) -> str:
    """Start a verb on slow storage, send a signal once it reads and, where it takes notes every so many seconds, has
    taken some, and give what it said when it had ended, soon after."""
    assert warm.stdin is not None
    assert warm.stdout is not None
    stderr = run.parent / "stderr"
    stderr.unlink(missing_ok=True)
    warm.stdin.write(json.dumps({"words": [verb, str(run)], "seconds": seconds, "stderr": str(stderr)}) + "\n")
    warm.stdin.flush()
    pid = int(warm.stdout.readline())
    while not stderr.exists() or not re.search("(measuring the path|averaging): ", stderr.read_text()):
        time.sleep(0.01)
    sizes: set[int] = set()
    while seconds < 1 and len(sizes) < 3:  # until two notes: the first is on the disk
        sizes |= {path.stat().st_size for path in journals(run)} - {0}
        time.sleep(0.05)
    os.kill(pid, number)
    begun = time.monotonic()
    assert int(warm.stdout.readline()) == 130
    assert time.monotonic() - begun < 10  # well under a second where nothing else runs; see docs/reliability.md
    said = stderr.read_text()
    assert "interrupted: No result was left in part" in said
    assert "Traceback" not in said
    return said


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_stopped_before_anything_is_worth_keeping(
    warm: subprocess.Popen[str], run: Path, number: signal.Signals
) -> None:
    before = sorted(path.name for path in run.iterdir())
    said = stopped(warm, run, "ema", number, seconds=60)
    assert sorted(path.name for path in run.iterdir()) == before
    assert "kept" not in said
    assert said.endswith("\nhint: Nothing is finished yet: the same command begins anew.\n")


def result_of(run: Path, name: str) -> dict[str, bytes]:
    place = run / "averaged" / name
    return {name: (place / name).read_bytes() for name in visible(place) - {"ckavg.json"}}


def undisturbed(run: Path, verb: str) -> tuple[dict[str, bytes], int]:
    """Files of the result, and bytes read."""
    told = json.loads(run_cli(verb, run, "--json").stdout)
    result = result_of(run, told["outputs"][0]["name"])
    shutil.rmtree(run / "averaged")
    return result, int(told["bytes_read"])


def test_what_pass_2_has_finished_is_not_done_again(warm: subprocess.Popen[str], run: Path) -> None:
    expected, whole = undisturbed(run, "ema")
    said = stopped(warm, run, "ema", signal.SIGINT, seconds=0.5)
    left = run / "averaged" / ".ema-gamma0.15.ckavg-partial"
    assert f"\nhint: Finished work is kept in {left}: the same command continues from there." in said
    assert [path.name for path in (run / "averaged").iterdir()] == [left.name]

    again = run_cli("ema", run, "--json")
    assert re.search("averaging: .*; .* more were done before it was interrupted", again.stderr)
    told = json.loads(again.stdout)
    assert 0 < told["bytes_read"] < whole
    assert result_of(run, "ema-gamma0.15") == expected
    assert [path.name for path in (run / "averaged").iterdir()] == ["ema-gamma0.15"]
    assert all(each["checksum"] for each in told["inputs"])


def test_what_pass_1_has_finished_is_not_done_again(warm: subprocess.Popen[str], run: Path) -> None:
    expected, whole = undisturbed(run, "pema")
    said = stopped(warm, run, "pema", signal.SIGINT, seconds=0.5)
    assert "The measured part of the path is kept: the same command continues from there." in said
    (left,) = (run / "averaged").iterdir()
    assert re.fullmatch(r"\.path-[0-9a-f]{16}-[0-9a-f]{16}-0\.ckavg-partial", left.name)

    again = run_cli("pema", run, "--json")
    assert re.search("pass 1 of 2, measuring the path: .*; .* more were done before it was interrupted", again.stderr)
    assert json.loads(again.stdout)["bytes_read"] < whole
    assert result_of(run, "pema-gamma0.15") == expected
    assert sorted(path.name for path in (run / "averaged").iterdir()) == ["path.json", "pema-gamma0.15"]


@pytest.mark.parametrize("change", ["setting", "touch"])
def test_other_work_starts_afresh(warm: subprocess.Popen[str], run: Path, change: str) -> None:
    _, whole = undisturbed(run, "ema")
    assert "is kept in" in stopped(warm, run, "ema", signal.SIGINT, seconds=0.5)
    if change == "touch":
        (run / "checkpoint-3" / "model.safetensors").touch()
        time.sleep(0.05)
    again = run_cli("ema", run, "--json", *(["--dtype", "float32"] if change == "setting" else []))
    assert "continuing" not in again.stderr
    assert json.loads(again.stdout)["bytes_read"] == whole
    assert [path.name for path in (run / "averaged").iterdir()] == ["ema-gamma0.15"]
