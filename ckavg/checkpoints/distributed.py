"""Stage *discover*: checkpoints of torch.distributed.checkpoint, in which each process saved its pieces of the tensors.

`.metadata`, a pickle, names every piece, and its place in a `__0_0.distcp` beside it. It is described rather than run
(`unpickler.py`); torch.distributed is not needed. The model is found in it by how the trainer nested what it saved.
"""

from __future__ import annotations

import dataclasses
import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from ckavg.checkpoints.layouts import is_averaged, is_training_state
from ckavg.checkpoints.model_names import choose_model
from ckavg.checkpoints.pieces import Box, cut
from ckavg.checkpoints.run import ITEM_BYTES, Shard, TensorInfo, WhyLeftOut
from ckavg.checkpoints.saved_tensors import DTYPES, HEAD_BYTES, NotInOrderError, SavedTensor, find_data
from ckavg.checkpoints.unpickler import Global, Opaque, unpickled
from ckavg.checkpoints.unsupported import from_distributed
from ckavg.errors import (
    CkavgError,
    CorruptFileError,
    MissingShardError,
    ReadError,
    SettingError,
    TruncatedShardError,
    UnsupportedFormatError,
    listed,
    raise_all,
)
from ckavg.storage.base import AnyPath, RemotePath
from ckavg.storage.download import thread_map
from ckavg.storage.local import LOCAL, Bounds, is_link, parse_json, problem_with, size_of, storage_of

METADATA = ".metadata"
SLICES = ".distcp"

MOST_PIECES = 4_000_000
_MOST_BYTES = 1 << 29
_MOST_OPCODES = 100_000_000
_LARGEST = 2**63 - 1
_DEEPEST = 3
_GAP = 64 << 10
"""Bytes between two heads elsewhere that are fetched rather than asked for around."""

_REWRITE = "Save the checkpoint again, or leave it out with --skip-step."
_WAIT = (
    "It is still being written, or was not copied: wait, or copy it again. --skip-incomplete leaves the checkpoint out."
)

LeftOut = tuple[WhyLeftOut, str]


@dataclass(frozen=True, slots=True)
class Distributed:
    """The model in such a checkpoint: its files, its tensors, and what is left out of it."""

    shards: tuple[Shard, ...]
    entries: Mapping[str, TensorInfo]
    left_out: tuple[LeftOut, ...]


@dataclass(frozen=True, slots=True)
class _Piece:
    """A piece as `.metadata` states it."""

    box: Box
    file: str
    offset: int
    nbytes: int


@dataclass(frozen=True, slots=True)
class _Stated:
    """A tensor as `.metadata` states it."""

    dtype: str
    shape: tuple[int, ...]
    pieces: tuple[_Piece, ...]


# --- where it lies ---


def find_distributed(directory: AnyPath) -> tuple[AnyPath | None, list[LeftOut]]:
    """The folder of a checkpoint in which its model was saved so, if any, and others of the kind that are left out.

    Raises:
        OSError: the system would not let us list a folder.
    """
    found: list[AnyPath] = []
    left_out: list[LeftOut] = []
    folders = [(directory, 0)]
    for folder, depth in folders:
        listing = storage_of(folder).list(folder)
        if any(name == METADATA or name.endswith(SLICES) for name in listing.files):
            found.append(folder)
            continue
        for name in listing.folders if depth < _DEEPEST else ():
            inner = folder / name
            if is_averaged(name):
                left_out.append(("average", f"{inner.relative_to(directory).as_posix()}/"))
            elif not (name.startswith(".") or is_link(inner) or (is_training_state(name) and "model" not in name)):
                folders.append((inner, depth + 1))
    left_out = [(why, name) for why, name in left_out if holds_distributed(directory / name)] if found else []
    left_out += [("second model", f"{other.relative_to(directory).as_posix()}/") for other in found[1:]]
    return next(iter(found), None), left_out


def holds_distributed(directory: AnyPath) -> bool:
    """Whether a checkpoint was saved so, in whole or in part; False where it cannot be listed."""
    try:
        return find_distributed(directory)[0] is not None
    except OSError:
        return False


# --- what it holds ---


