"""What the evidence of language models rests on: one judge for all, nothing lost on the way, and careful verdicts."""

from __future__ import annotations

import dataclasses
import doctest
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import ckavg
from benchmarks import finetune
from benchmarks.evidence import language_model, language_model_run, language_model_tables
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
    fine_tuning,
    judge_all,
    path_of,
)
from benchmarks.evidence.language_model_tables import BEST_EMA, Difference, difference, tables_of
from benchmarks.evidence.saved import open_saved
from ckavg.path.table import PathLength, TensorPath

TINY = Setting(steps=8, warm_up=0, frequencies=(2, 4), windows=3)
WINDOWS = [[5, 1, 2, 8, 3], [4, 4, 0, 1, 9], [2, 7, 7, 6, 0]]


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
    judge_all(run, TINY, Judge(run / "base", WINDOWS, at_once=2), found, lambda _: None)
    return found


def plain_losses(directory: Path) -> list[float]:
    """Each window by itself, by the loss that transformers computes."""
    transformers: Any = pytest.importorskip("transformers")
    model = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32, local_files_only=True)
    batches = [torch.tensor([window]) for window in WINDOWS]
    return [model(input_ids=batch, labels=batch).loss.item() for batch in batches]


# --- judging ---


def test_the_judge_agrees_with_transformers_on_every_model(run: Path) -> None:
    judge = Judge(run / "base", WINDOWS, at_once=2)
    for directory in (run / "run" / "checkpoint-8", run / "base", run / "run" / "checkpoint-2"):
        assert judge.losses(directory) == pytest.approx(plain_losses(directory), rel=1e-6)


def test_the_judge_refuses_other_tensors(run: Path, tmp_path: Path) -> None:
    tensors = load_file(run / "base" / "model.safetensors")
    tensors["other"] = tensors.pop("model.norm.weight")
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=r"\['model.norm.weight'\], \['other'\]"):
        Judge(run / "base", WINDOWS).losses(tmp_path)


def test_what_is_judged_are_the_averages_of_ckavg(run: Path, outcome: Outcome, tmp_path: Path) -> None:
    of_every = {0: {BASE, LAST}, 2: {*SCHEMES, PER_TENSOR}, 4: {*SCHEMES}}
    assert set(outcome.losses) == {(every, name) for every, names in of_every.items() for name in names}
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
    tensors = {
        "a": TensorPath(2, 0.5, (1.0, 1.0)),
        "b": TensorPath(6, 1.0, (3.0, 9.0)),
        "one": TensorPath(1, 0.0, (9, 9)),
    }
    found = path_of(PathLength((0, 5, 10), tensors, "exclude", 0))
    assert found["path_length"] == pytest.approx([(2 + 3) / 8, (4 + 12) / 8])
    assert found["PEMA 0.15"] == pytest.approx([(1 + 10 * 2 * length) ** -0.15 for length in (0.625, 2.0)])
    assert found["EMA 0.15"] == pytest.approx([6**-0.15, 11**-0.15])
    # ℓ_a is 1, then 2, and ℓ_b 0.5, then 2: of their ends they have gone a half and a quarter at first.
    assert found["spread"] == pytest.approx([math.sqrt(0.125) / 0.75, 0.0])
    assert found["uneven"] == pytest.approx([math.sqrt(0.03125) / 0.375, 0.0])


# --- training ---


@pytest.mark.parametrize(
    ("cell", "rates"),
    [
        (Cell(learning_rate=2.0), [0.0, 1.0, 2.0, 2.0, 2.0, 2.0, 2.0]),
        (Cell(learning_rate=2.0, minimum=0.1), [0.0, 1.0, 2.0, 1.73639610, 1.1, 0.46360390, 0.2]),
    ],
)
def test_the_rate_rises_stays_or_falls_to_its_minimum(cell: Cell, rates: list[float]) -> None:
    transformers: Any = pytest.importorskip("transformers")
    settings = fine_tuning(cell, dataclasses.replace(TINY, steps=6, warm_up=2))
    told = finetune.schedule_of(settings)
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=settings.learning_rate)
    scheduler = transformers.get_scheduler(
        told["lr_scheduler_type"],
        optimizer,
        num_warmup_steps=told["warmup_steps"],
        num_training_steps=settings.steps,
        scheduler_specific_kwargs=told.get("lr_scheduler_kwargs"),
    )
    found = []
    for _ in rates:
        found.append(scheduler.get_last_lr()[0])
        optimizer.step()
        scheduler.step()
    assert found == pytest.approx(rates)


def test_the_size_of_the_papers_is_a_change_of_settings() -> None:
    settings = fine_tuning(language_model_run.PAPERS.cells[0], language_model_run.PAPERS)
    assert (settings.steps, settings.every, settings.batch, settings.device) == (1800, 50, 256, "cuda")


# --- keeping ---


def test_what_is_kept_comes_back_and_is_not_made_again(outcome: Outcome, tmp_path: Path) -> None:
    setting = dataclasses.replace(TINY, cells=(outcome.cell,))
    file = tmp_path / f"{outcome.cell.label}.json"
    file.write_text(outcome.to_json(setting), encoding="utf-8")
    assert language_model.outcomes(setting, tmp_path, processes=1) == [outcome]
    assert language_model.kept(outcome.cell, dataclasses.replace(setting, windows=4), tmp_path) is None
    assert language_model.kept(dataclasses.replace(outcome.cell, seed=1), setting, tmp_path) is None
    outcome.complete = False
    file.write_text(outcome.to_json(setting), encoding="utf-8")
    assert language_model.kept(outcome.cell, setting, tmp_path) is None


