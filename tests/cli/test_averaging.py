"""What the averaging verbs print and write."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import ckavg
from tests.cli.runner import placeless, run_cli, snapshot
from tests.reference import load_floats
from tests.runs import random_run, write_run

STEPS = (0, 50, 100, 150)

CONTRACT = {
    "scheme",
    "parameters",
    "ckavg_version",
    "steps",
    "anchor_step",
    "span",
    "path_length",
    "betas",
    "alphas",
    "weights",
    "excluded_from_path",
    "parameters_counted",
    "warnings",
    "outputs",
    "bytes_read",
    "seconds",
}
"""The keys that scripts may rely on."""


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return write_run(tmp_path / "checkpoints", random_run(seed=1, count=4, dtype=torch.float32), STEPS)


@pytest.mark.parametrize(
    ("verb", "options", "scheme", "name"),
    [
        ("pema", (), ckavg.PEMA(), "pema-gamma0.15"),
        ("pema", ("--gamma", "0.3"), ckavg.PEMA(gamma=0.3), "pema-gamma0.3"),
        ("ema", (), ckavg.EMA(), "ema-gamma0.15"),
        ("ema", ("--gamma", "1", "--tau", "5"), ckavg.EMA(gamma=1.0, tau=5.0), "ema-gamma1-tau5"),
        ("bema", (), ckavg.BEMA(), "bema-eta0.2"),
        (
            "bema",
            ("--eta", "0.4", "--kappa", "0.6", "--multiplier", "2", "--lag", "5", "--burn-in", "50"),
            ckavg.BEMA(eta=0.4, kappa=0.6, multiplier=2.0, lag=5.0, burn_in=50),
            "bema-eta0.4-kappa0.6-multiplier2-lag5-burn-in50",
        ),
        ("bema", ("--form", "author"), ckavg.BEMA(form="author"), "bema-eta0.2-formauthor"),
        ("bema", ("--no-bias-correction",), ckavg.BEMA(eta=math.inf), "bema-etainf"),
        ("bema", ("--eta", "inf"), ckavg.BEMA(eta=math.inf), "bema-etainf"),
        ("ema", ("--momentum", "0.99"), ckavg.MomentumEMA(momentum=0.99), "ema-momentum0.99"),
        (
            "ema",
            ("--momentum", "0.9", "--momentum-per", "update", "--batch-scale", "2"),
            ckavg.MomentumEMA(momentum=0.9, momentum_per="update", batch_scale=2.0),
            "ema-momentum0.9-momentum-perupdate-batch-scale2",
        ),
        (
            "pema",
            ("--scope", "tensor", "--pairing", "next", "--clock", "updates"),
            ckavg.PEMA(scope="tensor", pairing="next", clock="updates"),
            "pema-gamma0.15-scopetensor-pairingnext-clockupdates",
        ),
        ("ouema", ("--eta", "0.3"), ckavg.OUEMA(eta=0.3), "ouema-eta0.3"),
        ("dema", (), ckavg.DEMA(), "dema-kappa0.5"),
        ("mean", (), ckavg.Mean(), "mean"),
    ],
)
def test_command_is_the_library(
    run: Path, tmp_path: Path, verb: str, options: tuple[str, ...], scheme: ckavg.EMA, name: str
) -> None:
    result = run_cli(verb, run, *options, "--json")
    assert result.exit_code == 0, result.stderr
    record = json.loads(result.stdout)
    expected = ckavg.average(ckavg.open_run(run), scheme, out=tmp_path / "expected")
    volatile = {"outputs", "seconds", "bytes_read", "path_kernel"}
    assert record.keys() >= CONTRACT
    assert {key: value for key, value in record.items() if key not in volatile} == {
        key: value for key, value in json.loads(expected.to_json()).items() if key not in volatile
    }
    (output,) = record["outputs"]
    assert output["name"] == name
    assert output["step"] == 150
    assert Path(output["directory"]) == run / "averaged" / name
    written = (run / "averaged" / name / "model.safetensors").read_bytes()
    assert written == (tmp_path / "expected" / "model.safetensors").read_bytes()
    assert placeless(json.loads((run / "averaged" / name / "ckavg.json").read_text())) == placeless(record)
    assert set(record["seconds"]) == {"path", "replay", "total"}


def test_defaults_of_the_command_are_those_of_the_schemes(run: Path) -> None:
    schemes = {"ouema": ckavg.OUEMA(), "dema": ckavg.DEMA(), "mean": ckavg.Mean()}
    for verb, scheme in {"pema": ckavg.PEMA(), "ema": ckavg.EMA(), "bema": ckavg.BEMA(), **schemes}.items():
        record = json.loads(run_cli(verb, run, "--json").stdout)
        assert record["parameters"] == scheme.parameters()


def test_pema_json(run: Path) -> None:
    record = json.loads(run_cli("pema", run, "--json").stdout)
    assert record["steps"] == list(STEPS)
    assert record["path_length"][0] == 0
    assert record["betas"][0] is None
    assert len(record["betas"]) == len(record["weights"]) == 4
    assert record["alphas"] is None
    assert record["anchor_step"] == 0
    assert record["span"] == 150
    assert record["excluded_from_path"] == ["norm", "scalar", "single"]
    assert any("norm" in warning for warning in record["warnings"])


def test_bema_json(run: Path) -> None:
    record = json.loads(run_cli("bema", run, "--burn-in", "20", "--json").stdout)
    assert record["path_length"] is None
    assert record["anchor_step"] == 50
    assert record["span"] == 100
    assert record["betas"][:2] == [None, None]
    assert record["alphas"][2:] == pytest.approx([110**-0.2, 160**-0.2])
    assert record["weights"][0] == 0


def test_every_counts_from_the_burn_in(run: Path) -> None:
    assert json.loads(run_cli("bema", run, "--burn-in", "50", "--every", "100", "--json").stdout)["steps"] == [
        0,
        50,
        150,
    ]
    assert json.loads(run_cli("ema", run, "--every", "100", "--json").stdout)["steps"] == [0, 100]


def test_summary(run: Path) -> None:
    result = run_cli("pema", run)
    assert result.exit_code == 0
    lines = result.stdout.splitlines()
    assert lines[0] == "Pathwise EMA (PEMA): gamma 0.15"
    assert lines[1].startswith("4 checkpoints of 106.7k parameters, steps 0 to 150, path length ℓ(T) = ")
    assert lines[3].split() == ["step", "ℓ", "β", "weight"]
    assert [line.split()[0] for line in lines[4:8]] == ["0", "50", "100", "150"]
    longest = max(lines[4:8], key=lambda line: line.count("█"))
    assert longest.count("█") == 32
    assert any(line.startswith("result ") and "pema-gamma0.15" in line for line in lines)
    assert any(line.startswith("next ") and "LlamaForCausalLM" in line for line in lines)
    assert "\x1b" not in result.stdout
    assert "pass 1 of 2, measuring the path: 0.00 GB to read" in result.stderr
    assert "pass 2 of 2, averaging: 0.00 of 0.00 GB" in result.stderr
    assert "warning: No spread at the anchor" in result.stderr


def test_quiet_says_nothing(run: Path) -> None:
    result = run_cli("ema", run, "-q")
    assert (result.exit_code, result.stdout, result.stderr) == (0, "", "")
    assert (run / "averaged" / "ema-gamma0.15" / "model.safetensors").exists()


def test_late_start_is_said_before_the_reading(run: Path) -> None:
    result = run_cli("pema", run, "--from-step", "50", "--dry-run")
    assert "warning: The run begins at step 50: everything is measured from that checkpoint" in result.stderr


def test_dry_run_reads_and_writes_nothing(run: Path) -> None:
    before = snapshot(run)
    result = run_cli("pema", run, "--dry-run")
    assert result.exit_code == 0
    assert "would read" in result.stdout
    assert "Nothing was read or written." in result.stdout
    plan = json.loads(run_cli("pema", run, "--dry-run", "--json").stdout)
    assert snapshot(run) == before
    done = json.loads(run_cli("pema", run, "--json").stdout)
    assert plan["bytes_to_read"] == done["bytes_read"]
    weights = (run / "averaged" / "pema-gamma0.15" / "model.safetensors").stat().st_size
    assert plan["bytes_to_write"] == pytest.approx(weights, abs=5000)
    assert plan["outputs"][0]["directory"] == done["outputs"][0]["directory"]


def test_existing_result_needs_force(run: Path) -> None:
    assert run_cli("ema", run).exit_code == 0
    before = snapshot(run)
    result = run_cli("ema", run)
    assert result.exit_code == 1
    assert "already holds a result" in result.stderr
    assert "--force" in result.stderr
    assert snapshot(run) == before
    assert run_cli("ema", run, "--force").exit_code == 0


def test_as_a_module_in_the_directory_of_the_run(run: Path) -> None:
    command = [sys.executable, "-m", "ckavg", "bema", "--eta", "0.3"]
    ran = subprocess.run(command, cwd=run, capture_output=True, text=True, check=True)
    assert "Bias-corrected EMA (BEMA): eta 0.3" in ran.stdout
    assert load_floats(run / "averaged" / "bema-eta0.3").keys() == load_floats(run / "checkpoint-0").keys()


def test_many_checkpoints_are_summed_up(tmp_path: Path) -> None:
    weights = [{"w": torch.arange(4.0) + step} for step in range(60)]
    result = run_cli("ema", write_run(tmp_path, weights, range(60)))
    (hidden,) = (line for line in result.stdout.splitlines() if line.lstrip().startswith("…"))
    assert "20 more" in hidden


def test_names_cannot_reach_the_terminal_as_control_characters(tmp_path: Path) -> None:
    weights = [{"\x1b[31mred[bold]": torch.ones(3) * step} for step in (0, float("nan"))]
    result = run_cli("ema", write_run(tmp_path, weights, (0, 1)))
    assert result.exit_code == 1
    assert "\x1b" not in result.stderr
    assert "\\x1b[31mred[bold]" in result.stderr


def test_mean_leaves_the_base_model_out(run: Path, tmp_path: Path) -> None:
    (run / "checkpoint-0").rename(tmp_path / "base")
    record = json.loads(run_cli("mean", run, "--init", tmp_path / "base", "--json").stdout)
    assert record["steps"] == list(STEPS)
    assert record["weights"] == pytest.approx([0, 1 / 3, 1 / 3, 1 / 3])


def test_negative_weights_are_drawn_by_their_size(run: Path) -> None:
    result = run_cli("bema", run, "--eta", "0", "--kappa", "0.1")
    first = next(line for line in result.stdout.splitlines() if line.startswith("   0 "))
    assert "-0." in first
    assert "█" in first
