"""Stage *discover*: read the header of one safetensors file, and check it against the size of the file.

A header may hold anything: all values are checked, and nothing is parsed that would not fit in memory.
"""

from __future__ import annotations

import hashlib
import re
import struct
import sys
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from ckavg.checkpoints.model_names import count_moments
from ckavg.checkpoints.run import ITEM_BYTES, TensorInfo, WhyLeftOut
from ckavg.errors import (
    CheckpointError,
    CorruptFileError,
    MissingShardError,
    ReadError,
    RunError,
    TruncatedShardError,
    UnsupportedFormatError,
)
from ckavg.storage.base import AnyPath, FileInfo
from ckavg.storage.local import parse_json, storage_of

KNOWN_HASHES = {"sshs_model_hash": 64, "sshs_legacy_hash": 8}
"""Entries with hashes of a file's tensors, recomputed for a result, and their number of digits."""

SHARDED = "DCP_SHARDING_INFO"
"""The entry that marks a file with slices of tensors, from torch.distributed.checkpoint."""

MAX_HEADER_BYTES = 100_000_000
"""The limit of the safetensors library."""

MOST_VALUES = 4_000_000
"""Commas and brackets in one header; a tensor takes 8. No model has half a million tensors in one file, and a hostile
header cannot use more than a few hundred MB.
"""

_STEPS = ("ss_steps", "global_step", "step", "steps", "iteration")
_FACTS = "training_info"
LARGEST = 2**63 - 1
_SHOWN = 200
_LENGTH = struct.Struct("<Q")
RESAVE = "Save it again with safetensors, or leave it out with --from-step, --to-step or --last."
STILL_WRITTEN = (
    "It is still being written, or was cut off when it was copied: wait, copy it again, "
    "or leave such checkpoints out with --skip-incomplete."
)


@dataclass(frozen=True, slots=True)
class Header:
    """What one file declares, checked against its size.

    Attributes:
        entries: its tensors, by offset.
        info: size and state of the file.
        metadata: its other entries.
        moments: how many of the tensors have names of an optimizer's moments.
        sha256: of the text; empty for a pickle.
        left_out: for a pickle, entries with tensors that are left out.
    """

    entries: Mapping[str, TensorInfo]
    info: FileInfo
    metadata: Mapping[str, str]
    moments: int
    sha256: bytes = b""
    left_out: tuple[tuple[WhyLeftOut, str], ...] = ()


KnownHeaders = dict[int, Header]
"""The headers of a checkpoint, by the number of the shard."""


def read_header(path: AnyPath, *, shard: int = 0, known: KnownHeaders | None = None) -> Header:
    """Read and check the header of a safetensors file, which is number `shard` of its checkpoint.

    Args:
        path: the file.
        shard: its number.
        known: headers of the previous checkpoint, usually with the same text, which is then parsed and stored only
            once. That of `shard` is replaced by this one.

    Raises:
        MissingShardError: there is no such file.
        TruncatedShardError: the file ends before its header says it does.
        CorruptFileError: it is not a valid safetensors file.
        UnsupportedFormatError: it holds an unsupported dtype, such as one of 4 bits.
        ReadError: it cannot be read.
    """
    try:
        info, text = _read(path)
    except FileNotFoundError as error:
        raise MissingShardError(f"{path} does not exist.", hint=STILL_WRITTEN) from error
    except OSError as error:
        raise ReadError(f"{path} cannot be read: {error.strerror}.", hint="Check that you may read it.") from error
    except ValueError as error:  # an impossible name: with a zero byte or a lone surrogate
        raise MissingShardError(f"{path} does not exist: no file can have this name.", hint=RESAVE) from error
    sha256 = hashlib.sha256(text).digest()
    known = {} if known is None else known
    same = known.get(shard)
    if same is not None and (same.sha256, same.info.nbytes) == (sha256, info.nbytes):
        return replace(same, info=info)
    try:
        declared = _parsed(text)
        metadata = _metadata(declared)
        before = same.entries if same is not None else {}
        entries, end = _checked(path, declared, _LENGTH.size + len(text), shard, before)
    except (ValueError, RecursionError) as error:
        raise CorruptFileError(f"{path} has a corrupt header: {error}.", hint=RESAVE) from error
    size = info.nbytes
    if end > size:
        raise TruncatedShardError(f"{path} is {size:,} bytes long, but its header says {end:,}.", hint=STILL_WRITTEN)
    if end < size:
        raise CorruptFileError(f"{path} is {size:,} bytes long, but its header accounts for {end:,}.", hint=RESAVE)
    moments = count_moments(entries)
    known[shard] = Header(entries, info, metadata, moments, sha256)
    return known[shard]


def stated_step(path: AnyPath) -> int | None:
    """The optimizer step that a header states; None if it states none, or is damaged."""
    metadata: Mapping[str, str] = {}
    facts: Any = {}
    with suppress(CheckpointError, RunError, OSError, ValueError, RecursionError):
        _, text = _read(path)
        if any(name.encode() in text for name in (*_STEPS, _FACTS)):
            metadata = _metadata(_parsed(text))
    with suppress(ValueError, RecursionError):
        facts = parse_json(metadata.get(_FACTS, "{}"))
    for value in (*map(metadata.get, _STEPS), *(map(facts.get, _STEPS) if isinstance(facts, dict) else ())):
        if isinstance(value, int | str) and re.fullmatch(r"\d{1,18}", str(value), re.ASCII):
            return int(value)
    return None


