"""What the evidence of trained models rests on: one judge for all, nothing lost on the way, and careful verdicts."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import ckavg
from benchmarks.evidence import (
    adapters,
    language_model_tables,
    pretraining,
    pretraining_run,
    search,
    small_model_run,
    small_model_tables,
)
from benchmarks.evidence.language_model_figures import draw_all
from benchmarks.evidence.language_model_judge import Judge
from benchmarks.evidence.language_model_run import (
    BASE,
    LAST,
    PER_TENSOR,
    SCHEMES,
    Cell,
    Outcome,
    Setting,
    judge_all,
    path_of,
)
from benchmarks.evidence.language_model_tables import BEST_EMA, by_setting
from benchmarks.evidence.saved import open_saved
from benchmarks.evidence.small_model_run import SmallCell, SmallJudge, fine_tune, pieces
from benchmarks.evidence.tables import RESULTS, Difference, read_table, stored
from ckavg.demo import LlamaShape, initialised_llama, load_model, write_checkpoint
from ckavg.path.table import PathLength, TensorPath, TensorPaths

TINY = Setting(steps=8, warm_up=0, frequencies=(2, 4), windows=3)
SHAPE = LlamaShape(hidden_size=16, intermediate_size=16, num_hidden_layers=1, max_position_embeddings=64)
PRETRAINING = pretraining_run.Setting(
    steps=12, save_every=3, windows=(50,), warm_up=2, batch=2, seeds=(0, 1, 2), shape=SHAPE
)
WINDOWS = [[5, 1, 2, 8, 3], [4, 4, 0, 1, 9], [2, 7, 7, 6, 0]]
TEXT = "".join(f"{place}: to be or not to be {place * place}\n" for place in range(400))
JUDGED = {(0, BASE), (0, LAST), (2, PER_TENSOR), *((every, name) for every in (2, 4) for name in SCHEMES)}


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """As studies of small models do: their steps are too small to be split."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


# --- the search ---


def test_gains_of_all_runs_are_added_before_they_are_compared() -> None:
    rich = search.Found("rich", 2.0, ("mean", 0.5), 70, ("ema", 0.4), ("last", 0.0), (12, 11), (1.0, 1.0))
    poor = search.Found("poor", 2.0, ("mean", 0.0), 70, ("ema", 0.05), ("soup", 0.2), (11, 11), (1.0, 1.0))
    table = search.table_of([rich, poor])
    gains = [table.columns.index(f"gain of the {each}") for each in ("grid", "search", "soup")]
    assert [table.rows[2][place] for place in gains] == pytest.approx([0.5, 0.45, 0.2])
    assert [table.rows[3][place] for place in gains] == pytest.approx([1.0, 0.9, 0.4])
    assert {len(row) for row in table.rows} == {len(table.columns)}


# --- pretraining ---


def test_a_branch_that_does_not_decay_is_the_stable_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pretraining_run, "DECAYS", {"none": lambda x: 1.0, "stop": lambda x: 0.0})
    ends = pretraining_run.train(tmp_path / "0", PRETRAINING, 0)
    run = tmp_path / "0" / "run"
    assert sorted(int(each.name.split("-")[1]) for each in run.iterdir()) == [0, 3, 6, 9, 12]
    for which, step in (("none", 12), ("stop", 6)):
        branch = load_file(ends[which, 50] / "model.safetensors")
        stable = load_file(run / f"checkpoint-{step}" / "model.safetensors")
        assert all(torch.equal(branch[name], stable[name]) for name in stable)


def test_all_of_pretraining_is_judged() -> None:
    losses = pretraining.judge(PRETRAINING, 0)
    assert all(4.5 < loss < 5.8 for loss in losses.values())  # ln 256 = 5.55 knows nothing
    assert losses["merged linear 50"] != losses["last"] != losses["decayed linear 50"]
    assert len(pretraining.panels_of(PRETRAINING, {name: [loss, loss] for name, loss in losses.items()})) == 3


def test_the_tables_of_pretraining_follow_from_the_losses_of_the_seeds() -> None:
    rows = read_table(RESULTS / "pretraining-seeds.csv").rows
    losses = {str(name): [float(str(loss)) for loss in row] for name, *row in rows}
    for table in pretraining.tables_of(pretraining_run.Setting(), losses)[1:]:
        cells = tuple(tuple(map(stored, row)) for row in table.rows)
        assert cells == read_table(RESULTS / f"{table.name}.csv").rows


# --- a small model: training and judging ---


