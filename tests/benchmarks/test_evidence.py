"""What the evidence rests on: closed forms against samples, figures of a paper, and that the documents agree."""

from __future__ import annotations

import doctest
import itertools
import re
from pathlib import Path

import numpy as np
import pytest

import ckavg
from benchmarks.evidence import parabola, quadratic_tables, tables
from benchmarks.evidence.figures import Curve, Panel, draw
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
from benchmarks.evidence.quadratic_cases import (
    ESTIMATORS,
    SCHEMES,
    Case,
    Setting,
    expected_of_all,
    study,
    weights_at,
    weights_of_all,
)
from benchmarks.evidence.saved import average_all, open_saved, save_run
from ckavg.schemes import Timeline

SMALL = Setting(conditions=(10,), directions=3, steps=60, intervals=((1, 20), (20, 20)), replicas=1500, seed=7)

ERR_WITH_RULE = {2: 1.153e-5, 8: 8.076e-5, 64: 7.298e-4, 256: 2.996e-3, 1024: 1.273e-2}
ERR_WITHOUT_RULE = {2: 0.109, 8: 0.220, 64: 0.258, 256: 0.262, 1024: 0.235}

STUDIES = ("quadratic", "parabola", "pretraining", "small_model", "language_model")


# --- the noisy quadratic ---


@pytest.fixture(scope="module")
def cases() -> list[Case]:
    weights = weights_of_all(SMALL)
    starts = enumerate(("far", "at the optimum"))
    return [case for place, start in starts for case in study(10, start, SMALL, SMALL.seed + place, weights)]


def test_samples_are_within_three_standard_errors_of_theory(cases: list[Case]) -> None:
    assert [(case.start, case.every) for case in cases] == list(
        itertools.product(("far", "at the optimum"), (1, 20))
    )  # fmt: skip
    z = {
        (case.start, case.every, name, step): case.z(name, step)
        for case in cases
        for name in ESTIMATORS
        for step in case.measured
    }
    assert len(z) == 2 * (3 + 2) * len(ESTIMATORS)  # the mean of one checkpoint is no snapshot
    assert {which: value for which, value in z.items() if not abs(value) <= 3} == {}


def test_a_wrong_theory_is_noticed(cases: list[Case]) -> None:
    """The standard errors are small enough for the first test to mean something."""
    wrong = Process(curvatures=cases[0].process.curvatures, distance=10.0, noise=1.2)
    for case in cases[:2]:
        measured, end = case.mean("likeliest", 60), expected_of_likeliest(wrong, 60, case.every)
        assert abs(measured - end) > 3 * case.error("likeliest", 60)


@pytest.mark.parametrize("every", [1, 20])
def test_closed_forms_are_those_of_the_weights(every: int) -> None:
    process = Process(curvatures=(1.0, 0.3, 0.02), distance=4.0)
    last, flat = np.zeros(61), np.zeros(61)
    last[-1], flat[every::every] = 1, every / 60
    assert expected_of_last(process, 60) == pytest.approx(expected_of_weights(process, last), rel=1e-12)
    assert expected_of_flat(process, 60, every) == pytest.approx(expected_of_weights(process, flat), rel=1e-12)


@pytest.mark.parametrize("every", [1, 20])
def test_the_likeliest_estimate_has_its_variance_and_no_bias(every: int) -> None:
    total = 0.0
    for curvature in (1.0, 0.3, 0.02):  # its weights differ from direction to direction
        process = Process(curvatures=(curvature,), distance=4.0)
        kept = float(process.decay[0]) ** every
        weights = np.zeros(61)
        weights[every::every] = every / 60
        weights[-1] += kept * every / (60 * (1 - kept))
        weights[0] -= kept * every / (60 * (1 - kept))
        total += expected_of_weights(process, weights)
    whole = Process(curvatures=(1.0, 0.3, 0.02), distance=-7.0)
    assert expected_of_likeliest(whole, 60, every) == pytest.approx(total, rel=1e-10)


def test_the_likeliest_estimate_maximises_the_likelihood() -> None:
    process = Process(curvatures=(0.7,), distance=4.0)
    states = np.array(list(process.states(40, replicas=1, seed=3)))[:, 0, 0]
    decay = float(process.decay[0])
    optimum = np.mean((states[1:] - decay * states[:-1]) / (1 - decay))  # where the derivative of Σ log p is 0
    found = likeliest(process, states[:1, None], states[1:].mean(keepdims=True)[:, None], states[-1:, None], 40)
    assert found.item() == pytest.approx(optimum, rel=1e-12)