def test_a_missing_package_is_told_and_nothing_begun(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(language_model, "TO_TRAIN", ("no_such_package",))
    assert language_model.main([]) == 1
    assert "Not installed: no_such_package." in capsys.readouterr().err


# --- telling ---


def planted(seed: int, offsets: dict[str, float], noise: Sequence[float] = (0.001, -0.001, 0.0)) -> Outcome:
    """A run whose averages are off from its last checkpoint by so much, give or take some noise over the windows."""
    outcome = Outcome(Cell(learning_rate=1e-3, seed=seed), complete=True)
    text = [3.0, 4.0, 5.0]  # the windows differ by far more than the averages

    def losses(offset: float) -> list[float]:
        return [loss + offset + part for loss, part in zip(text, noise, strict=True)]

    outcome.losses = {(0, BASE): losses(0.5), (0, LAST): text}
    for every in TINY.frequencies:
        names = [*SCHEMES, PER_TENSOR] if every == TINY.frequencies[0] else [*SCHEMES]
        outcome.losses |= {(every, name): losses(offsets.get(name, 0.0)) for name in names}
        steps = list(range(every, TINY.steps + 1, every))
        of_step = {key: [0.1 * step for step in steps] for key in ("path_length", "PEMA 0.15", "EMA 0.15")}
        outcome.paths[every] = {"step": list(map(float, steps)), **of_step, "spread": [0.5 for _ in steps]}
        outcome.paths[every]["uneven"] = [0.2 for _ in steps]
    outcome.tensor_paths = {"0.mlp.up_proj.weight": 1.0, "1.mlp.up_proj.weight": 2.0}
    outcome.tensor_paths |= {"0.q_proj.weight": 3.0, "norm.weight": 10.0}
    return outcome


PLANTED = [planted(seed, {"EMA 0.10": -0.1 + 0.001 * seed, "PEMA 0.15": -0.05, "mean": 0.3}) for seed in range(3)]


def test_a_difference_is_taken_window_by_window() -> None:
    found = difference(PLANTED[0], "PEMA 0.15", LAST, 2)
    assert (found.mean, found.error) == pytest.approx((-0.05, 0.001 / math.sqrt(3)))
    assert found.verdict == "lower"
    assert difference(PLANTED[0], "DEMA", LAST, 2).verdict == "undecided"
    assert difference(PLANTED[0], "mean", LAST, 4).verdict == "higher"
    assert difference(PLANTED[0], "PEMA 0.15", BEST_EMA, 2).mean == pytest.approx(0.05)  # EMA 0.10 is the best
    assert Difference(0.0, 0.0, 3).verdict == "undecided"
    assert Difference(-0.1, 0.0, 3).verdict == "lower"


def test_tables_count_runs_and_tell_what_seeds_agree_on() -> None:
    tables = {table.name.removeprefix("language_model-"): table for table in tables_of(TINY, PLANTED)}
    pairs = {row[:2]: row[2:] for row in tables["pairs"].rows}
    assert pairs["PEMA 0.15 − best EMA", 2] == (0, 3, 0, "+0.048", "+0.05", "0.04900 ± 0.00058", "higher")
    assert pairs["DEMA − last", 4][:3] == (0, 0, 3)
    assert (f"{PER_TENSOR} − PEMA 0.15", 2) in pairs
    assert (f"{PER_TENSOR} − PEMA 0.15", 4) not in pairs
    assert tables["powers"].rows[0][:2] == ("0.001", 2)
    assert tables["powers"].rows[0][2:7] == pytest.approx((0.8, 8 * 0.8**2, 0.8, "0.10", "0.15"))
    spreads = (100 * math.sqrt(50 / 3) / 4, 50.0, 100 * math.sqrt(0.5) / 1.5)
    assert tables["runs"].rows[0] == pytest.approx(("0.001", 4.0, "-0.50000 ± 0.00058", 0.8, 0.8, *spreads, 20.0))
    column = {row[0]: row[1] for row in tables["every-2"].rows}
    assert (column["PEMA 0.15"], column["DEMA"]) == ("-0.05000 ± 0.00058", "0.00000 ± 0.00058 (?)")
    assert tables["windows"].rows[0] == ("0.001", "", BASE, 4.5, 3.501, 4.499, 5.5)


@pytest.mark.parametrize("cells", [1, 5, 8])
def test_all_figures_are_drawn(cells: int, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    found = [dataclasses.replace(PLANTED[0], cell=Cell(learning_rate=0.1 * rate)) for rate in range(1, cells + 1)]
    draw_all(TINY, found, tmp_path)
    drawn = sorted(file.name for file in tmp_path.iterdir() if file.stat().st_size > 10_000)
    assert drawn == [f"language_model-{name}.png" for name in ("frequency", "paths", "powers")]


def test_the_examples_in_docstrings() -> None:
    assert doctest.testmod(language_model_run).failed == doctest.testmod(language_model_tables).failed == 0
