"""Weights in formats that are not read: recognised by their true names, refused with the command that converts them."""

from __future__ import annotations

import json
import re
import shlex
import struct
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import ckavg
from ckavg.errors import CkavgError, UnsupportedFormatError
from tests.cli.runner import run_cli
from tests.runs import write_checkpoint, write_run

CASES: dict[str, tuple[str, tuple[str, ...], str]] = {
    "pickle": ("checkpoint-{}", ("pytorch_model.bin",), "AutoModelForCausalLM as M; M.from_pretrained("),
    "sharded pickle": (
        "checkpoint-{}",
        ("pytorch_model-00001-of-00002.bin", "pytorch_model-00002-of-00002.bin", "pytorch_model.bin.index.json"),
        ".save_pretrained(",
    ),
    "adapter pickle": ("checkpoint-{}", ("adapter_model.bin", "adapter_config.json"), "adapter_model.safetensors"),
    "FSDP": (
        "checkpoint-{}",
        (
            "pytorch_model_fsdp_0/.metadata",
            "pytorch_model_fsdp_0/__0_0.distcp",
            "optimizer_0/__0_0.distcp",
            "rng_state_0.pth",
        ),
        "accelerate merge-weights {path}/pytorch_model_fsdp_0 {path}",
    ),
    "torch.distributed": ("step-{}", (".metadata", "__0_0.distcp"), "accelerate merge-weights {path} {path}"),
    "NeMo-RL": (
        "step_{}",
        ("config.yaml", "training_info.json", "policy/weights/.metadata", "policy/weights/__0_0.distcp"),
        "convert_dcp_to_hf.py --config={path}/config.yaml --dcp-ckpt-path={path}/policy/weights "
        "--hf-ckpt-path={run}-safetensors/step_20",
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
        "python {path}/zero_to_fp32.py {path} {path} --safe_serialization --tag global_step20",
    ),
    "DeepSpeed by itself, stage 3": (
        "global_step{}",
        ("zero_pp_rank_0_mp_rank_00_model_states.pt", "zero_pp_rank_0_mp_rank_00_optim_states.pt"),
        "python {run}/zero_to_fp32.py {run} {run}-safetensors/step_20 --safe_serialization --tag global_step20",
    ),
    "DeepSpeed without ZeRO": (
        "global_step{}",
        ("mp_rank_00_model_states.pt",),
        "{run}-safetensors/step_20/model.safetensors",
    ),
    "tensor-parallel": (
        "global_step{}",
        ("mp_rank_00_model_states.pt", "mp_rank_01_model_states.pt"),
        "convert_neox_to_hf.py --input_dir {path}",
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
        "python -m verl.model_merger merge --backend fsdp --local_dir {path}/actor "
        "--target_dir {run}-safetensors/step_20",
    ),
    "diffusers": (
        "checkpoint-{}",
        ("unet/diffusion_pytorch_model.bin", "unet/config.json", "optimizer.bin"),
        "from diffusers import AutoModel as M",
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
    assert command.format(run=run, path=run / directory.format(20)) in done.stderr


@pytest.mark.parametrize(
    ("names", "command"),
    [
        (
            ("epoch=0-step=10.ckpt", "epoch=1-step=20.ckpt"),
            "['state_dict']; save_file({k: v.clone().contiguous() for k, v in w.items()}, '{run}/step_10.safetensors'",
        ),
        (("megatron_gpt--step=10.nemo",), "convert_llama_nemo_to_hf.py --input_name_or_path {run}/megatron_gpt--"),
        (("model.gguf",), "Save the checkpoints as safetensors"),
    ],
)
def test_single_files(tmp_path: Path, names: tuple[str, ...], command: str) -> None:
    for name in names:
        (tmp_path / name).write_bytes(b"not to be unpickled")
    done = run_cli("ema", tmp_path)
    assert done.exit_code == 1
    assert f"holds no safetensors checkpoints, only {names[0]}" in done.stderr
    assert command.replace("{run}", str(tmp_path)) in _unquoted(done.stderr)


def _unquoted(text: str) -> str:
    return text.replace("'\"'\"'", "'")


def test_a_directory_that_lightning_saved(tmp_path: Path) -> None:
    write_foreign(tmp_path, "epoch=0-step={}.ckpt", (".metadata", "__0_0.distcp", "meta.pt"), steps=(10,))
    done = run_cli("ema", tmp_path)
    assert (
        f"python -m lightning.pytorch.utilities.consolidate_checkpoint {tmp_path}/epoch=0-step=10.ckpt && python"
        in done.stderr
    )
    assert f"{tmp_path}/step_10.safetensors" in done.stderr


def test_many_of_one_format_are_counted(tmp_path: Path) -> None:
    write_foreign(tmp_path, "checkpoint-{}", ("pytorch_model.bin",), steps=tuple(range(50)))
    done = run_cli("ema", tmp_path)
    assert "error: 5 problems:" in done.stderr
    assert "46 more checkpoints are in a format that is not read." in done.stderr


def test_a_gathered_model_beside_deepspeeds_pieces_is_read(tmp_path: Path) -> None:
    write_run(tmp_path, [{"w": torch.ones(2)}] * 2, (10, 20))
    for step in (10, 20):
        write_foreign(tmp_path, "checkpoint-{}", (f"global_step{step}/mp_rank_00_model_states.pt",), steps=(step,))
    plan = ckavg.plan_average(ckavg.open_run(tmp_path), ckavg.EMA())
    assert plan.files == ("README.md", "ckavg.json", "config.json", "model.safetensors", "tokenizer.json")


@pytest.mark.parametrize(("name", "key"), [("adapter_model.bin", None), ("epoch=0-step=10.ckpt", "state_dict")])
def test_the_command_for_one_file_works(tmp_path: Path, name: str, key: str | None) -> None:
    """It is run as it is printed."""
    weights = {"a": torch.arange(6.0).view(2, 3).T, "b": torch.ones(2, dtype=torch.bfloat16)}
    directory = tmp_path / "it's a run"
    inside = directory / "checkpoint-10" if key is None else directory
    inside.mkdir(parents=True)
    torch.save(weights if key is None else {key: weights, "epoch": 0}, inside / name)
    stderr = run_cli("ema", directory).stderr
    command = shlex.split(re.findall(r"python -c .*", stderr)[0])
    subprocess.run([sys.executable, *command[1:]], check=True)
    (converted,) = directory.rglob("*.safetensors")
    assert converted.name == ("adapter_model.safetensors" if key is None else "step_10.safetensors")
    assert all(torch.equal(tensor, weights[name]) for name, tensor in load_file(converted).items())


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled:UserWarning")
def test_the_command_for_fsdp_works(tmp_path: Path) -> None:
    pytest.importorskip("accelerate")
    from torch.distributed.checkpoint.filesystem import FileSystemWriter
    from torch.distributed.checkpoint.state_dict_saver import save

    weights = {"a": torch.arange(6.0), "b": torch.ones(2, 2)}
    inside = tmp_path / "checkpoint-10" / "pytorch_model_fsdp_0"
    inside.mkdir(parents=True)
    save({"model": weights}, storage_writer=FileSystemWriter(inside), no_dist=True)
    (command,) = re.findall(r"accelerate merge-weights (.*)", run_cli("ema", tmp_path).stderr)[:1]
    code = "import sys; from accelerate.commands.merge import main; sys.argv[0] = 'merge'; main()"
    subprocess.run([sys.executable, "-c", code, *shlex.split(command)], check=True, capture_output=True)
    merged = load_file(tmp_path / "checkpoint-10" / "model.safetensors")
    assert all(torch.equal(merged[name], weights[name]) for name in weights)


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
    assert "dequantize().save_pretrained(" in caught.value.hint


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
