"""What stands in the README runs as it stands, in an empty directory with a run in it."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import ckavg
from ckavg.demo import train
from tests.averaging.tiny import save_tiny_model
from tests.runs import random_run, write_run

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
START = (ROOT / "docs" / "start.md").read_text(encoding="utf-8")
ELSEWHERE = (
    *("uv ", "pipx ", "pip ", "ckavg demo", "torchrun ", "ckavg push", "ckavg pema hf://"),
    "ckavg ema ./checkpoints --out s3://",
)
"""What installs, trains, or needs a network or several processes; other tests run these."""


def _blocks(language: str, text: str = README) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", text, flags=re.MULTILINE | re.DOTALL)


LINES = [line for block in _blocks("sh") for line in block.splitlines()]
COMMANDS = [line for line in LINES if not line.startswith(ELSEWHERE)]


def test_python_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = write_run(tmp_path / "checkpoints", random_run(0, 4, torch.float32), (0, 50, 100, 150))
    monkeypatch.chdir(tmp_path)
    (block,) = (block for block in _blocks("python") if "import ckavg" in block)
    values: dict[str, Any] = {}
    exec(compile(block, "README.md", "exec"), values)
    run = ckavg.open_run(source)
    assert values["path"].lengths == ckavg.path_length(run).lengths
    averaged = load_file(values["result"].directory / "model.safetensors")
    assert averaged.keys() == run.tensors.keys()
    assert {each.name for each in (source / "averaged").iterdir() if each.is_dir()} == {
        scheme.label for scheme in (ckavg.PEMA(), ckavg.EMA(), ckavg.BEMA())
    }


@pytest.fixture
def _program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`ckavg` on the path, in an empty directory."""
    program = tmp_path / "bin" / "ckavg"
    program.parent.mkdir()
    program.write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)} -m ckavg "$@"\n', encoding="utf-8")
    program.chmod(0o755)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("PATH", str(program.parent), prepend=":")


def _run(command: str, directory: Path) -> None:
    done = subprocess.run(command, shell=True, cwd=directory, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{command}\n{done.stderr}"


@pytest.mark.exhaustive
@pytest.mark.usefixtures("_program")
def test_commands_run_as_they_stand(tmp_path: Path) -> None:
    """In their order, on a tiny run of the Trainer's layout beside its base model, a text and a script that judges."""
    pytest.importorskip("transformers")
    save_tiny_model(tmp_path / "base")
    for number in range(1, 12):
        save_tiny_model(tmp_path / "checkpoints" / f"checkpoint-{number * 100}", seed=number)
    (tmp_path / "held_out.txt").write_text("What stands in the README runs as it stands.\n" * 40, encoding="utf-8")
    script = tmp_path / "loss.sh"
    script.write_text('test -f "$1/model.safetensors" && wc -c < "$1/ckavg.json"\n', encoding="utf-8")
    script.chmod(0o755)
    assert len(COMMANDS) >= 8
    for command in COMMANDS:
        _run(command, tmp_path)
    assert (tmp_path / "report.html").exists()
    (block,) = (block for block in _blocks("python") if "transformers" in block)
    done = subprocess.run([sys.executable, "-c", block], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.exhaustive
@pytest.mark.usefixtures("_program")
def test_five_minutes(tmp_path: Path) -> None:
    """After a short demo in the place of `ckavg demo`, which its own tests run."""
    train(tmp_path / "ckavg-demo", steps=40, save_every=5, pretraining_steps=10)
    lines = [line for block in _blocks("sh", START) for line in block.splitlines()]
    assert lines[0] == "ckavg demo"
    for command in ("ckavg pema ckavg-demo", "ckavg ema ckavg-demo", *lines[1:]):
        _run(command, tmp_path)
    assert (tmp_path / "report.html").exists()
