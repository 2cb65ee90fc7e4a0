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

from ckavg.checkpoints.conversion import dequantized
from ckavg.checkpoints.run import FLOATING, Checkpoint, TensorInfo
from ckavg.checkpoints.weight_files import ADAPTERS
from ckavg.errors import CkavgError, MismatchError, UnsupportedFormatError
from ckavg.storage.base import AnyPath
from ckavg.storage.local import read_object

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
_PACKED = re.compile(
    r"(?:.*[./:])?(?:\w+_)?(?:qweight|weight_packed|qdata|Qidxs\w*|W_q|trellis|dense_weights)|.*\.quant_state\.bitsandbytes__.*",
    re.ASCII,
)
_CODEBOOKS = frozenset({"absmax", "centroid", "centroids", "codebook", "codebooks", "lut"})
_BESIDE_CODES = _CODEBOOKS | {"scale", "scales", "scb", "wscales", "zero", "zeros", "zp", "qzeros"}
"""Words in the names of what lies beside the codes of quantized weights."""

_NEUTRAL = frozenset({"and", "data", "inv", "point", "points", "q", "qdata", "quant", "w", "weight"})

_CODES = frozenset({"I8", "U8", "I16", "U16", "I32", "U32", "F8_E4M3", "F8_E5M2", "F8_E4M3FNUZ", "F8_E5M2FNUZ"})


@dataclass(frozen=True, slots=True)
class Facts:
    """What the configs of one checkpoint say; empty where there are none.

    Attributes:
        configs: `config.json` by the folder that it is in.
        adapters: `adapter_config.json` likewise, where the folder holds an adapter.
    """

    configs: Mapping[str, Mapping[str, Any]]
    adapters: Mapping[str, Mapping[str, Any]]


def read_facts(checkpoint: Checkpoint) -> Facts:
    """Read the configs of a checkpoint. Of a single file there are none: what lies beside need not be its own."""
    if checkpoint.kind == "file":
        return Facts({}, {})
    of_adapters = {shard.path.parent for shard in checkpoint.shards if shard.path.name in ADAPTERS}
    places = {folder: checkpoint.path / folder for folder in checkpoint.folders}
    return Facts(
        {folder: _read(place / CONFIG) for folder, place in places.items() if place not in of_adapters},
        {folder: _read(place / ADAPTER_CONFIG) for folder, place in places.items() if place in of_adapters},
    )


def ties_embeddings(facts: Facts) -> bool | None:
    """Whether the configs say that the head is the embedding; None where they do not say."""
    stated = [
        each["tie_word_embeddings"]
        for config in facts.configs.values()
        for each in (config, *(value for value in config.values() if isinstance(value, dict)))
        if isinstance(each.get("tie_word_embeddings"), bool)
    ]
    return any(stated) if stated else None


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
    loadable = [
        checkpoint.path for checkpoint, _ in found if checkpoint.kind == "model" and isinstance(checkpoint.path, Path)
    ]
    return [
        UnsupportedFormatError(
            f"{first.path} is quantized ({sign}){more}.",
            hint="Quantized weights do not average. Average the checkpoints as they were before quantizing"
            + (", or convert them:" if loadable else "."),
            command=dequantized(loadable) if loadable else "",
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
        for part in before.adapters.keys() & after.adapters.keys():
            one, other = before.adapters[part], after.adapters[part]
            errors += _different(steps, ADAPTER_CONFIG, one, other, _ADAPTER_IDENTITY)
            of_base, of_targets = _about_adapters(steps, one, other)
            errors += of_base
            warnings += of_targets
    return errors, warnings


def _read(path: AnyPath) -> dict[str, Any]:
    with contextlib.suppress(OSError, ValueError):
        return read_object(path, _MOST_BYTES)
    return {}


def _sign_of_quantization(checkpoint: Checkpoint, facts: Facts) -> str | None:
    others = {name: entry for name, entry in checkpoint.entries.items() if entry.dtype not in FLOATING}
    beside = _beside_codes(checkpoint.entries) if others else {}
    for name, entry in others.items():
        if _is_packed(name, entry, checkpoint.entries, beside):
            return f"tensor {name!r} holds {entry.dtype} codes"
    for part, config in facts.configs.items():
        stated = config.get("quantization_config")
        if isinstance(stated, dict) and stated:
            method = str(stated.get("quant_method", "unnamed"))[:40]
            return f"quantization_config in {part + '/' if part else ''}{CONFIG}: {method}"
    return None


_Named = Mapping[str, Sequence[frozenset[str]]]


def _beside_codes(entries: Mapping[str, TensorInfo]) -> _Named:
    """What may belong to codes, by module: the words of the last part of each name."""
    found: dict[str, list[frozenset[str]]] = {}
    for name in entries:
        module, last = _split(name)
        words = _words(last)
        if words & _BESIDE_CODES:
            found.setdefault(module, []).append(words)
    return found


def _words(name: str) -> frozenset[str]:
    return frozenset(re.split(r"[_\d]+", name.lower())) - {""}


def _split(name: str) -> tuple[str, str]:
    """The module of a tensor, and its name in there."""
    place = max(name.rfind(mark) for mark in "./:")
    return name[: max(place, 0)], name[place + 1 :]


def _is_packed(name: str, entry: TensorInfo, entries: Mapping[str, TensorInfo], beside: _Named) -> bool:
    """Whether a tensor that is not averaged holds codes, by its name or by scales or codebooks beside it."""
    if _PACKED.fullmatch(name) or (name.endswith("_blocks") and f"{name.removesuffix('blocks')}scales" in entries):
        return True
    module, last = _split(name)
    own = _words(last)
    # in its module, of its name or of none: weight_scale and scale beside weight, but not logit_scale beside bias
    words = {word for each in beside.get(module, []) if not each - _BESIDE_CODES - _NEUTRAL - own for word in each}
    words |= {word for each in beside.get(name, []) for word in each}
    of_codes = entry.dtype in _CODES or (entry.dtype == "I64" and bool(words & _CODEBOOKS))
    return of_codes and entry.numel > 1 and not own & _BESIDE_CODES and bool(words & _BESIDE_CODES)


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
