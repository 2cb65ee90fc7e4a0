"""What the evidence rests on: closed forms against samples, a paper's figures, and a document that names each file."""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

import ckavg
from benchmarks.evidence import parabola, tables
from benchmarks.evidence.ornstein_uhlenbeck import (
    Process,
    expected_of_flat,
    expected_of_flat_in_continuous_time,
    expected_of_last,
    expected_of_likeliest,
    expected_of_likeliest_in_continuous_time,
    expected_of_weights,
    likeliest,
)
from benchmarks.evidence.quadratic_cases import ESTIMATORS, SCHEMES, Case, Setting, study, weights_at, weights_of_all
from benchmarks.evidence.quadratic_tables import PAIRS, tables_of
from benchmarks.evidence.saved import average_all, open_saved, save_run
from ckavg.schemes import Timeline

DOCUMENT = tables.ROOT / "docs" / "evidence.md"
SMALL = Setting(conditions=(10,), directions=3, steps=60, intervals=((1, 20), (20, 20)), replicas=1500, seed=7)
PROCESS = Process(curvatures=(1.0, 0.3, 0.02), distance=4.0)
ERR = {
    2: ("1.153e-05", "0.109"),
    8: ("8.076e-05", "0.220"),
    64: ("7.298e-04", "0.258"),
    256: ("2.996e-03", "0.262"),
    1024: ("1.273e-02", "0.235"),
}
"""Err of the paper's table, with the rule and without, by batch scale."""


# --- the noisy quadratic ---


@pytest.fixture(scope="module")
def cases() -> list[Case]:
    weights = weights_of_all(SMALL)
    starts = enumerate(("far", "at the optimum"))
    return [case for place, start in starts for case in study(10, start, SMALL, SMALL.seed + place, weights)]


def test_samples_are_within_three_standard_errors_of_theory(cases: list[Case]) -> None:
    assert [(case.start, case.every) for case in cases] == list(itertools.product(("far", "at the optimum"), (1, 20)))
    points = itertools.product(range(len(cases)), ESTIMATORS)
    z = {(case, name, at): cases[case].z(name, at) for case, name in points for at in cases[case].measured}
    assert len(z) == 2 * (3 + 2) * len(ESTIMATORS)  # the mean of one checkpoint is no snapshot
    assert {which: value for which, value in z.items() if not abs(value) <= 3} == {}


def test_a_wrong_theory_is_noticed(cases: list[Case]) -> None:
    """The standard errors are small enough for the first test to mean something."""
    wrong = Process(curvatures=cases[0].process.curvatures, distance=10.0, noise=1.2)
    for case in cases[:2]:
        end = expected_of_likeliest(wrong, 60, case.every)
        assert abs(case.mean("likeliest", 60) - end) > 3 * case.error("likeliest", 60)


@pytest.mark.parametrize("every", [1, 20])
def test_closed_forms_are_those_of_the_weights(every: int) -> None:
    last, flat = np.zeros(61), np.zeros(61)
    last[-1], flat[every::every] = 1, every / 60
    assert expected_of_last(PROCESS, 60) == pytest.approx(expected_of_weights(PROCESS, last), rel=1e-12)
    assert expected_of_flat(PROCESS, 60, every) == pytest.approx(expected_of_weights(PROCESS, flat), rel=1e-12)
    total = 0.0
    for curvature in PROCESS.curvatures:  # the weights of the likeliest estimate differ from direction to direction
        process = Process(curvatures=(curvature,), distance=4.0)
        kept = float(process.decay[0]) ** every
        corrected = flat.copy()
        corrected[[0, -1]] += np.array([-1, 1]) * kept * every / (60 * (1 - kept))
        total += expected_of_weights(process, corrected)
    assert expected_of_likeliest(PROCESS, 60, every) == pytest.approx(total, rel=1e-10)


def test_the_likeliest_estimate_maximises_the_likelihood() -> None:
    process = Process(curvatures=(0.7,), distance=4.0)
    states = np.array(list(process.states(40, replicas=1, seed=3)))[:, 0, 0]
    decay = float(process.decay[0])
    optimum = np.mean((states[1:] - decay * states[:-1]) / (1 - decay))  # where the derivative of Σ log p is 0
    found = likeliest(process, states[:1, None], states[1:].mean(keepdims=True)[:, None], states[-1:, None], 40)
    assert found.item() == pytest.approx(optimum, rel=1e-12)


@pytest.mark.parametrize(("steps", "tolerance"), [(3_000, 2e-2), (300_000, 2e-4)])
@pytest.mark.parametrize(
    ("exact", "limit"),
    [
        (expected_of_flat, expected_of_flat_in_continuous_time),
        (expected_of_likeliest, expected_of_likeliest_in_continuous_time),
    ],
    ids=("flat", "likeliest"),
)
def test_the_continuous_forms_are_the_limits_of_small_steps(
    exact: Callable[..., float], limit: Callable[..., float], steps: int, tolerance: float
) -> None:
    process = Process(curvatures=(1.0, 0.2), distance=4.0, step_size=30 / steps, noise=np.sqrt(steps / 30))
    assert exact(process, steps) == pytest.approx(limit(process, steps), rel=tolerance)


def test_the_ema_is_bemas_without_its_correction() -> None:
    timeline = Timeline(tuple(range(0, 500, 7)), anchor_is_init=True)
    assert SCHEMES["EMA"].coefficients(timeline).betas == ckavg.BEMA().coefficients(timeline).betas


