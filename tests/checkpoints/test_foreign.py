"""Weights in unsupported formats: recognised by their real names, refused with the command that converts them."""

from __future__ import annotations

import json
import struct
from pathlib import Path

import pytest
import torch

import ckavg
from ckavg.errors import CkavgError, UnsupportedFormatError
from tests.cli.runner import run_cli
from tests.runs import OLD_PICKLE, write_checkpoint, write_run

CASES: dict[str, tuple[str, tuple[str, ...], str]] = {
    "sharded pickle": (
        "checkpoint-{}",
        ("pytorch_model-00001-of-00002.bin", "pytorch_model-00002-of-00002.bin", "pytorch_model.bin.index.json"),
        "RUN/checkpoint-*/pytorch_model-*-of-00002.bin",
    ),
    "torchtune": ("epoch_{}", ("hf_model_0001_0.pt", "hf_model_0002_0.pt"), "weights_only=True"),
    "diffusers": (
        "checkpoint-{}",
        ("unet/diffusion_pytorch_model.bin", "unet/config.json", "unet_ema/pytorch_model.bin", "optimizer.bin"),
        "RUN/checkpoint-*/unet/diffusion_pytorch_model.bin",
    ),
}
"""What neither docs/formats.md has a row for, nor tests/checkpoints/test_conversion.py converts."""


def write_foreign(run: Path, directory: str, files: tuple[str, ...], steps: tuple[int, ...] = (10, 20)) -> None:
    for step in steps:
        for file in files:
            path = run / directory.format(step) / file.format(step)
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(OLD_PICKLE)
            if file.endswith(".index.json"):
                path.write_text(json.dumps({"weight_map": {name: name for name in files if name.endswith(".bin")}}))


@pytest.mark.parametrize("case", CASES)
def test_refused_with_the_command_that_converts(tmp_path: Path, case: str) -> None:
    directory, files, command = CASES[case]
    run = tmp_path / "run"
    write_foreign(run, directory, files)
    done = run_cli("ema", run)
    assert done.exit_code == 1
    assert "not safetensors." in done.stderr
    assert "This command converts them" in done.stderr
    assert done.stderr.count("\n") == 3
    line = done.stderr.splitlines()[-1]
    assert command.replace("RUN", str(run)) in line
    if command.startswith("RUN"):
        assert line.endswith(f" {command.replace('RUN', str(run))}")


@pytest.mark.parametrize(
    ("names", "command"),
    [
        (("megatron_gpt--step=10.nemo",), "convert_llama_nemo_to_hf.py --input_name_or_path "),
        (("model.gguf",), "Save the checkpoints as safetensors."),
        (("ckpt-1.keras", "ckpt-2.keras"), "Save the checkpoints as safetensors."),
    ],
)
def test_single_files(tmp_path: Path, names: tuple[str, ...], command: str) -> None:
    for name in (*names, "optimizer.pt", "training_args.bin"):
        (tmp_path / name).write_bytes(OLD_PICKLE)
    done = run_cli("ema", tmp_path)
    assert done.exit_code == 1
    more = f" and {len(names) - 1} more like it" if len(names) > 1 else ""
    assert f"holds no safetensors checkpoints, only {sorted(names)[0]}{more}.\n" in done.stderr
    assert command in done.stderr.splitlines()[-1]


@pytest.mark.parametrize(
    ("names", "told"),
    [
        (("epoch=0-step=10.ckpt", "epoch=1-step=20.ckpt"), " RUN/epoch=*-step=*.ckpt\n"),
        (("checkpoint-9.pth.tar", "checkpoint-10.pth.tar"), " RUN/checkpoint-*.pth.tar\n"),
        (("ckpt.pt",), "RUN holds no checkpoints. It holds weights in ckpt.pt, whose names state no step.\n"),
        (("ema_0.99_010.pt", "model010.pt", "opt010.pt"), "weights in model010.pt, whose names state no step.\n"),
    ],
)
def test_single_pickles_in_the_layout_before(tmp_path: Path, names: tuple[str, ...], told: str) -> None:
    for name in (*names, "optimizer.pt", "training_args.bin"):
        (tmp_path / name).write_bytes(OLD_PICKLE)
    done = run_cli("ema", tmp_path)
    assert done.exit_code == 1
    assert told.replace("RUN", str(tmp_path)) in done.stderr