@pytest.fixture
def base(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(small_model_run, "plays", lambda *, held_out: [TEXT[:6_000]] if held_out else [TEXT])
    model = initialised_llama(SHAPE, generator=torch.Generator().manual_seed(0))
    (tmp_path / "pretraining").mkdir()
    return write_checkpoint(tmp_path / "pretraining", 0, model, {"global_step": 0})


def test_every_piece_is_judged_by_the_loss_that_is_trained_on(base: Path) -> None:
    judged, model = pieces(TINY.windows), load_model(base)
    assert [piece.shape for piece in judged] == [(32, 65)] * 3
    assert not torch.equal(judged[0], judged[1])
    assert SmallJudge(judged).losses(base) == pytest.approx([model.loss(piece).item() for piece in judged], rel=1e-5)


def test_a_run_begins_with_the_base_and_is_that_of_its_seed(base: Path, tmp_path: Path) -> None:
    cells = {"one": SmallCell(learning_rate=1e-2), "again": SmallCell(learning_rate=1e-2)}
    cells |= {"other": SmallCell(learning_rate=1e-2, seed=1), "none": SmallCell(learning_rate=0.0)}
    weights = {"base": load_model(base).state_dict()["model.embed_tokens.weight"]}
    for name, cell in cells.items():
        fine_tune(tmp_path / name, base, cell, TINY)
        run = tmp_path / name / "run"
        assert sorted(int(each.name.partition("-")[2]) for each in run.iterdir()) == [2, 4, 6, 8]
        weights[name] = load_model(run / "checkpoint-8").state_dict()["model.embed_tokens.weight"]
    equal = {(one, other) for one in weights for other in weights if torch.equal(weights[one], weights[other])}
    assert equal == {(name, name) for name in weights} | {
        ("none", "base"), ("base", "none"), ("one", "again"), ("again", "one"),
    }  # fmt: skip


# --- a language model: training and judging ---


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama with tied embeddings, and checkpoints that drift away from it at random."""
    transformers = pytest.importorskip("transformers")
    directory = tmp_path_factory.mktemp("run")
    config = transformers.LlamaConfig(
        vocab_size=10, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2,
        max_position_embeddings=8, tie_word_embeddings=True, bos_token_id=0, eos_token_id=1,
    )  # fmt: skip
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(config).to(torch.bfloat16)
    model.save_pretrained(directory / "base")
    for step in range(2, TINY.steps + 1, 2):
        with torch.no_grad():
            for parameter in model.parameters():
                parameter += 0.3 * torch.randn_like(parameter)
        model.save_pretrained(directory / "run" / f"checkpoint-{step}")
    return directory


@pytest.fixture
def outcome(run: Path) -> Outcome:
    found = Outcome(Cell(learning_rate=1e-3))
    judge_all(run, TINY, Judge(run / "base", WINDOWS, at_once=2), found)
    return found


def plain_losses(directory: Path) -> list[float]:
    """Each window by itself, by the loss that transformers computes."""
    transformers: Any = pytest.importorskip("transformers")
    model = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32, local_files_only=True)
    batches = [torch.tensor([window]) for window in WINDOWS]
    return [model(input_ids=batch, labels=batch).loss.item() for batch in batches]


def test_the_judge_agrees_with_transformers(run: Path) -> None:
    judge = Judge(run / "base", WINDOWS, at_once=2)
    for directory in (run / "run" / "checkpoint-8", run / "base", run / "run" / "checkpoint-2"):
        assert judge.losses(directory) == pytest.approx(plain_losses(directory), rel=1e-6)


def test_what_is_judged_are_the_averages_of_ckavg(run: Path, outcome: Outcome, tmp_path: Path) -> None:
    assert set(outcome.losses) == JUDGED
    assert outcome.losses[0, LAST] == pytest.approx(plain_losses(run / "run" / "checkpoint-8"), rel=1e-6)
    for every, name in ((2, "PEMA 0.15"), (4, "BEMA 0.2, 0.5"), (4, "mean")):
        opened = open_saved(run, every=every)
        average = ckavg.average(opened, SCHEMES[name], out=tmp_path / f"{every} {name}", dtype="float32")
        assert outcome.losses[every, name] == pytest.approx(plain_losses(average.directory), rel=1e-6)
        if average.path_length:
            assert outcome.paths[every]["path_length"] == pytest.approx(average.path_length[1:])
            assert outcome.paths[every]["PEMA 0.15"] == pytest.approx(average.betas[1:])
    assert not (run / "averages").exists()


def test_the_path_and_how_its_tensors_differ() -> None:
    tensors = {"a": TensorPath(2, 0.5, (1.0, 1.0)), "b": TensorPath(6, 1.0, (3.0, 9.0))}
    tensors["one"] = TensorPath(1, 0.0, (9, 9))
    found = path_of(PathLength((0, 5, 10), TensorPaths.of(tensors), "exclude", 0))
    assert found["path_length"] == pytest.approx([(2 + 3) / 8, (4 + 12) / 8])
    assert found["PEMA 0.15"] == pytest.approx([(1 + 10 * 2 * length) ** -0.15 for length in (0.625, 2.0)])
    assert found["EMA 0.15"] == pytest.approx([6**-0.15, 11**-0.15])
    # ℓ_a is 1, then 2, and ℓ_b 0.5, then 2: of their ends they have gone a half and a quarter at first.
    assert found["spread"] == pytest.approx([math.sqrt(0.125) / 0.75, 0.0])
    assert found["uneven"] == pytest.approx([math.sqrt(0.03125) / 0.375, 0.0])


# --- tables and figures of both ---


def planted(cell: Cell, last: Sequence[float], offsets: dict[str, float], noise: Sequence[float]) -> Outcome:
    """A run whose averages are off from its last checkpoint by so much, give or take some noise by window."""
    outcome = Outcome(cell, losses={(0, BASE): [loss + 0.5 for loss in last], (0, LAST): list(last)})
    for every, name in JUDGED - set(outcome.losses):
        off = offsets.get(name, 0.0)
        outcome.losses[every, name] = [loss + off + part for loss, part in zip(last, noise, strict=True)]
    for every in TINY.frequencies:
        steps = [float(step) for step in range(every, TINY.steps + 1, every)]
        lengths = [cell.learning_rate * step for step in steps]
        of_step = dict.fromkeys(("path_length", "PEMA 0.15", "EMA 0.15"), lengths)
        outcome.paths[every] = {"step": steps, **of_step, "spread": [0.5] * len(steps), "uneven": [0.2] * len(steps)}
    outcome.tensor_paths = {"0.mlp.up_proj.weight": 1.0, "1.mlp.up_proj.weight": 2.0}
    outcome.tensor_paths |= {"0.q_proj.weight": 3.0, "norm.weight": 10.0}
    return outcome


OFFSETS = {"PEMA 0.15": -0.05, "mean": 0.3}
LANGUAGE = [  # windows differ by far more than averages
    planted(
        Cell(learning_rate=0.1, seed=seed),
        [3.0, 4.0, 5.0],
        OFFSETS | {"EMA 0.10": -0.1 + 0.001 * seed},
        [0.001, -0.001, 0.0],
    )
    for seed in range(3)
]
SMALL = [  # seeds differ by far more than averages
    planted(SmallCell(learning_rate=rate, seed=seed), [2.0 + seed], offsets, [0.001 * seed])
    for rate, offsets in ((0.1, {"EMA 0.10": -0.1, "EMA 0.20": -0.08}), (0.2, {"EMA 0.20": -0.3, "PEMA 0.15": -0.29}))
    for seed in range(4)
]


@pytest.mark.parametrize(
    ("values", "told"),
    [
        ([0.02, -0.01, 0.02], "0.010 ± 0.010 (?)"),  # three values decide from 9.92 standard errors on
        ([-0.5, -0.5, -0.50001], "-0.5000033 ± 0.0000033"),
        ([0.0, 0.0, 0.0], "0 ± 0 (?)"),
        ([-0.1, -0.1, -0.1], "-0.1 ± 0"),
    ],
)
def test_few_values_decide_little(values: list[float], told: str) -> None:
    assert Difference.of(values).marked == told


def test_a_difference_is_taken_window_by_window() -> None:
    found = language_model_tables.difference(LANGUAGE[0], "PEMA 0.15", LAST, 2)
    assert (found.mean, found.error) == pytest.approx((-0.05, 0.001 / math.sqrt(3)))
    assert found.verdict == "lower"
    assert language_model_tables.difference(LANGUAGE[0], "mean", LAST, 4).verdict == "higher"
    assert language_model_tables.difference(LANGUAGE[0], "PEMA 0.15", BEST_EMA, 2).mean == pytest.approx(0.05)


def test_a_difference_is_taken_within_seeds_and_the_best_power_over_all() -> None:
    calm, noisy = by_setting(SMALL).values()
    assert [small_model_tables.best_of(group, 2) for group in (calm, noisy)] == ["EMA 0.10", "EMA 0.20"]
    found = small_model_tables.difference(noisy, "PEMA 0.15", BEST_EMA, 4)
    assert (found.mean, found.error, found.count) == pytest.approx((0.01, 0.0, 4), abs=1e-12)
    against_last = small_model_tables.difference(calm, BEST_EMA, LAST, 2)
    assert (against_last.mean, against_last.error) == pytest.approx((-0.0985, 0.001 * math.sqrt(5 / 3) / 2))
    assert against_last.verdict == "lower"
    assert small_model_tables.difference(calm, "DEMA", LAST, 2).verdict == "undecided"


def test_tables_of_language_models() -> None:
    tables = {table.name[15:]: table.rows for table in language_model_tables.tables_of(TINY, LANGUAGE)}
    pairs = {row[:2]: row[2:] for row in tables["pairs"]}
    assert pairs["PEMA 0.15 − best EMA", 2] == (0, 3, 0, "+0.048", "+0.05", "0.04900 ± 0.00058", "higher")
    assert (f"{PER_TENSOR} − PEMA 0.15", 2) in pairs
    assert (f"{PER_TENSOR} − PEMA 0.15", 4) not in pairs
    assert tables["powers"][0][:7] == pytest.approx(("0.1", 2, 0.8, 8 * 0.8**2, 0.8, "0.10", "0.15"))
    spreads = (100 * math.sqrt(50 / 3) / 4, 50.0, 100 * math.sqrt(0.5) / 1.5)
    assert tables["runs"][0] == pytest.approx(("0.1", 4.0, "-0.5 ± 0", 0.8, 0.8, *spreads, 20.0))
    assert {row[0]: row[1] for row in tables["every-2"]}["PEMA 0.15"] == "-0.05000 ± 0.00058"
    assert tables["windows"][0] == ("0.1", "", BASE, 4.5, 3.5, 4.5, 5.5)


def test_tables_of_small_models_count_cells() -> None:
    tables = {table.name[12:]: table.rows for table in small_model_tables.tables_of(TINY, SMALL)}
    pairs = {row[:2]: row[2:] for row in tables["pairs"]}
    assert pairs["PEMA 0.15 − best EMA", 2] == (0, 2, 0, "+0.01", "+0.1")
    assert pairs[f"{BEST_EMA} − {LAST}", 4] == (2, 0, 0, "-0.3", "-0.099")
    assert [row[:2] for row in tables["cells"]] == [("0.1", 2), ("0.1", 4), ("0.2", 2), ("0.2", 4)]
    assert tables["cells"][2][2:7] == pytest.approx((1.6, 8 * 1.6**2, 1.6, "0.20", "0.15"))
    assert tables["runs"][0] == ("0.1", 3.5, "-0.5 ± 0", 0.8, 0.8, 50.0, 20.0)
    behind = {row[0]: row[1:] for row in tables["shortfalls"]}
    assert behind["EMA 0.20"] == pytest.approx((0.01, 0.02) * 2)
    assert behind[LAST] == pytest.approx((0.2 - 0.0015, 0.3 - 0.0015) * 2)
    assert {row[0]: row[1] for row in tables["every-2"]}["EMA 0.10"] == "-0.09850 ± 0.00065"
    assert len(tables["losses"]) == 8 * len(JUDGED)


def test_all_figures_are_drawn(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    draw_all(TINY, LANGUAGE, tmp_path)
    small_model_tables.draw_all(TINY, SMALL, tmp_path)
    drawn = sorted(file.name for file in tmp_path.iterdir() if file.stat().st_size > 10_000)
    studies = ("language_model", "small_model")
    assert drawn == [f"{study}-{name}.png" for study in studies for name in ("frequency", "paths", "powers")]


# --- adapters ---


def test_the_table_of_adapters_compares_window_by_window() -> None:
    outcome = adapters.Outcome(adapters.Cell(8, 5e-4))
    outcome.losses = {(adapters.LAST, ""): [3.0, 4.0, 5.0], ("mean", adapters.FACTORS): [2.0, 3.5, 4.0]}
    outcome.losses["mean", adapters.TRUNCATED] = [1.0, 2.5, 3.0]
    outcome.ranks = dict.fromkeys(outcome.losses, 8)
    outcome.discarded["mean", adapters.TRUNCATED] = 0.25
    last, factors, cut = adapters.table_of([outcome]).rows
    assert last[:5] == ("rank 8, rate 0.0005", "last", "", 8, 4.0)
    assert factors[4] == pytest.approx(9.5 / 3)
    assert factors[5:] == (f"{Difference(-2.5 / 3, 1 / 6, 3)} (?)", None, None)
    assert cut[6:] == ("-1 ± 0", 25.0)


def test_adapters_of_the_document_are_those_of_the_study() -> None:
    rows = {row[:3]: row for row in read_table(RESULTS / "adapters.csv").rows}
    assert len(rows) == len(adapters.Setting().cells) * (1 + 2 * 3)
    text = (RESULTS.parent / "evidence.md").read_text(encoding="utf-8")
    for cell in adapters.Setting().cells:
        for scheme in adapters.SCHEMES:
            lost = float(str(rows[cell.name, scheme, adapters.TRUNCATED][7]))
            shown = f"| {cell.rank}, {cell.learning_rate:g} | {scheme} | "
            (line,) = [each for each in text.splitlines() if each.startswith(shown)]
            assert line.endswith(f"| {lost:.2g} % |")
