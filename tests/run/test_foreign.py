"""Weights in formats that are not read: recognised by their true names, refused with the command that converts them."""

from __future__ import annotations

import json
import struct
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import ckavg
from ckavg.checkpoints.conversion import interpreter
from ckavg.errors import CkavgError, UnsupportedFormatError
from tests.cli.runner import run_cli
from tests.runs import write_checkpoint, write_run

CASES: dict[str, tuple[str, tuple[str, ...], str]] = {
    "pickle": ("checkpoint-{}", ("pytorch_model.bin",), "RUN/checkpoint-*/pytorch_model.bin"),
    "sharded pickle": (
        "checkpoint-{}",
        ("pytorch_model-00001-of-00002.bin", "pytorch_model-00002-of-00002.bin", "pytorch_model.bin.index.json"),
        "RUN/checkpoint-*/pytorch_model-*-of-00002.bin",
    ),
    "adapter pickle": (
        "checkpoint-{}",
        ("adapter_model.bin", "adapter_config.json"),
        "RUN/checkpoint-*/adapter_model.bin",
    ),
    "FSDP": (
        "checkpoint-{}",
        (
            "pytorch_model_fsdp_0/.metadata",
            "pytorch_model_fsdp_0/__0_0.distcp",
            "optimizer_0/__0_0.distcp",
            "rng_state_0.pth",
        ),
        'for d in RUN/checkpoint-*/pytorch_model_fsdp_0; do accelerate merge-weights "$d" "${d%/*}" ||',
    ),
    "torch.distributed": ("step-{}", (".metadata", "__0_0.distcp"), "RUN/step-*"),
    "torch.distributed, the optimizer beside": (
        "step-{}",
        ("model/.metadata", "model/__0_0.distcp", "optim/.metadata", "optim/__0_0.distcp"),
        "RUN/step-*/model",
    ),
    "NeMo-RL": (
        "step_{}",
        ("config.yaml", "training_info.json", "policy/weights/.metadata", "policy/weights/__0_0.distcp"),
        'convert_dcp_to_hf.py --config="$d"/config.yaml --dcp-ckpt-path="$d"/policy/weights '
        '--hf-ckpt-path=RUN-safetensors/"${d##*/}"',
    ),
    "DeepSpeed in a Trainer's": (
        "checkpoint-{0}",
        (
            "latest",
            "zero_to_fp32.py",
            "global_step{0}/bf16_zero_pp_rank_0_mp_rank_00_optim_states.pt",
            "global_step{0}/mp_rank_00_model_states.pt",
            "training_args.bin",
        ),
        'for d in RUN/checkpoint-*/global_step*; do PYTHON "${d%/*}"/zero_to_fp32.py "${d%/*}" "${d%/*}" '
        '--safe_serialization --tag "${d##*/}"',
    ),
    "DeepSpeed by itself, stage 3": (
        "global_step{}",
        ("zero_pp_rank_0_mp_rank_00_model_states.pt", "zero_pp_rank_0_mp_rank_00_optim_states.pt"),
        'for d in RUN/global_step*; do PYTHON "${d%/*}"/zero_to_fp32.py "${d%/*}" RUN-safetensors/"${d##*/}" '
        '--safe_serialization --tag "${d##*/}"',
    ),
    "DeepSpeed without ZeRO": (
        "global_step{}",
        ("mp_rank_00_model_states.pt",),
        "RUN/global_step*/mp_rank_00_model_states.pt",
    ),
    "tensor-parallel": (
        "global_step{}",
        ("mp_rank_00_model_states.pt", "mp_rank_01_model_states.pt"),
        'convert_neox_to_hf.py --input_dir "$d"',
    ),
    "Megatron": (
        "iter_{:07d}",
        ("mp_rank_00/model_optim_rng.pt", "mp_rank_01/model_optim_rng.pt"),
        "from megatron.bridge import AutoBridge",
    ),
    "Megatron, distributed": (
        "iter_{:07d}",
        ("common.pt", "metadata.json", ".metadata", "__0_0.distcp"),
        "export_ckpt(",
    ),
    "torchtune": ("epoch_{}", ("hf_model_0001_0.pt", "hf_model_0002_0.pt"), "weights_only=True"),
    "verl": (
        "global_step_{}",
        ("actor/model_world_size_8_rank_0.pt", "actor/huggingface/config.json"),
        '-m verl.model_merger merge --backend fsdp --local_dir "$d"/actor --target_dir RUN-safetensors/"${d##*/}"',
    ),
    "diffusers": (
        "checkpoint-{}",
        ("unet/diffusion_pytorch_model.bin", "unet/config.json", "unet_ema/pytorch_model.bin", "optimizer.bin"),
        "RUN/checkpoint-*/unet/diffusion_pytorch_model.bin",
    ),
    "an optimizer of its own name": (
        "checkpoint-{}",
        ("model.pt", "optim.pt", "train.pt"),
        "RUN/checkpoint-*/model.pt",
    ),
}