def test_last_and_best_are_not_converted_beside_numbered_ones(tmp_path: Path) -> None:
    for name in ("best.ckpt", "last.ckpt", "step=1.ckpt", "step=2.ckpt"):
        (tmp_path / name).write_bytes(OLD_PICKLE)
    assert run_cli("ema", tmp_path).stderr.endswith(f" {tmp_path}/step=*.ckpt\n")


def test_formats_side_by_side(tmp_path: Path) -> None:
    """One problem, and one command."""
    write_foreign(tmp_path, "checkpoint-{}", ("pytorch_model.bin",), steps=tuple(range(9)))
    write_foreign(tmp_path, "checkpoint-{}", ("state/zero_pp_rank_0_mp_rank_00_optim_states.pt",), steps=(30, 40))
    write_foreign(tmp_path, "checkpoint-{}", ("model.gguf",), steps=(50,))
    told, advice, command = run_cli("ema", tmp_path).stderr.splitlines()
    kinds = "unsupported pickles and files of DeepSpeed and weights in other formats"
    pickle = f"{tmp_path}/checkpoint-0/pytorch_model.bin"
    why = f"{pickle} has the layout that torch wrote before 1.6."
    assert told == f"error: 12 checkpoints hold {kinds}, such as {pickle}, not safetensors. {why}"
    assert advice.count("This command converts them") == 1
    assert advice.endswith("Save the checkpoints as safetensors.")
    assert f" {tmp_path}/checkpoint-*/pytorch_model.bin && (for d in {tmp_path}/checkpoint-*/state; do " in command


def test_a_gathered_model_beside_deepspeeds_pieces_is_read(tmp_path: Path) -> None:
    write_run(tmp_path, [{"w": torch.ones(2)}] * 2, (10, 20))
    for step in (10, 20):
        write_foreign(tmp_path, "checkpoint-{}", (f"global_step{step}/mp_rank_00_model_states.pt",), steps=(step,))
    plan = ckavg.plan_average(ckavg.open_run(tmp_path), ckavg.EMA())
    assert plan.files == ("README.md", "ckavg.json", "config.json", "model.safetensors", "tokenizer.json")


# --- quantized weights ---


@pytest.mark.parametrize("method", ["fp8", "gptq"])
def test_quantization_in_the_config_is_refused(tmp_path: Path, method: str) -> None:
    write_run(tmp_path, [{"w": torch.ones(2)}] * 2, (10, 20))
    for step in (10, 20):
        config = {"model_type": "llama", "quantization_config": {"quant_method": method}}
        (tmp_path / f"checkpoint-{step}" / "config.json").write_text(json.dumps(config))
    with pytest.raises(UnsupportedFormatError, match=f"quantization_config in config.json: {method}"):
        ckavg.open_run(tmp_path)


@pytest.mark.parametrize("dtype", ["F8_E4M3", "F8_E5M2"])
def test_8_bit_floats_are_refused(tmp_path: Path, dtype: str) -> None:
    header = json.dumps({"w": {"dtype": dtype, "shape": [4], "data_offsets": [0, 4]}}).encode()
    for step in (10, 20):
        write_checkpoint(tmp_path / f"checkpoint-{step}", {"w": torch.ones(2)})
        path = tmp_path / f"checkpoint-{step}" / "model.safetensors"
        path.write_bytes(struct.pack("<Q", len(header)) + header + b"\0" * 4)
    with pytest.raises(CkavgError, match=f"dtype '{dtype}', which cannot be averaged"):
        ckavg.open_run(tmp_path)