def test_the_continuous_forms_are_the_limits_of_small_steps() -> None:
    a, time = (1.0, 0.2), 30.0
    for steps, tolerance in ((3_000, 2e-2), (300_000, 2e-4)):
        process = Process(curvatures=a, distance=4.0, step_size=time / steps, noise=np.sqrt(steps / time))
        for exact, limit in (
            (expected_of_flat, expected_of_flat_in_continuous_time),
            (expected_of_likeliest, expected_of_likeliest_in_continuous_time),
        ):
            assert exact(process, steps) == pytest.approx(limit(process, steps), rel=tolerance)


def test_the_ema_is_bemas_without_its_correction() -> None:
    timeline = Timeline(tuple(range(0, 500, 7)), anchor_is_init=True)
    assert SCHEMES["EMA"].coefficients(timeline).betas == ckavg.BEMA().coefficients(timeline).betas


def test_the_weights_are_those_of_the_record(tmp_path: Path) -> None:
    save_run(tmp_path, Process(curvatures=(1.0, 0.5), distance=1.0).states(12, replicas=2, seed=0))
    records = average_all(open_saved(tmp_path, every=4), SCHEMES, tmp_path / "averages")
    for name, record in records.items():
        assert record.steps == (0, 4, 8, 12)
        weights = weights_at(SCHEMES[name], 12, 4)
        assert tuple(weights[::4]) == pytest.approx(record.weights, abs=1e-15)
        assert np.count_nonzero(weights) == np.count_nonzero(weights[::4])


def test_expected_values_differ_between_schemes() -> None:
    process = Process(curvatures=(1.0, 0.1), distance=10.0)
    expected = expected_of_all(process, weights_of_all(SMALL)[1], 1)
    assert len({by_step[60] for by_step in expected.values()}) == len(ESTIMATORS)


def test_verdicts_need_three_standard_errors(cases: list[Case]) -> None:
    of_name = {table.name: table for table in quadratic_tables.tables_of(cases)}
    ratios = of_name["quadratic-ratios-1"]
    for (one, other), row in zip(quadratic_tables.PAIRS, ratios.rows, strict=True):
        for case, cell in zip((cases[0], cases[2]), row[1:], strict=True):
            nearer = case.distances[other][60] - case.distances[one][60]
            decided = abs(nearer.mean()) > 3 * nearer.std(ddof=1) / np.sqrt(len(nearer))
            expected = f"{case.mean(one, 60) / case.mean(other, 60):.3g}" if decided else "undecided"
            assert cell == expected


# --- the noisy parabola ---


