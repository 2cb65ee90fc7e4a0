"""Stage *discover*: what a `.metadata` of torch.distributed.checkpoint says: tensors, and where the pieces of each are.

It is a pickle, and described rather than run. It may hold anything: nothing is believed that does not fit together.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any

from ckavg.checkpoints.pieces import Box
from ckavg.checkpoints.saved_tensors import DTYPES
from ckavg.checkpoints.unpickler import Global, Opaque, unpickled

MOST_PIECES = 4_000_000
_MOST_OPCODES = 100_000_000
_MOST_DIMENSIONS = 64
_LARGEST = 2**63 - 1
_SHOWN = 200

_Places = Mapping[tuple[str, tuple[int, ...]], Mapping[str, Any]]
"""What is said of the place of a piece, by the name of its tensor and by where it begins in it."""


@dataclass(frozen=True, slots=True)
class StatedPiece:
    """A piece: its box, the file beside `.metadata` that holds it, and where in it."""

    box: Box
    file: str
    offset: int
    nbytes: int


@dataclass(frozen=True, slots=True)
class StatedTensor:
    """A tensor.

    Attributes:
        dtype: as a safetensors code; torch's name where there is none.
        shape: its dimensions.
        keys: those that lead to it in what the trainer saved; its name alone where they are not told.
        pieces: that are not empty, replicas once.
    """

    dtype: str
    shape: tuple[int, ...]
    keys: tuple[str, ...]
    pieces: tuple[StatedPiece, ...]


def parse_metadata(data: bytes) -> dict[str, StatedTensor]:
    """The tensors that a `.metadata` states, by name.

    Raises:
        ValueError: it is damaged, or does not fit together.
    """
    found = unpickled(data, known={("torch", "Size"): tuple}, persistent=_refuse, most=_MOST_OPCODES)
    fields = _fields(found, "Metadata", "MCoreMetadata")
    tensors = {
        _text(name): _fields(each, "TensorStorageMetadata")
        for name, each in _mapping(fields.get("state_dict_metadata")).items()
        if not (type(each) is Opaque and each.name.endswith(".BytesStorageMetadata"))
    }
    places: dict[tuple[str, tuple[int, ...]], Mapping[str, Any]] = {}
    for index, info in _mapping(fields.get("storage_data")).items():
        key = _fields(index, "MetadataIndex")
        if key.get("fqn") in tensors and key.get("offset") is not None:
            places[key["fqn"], sizes_of_tensor(key["offset"])] = _fields(info, "_StorageInfo")
    if len(places) > MOST_PIECES:
        raise ValueError(f"more than {MOST_PIECES:,} pieces")
    paths = fields.get("planner_data")
    paths = paths if type(paths) is dict else {}
    return {name: _tensor(name, _keys(paths.get(name)) or (name,), each, places) for name, each in tensors.items()}


def _tensor(name: str, keys: tuple[str, ...], fields: Mapping[str, Any], places: _Places) -> StatedTensor:
    properties = fields.get("properties")
    state = properties.state if type(properties) is Opaque else None
    kind = state[0] if type(state) is tuple and state else state.get("dtype") if type(state) is dict else None
    dtype = DTYPES.get(kind.name.removeprefix("torch.")) if type(kind) is Global else None
    shape = sizes_of_tensor(fields.get("size"))
    if math.prod(shape) > _LARGEST >> 3:
        raise ValueError(f"tensor {name!r} has too many elements")
    chunks = fields.get("chunks")
    if type(chunks) is not list:
        raise ValueError(f"tensor {name!r} has no chunks")
    stated = (_fields(chunk, "ChunkStorageMetadata") for chunk in chunks)
    boxes = dict.fromkeys(
        (sizes_of_tensor(each.get("offsets")), sizes_of_tensor(each.get("sizes"))) for each in stated
    )  # replicas once
    pieces = tuple(_placed(name, box, places) for box in boxes if math.prod(box[1]))
    return StatedTensor(dtype or str(getattr(kind, "name", kind))[:_SHOWN], shape, keys, pieces)


def _placed(name: str, box: Box, places: _Places) -> StatedPiece:
    """A piece with its place in a file."""
    info = places.get((name, box[0]))
    if info is None:
        raise ValueError(f"it says not where the piece of {name!r} at {list(box[0])} is")
    file, offset, nbytes = info.get("relative_path"), info.get("offset"), info.get("length")
    if type(offset) is not int or type(nbytes) is not int or not (0 <= offset <= offset + nbytes <= _LARGEST):
        raise ValueError(f"the piece of {name!r} at {list(box[0])} has no place in a file")
    path = PurePosixPath(_text(file))
    if not path.name or path.is_absolute() or ".." in path.parts or "\0" in str(path) or "\\" in str(path):
        raise ValueError(f"it names {str(path)[:_SHOWN]!r}, which is no file beside it")
    if info.get("transform_descriptors"):
        raise ValueError(f"the piece of {name!r} at {list(box[0])} is compressed by an extension")
    return StatedPiece(box, str(path), offset, nbytes)


def _refuse(what: Any) -> Any:
    raise ValueError(f"{str(what)[:_SHOWN]!r} makes no sense in it")


def _fields(value: Any, *classes: str) -> Mapping[str, Any]:
    """The attributes of an object of one of these classes, wherever they are defined."""
    if type(value) is Opaque and value.name.rpartition(".")[2] in classes and type(value.state) is dict:
        return value.state
    raise ValueError(f"{classes[0]} is expected, where there is {type(value).__name__}")


def _mapping(value: Any) -> Mapping[Any, Any]:
    return value if type(value) is dict else _refuse(type(value).__name__)


def _text(value: Any) -> str:
    if type(value) is not str:
        return str(_refuse(type(value).__name__))
    value.encode()  # or it is no text
    return value


def sizes_of_tensor(value: Any) -> tuple[int, ...]:
    """A value as sizes of a tensor, or a place in one; ValueError where it is none."""
    if (
        type(value) is tuple
        and all(type(each) is int and 0 <= each <= _LARGEST for each in value)
        and len(value) <= _MOST_DIMENSIONS
    ):
        return value
    raise ValueError(f"{str(value)[:_SHOWN]} is no size of a tensor")


def _keys(path: Any) -> tuple[str, ...]:
    """The keys that lead to a tensor; empty where they are not stated."""
    return tuple(map(str, path)) if type(path) is tuple and all(type(key) in (str, int) for key in path) else ()
