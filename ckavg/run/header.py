"""Stage *discover*: the header of one safetensors file, read and checked. Never reads tensor data.

A header comes from an untrusted file. It is believed only where everything in it agrees: its own length, the dtypes,
the shapes, the offsets, and the size of the file. The format is that of the safetensors specification: 8 bytes of
little-endian length, a JSON object, then the tensors' bytes without gaps.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Collection, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ckavg.errors import (
    CkavgError,
    CorruptFileError,
    MissingShardError,
    ReadError,
    TruncatedShardError,
    UnsupportedFormatError,
)
from ckavg.run.values import ITEM_BYTES, Entry
from ckavg.untrusted import open_regular, parse_json

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
        nbytes: size of the file.
        entries: its tensors.
        state: inode and time of modification in nanoseconds: another state means other bytes.
        metadata: what it says besides, by name.
    """

    nbytes: int
    entries: Mapping[str, Entry]
    state: tuple[int, int]
    metadata: Mapping[str, str]


def read_header(path: Path, *, shard: int = 0) -> Header:
    """Read and check the header of a safetensors file, which is number `shard` of its checkpoint.

    Raises:
        MissingShardError: there is no such file.
        TruncatedShardError: the file ends before its header says it does.
        CorruptFileError: it is not a valid safetensors file.
        UnsupportedFormatError: it holds a dtype that is not read, such as one of 4 bits.
        ReadError: the system would not let us read it.
    """
    try:
        with open_regular(path) as file:
            status = os.fstat(file.fileno())
            size = status.st_size
            raw = _header_bytes(path, file.read(_LENGTH.size), size)
            text = file.read(raw)
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
    return Header(size, entries, (status.st_ino, status.st_mtime_ns), metadata)


def peek_metadata(path: Path, wanted: Collection[str]) -> Mapping[str, str]:
    """What a header says besides the tensors; empty where it is not sound, or has none of the entries wanted."""
    with suppress(CkavgError, OSError, ValueError), open_regular(path) as file:
        raw = _header_bytes(path, file.read(_LENGTH.size), os.fstat(file.fileno()).st_size)
        text = file.read(raw)
        if any(name.encode() in text for name in wanted):
            return _metadata(path, _parsed(path, text).get("__metadata__"))
    return {}


def _header_bytes(path: Path, prefix: bytes, size: int) -> int:
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


def _parsed(path: Path, text: bytes) -> dict[str, Any]:
    if sum(map(text.count, (b",", b"[", b"{"))) > MOST_VALUES:
        raise CorruptFileError(f"{path} has a corrupt header: more than {MOST_VALUES:,} values.", hint=_RESAVE)
    try:
        parsed = parse_json(text.decode())
    except (ValueError, RecursionError) as error:
        raise CorruptFileError(f"{path} has a corrupt header: {error}.", hint=_RESAVE) from error
    if not isinstance(parsed, dict):
        raise CorruptFileError(f"{path} has a corrupt header: not a JSON object.", hint=_RESAVE)
    return parsed


def _metadata(path: Path, metadata: Any) -> dict[str, str]:
    if metadata is None:
        return {}
    if isinstance(metadata, dict) and all(isinstance(each, str) for each in metadata.values()):
        with suppress(UnicodeEncodeError):
            "".join((*metadata, *metadata.values())).encode()
            return metadata
    raise CorruptFileError(f"{path} has a corrupt header: __metadata__ must hold texts by name.", hint=_RESAVE)


def _checked(path: Path, declared: Mapping[str, Any], data_start: int, size: int, shard: int) -> dict[str, Entry]:
    spans = sorted((_span(path, name, value) for name, value in declared.items()), key=lambda span: span[3:])
    entries: dict[str, Entry] = {}
    end = 0
    for name, dtype, shape, start, stop in spans:
        if start != end:
            raise CorruptFileError(
                f"{path} has a corrupt header: tensor {_shown(name)} begins at byte {start:,}, expected {end:,}.",
                hint=_RESAVE,
            )
        end = stop
        entries[name] = Entry(dtype, shape, shard, data_start + start)
    if data_start + end > size:
        raise TruncatedShardError(
            f"{path} is {size:,} bytes long, but its header says {data_start + end:,}.", hint=_STILL_WRITTEN
        )
    if data_start + end < size:
        raise CorruptFileError(
            f"{path} is {size:,} bytes long, but its header accounts for {data_start + end:,}.", hint=_RESAVE
        )
    return entries


def _span(path: Path, name: str, value: Any) -> tuple[str, str, tuple[int, ...], int, int]:
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
