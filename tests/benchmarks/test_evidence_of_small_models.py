"""What the evidence of small models rests on: every piece of text judged alike, and means over seeds."""

from __future__ import annotations

import dataclasses
import doctest
import math
from pathlib import Path

import pytest
import torch

from benchmarks.evidence import figures, small_model_run, small_model_tables
from benchmarks.evidence.language_model_run import BASE, LAST, PER_TENSOR, SCHEMES, Outcome, Setting
from benchmarks.evidence.language_model_tables import BEST_EMA, by_setting
from benchmarks.evidence.small_model_run import SmallCell, SmallJudge, carry_out_cell, fine_tune, pieces
from benchmarks.evidence.small_model_tables import best_of, difference, draw_all, tables_of
from ckavg.demo import LlamaShape, initialised_llama, load_model, write_checkpoint

pytestmark = pytest.mark.usefixtures("one_thread")

TINY = Setting(steps=8, warm_up=2, frequencies=(2, 4), windows=3)
SHAPE = LlamaShape(hidden_size=16, intermediate_size=16, num_hidden_layers=1, max_position_embeddings=64)
TEXT = "".join(f"{place}: to be or not to be {place * place}\n" for place in range(400))


@pytest.fixture(autouse=True)
def _plays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(small_model_run, "plays", lambda *, held_out: [TEXT[:6_000]] if held_out else [TEXT])


@pytest.fixture
def base(tmp_path: Path) -> Path:
    model = initialised_llama(SHAPE, generator=torch.Generator().manual_seed(0))
    (tmp_path / "pretraining").mkdir()
    return write_checkpoint(tmp_path / "pretraining", 0, model, {"global_step": 0})


def test_every_piece_is_judged_by_the_loss_that_is_trained_on(base: Path) -> None:
    judged, model = pieces(TINY.windows), load_model(base)
    assert [piece.shape for piece in judged] == [(32, 65)] * 3
    assert not torch.equal(judged[0], judged[1])
    expected = [model.loss(piece).item() for piece in judged]
    assert SmallJudge(judged).losses(base) == pytest.approx(expected, rel=1e-5)


def test_a_run_begins_with_the_base_and_is_that_of_its_seed(base: Path, tmp_path: Path) -> None:
    cells = {"one": SmallCell(learning_rate=1e-2), "again": SmallCell(learning_rate=1e-2)}
    cells |= {"other": SmallCell(learning_rate=1e-2, seed=1), "none": SmallCell(learning_rate=0.0)}
    weights = {}
    for name, cell in cells.items():
        fine_tune(tmp_path / name, base, cell, TINY)
        steps = sorted(int(each.name.partition("-")[2]) for each in (tmp_path / name / "run").iterdir())
        assert steps == [2, 4, 6, 8]
        weights[name] = load_model(tmp_path / name / "run" / "checkpoint-8").state_dict()["model.embed_tokens.weight"]
    begun = load_model(base).state_dict()["model.embed_tokens.weight"]
    assert torch.equal(weights["none"], begun)
    assert torch.equal(weights["one"], weights["again"])
    assert not torch.equal(weights["one"], begun)
    assert not torch.equal(weights["one"], weights["other"])


def test_all_averages_of_a_cell_are_judged(base: Path, tmp_path: Path) -> None:
    outcome = carry_out_cell(tmp_path / "cell", base, SmallCell(learning_rate=1e-2), TINY)
    of_every = {0: {BASE, LAST}, 2: {*SCHEMES, PER_TENSOR}, 4: {*SCHEMES}}
    assert set(outcome.losses) == {(every, name) for every, names in of_every.items() for name in names}
    assert outcome.loss(LAST) < outcome.loss("mean", 2) < outcome.loss(BASE)
    assert set(outcome.paths) == {2, 4}
    assert not (tmp_path / "cell" / "averages").exists()


def test_the_name_of_a_cell_leaves_out_what_is_usual() -> None:
    assert SmallCell(learning_rate=1e-3).name == "0.001"
    assert SmallCell(learning_rate=1e-3, minimum=0.1, batch=32, seed=1).name == "0.001 to 10 %, batch 32, seed 1"


