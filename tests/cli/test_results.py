"""`ckavg ls` and `ckavg diff`: what results a run has, and how far they are from each other."""

from __future__ import annotations

import json
import shutil
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file

from tests.cli.runner import run_cli, snapshot
from tests.cli.test_up_to_date import MODEL, STEPS, bytes_read, rewrite
from tests.runs import random_run, write_run


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return write_run(tmp_path / "run", random_run(5, len(STEPS), torch.float32), STEPS)


def listed(source: Path) -> dict[str, dict[str, Any]]:
    done = run_cli("ls", source, "--json")
    assert done.exit_code == 0, done.stderr
    results = json.loads(done.stdout)["results"]
    assert [each["name"] for each in results] == sorted(each["name"] for each in results)
    return {each["name"]: each for each in results}


# --- ls ---


def test_results_with_what_their_records_say(run: Path) -> None:
    losses = "case {dir} in *mean*) echo loss 1.5;; *) echo loss 2.5;; esac"
    words = ("--eval", losses, "--eval-metric", "loss", "-q")
    assert run_cli("sweep", run, "pema:gamma=0.3,every=20", "mean:last=2", *words).exit_code == 0
    assert run_cli("ema", run, "--dtype", "bfloat16", "-q").exit_code == 0
    before = snapshot(run)
    results = listed(run)
    assert list(results) == ["ema-gamma0.15", "mean-last2", "pema-gamma0.3-every20"]
    for name, each in results.items():
        record = json.loads((run / "averaged" / name / "ckavg.json").read_text())
        weights, steps = np.array(record["weights"]), np.array(record["steps"])
        assert each["effective_count"] == pytest.approx(1 / np.sum(weights**2), rel=1e-12)
        assert each["mean_age"] == pytest.approx(np.sum(weights * (steps[-1] - steps)), rel=1e-12)
        assert each["anchor_weight"] == weights[list(steps).index(record["anchor_step"])]
        assert (each["state"], each["problem"], each["evaluation"]) == ("up to date", "", record["evaluation"])
    assert [each["mark"] for each in results.values()] == ["", "best", ""]
    rows = {row.split()[0]: row for row in run_cli("ls", run).stdout.splitlines()[1:]}
    assert "pema-gamma0.3, every 20 " in rows["pema-gamma0.3-every20"]
    assert "ema-gamma0.15, bfloat16 " in rows["ema-gamma0.15"]
    assert "loss 1.5  best " in rows["mean-last2"]
    assert rows["mean-last2"].rstrip().endswith("up to date")
    assert snapshot(run) == before


def test_only_what_one_command_and_metric_have_judged_is_compared(run: Path) -> None:
    for scheme, metric in (("mean", "loss"), ("dema", "loss"), ("ema", "acc"), ("ouema", "acc")):
        command = f"case {{dir}} in *mean*|*ouema*) echo {metric} 1;; *) echo {metric} 2;; esac"
        done = run_cli(scheme, run, "--eval", command, "--eval-metric", metric, "-q")
        assert done.exit_code == 0, done.stderr
    marks = {name.split("-")[0]: each["mark"] for name, each in listed(run).items()}
    assert marks == {"mean": "best", "dema": "", "ema": "best", "ouema": ""}


def test_what_has_changed_and_what_is_damaged(run: Path) -> None:
    names = ("copied", "edited", "missing", "damaged", "version", "good")
    for name in names:
        assert run_cli("mean", run, "--last", "2", "--out", run / "out" / name, "-q").exit_code == 0
    shutil.move(run / "out/copied", run / "out/x")
    shutil.copytree(run / "out/x", run / "out/copied")
    shutil.rmtree(run / "out/x")
    rewrite(run / "out/edited" / MODEL)
    (run / "out/missing/config.json").unlink()
    (run / "out/damaged/ckavg.json").write_text("{")
    record = json.loads((run / "out/version/ckavg.json").read_text())
    record = {name: value for name, value in record.items() if name != "weights"} | {"ckavg_version": "9.0"}
    (run / "out/version/ckavg.json").write_text(json.dumps(record))
    (run / "out/.hidden").mkdir()
    (run / "out/none").mkdir()
    (run / "out/link").symlink_to(run / "out/good")
    results = listed(run / "out")
    assert {name: each["state"] for name, each in results.items()} == {
        "copied": "copied or edited",
        "edited": "copied or edited",
        "damaged": "unknown",
        "missing": "unknown",
        "version": "unknown",
        "good": "up to date",
    }
    assert results["missing"]["problem"] == "config.json is missing."
    assert "is not JSON" in results["damaged"]["problem"]
    assert "weights is missing" in results["version"]["problem"]
    assert results["version"]["ckavg_version"] is None
    shown = run_cli("ls", run / "out").stdout
    assert "problem: missing: config.json is missing." in shown.splitlines()
    (run / "checkpoint-10" / MODEL).touch()
    assert listed(run / "out")["good"]["state"] == "up to date", "it has no part in it"
    (run / "checkpoint-30" / MODEL).touch()
    assert listed(run / "out/good")["good"]["state"] == "sources changed"
    shutil.rmtree(run / "checkpoint-30")
    assert listed(run / "out")["good"]["state"] == "sources changed"


