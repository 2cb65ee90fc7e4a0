"""Many averages from one reading."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from tests.cli.runner import placeless, run_cli, snapshot
from tests.runs import random_run, write_run

STEPS = (0, 50, 100, 150)
WORDS = (
    "pema:gamma=0.1,0.3",
    "pema:scope=tensor",
    "bema:eta=0.1,0.2,burn-in=0",
    "ema:momentum=0.99",
    "ouema",
    "dema",
    "mean",
    "mean:decay=cosine,minus-sqrt",
)
SINGLE = {
    "pema-gamma0.1": ("pema", "--gamma", "0.1"),
    "pema-gamma0.3": ("pema", "--gamma", "0.3"),
    "pema-gamma0.15-scopetensor": ("pema", "--scope", "tensor"),
    "bema-eta0.1": ("bema", "--eta", "0.1"),
    "bema-eta0.2": ("bema",),
    "ema-momentum0.99": ("ema", "--momentum", "0.99"),
    "ouema-eta0.2": ("ouema",),
    "dema-kappa0.5": ("dema",),
    "mean": ("mean",),
    "mean-decaycosine": ("mean", "--decay", "cosine"),
    "mean-decayminus-sqrt": ("mean", "--decay", "minus-sqrt"),
}


@pytest.fixture
def run(tmp_path: Path) -> Path:
    weights = random_run(seed=1, count=4, dtype=torch.bfloat16)
    return write_run(tmp_path / "checkpoints", weights, STEPS, shards=(2,))


def test_results_are_those_of_the_single_commands(run: Path, tmp_path: Path) -> None:
    result = run_cli("sweep", run, *WORDS, "--json")
    assert result.exit_code == 0, result.stderr
    averages = json.loads(result.stdout)["averages"]
    assert [each["outputs"][0]["name"] for each in averages] == list(SINGLE)
    for record, (name, words) in zip(averages, SINGLE.items(), strict=True):
        alone = json.loads(run_cli(words[0], run, *words[1:], "--out", tmp_path / name, "--json").stdout)
        volatile = {"outputs", "seconds", "bytes_read", "path_kernel"}
        assert {k: v for k, v in record.items() if k not in volatile} == {
            k: v for k, v in alone.items() if k not in volatile
        }
        swept, single = run / "averaged" / name, tmp_path / name
        assert placeless(json.loads((swept / "ckavg.json").read_text())) == placeless(record)
        for file in sorted(single.iterdir()):
            if file.name not in ("ckavg.json", "README.md"):
                assert (swept / file.name).read_bytes() == file.read_bytes(), file.name


def test_one_reading_for_all(run: Path) -> None:
    one = json.loads(run_cli("pema", run, "--json").stdout)["bytes_read"]
    (run / "averaged" / "path.json").unlink()
    many = json.loads(run_cli("sweep", run, "pema:gamma=0.1,0.2,0.3", "bema", "mean", "--json").stdout)["averages"]
    assert {record["bytes_read"] for record in many} == {one}


def test_table(run: Path) -> None:
    result = run_cli("sweep", run, "pema:gamma=0.1,0.3", "bema:eta=0,kappa=0.1", "last")
    assert result.exit_code == 0
    lines = result.stdout.splitlines()
    assert lines[0] == "4 averages of 4 checkpoints, steps 0 to 150"
    assert lines[1].startswith("path length ℓ(T) = ")
    rows = {line.split()[0]: line.split()[1:] for line in lines[4:8]}
    assert rows["last"] == ["▁▁▁█", "0.0000", "1.0000", "0.0000"]
    assert rows["bema-eta0-kappa0.1"][0].startswith("-")
    assert rows["pema-gamma0.1"][0].endswith("█")


def test_source_may_be_left_out(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(run)
    assert run_cli("sweep", "mean", "last", "-q").exit_code == 0
    assert {path.name for path in (run / "averaged").iterdir()} == {"mean", "last"}


def test_out_is_the_directory_of_all(run: Path, tmp_path: Path) -> None:
    assert run_cli("sweep", run, "mean", "last", "--out", tmp_path / "many", "-q").exit_code == 0
    assert {path.name for path in (tmp_path / "many").iterdir()} == {"mean", "last"}


def test_dry_run(run: Path) -> None:
    before = snapshot(run)
    result = run_cli("sweep", run, "pema:gamma=0.1,0.3", "mean", "--dry-run")
    assert result.stdout.count("would write") == 3
    assert len(json.loads(run_cli("sweep", run, "mean", "last", "--dry-run", "--json").stdout)["averages"]) == 2
    assert snapshot(run) == before


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (("nonsense:x=1",), "no scheme is named"),
        (("mean", "nonsense:x=1"), "there is no scheme 'nonsense'"),
        (("mean", "mean"), "mean is there twice"),
        (("mean", "mean:decay=none"), "mean is there twice"),
        (("mean:decay=exponential",), "decay is 'exponential'; it must be one of none, linear, cosine, minus-sqrt"),
        (("bema:burn-in=0,50", "--every", "50"), "begin at one burn-in"),
    ],
)
def test_wrong_words_exit_2(run: Path, monkeypatch: pytest.MonkeyPatch, words: tuple[str, ...], told: str) -> None:
    monkeypatch.chdir(run)
    result = run_cli("sweep", *words)
    assert result.exit_code == 2
    assert told in result.stderr
    assert not (run / "averaged").exists()


def test_an_existing_result_stops_the_sweep_before_it_reads(run: Path) -> None:
    run_cli("mean", run)
    result = run_cli("sweep", run, "pema", "mean")
    assert result.exit_code == 1
    assert "mean already holds a result" in result.stderr
    assert {path.name for path in (run / "averaged").iterdir()} == {"mean"}


def test_a_failure_leaves_none_of_the_results(run: Path) -> None:
    weights = random_run(seed=2, count=5, dtype=torch.bfloat16)[-1]
    weights["odd"][0, 0, 0] = float("nan")
    write_run(run, [weights], (200,))
    result = run_cli("sweep", run, "bema", "mean", "dema")
    assert result.exit_code == 1
    assert "step 200: tensor 'odd' holds NaN" in result.stderr
    assert not (run / "averaged").exists()
