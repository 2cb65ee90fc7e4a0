"""Everything known before a weight is read is reported together: problems, warnings, sizes, memory."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

import ckavg
from ckavg.averaging.plan import checked
from ckavg.averaging.reading import memory_bytes
from ckavg.checkpoints.inspect import inspect_run
from ckavg.checkpoints.run import Selection
from ckavg.engine.distributed import MOST_THREADS, worker_threads
from ckavg.errors import CombinedError, WriteError
from ckavg.output import output_path
from tests.cli.runner import run_cli, snapshot
from tests.runs import OLD_PICKLE, write_checkpoint, write_run

STEPS = (10, 20, 30)
MODEL = "model.safetensors"


def weights(step: int) -> dict[str, Tensor]:
    return {"w": torch.arange(6.0) + step}


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return write_run(tmp_path / "run", [weights(step) for step in STEPS], STEPS)


def kinds(error: CombinedError) -> list[str]:
    return [type(each).__name__ for each in error.errors]


@pytest.mark.parametrize("verb", ["ema", "sweep"])
def test_all_problems_at_once_worst_first(source: Path, tmp_path: Path, verb: str) -> None:
    save_file({"w": torch.ones(7)}, source / "checkpoint-30" / MODEL)
    write_checkpoint(source / "checkpoint-40", weights(40))
    os.truncate(source / "checkpoint-40" / MODEL, 40)
    write_checkpoint(source / "step_20", weights(20))
    write_checkpoint(source / "checkpoint-50", weights(50))
    (source / "checkpoint-50" / MODEL).unlink()
    (source / "checkpoint-50" / "pytorch_model.bin").write_bytes(OLD_PICKLE)
    write_checkpoint(source / "checkpoint-60", weights(60))
    (source / "checkpoint-60" / MODEL).unlink()
    (tmp_path / "out" / "ema-gamma0.15").mkdir(parents=True)
    (tmp_path / "out" / "ema-gamma0.15" / "thesis.tex").write_text("three years")
    before = snapshot(tmp_path)
    out = tmp_path / "out"
    words = ("ema", "--out", out) if verb == "sweep" else ("--out", out / "ema-gamma0.15")
    done = run_cli(verb, source, *words)
    assert done.exit_code == 1
    assert "error: 6 problems:" in done.stderr
    told = [
        "pytorch_model.bin has the layout that torch wrote before 1.6",
        "step 20 appears 2 times",
        "checkpoint-40/model.safetensors is 40 bytes long",
        "checkpoint-60 holds no weights",
        "step 30: tensor 'w' is (7,)",
        "exists and is not a result of ckavg",
    ]
    assert [done.stderr.index(each) for each in told] == sorted(done.stderr.index(each) for each in told)
    for problem in re.split(r"^- ", done.stderr, flags=re.MULTILINE)[1:]:
        assert len(problem.splitlines()) >= 2, "each has what to do next"
    assert snapshot(tmp_path) == before


def test_a_full_disk_is_told_with_the_rest(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(output_path, "_MARGIN_BYTES", 1 << 60)
    out = source / "averaged" / "ema-gamma0.15"
    with pytest.raises(WriteError, match="GB free"):
        ckavg.plan_average(ckavg.open_run(source), ckavg.EMA())
    out.mkdir(parents=True)
    (out / "notes").write_text("mine")
    with pytest.raises(CombinedError) as caught:
        ckavg.plan_average(ckavg.open_run(source), ckavg.EMA())
    assert kinds(caught.value) == ["OutputExistsError", "WriteError"]
    (source / "checkpoint-20" / MODEL).write_bytes(b"")
    with pytest.raises(CombinedError) as caught:
        checked([inspect_run(source, Selection())], [out])
    assert kinds(caught.value) == ["TruncatedShardError", "OutputExistsError", "WriteError"]


# --- places ---


def test_a_place_where_nothing_can_be_made_is_refused(source: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("something of the user's")
    with pytest.raises(WriteError, match="file is not a directory"):
        ckavg.plan_average(ckavg.open_run(source), ckavg.EMA(), out=tmp_path / "file" / "below")
    if Path("/sys/kernel").is_dir() and os.statvfs("/sys/kernel").f_flag & os.ST_RDONLY:
        done = run_cli("ema", source, "--out", "/sys/kernel/average", "--dry-run")
        assert "you may not write to /sys/kernel" in done.stderr


# --- the dry run ---


def test_a_dry_run_tells_bytes_memory_and_all_warnings(source: Path) -> None:
    write_checkpoint(source / "checkpoint-best", weights(0))
    (source / "checkpoint-30" / "modeling.py").write_text("")
    before = snapshot(source)
    done = run_cli("bema", source, "--burn-in", "30", "--dry-run", "--json")
    assert done.exit_code == 0, done.stderr
    told = json.loads(done.stdout)
    for expected in ("checkpoint-best", "Custom code", "No update falls after step 30"):
        assert any(expected in warning for warning in told["warnings"])
        assert expected in done.stderr
    assert told["bytes_to_read"] == 24
    assert told["memory_bytes"] > 200_000_000
    assert "of memory" in run_cli("bema", source, "--dry-run").stdout
    assert snapshot(source) == before


@pytest.mark.parametrize(("cores", "processes", "threads"), [(1, 1, 1), (8, 1, 8), (8, 3, 2), (2, 4, 1), (64, 1, 16)])
def test_threads_are_as_many_as_cores_within_a_bound(
    monkeypatch: pytest.MonkeyPatch, cores: int, processes: int, threads: int
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(cores)), raising=False)
    assert worker_threads(processes) == threads <= MOST_THREADS


_PEAK = """
import resource, sys
import ckavg
run = ckavg.open_run(sys.argv[1])
ckavg.average(run, getattr(ckavg, sys.argv[2])(), out=sys.argv[3])
if sys.platform == "darwin":
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
else:
    print(next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith("VmHWM")))
"""


@pytest.mark.parametrize(
    ("scheme", "count", "tensors", "dtype"),
    [
        ("PEMA", 4, 2, torch.bfloat16),
        pytest.param("BEMA", 4, 2, torch.float64, marks=pytest.mark.exhaustive),
        pytest.param("PEMA", 12, 3000, torch.float32, marks=pytest.mark.exhaustive),
    ],
    ids=("path", "wide", "many tensors"),
)
def test_memory_is_told_within_a_factor_of_two(
    tmp_path: Path, scheme: str, count: int, tensors: int, dtype: torch.dtype
) -> None:
    size = 8_000_000 // tensors
    for step in range(count):
        values = {f"model.layers.{place}.mlp.weight": torch.randn(size, dtype=dtype) for place in range(tensors)}
        (tmp_path / "run" / f"checkpoint-{step}").mkdir(parents=True)
        save_file(values, tmp_path / "run" / f"checkpoint-{step}" / MODEL)
    plan = ckavg.plan_average(ckavg.open_run(tmp_path / "run"), getattr(ckavg, scheme)())
    told = memory_bytes([plan])
    command = [sys.executable, "-c", _PEAK, str(tmp_path / "run"), scheme, str(tmp_path / "out")]
    peak = int(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    assert peak / 2 < told < peak * 2