def test_the_weights_are_those_of_the_record(tmp_path: Path) -> None:
    save_run(tmp_path, Process(curvatures=(1.0, 0.5), distance=1.0).states(12, replicas=2, seed=0))
    for name, record in average_all(open_saved(tmp_path, every=4), SCHEMES, tmp_path / "averages").items():
        weights = weights_at(SCHEMES[name], 12, 4)
        assert record.steps == (0, 4, 8, 12)
        assert tuple(weights[::4]) == pytest.approx(record.weights, abs=1e-15)
        assert np.count_nonzero(weights) == np.count_nonzero(weights[::4])


def test_verdicts_need_three_standard_errors(cases: list[Case]) -> None:
    ratios = {table.name: table for table in tables_of(cases)}["quadratic-ratios-1"]
    for (one, other), row in zip(PAIRS, ratios.rows, strict=True):
        for case, cell in zip((cases[0], cases[2]), row[1:], strict=True):
            nearer = case.distances[other][60] - case.distances[one][60]
            decided = abs(nearer.mean()) > 3 * nearer.std(ddof=1) / np.sqrt(len(nearer))
            assert cell == (f"{case.mean(one, 60) / case.mean(other, 60):.3g}" if decided else "undecided")


# --- the noisy parabola ---


def err(setting: parabola.Parabola, scale: int, momentum: float) -> float:
    """ζ_{k+1} = ρ ζ_k + (1 − ρ) θ_k and θ_{k+1} = (1 − κη) θ_k, without ckavg: κ times the rate against one."""

    def emas(scale: int, momentum: float) -> list[float]:
        theta, values = 1.0, [1.0]
        for _ in range(setting.steps // scale):
            values.append(momentum * values[-1] + (1 - momentum) * theta)
            theta *= 1 - scale * setting.learning_rate
        return values

    plain = emas(1, setting.momentum)[::scale]
    return max(abs(one - other) for one, other in zip(emas(scale, momentum), plain, strict=False))


@pytest.mark.parametrize("scale", ERR)
def test_err_is_that_of_the_paper(scale: int) -> None:
    full = parabola.Parabola()
    made = (err(full, scale, full.momentum**scale), err(full, scale, full.momentum))
    rows = {int(str(row[0])): row for row in tables.read_table(tables.RESULTS / "parabola.csv").rows}
    for with_rule, without_rule in (made, (float(str(rows[scale][1])), float(str(rows[scale][2])))):
        assert (f"{with_rule:.3e}", f"{without_rule:.3f}") == ERR[scale]


def test_err_of_saved_runs_is_that_of_the_recursions() -> None:
    small = parabola.Parabola(steps=500, learning_rate=2e-3, momentum=1 - 2e-3)
    for outcome in parabola.study(small, (2, 16)):
        expected = (err(small, outcome.scale, small.momentum**outcome.scale), err(small, outcome.scale, small.momentum))
        assert (outcome.with_rule[0], outcome.without_rule[0]) == pytest.approx(expected, rel=1e-9)


def test_the_ema_after_the_step_is_one_step_ahead() -> None:
    """A checkpoint holds the weights from after its step, where Definition 1.1 takes in those from before it."""
    weights = parabola.Parabola(steps=40, learning_rate=0.01).model(2)
    schemes = [ckavg.MomentumEMA(momentum=0.99, batch_scale=2)]
    (found,) = parabola.averages_at(weights, list(range(len(weights))), schemes)
    expected = [1.0]
    for theta in weights[1:]:
        expected.append(0.99**2 * expected[-1] + (1 - 0.99**2) * theta)
    assert found == pytest.approx(expected, rel=1e-13)


# --- tables and document ---


def test_a_table_survives_its_file(tmp_path: Path) -> None:
    tables.publish([tables.Table("name", ("a, b", "c"), (("x, y", 0.123456789), (None, 3)))], tmp_path)
    again = tables.read_table(tmp_path / "name.csv")
    assert (again.columns, again.rows) == (("a, b", "c"), (("x, y", "0.123457"), ("", "3")))


def test_every_study_and_every_result_is_named_in_the_document() -> None:
    text = DOCUMENT.read_text(encoding="utf-8")
    assert set(re.findall(r"\(evidence/(.+?)\)", text)) == {file.name for file in tables.RESULTS.iterdir()}
    for study_name in ("quadratic", "parabola", "pretraining", "small_model", "language_model", "search"):
        assert f"python -m benchmarks.evidence.{study_name}" in text


@pytest.mark.parametrize(
    ("file", "row", "column", "written"),
    [
        ("quadratic-ratios-1", "BEMA / EMA", "far, 1", "to 508 times EMA"),
        ("quadratic-ratios-100", "BEMA / EMA", "far, 1", "is 0.28 to"),
        ("quadratic-anchor", "100", "θ_0 in EMA", "still contains 0.4644 of"),
        ("pretraining-averages", "last", "loss", "a loss of 1.579"),
        ("pretraining-decays", "30 %, linear", "decayed", "decay 1.464"),
        ("pretraining-averages", "merged linear 20", "loss", "merge 1.479"),
        ("small_model-shortfalls", "PEMA 0.15", "mean, every 50", "on average 0.0005 worse"),
        ("small_model-shortfalls", "PEMA 0.15", "most, every 300", "to 0.023; γ"),
        ("language_model-powers", "0.0008", "PEMA 0.15 − best EMA", "by 0.07 with 20"),
    ],
)  # fmt: skip
def test_the_document_says_what_the_files_hold(file: str, row: str, column: str, written: str) -> None:
    table = tables.read_table(tables.RESULTS / f"{file}.csv")
    cell = next(str(cells[table.columns.index(column)]) for cells in table.rows if cells[0] == row)
    number = re.findall(r"\d+\.?\d*", written)[0]
    digits = len(number.partition(".")[2])
    assert written in " ".join(DOCUMENT.read_text(encoding="utf-8").split())
    assert float(number) == pytest.approx(float(cell.split()[0]), abs=10.0**-digits)
