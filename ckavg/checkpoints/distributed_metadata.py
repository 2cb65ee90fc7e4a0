"""Stage *discover*: what a `.metadata` of torch.distributed.checkpoint says: tensors, and where the pieces of each are.

It is a pickle, and described rather than run. It may hold anything: nothing is believed that does not fit together.
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
    """A tensor: its dtype as a safetensors code, torch's name where there is none; and its pieces that are not empty,
    replicas once.
    """

    dtype: str
    shape: tuple[int, ...]
    pieces: tuple[StatedPiece, ...]


class StatedMetadata:
    """What a `.metadata` states.

    Args:
        data: its content.

    Attributes:
        keys: by the name of each tensor, those that lead to it in what the trainer saved; its name alone where they are
            not told.
        scalars: the tensors without dimensions.

    Raises:
        ValueError: it is damaged, or is none.
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
            ValueError: what is said of them does not fit together.
        """
        places: dict[tuple[str, tuple[int, ...]], Mapping[str, Any]] = {}
        for index, info in self._places.items():
            key = _fields(index, "MetadataIndex")
            if key.get("fqn") in names and key.get("offset") is not None:
                places[key["fqn"], sizes_of_tensor(key["offset"])] = _fields(info, "_StorageInfo")
        chunks = {name: _chunks(self._tensors[name].get("chunks")) for name in names}
        if sum(map(len, chunks.values())) > MOST_PIECES:  # before one of them is looked at: a list may be shared
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


def _refuse(value: Any) -> Any:
    raise ValueError(f"{type(value).__name__} makes no sense in it")  # its value may take for ever to be shown


def _fields(value: Any, *classes: str) -> Mapping[str, Any]:
    """The attributes of an object of one of these classes, wherever they are defined."""
    if type(value) is Opaque and value.name.rpartition(".")[2] in classes and type(value.state) is dict:
        return value.state
    raise ValueError(f"{classes[0]} is expected, where there is {type(value).__name__}")


def _mapping(value: Any) -> Mapping[Any, Any]:
    return value if type(value) is dict else _refuse(value)


def _text(value: Any) -> str:
    if type(value) is not str:
        return str(_refuse(value))
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
    raise ValueError("a size of a tensor is none")


def _chunks(value: Any) -> list[Any]:
    return value if type(value) is list else [_refuse(value)]


def _keys(path: Any) -> tuple[str, ...]:
    """The keys that lead to a tensor; empty where they are not stated."""
    return tuple(map(str, path)) if type(path) is tuple and all(type(key) in (str, int) for key in path) else ()
