"""Stage *discover*: what the headers of weight files say besides their tensors. Pure.

Trainers write there what no other file tells: the alpha of an adapter, the steps it was trained for, the name of the
run. The result takes over that of the last checkpoint.
"""

from __future__ import annotations

import dataclasses
import re
import struct
from collections.abc import Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from ckavg.checkpoints.run import ITEM_BYTES, Checkpoint, TensorInfo
from ckavg.errors import (
    CheckpointError,
    CkavgError,
    CorruptFileError,
    MismatchError,
    MissingShardError,
    MixedOrderError,
    ReadError,
    RunError,
    TruncatedShardError,
    UnsupportedFormatError,
    listed,
)
from ckavg.storage.base import AnyPath, FileInfo
from ckavg.storage.local import parse_json, storage_of

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

_MOST_SHOWN = 60

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
        of_last = _metadata_in(last, part)
        for checkpoint in checkpoints[:-1]:
            other = _metadata_in(checkpoint, part)
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


def _metadata_in(checkpoint: Checkpoint, part: str) -> dict[str, str]:
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
    return value if len(value) <= _MOST_SHOWN else f"{value[:_MOST_SHOWN]}…"


MAX_HEADER_BYTES = 100_000_000
"""The limit that the safetensors library sets, too."""

MOST_VALUES = 4_000_000
"""Commas and brackets in one header, 8 of which a tensor takes. Half a million tensors are far more than any model has
in one file, and what a hostile header makes Python build stays within a few hundred MB.
"""

_LARGEST = 2**63 - 1
_SHOWN = 200
_LENGTH = struct.Struct("<Q")
_RESAVE = "Save it again with safetensors, or leave it out with --from-step, --to-step or --last."
_STILL_WRITTEN = (
    "It is still being written, or was cut off when it was copied: wait, copy it again, "
    "or leave such checkpoints out with --skip-incomplete."
)


@dataclass(frozen=True, slots=True)
class Header:
    """What one file declares, checked against its size in bytes; tensors in the order of their bytes.

    Attributes:
        entries: its tensors.
        info: the file.
        metadata: what it says besides, by name.
    """

    entries: Mapping[str, TensorInfo]
    info: FileInfo
    metadata: Mapping[str, str]


def read_header(path: AnyPath, *, shard: int = 0) -> Header:
    """Read and check the header of a safetensors file, which is number `shard` of its checkpoint.

    Raises:
        MissingShardError: there is no such file.
        TruncatedShardError: the file ends before its header says it does.
        CorruptFileError: it is not a valid safetensors file.
        UnsupportedFormatError: it holds a dtype that is not read, such as one of 4 bits.
        ReadError: the system would not let us read it.
    """
    try:
        with storage_of(path).open(path) as (info, read):
            size = info.nbytes
            raw = _header_bytes(path, read(_LENGTH.size), size)
            text = read(raw)
    except FileNotFoundError as error:
        raise MissingShardError(f"{path} does not exist.", hint=_STILL_WRITTEN) from error
    except OSError as error:
        raise ReadError(f"{path} cannot be read: {error.strerror}.", hint="Check that you may read it.") from error
    except ValueError as error:  # a name that the system cannot have: with a zero byte, or no text
        raise MissingShardError(f"{path} does not exist: no file can have this name.", hint=_RESAVE) from error
    if len(text) < raw:
        raise TruncatedShardError(f"{path} ends within its header ({size:,} bytes).", hint=_STILL_WRITTEN)
    declared = _parsed(path, text)
    metadata = _metadata(path, declared.pop("__metadata__", None))
    entries = _checked(path, declared, _LENGTH.size + raw, size, shard)
    return Header(entries, info, metadata)


def peek_metadata(path: AnyPath, wanted: Collection[str]) -> Mapping[str, str]:
    """What a header says besides the tensors; empty where it is not sound, or has none of the entries wanted."""
    with suppress(CheckpointError, RunError, OSError, ValueError), storage_of(path).open(path) as (info, read):
        raw = _header_bytes(path, read(_LENGTH.size), info.nbytes)
        text = read(raw)
        if any(name.encode() in text for name in wanted):
            return _metadata(path, _parsed(path, text).get("__metadata__"))
    return {}


def _header_bytes(path: AnyPath, prefix: bytes, size: int) -> int:
    if len(prefix) < _LENGTH.size:
        raise TruncatedShardError(f"{path} is {size} bytes long: too short to be safetensors.", hint=_STILL_WRITTEN)
    (length,) = _LENGTH.unpack(prefix)
    if not 2 <= length <= MAX_HEADER_BYTES:
        raise CorruptFileError(f"{path} is not safetensors: it claims a header of {length:,} bytes.", hint=_RESAVE)
    if _LENGTH.size + length > size:
        raise TruncatedShardError(
            f"{path} is {size:,} bytes long, but its header alone says {_LENGTH.size + length:,}.", hint=_STILL_WRITTEN
        )
    return int(length)