def read_distributed(folder: AnyPath, *, prefix: str | None, bounds: Bounds) -> Distributed:
    """Read what a checkpoint holds of the model.

    Args:
        folder: where `.metadata` is.
        prefix: how the names of the model's tensors begin in it; None: as their nesting tells.
        bounds: how far links may lead.

    Raises:
        MissingShardError, TruncatedShardError: `.metadata`, or one of the files that it names, is not there in full.
        CorruptFileError: `.metadata` is damaged, or does not agree with itself or with the files.
        UnsupportedFormatError: a tensor is quantized, compressed or transposed.
        ReadError: the system would not let us read it, or it leads out of the checkpoint.
        CombinedError: more than one of these.
    """
    place = folder / METADATA
    found = problem_with(place, bounds)
    raise_all([] if found is None else [found])
    try:
        data = storage_of(place).read_small(place, _MOST_BYTES)
    except FileNotFoundError as error:
        raise MissingShardError(f"{place} does not exist, which torch writes last.", hint=_WAIT) from error
    except OSError as error:
        raise ReadError(f"{place} cannot be read: {error.strerror}.", hint="Check that you may read it.") from error
    if not data:
        raise TruncatedShardError(f"{place} is empty.", hint=_WAIT)
    try:
        stated, paths = _parsed(data)
        names, left_out = choose_model(paths, prefix, scalars={name for name, each in stated.items() if not each.shape})
        if prefix is not None and not names:
            raise SettingError(
                f"--prefix {prefix}: no tensor in {folder} begins so.",
                hint=f"There are {listed(sorted(stated), 8)}.",
            )
        chosen = {new: stated[old] for old, new in names.items()}
        shards, missing = _shards(folder, chosen, bounds)
        raise_all(missing)
        entries = _located(folder, chosen, shards)
    except SettingError:  # a ValueError, too
        raise
    except ValueError as error:
        raise CorruptFileError(f"{place} is damaged, or hostile: {error}.", hint=_REWRITE) from error
    if not entries:
        raise CorruptFileError(
            f"{folder} holds no tensors of a model.", hint="Say how their names begin with --prefix."
        )
    return Distributed(tuple(shards.values()), entries, tuple(left_out))


def _parsed(data: bytes) -> tuple[dict[str, _Stated], dict[str, tuple[str, ...]]]:
    """The tensors that `.metadata` states, and the keys that lead to each in what the trainer saved."""
    found = unpickled(data, known={("torch", "Size"): tuple}, persistent=_refuse, most=_MOST_OPCODES)
    fields = _fields(found, "Metadata", "MCoreMetadata")
    tensors = {
        _text(name): _fields(each, "TensorStorageMetadata")
        for name, each in _mapping(fields.get("state_dict_metadata")).items()
        if type(each) is Opaque and each.name.endswith(".TensorStorageMetadata")
    }
    places: dict[tuple[str, tuple[int, ...]], Mapping[str, Any]] = {}
    for index, info in _mapping(fields.get("storage_data")).items():
        key = _fields(index, "MetadataIndex")
        if key.get("fqn") in tensors and key.get("offset") is not None:
            places[key["fqn"], _sizes(key["offset"])] = _fields(info, "_StorageInfo")
    if len(places) > MOST_PIECES:
        raise ValueError(f"more than {MOST_PIECES:,} pieces")
    keys = fields.get("planner_data")
    paths = {name: (keys or {}).get(name) if type(keys) is dict else None for name in tensors}
    stated = {name: _tensor(name, each, places) for name, each in tensors.items()}
    return stated, {name: _keys(path) or (name,) for name, path in paths.items()}


def _tensor(
    name: str,
    fields: Mapping[str, Any],
    places: Mapping[tuple[str, tuple[int, ...]], Mapping[str, Any]],
) -> _Stated:
    properties = fields.get("properties")
    state = properties.state if type(properties) is Opaque else None
    kind = state[0] if type(state) is tuple and state else state.get("dtype") if type(state) is dict else None
    dtype = DTYPES.get(kind.name.removeprefix("torch.")) if type(kind) is Global else None
    shape = _sizes(fields.get("size"))
    if math.prod(shape) > _LARGEST >> 3:
        raise ValueError(f"tensor {name!r} has too many elements")
    chunks = fields.get("chunks")
    if type(chunks) is not list:
        raise ValueError(f"tensor {name!r} has no chunks")
    stated = (_fields(chunk, "ChunkStorageMetadata") for chunk in chunks)
    boxes = dict.fromkeys((_sizes(each.get("offsets")), _sizes(each.get("sizes"))) for each in stated)  # replicas once
    pieces = tuple(_placed(name, box, places) for box in boxes if math.prod(box[1]))
    return _Stated(dtype or str(getattr(kind, "name", kind))[:80], shape, pieces)


