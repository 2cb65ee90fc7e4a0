"""A process that is told to stop stops soon, says so, and leaves nothing behind."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file


@pytest.mark.parametrize("signal_sent", [signal.SIGINT, signal.SIGTERM])
def test_stopped_from_outside(tmp_path: Path, signal_sent: signal.Signals) -> None:
    run = tmp_path / "run"
    theta = torch.randn(1 << 24).bfloat16()
    for step in range(3):
        (run / f"checkpoint-{step}").mkdir(parents=True)
        save_file({"w": theta}, run / f"checkpoint-{step}" / "model.safetensors")
    for step in range(3, 400):
        (run / f"checkpoint-{step}").symlink_to("checkpoint-0")
    before = sorted(path.name for path in run.iterdir())

    process = subprocess.Popen([sys.executable, "-m", "ckavg", "ema", run], stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    assert "GB to read" in process.stderr.readline()
    process.send_signal(signal_sent)
    begun = time.monotonic()
    _, said = process.communicate(timeout=60)

    assert process.returncode == 130
    assert "interrupted: Nothing was left under the final name" in said
    assert "Traceback" not in said
    assert sorted(path.name for path in run.iterdir()) == before
    assert time.monotonic() - begun < 30
