"""Which checkpoints are found, in which order, and at which steps."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import ckavg
from ckavg.checkpoints.inspect import inspect_run
from ckavg.checkpoints.run import Selection
from ckavg.errors import CombinedError, DuplicateStepError, MismatchError, MissingShardError, NoCheckpointsError
from tests.runs import write_checkpoint, write_run

WEIGHTS = {"w": torch.arange(6.0)}


def steps_of(root: Path, **selection: int) -> tuple[int, ...]:
    return ckavg.open_run(root, **selection).steps  # type: ignore[arg-type]


def test_steps_compare_as_numbers(tmp_path: Path) -> None:
    write_run(tmp_path, [WEIGHTS] * 4, (1000, 200, 0, 30))
    assert steps_of(tmp_path) == (0, 30, 200, 1000)


@pytest.mark.parametrize(
    "names",
    [
        ("step_5", "step_10", "step_100"),
        ("step-5", "step-10", "step-100"),
        ("step5", "step10", "step100"),
        ("global_step_5", "global_step_10", "global_step_100"),
        ("iter_0000005", "iter_0000010", "iter_0000100"),
        ("stage1-step5-tokens1B", "stage1-step10-tokens2B", "stage1-step100-tokens20B"),
        ("5", "10", "100"),
    ],
)
def test_directory_names(tmp_path: Path, names: tuple[str, ...]) -> None:
    for name in names:
        write_checkpoint(tmp_path / name, WEIGHTS)
    assert steps_of(tmp_path) == (5, 10, 100)


@pytest.mark.parametrize("pattern", ["step_{}", "model-step-{}", "{}", "model_step{}"])
def test_flat_files(tmp_path: Path, pattern: str) -> None:
    for step in (100, 5, 20):
        save_file(WEIGHTS, tmp_path / f"{pattern.format(step)}.safetensors")
    assert steps_of(tmp_path) == (5, 20, 100)


def test_shards_of_one_model_are_not_steps(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "model", WEIGHTS | {"v": torch.ones(2)}, shards=2)
    with pytest.raises(NoCheckpointsError, match="is one checkpoint, not a directory"):
        ckavg.open_run(tmp_path / "model")


def test_trainer_state_states_the_step(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "checkpoint-1", WEIGHTS, step=100)
    write_checkpoint(tmp_path / "checkpoint-2", WEIGHTS, step=200)
    write_checkpoint(tmp_path / "checkpoint-3", WEIGHTS)
    run = ckavg.open_run(tmp_path)
    assert run.steps == (3, 100, 200)
    assert any("checkpoint-1: trainer_state.json says step 100" in warning for warning in run.warnings)


def test_epochs_with_a_stated_step_are_ordered_by_it(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "epoch_2", WEIGHTS, step=50)
    write_checkpoint(tmp_path / "checkpoint-75", WEIGHTS, step=75)
    assert steps_of(tmp_path) == (50, 75)


@pytest.mark.parametrize(("pattern", "word"), [("epoch_{}", "epochs"), ("checkpoint_{}", "saves")])
def test_other_clocks_are_said(tmp_path: Path, pattern: str, word: str) -> None:
    for number in (0, 1, 10):
        write_checkpoint(tmp_path / pattern.format(number), WEIGHTS)
    run = ckavg.open_run(tmp_path)
    assert run.steps == (0, 1, 10)
    assert any(f"count {word}, not optimizer steps" in warning for warning in run.warnings)


@pytest.mark.parametrize("text", ["", "not json", "[]", '{"global_step": "7"}', '{"global_step": -7}'])
def test_useless_trainer_state_leaves_the_name(tmp_path: Path, text: str) -> None:
    write_run(tmp_path, [WEIGHTS] * 2, (10, 20))
    (tmp_path / "checkpoint-20" / "trainer_state.json").write_text(text)
    run = ckavg.open_run(tmp_path)
    assert run.steps == (10, 20)
    assert any("checkpoint-20: trainer_state.json" in warning for warning in run.warnings)


def test_everything_else_in_the_directory_is_ignored(tmp_path: Path) -> None:
    write_run(tmp_path, [WEIGHTS] * 2, (10, 20))
    write_checkpoint(tmp_path / ".checkpoint-15.partial", WEIGHTS)
    (tmp_path / "runs").mkdir()
    (tmp_path / "2024").mkdir()
    (tmp_path / "README.md").write_text("a card")
    save_file(WEIGHTS, tmp_path / "model.safetensors")  # the Trainer saves its final model here
    assert steps_of(tmp_path) == (10, 20)


def test_results_are_never_taken_for_checkpoints(tmp_path: Path) -> None:
    write_run(tmp_path, [WEIGHTS] * 3, (10, 20, 30))
    run = ckavg.open_run(tmp_path)
    ckavg.average(run, ckavg.EMA())
    ckavg.average(run, ckavg.EMA(), out=tmp_path / "checkpoint-40")
    assert steps_of(tmp_path) == (10, 20, 30)


def test_adapters(tmp_path: Path) -> None:
    for step in (1, 2):
        directory = tmp_path / f"checkpoint-{step}"
        directory.mkdir()
        save_file({"lora_A": torch.ones(2, 3) * step}, directory / "adapter_model.safetensors")
        (directory / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "owner/base", "r": 2}))
    run = ckavg.open_run(tmp_path)
    assert [checkpoint.kind for checkpoint in run.checkpoints] == ["adapter", "adapter"]
    result = ckavg.average(run, ckavg.EMA())
    assert {"adapter_config.json", "adapter_model.safetensors"} <= set(result.outputs[0].files)
    card = (result.directory / "README.md").read_text()
    assert 'base_model: "owner/base"' in card
    assert 'library_name: "peft"' in card


@pytest.mark.parametrize(
    ("selection", "expected"),
    [
        ({"from_step": 200}, (200, 300, 400, 500)),
        ({"to_step": 300}, (100, 200, 300)),
        ({"last": 2}, (400, 500)),
        ({"last": 99}, (100, 200, 300, 400, 500)),
        ({"every": 200}, (100, 300, 500)),
        ({"every": 200, "from_step": 200}, (200, 400)),
        ({"every": 100, "every_from": 250}, (100, 300)),
        ({"every": 200, "every_from": 300}, (100, 300, 500)),
    ],
)
def test_selection(tmp_path: Path, selection: dict[str, int], expected: tuple[int, ...]) -> None:
    write_run(tmp_path, [WEIGHTS] * 5, (100, 200, 300, 400, 500))
    assert steps_of(tmp_path, **selection) == expected


def test_what_is_left_out_is_not_looked_at(tmp_path: Path) -> None:
    write_run(tmp_path, [WEIGHTS] * 3, (10, 20, 30))
    (tmp_path / "checkpoint-30" / "model.safetensors").write_bytes(b"still being written")
    assert steps_of(tmp_path, to_step=20) == (10, 20)


def test_every_counts_from_an_anchor_of_its_own(tmp_path: Path) -> None:
    base = write_checkpoint(tmp_path / "base", WEIGHTS)
    write_run(tmp_path / "run", [WEIGHTS] * 5, (50, 100, 150, 200, 250))
    run = ckavg.open_run(tmp_path / "run", init=base, every=100)
    assert run.steps == (0, 100, 200)
    assert run.anchor_is_init


def test_inspection_returns_problems_beside_what_is_sound(tmp_path: Path) -> None:
    write_run(tmp_path, [WEIGHTS] * 3, (10, 20, 30))
    write_checkpoint(tmp_path / "step_20", WEIGHTS)
    (tmp_path / "checkpoint-30" / "model.safetensors").unlink()
    found = inspect_run(tmp_path, Selection())
    assert [checkpoint.step for checkpoint in found.checkpoints] == [10, 20, 20]
    assert [type(problem) for problem in found.problems] == [DuplicateStepError, MissingShardError]
    with pytest.raises(CombinedError, match="2 problems"):
        ckavg.open_run(tmp_path)


def test_a_second_model_beside_the_first_is_said(tmp_path: Path) -> None:
    write_run(tmp_path, [WEIGHTS] * 2, (1, 2))
    save_file({"other": torch.ones(3)}, tmp_path / "checkpoint-2" / "model_1.safetensors")
    run = ckavg.open_run(tmp_path)
    assert any("neither averaged nor copied: model_1.safetensors" in warning for warning in run.warnings)


@pytest.mark.parametrize(("changed", "advice"), [(0, "--from-step 20"), (1, "--from-step 30"), (2, "--to-step 30")])
def test_advice_on_a_change_of_shape_leaves_a_run(tmp_path: Path, changed: int, advice: str) -> None:
    weights = [{"w": torch.ones(3 if place <= changed else 4)} for place in range(4)]
    write_run(tmp_path, weights, (10, 20, 30, 40))
    with pytest.raises(MismatchError, match=advice):
        ckavg.open_run(tmp_path)
