"""Which tensors are the factors of one product, by the names that trainers give them, and what another rank changes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from ckavg.checkpoints.adapters import Pair, find_pairs, names_of_pairs, with_config
from ckavg.checkpoints.checkpoint import read_checkpoint
from ckavg.checkpoints.configs import read_facts
from ckavg.errors import UnsupportedFormatError


def pairs_of(directory: Path, *names: str, config: dict[str, Any] | None = None) -> tuple[Pair, ...]:
    """The pairs among tensors of these names; those of A are (2, 8), those of B (6, 2)."""
    tensors = {
        name: torch.ones(2, 8) if "_A" in name or "down" in name else torch.ones(6, 2)
        for name in names
        if "alpha" not in name
    }
    tensors |= {name: torch.tensor(4.0) for name in names if "alpha" in name}
    file = "pytorch_lora_weights.safetensors" if config is None else "adapter_model.safetensors"
    save_file(tensors, directory / file)
    if config is not None:
        (directory / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA"} | config))
    checkpoint = read_checkpoint(directory, 1)
    pairs = find_pairs(checkpoint, read_facts(checkpoint))
    assert names_of_pairs(checkpoint) == {name for pair in pairs for name in pair.names}
    return pairs


@pytest.mark.parametrize(
    ("a", "b", "module"),
    [
        ("transformer.q.lora_A.weight", "transformer.q.lora_B.weight", "transformer.q"),
        ("q.lora_embedding_A", "q.lora_embedding_B", "q"),
        ("lora_unet_blocks_0_q.lora_down.weight", "lora_unet_blocks_0_q.lora_up.weight", "lora_unet_blocks_0_q"),
        ("unet.attn.to_q.lora.down.weight", "unet.attn.to_q.lora.up.weight", "unet.attn.to_q"),
        ("attn.processor.to_q_lora.down.weight", "attn.processor.to_q_lora.up.weight", "attn.processor.to_q_lora"),
    ],
)
def test_names_of_factors(tmp_path: Path, a: str, b: str, module: str) -> None:
    (pair,) = pairs_of(tmp_path, a, b, "down.weight", "a.up_proj.weight", "q.lora_B.bias")
    assert (pair.a, pair.b, pair.module, pair.rank, pair.scaling, pair.alpha) == (a, b, module, 2, 1.0, "")
    assert (pair.numel, pair.most) == ((16, 12), 6)


def test_alpha_is_of_its_module(tmp_path: Path) -> None:
    names = [f"lora_unet_{each}.lora_{half}.weight" for each in ("q", "k") for half in ("down", "up")]
    k, q = pairs_of(tmp_path, *names, "lora_unet_q.alpha", "alpha")
    assert (k.alpha, k.scaling) == ("", 1.0)
    assert (q.alpha, q.scaling) == ("lora_unet_q.alpha", None)


@pytest.mark.parametrize(
    ("config", "scaling"),
    [
        ({"r": 2, "lora_alpha": 5}, 2.5),
        ({"r": 2, "lora_alpha": 5, "use_rslora": True}, 5 / 2**0.5),
        ({"r": 4, "lora_alpha": 5, "rank_pattern": {"q": 2}}, 2.5),
        ({"r": 4, "lora_alpha": 5, "rank_pattern": {"a.q": 2}, "alpha_pattern": {"b.q": 1, "^a": 1, ".*q": 7}}, 3.5),
    ],
)
def test_scalings_and_their_configs(tmp_path: Path, config: dict[str, Any], scaling: float) -> None:
    (pair,) = pairs_of(
        tmp_path, "base_model.model.a.q.lora_A.weight", "base_model.model.a.q.lora_B.weight", config=config
    )
    assert pair.module == "a.q"
    assert pair.scaling == pytest.approx(scaling, rel=1e-15)
    new = with_config(config, pair.config, (pair,), {pair.a: 6})
    assert (new["r"], new["rank_pattern"], new["alpha_pattern"]) == (6, {}, {})
    assert new["lora_alpha"] == pytest.approx(scaling * (6**0.5 if config.get("use_rslora") else 6), rel=1e-15)


def test_patterns_name_one_module_each() -> None:
    pairs = tuple(
        Pair(f"{name}.A", "", name, "", 2, scaling, "", (0, 0), 9)
        for name, scaling in [("q", 1.0), ("a.q", 1.0), ("k", 2.0)]
    )
    new = with_config({"r": 2, "lora_alpha": 2}, "", pairs, {"q.A": 3, "a.q.A": 4, "k.A": 4})
    assert (new["r"], new["lora_alpha"]) == (4, 3)
    assert (new["rank_pattern"], new["alpha_pattern"]) == ({"^q": 3}, {"^a.q": 4, "^k": 8})


def test_what_is_no_pair_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedFormatError, match="holds no low-rank adapter"):
        pairs_of(tmp_path, "down.weight", "q.lora_B.bias")