def _read(path: AnyPath) -> tuple[FileInfo, bytes]:
    """A file, and the text of its header."""
    with storage_of(path).open(path) as (info, read):
        prefix = read(_LENGTH.size)
        if len(prefix) < _LENGTH.size:
            raise TruncatedShardError(
                f"{path} is {info.nbytes} bytes long: too short to be safetensors.", hint=STILL_WRITTEN
            )
        (length,) = _LENGTH.unpack(prefix)
        if not 2 <= length <= MAX_HEADER_BYTES:
            raise CorruptFileError(f"{path} is not safetensors: it claims a header of {length:,} bytes.", hint=RESAVE)
        text = read(length) if _LENGTH.size + length <= info.nbytes else b""
    if len(text) < length:
        raise TruncatedShardError(
            f"{path} is {info.nbytes:,} bytes long, but its header alone says {_LENGTH.size + length:,}.",
            hint=STILL_WRITTEN,
        )
    return info, text


def _parsed(text: bytes) -> dict[str, Any]:
    if sum(map(text.count, (b",", b"[", b"{"))) > MOST_VALUES:
        raise ValueError(f"more than {MOST_VALUES:,} values")
    parsed = parse_json(text.decode(), _compact)
    if not isinstance(parsed, dict):
        raise ValueError("not a JSON object")
    return parsed


class _Declared(NamedTuple):
    """What a header says of a tensor, unchecked."""

    dtype: Any
    shape: Any
    offsets: tuple[Any, ...]


def _compact(stated: dict[str, Any]) -> dict[str, Any] | _Declared:
    """What is kept of an object in a header: if it describes a tensor, a tuple, which takes a third of the memory."""
    offsets = stated.get("data_offsets")
    if not isinstance(offsets, list) or not {"dtype", "shape"} <= stated.keys():
        return stated
    dtype, shape = stated["dtype"], stated["shape"]
    return _Declared(
        sys.intern(dtype) if isinstance(dtype, str) else dtype,
        tuple(shape) if isinstance(shape, list) else shape,
        tuple(offsets),
    )


def _metadata(declared: dict[str, Any]) -> dict[str, str]:
    """Remove the entries that are not tensors from a header, and return them."""
    metadata = declared.pop("__metadata__", None)
    if metadata is None:
        return {}
    if isinstance(metadata, dict) and all(isinstance(each, str) for each in metadata.values()):
        with suppress(UnicodeEncodeError):
            "".join((*metadata, *metadata.values())).encode()
            return metadata
    raise ValueError("__metadata__ must hold texts by name")


def _checked(
    path: AnyPath, declared: dict[str, Any], data_start: int, shard: int, before: Iterable[str]
) -> tuple[dict[str, TensorInfo], int]:
    """The tensors in the order of their bytes, and the offset at which the last one ends. Empties `declared`."""
    names = {name: name for name in before}
    for name, value in declared.items():
        _check(path, name, value)
    entries: dict[str, TensorInfo] = {}
    shapes: dict[tuple[int, ...], tuple[int, ...]] = {}  # equal shapes stored once, like names and dtypes
    end = 0
    for name in sorted(declared, key=lambda name: declared[name].offsets):
        dtype, shape, (start, stop) = declared.pop(name)
        if start != end:
            raise ValueError(f"tensor {shown(name)} begins at byte {start:,}, expected {end:,}")
        end = stop
        entries[names.get(name, name)] = TensorInfo(dtype, shapes.setdefault(shape, shape), shard, data_start + start)
    return entries, data_start + end


def _check(path: AnyPath, name: str, value: object) -> None:
    try:
        name.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"{shown(name)} is not valid Unicode") from error
    if not isinstance(value, _Declared):
        raise ValueError(f"tensor {shown(name)} lacks dtype, shape or data_offsets")
    dtype, shape, offsets = value
    if not (_are_counts(shape) and _are_counts(offsets) and len(offsets) == 2):
        raise ValueError(f"shape and offsets of tensor {shown(name)} must be whole numbers")
    if not isinstance(dtype, str):
        raise ValueError(f"the dtype of tensor {shown(name)} is not a string")
    item = ITEM_BYTES.get(dtype)
    if item is None:
        raise UnsupportedFormatError(
            f"{path}: tensor {shown(name)} has dtype {shown(dtype)}, which cannot be averaged.",
            hint="Quantized weights cannot be averaged. Average the checkpoints from before quantizing.",
        )
    nbytes, present = product(item, shape), offsets[1] - offsets[0]
    if nbytes != present:
        needs = "too many" if nbytes is None else f"{nbytes:,}"
        raise ValueError(f"tensor {shown(name)} ({dtype}, {shown(shape)}) needs {needs} bytes, but has {present:,}")


def _are_counts(values: object) -> bool:
    if not isinstance(values, tuple) or not {*map(type, values)} <= {int}:
        return False
    return not values or (min(values) >= 0 and max(values) <= LARGEST)


def product(item: int, shape: Sequence[int]) -> int | None:
    """Bytes of a tensor; None if that exceeds what any program can address."""
    nbytes = item
    for size in shape:
        nbytes *= size
        if nbytes > LARGEST:  # stop early: a long list of large numbers would take hours to multiply
            return None
    return nbytes


def shown(value: object) -> str:
    """A value for a message, shortened."""
    text = repr(value)
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}…"
