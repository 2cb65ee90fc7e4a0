"""The callback in trainings that TRL and PEFT do for real: what it keeps, and what it averages."""

from __future__ import annotations

import filecmp
import logging
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, PeftModel, get_peft_model_state_dict
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, TrainerCallback, set_seed
from trl import SFTConfig, SFTTrainer

from ckavg import PEMA, Mean
from ckavg.callback import CheckpointAveraging
from ckavg.errors import SettingError
from tests.cli.runner import run_cli, visible

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")  # of TRL, about its own use of transformers
STEPS = (0, *range(2, 22, 2))
TEXTS = [f"for x in {word}: pass" for word in ("names", "lines", "pairs", "words", "files", "steps") * 4]
ADAPTER = "adapter_model.safetensors"


@pytest.fixture
def sft(tokenizer: Any, tmp_path: Path) -> Callable[..., Any]:
    """A trainer that saves ten times in twenty steps, and keeps two checkpoints."""

    def make(*, peft: bool = False, run: str = "run", evaluated: bool = True, **settings: Any) -> Any:
        base = tmp_path / "base"
        if not base.exists():
            set_seed(0)
            LlamaForCausalLM(
                LlamaConfig(
                    vocab_size=280, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
                    num_key_value_heads=2, max_position_embeddings=64, tie_word_embeddings=True, pad_token_id=0,
                    bos_token_id=None, eos_token_id=1,
                )
            ).save_pretrained(base)  # fmt: skip
            tokenizer.save_pretrained(base)
        arguments = {
            "output_dir": str(tmp_path / run), "max_steps": 20, "save_steps": 2, "save_total_limit": 2, "seed": 0,
            "per_device_train_batch_size": 4, "learning_rate": 1e-2, "lr_scheduler_type": "constant",
            "logging_strategy": "no", "report_to": [], "disable_tqdm": True, "use_cpu": True, "bf16": False,
            "dataloader_pin_memory": False, "activation_checkpointing": False, "max_length": 32,
        } | settings  # fmt: skip
        texts = Dataset.from_dict({"text": TEXTS})
        return SFTTrainer(
            model=AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32),
            args=SFTConfig(**arguments),
            train_dataset=texts,
            eval_dataset=texts.select(range(8)) if evaluated else None,
            processing_class=tokenizer,
            peft_config=LoraConfig(r=4, target_modules=["q_proj", "v_proj"]) if peft else None,
        )

    return make


