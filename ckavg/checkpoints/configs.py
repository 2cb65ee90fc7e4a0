"""Stage *discover*: what configs and headers say. Are they of one model, and can it be averaged?

Trainers write into headers what no other file tells: the alpha of an adapter, the steps it was trained for, the name of
the run. Reads `config.json` and `adapter_config.json`, and trusts neither; opens no weight file.
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
"""What changes the function of the same weights: the result is run with that of the last checkpoint."""

_ADAPTER_IDENTITY = (
    "peft_type", "r", "lora_alpha", "use_rslora", "use_dora", "rank_pattern", "alpha_pattern", "fan_in_fan_out",
)  # fmt: skip
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
    of_adapters = {shard.path.parent for shard in checkpoint.shards if shard.saved_as in ADAPTERS}
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


def without_shared(checkpoint: Checkpoint, facts: Facts) -> Checkpoint:
    """A checkpoint as transformers would have saved it as safetensors: of tensors that are one in memory, as a pickle
    tells, the first alone, unless the config denies that they are tied.
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
    loadable = [each.path for each, _ in found if each.kind == "model" and isinstance(each.path, Path)]
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
    """Errors where two checkpoints are of different models, and warnings where they may be. An anchor apart from the
    run may be a model without its head.
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
                f"{where} states another {key} at {steps[0]} than at {steps[1]}; the result takes that of the last "
                "checkpoint."
                for key in _changed(one, other, _BEHAVIOUR)
            ]
        for part in before.adapters.keys() & after.adapters.keys():
            one, other = before.adapters[part], after.adapters[part]
            errors += _different(steps, ADAPTER_CONFIG, one, other, _ADAPTER_IDENTITY)
            of_base, of_targets = _about_adapters(steps, one, other)
            errors += of_base
            warnings += of_targets
    return errors, warnings


def _read(path: AnyPath) -> dict[str, Any]:
    with suppress(OSError, ValueError):
        return read_object(path, _MOST_BYTES)
    return {}


def _sign_of_quantization(checkpoint: Checkpoint, facts: Facts) -> str | None:
    others = {name: entry for name, entry in checkpoint.entries.items() if entry.dtype not in FLOATING}
    beside: dict[str, list[frozenset[str]]] = defaultdict(list)  # what may belong to codes, by module
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
    """The module of a tensor, and its name in there."""
    place = max(name.rfind(mark) for mark in "./:")
    return name[: max(place, 0)], name[place + 1 :]


def _is_packed(name: str, entry: TensorInfo, entries: Mapping[str, TensorInfo], beside: _Words) -> bool:
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
    one, other = (str(each.get(key)).rstrip("/").rpartition("/")[2].lower() for each in (before, after))
    errors: list[CkavgError] = []
    warnings: list[str] = []
    if _changed(before, after, (key,)):
        if one == other:
            warnings.append(
                f"{steps[0]} names its base model {_short(after[key])}, {steps[1]} {_short(before[key])}. They are "
                "taken to be one model in two places."
            )
        else:
            errors += _different(steps, ADAPTER_CONFIG, before, after, (key,))
    old, new = (
        {str(item) for item in value} if isinstance(value := each.get("target_modules"), list) else value
        for each in (before, after)
    )
    if old is not None and new is not None and old != new:
        warnings.append(
            f"{ADAPTER_CONFIG} states other target_modules at {steps[0]} than at {steps[1]}; the result takes those of "
            "the last checkpoint."
        )
    return errors, warnings


def _changed(before: Mapping[str, Any], after: Mapping[str, Any], keys: Sequence[str]) -> list[str]:
    """The keys that both have, with different values."""
    return [
        key for key in keys if before.get(key) is not None and after.get(key) is not None and before[key] != after[key]
    ]


# --- headers ---

_RUN_NAME = "ss_output_name"
"""Under which sd-scripts and its kin keep the name of a run."""

_HEADER_WORDS = re.compile(r"[A-Z]?[a-z]+|[A-Z]+(?![a-z])|\d+", re.ASCII)
_PROGRESS = frozenset(
    {
        "batches", "date", "duration", "elapsed", "end", "ended", "epoch", "epochs", "finished", "images", "info",
        "iteration", "iterations", "loss", "progress", "samples", "session", "start", "started", "step", "steps",
        "time", "timestamp", "tokens",
    }
)  # fmt: skip
"""Words of what changes while a run goes on."""

_MEANING = frozenset(
    {
        "adapter", "alpha", "alphas", "arch", "architecture", "base", "class", "config", "dim", "dims", "dtype",
        "format", "layers", "lora", "metadata", "model", "module", "modules", "network", "parameterization", "pattern",
        "peft", "prediction", "quantization", "r", "rank", "ranks", "rslora", "scale", "scaling", "target", "targets",
        "type", "v",
    }
)  # fmt: skip
"""Words of what a loader needs to make the right model of the same tensors."""

_HASH = frozenset({"checksum", "crc", "digest", "hash", "md", "sha", "sha1", "sha256", "sha512"})


def several_named_runs(checkpoints: Sequence[Checkpoint]) -> list[CkavgError]:
    """An error where headers name more than one run."""
    of_run: dict[str, list[str]] = {}
    for checkpoint in checkpoints:
        for name in {shard.metadata[_RUN_NAME] for shard in checkpoint.shards if _RUN_NAME in shard.metadata}:
            of_run.setdefault(name, []).append(checkpoint.path.name)
    if len(of_run) < 2:
        return []
    named = "; ".join(f"{_short(name)} ({listed(names)})" for name, names in of_run.items())
    return [
        MixedOrderError(
            f"The checkpoints are of {len(of_run)} runs, by {_RUN_NAME} in their headers: {named}.",
            hint="Choose those of one run by their names with --match, or by their steps with --steps.",
        )
    ]


def contradicting_headers(
    checkpoints: Sequence[Checkpoint], *, anchor_is_init: bool
) -> tuple[list[CkavgError], list[str], frozenset[str]]:
    """Errors where headers make different models of the same tensors, warnings where they may, and the entries that
    hold for one file alone. What the header of an anchor apart from the run lacks is no difference.
    """
    errors: list[CkavgError] = []
    warnings: list[str] = []
    hashes: set[str] = set()
    last = checkpoints[-1]
    for part in last.parts:
        of_last = _metadata_of(last, part)
        for checkpoint in checkpoints[:-1]:
            other = _metadata_of(checkpoint, part)
            from_elsewhere = anchor_is_init and checkpoint is checkpoints[0]
            keys = other.keys() & of_last.keys() if from_elsewhere else other.keys() | of_last.keys()
            differing = sorted(key for key in keys if not _alike(other.get(key), of_last.get(key)))
            hashes |= {key for key in differing if _tells(key) == "hash"}
            meant = [key for key in differing if _tells(key) == "meaning"]
            if meant:
                errors.append(_different_headers(checkpoint, last, meant, other, of_last))
            if not from_elsewhere:
                warnings += [
                    f"The headers of the weights state different values of {_short(key)}; the result takes that of the "
                    "last one."
                    for key in differing
                    if _tells(key) == "more"
                ]
    return errors[:1], list(dict.fromkeys(warnings)), frozenset(hashes)


def without_entries(checkpoint: Checkpoint, entries: frozenset[str]) -> Checkpoint:
    """The checkpoint whose headers lack some entries, those apart that are computed anew."""
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
    checkpoint: Checkpoint, last: Checkpoint, keys: Sequence[str], other: Mapping[str, str], of_last: Mapping[str, str]
) -> MismatchError:
    told = ", ".join(
        f"{key} is {_short(of_last.get(key, 'not there'))}, but {_short(other.get(key, 'not there'))}"
        for key in keys[:4]
    )
    return MismatchError(
        f"step {last.step}: in the header of the weights, {told} at step {checkpoint.step}.",
        hint="The same tensors mean different models there. Choose checkpoints that agree, with --from-step, --to-step "
        "or --skip-step.",
    )


def _tells(key: str) -> Literal["hash", "progress", "meaning", "more"]:
    """What an entry is about, by the words in its name."""
    words = {word.lower() for word in _HEADER_WORDS.findall(key)}
    if words & _HASH:
        return "hash"
    if words & _PROGRESS or key in (_RUN_NAME, "format"):
        return "progress"
    return "meaning" if words & _MEANING else "more"


def _alike(one: str | None, other: str | None) -> bool:
    """Whether two values are the same, as texts or as what they say in JSON."""
    if one == other or one is None or other is None:
        return one == other
    with suppress(ValueError, RecursionError):
        return bool(parse_json(one) == parse_json(other))
    return False


def _short(value: object) -> str:
    text = str(value)
    return text if len(text) <= 80 else f"{text[:80]}…"
