"""Every layout that is read, with the file names that its trainer writes."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import ckavg
from ckavg.errors import MismatchError, UnsupportedFormatError
from tests.runs import write_checkpoint, write_run

STEPS = (10, 20, 30)


def weights(step: int) -> dict[str, Tensor]:
    return {"model.a": torch.arange(6.0) + step, "model.b": torch.full((2, 2), float(step))}


def write_shards(directory: Path, names: Sequence[str], step: int, index: str | None = None) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    tensors = weights(step)
    placed = dict(zip(tensors, names, strict=True))
    for tensor, name in placed.items():
        save_file({tensor: tensors[tensor]}, directory / name, {"format": "pt"})
    if index is not None:
        (directory / index).write_text(json.dumps({"metadata": {"total_size": 40}, "weight_map": placed}))


def mean_of(root: Path) -> dict[str, Tensor]:
    """The mean of the run by ckavg, of all weight files of the result."""
    result = ckavg.average(ckavg.open_run(root), ckavg.Mean(), out=root.parent / "mean")
    return {name: t for file in sorted(result.directory.glob("*.safetensors")) for name, t in load_file(file).items()}


def is_mean(found: dict[str, Tensor], steps: Sequence[int] = STEPS) -> bool:
    expected = weights(sum(steps) // len(steps))
    return found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in expected)


TRAINER = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
TORCHTUNE = "ft-model-00001-of-00002.safetensors", "ft-model-00002-of-00002.safetensors"
INDEX = "model.safetensors.index.json"


@pytest.mark.parametrize(
    ("directory", "shards", "index"),
    [
        ("checkpoint-{}", TRAINER, INDEX),
        ("step_{}", TRAINER, None),
        ("step-{}", TRAINER, INDEX),
        ("step{}", ("model-00000-of-00002.safetensors", "model-00001-of-00002.safetensors"), None),
        ("epoch_{}", TORCHTUNE, INDEX),
        ("epoch_{}", TORCHTUNE, None),
        ("global_step_{}", TRAINER, None),
        ("global_step{}", TRAINER, INDEX),
        ("iter_{:07d}", TRAINER, INDEX),
        ("stage1-step{}-tokens5B", TRAINER, INDEX),
        ("step_{}", ("consolidated-00001-of-00002.safetensors", "consolidated-00002-of-00002.safetensors"), None),
    ],
)
def test_shards(tmp_path: Path, directory: str, shards: tuple[str, str], index: str | None) -> None:
    root = tmp_path / "run"
    for step in STEPS:
        write_shards(root / directory.format(step), shards, step, index)
    run = ckavg.open_run(root)
    assert run.steps == STEPS
    assert run.last.names == shards
    assert is_mean(mean_of(root))


@pytest.mark.parametrize("name", ["step_{}", "model-step-{}", "{}", "global_step{}", "my.run-step{:08d}"])
def test_flat_files(tmp_path: Path, name: str) -> None:
    root = tmp_path / "run"
    root.mkdir()
    for step in STEPS:
        save_file(weights(step), root / f"{name.format(step)}.safetensors")
    assert ckavg.open_run(root).steps == STEPS
    assert is_mean(mean_of(root))


@pytest.mark.parametrize("second", ["model_1.safetensors", "model_1-00001-of-00002.safetensors"])
def test_accelerate_saves_a_second_model(tmp_path: Path, second: str) -> None:
    root = tmp_path / "checkpoints"
    for step in STEPS:
        write_checkpoint(root / f"checkpoint_{step}", weights(step))
        save_file({"discriminator": torch.ones(3)}, root / f"checkpoint_{step}" / second)
        for name in ("optimizer.bin", "scheduler.bin", "random_states_0.pkl", "sampler.bin"):
            (root / f"checkpoint_{step}" / name).write_bytes(b"pickle")
    run = ckavg.open_run(root)
    assert run.tensors.keys() == weights(0).keys()
    assert any("count saves, not optimizer steps" in warning for warning in run.warnings)
    assert any(f"neither averaged nor copied: {second}" in warning for warning in run.warnings)
    assert is_mean(mean_of(root))


@pytest.mark.parametrize("name", ["adapter_model.safetensors", "pytorch_lora_weights.safetensors"])
def test_adapters(tmp_path: Path, name: str) -> None:
    root = tmp_path / "run"
    for step in STEPS:
        (root / f"checkpoint-{step}").mkdir(parents=True)
        save_file(weights(step), root / f"checkpoint-{step}" / name)
    assert {checkpoint.kind for checkpoint in ckavg.open_run(root).checkpoints} == {"adapter"}
    assert is_mean(mean_of(root))


def test_torchtune_saves_an_adapter_beside_the_whole_model(tmp_path: Path) -> None:
    root = tmp_path / "run"
    for step in STEPS:
        write_shards(root / f"epoch_{step}", TORCHTUNE, step)
        save_file({"lora_A": torch.ones(3)}, root / f"epoch_{step}" / "adapter_model.safetensors")
        (root / f"epoch_{step}" / "adapter_config.json").write_text("{}")
    run = ckavg.open_run(root)
    assert run.tensors.keys() == weights(0).keys()
    assert any("holds an adapter beside a whole model" in warning for warning in run.warnings)
    assert "adapter_config.json" not in ckavg.plan_average(run, ckavg.EMA()).files


def test_mixed_kinds_are_refused(tmp_path: Path) -> None:
    write_run(tmp_path, [weights(step) for step in STEPS], STEPS)
    last = tmp_path / "checkpoint-30"
    (last / "model.safetensors").rename(last / "adapter_model.safetensors")
    with pytest.raises(MismatchError, match="step 30 is an adapter, but step 20 is a whole model"):
        ckavg.open_run(tmp_path)


@pytest.mark.parametrize("name", ["checkpoint-best", "checkpoint-final", "best", "final", "last", "best_model"])
def test_names_without_a_step_are_said(tmp_path: Path, name: str) -> None:
    write_run(tmp_path, [weights(step) for step in STEPS], STEPS)
    write_checkpoint(tmp_path / name, weights(0))
    run = ckavg.open_run(tmp_path)
    assert run.steps == STEPS
    assert any(f"states no step: {name}." in warning for warning in run.warnings)


def test_a_checkpoint_under_its_temporary_name_is_said(tmp_path: Path) -> None:
    write_run(tmp_path, [weights(step) for step in STEPS], STEPS)
    write_checkpoint(tmp_path / "tmp-checkpoint-40", weights(0))
    run = ckavg.open_run(tmp_path)
    assert run.steps == STEPS
    assert any("while it writes them: tmp-checkpoint-40." in warning for warning in run.warnings)


# --- of one model, of one run ---


def write_json(path: Path, **values: object) -> None:
    path.write_text(json.dumps(values))


@pytest.mark.parametrize(
    ("before", "after", "told"),
    [
        ({"model_type": "llama"}, {"model_type": "mistral"}, "states model_type mistral, but llama at step 20"),
        (
            {"model_type": "llama", "architectures": ["LlamaForCausalLM"]},
            {"model_type": "llama", "architectures": ["LlamaForTokenClassification"]},
            "states architectures",
        ),
    ],
)
def test_mixed_architectures_are_refused(
    tmp_path: Path, before: dict[str, object], after: dict[str, object], told: str
) -> None:
    write_run(tmp_path, [weights(step) for step in STEPS], STEPS)
    for step, config in zip(STEPS, (before, before, after), strict=True):
        write_json(tmp_path / f"checkpoint-{step}" / "config.json", **config)
    with pytest.raises(MismatchError, match=f"step 30: config.json {told}"):
        ckavg.open_run(tmp_path)
    assert ckavg.open_run(tmp_path, to_step=20).steps == (10, 20)


def test_another_rope_is_a_warning(tmp_path: Path) -> None:
    write_run(tmp_path, [weights(step) for step in STEPS], STEPS)
    for step in STEPS:
        write_json(tmp_path / f"checkpoint-{step}" / "config.json", model_type="llama", rope_theta=step // 25)
    told = "config.json states another rope_theta at step 30 than at step 20; the result takes that of the last "
    assert [each for each in ckavg.open_run(tmp_path).warnings if "rope_theta" in each] == [told + "checkpoint."]


ADAPTER = {"base_model_name_or_path": "/a/base", "r": 8, "lora_alpha": 16, "target_modules": ["q", "v"]}


def write_adapters(root: Path, changed: dict[str, object]) -> None:
    for step in STEPS:
        directory = root / f"checkpoint-{step}"
        directory.mkdir(parents=True)
        save_file(weights(step), directory / "adapter_model.safetensors")
        write_json(directory / "adapter_config.json", **(ADAPTER | (changed if step == 30 else {})))


@pytest.mark.parametrize(
    "changed", [{"base_model_name_or_path": "/a/other"}, {"r": 16}, {"lora_alpha": 32}, {"use_rslora": True}]
)
def test_mixed_adapters_are_refused(tmp_path: Path, changed: dict[str, object]) -> None:
    write_adapters(tmp_path, changed)
    if "use_rslora" in changed:
        for step in STEPS[:2]:
            write_json(tmp_path / f"checkpoint-{step}" / "adapter_config.json", **ADAPTER, use_rslora=False)
    with pytest.raises(MismatchError, match=f"step 30: adapter_config.json states {next(iter(changed))}"):
        ckavg.open_run(tmp_path)


@pytest.mark.parametrize(
    ("changed", "told"),
    [
        ({"base_model_name_or_path": "owner/base"}, "taken to be one model in two places"),
        ({"target_modules": ["q", "v", "o"]}, "states other target_modules at step 30"),
    ],
)
def test_adapters_that_may_be_of_one_run_are_a_warning(tmp_path: Path, changed: dict[str, object], told: str) -> None:
    write_adapters(tmp_path, changed)
    assert any(told in warning for warning in ckavg.open_run(tmp_path).warnings)


def test_the_order_of_target_modules_means_nothing(tmp_path: Path) -> None:
    write_adapters(tmp_path, {"target_modules": ["v", "q"]})
    assert ckavg.open_run(tmp_path).warnings == ()


def log(*losses: float) -> list[dict[str, float]]:
    return [{"step": 10 * (place + 1), "loss": loss, "epoch": 0.1} for place, loss in enumerate(losses)]


def test_checkpoints_of_an_earlier_run_are_refused(tmp_path: Path) -> None:
    write_run(tmp_path, [weights(step) for step in STEPS], STEPS)
    for step, history in zip(STEPS, (log(3.0), log(3.0, 2.0), log(3.1, 2.1, 1.5)), strict=True):
        write_json(tmp_path / f"checkpoint-{step}" / "trainer_state.json", global_step=step, log_history=history)
    with pytest.raises(
        MismatchError, match=r"of 2 runs: .* checkpoint-10, checkpoint-20 and checkpoint-30 logged different losses"
    ):
        ckavg.open_run(tmp_path)
    assert ckavg.open_run(tmp_path, to_step=20).steps == (10, 20)


def test_a_resumed_run_is_one_run(tmp_path: Path) -> None:
    """It keeps the log of the checkpoint it goes on from, and may log a step again."""
    write_run(tmp_path, [weights(step) for step in STEPS], STEPS)
    for step, history in zip(STEPS, (log(3.0), log(3.0, 2.0), [*log(3.0, 2.0), *log(3.2)]), strict=True):
        write_json(tmp_path / f"checkpoint-{step}" / "trainer_state.json", global_step=step, log_history=history)
    assert ckavg.open_run(tmp_path).warnings == ()


@pytest.mark.parametrize("state", [{"global_step": 10**25}, {"global_step": -1}, {"global_step": 1.5}])
def test_absurd_steps_leave_the_name(tmp_path: Path, state: dict[str, object]) -> None:
    write_run(tmp_path, [weights(step) for step in STEPS], STEPS)
    write_json(tmp_path / "checkpoint-30" / "trainer_state.json", **state)
    assert ckavg.open_run(tmp_path).steps == STEPS


def test_huge_numbers_in_names_are_no_steps(tmp_path: Path) -> None:
    write_run(tmp_path, [weights(step) for step in STEPS], STEPS)
    write_checkpoint(tmp_path / f"checkpoint-{'9' * 100}", weights(0))
    assert ckavg.open_run(tmp_path).steps == STEPS


def test_several_indexes_are_refused(tmp_path: Path) -> None:
    for step in STEPS:
        for model in ("actor", "critic"):
            names = tuple(f"{model}-0000{place}-of-00002.safetensors" for place in (1, 2))
            write_shards(tmp_path / f"step_{step}", names, step, f"{model}.safetensors.index.json")
    with pytest.raises(ckavg.CkavgError) as caught:
        ckavg.open_run(tmp_path, last=2)
    assert "holds several models, each with an index: actor" in str(caught.value)
    assert issubclass(UnsupportedFormatError, ckavg.CkavgError)


def test_the_directory_below_is_named(tmp_path: Path) -> None:
    write_run(tmp_path / "checkpoints", [weights(step) for step in STEPS], STEPS)
    with pytest.raises(ckavg.CkavgError, match="checkpoints in it seems to") as caught:
        ckavg.open_run(tmp_path)
    assert caught.value.hint == f"Try {tmp_path / 'checkpoints'}"