class Copies(TrainerCallback):  # type: ignore[misc]
    """Every checkpoint that is saved, once more."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        step = f"checkpoint-{state.global_step}"
        shutil.copytree(Path(args.output_dir) / step, self.directory / step)


def train(trainer: Any, *schemes: Any, resume: str | None = None, **settings: Any) -> CheckpointAveraging:
    averaging = CheckpointAveraging(trainer, *schemes, **settings)
    trainer.add_callback(averaging)
    trainer.train(resume_from_checkpoint=resume)
    return averaging


def kept(averaging: CheckpointAveraging) -> set[str]:
    return visible(averaging.directory) - {"averaged"}


def same_as_command(averaging: CheckpointAveraging, tmp_path: Path, file: str, source: Path | None = None) -> bool:
    """Whether `ckavg sweep` on what was saved makes the same weights, file by file."""
    words = [str(record.to_scheme().label).replace("-gamma", ":gamma=") for record in averaging.results]
    done = run_cli("sweep", source or averaging.directory, *words, "--out", tmp_path / "again")
    assert done.exit_code == 0, done.output
    return all(
        filecmp.cmp(Path(record.directory) / file, tmp_path / "again" / record.output.name / file, shallow=False)
        for record in averaging.results
    )


def test_sft(sft: Callable[..., Any], load: Callable[[Path], Any], warned: list[str], tmp_path: Path) -> None:
    trainer = sft()
    trainer.add_callback(Copies(tmp_path / "saved"))
    averaging = train(trainer, PEMA(gamma=0.2), "mean")
    run = tmp_path / "run"
    assert visible(run) >= {"checkpoint-18", "checkpoint-20"}
    assert not (run / "checkpoint-16").exists()
    assert kept(averaging) == {f"checkpoint-{step}" for step in STEPS}
    assert not list(averaging.directory.rglob("optimizer*"))
    newest = "checkpoint-20/model.safetensors"
    assert (averaging.directory / newest).samefile(run / newest)
    assert [record.steps for record in averaging.results] == [STEPS, STEPS]

    # all that was ever saved, with the untrained model
    shutil.copytree(tmp_path / "base", tmp_path / "saved" / "checkpoint-0")
    assert same_as_command(averaging, tmp_path, "model.safetensors", tmp_path / "saved")
    warned.clear()  # of the trainer: its checkpoints are of the same second
    for record in averaging.results:
        load(Path(record.directory))
    assert averaging.values.keys() == {"trained", "pema-gamma0.2", "mean"}
    assert len({*averaging.values.values()}) == 3
    logged = {key: value for entry in trainer.state.log_history for key, value in entry.items()}
    assert logged["eval_mean_loss"] == averaging.values["mean"]
    assert logged["averaging_disk_gb"] > 0
    # the trained model is in place again
    assert trainer.evaluate()["eval_loss"] == averaging.values["trained"]
    last = load_file(run / newest)
    assert all(torch.equal(last[name], tensor) for name, tensor in trainer.model.state_dict().items() if name in last)


def test_lora(sft: Callable[..., Any], tmp_path: Path) -> None:
    trainer = sft(peft=True)
    trainer.model.save_pretrained(tmp_path / "saved" / "checkpoint-0")
    trainer.add_callback(Copies(tmp_path / "saved"))
    averaging = train(trainer, "mean", "pema", load_best=True)
    assert kept(averaging) == {f"checkpoint-{step}" for step in STEPS}
    assert not (tmp_path / "run" / "checkpoint-16").exists()
    assert same_as_command(averaging, tmp_path, ADAPTER, tmp_path / "saved")
    for record in averaging.results:
        base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
        held = get_peft_model_state_dict(PeftModel.from_pretrained(base, record.directory))
        stored = load_file(Path(record.directory) / ADAPTER)
        assert held.keys() == stored.keys()
        assert all(torch.equal(held[name], tensor) for name, tensor in stored.items())
    assert len({*averaging.values.values()}) == 3


def test_the_best_is_loaded_and_kept(sft: Callable[..., Any], tmp_path: Path) -> None:
    """By a metric of which more is better, so that the average that learned least is best."""
    trainer = sft()
    averaging = train(trainer, "mean", "ema:momentum=0.2", load_best=True, keep="best", greater_is_better=True)
    assert averaging.best is not None
    best = averaging.best.output.name
    assert averaging.values[best] == max(averaging.values.values()) > averaging.values["trained"]
    assert visible(averaging.directory / "averaged") - {"path.json"} == {best}
    assert averaging.results == (averaging.best,)
    assert trainer.evaluate()["eval_loss"] == pytest.approx(averaging.values[best], abs=1e-6)


def test_where_training_is_better_nothing_is_loaded(sft: Callable[..., Any]) -> None:
    trainer = sft()
    averaging = train(trainer, "ema:momentum=0.01", load_best=True, keep="best")
    assert averaging.best is None
    assert averaging.results == ()
    assert trainer.evaluate()["eval_loss"] == averaging.values["trained"]


def test_training_is_what_it_is_without(sft: Callable[..., Any], tmp_path: Path) -> None:
    sft(run="plain").train()
    train(sft(), "mean")
    for name in ("model.safetensors", "optimizer.pt"):
        plain, averaged = (tmp_path / run / "checkpoint-20" / name for run in ("plain", "run"))
        assert filecmp.cmp(plain, averaged, shallow=False), name


def test_resumed(sft: Callable[..., Any], tmp_path: Path) -> None:
    whole = train(sft(run="whole"), "mean")
    train(sft(max_steps=12), "mean")
    shutil.copytree(tmp_path / "run/_averaging/checkpoint-12", tmp_path / "run/_averaging/checkpoint-13")
    resumed = train(sft(), "mean", resume=str(tmp_path / "run/checkpoint-12"))
    assert resumed.results[0].steps == STEPS
    one, other = (Path(each.results[0].directory) / "model.safetensors" for each in (whole, resumed))
    assert filecmp.cmp(one, other, shallow=False)


def test_trained_twice(sft: Callable[..., Any]) -> None:
    """The second training begins with what the first one made of the model."""
    trainer = sft(max_steps=4)
    averaging = train(trainer, "mean")
    before = load_file(averaging.directory / "checkpoint-4" / "model.safetensors")
    trainer.args.max_steps = 8
    trainer.train()
    assert averaging.results[0].steps == (0, 2, 4, 6, 8)
    anchor = load_file(averaging.directory / "checkpoint-0" / "model.safetensors")
    assert all(torch.equal(anchor[name], tensor) for name, tensor in before.items())


def test_only_the_last(sft: Callable[..., Any]) -> None:
    averaging = train(sft(save_total_limit=1), "mean:last=3", "pema:last=4")
    assert kept(averaging) == {f"checkpoint-{step}" for step in (14, 16, 18, 20)}
    assert [record.steps for record in averaging.results] == [(16, 18, 20), (14, 16, 18, 20)]


@pytest.mark.parametrize(
    ("settings", "schemes", "words"),
    [
        ({"max_steps": 4, "learning_rate": 1e38}, ["mean"], "There is no average: "),
        ({"max_steps": 1, "save_strategy": "no"}, ["mean"], "There is no average: "),
    ],
)
def test_errors_do_not_cost_the_training(
    sft: Callable[..., Any], caplog: pytest.LogCaptureFixture, settings: Any, schemes: list[str], words: str
) -> None:
    with caplog.at_level(logging.WARNING, "ckavg.callback"):
        averaging = train(sft(**settings), *schemes)
    assert averaging.results == ()
    assert words in caplog.text


def test_without_evaluation_averages_stay(sft: Callable[..., Any], caplog: pytest.LogCaptureFixture) -> None:
    averaging = train(sft(max_steps=4), "mean", metric="eval_accuracy", keep="best", load_best=True)
    assert averaging.values == {}
    assert averaging.best is None
    assert Path(averaging.results[0].directory).is_dir()
    assert "it returns eval_loss" in caplog.text


def test_with_the_best_checkpoint_loaded_at_the_end(sft: Callable[..., Any]) -> None:
    """With a limit of one, the trainer then removes the last checkpoint."""
    best = {"load_best_model_at_end": True, "eval_strategy": "steps", "eval_steps": 2, "greater_is_better": True}
    trainer = sft(max_steps=8, save_total_limit=1, metric_for_best_model="eval_loss", **best)
    averaging = train(trainer, "mean")
    assert trainer.state.best_model_checkpoint.endswith("checkpoint-2")
    assert averaging.results[0].steps == (0, 2, 4, 6, 8)
    assert averaging.values["trained"] == max(averaging.values.values())
    assert averaging.best is None


def test_a_directory_of_somebody_else(
    sft: Callable[..., Any], caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    theirs = tmp_path / "run/_averaging/checkpoint-2"
    theirs.mkdir(parents=True)
    averaging = train(sft(max_steps=4), "mean")
    assert averaging.results == ()
    assert "did not make it" in caplog.text
    assert [*theirs.parent.iterdir()] == [theirs]


def test_a_trainer_that_saves_parts(
    sft: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """As with FSDP, which writes what each process has by another way than `save_model`."""
    trainer = sft(max_steps=2)
    monkeypatch.setattr(trainer, "save_model", lambda place, **_: Path(place).mkdir(parents=True, exist_ok=True))
    averaging = train(trainer, "mean")
    assert averaging.results == ()
    assert "saves no whole weights" in caplog.text
    assert trainer.state.global_step == 2


def test_copies_where_there_are_no_links(sft: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError(18, "Invalid cross-device link")

    monkeypatch.setattr("os.link", refuse)
    averaging = train(sft(max_steps=4), "mean")
    assert averaging.results[0].steps == (0, 2, 4)
    copy = averaging.directory / "checkpoint-4" / "model.safetensors"
    assert copy.stat().st_nlink == 1


def test_what_is_refused_at_once(sft: Callable[..., Any]) -> None:
    trainer = sft()
    with pytest.raises(SettingError, match="no scheme 'peema'"):
        CheckpointAveraging(trainer, "peema")
    with pytest.raises(SettingError, match="Duplicate averages: mean, mean"):
        CheckpointAveraging(trainer, "mean", Mean())
    with pytest.raises(SettingError, match="quux"):
        CheckpointAveraging(trainer, metric="quux")
    with pytest.raises(SettingError, match="eval_dataset"):
        CheckpointAveraging(sft(evaluated=False), load_best=True)


@pytest.mark.parametrize(
    ("launcher", "words"),
    [
        ([], ["--lora"]),
        pytest.param(["-m", "torch.distributed.run", "--nproc-per-node", "2"], [], marks=pytest.mark.exhaustive),
    ],
    ids=["lora", "two processes"],
)
def test_the_example(sft: Callable[..., Any], tmp_path: Path, launcher: list[str], words: list[str]) -> None:
    sft()
    (tmp_path / "text").write_text("\n".join(TEXTS * 2))
    example = Path(__file__).parents[2] / "examples" / "trainer.py"
    command = [sys.executable, *launcher, example, tmp_path / "base", tmp_path / "text", tmp_path / "run", *words]
    done = subprocess.run(
        [*map(str, command), "--steps", "4", "--scheme", "mean", "pema"],
        env=os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    results = tmp_path / "run" / "_averaging" / "averaged"
    assert f"{results}/mean\n{results}/pema-gamma0.15\n" in done.stdout
    assert ("trained  " in done.stdout) == (not launcher)
    assert run_cli("sweep", results.parent, "mean", "pema", "--out", tmp_path / "again").exit_code == 0
    file = f"mean/{ADAPTER if words else 'model.safetensors'}"
    assert filecmp.cmp(results / file, tmp_path / "again" / file, shallow=False)
