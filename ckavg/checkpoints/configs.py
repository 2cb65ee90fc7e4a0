"""Stage *discover*: check configs and headers. Do they describe one model, and can it be averaged?

Trainers put values into headers that are nowhere else: the alpha of an adapter, the steps it was trained for, the name
of the run. Reads `config.json` and `adapter_config.json`, and trusts neither; opens no weight file.
"""

from __future__ import annotations

import dataclasses
import itertools
import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from ckavg.checkpoints.headers import KNOWN_HASHES
from ckavg.checkpoints.layouts import WEIGHTS
from ckavg.checkpoints.run import FLOATING, Checkpoint, TensorInfo
from ckavg.checkpoints.unsupported import dequantized
from ckavg.checkpoints.weight_files import ADAPTERS
from ckavg.errors import CkavgError, MismatchError, MixedOrderError, UnsupportedFormatError, listed
from ckavg.storage.base import AnyPath
from ckavg.storage.local import parse_json, read_object

CONFIG = "config.json"
ADAPTER_CONFIG = "adapter_config.json"

_MOST_BYTES = 1 << 24
_IDENTITY = ("model_type", "architectures", "_class_name")
_BEHAVIOUR = (
    "rope_theta", "rope_scaling", "rope_parameters", "hidden_act", "tie_word_embeddings", "sliding_window",
    "num_attention_heads", "num_key_value_heads", "rms_norm_eps", "layer_norm_eps", "attn_logit_softcapping",
    "num_experts_per_tok",
)  # fmt: skip
"""Settings that change what the same weights compute; a result has those of the last checkpoint."""

_ADAPTER_IDENTITY = (
    "peft_type", "r", "lora_alpha", "use_rslora", "use_dora", "rank_pattern", "alpha_pattern", "fan_in_fan_out",
)  # fmt: skip
_PACKED = re.compile(
    r"(?:.*[./:])?(?:\w+_)?(?:qweight|weight_packed|qdata|Qidxs\w*|W_q|trellis|dense_weights)|.*\.quant_state\.bitsandbytes__.*",
    re.ASCII,
)
_CODEBOOKS = frozenset({"absmax", "centroid", "centroids", "codebook", "codebooks", "lut"})
_BESIDE_CODES = _CODEBOOKS | {"scale", "scales", "scb", "wscales", "zero", "zeros", "zp", "qzeros"}
"""Words in the names of tensors that accompany the codes of quantized weights."""

_NEUTRAL = frozenset({"and", "data", "inv", "point", "points", "q", "qdata", "quant", "w", "weight"})

_CODES = frozenset({"I8", "U8", "I16", "U16", "I32", "U32", "F8_E4M3", "F8_E5M2", "F8_E4M3FNUZ", "F8_E5M2FNUZ"})


@dataclass(frozen=True, slots=True)
class Facts:
    """The configs of one checkpoint; empty if there are none.

    Attributes:
        configs: `config.json` by its folder.
        adapters: `adapter_config.json` by its folder, for folders with an adapter.
    """

    configs: Mapping[str, Mapping[str, Any]]
    adapters: Mapping[str, Mapping[str, Any]]


def read_facts(checkpoint: Checkpoint) -> Facts:
    """Read the configs of a checkpoint. A single file has none: a config beside it need not belong to it."""
    if checkpoint.kind == "file":
        return Facts({}, {})
    adapter_folders = {shard.path.parent for shard in checkpoint.shards if shard.saved_as in ADAPTERS}
    places = {folder: checkpoint.path / folder for folder in checkpoint.folders}
    return Facts(
        {folder: _read(place / CONFIG) for folder, place in places.items() if place not in adapter_folders},
        {folder: _read(place / ADAPTER_CONFIG) for folder, place in places.items() if place in adapter_folders},
    )


def ties_embeddings(facts: Facts) -> bool | None:
    """Whether the configs tie the head to the embedding; None if they do not say."""
    stated = [
        each["tie_word_embeddings"]
        for config in facts.configs.values()
        for each in (config, *(value for value in config.values() if isinstance(value, dict)))
        if isinstance(each.get("tie_word_embeddings"), bool)
    ]
    return any(stated) if stated else None


