"""`ckavg watch`, beside a run that grows."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from tests.cli.runner import run_cli
from tests.runs import random_run, write_run

STEPS = (0, 10, 20, 30)
WORDS = ("mean", "ema:gamma=0.2", "mean:last=2")
SECONDS = 120


@pytest.fixture
def whole(tmp_path: Path) -> Path:
    return write_run(tmp_path / "whole", random_run(seed=3, count=4, dtype=torch.float32), STEPS)


class Watch:
    """The program, watching an empty directory."""

    def __init__(self, run: Path, *words: str) -> None:
        run.mkdir()
        self.log = run.with_suffix(".log")
        command = [sys.executable, "-m", "ckavg", "watch", str(run), *WORDS, "--poll", "0.05", *words]
        # a job in the background ignores SIGINT, and so do its children
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                command,
                stdout=log,
                stderr=log,
                env=os.environ | {"NO_COLOR": "1"},
                preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
            )

    def wait_for(self, text: str) -> None:
        for _ in range(SECONDS * 20):
            if text in self.log.read_text():
                return
            assert self.process.poll() is None, self.log.read_text()
            time.sleep(0.05)
        raise AssertionError(self.log.read_text())


@pytest.fixture
def watches() -> Iterator[list[Watch]]:
    started: list[Watch] = []
    yield started
    for each in started:
        each.process.kill()
        each.process.wait()


def weights(directory: Path) -> dict[str, bytes]:
    return {path.parent.name: path.read_bytes() for path in directory.glob("*/model.safetensors")}


def test_it_ends_with_the_averages_of_a_sweep(whole: Path, tmp_path: Path, watches: list[Watch]) -> None:
    run = tmp_path / "run"
    watch = Watch(run, "--until", "30")
    watches.append(watch)
    watch.wait_for("waiting for two complete checkpoints")
    for step in STEPS[:3]:
        shutil.copytree(whole / f"checkpoint-{step}", run / f"checkpoint-{step}")
    watch.wait_for("waiting for a checkpoint after step 20")
    assert run_cli("sweep", run, *WORDS, "--out", tmp_path / "until20").exit_code == 0
    assert weights(run / "averaged") == weights(tmp_path / "until20")

    # half a file of the next one, and then all of it
    data = (whole / "checkpoint-30/model.safetensors").read_bytes()
    (run / "checkpoint-30").mkdir()
    (run / "checkpoint-30/model.safetensors").write_bytes(data[: len(data) // 2])
    time.sleep(1)
    assert watch.process.poll() is None
    assert weights(run / "averaged") == weights(tmp_path / "until20")
    shutil.copytree(whole / "checkpoint-30", run / "checkpoint-30", dirs_exist_ok=True)
    assert watch.process.wait(SECONDS) == 0, watch.log.read_text()
    assert run_cli("sweep", whole, *WORDS).exit_code == 0
    assert weights(run / "averaged") == weights(whole / "averaged") != weights(tmp_path / "until20")
    assert len(weights(run / "averaged")) == len(WORDS)


def test_what_still_grows_is_waited_for(whole: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Files beside the weights, too: a result has a copy of them."""
    beside, texts = whole / "checkpoint-30/merges.txt", ["a b", "a b\nc d", "a b\nc d\ne f"]
    left = list(texts)

    def wait(_seconds: float) -> None:
        if left:
            beside.write_text(left.pop(0))

    monkeypatch.setattr("ckavg.cli.watch.time", SimpleNamespace(sleep=wait))
    assert run_cli("watch", whole, "mean", "--until", "30").exit_code == 0
    assert left == []
    assert (whole / "averaged/mean/merges.txt").read_text() == texts[-1]


def test_an_interrupt_ends_it(whole: Path, tmp_path: Path, watches: list[Watch]) -> None:
    run = tmp_path / "run"
    watch = Watch(run)
    watches.append(watch)
    watch.wait_for("waiting for two")
    for step in STEPS:
        shutil.copytree(whole / f"checkpoint-{step}", run / f"checkpoint-{step}")
    watch.wait_for("waiting for a checkpoint after step 30")
    watch.process.send_signal(signal.SIGINT)
    assert watch.process.wait(SECONDS) == 130
    assert watch.log.read_text().endswith("interrupted: The results are those of step 30.\n")


def test_a_failed_evaluation_does_not_end_it(whole: Path, tmp_path: Path, watches: list[Watch]) -> None:
    run = tmp_path / "run"
    watch = Watch(run, "--eval", "false {dir}", "--eval-goal", "min")
    watches.append(watch)
    for step in STEPS[:2]:
        shutil.copytree(whole / f"checkpoint-{step}", run / f"checkpoint-{step}")
    watch.wait_for("warning: step 10: No evaluation succeeded")
    shutil.copytree(whole / "checkpoint-20", run / "checkpoint-20")
    watch.wait_for("warning: step 20: No evaluation succeeded")
    assert watch.process.poll() is None


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["mean"], "expected a directory and a scheme"),
        (["hf://owner/name", "mean"], "on a directory"),
        ([".", "peema"], "no scheme 'peema'"),
    ],
)
def test_what_is_refused_at_once(words: list[str], says: str) -> None:
    done = run_cli("watch", *words)
    assert done.exit_code == 2
    assert says in done.output
