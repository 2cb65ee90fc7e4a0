"""Trainers that cannot be installed here: files of the names, places and headers that their savers write."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tests import trainers
from tests.formats.trained import Build, Trained, drift, llama, logits
from tests.trainers import PT, Shapes, drifting, note, put

MODEL: Shapes = {"model.embed_tokens.weight": (24, 16), "model.norm.weight": (16,)}
LORA: Shapes = {"model.q.lora_A.weight": (2, 16), "model.q.lora_B.weight": (16, 2)}
ADAPTER = {"peft_type": "LORA", "r": 2, "lora_alpha": 4}
STEPS = (100, 200, 300)


def of_folders(
    name: str,
    weights: Mapping[str, Shapes],
    files: Mapping[str, object],
    beside: Mapping[str, object] | None = None,
    *,
    steps: Sequence[int] = STEPS,
    header: Mapping[str, str] = PT,
) -> Build:
    """A run of folders.

    Args:
        name: of a checkpoint, with a place for its step.
        weights: weight files by relative path.
        files: small files by relative path: JSON, or text.
        beside: the same, beside the checkpoints.
    """

    def build(root: Path) -> Trained:
        for step in steps:
            here = root / name.format(step)
            for seed, (file, shapes) in enumerate(weights.items()):
                put(here / file, drifting(seed, step, shapes), dict(header))
            for file, content in files.items():
                note(here / file.format(step), content)
        for file, content in (beside or {}).items():
            note(root / file, content)
        return Trained([root / name.format(step) for step in steps])

    return build


def of_llama(
    name: str,
    files: Mapping[str, object],
    beside: Mapping[str, object] | None = None,
    *,
    weights: Mapping[str, Shapes] | None = None,
    folder: str = "",
    head: Shapes | None = None,
    **how: Any,
) -> Build:
    """The same, of a model that transformers saves, into a folder of the checkpoint.

    Args:
        weights: what lies beside it.
        head: tensors that are saved with the model.
        how: for its `save_pretrained`.
    """

    def build(root: Path) -> Trained:
        of_folders(name, weights or {}, files, beside)(root)
        trained = Trained(outputs=logits, model=llama())
        for step in STEPS:
            drift(trained.model, step)
            state = trained.model.state_dict() | drifting(9, step, head or {})
            trained.model.save_pretrained(root / name.format(step) / folder, state_dict=state, **how)
            trained.keep(root / name.format(step))
        return trained

    return build


def of_files(build: trainers.Build, *stems: str) -> Build:
    """A run of single files, in this order."""

    def built(root: Path) -> Trained:
        build(root)
        return Trained([root / f"{stem}.safetensors" for stem in stems])

    return built


def flat(
    name: str, shapes: Shapes, *, steps: Sequence[int] = STEPS, header: Mapping[str, str] = PT, end: str = ""
) -> Build:
    """A run of single files, and the last once more without a number."""

    def build(root: Path) -> Trained:
        for step in steps:
            put(root / f"{name.format(step)}.safetensors", drifting(1, step, shapes), dict(header))
        if end:
            put(root / f"{end}.safetensors", drifting(1, steps[-1], shapes), dict(header))
        return Trained([root / f"{name.format(step)}.safetensors" for step in steps])

    return build


def split(stem: str, shapes: Shapes, suffix: str = "") -> tuple[dict[str, Shapes], dict[str, Any]]:
    """Two shards and their index."""
    names = [f"{stem}-0000{place}-of-0000{len(shapes)}.safetensors" for place in range(1, len(shapes) + 1)]
    shards: dict[str, Shapes] = {
        file: {f"{tensor}{suffix}": shape} for file, (tensor, shape) in zip(names, shapes.items(), strict=True)
    }
    placed = {tensor: file for file, of_file in shards.items() for tensor in of_file}
    return shards, {f"{stem}.safetensors.index.json": {"metadata": {"total_size": 1}, "weight_map": placed}}


def paddle(root: Path) -> Trained:
    """Unified checkpoints: model, optimizer and master weights, each in shards with an index."""
    parts = [split(*each) for each in (("model", MODEL), ("optimizer", MODEL, "/moment1_0"), ("master_weights", MODEL))]
    weights = {file: shapes for shards, _ in parts for file, shapes in shards.items()}
    indexes = {file: index for _, of_part in parts for file, index in of_part.items()}
    more = {"config.json": {}, "scheduler.pdparams": ""}
    return of_folders("checkpoint-{}", weights, indexes | more, header={"format": "np"})(root)


def nemo_automodel(root: Path) -> Trained:
    """Slices by torch.distributed's writer for safetensors, and the same put together beside them."""
    for step in STEPS:
        here = root / f"epoch_0_step_{step}/model"
        whole = drifting(1, step, {"w": (4, 2)})["w"]
        for half in range(2):
            slices = {"w": {"saved_offsets": [2 * half, 0]}}
            header = PT | {"DCP_SHARDING_INFO": json.dumps(slices), "DCP_VERSION": "1.0"}
            put(here / f"shard-0000{half + 1}-model-00001-of-00001.safetensors", {"w": whole[2 * half :][:2]}, header)
        put(here / "consolidated/model-00001-of-00001.safetensors", {"w": whole}, PT)
        index = {"metadata": {"total_size": 32}, "weight_map": {"w": "model-00001-of-00001.safetensors"}}
        note(here / "consolidated/model.safetensors.index.json", index)
        note(here / "consolidated/config.json", {"hidden_size": 2})
        note(root / f"epoch_0_step_{step}/optim/__0_0.distcp", "")
    return Trained([root / f"epoch_0_step_{step}" for step in STEPS])


