"""Stage *discover*: what the configs beside the weights say. Are they of one model, and can it be averaged?

Reads `config.json` and `adapter_config.json`, and trusts neither; opens no weight file.
"""

from __future__ import annotations

import contextlib
import itertools
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ckavg.errors import CkavgError, MismatchError, UnsupportedFormatError
from ckavg.run.contents import ADAPTERS
from ckavg.run.files import read_object
from ckavg.run.values import FLOATING, Checkpoint, Entry

CONFIG = "config.json"
ADAPTER_CONFIG = "adapter_config.json"

_MOST_BYTES = 1 << 24
_IDENTITY = ("model_type", "architectures", "_class_name")
_BEHAVIOUR = (
    "rope_theta", "rope_scaling", "rope_parameters", "hidden_act", "tie_word_embeddings", "sliding_window",
    "num_attention_heads", "num_key_value_heads", "rms_norm_eps", "layer_norm_eps", "attn_logit_softcapping",
    "num_experts_per_tok",
)  # fmt: skip
"""What changes the function of the same weights: the result is run with that of the last checkpoint."""

_ADAPTER_IDENTITY = (
    "peft_type",
    "r",
    "lora_alpha",
    "use_rslora",
    "use_dora",
    "rank_pattern",
    "alpha_pattern",
    "fan_in_fan_out",
)
_PACKED = re.compile(r"(?:.*[./])?(?:qweight|weight_packed|\w+_qweight)|.*\.quant_state\.bitsandbytes__.*")
_SCALES = ("_scale", "_scale_inv", "_scale_2", ".absmax", ".SCB", ".quant_map")
_QUANTIZED = "Quantized weights do not average. "
_DEQUANTIZE = (
    'Average the checkpoints as they were before quantizing, or convert them: python -c "from transformers import '
    "AutoModelForCausalLM as M; M.from_pretrained('{0}').dequantize().save_pretrained('{0}-dequantized')\""
)


@dataclass(frozen=True, slots=True)
class Facts:
    """What the configs of one checkpoint say; empty where there are none.

    Attributes:
        configs: `config.json` by component; of anything but a pipeline, that of `""`.
        adapter: `adapter_config.json`.
    """

    configs: Mapping[str, Mapping[str, Any]]
    adapter: Mapping[str, Any]


def read_facts(checkpoint: Checkpoint) -> Facts:
    """Read the configs of a checkpoint. Of a single file there are none: what lies beside need not be its own."""
    if checkpoint.kind == "file":
        return Facts({}, {})
    if checkpoint.kind == "adapter":
        return Facts({}, _read(checkpoint.path / ADAPTER_CONFIG))
    return Facts({part: _read(checkpoint.path / part / CONFIG) for part in checkpoint.components}, {})


def quantized(checkpoints: Sequence[Checkpoint], facts: Sequence[Facts]) -> list[CkavgError]:
    """One error where weights are quantized, by the names of their tensors or by their config."""
    found = [
        (checkpoint, sign)
        for checkpoint, each in zip(checkpoints, facts, strict=True)
        if (sign := _sign_of_quantization(checkpoint, each))
    ]
    if not found:
        return []
    first, sign = found[0]
    more = f", and so are {len(found) - 1} more checkpoints" if len(found) > 1 else ""
    return [
        UnsupportedFormatError(
            f"{first.path} is quantized ({sign}){more}.", hint=_QUANTIZED + _DEQUANTIZE.format(first.path)
        )
    ]


def contradictions(
    checkpoints: Sequence[Checkpoint], facts: Sequence[Facts], *, anchor_is_init: bool
) -> tuple[list[CkavgError], list[str]]:
    """Errors where two checkpoints are of different models, and warnings where they may be.

    Args:
        checkpoints: ordered by step.
        facts: of each.
        anchor_is_init: the first one was named apart from the run, and may be a model without its head.
    """
    errors: list[CkavgError] = []
    warnings: list[str] = []
    for place, ((old, before), (new, after)) in enumerate(itertools.pairwise(zip(checkpoints, facts, strict=True))):
        steps = f"step {new.step}", f"step {old.step}"
        identity = _IDENTITY[:1] if anchor_is_init and place == 0 else _IDENTITY
        for part in before.configs.keys() & after.configs.keys():
            one, other = before.configs[part], after.configs[part]
            where = f"{part}/{CONFIG}" if part else CONFIG
            errors += _different(steps, where, one, other, identity)
            warnings += [_behaves_differently(steps, where, key) for key in _changed(one, other, _BEHAVIOUR)]
        errors += _different(steps, ADAPTER_CONFIG, before.adapter, after.adapter, _ADAPTER_IDENTITY)
        of_base, of_targets = _about_adapters(steps, before.adapter, after.adapter)
        errors += of_base
        warnings += of_targets
    return errors, warnings


