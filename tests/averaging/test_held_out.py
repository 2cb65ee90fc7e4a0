"""The held-out loss of `ckavg eval`, against float64 arithmetic of its own and against transformers' own loss."""

from __future__ import annotations

import json
import math
import shlex
import socket
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from ckavg.averaging.held_out import HeldOutLoss, held_out_loss
from ckavg.errors import EvaluationError, ReadError, SettingError
from tests.averaging.tiny import save_tiny_model
from tests.cli.runner import run_cli

pytest.importorskip("transformers")
TEXT = "Weights along a run differ by the noise of training; ” – é.\n" * 9


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture
def text(tmp_path: Path) -> Path:
    file = tmp_path / "held out.txt"
    file.write_text(TEXT, encoding="utf-8")
    return file


def token_ids(model: Path) -> list[int]:
    """The text byte by byte, by the table of GPT-2 that the tokenizer's file holds."""
    table = json.loads((model / "tokenizer.json").read_text())["model"]["vocab"]
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in plain]
    letter = {byte: chr(byte) for byte in plain} | {byte: chr(256 + place) for place, byte in enumerate(others)}
    return [table[letter[byte]] for byte in TEXT.encode()]


def log_likelihoods(directory: Path, ids: list[int]) -> list[float]:
    """Of each token but the first, by a Llama of one layer written out in float64."""
    weights = {name: tensor.double() for name, tensor in load_file(directory / "model.safetensors").items()}
    weights = {name.removeprefix("model.").removeprefix("layers.0."): tensor for name, tensor in weights.items()}
    heads, width = 2, 8

    def norm(x: torch.Tensor, name: str) -> torch.Tensor:
        return torch.mul(x / (x.pow(2).mean(-1, keepdim=True) + 1e-6).sqrt(), weights[name])

    angles = torch.outer(torch.arange(len(ids)).double(), 10_000.0 ** (-torch.arange(0, width, 2).double() / width))
    cos, sin = (torch.cat([each, each], -1) for each in (angles.cos(), angles.sin()))

    def turned(x: torch.Tensor) -> torch.Tensor:
        return x * cos + torch.cat([-x[..., width // 2 :], x[..., : width // 2]], -1) * sin

    x = weights["embed_tokens.weight"][ids]
    y = norm(x, "input_layernorm.weight")
    q, k, v = ((y @ weights[f"self_attn.{n}_proj.weight"].T).view(-1, heads, width).transpose(0, 1) for n in "qkv")
    scores = turned(q) @ turned(k).transpose(1, 2) / math.sqrt(width)
    scores = scores.masked_fill(torch.ones(len(ids), len(ids)).triu(1).bool(), -math.inf)
    mixed = (scores.softmax(-1) @ v).transpose(0, 1).reshape(len(ids), -1)
    x = x + mixed @ weights["self_attn.o_proj.weight"].T
    y = norm(x, "post_attention_layernorm.weight")
    gate = y @ weights["mlp.gate_proj.weight"].T
    x = x + (gate * gate.sigmoid() * (y @ weights["mlp.up_proj.weight"].T)) @ weights["mlp.down_proj.weight"].T
    logits = norm(x, "norm.weight") @ weights["lm_head.weight"].T
    return [float(each) for each in logits.log_softmax(-1)[range(len(ids) - 1), ids[1:]]]


@pytest.mark.parametrize("length", [50, 256, None])
def test_against_float64(model: Path, text: Path, length: int | None) -> None:
    ids, window = [0, *token_ids(model)], length or 256
    windows = [log_likelihoods(model, ids[place : place + window + 1]) for place in range(0, len(ids) - 1, window)]
    count = len(TEXT.encode())
    assert sum(map(len, windows)) == count
    loss = -sum(map(sum, windows)) / count
    spread = sum((-sum(each) - len(each) * loss) ** 2 for each in windows)
    stderr = math.sqrt(len(windows) / (len(windows) - 1) * spread) / count
    found = held_out_loss(model, text, length)
    assert found.tokens == count
    assert found.loss == pytest.approx(loss, rel=1e-6)
    assert found.stderr == pytest.approx(stderr, rel=1e-3)
    assert held_out_loss(model, text, length) == found


def test_against_transformers_own_loss(model: Path, text: Path) -> None:
    from transformers import LlamaForCausalLM

    own = LlamaForCausalLM.from_pretrained(model).eval()
    text.write_bytes(text.read_bytes()[:200])
    ids = torch.tensor([[0, *token_ids(model)[:200]]])
    with torch.inference_mode():
        expected = own(input_ids=ids, labels=ids).loss.item()
    found = held_out_loss(model, text)
    assert (found.tokens, found.stderr) == (200, None)
    assert found.loss == pytest.approx(expected, rel=1e-6)


def test_the_standard_error_of_equal_windows(model: Path, text: Path) -> None:
    """It is the usual one of a mean: the standard deviation of the windows over the root of their number."""
    text.write_bytes(text.read_bytes()[:200])
    ids = [0, *token_ids(model)[:200]]
    means = [-sum(log_likelihoods(model, ids[place : place + 51])) / 50 for place in range(0, 200, 50)]
    assert held_out_loss(model, text, 50).stderr == pytest.approx(
        torch.tensor(means, dtype=torch.float64).std().item() / 2, rel=1e-4
    )


def test_without_a_token_for_the_beginning(tmp_path: Path, text: Path) -> None:
    plain = save_tiny_model(tmp_path / "plain", bos_token=None, eos_token=None)
    assert held_out_loss(plain, text).tokens == len(TEXT.encode()) - 1


def test_it_is_float32_and_asks_no_network(
    tmp_path: Path, model: Path, text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(*_: object) -> None:
        raise AssertionError("a connection")

    monkeypatch.setattr(socket.socket, "connect", refused)
    half = tmp_path / "half"
    half.mkdir()
    for file in model.iterdir():
        (half / file.name).write_bytes(file.read_bytes())
    weights = {name: tensor.bfloat16() for name, tensor in load_file(model / "model.safetensors").items()}
    save_file(weights, half / "model.safetensors", {"format": "pt"})
    config = json.loads((half / "config.json").read_text())
    (half / "config.json").write_text(json.dumps(config | {"dtype": "bfloat16", "torch_dtype": "bfloat16"}))
    ids = [0, *token_ids(model)]
    each = [one for place in range(0, len(ids) - 1, 256) for one in log_likelihoods(half, ids[place : place + 257])]
    assert held_out_loss(half, text).loss == pytest.approx(-sum(each) / len(each), rel=1e-6)


@pytest.mark.filterwarnings("ignore::FutureWarning")  # PEFT uses what transformers will remove
def test_an_adapter(tmp_path: Path, model: Path, text: Path) -> None:
    peft = pytest.importorskip("peft")
    from transformers import LlamaForCausalLM

    base = LlamaForCausalLM.from_pretrained(model)
    adapter = peft.get_peft_model(base, peft.LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM"))
    for name, weight in adapter.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight)
    adapter.save_pretrained(tmp_path / "adapter")
    with pytest.raises(EvaluationError, match="holds no tokenizer"):
        held_out_loss(tmp_path / "adapter", text)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / "adapter" / name).write_bytes((model / name).read_bytes())
    merged = tmp_path / "merged"
    adapter.merge_and_unload().save_pretrained(merged)
    ids = [0, *token_ids(model)]
    each = [one for place in range(0, len(ids) - 1, 256) for one in log_likelihoods(merged, ids[place : place + 257])]
    found = held_out_loss(tmp_path / "adapter", text)
    assert found.loss == pytest.approx(-sum(each) / len(each), rel=1e-5)
    assert found.loss != pytest.approx(held_out_loss(model, text).loss, rel=1e-4)


# --- what is refused ---


@pytest.mark.parametrize("library", ["transformers", "peft"])
def test_without_the_library(tmp_path: Path, text: Path, monkeypatch: pytest.MonkeyPatch, library: str) -> None:
    monkeypatch.setitem(sys.modules, library, None)
    for name in ("tokenizer.json", "config.json" if library == "transformers" else "adapter_config.json"):
        (tmp_path / name).write_text("{}")
    with pytest.raises(SettingError, match=f"needs {library}, which is not installed.\nInstall it: pip install"):
        held_out_loss(tmp_path, text)


def copied(model: Path, directory: Path, without: str) -> Path:
    directory.mkdir()
    for file in model.iterdir():
        if not file.name.startswith(without):
            (directory / file.name).write_bytes(file.read_bytes())
    return directory


@pytest.mark.parametrize(
    ("without", "told"),
    [("tokenizer", "holds no tokenizer"), ("config", "holds no config.json"), ("model", "does not load as a causal")],
)
def test_what_does_not_load_as_it_stands(tmp_path: Path, model: Path, text: Path, without: str, told: str) -> None:
    with pytest.raises(EvaluationError, match=told):
        held_out_loss(copied(model, tmp_path / "partial", without), text)


def test_missing_weights_are_not_made_up(tmp_path: Path, model: Path, text: Path) -> None:
    partial = copied(model, tmp_path / "partial", "model.safetensors")
    weights = load_file(model / "model.safetensors")
    del weights["model.norm.weight"]
    save_file(weights, partial / "model.safetensors", {"format": "pt"})
    with pytest.raises(EvaluationError, match=r"lacks weights of the model that its config describes: model\.norm"):
        held_out_loss(partial, text)


def test_a_loss_that_is_no_number(tmp_path: Path, model: Path, text: Path) -> None:
    broken = copied(model, tmp_path / "broken", "model.safetensors")
    weights = load_file(model / "model.safetensors")
    weights["model.norm.weight"][0] = math.nan
    save_file(weights, broken / "model.safetensors", {"format": "pt"})
    with pytest.raises(EvaluationError, match=r"The loss of .* is nan"):
        held_out_loss(broken, text)


@pytest.mark.parametrize(("content", "told"), [(b"", "no token"), (b"\xff", "not UTF-8"), (None, "cannot be read")])
def test_texts(tmp_path: Path, model: Path, content: bytes | None, told: str) -> None:
    if content is not None:
        (tmp_path / "text").write_bytes(content)
    with pytest.raises(ReadError, match=told):
        held_out_loss(model, tmp_path / "text")


# --- the verb ---


def test_the_verb(model: Path, text: Path) -> None:
    done = run_cli("eval", model, "--text", text, "--length", "100")
    assert done.exit_code == 0, done.stderr
    told: dict[str, Any] = json.loads(done.stdout)
    assert told.keys() == {"loss", "stderr", "tokens"}
    assert HeldOutLoss(**told) == held_out_loss(model, text, 100)
    assert run_cli("eval", model, "--text", text, "--length", "100", "--json").stdout == done.stdout
    too_long = run_cli("eval", model, "--text", text, "--length", "257")
    assert (too_long.exit_code, too_long.stdout) == (2, "")
    assert "length is 257; it must be at least 1 and at most 256." in too_long.stderr
    assert run_cli("eval", text.parent, "--text", text).exit_code == 1


@pytest.mark.exhaustive
def test_as_the_command_of_a_sweep(tmp_path: Path, text: Path) -> None:
    for step in (100, 200):
        save_tiny_model(tmp_path / "run" / f"checkpoint-{step}", seed=step)
    command = f"{sys.executable} -m ckavg eval {{dir}} --text {shlex.quote(str(text))}"
    done = run_cli("sweep", tmp_path / "run", "mean", "last", "--eval", command, "--eval-metric", "loss", "--json")
    assert done.exit_code == 0, done.stderr
    for average in json.loads(done.stdout)["averages"]:
        found = held_out_loss(Path(average["outputs"][-1]["directory"]), text)
        assert (average["evaluation"]["value"], average["evaluation"]["stderr"]) == (found.loss, found.stderr)
        assert average["evaluation"]["goal"] == "min"
