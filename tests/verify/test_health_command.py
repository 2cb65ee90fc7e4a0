"""`ckavg inspect --deep` as a user types it."""

from __future__ import annotations

import hashlib
import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.cli.runner import run_cli, snapshot
from tests.runs import random_run, write_run

STEPS = (0, 10, 20, 30)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return write_run(tmp_path / "run", random_run(0, 4, torch.bfloat16), STEPS, shards=(2,))


def test_a_sound_run(source: Path) -> None:
    before = snapshot(source)
    result = run_cli("inspect", source, "--deep")
    assert result.exit_code == 0
    assert snapshot(source) == before
    assert result.stdout.splitlines()[-2:] == ["Nothing stands in the way.", f"next     ckavg pema {source}"]
    assert "SHA-256" not in result.stdout
    assert "examining: " in result.stderr
    assert "done" in result.stderr


def test_hashes_are_what_sha256sum_checks(source: Path) -> None:
    result = run_cli("inspect", source, "--sha256")
    lines = [line for line in result.stdout.splitlines() if ".safetensors" in line]
    files = sorted(source.rglob("*.safetensors"))
    hashes = [f"{hashlib.sha256(file.read_bytes()).hexdigest()}  {file.relative_to(source)}" for file in files]
    assert sorted(lines, key=lambda line: line.split()[1]) == hashes
    subprocess.run(["sha256sum", "--check", "--strict"], input="\n".join(lines), text=True, cwd=source, check=True)


def test_json(source: Path) -> None:
    said = json.loads(run_cli("inspect", source, "--deep", "--json").stdout)
    health = said.pop("health")
    assert said == json.loads(run_cli("inspect", source, "--json").stdout)
    assert (health["findings"], health["sha256"], len(health["path"])) == ([], {}, 3)
    floating = sum(each.nbytes for each in random_run(0, 1, torch.bfloat16)[0].values() if each.is_floating_point())
    assert health["bytes_read"] == 4 * floating
    hashed = json.loads(run_cli("inspect", source, "--deep", "--sha256", "--json").stdout)["health"]
    assert hashed["bytes_read"] == 4 * floating + sum(each["bytes"] for each in said["checkpoints"])
    assert len(hashed["sha256"]) == 8


def test_nan_is_a_problem_and_a_stale_save_is_not(tmp_path: Path) -> None:
    weights = random_run(0, 4, torch.float32)
    weights[3] = weights[2]
    result = run_cli("inspect", write_run(tmp_path / "stale", weights, STEPS), "--deep")
    assert result.exit_code == 0
    assert "warning: step 30: all weights equal those of step 20: a stale save?" in result.stdout
    weights[1]["bias"][4] = math.nan
    result = run_cli("inspect", write_run(tmp_path / "nan", weights, STEPS), "--deep")
    assert result.exit_code == 1
    assert "problem: step 10: tensor 'bias' holds 1 NaN of 130." in result.stdout
    assert "NaN or infinity in 1 checkpoint: leave them out" in result.stdout
    assert "Nothing stands in the way" not in result.stdout


def test_quiet(source: Path) -> None:
    for options in (["--deep"], []):
        result = run_cli("inspect", source, "-q", *options)
        assert (result.exit_code, result.stdout, result.stderr) == (0, "", "")


def test_problems_beside_sound_checkpoints(source: Path) -> None:
    (source / "checkpoint-10" / "model-00001-of-00002.safetensors").unlink()
    result = run_cli("inspect", source, "--sha256", "--json")
    said = json.loads(result.stdout)
    assert result.exit_code == 1
    assert len(said["problems"]) == 1
    assert {Path(file).parts[0] for file in said["health"]["sha256"]} == {f"checkpoint-{step}" for step in (0, 20, 30)}


def test_nothing_sound(tmp_path: Path) -> None:
    (tmp_path / "checkpoint-1").mkdir()
    result = run_cli("inspect", tmp_path, "--deep")
    assert result.exit_code == 1
    assert "2 problems to solve" in result.stdout


def test_without_deep_no_torch(source: Path) -> None:
    code = (
        "import sys, ckavg.cli.app as a\n"
        f"try: a.app(['inspect', {str(source)!r}])\n"
        "except SystemExit as e: print(e.code, 'torch' in sys.modules)"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ran.stdout.splitlines()[-1] == "0 False"