def write_foreign(run: Path, directory: str, files: tuple[str, ...], steps: tuple[int, ...] = (10, 20)) -> None:
    for step in steps:
        for file in files:
            path = run / directory.format(step) / file.format(step)
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(b"not to be unpickled")


@pytest.mark.parametrize("case", CASES)
def test_refused_with_the_command_that_converts(tmp_path: Path, case: str) -> None:
    directory, files, command = CASES[case]
    run = tmp_path / "run"
    write_foreign(run, directory, files)
    done = run_cli("ema", run)
    assert done.exit_code == 1
    assert "not safetensors." in done.stderr
    assert "ckavg never unpickles" in done.stderr
    assert done.stderr.count("\n") == 3
    line = done.stderr.splitlines()[-1].replace(f"{interpreter(ours=False)} ", "PYTHON ")
    assert command.replace("RUN", str(run)) in line
    if command.startswith("RUN"):
        assert line.endswith(f" {command.replace('RUN', str(run))}")


@pytest.mark.parametrize(
    ("names", "command"),
    [
        (("epoch=0-step=10.ckpt", "epoch=1-step=20.ckpt"), "RUN/epoch=*-step=*.ckpt"),
        (("checkpoint-9.pth.tar", "checkpoint-10.pth.tar"), "RUN/checkpoint-*.pth.tar"),
        (("ckpt.pt",), "RUN/ckpt.pt"),
        (("ema_0.99_010.pt", "model010.pt", "opt010.pt"), "RUN/model010.pt"),
        (("megatron_gpt--step=10.nemo",), "convert_llama_nemo_to_hf.py --input_name_or_path "),
        (("model.gguf",), "Save the checkpoints as safetensors; ckavg reads nothing else."),
        (("ckpt-1.keras", "ckpt-2.keras"), "Save the checkpoints as safetensors; ckavg reads nothing else."),
    ],
)
def test_single_files(tmp_path: Path, names: tuple[str, ...], command: str) -> None:
    for name in (*names, "optimizer.pt", "training_args.bin"):
        (tmp_path / name).write_bytes(b"not to be unpickled")
    done = run_cli("ema", tmp_path)
    assert done.exit_code == 1
    more = f" and {len(names) - 1} more like it" if len(names) > 1 else ""
    assert f"holds no safetensors checkpoints, only {sorted(names)[0]}{more}.\n" in done.stderr
    line = done.stderr.splitlines()[-1]
    assert command.replace("RUN", str(tmp_path)) in line
    assert not command.startswith("RUN") or line.endswith(f" {command.replace('RUN', str(tmp_path))}")


def test_last_and_best_are_not_converted_beside_numbered_ones(tmp_path: Path) -> None:
    for name in ("best.ckpt", "last.ckpt", "step=1.ckpt", "step=2.ckpt"):
        (tmp_path / name).write_bytes(b"not to be unpickled")
    assert run_cli("ema", tmp_path).stderr.endswith(f" {tmp_path}/step=*.ckpt\n")


def test_a_directory_that_lightning_saved(tmp_path: Path) -> None:
    write_foreign(tmp_path, "epoch=0-step={}.ckpt", (".metadata", "__0_0.distcp", "meta.pt"), steps=(10,))
    done = run_cli("ema", tmp_path)
    assert 'path.with_suffix(\\".safetensors\\")' in done.stderr
    assert f" {tmp_path}/epoch=0-step=10.ckpt\n" in done.stderr


