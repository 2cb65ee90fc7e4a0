"""Stage *discover*: parse `.metadata` of torch.distributed.checkpoint: tensors, and the place of each piece.

It is a pickle, which is parsed and never executed. It may hold anything, so all values are checked against each other.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
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
"""The stated place of a piece, by the name of its tensor and its position in it."""


@dataclass(frozen=True, slots=True)
class StatedPiece:
    """A piece: its box, its file beside `.metadata`, and its place in that file."""

    box: Box
    file: str
    offset: int
    nbytes: int


@dataclass(frozen=True, slots=True)
class StatedTensor:
    """A tensor: its dtype as a safetensors code, or torch's name if there is none; and its non-empty pieces, without
    replicas.
    """

    dtype: str
    shape: tuple[int, ...]
    pieces: tuple[StatedPiece, ...]


class StatedMetadata:
    """What a `.metadata` states.

    Args:
        data: its content.

    Attributes:
        keys: for each tensor, the keys that lead to it in the trainer's nested dicts; only its name if not stated.
        scalars: the tensors without dimensions.

    Raises:
        ValueError: it is damaged, or not a `.metadata`.
    """

    def __init__(self, data: bytes) -> None:
        found = unpickled(data, known={("torch", "Size"): tuple}, persistent=_refuse, most=_MOST_OPCODES)
        fields = _fields(found, "Metadata", "MCoreMetadata")
        self._tensors = {
            _text(name): _fields(each, "TensorStorageMetadata")
            for name, each in _mapping(fields.get("state_dict_metadata")).items()
            if not (type(each) is Opaque and each.name.endswith(".BytesStorageMetadata"))
        }
        self._places = _mapping(fields.get("storage_data"))
        paths = fields.get("planner_data")
        told = paths if type(paths) is dict else {}
        self.keys = {name: _keys(told.get(name)) or (name,) for name in self._tensors}
        self.scalars = frozenset(name for name, each in self._tensors.items() if each.get("size") == ())

    def tensors(self, names: Collection[str]) -> dict[str, StatedTensor]:
        """Some of the tensors, by name.

        Raises:
            ValueError: the statements about them contradict each other.
        """
        places: dict[tuple[str, tuple[int, ...]], Mapping[str, Any]] = {}
        for index, info in self._places.items():
            key = _fields(index, "MetadataIndex")
            if key.get("fqn") in names and key.get("offset") is not None:
                places[key["fqn"], sizes_of_tensor(key["offset"])] = _fields(info, "_StorageInfo")
        chunks = {name: _chunks(self._tensors[name].get("chunks")) for name in names}
        if sum(map(len, chunks.values())) > MOST_PIECES:  # checked first: a list may be shared by many tensors
            raise ValueError(f"more than {MOST_PIECES:,} pieces")
        return {name: _tensor(name, self._tensors[name], chunks[name], places) for name in names}


def _tensor(name: str, fields: Mapping[str, Any], chunks: list[Any], places: _Places) -> StatedTensor:
    properties = fields.get("properties")
    state = properties.state if type(properties) is Opaque else None
    kind = state[0] if type(state) is tuple and state else state.get("dtype") if type(state) is dict else None
    dtype = kind.name.removeprefix("torch.")[:_SHOWN] if type(kind) is Global else type(kind).__name__
    shape = sizes_of_tensor(fields.get("size"))
    if math.prod(shape) > _LARGEST >> 3:
        raise ValueError(f"tensor {name!r} has too many elements")
    stated = (_fields(chunk, "ChunkStorageMetadata") for chunk in chunks)
    boxes = dict.fromkeys((sizes_of_tensor(each.get("offsets")), sizes_of_tensor(each.get("sizes"))) for each in stated)
    pieces = tuple(_placed(name, box, places) for box in boxes if math.prod(box[1]))
    return StatedTensor(DTYPES.get(dtype, dtype), shape, pieces)


def _placed(name: str, box: Box, places: _Places) -> StatedPiece:
    """A piece with its place in a file."""
    info = places.get((name, box[0]))
    if info is None:
        raise ValueError(f"it does not say where the piece of {name!r} at {list(box[0])} is")
    file, offset, nbytes = info.get("relative_path"), info.get("offset"), info.get("length")
    if type(offset) is not int or type(nbytes) is not int or not (0 <= offset <= offset + nbytes <= _LARGEST):
        raise ValueError(f"the piece of {name!r} at {list(box[0])} has no place in a file")
    path = PurePosixPath(_text(file))
    if not path.name or path.is_absolute() or ".." in path.parts or "\0" in str(path) or "\\" in str(path):
        raise ValueError(f"it names {str(path)[:_SHOWN]!r}, which is not a file beside it")
    if info.get("transform_descriptors"):
        raise ValueError(f"the piece of {name!r} at {list(box[0])} is compressed by an extension")
    return StatedPiece(box, str(path), offset, nbytes)


def _refuse(value: Any) -> Any:
    raise ValueError(f"{type(value).__name__} is not expected in it")  # without the value: its repr may be endless


def _fields(value: Any, *classes: str) -> Mapping[str, Any]:
    """The attributes of an object of one of these classes, from any module."""
    if type(value) is Opaque and value.name.rpartition(".")[2] in classes and type(value.state) is dict:
        return value.state
    raise ValueError(f"expected {classes[0]}, found {type(value).__name__}")


def _mapping(value: Any) -> Mapping[Any, Any]:
    return value if type(value) is dict else _refuse(value)


def _text(value: Any) -> str:
    if type(value) is not str:
        return str(_refuse(value))
    value.encode()  # refuses lone surrogates
    return value


def sizes_of_tensor(value: Any) -> tuple[int, ...]:
    """A value as the sizes of a tensor, or a position in one; ValueError if it is neither."""
    if (
        type(value) is tuple
        and all(type(each) is int and 0 <= each <= _LARGEST for each in value)
        and len(value) <= _MOST_DIMENSIONS
    ):
        return value
    raise ValueError("a size of a tensor is not valid")


def _chunks(value: Any) -> list[Any]:
    return value if type(value) is list else [_refuse(value)]


def _keys(path: Any) -> tuple[str, ...]:
    """The keys that lead to a tensor; empty if they are not stated."""
    return tuple(map(str, path)) if type(path) is tuple and all(type(key) in (str, int) for key in path) else ()
