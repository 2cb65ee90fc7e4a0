"""Which files are copied beside the weights of a result."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import ckavg
from ckavg.output.side_files import is_side_file
from tests.runs import write_run

WEIGHTS = {"w": torch.ones(3)}

COPIED = (
    "bpe.codes", "prophetnet.tokenizer", "tokenizer.model.v3", "spiece.model", "vocab.txt", "merges.txt", "config.json",
    "chat_template.jinja", "modeling_mine.py", "LICENSE", "preprocessor_config.json", "tekken.json", "voices/a.json",
    "dict.txt", "sentencepiece.bpe.model", "special_tokens_map.json", "added_tokens.json", "1_Pooling/config.json",
    "notes.md", "image_processor.yaml",
)  # fmt: skip
LEFT_OUT = (
    "optimizer.pt", "scheduler.pt", "rng_state_0.pth", "scaler.pt", "trainer_state.json", "training_args.bin",
    "zero_to_fp32.py", "latest", "all_results.json", "train_results.json", "train.log", "events.out.tfevents.1.host",
    "runs/events.out.tfevents.1", "logs/out.txt", "wandb/run.json", "global_step10/a.json", "training_state/step.json",
    "optimizer_states/a.json", ".hidden", "pytorch_model.bin", "model.onnx", "flax_model.msgpack",
    "README.md", "other/model.safetensors", "tf_model.h5",
)  # fmt: skip


def test_all_but_weights_training_state_logs_and_pickles(tmp_path: Path) -> None:
    source = write_run(tmp_path, [WEIGHTS] * 2, (10, 20))
    last = source / "checkpoint-20"
    for name in COPIED + LEFT_OUT:
        (last / name).parent.mkdir(parents=True, exist_ok=True)
        if not (last / name).exists():
            (last / name).write_text(f"text of {name}")
    save_file(WEIGHTS, last / "other/model.safetensors")
    files = ckavg.plan_average(ckavg.open_run(source), ckavg.Mean()).side_files
    assert set(COPIED) <= files.keys()
    assert not files.keys() & set(LEFT_OUT)
    assert files["bpe.codes"] == b"text of bpe.codes"


def test_large_files_are_not_copied(tmp_path: Path) -> None:
    source = write_run(tmp_path, [WEIGHTS] * 2, (10, 20))
    with (source / "checkpoint-20/corpus.txt").open("wb") as file:
        file.truncate(200_000_001)
    assert "corpus.txt" not in ckavg.plan_average(ckavg.open_run(source), ckavg.Mean()).side_files


def test_beside_the_checkpoints(tmp_path: Path) -> None:
    """Taken where the checkpoints have no config; samples, data and scripts are not."""
    for step in (10, 20):
        (tmp_path / f"step_{step}").mkdir()
        save_file(WEIGHTS, tmp_path / f"step_{step}/model.safetensors")
    for name in (
        "config.json",
        "tokenizer.json",
        "bpe.codes",
        "sample.png",
        "train.jsonl",
        "run.sh",
        "trainer_state.json",
    ):
        (tmp_path / name).write_text("{}")
    files = ckavg.plan_average(ckavg.open_run(tmp_path), ckavg.Mean()).side_files
    assert files.keys() == {"config.json", "tokenizer.json", "bpe.codes"}
    (tmp_path / "step_20/config.json").write_text('{"own": 1}')
    files = ckavg.plan_average(ckavg.open_run(tmp_path), ckavg.Mean()).side_files
    assert files == {"config.json": b'{"own": 1}'}


@pytest.mark.parametrize(
    ("config", "name"),
    [
        ('{"model_type": "llama"}', "model.safetensors"),
        ('{"_class_name": "UNet2DModel"}', "diffusion_pytorch_model.safetensors"),
        ("{}", "mine.safetensors"),
    ],
)
def test_single_files_get_the_name_that_their_loader_looks_for(tmp_path: Path, config: str, name: str) -> None:
    for step in (10, 20):
        save_file(WEIGHTS, tmp_path / f"mine-step{step}.safetensors")
    (tmp_path / "config.json").write_text(config)
    assert [each.name for each in ckavg.plan_average(ckavg.open_run(tmp_path), ckavg.Mean()).weights.shards] == [name]


@pytest.mark.parametrize("name", ["checkpoint-{}/pytorch_lora_weights", "learned_embeds-steps-{}"])
def test_the_config_of_a_pipeline_beside_goes_with_no_other_weights(tmp_path: Path, name: str) -> None:
    for step in (10, 20):
        path = tmp_path / f"{name.format(step)}.safetensors"
        path.parent.mkdir(exist_ok=True)
        save_file(WEIGHTS, path)
    (tmp_path / "model_index.json").write_text('{"unet": ["diffusers", "UNet2DConditionModel"]}')
    assert "model_index.json" not in ckavg.plan_average(ckavg.open_run(tmp_path), ckavg.Mean()).side_files


def test_names_that_say_what_files_are() -> None:
    assert is_side_file(Path("scheduler/scheduler_config.json"), ["scheduler"])
    assert not is_side_file(Path("scheduler/scheduler_config.json"))
