"""NaN and infinity that the user has allowed: they reach what they belong to, and nothing else."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

import ckavg
from tests.cli.runner import run_cli
from tests.runs import random_run, write_run

STEPS = (0, 10, 20, 30)
ALLOW = "--allow-nonfinite"


def damaged() -> list[dict[str, Tensor]]:
    run = random_run(5, len(STEPS), torch.float32)
    run[0]["tiles"][1, 7] = torch.inf
    run[2]["odd"][0, 0, 0] = torch.nan
    run[2]["odd"][0, 0, 1] = -torch.inf
    return run


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return write_run(tmp_path / "run", damaged(), STEPS)


def told(*words: object) -> dict[str, Any]:
    done = run_cli(*map(str, words), "--json")
    assert done.exit_code == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    return found


@pytest.mark.parametrize("verb", ["pema", "bema", "ema", "ouema", "dema", "mean"])
def test_refused_unless_allowed(source: Path, verb: str) -> None:
    refused = run_cli(verb, source)
    assert refused.exit_code == 1
    assert "holds NaN or infinity" in refused.stderr
    record = told(verb, source, ALLOW)
    assert record["allow_nonfinite"] is True
    assert "3 numbers of the result are NaN or infinite, as some of the checkpoints are." in record["warnings"]
    result = load_file(Path(record["outputs"][0]["directory"]) / "model.safetensors")
    weights = torch.tensor(record["weights"], dtype=torch.float64)
    for name, tensor in result.items():
        if not tensor.is_floating_point():
            continue
        stacked = torch.stack([each[name].double() for each in damaged()])
        expected = torch.tensordot(weights, stacked, dims=1)
        finite = torch.isfinite(stacked).all(dim=0)
        assert torch.equal(torch.isfinite(tensor), finite)
        torch.testing.assert_close(tensor[finite].double(), expected[finite], rtol=1e-6, atol=1e-6)


def test_what_is_forgotten_is_not_in_the_result(source: Path) -> None:
    record = told("ema", source, "--gamma", 0, ALLOW)
    assert record["weights"] == [0, 0, 0, 1]
    assert not any("NaN" in each for each in record["warnings"])
    assert torch.isfinite(load_file(source / "averaged/ema-gamma0/model.safetensors")["odd"]).all()


@pytest.mark.parametrize("scope", ["global", "tensor"])
def test_such_tensors_do_not_count_in_the_path(source: Path, tmp_path: Path, scope: str) -> None:
    record = told("pema", source, "--scope", scope, ALLOW)
    assert record["excluded_from_path"] == ["norm", "odd", "scalar", "single", "tiles"]
    assert "NaN or infinity, so not counted in the path length: 2 tensors (odd, tiles)." in record["warnings"]
    sound = write_run(tmp_path / "sound", random_run(5, len(STEPS), torch.float32), STEPS)
    without = ckavg.measure_path(ckavg.open_run(sound), path_exclude=["odd", "tiles"])
    assert record["path_length"] == list(without.lengths)


def test_what_is_kept_of_the_path_does_not_let_them_through(source: Path) -> None:
    first = told("path", source, ALLOW)
    assert first["tensors"]["odd"]["sigma"] is None
    assert first["tensors"]["bias"]["sigma"] > 0
    assert run_cli("path", source).exit_code == 1
    again = told("path", source, ALLOW)
    assert again["path_length"] == first["path_length"]


def test_in_a_sample(source: Path) -> None:
    assert run_cli("path", source, "--sample", "0.9").exit_code == 1
    sampled = told("path", source, "--sample", 0.9, ALLOW)
    assert {"odd", "tiles"} <= set(sampled["excluded_from_path"])
    assert sampled["path_length"][-1] > 0


def test_what_does_not_fit_is_refused_all_the_same(tmp_path: Path) -> None:
    run = [{"w": torch.tensor([float(value), torch.nan])} for value in (0, 40_000, 80_000)]
    source = write_run(tmp_path / "run", run, STEPS[:3])
    refused = run_cli("ema", source, "--gamma", "0", "--dtype", "float16", ALLOW)
    assert refused.exit_code == 1
    assert "a value of the average does not fit F16" in refused.stderr
