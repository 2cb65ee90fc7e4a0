"""The command under `next` and the example in the card load the result, as they stand, by the class of its config."""

from __future__ import annotations

import re
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
from tests.output.cards import fields_of
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


def sums(weights: dict[str, torch.Tensor]) -> list[float]:
    return sorted(float(each.sum()) for each in weights.values())


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


def run_example(run: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """The names that the Python code in the card of a result leaves, run in its directory."""
    monkeypatch.chdir(run / "averaged/mean")
    (code,) = re.findall(r"^```python\n(.*?)^```$", Path("README.md").read_text(), re.MULTILINE | re.DOTALL)
    scope: dict[str, Any] = {}
    exec(code, scope)
    return scope


def with_tokenizer(run: Path, **more: object) -> None:
    """Put a tokenizer of 16 words into every checkpoint."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = ["[UNK]", "[MASK]", "[SEP]", "[CLS]", "[PAD]", *(chr(ord("a") + place) for place in range(11))]
    plain = Tokenizer(models.WordLevel({word: place for place, word in enumerate(words)}, unk_token="[UNK]"))
    plain.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=plain, unk_token="[UNK]", mask_token="[MASK]", pad_token="[PAD]", **more
    )
    for step in STEPS:
        tokenizer.save_pretrained(run / f"checkpoint-{step}")


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
def test_models(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, make: Callable[[], Any], name: str, folder: str
) -> None:
    save(tmp_path / "run", make, folder)
    command = next_command(tmp_path / "run")
    model = loaded_by(command)
    assert type(model).__name__ == name
    (file,) = (tmp_path / "run/averaged/mean" / folder).glob("*.safetensors")
    assert sums(model.state_dict()) == sums(load_file(file))  # names may differ: libraries convert them as they load
    assert sums(run_example(tmp_path / "run", monkeypatch)["model"].state_dict()) == sums(load_file(file))


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


# --- the example in the card ---


def bert(head: str) -> nn.Module:
    config = transformers.BertConfig(**{**TINY, "vocab_size": 16}, pad_token_id=4, num_labels=2)
    model: nn.Module = getattr(transformers, f"BertFor{head}")(config)
    return model


@pytest.mark.parametrize(
    ("make", "task", "printed"),
    [
        (lambda: llama("CausalLM"), "text-generation", "Once upon a time"),
        (lambda: bert("MaskedLM"), "fill-mask", "'score'"),
        (lambda: bert("SequenceClassification"), "text-classification", "'label'"),
        (lambda: bert("TokenClassification"), "token-classification", "'entity'"),
    ],
    ids=("causal", "masked", "classifier", "tokens"),
)
def test_example_by_task(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    make: Callable[[], Any],
    task: str,
    printed: str,
) -> None:
    save(tmp_path / "run", make)
    with_tokenizer(tmp_path / "run")
    assert run_cli("mean", tmp_path / "run").exit_code == 0
    run = run_example(tmp_path / "run", monkeypatch)["run"]
    assert run.task == task
    assert set(sums(run.model.state_dict())) == set(sums(load_file("model.safetensors")))  # tied weights are held twice
    assert printed in capsys.readouterr().out


def test_example_of_a_chat_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    save(tmp_path / "run", lambda: llama("CausalLM"))
    with_tokenizer(tmp_path / "run", chat_template="{% for each in messages %}{{ each.content }}{% endfor %}")
    assert run_cli("mean", tmp_path / "run").exit_code == 0
    scope = run_example(tmp_path / "run", monkeypatch)
    assert scope["messages"][0]["role"] == "user"
    assert capsys.readouterr().out.strip()


@pytest.mark.parametrize("has_tokenizer", [True, False])
def test_example_of_an_adapter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, has_tokenizer: bool) -> None:
    llama("CausalLM").save_pretrained(tmp_path / "base")  # type: ignore[operator]
    with_tokenizer(tmp_path)
    for file in (tmp_path / "checkpoint-10").iterdir():
        file.rename(tmp_path / "base" / file.name)

    def adapter() -> Any:
        base = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "base")
        return peft.get_peft_model(base, peft.LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM"))

    save(tmp_path / "run", adapter)
    if has_tokenizer:
        with_tokenizer(tmp_path / "run")
    assert run_cli("mean", tmp_path / "run").exit_code == 0
    scope = run_example(tmp_path / "run", monkeypatch)
    loaded = peft.get_peft_model_state_dict(scope["model"])
    assert sums(loaded) == sums(load_file("adapter_model.safetensors"))
    assert scope["tokens"].shape[1] > scope["inputs"]["input_ids"].shape[1]


def test_example_of_an_image_pipeline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def pipeline(step: int) -> Any:
        torch.manual_seed(step)
        unet = diffusers.UNet2DModel(
            sample_size=8, block_out_channels=(8,), norm_num_groups=4, layers_per_block=1,
            down_block_types=("DownBlock2D",), up_block_types=("UpBlock2D",),
        )  # fmt: skip
        return diffusers.DDIMPipeline(unet, diffusers.DDIMScheduler())

    for step in STEPS:
        pipeline(step).save_pretrained(tmp_path / f"run/checkpoint-{step}")
    assert run_cli("mean", tmp_path / "run").exit_code == 0
    run = run_example(tmp_path / "run", monkeypatch)["run"]
    assert sums(run.unet.state_dict()) == sums(load_file("unet/diffusion_pytorch_model.safetensors"))
    assert Path("sample.png").stat().st_size > 0


def test_example_of_sentence_transformers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    st = pytest.importorskip("sentence_transformers")
    transformers.BertModel(transformers.BertConfig(**TINY, pad_token_id=4)).save_pretrained(tmp_path / "bert")
    with_tokenizer(tmp_path)
    for file in (tmp_path / "checkpoint-10").iterdir():
        file.rename(tmp_path / "bert" / file.name)
    model = st.SentenceTransformer(str(tmp_path / "bert"))
    for step in STEPS:
        for parameter in model.parameters():
            parameter.data += 0.1 * torch.randn_like(parameter)
        model.save_pretrained(str(tmp_path / f"run/checkpoint-{step}"))
    assert run_cli("mean", tmp_path / "run").exit_code == 0
    scope = run_example(tmp_path / "run", monkeypatch)
    assert scope["embeddings"].shape == (2, TINY["hidden_size"])
    assert fields_of(Path("README.md").read_text())["library_name"] == "sentence-transformers"
    assert "tensor" in capsys.readouterr().out


def test_example_of_timm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    timm = pytest.importorskip("timm")
    model = timm.create_model("resnet10t", num_classes=3)
    for step in STEPS:
        for parameter in model.parameters():
            parameter.data += 0.1 * torch.randn_like(parameter)
        timm.models.save_for_hf(model, tmp_path / f"run/checkpoint-{step}", safe_serialization=True)
    assert run_cli("mean", tmp_path / "run").exit_code == 0
    loaded = run_example(tmp_path / "run", monkeypatch)["model"]
    assert sums(loaded.state_dict()) == sums(load_file("model.safetensors"))
    assert "torch.Size([1, 3])" in capsys.readouterr().out
    assert fields_of(Path("README.md").read_text())["library_name"] == "timm"


def test_example_of_tensors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for step in STEPS:
        put(tmp_path / f"one/a-step{step}.safetensors", {"w": torch.ones(2) * step})
        put(tmp_path / f"many/step_{step}/a-00001-of-00002.safetensors", {"w": torch.ones(2) * step})
        put(tmp_path / f"many/step_{step}/a-00002-of-00002.safetensors", {"v": torch.ones(2) * step})
    for run in ("one", "many"):
        assert run_cli("mean", tmp_path / run).exit_code == 0
        weights = run_example(tmp_path / run, monkeypatch)["weights"]
        assert torch.equal(weights["w"], torch.full((2,), 15.0))
