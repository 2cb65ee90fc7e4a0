"""Stage *discover*: what the headers of weight files say besides their tensors. Pure.

Trainers write there what no other file tells: the alpha of an adapter, the steps it was trained for, the name of the
run. The result takes over that of the last checkpoint.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any

from ckavg.errors import CkavgError, MismatchError, MixedOrderError, listed
from ckavg.run.values import Checkpoint
from ckavg.untrusted import parse_json

KNOWN_HASHES = {"sshs_model_hash": 64, "sshs_legacy_hash": 8}
"""Hashes of a file's tensors that are computed anew for a result, and their digits."""

RUN_NAME = "ss_output_name"
"""Under which sd-scripts and its kin keep the name of a run."""

SHARDED = "DCP_SHARDING_INFO"
"""Tells that a file holds slices of tensors, as torch.distributed.checkpoint writes them."""

_STEPS = ("ss_steps", "global_step", "step", "steps", "iteration")
_FACTS = "training_info"
STATING = frozenset({*_STEPS, _FACTS})
"""The entries that may state a step."""

_FORMAT = "format"
"""Tells by which library a file was written, and nothing of what is in it."""

_SHOWN = 60

_WORDS = re.compile(r"[A-Z]?[a-z]+|[A-Z]+(?![a-z])|\d+", re.ASCII)
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


def stated_step(metadata: Mapping[str, str]) -> int | None:
    """The optimizer step that a header states; None where it states none.

    >>> stated_step({"ss_steps": "400"}), stated_step({"training_info": '{"step": 250}'}), stated_step({"format": "pt"})
    (400, 250, None)
    """
    facts: Any = {}
    with suppress(ValueError, RecursionError):
        facts = parse_json(metadata.get(_FACTS, "{}"))
    for value in (*map(metadata.get, _STEPS), *(map(facts.get, _STEPS) if isinstance(facts, dict) else ())):
        if isinstance(value, int | str) and re.fullmatch(r"\d{1,18}", str(value), re.ASCII):
            return int(value)
    return None


def several_runs(checkpoints: Sequence[Checkpoint]) -> list[CkavgError]:
    """An error where headers name more than one run."""
    of_run: dict[str, list[str]] = {}
    for checkpoint in checkpoints:
        for name in {shard.metadata[RUN_NAME] for shard in checkpoint.shards if RUN_NAME in shard.metadata}:
            of_run.setdefault(name, []).append(checkpoint.path.name)
    if len(of_run) < 2:
        return []
    named = "; ".join(f"{_short(name)} ({listed(names)})" for name, names in of_run.items())
    return [
        MixedOrderError(
            f"The checkpoints are of {len(of_run)} runs, by {RUN_NAME} in their headers: {named}.",
            hint="Choose those of one run by their names with --match, or by their steps with --steps.",
        )
    ]


def contradictions(
    checkpoints: Sequence[Checkpoint], *, anchor_is_init: bool
) -> tuple[list[CkavgError], list[str], frozenset[str]]:
    """Errors where headers make different models of the same tensors, warnings where they may, and the entries that
    hold for one file alone.

    Args:
        checkpoints: ordered by step.
        anchor_is_init: the first one was named apart from the run; what its header lacks is no difference.
    """
    errors: list[CkavgError] = []
    warnings: list[str] = []
    hashes: set[str] = set()
    last = checkpoints[-1]
    for part in last.parts:
        of_last = _of_part(last, part)
        for checkpoint in checkpoints[:-1]:
            other = _of_part(checkpoint, part)
            from_elsewhere = anchor_is_init and checkpoint is checkpoints[0]
            keys = other.keys() & of_last.keys() if from_elsewhere else other.keys() | of_last.keys()
            differing = sorted(key for key in keys if not _alike(other.get(key), of_last.get(key)))
            hashes |= {key for key in differing if _is_hash(key)}
            meant = [key for key in differing if _changes_meaning(key)]
            if meant:
                errors.append(_different(checkpoint, last, meant, other, of_last))
            if not from_elsewhere:
                warnings += [_doubtful(key) for key in differing if not _changes_meaning(key) and _is_doubtful(key)]
    return errors[:1], list(dict.fromkeys(warnings)), frozenset(hashes)


def without(checkpoint: Checkpoint, entries: frozenset[str]) -> Checkpoint:
    """The checkpoint whose headers lack some entries, those apart that are computed anew."""
    dropped = entries - KNOWN_HASHES.keys()
    if not any(dropped & shard.metadata.keys() for shard in checkpoint.shards):
        return checkpoint
    shards = tuple(
        dataclasses.replace(shard, metadata={key: value for key, value in shard.metadata.items() if key not in dropped})
        for shard in checkpoint.shards
    )
    return dataclasses.replace(checkpoint, shards=shards)


def _of_part(checkpoint: Checkpoint, part: str) -> dict[str, str]:
    return {key: value for shard in checkpoint.shards if shard.part == part for key, value in shard.metadata.items()}


def _different(
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


def _doubtful(key: str) -> str:
    return f"The headers of the weights state different values of {_short(key)}; the result takes that of the last one."


def _words(key: str) -> set[str]:
    return {word.lower() for word in _WORDS.findall(key)}


def _is_hash(key: str) -> bool:
    return bool(_words(key) & _HASH)


def _changes_meaning(key: str) -> bool:
    return _is_doubtful(key) and bool(_words(key) & _MEANING)


def _is_doubtful(key: str) -> bool:
    return not _words(key) & (_PROGRESS | _HASH) and key not in (RUN_NAME, _FORMAT)


def _alike(one: str | None, other: str | None) -> bool:
    """Whether two values are the same, as texts or as what they say in JSON."""
    if one == other:
        return True
    if one is None or other is None:
        return False
    with suppress(ValueError, RecursionError):
        return bool(parse_json(one) == parse_json(other))
    return False


def _short(value: str) -> str:
    return value if len(value) <= _SHOWN else f"{value[:_SHOWN]}…"