def about_adapters_beside(checkpoints: Sequence[Checkpoint]) -> list[str]:
    """A warning where adapters lie beside whole models."""
    found = [each for each in checkpoints if each.kind == "model" and set(each.ignored) & set(ADAPTERS)]
    if not found:
        return []
    return [
        f"{found[-1].path.name} holds an adapter beside a whole model. The whole model is averaged; the adapter "
        "and its config are neither averaged nor copied."
    ]


def _read(path: Path) -> dict[str, Any]:
    with contextlib.suppress(OSError, ValueError):
        return read_object(path, _MOST_BYTES)
    return {}


def _sign_of_quantization(checkpoint: Checkpoint, facts: Facts) -> str | None:
    for name, entry in checkpoint.entries.items():
        if entry.dtype not in FLOATING and _is_packed(name, checkpoint.entries):
            return f"tensor {name!r} holds {entry.dtype} codes"
    for part, config in facts.configs.items():
        stated = config.get("quantization_config")
        if isinstance(stated, dict) and stated:
            method = str(stated.get("quant_method", "unnamed"))[:40]
            return f"quantization_config in {part + '/' if part else ''}{CONFIG}: {method}"
    return None


def _is_packed(name: str, entries: Mapping[str, Entry]) -> bool:
    if _PACKED.fullmatch(name) or (name.endswith("_blocks") and f"{name.removesuffix('blocks')}scales" in entries):
        return True
    stem = name.removesuffix("weight").removesuffix(".")
    return any(name + scale in entries or f"{stem}{scale}" in entries for scale in _SCALES)


def _different(
    steps: tuple[str, str], where: str, before: Mapping[str, Any], after: Mapping[str, Any], keys: Sequence[str]
) -> list[CkavgError]:
    return [
        MismatchError(
            f"{steps[0]}: {where} states {key} {_short(after[key])}, but {_short(before[key])} at {steps[1]}.",
            hint="Checkpoints of different models do not average. Move the foreign ones away, or leave them out with "
            "--from-step, --to-step or --last.",
        )
        for key in _changed(before, after, keys)
    ]


def _about_adapters(
    steps: tuple[str, str], before: Mapping[str, Any], after: Mapping[str, Any]
) -> tuple[list[CkavgError], list[str]]:
    key = "base_model_name_or_path"
    errors: list[CkavgError] = []
    warnings: list[str] = []
    if _changed(before, after, (key,)):
        if _last_part(before[key]) == _last_part(after[key]):
            warnings.append(
                f"{steps[0]} names its base model {_short(after[key])}, {steps[1]} {_short(before[key])}. They are "
                "taken to be one model in two places."
            )
        else:
            errors += _different(steps, ADAPTER_CONFIG, before, after, (key,))
    old, new = before.get("target_modules"), after.get("target_modules")
    if old is not None and new is not None and _as_set(old) != _as_set(new):
        warnings.append(
            f"{ADAPTER_CONFIG} states other target_modules at {steps[0]} than at {steps[1]}; the result takes those of "
            "the last checkpoint."
        )
    return errors, warnings


def _behaves_differently(steps: tuple[str, str], where: str, key: str) -> str:
    return (
        f"{where} states another {key} at {steps[0]} than at {steps[1]}; the result takes that of the last checkpoint."
    )


def _changed(before: Mapping[str, Any], after: Mapping[str, Any], keys: Sequence[str]) -> list[str]:
    """The keys that both have, with different values."""
    return [
        key for key in keys if before.get(key) is not None and after.get(key) is not None and before[key] != after[key]
    ]


def _last_part(path: object) -> str:
    return str(path).rstrip("/").rpartition("/")[2].lower()


def _as_set(value: object) -> object:
    return {str(each) for each in value} if isinstance(value, list) else value


def _short(value: object) -> str:
    text = str(value)
    return text if len(text) <= 80 else f"{text[:80]}…"