def planted(rate: float, seed: int, offsets: dict[str, float]) -> Outcome:
    """A run whose averages are off from its last checkpoint by so much; seeds differ by more, and not in that."""
    outcome = Outcome(SmallCell(learning_rate=rate, seed=seed), complete=True)
    last = 2.0 + seed
    outcome.losses = {(0, BASE): [last + 1.0], (0, LAST): [last]}
    for every in TINY.frequencies:
        names = [*SCHEMES, PER_TENSOR] if every == TINY.frequencies[0] else [*SCHEMES]
        outcome.losses |= {(every, name): [last + offsets.get(name, 0.0) + 0.001 * seed] for name in names}
        steps = [float(step) for step in range(every, TINY.steps + 1, every)]
        of_step = {key: [rate * step for step in steps] for key in ("path_length", "PEMA 0.15", "EMA 0.15")}
        outcome.paths[every] = {"step": steps, **of_step, "spread": [0.5 for _ in steps], "uneven": steps}
    return outcome


PLANTED = [
    planted(rate, seed, offsets)
    for rate, offsets in ((0.1, {"EMA 0.10": -0.1, "EMA 0.20": -0.08}), (0.2, {"EMA 0.20": -0.3, "PEMA 0.15": -0.29}))
    for seed in range(4)
]


def test_differences_are_taken_within_seeds_and_the_best_power_over_all() -> None:
    calm, noisy = by_setting(PLANTED).values()
    assert (best_of(calm, 2), best_of(noisy, 2)) == ("EMA 0.10", "EMA 0.20")
    found = difference(noisy, "PEMA 0.15", BEST_EMA, 4)
    assert (found.mean, found.error) == pytest.approx((0.01, 0.0), abs=1e-12)
    assert found.count == 4
    against_last = difference(calm, BEST_EMA, LAST, 2)
    assert against_last.mean == pytest.approx(-0.1 + 0.0015)
    assert against_last.error == pytest.approx(0.001 * math.sqrt(5 / 3) / 2)
    assert against_last.verdict == "lower"
    assert difference(calm, "DEMA", LAST, 2).verdict == "undecided"


def test_tables_count_cells() -> None:
    tables = {table.name.removeprefix("small_model-"): table for table in tables_of(TINY, PLANTED)}
    pairs = {row[:2]: row[2:] for row in tables["pairs"].rows}
    assert pairs["PEMA 0.15 − best EMA", 2] == (0, 2, 0, "+0.01", "+0.1")
    assert pairs[f"{BEST_EMA} − {LAST}", 4] == (2, 0, 0, "-0.3", "-0.099")
    assert (f"{PER_TENSOR} − PEMA 0.15", 4) not in pairs
    cells = tables["cells"].rows
    assert [row[:2] for row in cells] == [("0.1", 2), ("0.1", 4), ("0.2", 2), ("0.2", 4)]
    assert cells[2][2:7] == pytest.approx((1.6, 8 * 1.6**2, 1.6, "0.20", "0.15"))
    assert tables["runs"].rows[0] == ("0.1", 3.5, "-1 ± 0", 0.8, 0.8, 50.0, 800.0)
    behind = {row[0]: row[1:] for row in tables["shortfalls"].rows}
    assert behind["EMA 0.20"] == pytest.approx((0.01, 0.02) * 2)
    assert behind[LAST] == pytest.approx((0.2 - 0.0015, 0.3 - 0.0015) * 2)
    column = {row[0]: row[1:] for row in tables["every-2"].rows}
    assert column["EMA 0.10"][0] == "-0.09850 ± 0.00065"
    assert column["DEMA"][1] == "0.00150 ± 0.00065 (?)"
    assert len(tables["losses"].rows) == 8 * (2 + 2 * len(SCHEMES) + 1)


def test_all_figures_are_drawn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("matplotlib")
    monkeypatch.setattr(
        small_model_tables,
        "draw",
        lambda name, panels, columns: figures.draw(name, panels, columns=columns, directory=tmp_path),
    )
    draw_all(dataclasses.replace(TINY, frequencies=(2, 4)), PLANTED)
    drawn = sorted(file.name for file in tmp_path.iterdir() if file.stat().st_size > 10_000)
    assert drawn == [f"small_model-{name}.png" for name in ("frequency", "paths", "powers")]


def test_the_examples_in_docstrings() -> None:
    assert doctest.testmod(small_model_run).failed == 0
