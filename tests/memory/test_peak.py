"""Peak memory is bounded by the engine's buffers, not by the model or by the number of checkpoints."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from benchmarks.many import build_tiny
from tests.ranks.launch import environment, torchrun

MODEL_BYTES = 192 << 20
BUFFERS = (32 << 20) + (8 << 20) * min(os.cpu_count() or 1, 16)
"""Every thread's tiles, with room: far less than one model, and than six more of them."""

_PEAK = """
import json, resource, sys
import torch, ckavg, ckavg.averaging.replay, ckavg.path.measure

def peak():
    # Not ru_maxrss where it can be helped: on Linux it counts what the parent held before this program began.
    if sys.platform == "darwin":
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith("VmHWM"))
"""
_MEASURE = f"""{_PEAK}
from ckavg.averaging.kernels import Kind, load_kernel
load_kernel(Kind("BF16", (("ema", "BF16"),)))  # where there is a compiler, it takes as much for any model
imports = peak()
ckavg.average(ckavg.open_run(sys.argv[1], last=2), ckavg.PEMA(), out=sys.argv[2] + "/two")
two = peak()
ckavg.average(ckavg.open_run(sys.argv[1]), ckavg.PEMA(), out=sys.argv[2] + "/all")
print(json.dumps([imports, two, peak()]))
"""
_MEASURE_ONE = f"""{_PEAK}
imports = peak()
ckavg.average(ckavg.open_run(sys.argv[1]), ckavg.PEMA(), out=sys.argv[2])
print(json.dumps([imports, peak()]))
"""
_HOLD_A_MODEL = f"""{_PEAK}
imports = peak()
theta = torch.ones({MODEL_BYTES}, dtype=torch.uint8)
print(json.dumps([imports, peak()]))
"""


@pytest.fixture(scope="module", params=["model.safetensors", "pytorch_model.bin"])
def run(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("run")
    theta = torch.randn(MODEL_BYTES // 2).bfloat16()
    for step in range(8):
        (root / f"checkpoint-{step}").mkdir()
        path = root / f"checkpoint-{step}" / request.param
        tensors = {"w": theta + step * 0.01}
        if path.suffix == ".bin":
            torch.save({"model": tensors, "step": step}, path)
        else:
            save_file(tensors, path)
    return root


_SAVE_COLUMNS = """
import os, sys, torch
import torch.distributed as dist, torch.distributed.checkpoint as dcp
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard
dist.init_process_group("gloo")
mesh = init_device_mesh("cpu", (2,))
own = torch.randn(int(sys.argv[2]) // 32768, 8192).bfloat16()
for step in range(8):
    whole = DTensor.from_local(own + step * 0.01, mesh, [Shard(1)])
    dcp.save({"model": {"w": whole}}, checkpoint_id=f"{sys.argv[1]}/step-{step}")
dist.barrier()
os._exit(0)
"""
"""Two processes, each with half the columns of a matrix."""


@pytest.fixture(scope="module")
def columns(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("columns")
    (root / "job.py").write_text(_SAVE_COLUMNS)
    command = torchrun(2, root / "job.py", root / "run", MODEL_BYTES)
    subprocess.run(command, check=True, capture_output=True, env=environment())
    return root / "run"


def _run(code: str, *arguments: Path) -> list[int]:
    command = [sys.executable, "-c", code, *map(str, arguments)]
    peaks: list[int] = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    return peaks


def test_peak_is_that_of_the_buffers(run: Path, tmp_path: Path) -> None:
    imports, two, eight = _run(_MEASURE, run, tmp_path)
    assert two - imports < BUFFERS
    assert eight - imports < BUFFERS


def test_peak_of_a_tensor_in_columns_is_that_of_the_buffers(columns: Path, tmp_path: Path) -> None:
    imports, two, eight = _run(_MEASURE, columns, tmp_path)
    assert two - imports < BUFFERS
    assert eight - imports < BUFFERS


@pytest.mark.exhaustive
def test_a_tensor_takes_little_beside_its_numbers(tmp_path: Path) -> None:
    count = 100_000
    run = build_tiny(tmp_path / "run", tensors=count, checkpoints=5)
    imports, peak = _run(_MEASURE_ONE, run, tmp_path / "out")
    assert imports < peak < imports + 1_600 * count  # 1,300; with objects for what comes of each, 2,000


def test_holding_one_model_would_be_noticed() -> None:
    imports, peak = _run(_HOLD_A_MODEL)
    assert peak - imports > BUFFERS