def test_formats_side_by_side(tmp_path: Path) -> None:
    """One problem, and one command."""
    write_foreign(tmp_path, "checkpoint-{}", ("pytorch_model.bin",), steps=(10, 20))
    write_foreign(tmp_path, "checkpoint-{}", ("pytorch_model_fsdp_0/__0_0.distcp",), steps=(30, 40))
    write_foreign(tmp_path, "checkpoint-{}", ("model.gguf",), steps=(50,))
    told, advice, command = run_cli("ema", tmp_path).stderr.splitlines()
    assert told == (
        "error: 5 checkpoints hold pickles and files of torch.distributed and weights in other formats, such as "
        f"{tmp_path}/checkpoint-10/pytorch_model.bin, not safetensors."
    )
    assert advice.count("This command converts them") == 1
    assert advice.endswith("Save the checkpoints as safetensors; ckavg reads nothing else.")
    folders = f"{tmp_path}/checkpoint-*/pytorch_model_fsdp_0"
    assert f" {tmp_path}/checkpoint-*/pytorch_model.bin && (for d in {folders}; do accelerate " in command


def test_many_of_one_format_are_counted(tmp_path: Path) -> None:
    write_foreign(tmp_path, "checkpoint-{}", ("pytorch_model.bin",), steps=tuple(range(50)))
    done = run_cli("ema", tmp_path)
    first = tmp_path / "checkpoint-0" / "pytorch_model.bin"
    assert done.stderr.startswith(f"error: 50 checkpoints hold pickles, such as {first}, not safetensors.\n")
    assert done.stderr.endswith(f" {tmp_path}/checkpoint-*/pytorch_model.bin\n")


def test_a_gathered_model_beside_deepspeeds_pieces_is_read(tmp_path: Path) -> None:
    write_run(tmp_path, [{"w": torch.ones(2)}] * 2, (10, 20))
    for step in (10, 20):
        write_foreign(tmp_path, "checkpoint-{}", (f"global_step{step}/mp_rank_00_model_states.pt",), steps=(step,))
    plan = ckavg.plan_average(ckavg.open_run(tmp_path), ckavg.EMA())
    assert plan.files == ("README.md", "ckavg.json", "config.json", "model.safetensors", "tokenizer.json")


# --- quantized weights ---

QUANTIZED = {
    "int8 of bitsandbytes": {"q.weight": torch.ones(4, 4, dtype=torch.int8), "q.SCB": torch.ones(4)},
    "4 bits of bitsandbytes": {
        "q.weight": torch.ones(8, 1, dtype=torch.uint8),
        "q.weight.absmax": torch.ones(1),
        "q.weight.quant_map": torch.ones(16),
        "q.weight.quant_state.bitsandbytes__nf4": torch.ones(10, dtype=torch.uint8),
    },
    "GPTQ": {
        "q.qweight": torch.ones(4, 4, dtype=torch.int32),
        "q.qzeros": torch.ones(1, 4, dtype=torch.int32),
        "q.scales": torch.ones(1, 4, dtype=torch.float16),
    },
    "int8 with scales": {"q.weight": torch.ones(4, 4, dtype=torch.int8), "q.weight_scale": torch.ones(4)},
    "int8 with inverse scales": {"q.weight": torch.ones(4, 4, dtype=torch.int8), "q.weight_scale_inv": torch.ones(4)},
    "packed": {"q.weight_packed": torch.ones(4, 1, dtype=torch.int32), "q.weight_scale": torch.ones(4)},
    "MXFP4": {
        "experts.down_proj_blocks": torch.ones(4, 4, dtype=torch.uint8),
        "experts.down_proj_scales": torch.ones(4, dtype=torch.uint8),
    },
}


@pytest.mark.parametrize("case", QUANTIZED)
def test_quantized_tensors_are_refused_once(tmp_path: Path, case: str) -> None:
    write_run(tmp_path, [QUANTIZED[case]] * 3, (10, 20, 30))
    with pytest.raises(UnsupportedFormatError, match=r"is quantized \(tensor .* codes\), and so are 2 more") as caught:
        ckavg.open_run(tmp_path)
    assert "dequantize().save_pretrained(" in caught.value.command


@pytest.mark.parametrize("method", ["fp8", "awq", "gptq", "bitsandbytes", "compressed-tensors"])
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


def test_scales_of_plain_models_are_averaged(tmp_path: Path) -> None:
    weights = {
        "q.weight": torch.ones(4, 4),
        "q.weight_scale": torch.ones(4),
        "logit_scale": torch.ones(()),
        "position_ids": torch.arange(4),
        "num_blocks": torch.tensor(4),
    }
    for step in (10, 20):
        save_file(weights, tmp_path / f"step_{step}.safetensors")
    assert ckavg.open_run(tmp_path).steps == (10, 20)