def errs(scale: int, parabola_: parabola.Parabola) -> tuple[float, float]:
    """Err with the rule and without: ζ_{k+1} = ρ ζ_k + (1 − ρ) θ_k and θ_{k+1} = (1 − κη) θ_k, without ckavg."""

    def emas(rate: float, momentum: float, steps: int) -> list[float]:
        theta = zeta = 1.0
        values = [zeta]
        for _ in range(steps):
            zeta, theta = momentum * zeta + (1 - momentum) * theta, (1 - rate) * theta
            values.append(zeta)
        return values

    rate, momentum, steps = parabola_.learning_rate, parabola_.momentum, parabola_.steps
    plain = emas(rate, momentum, steps)[::scale]
    with_rule, without_rule = (
        max(abs(one - other) for one, other in zip(emas(scale * rate, each, steps // scale), plain, strict=False))
        for each in (momentum**scale, momentum)
    )
    return with_rule, without_rule


@pytest.mark.parametrize("scale", ERR_WITH_RULE)
def test_err_of_the_recursions_is_that_of_the_paper(scale: int) -> None:
    with_rule, without_rule = errs(scale, parabola.Parabola())
    assert f"{with_rule:.3e}" == f"{ERR_WITH_RULE[scale]:.3e}"
    assert f"{without_rule:.3f}" == f"{ERR_WITHOUT_RULE[scale]:.3f}"


def test_err_of_saved_runs_is_that_of_the_recursions() -> None:
    small = parabola.Parabola(steps=500, learning_rate=2e-3, momentum=1 - 2e-3)
    for outcome in parabola.study(small, (2, 16)):
        expected = errs(outcome.scale, small)
        assert (outcome.with_rule[0], outcome.without_rule[0]) == pytest.approx(expected, rel=1e-9)


def test_the_results_are_the_figures_of_the_paper() -> None:
    rows = {int(str(row[0])): row for row in tables.read_table(tables.RESULTS / "parabola.csv").rows}
    for scale, with_rule in ERR_WITH_RULE.items():
        assert f"{float(str(rows[scale][1])):.3e}" == f"{with_rule:.3e}"
        assert f"{float(str(rows[scale][2])):.3f}" == f"{ERR_WITHOUT_RULE[scale]:.3f}"


def test_the_ema_after_the_step_is_one_step_ahead() -> None:
    """A checkpoint holds the weights from after its step, where Definition 1.1 takes in those from before it."""
    weights = parabola.Parabola(steps=40, learning_rate=0.01).model(2)
    steps = range(len(weights))
    (found,) = parabola.averages_at(weights, list(steps), [ckavg.MomentumEMA(momentum=0.99, batch_scale=2)])
    zeta, expected = 1.0, [1.0]
    for theta in weights[1:]:
        zeta = 0.99**2 * zeta + (1 - 0.99**2) * theta
        expected.append(zeta)
    assert found == pytest.approx(expected, rel=1e-13)


# --- tables, figures, document ---


def test_the_examples_in_docstrings() -> None:
    assert doctest.testmod(tables).failed == 0


def test_a_table_survives_its_file(tmp_path: Path) -> None:
    table = tables.Table("name", ("a, b", "c"), (("x, y", 0.123456789), (None, 3)))
    table.write(tmp_path)
    again = tables.read_table(tmp_path / "name.csv")
    assert again.rows == (("x, y", "0.123457"), ("", "3"))
    assert tables.as_markdown(again) == tables.as_markdown(table)
    assert tables.as_markdown(table).splitlines() == ["| a, b | c |", "| --- | ---: |", "| x, y | 0.1235 |", "|  | 3 |"]


def test_a_document_without_a_place_is_refused() -> None:
    table = tables.Table("name", ("a",), ((1,),))
    text = "before\n<!-- table: name -->\nold\n<!-- end -->\nafter\n<!-- table: other -->\nkept\n<!-- end -->\n"
    placed = tables.place_in(text, table)
    assert placed == text.replace("old\n", f"\n{tables.as_markdown(table)}\n\n")
    assert tables.place_in(placed, table) == tables.place_in(text.replace("old\n", ""), table) == placed
    with pytest.raises(ValueError, match="0 places for the table name"):
        tables.place_in("nothing", table)


def test_the_document_shows_what_the_files_hold() -> None:
    text = tables.DOCUMENT.read_text(encoding="utf-8")
    shown = re.findall(r"<!-- table: (.+?) -->", text)
    assert {name.split("-")[0] for name in shown} == set(STUDIES)
    for name in shown:
        assert tables.place_in(text, tables.read_table(tables.RESULTS / f"{name}.csv")) == text, name


def test_every_result_is_named_in_the_document() -> None:
    text = tables.DOCUMENT.read_text(encoding="utf-8")
    for file in tables.RESULTS.iterdir():
        assert f"(evidence/{file.name})" in text or f"<!-- table: {file.stem} -->" in text, file.name
    for study_name in STUDIES:
        assert f"python -m benchmarks.evidence.{study_name}" in text


def test_figures_are_the_same_from_the_same_numbers(tmp_path: Path) -> None:
    curves = [Curve(name="a", x=[1, 10], y=[2.0, 3.0], error=[0.1, 0.2]), Curve(name="b", x=[1, 10], y=[1.0, 5.0])]
    panel = Panel(title="t", x_label="x", y_label="y", curves=curves, x_scale="log", ticks={1: "1", 10: "10"})
    other = Panel(title="t", x_label="x", y_label="y", curves=curves[:1], x_scale="log")
    files = [draw(name, [each], columns=1, directory=tmp_path) for name, each in zip("pqr", (panel, panel, other))]  # noqa: B905
    first, again, differing = (file.read_bytes() for file in files)
    assert first == again != differing