NANOTRON: dict[str, Shapes] = {
    f"model/model/{place}/model_weight_pp-rank-0-of-1_tp-rank-0-of-1.safetensors": {"data": (4, 4)}
    for place in (
        "token_position_embeddings/pp_block/token_embedding",
        "decoder/0/pp_block/attn/qkv_proj",
        "decoder/10/pp_block/attn/qkv_proj",
        "final_layer_norm/pp_block",
        "lm_head/pp_block",
    )
}
ACCELERATE = dict.fromkeys(("optimizer.bin", "scheduler.bin", "random_states_0.pkl"), "")
STABLE_DIFFUSION: Shapes = {
    "model.diffusion_model.out.2.weight": (4, 4, 3, 3),
    "first_stage_model.post_quant_conv.weight": (4, 4, 1, 1),
    "cond_stage_model.transformer.text_model.final_layer_norm.weight": (8,),
}
EMBEDDING: Shapes = {"<cat>": (1, 16)}

BUILDERS: dict[str, Build] = {
    "ai-toolkit": of_files(trainers.ai_toolkit, "portrait_000000250", "portrait_000000500", "portrait"),
    "Axolotl": of_llama(
        "checkpoint-{}", {"tokens_state.json": {}, "debug.log": "", "optimizer.pt": "", "trainer_state.json": {}}
    ),
    "Bagel": of_folders(
        "{:07d}",
        {"model.safetensors": MODEL, "ema.safetensors": MODEL},
        {"optimizer.00000-of-00002.pt": "", "scheduler.pt": "", "data_status.pt": ""},
    ),
    "diffusers, textual inversion": flat("learned_embeds-steps-{}", EMBEDDING, end="learned_embeds"),
    "diffusion-pipe": of_folders(
        "epoch{}",
        {"adapter_model.safetensors": LORA},
        {"adapter_config.json": ADAPTER, "config.toml": "rank = 2"},
        {"global_step200/mp_rank_00_model_states.pt": "", "latest": "global_step200", "zero_to_fp32.py": ""},
        steps=(1, 2, 3),
    ),
    "LLaMA-Factory, PPO": of_folders(
        "checkpoint-{}",
        {
            "adapter_model.safetensors": LORA,
            "value_head.safetensors": {"v_head.summary.weight": (1, 16), "v_head.summary.bias": (1,)},
        },
        {"adapter_config.json": ADAPTER, "training_args.bin": ""},
    ),
    "mistral-finetune": of_folders(
        "checkpoint_{:06d}",
        {"consolidated/lora.safetensors": LORA},
        {"consolidated/params.json": {"dim": 16}, "consolidated/tokenizer.model.v3": "bytes"},
    ),
    "MLX": of_files(trainers.mlx_lm, "0000100_adapters", "0000200_adapters"),
    "ms-swift, LoRA": of_folders(
        "checkpoint-{}",
        {"adapter_model.safetensors": LORA, "vit.safetensors": {"visual.merger.weight": (16, 16)}},
        {"adapter_config.json": ADAPTER, "additional_config.json": {}, "args.json": {}, "optimizer.pt": ""},
    ),
    "nanotron": of_folders(
        "{}",
        NANOTRON | {"optimizer/optimizer_pp-0-of-1_tp-0-of-1.safetensors": MODEL},
        {"config.yaml": "", "model_config.json": {}, "checkpoint_metadata.json": {}, "random/rng_0.pt": ""},
        {"latest.txt": "300"},
        header={"version": "1.4"},
    ),
    "NeMo AutoModel, sharded": nemo_automodel,
    "OneTrainer": of_files(
        trainers.onetrainer,
        *(f"mystyle2026-11-2{place}_12-3{place}-00-save-{500 * place + 500}-{place + 2}-{place}" for place in range(3)),
    ),
    "OpenRLHF": of_llama("global_step{}_hf", {"tokenizer.json": {}}),
    "PaddleNLP, unified": paddle,
    "SimpleTuner": of_folders(
        "checkpoint-{}",
        {"pytorch_lora_weights.safetensors": LORA, "ema/pytorch_lora_weights.safetensors": LORA},
        ACCELERATE | {"simpletuner_config.json": {}, "training_state.json": {}, "ema_model.pt": ""},
    ),
    "sd-scripts, by step and by epoch": of_files(
        trainers.kohya_steps_and_epochs,
        *("mylora-step00000100", "mylora-000001", "mylora-step00000200", "mylora-000002"),
    ),
    "Stable Diffusion, single files": flat(
        "sd15-step{:08d}", STABLE_DIFFUSION, header={"modelspec.architecture": "sd1"}
    ),
    "timm, on the Hub": of_folders(
        "checkpoint-{}", {"model.safetensors": MODEL}, {"config.json": {"architecture": "vit"}}
    ),
    "Trainer with FSDP, gathered": of_llama(
        "checkpoint-{}",
        {
            "pytorch_model_fsdp_0/.metadata": "",
            "pytorch_model_fsdp_0/__0_0.distcp": "",
            "optimizer_0/__0_0.distcp": "",
            "rng_state_0.pth": "",
        },
    ),
    "Trainer with DeepSpeed, gathered": of_llama(
        "checkpoint-{}",
        {
            "global_step{}/mp_rank_00_model_states.pt": "",
            "global_step{}/bf16_zero_pp_rank_0_mp_rank_00_optim_states.pt": "",
            "latest": "",
            "zero_to_fp32.py": "",
        },
    ),
    "TRL, value head": of_llama("checkpoint-{}", {}, head={"v_head.summary.weight": (1, 16)}),
    "levanter": of_llama("hf-{}", {}),
    "LLM Foundry": of_llama("huggingface/ba{}", {}),
    "OLMo": of_llama("stage1-step{}-tokens5B", {}, max_shard_size="8KB"),
    "copies in other dtypes": of_llama(
        "checkpoint-{}",
        {"tokenizer.model.v3": "", "bpe.codes": "", "pytorch_model.bin": "", "model.Q4_K_M.gguf": ""},
        weights={
            "model.fp16.safetensors": MODEL,
            "consolidated.safetensors": MODEL,
            "onnx/model.safetensors": MODEL,
        },
    ),
    "torchtune, LoRA": of_llama(
        "epoch_{}",
        {"adapter_config.json": {}, "adapter_model.pt": ""},
        {"recipe_state/recipe_state.pt": "", "torchtune_config.yaml": ""},
        weights={"adapter_model.safetensors": LORA},
        max_shard_size="8KB",
    ),
    "verl": of_llama(
        "global_step_{}",
        {"actor/model_world_size_2_rank_0.pt": "", "actor/optim_world_size_2_rank_0.pt": "", "data.pt": ""},
        {"latest_checkpointed_iteration.txt": "300"},
        folder="actor/huggingface",
    ),
}