def _placed(name: str, box: Box, places: Mapping[tuple[str, tuple[int, ...]], Mapping[str, Any]]) -> _Piece:
    """A piece with its place in a file."""
    info = places.get((name, box[0]))
    if info is None:
        raise ValueError(f"it says not where the piece of {name!r} at {list(box[0])} is")
    file, offset, nbytes = info.get("relative_path"), info.get("offset"), info.get("length")
    if type(offset) is not int or type(nbytes) is not int or not (0 <= offset <= offset + nbytes <= _LARGEST):
        raise ValueError(f"the piece of {name!r} at {list(box[0])} has no place in a file")
    path = PurePosixPath(_text(file))
    if not path.name or path.is_absolute() or ".." in path.parts or "\0" in str(path) or "\\" in str(path):
        raise ValueError(f"it names {str(path)[:200]!r}, which is no file beside it")
    if info.get("transform_descriptors"):
        raise ValueError(f"the piece of {name!r} at {list(box[0])} is compressed by an extension")
    return _Piece(box, str(path), offset, nbytes)


def _shards(
    folder: AnyPath, tensors: Mapping[str, _Stated], bounds: Bounds
) -> tuple[dict[str, Shard], list[CkavgError]]:
    """The files that hold pieces of the model, by name, and what is wrong with them."""
    ends: dict[str, int] = defaultdict(int)
    for piece in (piece for tensor in tensors.values() for piece in tensor.pieces):
        ends[piece.file] = max(ends[piece.file], piece.offset + piece.nbytes)
    shards: dict[str, Shard] = {}
    errors: list[CkavgError] = []
    for name, end in sorted(ends.items()):
        path = folder / name
        found = problem_with(path, bounds)
        if found is not None:
            errors.append(found)
            continue
        try:
            shards[name] = _shard(path)
            if end > shards[name].nbytes:
                what = f"{path} is {shards[name].nbytes:,} bytes long, but {METADATA} says {end:,}."
                errors.append(TruncatedShardError(what, hint=_WAIT))
        except FileNotFoundError:
            errors.append(MissingShardError(f"{path} does not exist.", hint=_WAIT))
        except OSError as error:
            what = f"{path} cannot be read: {error.strerror}."
            errors.append(ReadError(what, hint="Check that you may read it."))
    return shards, errors


def _shard(path: AnyPath) -> Shard:
    """A file; OSError where there is none, or the system would not let us look."""
    if not isinstance(path, RemotePath):
        with LOCAL.open(path) as (info, _):
            return Shard(path, info.nbytes, info.state)
    return Shard(path, size_of(path), identity=path.storage.identity(path))


# --- where the data of each piece begins ---


def _located(folder: AnyPath, tensors: Mapping[str, _Stated], shards: Mapping[str, Shard]) -> dict[str, TensorInfo]:
    """The tensors with the place of every byte."""
    order = {name: number for number, name in enumerate(shards)}
    wanted = [(name, tensor, piece) for name, tensor in tensors.items() for piece in tensor.pieces]
    for name, tensor, _ in wanted:
        if tensor.dtype not in ITEM_BYTES:
            raise UnsupportedFormatError(
                f"{folder}: tensor {name!r} has dtype {tensor.dtype}, which cannot be averaged.",
                hint="Quantized weights do not average. Average the checkpoints before quantizing them.",
            )
    entries = {
        name: _joined(
            name, each.dtype, each.shape, [(piece.box, order[piece.file], piece.offset) for piece in each.pieces]
        )
        for name, each in tensors.items()
    }
    wanted.sort(key=lambda each: (order[each[2].file], each[2].offset))
    groups = _groups(wanted, gap=_GAP if isinstance(folder, RemotePath) else 0)
    starts: dict[tuple[str, int, int], int] = {}
    for group, found in zip(
        groups, thread_map(lambda each: _read_beginnings(folder, shards, each), groups), strict=True
    ):
        starts |= {
            (name, order[piece.file], piece.offset): at for (name, _, piece), at in zip(group, found, strict=True)
        }
    return {name: _moved(entry, lambda *archive, name=name: starts[name, *archive]) for name, entry in entries.items()}


def _moved(entry: TensorInfo, start: Callable[[int, int], int]) -> TensorInfo:
    """A tensor whose pieces begin elsewhere in their files."""
    if not entry.numel:
        return entry
    pieces = tuple(dataclasses.replace(each, offset=start(each.shard, each.offset)) for each in entry.pieces)
    return dataclasses.replace(entry, offset=start(entry.shard, entry.offset), pieces=pieces)


_Wanted = tuple[str, _Stated, _Piece]


