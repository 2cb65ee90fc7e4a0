"""Small runs as real trainers leave them: every layout, file name and header is that of the trainer's own saver."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

STEPS = (100, 200, 300)
Shapes = dict[str, tuple[int, ...]]
Build = Callable[[Path], None]


def drifting(seed: int, step: int, shapes: Shapes) -> dict[str, Tensor]:
    """Weights that drift with the step, noisily."""
    start = torch.Generator().manual_seed(seed)
    noise = torch.Generator().manual_seed(1000 * seed + step)
    return {
        name: torch.randn(shape, generator=start) * 0.1 + step * 1e-3 + torch.randn(shape, generator=noise) * 0.01
        for name, shape in shapes.items()
    }


def put(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str] | None = None) -> Path:
    """A weight file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({name: value.contiguous() for name, value in tensors.items()}, path, metadata=metadata)
    return path


def note(path: Path, value: object) -> None:
    """A file of JSON, or of text."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(value if isinstance(value, str) else json.dumps(value, indent=2))


PT = {"format": "pt"}
UNET_LORA: Shapes = {
    f"unet.down.{place}.attn.to_{name}.lora_{half}.weight": shape
    for place in range(2)
    for name in "qk"
    for half, shape in (("A", (4, 16)), ("B", (16, 4)))
}
KOHYA: Shapes = {
    f"lora_unet_blocks_{place}_q.lora_{half}.weight": shape
    for place in range(2)
    for half, shape in (("down", (4, 16)), ("up", (16, 4)))
}


def diffusers_lora(root: Path) -> None:
    """`save_lora_weights(..., unet_lora_adapter_metadata=…)`: rank 4, alpha 32, which only the header tells."""
    config = {"unet.r": 4, "unet.lora_alpha": 32, "unet.target_modules": ["to_q", "to_k"]}
    for step in STEPS:
        header = PT | {"lora_adapter_metadata": json.dumps(config, sort_keys=True)}
        put(root / f"checkpoint-{step}/pytorch_lora_weights.safetensors", drifting(1, step, UNET_LORA), header)


def kohya_epochs(root: Path) -> None:
    """sd-scripts and musubi-tuner: a file an epoch, the last without a number, facts in the header."""
    for name, epoch in {"mylora-000001": 1, "mylora-000002": 2, "mylora-000003": 3, "mylora": 4}.items():
        tensors = drifting(2, epoch * 100, KOHYA)
        tensors |= {f"lora_unet_blocks_{place}_q.alpha": torch.tensor(2.0) for place in range(2)}
        facts = {
            "ss_output_name": "mylora",
            "ss_epoch": str(epoch),
            "ss_steps": str(epoch * 100),
            "ss_network_alpha": "2",
            "ss_network_dim": "4",
            "ss_base_model_version": "sdxl_base_v1-0",
            "ss_training_finished_at": str(1.7e9 + epoch),
            "modelspec.date": f"2026-11-2{epoch}",
            "modelspec.hash_sha256": f"0x{epoch:064x}",
            "sshs_model_hash": f"{epoch:064x}",
            "sshs_legacy_hash": f"{epoch:08x}",
        }
        put(root / f"{name}.safetensors", tensors, facts)


def kohya_steps_and_epochs(root: Path) -> None:
    """The same trainer saving by step as well: two clocks in one folder, and the last file without a number."""
    names = {
        "mylora-step00000100": 100,
        "mylora-step00000200": 200,
        "mylora-000001": 150,
        "mylora-000002": 300,
        "mylora": 300,
    }
    for name, step in names.items():
        facts = {"ss_output_name": "mylora", "ss_steps": str(step)}
        put(root / f"{name}.safetensors", drifting(3, step, KOHYA), facts)


def two_runs_by_name(root: Path) -> None:
    """Two LoRAs trained apart into one folder; their steps do not collide."""
    for name, seed, step in (("styleA", 4, 500), ("styleB", 5, 750), ("styleA", 4, 1000), ("styleB", 5, 1250)):
        put(root / f"{name}-step{step:08d}.safetensors", drifting(seed, step, KOHYA), {"ss_output_name": name})


def lerobot(root: Path) -> None:
    """The model and its normalizers in one folder, optimizer and generators in another, all of them safetensors."""
    for step in STEPS:
        model, state = root / f"{step:06d}/pretrained_model", root / f"{step:06d}/training_state"
        put(model / "model.safetensors", drifting(6, step, {"encoder.weight": (16, 8), "encoder.bias": (16,)}))
        note(model / "config.json", {"type": "act"})
        note(model / "train_config.json", {"steps": 300})
        for stem in ("policy_preprocessor", "policy_postprocessor"):
            name = f"{stem}_step_3_normalizer_processor.safetensors"
            note(model / f"{stem}.json", {"steps": [{"state_file": name}]})
            put(model / name, {"observation.state.mean": torch.arange(4.0), "observation.state.std": torch.ones(4)})
        moments: Shapes = {"state/0/exp_avg": (16, 8), "state/0/exp_avg_sq": (16, 8)}
        put(state / "optimizer_state.safetensors", drifting(7, step * 50, moments))
        put(state / "rng_state.safetensors", {"torch_rng_state": torch.arange(64, dtype=torch.uint8)})
        note(state / "training_step.json", {"step": step})
    (root / "last").symlink_to(f"{STEPS[-1]:06d}")


def zero3_empty(root: Path) -> None:
    """ZeRO-3 saved without gathering: most tensors have no elements."""
    for step in STEPS:
        empty = {"embed.weight": torch.empty(0), "head.weight": torch.empty(0)}
        put(root / f"checkpoint-{step}/model.safetensors", drifting(10, step, {"norm.weight": (16,)}) | empty, PT)
        note(root / f"checkpoint-{step}/config.json", {"model_type": "llama", "hidden_size": 16, "vocab_size": 40})


def batch_norm(root: Path) -> None:
    """A model with running statistics, which a negative weight takes below zero."""
    for step in (0, *range(10, 110, 10)):
        statistics = {
            "bn.running_mean": torch.full((8,), step * 1e-2),
            "bn.running_var": torch.full((8,), 4.0 * 0.9**step + 0.01),
            "bn.num_batches_tracked": torch.tensor(step),
        }
        weights = drifting(11, step, {"fc.weight": (8, 8), "bn.weight": (8,), "bn.bias": (8,)})
        put(root / f"checkpoint-{step}/model.safetensors", weights | statistics, PT)


def accelerate_without_config(root: Path) -> None:
    """`accelerator.save_state` as the example scripts use it: config and tokenizer beside the checkpoints."""
    for step in STEPS:
        put(root / f"step_{step}/model.safetensors", drifting(14, step, {"model.embed_tokens.weight": (40, 16)}), PT)
    note(root / "config.json", {"model_type": "llama", "hidden_size": 16, "vocab_size": 40})
    note(root / "tokenizer_config.json", {"tokenizer_class": "PreTrainedTokenizerFast"})


def ai_toolkit(root: Path) -> None:
    """A file every 250 steps, and the last without a number; the header has the step in JSON."""
    for name, step in {"portrait_000000250": 250, "portrait_000000500": 500, "portrait": 600}.items():
        facts = PT | {"training_info": json.dumps({"step": step, "epoch": step // 100})}
        put(root / f"{name}.safetensors", drifting(15, step, KOHYA), facts)


def mlx_lm(root: Path) -> None:
    """Adapters by iteration, and once more under the name that its loader looks for."""
    shapes: Shapes = {
        "model.layers.0.self_attn.q_proj.lora_a": (16, 4),
        "model.layers.0.self_attn.q_proj.lora_b": (4, 16),
    }
    for name, step in {"0000100_adapters": 100, "0000200_adapters": 200, "adapters": 200}.items():
        put(root / f"{name}.safetensors", drifting(16, step, shapes), {"format": "mlx"})
    note(root / "adapter_config.json", {"fine_tune_type": "lora", "num_layers": 1})


def onetrainer(root: Path) -> None:
    """The time of the save in the name, then step, epoch and step of the epoch."""
    for place, step in enumerate((500, 1000, 1500)):
        name = f"mystyle2026-11-2{place}_12-3{place}-00-save-{step}-{place + 2}-{place}"
        put(root / f"{name}.safetensors", drifting(17, step, KOHYA))