def without_shared(checkpoint: Checkpoint, facts: Facts) -> Checkpoint:
    """A checkpoint as transformers would save it as safetensors: of tensors that share memory in a pickle, only the
    first, unless the config says that they are not tied.
    """
    if all(shard.path.suffix == WEIGHTS for shard in checkpoint.shards):  # where no two tensors share bytes
        return checkpoint
    if not any("model_type" in config for config in facts.configs.values()) or ties_embeddings(facts) is False:
        return checkpoint
    first: dict[tuple[int, int, tuple[int, ...], str], str] = {}
    for name, entry in checkpoint.entries.items():
        first.setdefault((entry.shard, entry.offset, entry.shape, entry.dtype), name)
    kept = set(first.values())
    return checkpoint.without({name for name, entry in checkpoint.entries.items() if entry.numel and name not in kept})


def quantized(checkpoints: Sequence[Checkpoint], facts: Sequence[Facts]) -> list[CkavgError]:
    """One error if weights are quantized, by the names of their tensors or by their config."""
    found = [
        (checkpoint, sign)
        for checkpoint, each in zip(checkpoints, facts, strict=True)
        if (sign := _sign_of_quantization(checkpoint, each))
    ]
    if not found:
        return []
    first, sign = found[0]
    more = f", and so are {len(found) - 1} more checkpoints" if len(found) > 1 else ""
    loadable = [each.path for each, _ in found if each.kind == "model" and isinstance(each.path, Path)]
    return [
        UnsupportedFormatError(
            f"{first.path} is quantized ({sign}){more}.",
            hint="Quantized weights cannot be averaged. Average the checkpoints from before quantizing"
            + (", or convert them:" if loadable else "."),
            command=dequantized(loadable) if loadable else "",
        )
    ]


