"""Peak memory is bounded by the engine's buffers, not by the model or by the number of checkpoints."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

MODEL_BYTES = 96 << 20
BUFFERS = 48 << 20
"""Two threads' tiles, with room: far less than one model, and than a step of eight models."""

_MEASURE = """
import json, resource, sys
import torch, ckavg
unit = 1 if sys.platform == "darwin" else 1024
def peak(): return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
run = ckavg.open_run(sys.argv[1], last=2)
ckavg.average(run, ckavg.PEMA(), out=sys.argv[2] + "/first")
before = peak()
ckavg.average(ckavg.open_run(sys.argv[1]), ckavg.PEMA(), out=sys.argv[2] + "/all")
print(json.dumps([before, peak()]))
"""


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("run")
    theta = torch.randn(MODEL_BYTES // 2).bfloat16()
    for step in range(8):
        (root / f"checkpoint-{step}").mkdir()
        save_file({"w": theta + step * 0.01}, root / f"checkpoint-{step}" / "model.safetensors")
    return root


def test_peak_does_not_grow_with_checkpoints(run: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-c", _MEASURE, str(run), str(tmp_path)]
    two, eight = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    assert eight - two < BUFFERS


def test_peak_is_far_from_the_size_of_a_model(run: Path, tmp_path: Path) -> None:
    code = f"import sys; sys.argv[1:] = [{str(run)!r}, {str(tmp_path)!r}]\n{_MEASURE}"
    imports = (
        "import resource, sys, torch, ckavg.replay.replay, ckavg.path.measure\n"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == 'darwin' else 1024))"
    )
    baseline = int(subprocess.run([sys.executable, "-c", imports], capture_output=True, text=True, check=True).stdout)
    _, peak = json.loads(
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    )
    assert peak - baseline < BUFFERS
