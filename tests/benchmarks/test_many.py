"""Runs of many: real layouts, and in place of nothing else."""

from __future__ import annotations

from pathlib import Path

import pytest

import ckavg
from benchmarks.many import build_adapters, build_tiny


def test_runs_of_many_can_be_averaged(tmp_path: Path) -> None:
    tiny = ckavg.open_run(build_tiny(tmp_path / "tiny", tensors=1001, checkpoints=3))
    assert (len(tiny.tensors), tiny.steps) == (1001, (0, 100, 200))
    adapters = ckavg.open_run(build_adapters(tmp_path / "adapters", checkpoints=4, tensors=8))
    assert (len(adapters.tensors), adapters.last.kind) == (8, "adapter")
    lengths = ckavg.path_length(adapters).lengths
    assert lengths == pytest.approx([0, 0.04, 0.08, 0.12], rel=0.02)  # E|N(0, 0.001²)| = 0.0008, and σ is 0.02


def test_a_run_of_many_is_built_once_and_replaces_nothing_else(tmp_path: Path) -> None:
    file = build_tiny(tmp_path / "run", tensors=3, checkpoints=2) / "checkpoint-0" / "model.safetensors"
    before = file.stat().st_mtime_ns
    build_tiny(tmp_path / "run", tensors=3, checkpoints=2)
    assert file.stat().st_mtime_ns == before
    build_tiny(tmp_path / "run", tensors=4, checkpoints=2)
    assert len(ckavg.open_run(tmp_path / "run").tensors) == 4
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "file").touch()
    with pytest.raises(FileExistsError, match="not a run of many"):
        build_adapters(tmp_path / "other", checkpoints=2, tensors=2)
