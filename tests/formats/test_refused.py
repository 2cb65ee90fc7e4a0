"""Each row of the table "What is refused" of docs/formats.md: what the error names, and the command that converts.

That the commands convert what they should is tested in tests/checkpoints/test_conversion.py, where they are run.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest
import torch

import ckavg
from ckavg.errors import CkavgError, CombinedError
from tests.cli.runner import run_cli, snapshot
from tests.formats.document import table
from tests.runs import save_old
from tests.trainers import PT, note, put

ROWS = table("What is refused")
STEPS = (10, 20)

FILES: Mapping[str, Sequence[str]] = {
    "torch before 1.6": ("checkpoint-{}/pytorch_model.bin", "checkpoint-{}/optimizer.pt"),
    "transposed or expanded tensors": ("checkpoint-{}/pytorch_model.bin",),
    "TorchScript": ("step_{}.pt",),
    "Trainer with DeepSpeed": (
        "checkpoint-{0}/global_step{0}/bf16_zero_pp_rank_0_mp_rank_00_optim_states.pt",
        "checkpoint-{0}/global_step{0}/mp_rank_00_model_states.pt",
        "checkpoint-{0}/zero_to_fp32.py",
    ),
    "DeepSpeed": (
        "global_step{}/mp_rank_00_model_states.pt",
        "global_step{}/zero_pp_rank_0_mp_rank_00_optim_states.pt",
    ),
    "NeMo": ("megatron_gpt--step={}.nemo",),
    "Megatron-LM": ("iter_{:07d}/mp_rank_00/model_optim_rng.pt", "iter_{:07d}/mp_rank_01/model_optim_rng.pt"),
    "GPT-NeoX": ("global_step{}/mp_rank_00_model_states.pt", "global_step{}/mp_rank_01_model_states.pt"),
    "verl, pieces alone": ("global_step_{}/actor/model_world_size_2_rank_0.pt", "global_step_{}/data.pt"),
    "PaddlePaddle": ("checkpoint-{}/model_state.pdparams", "checkpoint-{}/optimizer.pdopt"),
    "Flax": ("checkpoint-{}/flax_model.msgpack",),
    "Keras": ("ckpt-{}.weights.h5",),
    "Orbax": ("{}/default/manifest.ocdbt", "{}/default/_METADATA"),
    "llama.cpp": ("checkpoint-{}.gguf",),
}

F8, SCALE = torch.float8_e4m3fn, torch.float32
CODES: Mapping[str, Mapping[str, torch.dtype]] = {
    "bitsandbytes, 4 bit": {
        "q.weight": torch.uint8,
        "q.weight.absmax": SCALE,
        "q.weight.quant_state.bitsandbytes__nf4": torch.uint8,
    },
    "bitsandbytes, 8 bit": {"q.weight": torch.int8, "q.SCB": SCALE},
    "GPTQ, AWQ": {"q.qweight": torch.int32, "q.qzeros": torch.int32, "q.scales": SCALE},
    "HQQ": {"q.W_q": torch.uint8, "q.scale": SCALE, "q.zero": SCALE},
    "compressed-tensors": {"q.weight_packed": torch.int32, "q.weight_scale": SCALE, "q.weight_shape": torch.int64},
    "torchao": {"q._weight_qdata": torch.int8, "q._weight_scale": SCALE},
    "8-bit floats by block": {"q.weight": F8, "q.weight_scale_inv": SCALE},
    "MXFP4": {"experts.down_proj_blocks": torch.uint8, "experts.down_proj_scales": torch.uint8},
    "MLX, 4 bit": {"q.weight": torch.uint32, "q.scales": SCALE, "q.biases": SCALE},
}


def test_every_row_is_tried_and_every_try_is_a_row() -> None:
    assert ROWS.keys() == FILES.keys() | CODES.keys()


def build(root: Path, name: str) -> None:
    for step in STEPS:
        for file in FILES.get(name, ()):
            write(root / file.format(step), name)
        if name in CODES:
            tensors = {each: torch.full((4, 4), float(step % 7)).to(dtype) for each, dtype in CODES[name].items()}
            put(root / f"checkpoint-{step}/model.safetensors", tensors | {"norm.weight": torch.ones(4) * step}, PT)
            note(root / f"checkpoint-{step}/config.json", {"model_type": "llama"})


def write(path: Path, name: str) -> None:
    """A file as torch writes it, where the row is about that."""
    note(path, "nothing that is read")
    if name == "torch before 1.6":
        save_old({"w": torch.ones(2, 3)}, path)
    elif name == "transposed or expanded tensors":
        torch.save({"w": torch.ones(2, 3).T, "x": torch.ones(2, 1).expand(2, 3)}, path)
    elif name == "TorchScript":
        torch.jit.save(torch.jit.script(torch.nn.Linear(2, 2)), path)


@pytest.mark.parametrize("name", sorted(ROWS.keys() & (FILES.keys() | CODES.keys())))
def test_row(tmp_path: Path, name: str) -> None:
    build(tmp_path, name)
    before, row = snapshot(tmp_path), ROWS[name]
    with pytest.raises(CkavgError) as met:
        ckavg.open_run(tmp_path)
    error = met.value.errors[0] if isinstance(met.value, CombinedError) else met.value
    assert row["the error names"].code
    assert all(code in error.message for code in row["the error names"].code)
    command = getattr(error, "command", "")
    assert bool(row["converted by"].code) == bool(command)
    assert all(code in command for code in row["converted by"].code)
    assert command or "as safetensors" in error.hint
    assert run_cli("mean", tmp_path).exit_code == 1
    assert snapshot(tmp_path) == before