def test_hundreds_are_listed_fast_and_without_their_weights(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", [{"w": torch.rand(1_000_000)} for _ in STEPS], STEPS)
    assert run_cli("mean", run, "-q").exit_code == 0
    for number in range(200):
        result = run / "averaged" / f"mean{number:03}"
        result.mkdir()
        for path in (run / "averaged/mean").iterdir():
            (result / path.name).hardlink_to(path) if path.name == MODEL else shutil.copy(path, result)
    listed(run)
    begun, read = time.perf_counter(), bytes_read()
    assert len(listed(run)) == 201
    assert time.perf_counter() - begun < 5
    assert bytes_read() - read < 4_000_000, "less than the weights of one"


def test_where_there_are_none(tmp_path: Path) -> None:
    assert run_cli("ls", tmp_path).stdout == f"There are no results in {tmp_path}.\n"
    assert listed(tmp_path) == {}
    missing = run_cli("ls", tmp_path / "none")
    assert (missing.exit_code, "cannot be listed" in missing.stderr) == (1, True)


# --- diff ---


def as_float64(path: Path) -> dict[str, NDArray[np.float64]]:
    return {name: tensor.double().numpy() for name, tensor in load_file(path / MODEL).items()}


def check_distances(a: Path, b: Path) -> dict[str, Any]:
    """Of whole tensors in float64; returns what was told."""
    done = run_cli("diff", a, b, "--json", "-q")
    assert done.exit_code == 0, done.stderr
    told: dict[str, Any] = json.loads(done.stdout)
    one, other = as_float64(a), as_float64(b)
    floating = {name for name, tensor in load_file(a / MODEL).items() if tensor.is_floating_point()}
    norms = {name: (np.linalg.norm((one[name] - other[name]).ravel()), np.linalg.norm(one[name])) for name in floating}
    expected = {name: distance / norm if norm else 0.0 for name, (distance, norm) in norms.items()}
    assert {each["name"]: each["relative"] for each in told["tensors"]} == pytest.approx(expected, rel=1e-12)
    relatives = [each["relative"] for each in told["tensors"]]
    assert relatives == sorted(relatives, reverse=True)
    distance, norm = (np.sqrt(sum(each[part] ** 2 for each in norms.values())) for part in (0, 1))
    assert told["total"]["relative"] == pytest.approx(distance / norm, rel=1e-12)
    assert sorted(told["unequal"]) == sorted(
        name for name in one if name not in floating and not np.array_equal(one[name], other[name])
    )
    return told


def test_distances_of_results_and_checkpoints(tmp_path: Path) -> None:
    weights = [each | {"large": torch.randn(600_001)} for each in random_run(5, len(STEPS), torch.float32)]
    run = write_run(tmp_path / "run", weights, STEPS)
    assert run_cli("mean", run, "-q").exit_code == 0
    assert run_cli("mean", run, "--last", "2", "--dtype", "bfloat16", "-q").exit_code == 0
    a, b = run / "averaged/mean", run / "averaged/mean-last2"
    before = snapshot(run)
    told = check_distances(a, b)
    assert told["recipe"] == {
        "checkpoints": {"a": [10, 20, 30, 40], "b": [30, 40]},
        "dtype": {"a": "source", "b": "bfloat16"},
        "last": {"a": None, "b": 2},
    }
    assert told["weights"] == [
        {"step": step, "a": 0.25, "b": other} for step, other in zip(STEPS, (None, None, 0.5, 0.5), strict=True)
    ]
    check_distances(b, a)
    of_checkpoint = check_distances(a, run / "checkpoint-10")
    assert (of_checkpoint["recipe"], of_checkpoint["weights"]) == ({}, [])
    assert "position_ids" in of_checkpoint["unequal"]
    same = check_distances(a, a)
    assert (same["recipe"], same["unequal"], same["total"]["relative"]) == ({}, [], 0.0)
    shown = run_cli("diff", a, b).stdout.splitlines()
    assert shown[:2] == [f"A  {a}", f"B  {b}"]
    assert ["last", "2"] in [row.split() for row in shown]
    assert snapshot(run) == before


def test_values_that_are_not_finite_are_said_to_be(run: Path) -> None:
    assert run_cli("mean", run, "-q").exit_code == 0
    weights = load_file(run / "checkpoint-40" / MODEL)
    save_file(weights | {"bias": torch.full((130,), torch.nan)}, run / "checkpoint-40" / MODEL)
    told = json.loads(run_cli("diff", run / "averaged/mean", run / "checkpoint-40", "--json", "-q").stdout)
    assert told["tensors"][0] | {"norm": 0} == {"name": "bias", "distance": None, "norm": 0, "relative": None}
    assert told["total"]["relative"] is None
    assert "bias             not finite" in run_cli("diff", run / "averaged/mean", run / "checkpoint-40").stdout


def test_tensors_that_do_not_match_are_refused_by_name(run: Path) -> None:
    assert run_cli("mean", run, "-q").exit_code == 0
    weights, path = load_file(run / "checkpoint-40" / MODEL), run / "checkpoint-40" / MODEL
    words = ("diff", run / "averaged/mean", run / "checkpoint-40")
    for changed, told in (
        ({name: tensor for name, tensor in weights.items() if name != "bias"}, "these tensors: bias."),
        (weights | {"new": torch.ones(1)}, "these tensors: new."),
        (weights | {"bias": torch.ones(13, 10)}, "different shapes or dtypes"),
        (weights | {"mask": torch.ones(3)}, "different shapes or dtypes"),
    ):
        save_file(changed, path)
        done = run_cli(*words)
        assert (done.exit_code, told in done.stderr) == (1, True), done.stderr
    for a, b in ((run / "checkpoint-10", run / "checkpoint-20"), (run / "averaged/mean", run / "none")):
        assert run_cli("diff", a, b).exit_code == 1
