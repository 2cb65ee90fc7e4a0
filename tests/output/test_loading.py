"""The command under `next` loads the result, with the class that its config names. It is run here, as it stands."""

from __future__ import annotations

import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from tests.cli.runner import run_cli
from tests.trainers import put

transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")
diffusers = pytest.importorskip("diffusers")

pytestmark = pytest.mark.filterwarnings("ignore")

STEPS = (10, 20)
TINY = {
    "hidden_size": 8,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "vocab_size": 16,
    "num_key_value_heads": 2,
}


def llama(head: str, **more: object) -> nn.Module:
    config = transformers.LlamaConfig(**TINY, pad_token_id=0, **more)
    model: nn.Module = getattr(transformers, f"LlamaFor{head}")(config)
    return model


def vit() -> nn.Module:
    config = transformers.ViTConfig(**TINY, image_size=8, patch_size=4, num_labels=3)
    return transformers.ViTForImageClassification(config)  # type: ignore[no-any-return]


def unet() -> nn.Module:
    return diffusers.AutoencoderKL(  # type: ignore[no-any-return]
        block_out_channels=(8,), norm_num_groups=4, latent_channels=2, sample_size=8
    )


def save(root: Path, make: Callable[[], Any], folder: str = "") -> None:
    """Two checkpoints of a model, by its own saver."""
    torch.manual_seed(0)
    model = make()
    for step in STEPS:
        with torch.no_grad():
            for parameter in model.parameters():
                parameter += 0.1 * torch.randn_like(parameter)
        model.save_pretrained(root / f"checkpoint-{step}" / folder)


def next_command(run: Path) -> str:
    """What the summary says to type next."""
    done = run_cli("mean", run)
    assert done.exit_code == 0, done.stderr
    return next(line.removeprefix("next     ") for line in done.stdout.splitlines() if line.startswith("next     "))


def loaded_by(command: str) -> Any:
    """What the command's Python code makes, as an object."""
    python, flag, code = shlex.split(command)
    assert (python, flag) == ("python", "-c")
    *before, last = code.split("; ")
    scope: dict[str, Any] = {}
    exec("; ".join(before), scope)
    return eval(last, scope)


@pytest.mark.parametrize(
    ("make", "name"),
    [
        (lambda: llama("CausalLM"), "LlamaForCausalLM"),
        (lambda: llama("SequenceClassification", num_labels=2), "LlamaForSequenceClassification"),
        (lambda: llama("TokenClassification", num_labels=2), "LlamaForTokenClassification"),
        (vit, "ViTForImageClassification"),
        (unet, "AutoencoderKL"),
    ],
    ids=("causal", "classifier", "tokens", "images", "diffusers"),
)
@pytest.mark.parametrize("folder", ["", "huggingface"])
def test_models(tmp_path: Path, make: Callable[[], Any], name: str, folder: str) -> None:
    save(tmp_path / "run", make, folder)
    command = next_command(tmp_path / "run")
    model = loaded_by(command)
    assert type(model).__name__ == name
    (file,) = (tmp_path / "run/averaged/mean" / folder).glob("*.safetensors")
    stored, held = load_file(file), model.state_dict()  # names may differ: libraries convert them as they load
    assert sorted(float(each.sum()) for each in stored.values()) == sorted(float(each.sum()) for each in held.values())


def test_a_config_without_architectures(tmp_path: Path) -> None:
    save(tmp_path / "run", lambda: transformers.BertModel(transformers.BertConfig(**TINY)))
    for step in STEPS:
        path = tmp_path / f"run/checkpoint-{step}/config.json"
        path.write_text(path.read_text().replace('"architectures"', '"was"'))
    assert type(loaded_by(next_command(tmp_path / "run"))).__name__ == "BertModel"


@pytest.mark.parametrize(
    ("head", "task"), [("CausalLM", "CAUSAL_LM"), ("SequenceClassification", "SEQ_CLS"), ("CausalLM", None)]
)
def test_adapters(tmp_path: Path, head: str, task: str | None) -> None:
    llama(head).save_pretrained(tmp_path / "base")  # type: ignore[operator]

    def adapter() -> Any:
        base = getattr(transformers, f"LlamaFor{head}").from_pretrained(tmp_path / "base")
        return peft.get_peft_model(base, peft.LoraConfig(r=2, target_modules=["q_proj"], task_type=task))

    save(tmp_path / "run", adapter)
    found = loaded_by(next_command(tmp_path / "run"))
    if isinstance(found, dict):
        assert task is None
        assert found.keys() == load_file(tmp_path / "run/averaged/mean/adapter_model.safetensors").keys()
    else:
        assert head in type(found.base_model.model).__name__


def test_weights_that_nothing_names(tmp_path: Path) -> None:
    for step in STEPS:
        put(tmp_path / f"a lora's run/a-step{step}.safetensors", {"w": torch.ones(2) * step})
        put(tmp_path / f"shards/step_{step}/a-00001-of-00002.safetensors", {"w": torch.ones(2) * step})
        put(tmp_path / f"shards/step_{step}/a-00002-of-00002.safetensors", {"v": torch.ones(2) * step})
    assert torch.equal(loaded_by(next_command(tmp_path / "a lora's run"))["w"], torch.full((2,), 15.0))
    assert [set(each) for each in loaded_by(next_command(tmp_path / "shards"))] in ([{"w"}, {"v"}], [{"v"}, {"w"}])


def test_the_command_is_one_line_for_a_shell(tmp_path: Path) -> None:
    for step in STEPS:
        put(tmp_path / f"a 'lora' run/step_{step}.safetensors", {"w": torch.ones(2) * step})
    command = next_command(tmp_path / "a 'lora' run").replace("python", sys.executable, 1)
    assert subprocess.run(["sh", "-c", command], check=False).returncode == 0
