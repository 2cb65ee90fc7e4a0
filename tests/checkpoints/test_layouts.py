"""What the files of a run say besides their names: steps, clocks, kinds, and whether all are of one run."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import ckavg
from ckavg.checkpoints.inspect import inspect_run
from ckavg.checkpoints.run import Selection
from ckavg.errors import (
    CombinedError,
    DuplicateStepError,
    MismatchError,
    MissingShardError,
    NoCheckpointsError,
    UnsupportedFormatError,
)
from tests.runs import write_checkpoint, write_run
from tests.trainers import note, put

STEPS = (10, 20, 30)
MODEL, ADAPTER = "model.safetensors", "adapter_model.safetensors"
INDEX = "model.safetensors.index.json"


def weights(step: int) -> dict[str, Tensor]:
    return {"model.a": torch.arange(6.0) + step, "model.b": torch.full((2, 2), float(step))}


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return write_run(tmp_path / "run", [weights(step) for step in STEPS], STEPS)


def write_shards(directory: Path, names: Sequence[str], step: int, index: str | None = None) -> None:
    tensors = weights(step)
    placed = dict(zip(tensors, names, strict=True))
    for tensor, name in placed.items():
        put(directory / name, {tensor: tensors[tensor]}, {"format": "pt"})
    if index is not None:
        note(directory / index, {"metadata": {"total_size": 40}, "weight_map": placed})


def shards(stem: str, *numbers: int) -> tuple[str, ...]:
    return tuple(f"{stem}-0000{number}-of-00002.safetensors" for number in numbers)


@pytest.mark.parametrize(
    ("directory", "names", "index"),
    [
        ("checkpoint-{}", shards("model", 1, 2), INDEX),
        ("step_{}", shards("model", 1, 2), None),
        ("step{}", shards("model", 0, 1), None),
        ("epoch_{}", shards("ft-model", 1, 2), INDEX),
        ("epoch_{}", shards("ft-model", 1, 2), None),
        ("step_{}", shards("consolidated", 1, 2), None),
    ],
)
def test_shards(tmp_path: Path, directory: str, names: Sequence[str], index: str | None) -> None:
    for step in STEPS:
        write_shards(tmp_path / directory.format(step), names, step, index)
    run = ckavg.open_run(tmp_path)
    assert (run.steps, run.last.names) == (STEPS, names)
    result = ckavg.average(run, ckavg.Mean()).directory
    found = {name: each for file in result.glob("*.safetensors") for name, each in load_file(file).items()}
    assert found.keys() == weights(20).keys()
    assert all(torch.equal(found[name], each) for name, each in weights(20).items())


def test_shards_of_one_model_are_not_steps(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "model", weights(0), shards=2)
    with pytest.raises(NoCheckpointsError, match="is one checkpoint, not a directory"):
        ckavg.open_run(tmp_path / "model")


def test_several_indexes_are_refused(tmp_path: Path) -> None:
    for step in STEPS:
        for model in ("actor", "critic"):
            write_shards(tmp_path / f"step_{step}", shards(model, 1, 2), step, f"{model}.safetensors.index.json")
    with pytest.raises(ckavg.CkavgError, match="holds several models, each with an index: actor"):
        ckavg.open_run(tmp_path, last=2)
    assert issubclass(UnsupportedFormatError, ckavg.CkavgError)


@pytest.mark.parametrize("name", [ADAPTER, "pytorch_lora_weights.safetensors"])
def test_adapters(tmp_path: Path, name: str) -> None:
    for step in STEPS:
        put(tmp_path / f"checkpoint-{step}" / name, weights(step))
        note(tmp_path / f"checkpoint-{step}/adapter_config.json", {"base_model_name_or_path": "owner/base", "r": 2})
    run = ckavg.open_run(tmp_path)
    assert [checkpoint.kind for checkpoint in run.checkpoints] == ["adapter"] * 3
    result = ckavg.average(run, ckavg.EMA())
    assert {"adapter_config.json", name} <= set(result.outputs[0].files)
    card = (result.directory / "README.md").read_text()
    assert "base_model: owner/base" in card
    assert "library_name: peft" in card


def test_mixed_kinds_are_refused(run: Path) -> None:
    (run / "checkpoint-30" / MODEL).rename(run / "checkpoint-30" / ADAPTER)
    with pytest.raises(MismatchError, match="step 30 is an adapter, but step 20 is a whole model"):
        ckavg.open_run(run)


# --- steps ---


def test_trainer_state_states_the_step(tmp_path: Path) -> None:
    for name, step in {"checkpoint-1": 100, "checkpoint-2": 200, "checkpoint-3": None, "epoch_2": 50}.items():
        write_checkpoint(tmp_path / name, weights(0), step=step)
    run = ckavg.open_run(tmp_path)
    assert run.steps == (3, 50, 100, 200)
    assert any("checkpoint-1: trainer_state.json says step 100" in warning for warning in run.warnings)


@pytest.mark.parametrize(
    "text",
    ["", "not json", "[]", *(f'{{"global_step": {step}}}' for step in ('"7"', -7, 10**25, 1.5))],
)
def test_useless_trainer_state_leaves_the_name(run: Path, text: str) -> None:
    (run / "checkpoint-20" / "trainer_state.json").write_text(text)
    opened = ckavg.open_run(run)
    assert opened.steps == STEPS
    assert any("checkpoint-20: trainer_state.json" in warning for warning in opened.warnings)


@pytest.mark.parametrize(("pattern", "word"), [("epoch_{}", "epochs"), ("checkpoint_{}", "saves")])
def test_other_clocks_are_said(tmp_path: Path, pattern: str, word: str) -> None:
    for number in (0, 1, 10):
        write_checkpoint(tmp_path / pattern.format(number), weights(0))
    run = ckavg.open_run(tmp_path)
    assert run.steps == (0, 1, 10)
    assert any(f"count {word}, not optimizer steps" in warning for warning in run.warnings)


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("checkpoint-best", "no step in the name: checkpoint-best."),
        ("final", "no step in the name: final."),
        ("tmp-checkpoint-40", "still being written: tmp-checkpoint-40."),
        (".checkpoint-15.partial", ""),
        ("checkpoint-" + "9" * 100, ""),
    ],
)
def test_names_that_are_no_checkpoints(run: Path, name: str, told: str) -> None:
    write_checkpoint(run / name, weights(0))
    opened = ckavg.open_run(run)
    assert opened.steps == STEPS
    assert not told or any(told in warning for warning in opened.warnings)


def test_everything_else_in_the_directory_is_ignored(run: Path) -> None:
    """Results among it, wherever they are."""
    for name in ("runs", "2024"):
        (run / name).mkdir()
    (run / "README.md").write_text("a card")
    save_file(weights(0), run / MODEL)  # the Trainer saves its final model here
    opened = ckavg.open_run(run)
    ckavg.average(opened, ckavg.EMA())
    ckavg.average(opened, ckavg.EMA(), out=run / "checkpoint-40")
    assert ckavg.open_run(run).steps == STEPS


def test_the_directory_below_is_named(run: Path) -> None:
    with pytest.raises(ckavg.CkavgError, match="run in it seems to") as caught:
        ckavg.open_run(run.parent)
    assert caught.value.hint == f"Try {run}"


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
        ({"every": 200, "init": "base"}, (0, 200, 400)),
    ],
)
def test_selection(tmp_path: Path, selection: dict[str, Any], expected: tuple[int, ...]) -> None:
    write_run(tmp_path / "run", [weights(0)] * 5, (100, 200, 300, 400, 500))
    if "init" in selection:
        selection = selection | {"init": write_checkpoint(tmp_path / "base", weights(0))}
    run = ckavg.open_run(tmp_path / "run", **selection)
    assert (run.steps, run.anchor_is_init) == (expected, "init" in selection)


def test_what_is_left_out_is_not_looked_at(run: Path) -> None:
    (run / "checkpoint-30" / MODEL).write_bytes(b"still being written")
    assert ckavg.open_run(run, to_step=20).steps == (10, 20)


def test_inspection_returns_problems_beside_what_is_sound(run: Path) -> None:
    write_checkpoint(run / "step_20", weights(0))
    (run / "checkpoint-30" / MODEL).unlink()
    found = inspect_run(run, Selection())
    assert [checkpoint.step for checkpoint in found.checkpoints] == [10, 20, 20]
    assert [type(problem) for problem in found.problems] == [DuplicateStepError, MissingShardError]
    with pytest.raises(CombinedError, match="2 problems"):
        ckavg.open_run(run)


@pytest.mark.parametrize(("changed", "advice"), [(0, "from_step=20"), (1, "from_step=30"), (2, "to_step=30")])
def test_advice_on_a_change_of_shape_leaves_a_run(tmp_path: Path, changed: int, advice: str) -> None:
    write_run(tmp_path, [{"w": torch.ones(3 if place <= changed else 4)} for place in range(4)], (10, 20, 30, 40))
    with pytest.raises(MismatchError, match=advice):
        ckavg.open_run(tmp_path)


# --- of one model, of one run ---

LLAMA = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "rope_theta": 1}
LORA = {"base_model_name_or_path": "/a/base", "r": 8, "lora_alpha": 16, "target_modules": ["q", "v"], "use_rslora": 0}


def with_configs(root: Path, common: dict[str, object], changed: dict[str, object]) -> Path:
    """A run whose last config differs."""
    name = MODEL if common is LLAMA else ADAPTER
    for step in STEPS:
        put(root / f"checkpoint-{step}" / name, weights(step))
        config = "config.json" if common is LLAMA else "adapter_config.json"
        note(root / f"checkpoint-{step}" / config, common | (changed if step == 30 else {}))
    return root


@pytest.mark.parametrize(
    ("common", "changed", "told"),
    [
        (LLAMA, {"model_type": "mistral"}, "config.json states model_type mistral, but llama at step 20"),
        (LLAMA, {"architectures": ["LlamaForTokenClassification"]}, "config.json states architectures"),
        (LORA, {"base_model_name_or_path": "/a/other"}, "adapter_config.json states base_model_name_or_path"),
        (LORA, {"r": 16}, "adapter_config.json states r"),
        (LORA, {"lora_alpha": 32}, "adapter_config.json states lora_alpha"),
        (LORA, {"use_rslora": True}, "adapter_config.json states use_rslora"),
    ],
)
def test_other_models_are_refused(
    tmp_path: Path, common: dict[str, object], changed: dict[str, object], told: str
) -> None:
    run = with_configs(tmp_path, common, changed)
    with pytest.raises(MismatchError, match=f"step 30: {told}"):
        ckavg.open_run(run)
    assert ckavg.open_run(run, to_step=20).steps == (10, 20)


@pytest.mark.parametrize(
    ("common", "changed", "told"),
    [
        (
            LLAMA,
            {"rope_theta": 2},
            "config.json states another rope_theta at step 30 than at step 20; the result has",
        ),
        (LORA, {"base_model_name_or_path": "owner/base"}, "assumed to be one model in two places"),
        (LORA, {"target_modules": ["q", "v", "o"]}, "states other target_modules at step 30"),
        (LORA, {"target_modules": ["v", "q"]}, ""),
    ],
)
def test_what_may_be_of_one_run_is_a_warning(
    tmp_path: Path, common: dict[str, object], changed: dict[str, object], told: str
) -> None:
    warnings = [
        each
        for each in ckavg.open_run(with_configs(tmp_path, common, changed)).warnings
        if "states" in each or "places" in each
    ]
    assert len(warnings) == bool(told)
    assert told in "".join(warnings)


def log(*losses: float) -> list[dict[str, float]]:
    return [{"step": 10 * (place + 1), "loss": loss, "epoch": 0.1} for place, loss in enumerate(losses)]


@pytest.mark.parametrize("resumed", [False, True])
def test_checkpoints_of_an_earlier_run_are_refused(run: Path, resumed: bool) -> None:
    """A run that was resumed keeps the log of the checkpoint it goes on from, and may log a step again."""
    last = [*log(3.0, 2.0), *log(3.2)] if resumed else log(3.1, 2.1, 1.5)
    for step, history in zip(STEPS, (log(3.0), log(3.0, 2.0), last), strict=True):
        state = {"global_step": step, "log_history": history}
        (run / f"checkpoint-{step}" / "trainer_state.json").write_text(json.dumps(state))
    if resumed:
        assert ckavg.open_run(run).warnings == ()
    else:
        told = r"to 2 runs: .* checkpoint-10, checkpoint-20 and checkpoint-30 logged different losses"
        with pytest.raises(MismatchError, match=told):
            ckavg.open_run(run)
        assert ckavg.open_run(run, to_step=20).steps == (10, 20)