def _parsed(path: AnyPath, text: bytes) -> dict[str, Any]:
    if sum(map(text.count, (b",", b"[", b"{"))) > MOST_VALUES:
        raise CorruptFileError(f"{path} has a corrupt header: more than {MOST_VALUES:,} values.", hint=_RESAVE)
    try:
        parsed = parse_json(text.decode())
    except (ValueError, RecursionError) as error:
        raise CorruptFileError(f"{path} has a corrupt header: {error}.", hint=_RESAVE) from error
    if not isinstance(parsed, dict):
        raise CorruptFileError(f"{path} has a corrupt header: not a JSON object.", hint=_RESAVE)
    return parsed


def _metadata(path: AnyPath, metadata: Any) -> dict[str, str]:
    if metadata is None:
        return {}
    if isinstance(metadata, dict) and all(isinstance(each, str) for each in metadata.values()):
        with suppress(UnicodeEncodeError):
            "".join((*metadata, *metadata.values())).encode()
            return metadata
    raise CorruptFileError(f"{path} has a corrupt header: __metadata__ must hold texts by name.", hint=_RESAVE)


def _checked(
    path: AnyPath, declared: Mapping[str, Any], data_start: int, size: int, shard: int
) -> dict[str, TensorInfo]:
    spans = sorted((_span(path, name, value) for name, value in declared.items()), key=lambda span: span[3:])
    entries: dict[str, TensorInfo] = {}
    end = 0
    for name, dtype, shape, start, stop in spans:
        if start != end:
            raise CorruptFileError(
                f"{path} has a corrupt header: tensor {_shown(name)} begins at byte {start:,}, expected {end:,}.",
                hint=_RESAVE,
            )
        end = stop
        entries[name] = TensorInfo(dtype, shape, shard, data_start + start)
    if data_start + end > size:
        raise TruncatedShardError(
            f"{path} is {size:,} bytes long, but its header says {data_start + end:,}.", hint=_STILL_WRITTEN
        )
    if data_start + end < size:
        raise CorruptFileError(
            f"{path} is {size:,} bytes long, but its header accounts for {data_start + end:,}.", hint=_RESAVE
        )
    return entries


def _span(path: AnyPath, name: str, value: Any) -> tuple[str, str, tuple[int, ...], int, int]:
    shown = _shown(name)
    try:
        name.encode()
        dtype, shape, offsets = value["dtype"], value["shape"], value["data_offsets"]
    except UnicodeEncodeError as error:
        raise CorruptFileError(f"{path} has a corrupt header: {shown} is no text.", hint=_RESAVE) from error
    except (TypeError, KeyError) as error:
        raise CorruptFileError(
            f"{path} has a corrupt header: tensor {shown} lacks dtype, shape or data_offsets.", hint=_RESAVE
        ) from error
    if not (_are_counts(shape) and _are_counts(offsets) and len(offsets) == 2):
        raise CorruptFileError(
            f"{path} has a corrupt header: shape and offsets of tensor {shown} must be whole numbers.", hint=_RESAVE
        )
    if not isinstance(dtype, str):
        raise CorruptFileError(f"{path} has a corrupt header: the dtype of tensor {shown} is no text.", hint=_RESAVE)
    item = ITEM_BYTES.get(dtype)
    if item is None:
        raise UnsupportedFormatError(
            f"{path}: tensor {shown} has dtype {_shown(dtype)}, which cannot be averaged.",
            hint="Quantized weights do not average. Average the checkpoints before quantizing them.",
        )
    start, stop = offsets
    nbytes = _product(item, shape)
    if nbytes != stop - start:
        needs = "too many" if nbytes is None else f"{nbytes:,}"
        raise CorruptFileError(
            f"{path} has a corrupt header: tensor {shown} ({dtype}, {_shown(tuple(shape))}) needs {needs} bytes, "
            f"but has {stop - start:,}.",
            hint=_RESAVE,
        )
    return name, dtype, tuple(shape), start, stop


def _are_counts(values: object) -> bool:
    return isinstance(values, list) and all(type(number) is int and 0 <= number <= _LARGEST for number in values)


def _product(item: int, shape: list[int]) -> int | None:
    """Bytes of a tensor; None where a product on the way is beyond what any program can address."""
    nbytes = item
    for size in shape:
        nbytes *= size
        if nbytes > _LARGEST:  # at once: a long list of large numbers would take hours to multiply
            return None
    return nbytes


def _shown(value: object) -> str:
    """A value as a message shows it, however large it is."""
    text = repr(value)
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}…"
