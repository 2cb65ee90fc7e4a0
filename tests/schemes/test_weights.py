"""Explicit weights: the result has the stated weights, and invalid ones are refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import ckavg
from ckavg.errors import SettingError
from ckavg.schemes import Weights
from tests.cli.runner import run_cli
from tests.runs import write_run

STEPS = (100, 200, 300)
VALUES = np.array([[1.0, -2.0, 0.5], [1.5, 4.0, 0.5], [-3.0, 1.0, 0.5]])


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return write_run(tmp_path / "run", [{"w": torch.from_numpy(row.copy())} for row in VALUES], STEPS)


def record_of(*words: str | Path) -> dict[str, Any]:
    done = run_cli("weights", *words, "--json")
    assert done.exit_code == 0, done.stderr
    told: dict[str, Any] = json.loads(done.stdout)
    return told


@pytest.mark.parametrize(
    ("words", "want"),
    [
        (["--weights", "0.1,0.2,0.7"], [0.1, 0.2, 0.7]),
        (["--weights", "1,2,1", "--normalize"], [0.25, 0.5, 0.25]),
        (["--weights", "300:0.75,100:0.25"], [0.25, 0, 0.75]),
        (["--weights", "-0.5,0,1.5"], [-0.5, 0, 1.5]),
        (["--weights", "200:1", "--allow-anchor"], [0, 1, 0]),
        (["--weights", "1,-1,1"], [1, -1, 1]),
    ],
)
def test_the_result_is_the_sum(source: Path, words: list[str], want: list[float]) -> None:
    told = record_of(source, *words)
    assert told["weights"] == pytest.approx(want, rel=0, abs=1e-15)
    directory = Path(told["outputs"][0]["directory"])
    assert load_file(directory / "model.safetensors")["w"].numpy() == pytest.approx(np.array(want) @ VALUES, abs=1e-14)
    assert len(directory.name) == len("weights-01234567")
    assert run_cli("verify", directory, "--replay").exit_code == 0


@pytest.mark.parametrize(
    ("content", "want"),
    [([0.5, 0.25, 0.25], [0.5, 0.25, 0.25]), ({"300": 2, "200": -1}, [0, -1, 2])],
)
def test_weights_of_a_file(source: Path, content: Any, want: list[float]) -> None:
    (source.parent / "w.json").write_text(json.dumps(content))
    told = record_of(source, "--weights", source.parent / "w.json")
    assert told["weights"] == pytest.approx(want, rel=0, abs=1e-15)


def test_the_base_model_has_one_of_its_own(source: Path, tmp_path: Path) -> None:
    base = write_run(tmp_path / "base", [{"w": torch.ones(3, dtype=torch.float64)}], (0,)) / "checkpoint-0"
    assert record_of(source, "--init", base, "--weights", "0.5,0,0,0.5")["weights"] == [0.5, 0, 0, 0.5]
    assert "there are 3, but 4" in run_cli("weights", source, "--init", base, "--weights", "0.5,0,0.5").stderr


def test_the_card_makes_it_again(source: Path) -> None:
    directory = Path(record_of(source, "--weights", "1,2,2", "--normalize")["outputs"][0]["directory"])
    assert "ckavg weights --weights 0.2,0.4,0.4" in (directory / "README.md").read_text()


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ("", "is not a list of weights"),
        ("--weights a,b,c", "is not a list of weights"),
        ("--weights 0.1,300:0.9", "is not a list of weights"),
        ("--weights 0.5,0.25,0.2", "they sum to 0.95; they must sum to 1."),
        ("--weights 0.5,0.5", "there are 2, but 3 checkpoints are selected"),
        ("--weights 100:0.5,150:0.5", "no checkpoint of step 150 is selected"),
        ("--weights 100:0.5,100:0.5", "a step has two weights"),
        ("--weights 1,-2,1 --normalize", "they sum to 0"),
        ("--weights nan,1,1", "all must be finite numbers"),
        ("--weights nothing.json", "--weights nothing.json cannot be read"),
    ],
)
def test_refused(source: Path, words: str, told: str) -> None:
    done = run_cli("weights", source, *words.split())
    assert done.exit_code == 2
    assert told in done.stderr
    assert not (source / "averaged").exists()


def test_a_negative_weight_and_running_statistics(tmp_path: Path) -> None:
    weights = [{"bn.running_var": torch.full((2,), 1.0 / step), "w": torch.ones(2)} for step in STEPS]
    run = ckavg.open_run(write_run(tmp_path / "run", weights, STEPS))
    with pytest.raises(SettingError, match=r"running statistics \(bn\.running_var\)"):
        ckavg.average(run, Weights(weights=(-0.5, 0.5, 1.0)))
    result = ckavg.average(run, Weights(weights=(1e-9, 0.0, 1 - 1e-9)))
    assert (load_file(result.directory / "model.safetensors")["bn.running_var"] >= 1.0 / 300).all()


def test_a_sweep_does_not_take_it_for_a_word(source: Path) -> None:
    done = run_cli("sweep", source, "mean", "weights:weights=1")
    assert done.exit_code == 2
    assert "there is no scheme 'weights'" in done.stderr
