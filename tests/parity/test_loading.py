"""A result loads as the checkpoints of its run do: sharded, in 16 bits, and after a change of dtype."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import ckavg

STEPS = (0, 10, 20)
SCHEME = ckavg.BEMA(eta=0.4)


@pytest.fixture(scope="module")
def run(train: Callable[..., Path]) -> Path:
    return train(steps=STEPS[-1], save_steps=10)


@pytest.fixture(scope="module")
def averaged(run: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, torch.Tensor]:
    """The average of the run as it was saved: float32, one file a checkpoint."""
    return average(run, tmp_path_factory.mktemp("loading") / "out")


def average(run: Path, out: Path, *, dtype: str = "source") -> dict[str, torch.Tensor]:
    result = ckavg.average(ckavg.open_run(run), SCHEME, out=out, dtype=dtype)
    assert result.steps == STEPS
    return tensors_of(out)


def tensors_of(directory: Path) -> dict[str, torch.Tensor]:
    files = (load_file(file) for file in sorted(directory.glob("*.safetensors")))
    return {name: tensor for file in files for name, tensor in file.items()}


def assert_identical(mine: Mapping[str, torch.Tensor], theirs: Mapping[str, torch.Tensor]) -> None:
    assert mine.keys() == theirs.keys()
    for name, tensor in theirs.items():
        assert mine[name].dtype == tensor.dtype, name
        assert torch.equal(mine[name], tensor), name


def save_again(run: Path, directory: Path, *, dtype: str = "auto", **saving: object) -> Path:
    """The same run as a Trainer with other saving options would have left it."""
    for step in STEPS:
        model = AutoModelForCausalLM.from_pretrained(run / f"checkpoint-{step}", dtype=dtype)
        model.save_pretrained(directory / f"checkpoint-{step}", **saving)
    return directory


def stated_dtype(directory: Path) -> object:
    return json.loads((directory / "config.json").read_text())["dtype"]


@pytest.mark.parametrize(("dtype", "sharded"), [("source", True), ("bfloat16", True), ("float16", False)])
def test_a_float32_run(
    dtype: str,
    sharded: bool,
    run: Path,
    averaged: dict[str, torch.Tensor],
    tmp_path: Path,
    load: Callable[[Path], Any],
) -> None:
    """Written as it is or in 16 bits, in one file or in the shards of the last checkpoint."""
    source = save_again(run, tmp_path / "run", max_shard_size="20KB") if sharded else run
    expected = torch.float32 if dtype == "source" else getattr(torch, dtype)
    rounded, out = average(source, tmp_path / "out", dtype=dtype), tmp_path / "out"
    assert_identical(rounded, {name: tensor.to(expected) for name, tensor in averaged.items()})
    assert stated_dtype(out) == str(expected).removeprefix("torch.")
    assert load(out).dtype == expected
    last = source / "checkpoint-20"
    assert {file.name for file in out.glob("model*")} == {file.name for file in last.glob("model*")}
    if sharded:
        assert len(list(out.glob("*.safetensors"))) > 2
        index = json.loads((out / "model.safetensors.index.json").read_text())
        assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in rounded.values())
        assert dtype != "source" or index == json.loads((last / "model.safetensors.index.json").read_text())


def test_a_bfloat16_run(run: Path, tmp_path: Path, load: Callable[[Path], Any]) -> None:
    half = save_again(run, tmp_path / "run", dtype="bfloat16")
    narrow, wide = average(half, tmp_path / "out"), average(half, tmp_path / "wide", dtype="float32")
    # Accumulated in float32 whatever the output is, so the two differ by the one rounding at the end.
    assert_identical(narrow, {name: tensor.bfloat16() for name, tensor in wide.items()})
    assert stated_dtype(tmp_path / "out") == "bfloat16"
    assert load(tmp_path / "out").dtype == torch.bfloat16
    assert stated_dtype(tmp_path / "wide") == "float32"
    assert load(tmp_path / "wide").dtype == torch.float32


def test_the_tokenizer_is_that_of_the_run(run: Path, tmp_path: Path, warned: list[str]) -> None:
    average(run, tmp_path / "out")
    mine, theirs = (AutoTokenizer.from_pretrained(directory) for directory in (tmp_path / "out", run / "checkpoint-20"))
    assert mine.get_vocab() == theirs.get_vocab()
    assert mine.special_tokens_map == theirs.special_tokens_map
    assert mine("while x: pass")["input_ids"] == theirs("while x: pass")["input_ids"]
    assert warned == []


def test_a_missing_tensor_would_be_noticed(run: Path, tmp_path: Path, warned: list[str]) -> None:
    # The other tests rest on the loader's report being recorded; here there is something to report.
    tensors = average(run, tmp_path / "out")
    del tensors["model.norm.weight"]
    save_file(tensors, tmp_path / "out" / "model.safetensors", metadata={"format": "pt"})
    _, loading = AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert list(loading["missing_keys"]) == ["model.norm.weight"]
    assert any("model.norm.weight" in message for message in warned)
