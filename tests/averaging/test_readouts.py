"""Figures derived from the weights of an average: in the record, in words, and if it is almost its anchor."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

import ckavg
from ckavg.averaging.rules import effective_weights
from ckavg.errors import SettingError
from ckavg.output.record import read_record
from tests.cli.runner import run_cli
from tests.runs import write_run

STEPS = (0, 100, 200, 300)
STUCK = ckavg.MomentumEMA(momentum=0.99999)
"""Of the anchor it keeps 0.99999^300 = 99.7 %."""


@pytest.fixture
def source(tmp_path: Path) -> Path:
    values = torch.randn(4, 50, generator=torch.Generator().manual_seed(0))
    return write_run(tmp_path / "run", [{"w": row.clone()} for row in values], STEPS)


@pytest.mark.parametrize(
    "scheme",
    [ckavg.PEMA(), ckavg.BEMA(eta=0.0), ckavg.Mean(), ckavg.Last(), ckavg.BEMA(burn_in=100)],
    ids=lambda s: s.label,
)
def test_they_follow_from_the_weights(source: Path, scheme: ckavg.schemes.Scheme) -> None:
    record = ckavg.average(ckavg.open_run(source), scheme)
    weights = np.array(record.weights)
    assert record.effective_count == pytest.approx(1 / np.sum(weights**2))
    assert record.mean_age == pytest.approx(np.sum(weights * (300 - np.array(STEPS))), abs=1e-12)
    assert record.anchor_weight == record.weights[STEPS.index(record.anchor_step)]
    assert ckavg.verify_result(record.directory).problems == ()


@pytest.mark.parametrize(
    "scheme",
    [
        ckavg.EMA(),
        ckavg.BEMA(eta=0.0),
        ckavg.BEMA(burn_in=300),
        ckavg.OUEMA(burn_in=100),
        ckavg.DEMA(),
        ckavg.Mean(),
        ckavg.Last(),
        ckavg.Weights(weights=(0.5, -0.25, 0.75, 0.0)),
    ],
    ids=lambda s: s.label,
)
def test_the_weight_of_the_anchor_is_known_without_tensors(scheme: ckavg.schemes.Scheme) -> None:
    coefficients = scheme.coefficients(ckavg.schemes.Timeline(STEPS))
    expected = effective_weights(coefficients)[coefficients.start]
    assert coefficients.anchor_weight == pytest.approx(expected, abs=1e-15)


@pytest.mark.parametrize("name", ["effective_count", "mean_age", "anchor_weight"])
def test_of_an_older_record_they_are_not_known_and_edited_ones_are_noticed(source: Path, name: str) -> None:
    directory = ckavg.average(ckavg.open_run(source), ckavg.PEMA()).directory
    file = directory / "ckavg.json"
    record: dict[str, Any] = json.loads(file.read_text())
    file.write_text(json.dumps(record | {name: record[name] + 0.001}))
    (problem,) = ckavg.verify_result(directory).problems
    assert f"{name} is " in problem
    del record[name]
    file.write_text(json.dumps(record))
    assert getattr(read_record(directory), name) is None
    assert ckavg.verify_result(directory).problems == ()


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ("weights --weights 0.02,0.28,0.4,0.3", "like 3.0 equal checkpoints; 102 steps behind the last; 2 % of step 0"),
        (
            "weights --weights 0.25,0.25,0.25,0.25",
            "like 4.0 equal checkpoints; 150 steps behind the last; 25 % of step 0",
        ),
        ("weights --weights -0.1,0,0,1.1", "like 0.8 equal checkpoints; 30 steps ahead of the last; -10 % of step 0"),
        ("mean --from-step 100", "like 3.0 equal checkpoints; 100 steps behind the last; 33 % of step 100"),
    ],
)
def test_in_words(source: Path, words: str, told: str) -> None:
    verb, *options = words.split()
    assert f"spread   {told}\n" in run_cli(verb, source, *options).stdout


def test_in_words_with_a_base_model(source: Path, tmp_path: Path) -> None:
    save_file({"w": torch.zeros(50)}, tmp_path / "base.safetensors")
    words = ("--init", tmp_path / "base.safetensors", "--from-step", "200", "--weights", "0.5,0.25,0.25")
    assert "; 50 % of the base model\n" in run_cli("weights", source, *words).stdout
    assert "; 50 % of step 200\n" in run_cli("mean", source, *words[:4]).stdout


def test_what_is_in_effect_the_anchor_is_refused_unless_allowed(source: Path) -> None:
    refused = run_cli("ema", source, "--momentum", "0.99999")
    assert refused.exit_code == 2
    assert "99.7 % of the weight is on step 0" in refused.stderr
    assert not (source / "averaged").exists()
    assert run_cli("ema", source, "--momentum", "0.99999", "--dry-run").exit_code == 2
    allowed = run_cli("ema", source, "--momentum", "0.99999", "--allow-anchor", "--json")
    assert allowed.exit_code == 0
    card = Path(json.loads(allowed.stdout)["outputs"][0]["directory"], "README.md").read_text()
    assert "ckavg ema --momentum 0.99999 --allow-anchor" in card


@pytest.mark.parametrize(
    ("scheme", "refused"),
    [
        (STUCK, True),
        (ckavg.MomentumEMA(momentum=0.9999), False),
        (ckavg.Weights(weights=(0.99, 0.01, 0.0, 0.0)), True),
        (ckavg.Weights(weights=(0.98, 0.01, 0.01, 0.0)), False),
        (ckavg.Weights(weights=(1.5, -0.5, 0.0, 0.0)), False),
        (ckavg.BEMA(kappa=3.0), False),
        (ckavg.BEMA(kappa=3.0, eta=3.0), True),
        (ckavg.BEMA(burn_in=300), False),
        (ckavg.Last(), False),
    ],
)
def test_before_anything_is_read(source: Path, scheme: ckavg.schemes.Scheme, refused: bool) -> None:
    run = ckavg.open_run(source)
    if refused:
        with pytest.raises(SettingError, match="where it begins: the result would be that checkpoint"):
            ckavg.plan_average(run, scheme)
    else:
        ckavg.plan_average(run, scheme)
    ckavg.plan_average(run, scheme, allow_anchor=True)


def test_of_a_path_after_it_was_measured(source: Path) -> None:
    """The weights are unknown before the path is measured; the measured path is cached."""
    stuck = ckavg.PEMA(gamma=20.0)
    ckavg.plan_average(ckavg.open_run(source), stuck)
    with pytest.raises(SettingError, match="pema-gamma20: 100 % of the weight is on step 0"):
        ckavg.average(ckavg.open_run(source), stuck)
    assert {path.name for path in (source / "averaged").iterdir() if not path.name.startswith(".")} == {"path.json"}
    assert ckavg.average(ckavg.open_run(source), stuck, allow_anchor=True).anchor_weight == pytest.approx(1)