def contradictions(
    checkpoints: Sequence[Checkpoint], facts: Sequence[Facts], *, anchor_is_init: bool
) -> tuple[list[CkavgError], list[str]]:
    """Errors if two checkpoints are of different models, and warnings if they may be.

    An anchor given with `init` may be a model without its head.
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
            warnings += [
                f"{where} states another {key} at {steps[0]} than at {steps[1]}; the result has that of the last "
                "checkpoint."
                for key in _changed(one, other, _BEHAVIOUR)
            ]
        for part in before.adapters.keys() & after.adapters.keys():
            one, other = before.adapters[part], after.adapters[part]
            errors += _different(steps, ADAPTER_CONFIG, one, other, _ADAPTER_IDENTITY)
            different_bases, different_targets = _about_adapters(steps, one, other)
            errors += different_bases
            warnings += different_targets
    return errors, warnings


def _read(path: AnyPath) -> dict[str, Any]:
    with suppress(OSError, ValueError):
        return read_object(path, _MOST_BYTES)
    return {}


def _sign_of_quantization(checkpoint: Checkpoint, facts: Facts) -> str | None:
    others = {name: entry for name, entry in checkpoint.entries.items() if entry.dtype not in FLOATING}
    beside: dict[str, list[frozenset[str]]] = defaultdict(list)  # tensors that may accompany codes, by module
    for name in checkpoint.entries if others else ():
        module, last = _split(name)
        if _words(last) & _BESIDE_CODES:
            beside[module].append(_words(last))
    for name, entry in others.items():
        if _is_packed(name, entry, checkpoint.entries, beside):
            return f"tensor {name!r} holds {entry.dtype} codes"
    for part, config in facts.configs.items():
        stated = config.get("quantization_config")
        if isinstance(stated, dict) and stated:
            method = str(stated.get("quant_method", "unnamed"))[:40]
            return f"quantization_config in {part + '/' if part else ''}{CONFIG}: {method}"
    return None


_Words = Mapping[str, Sequence[frozenset[str]]]


def _words(name: str) -> frozenset[str]:
    return frozenset(re.split(r"[_\d]+", name.lower())) - {""}


def _split(name: str) -> tuple[str, str]:
    """The module of a tensor, and its name in it."""
    place = max(name.rfind(mark) for mark in "./:")
    return name[: max(place, 0)], name[place + 1 :]


def _is_packed(name: str, entry: TensorInfo, entries: Mapping[str, TensorInfo], beside: _Words) -> bool:
    """Whether a copied tensor holds codes, by its name or by scales or codebooks beside it."""
    if _PACKED.fullmatch(name) or (name.endswith("_blocks") and f"{name.removesuffix('blocks')}scales" in entries):
        return True
    module, last = _split(name)
    own = _words(last)
    # in its module, with its name or without one: weight_scale and scale beside weight, but not logit_scale beside bias
    words = {word for each in beside.get(module, []) if not each - _BESIDE_CODES - _NEUTRAL - own for word in each}
    words |= {word for each in beside.get(name, []) for word in each}
    may_be_codes = entry.dtype in _CODES or (entry.dtype == "I64" and bool(words & _CODEBOOKS))
    return may_be_codes and entry.numel > 1 and not own & _BESIDE_CODES and bool(words & _BESIDE_CODES)


def _different(
    steps: tuple[str, str], where: str, before: Mapping[str, Any], after: Mapping[str, Any], keys: Sequence[str]
) -> list[CkavgError]:
    return [
        MismatchError(
            f"{steps[0]}: {where} states {key} {_short(after[key])}, but {_short(before[key])} at {steps[1]}.",
            hint="Checkpoints of different models cannot be averaged. Move the others away, or leave them out with "
            "--from-step, --to-step or --last.",
        )
        for key in _changed(before, after, keys)
    ]


def _about_adapters(
    steps: tuple[str, str], before: Mapping[str, Any], after: Mapping[str, Any]
) -> tuple[list[CkavgError], list[str]]:
    key = "base_model_name_or_path"
    one, other = (str(each.get(key)).rstrip("/").rpartition("/")[2].lower() for each in (before, after))
    errors: list[CkavgError] = []
    warnings: list[str] = []
    if _changed(before, after, (key,)):
        if one == other:
            warnings.append(
                f"{steps[0]} names its base model {_short(after[key])}, {steps[1]} {_short(before[key])}. They are "
                "assumed to be one model in two places."
            )
        else:
            errors += _different(steps, ADAPTER_CONFIG, before, after, (key,))
    old, new = (
        {str(item) for item in value} if isinstance(value := each.get("target_modules"), list) else value
        for each in (before, after)
    )
    if old is not None and new is not None and old != new:
        warnings.append(
            f"{ADAPTER_CONFIG} states other target_modules at {steps[0]} than at {steps[1]}; the result has those of "
            "the last checkpoint."
        )
    return errors, warnings


def _changed(before: Mapping[str, Any], after: Mapping[str, Any], keys: Sequence[str]) -> list[str]:
    """Keys that both have with different values."""
    return [
        key for key in keys if before.get(key) is not None and after.get(key) is not None and before[key] != after[key]
    ]


# --- headers ---

_RUN_NAME = "ss_output_name"
"""The header entry with the name of the run in sd-scripts and similar trainers."""

_HEADER_WORDS = re.compile(r"[A-Z]?[a-z]+|[A-Z]+(?![a-z])|\d+", re.ASCII)
_PROGRESS = frozenset(
    {
        "batches", "date", "duration", "elapsed", "end", "ended", "epoch", "epochs", "finished", "images", "info",
        "iteration", "iterations", "loss", "progress", "samples", "session", "start", "started", "step", "steps",
        "time", "timestamp", "tokens",
    }
)  # fmt: skip
"""Words in the names of entries that change during a run."""

_MEANING = frozenset(
    {
        "adapter", "alpha", "alphas", "arch", "architecture", "base", "class", "config", "dim", "dims", "dtype",
        "format", "layers", "lora", "metadata", "model", "module", "modules", "network", "parameterization", "pattern",
        "peft", "prediction", "quantization", "r", "rank", "ranks", "rslora", "scale", "scaling", "target", "targets",
        "type", "v",
    }
)  # fmt: skip
"""Words in the names of entries that a loader needs to build the right model."""

_HASH = frozenset({"checksum", "crc", "digest", "hash", "md", "sha", "sha1", "sha256", "sha512"})


def several_named_runs(checkpoints: Sequence[Checkpoint]) -> list[CkavgError]:
    """An error if headers name more than one run."""
    by_run: dict[str, list[str]] = {}
    for checkpoint in checkpoints:
        for name in {shard.metadata[_RUN_NAME] for shard in checkpoint.shards if _RUN_NAME in shard.metadata}:
            by_run.setdefault(name, []).append(checkpoint.path.name)
    if len(by_run) < 2:
        return []
    named = "; ".join(f"{_short(name)} ({listed(names)})" for name, names in by_run.items())
    return [
        MixedOrderError(
            f"The checkpoints belong to {len(by_run)} runs, by {_RUN_NAME} in their headers: {named}.",
            hint="Choose one run by names with --match, or by steps with --steps.",
        )
    ]


def contradicting_headers(
    checkpoints: Sequence[Checkpoint], *, anchor_is_init: bool
) -> tuple[list[CkavgError], list[str], frozenset[str]]:
    """Errors if headers describe different models, warnings if they may, and the entries that belong to one file only.

    An entry missing from the header of an anchor given with `init` is not a difference.
    """
    errors: list[CkavgError] = []
    warnings: list[str] = []
    hashes: set[str] = set()
    last = checkpoints[-1]
    for part in last.parts:
        own = _metadata_of(last, part)
        for checkpoint in checkpoints[:-1]:
            other = _metadata_of(checkpoint, part)
            from_elsewhere = anchor_is_init and checkpoint is checkpoints[0]
            keys = other.keys() & own.keys() if from_elsewhere else other.keys() | own.keys()
            differing = sorted(key for key in keys if not _alike(other.get(key), own.get(key)))
            hashes |= {key for key in differing if _tells(key) == "hash"}
            meant = [key for key in differing if _tells(key) == "meaning"]
            if meant:
                errors.append(_different_headers(checkpoint, last, meant, other, own))
            if not from_elsewhere:
                warnings += [
                    f"The headers of the weights state different values of {_short(key)}; the result has that of the "
                    "last one."
                    for key in differing
                    if _tells(key) == "more"
                ]
    return errors[:1], list(dict.fromkeys(warnings)), frozenset(hashes)


def without_entries(checkpoint: Checkpoint, entries: frozenset[str]) -> Checkpoint:
    """The checkpoint without some entries of its headers; hashes are kept, since they are recomputed."""
    dropped = entries - KNOWN_HASHES.keys()
    if not any(dropped & shard.metadata.keys() for shard in checkpoint.shards):
        return checkpoint
    shards = tuple(
        dataclasses.replace(shard, metadata={key: value for key, value in shard.metadata.items() if key not in dropped})
        for shard in checkpoint.shards
    )
    return dataclasses.replace(checkpoint, shards=shards)


def _metadata_of(checkpoint: Checkpoint, part: str) -> dict[str, str]:
    return {key: value for shard in checkpoint.shards if shard.part == part for key, value in shard.metadata.items()}


def _different_headers(
    checkpoint: Checkpoint, last: Checkpoint, keys: Sequence[str], other: Mapping[str, str], own: Mapping[str, str]
) -> MismatchError:
    differing = ", ".join(
        f"{key} is {_short(own.get(key, 'absent'))}, but {_short(other.get(key, 'absent'))}" for key in keys[:4]
    )
    return MismatchError(
        f"step {last.step}: in the header of the weights, {differing} at step {checkpoint.step}.",
        hint="The same tensors would be different models. Choose checkpoints with equal headers, with --from-step, "
        "--to-step or --skip-step.",
    )


def _tells(key: str) -> Literal["hash", "progress", "meaning", "more"]:
    """The kind of an entry, by the words in its name."""
    words = {word.lower() for word in _HEADER_WORDS.findall(key)}
    if words & _HASH:
        return "hash"
    if words & _PROGRESS or key in (_RUN_NAME, "format"):
        return "progress"
    return "meaning" if words & _MEANING else "more"


def _alike(one: str | None, other: str | None) -> bool:
    """Whether two values are equal, as texts or as parsed JSON."""
    if one == other or one is None or other is None:
        return one == other
    with suppress(ValueError, RecursionError):
        return bool(parse_json(one) == parse_json(other))
    return False


def _short(value: object) -> str:
    text = str(value)
    return text if len(text) <= 80 else f"{text[:80]}…"