def _groups(wanted: Sequence[_Wanted], *, gap: int) -> list[list[_Wanted]]:
    """Pieces in order whose heads are read at once, for there is little between them."""
    groups: list[list[_Wanted]] = []
    for each in wanted:
        before = groups[-1][-1][2] if groups else None
        piece = each[2]
        if before and before.file == piece.file and piece.offset - before.offset <= HEAD_BYTES + gap:
            groups[-1].append(each)
        else:
            groups.append([each])
    return groups


def _read_beginnings(folder: AnyPath, shards: Mapping[str, Shard], group: Sequence[_Wanted]) -> list[int]:
    """Where the data of each piece begins in its file."""
    first, last = group[0][2], group[-1][2]
    path = shards[first.file].path
    data = storage_of(path).read(path, first.offset, last.offset + min(HEAD_BYTES, last.nbytes))
    return [_find_data(folder, path, each, data[each[2].offset - first.offset :][:HEAD_BYTES]) for each in group]


def _find_data(folder: AnyPath, path: AnyPath, wanted: _Wanted, head: bytes) -> int:
    name, tensor, piece = wanted
    saved = SavedTensor(tensor.dtype, piece.box[1], piece.offset, piece.nbytes)
    try:
        return find_data(
            saved,
            head[: piece.nbytes],
            lambda count: storage_of(path).read(path, piece.offset, piece.offset + count),
        )
    except NotInOrderError:
        here = isinstance(folder, Path)
        raise UnsupportedFormatError(
            f"{path}: tensor {name!r} is stored transposed, which is not read.",
            hint="This command writes it in order, as safetensors, and changes nothing that is there:" if here else "",
            command=from_distributed([folder], 'path / "model.safetensors"') if here else "",
        ) from None
    except ValueError as error:
        raise CorruptFileError(
            f"{path}, byte {piece.offset:,}: the piece of {name!r} is damaged: {error}.", hint=_REWRITE
        ) from error


# --- values of a pickle that may hold anything ---


def _refuse(what: Any) -> Any:
    raise ValueError(f"{str(what)[:200]!r} makes no sense in it")


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


def _sizes(value: Any) -> tuple[int, ...]:
    if type(value) is tuple and all(type(each) is int and 0 <= each <= _LARGEST for each in value) and len(value) <= 64:
        return value
    raise ValueError(f"{str(value)[:200]} is no size of a tensor")


def _keys(path: Any) -> tuple[str, ...]:
    """The keys that lead to a tensor; empty where they are not stated."""
    return tuple(map(str, path)) if type(path) is tuple and all(type(key) in (str, int) for key in path) else ()


# --- slices as safetensors ---


def read_slices(text: str) -> dict[str, tuple[int, ...]]:
    """Where in its tensor each slice begins, from the header of a safetensors file with slices.

    Raises:
        ValueError: it does not say.
    """
    try:
        return {name: _sizes(tuple(each["saved_offsets"])) for name, each in parse_json(text).items()}
    except (AttributeError, KeyError, TypeError, RecursionError) as error:
        raise ValueError("saved_offsets are expected by name") from error


def join_slices(slices: Iterable[tuple[str, TensorInfo, tuple[int, ...]]]) -> dict[str, TensorInfo]:
    """The tensors of which safetensors files hold slices: of each slice its name, what the header says, and where it
    begins.

    Raises:
        ValueError: the slices of a tensor are not exactly it.
    """
    found: dict[str, dict[Box, TensorInfo]] = defaultdict(dict)
    for name, entry, start in slices:
        found[name][start, entry.shape] = entry  # replicas once
    entries = {}
    for name, parts in found.items():
        first = next(iter(parts.values()))
        if any(len(start) != len(first.shape) or entry.dtype != first.dtype for (start, _), entry in parts.items()):
            raise ValueError(f"the slices of tensor {name!r} do not fit together")
        ends = [[begin + size for begin, size in zip(*box, strict=True)] for box in parts]
        shape = tuple(map(max, zip(*ends, strict=True)))
        entries[name] = _joined(
            name, first.dtype, shape, [(box, each.shard, each.offset) for box, each in parts.items()]
        )
    return dict(sorted(entries.items(), key=lambda item: (item[1].shard, item[1].offset)))


def _joined(name: str, dtype: str, shape: tuple[int, ...], boxes: Sequence[tuple[Box, int, int]]) -> TensorInfo:
    """A tensor of these boxes, each with its shard and offset."""
    try:
        pieces = cut(shape, boxes)
    except ValueError as error:
        raise ValueError(f"of tensor {name!r}, {error}") from error
    shard, offset = (pieces[0].shard, pieces[0].offset) if pieces else (0, 0)
    return TensorInfo(dtype, shape, shard, offset, pieces=pieces if len(pieces) > 1 else ())
