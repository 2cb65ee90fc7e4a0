"""What `ckavg inspect` shows."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import torch

from tests.cli.runner import run_cli
from tests.runs import write_run

WEIGHTS = {"w": torch.zeros(100, 10, dtype=torch.bfloat16), "ids": torch.arange(3)}


def test_table(tmp_path: Path) -> None:
    run = write_run(tmp_path, [WEIGHTS] * 3, (0, 400, 1000), shards=(1, 2, 2))
    result = run_cli("inspect", run)
    assert result.exit_code == 0
    lines = [line.rstrip() for line in result.stdout.splitlines()]
    assert "3 checkpoints of 1.0k parameters" in " ".join(lines[:3])
    table = [line.split() for line in lines if "checkpoint-" in line and "bfloat16" in line]
    assert [row[0] for row in table] == ["0", "400", "1000"]
    assert table[1][1:3] == ["+400", "2"]
    assert table[2][1] == "+600"
    assert "(anchor)" in table[0]
    assert lines[-1].startswith("Nothing stands in the way. Next: ckavg pema")


def test_json(tmp_path: Path) -> None:
    run = write_run(tmp_path, [WEIGHTS] * 2, (0, 400), shards=(2,))
    record = json.loads(run_cli("inspect", run, "--json").stdout)
    assert record["problems"] == []
    first = record["checkpoints"][0]
    files = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    size = sum((run / "checkpoint-0" / file).stat().st_size for file in files)
    assert first == {
        "step": 0,
        "directory": str(run / "checkpoint-0"),
        "files": files,
        "bytes": size,
        "dtype": "bfloat16",
    }


def test_problems(tmp_path: Path) -> None:
    run = write_run(tmp_path, [WEIGHTS] * 3, (0, 400, 1000))
    path = run / "checkpoint-400" / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    result = run_cli("inspect", run)
    assert result.exit_code == 1
    assert "problem: " in result.stdout
    assert "checkpoint-400/model.safetensors is" in result.stdout.replace("\n", "")
    assert "1 problem to solve before averaging." in result.stdout
    record = json.loads(run_cli("inspect", run, "--json").stdout)
    assert [checkpoint["step"] for checkpoint in record["checkpoints"]] == [0, 1000]
    assert len(record["problems"]) == 1


def test_help_and_version() -> None:
    for arguments in (["--help"], ["pema", "--help"], ["--version"]):
        ran = subprocess.run([sys.executable, "-m", "ckavg", *arguments], capture_output=True, text=True, check=True)
        assert ran.stdout.strip()
        assert ran.stderr == ""
