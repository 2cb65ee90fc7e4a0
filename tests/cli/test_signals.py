"""A process that is told to stop stops soon, says how to continue, and leaves nothing that looks like a result."""

from __future__ import annotations

import json
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from tests.cli.runner import run_cli, visible

SLOW = """
import sys
from ckavg.engine import reader as files
from ckavg.engine import stream

read = files.Files.read_into
def slowly(self, path, offset, buffer, *, on_miss):
    import time
    time.sleep(0.02)
    read(self, path, offset, buffer, on_miss=on_miss)
files.Files.read_into = slowly
stream.SECONDS_BETWEEN_NOTES = {seconds}
sys.argv[0] = "ckavg"
from ckavg.cli import main
main()
"""
"""The program on storage on which half a megabyte takes 20 ms."""


@pytest.fixture
def run(tmp_path: Path) -> Path:
    generator = torch.Generator().manual_seed(0)
    for step in range(20):
        (tmp_path / "run" / f"checkpoint-{step}").mkdir(parents=True)
        weights = {name: torch.randn(1 << 19, generator=generator).bfloat16() for name in "abcdefghijkl"}
        save_file(weights, tmp_path / "run" / f"checkpoint-{step}" / "model.safetensors")
    return tmp_path / "run"


def journals(run: Path) -> list[Path]:
    """Notes of what is finished: their first line says of what."""
    return [path for path in run.glob("averaged/**/.*") if path.is_file() and re.search("journal|path-", path.name)]


def stopped(run: Path, verb: str, signal_sent: signal.Signals, *, after: str, seconds: float) -> tuple[str, float]:
    """Start a verb on slow storage, send a signal once it has said something and, where it takes notes every so many
    seconds, has taken some, and give what it said and how long it took to end."""
    words = [sys.executable, "-c", SLOW.format(seconds=seconds), verb, str(run)]
    process = subprocess.Popen(words, stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    said = ""
    while after not in said:
        said += process.stderr.readline()
    sizes: set[int] = set()
    while seconds < 1 and len(sizes) < 3 and process.poll() is None:  # until two notes: the first is on the disk
        sizes |= {path.stat().st_size for path in journals(run)} - {0}
        time.sleep(0.05)
    process.send_signal(signal_sent)
    begun = time.monotonic()
    said += process.communicate(timeout=60)[1]
    assert process.returncode == 130
    assert "interrupted: No result was left in part" in said
    assert "Traceback" not in said
    return said, time.monotonic() - begun


@pytest.mark.parametrize("signal_sent", [signal.SIGINT, signal.SIGTERM])
def test_stopped_before_anything_is_worth_keeping(run: Path, signal_sent: signal.Signals) -> None:
    before = sorted(path.name for path in run.iterdir())
    said, seconds = stopped(run, "ema", signal_sent, after="GB to read", seconds=60)
    assert sorted(path.name for path in run.iterdir()) == before
    assert "kept" not in said
    assert seconds < 10  # well under a second where nothing else runs; see docs/reliability.md


def result_of(run: Path, name: str) -> dict[str, bytes]:
    place = run / "averaged" / name
    return {name: (place / name).read_bytes() for name in visible(place) - {"ckavg.json"}}


def undisturbed(run: Path, tmp_path: Path, verb: str) -> tuple[dict[str, bytes], int]:
    """Files of the result, and bytes read."""
    copy = tmp_path / "copy"
    shutil.copytree(run, copy)
    told = json.loads(run_cli(verb, copy, "--json").stdout)
    return result_of(copy, told["outputs"][0]["name"]), told["bytes_read"]


def test_what_pass_2_has_finished_is_not_done_again(run: Path, tmp_path: Path) -> None:
    expected, whole = undisturbed(run, tmp_path, "ema")
    said, seconds = stopped(run, "ema", signal.SIGINT, after="GB to read", seconds=0.5)
    left = run / "averaged" / ".ema-gamma0.15.ckavg-partial"
    assert f"What was finished is kept in {left}: the same command continues from there." in said
    assert [path.name for path in (run / "averaged").iterdir()] == [left.name]
    assert seconds < 10

    again = run_cli("ema", run, "--json")
    assert "continuing averaging: " in again.stderr
    assert "GB more were done before it was interrupted" in again.stderr
    told = json.loads(again.stdout)
    assert 0 < told["bytes_read"] < whole
    assert result_of(run, "ema-gamma0.15") == expected
    assert [path.name for path in (run / "averaged").iterdir()] == ["ema-gamma0.15"]
    assert all(each["checksum"] for each in told["inputs"])


def test_what_pass_1_has_finished_is_not_done_again(run: Path, tmp_path: Path) -> None:
    expected, whole = undisturbed(run, tmp_path, "pema")
    said, seconds = stopped(run, "pema", signal.SIGINT, after="GB to read", seconds=0.5)
    assert "What was measured of the path so far is kept: the same command continues from there." in said
    (left,) = (run / "averaged").iterdir()
    assert re.fullmatch(r"\.path-[0-9a-f]{16}-[0-9a-f]{16}-0\.ckavg-partial", left.name)
    assert seconds < 10

    again = run_cli("pema", run, "--json")
    assert "pass 1 of 2, continuing measuring the path: " in again.stderr
    assert json.loads(again.stdout)["bytes_read"] < whole
    assert result_of(run, "pema-gamma0.15") == expected
    assert sorted(path.name for path in (run / "averaged").iterdir()) == ["path.json", "pema-gamma0.15"]


@pytest.mark.parametrize("change", ["setting", "touch"])
def test_other_work_starts_afresh(run: Path, tmp_path: Path, change: str) -> None:
    _, whole = undisturbed(run, tmp_path, "ema")
    said, _ = stopped(run, "ema", signal.SIGINT, after="GB to read", seconds=0.5)
    assert "is kept in" in said
    if change == "touch":
        (run / "checkpoint-3" / "model.safetensors").touch()
        time.sleep(0.05)
    again = run_cli("ema", run, "--json", *(["--dtype", "float32"] if change == "setting" else []))
    assert "continuing" not in again.stderr
    assert json.loads(again.stdout)["bytes_read"] == whole
    assert [path.name for path in (run / "averaged").iterdir()] == ["ema-gamma0.15"]
