"""Stage *discover*: checkpoints of torch.distributed.checkpoint, in which each process saved its pieces of the tensors.

`.metadata`, a pickle, lists every piece and its place in a `__0_0.distcp` file beside it. It is parsed, never executed
(`unpickler.py`), without torch.distributed. The nesting of the saved values shows which tensors are the model's.
"""

from __future__ import annotations

import dataclasses
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from ckavg.checkpoints.distributed_metadata import StatedMetadata, StatedTensor, sizes_of_tensor
from ckavg.checkpoints.layouts import is_averaged, is_training_state
from ckavg.checkpoints.model_names import choose_model
from ckavg.checkpoints.pieces import Box, cut
from ckavg.checkpoints.run import ITEM_BYTES, Shard, TensorInfo, WhyLeftOut
from ckavg.checkpoints.saved_tensors import HEAD_BYTES, NotInOrderError, SavedTensor, find_data
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

_MOST_BYTES = 1 << 29
_DEEPEST = 3
_MOST_FILES, _MOST_TENSORS = 100_000, 1_000_000
_GAP, _MOST_AT_ONCE = 64 << 10, 1 << 20
"""For remote files: the largest gap between the beginnings of two archives to read in one request, and the most bytes
of a request."""

_REWRITE = "Save the checkpoint again, or leave it out with --skip-step."
_WAIT = (
    "It is still being written, or was not copied: wait, or copy it again. --skip-incomplete leaves the checkpoint out."
)

LeftOut = tuple[WhyLeftOut, str]


@dataclass(frozen=True, slots=True)
class Distributed:
    """The model in such a checkpoint: its files, its tensors, and what is left out."""

    shards: tuple[Shard, ...]
    entries: Mapping[str, TensorInfo]
    left_out: tuple[LeftOut, ...]


# --- finding it ---


def find_distributed(directory: AnyPath) -> tuple[AnyPath | None, list[LeftOut]]:
    """The folder with a checkpoint's model in this format, if any, and other such folders that are left out.

    Raises:
        OSError: a folder cannot be listed.
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
    """Whether a checkpoint is in this format, complete or not; False if it cannot be listed."""
    try:
        return find_distributed(directory)[0] is not None
    except OSError:
        return False


# --- reading it ---


def read_distributed(folder: AnyPath, checkpoint: AnyPath, *, prefix: str | None, bounds: Bounds) -> Distributed:
    """Read the model of a checkpoint.

    Args:
        folder: where `.metadata` is.
        checkpoint: the directory to convert if it cannot be read.
        prefix: how the names of the model's tensors begin; None: inferred from the nesting.
        bounds: how far links may lead.

    Raises:
        MissingShardError, TruncatedShardError: `.metadata`, or a file that it names, is missing or incomplete.
        CorruptFileError: `.metadata` is damaged, or contradicts itself or the files.
        UnsupportedFormatError: a tensor is quantized, compressed or transposed.
        ReadError: a file cannot be read, or leads out of the checkpoint.
        CombinedError: more than one of these.
    """
    place = folder / METADATA
    found = problem_with(place, bounds)
    raise_all([] if found is None else [found])
    try:
        data = storage_of(place).read_small(place, _MOST_BYTES)
    except FileNotFoundError as error:
        raise MissingShardError(f"{place} does not exist; torch writes it last.", hint=_WAIT) from error
    except OSError as error:
        raise ReadError(f"{place} cannot be read: {error.strerror}.", hint="Check that you may read it.") from error
    if not data:
        raise TruncatedShardError(f"{place} is empty.", hint=_WAIT)
    try:
        stated = StatedMetadata(data)
        names, left_out = choose_model(stated.keys, prefix, scalars=stated.scalars)
        if prefix is not None and not names:
            raise SettingError(
                f"--prefix {prefix}: no tensor in {folder} begins so.",
                hint=f"There are {listed(sorted(stated.keys), 8)}.",
            )
        if len(names) > _MOST_TENSORS:
            raise ValueError(f"more than {_MOST_TENSORS:,} tensors")
        chosen = {names[name]: each for name, each in stated.tensors(names).items()}
        shards, missing = _shards(folder, chosen, bounds)
        raise_all(missing)
        entries = _located(chosen, shards)
    except SettingError:  # a ValueError, too
        raise
    except NotInOrderError as error:
        here = isinstance(folder, Path)
        raise UnsupportedFormatError(
            f"{error} is stored transposed, which is not supported.",
            hint="This command writes it in order, as safetensors, and changes nothing that is there:" if here else "",
            command=from_distributed(folder, checkpoint) if here else "",
        ) from error
    except ValueError as error:
        raise CorruptFileError(f"{place} is damaged, or hostile: {error}.", hint=_REWRITE) from error
    if not entries:
        raise CorruptFileError(
            f"{folder} holds no tensors of a model.", hint="State how their names begin with --prefix."
        )
    return Distributed(tuple(shards.values()), entries, tuple(left_out))


def _shards(
    folder: AnyPath, tensors: Mapping[str, StatedTensor], bounds: Bounds
) -> tuple[dict[str, Shard], list[CkavgError]]:
    """The files that hold pieces of the model, by name, and their problems."""
    ends: dict[str, int] = defaultdict(int)
    for piece in (piece for tensor in tensors.values() for piece in tensor.pieces):
        ends[piece.file] = max(ends[piece.file], piece.offset + piece.nbytes)
    if len(ends) > _MOST_FILES:
        raise ValueError(f"{len(ends):,} files, more than {_MOST_FILES:,}")
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
    """A file; OSError if it does not exist or cannot be accessed."""
    if not isinstance(path, RemotePath):
        with LOCAL.open(path) as (info, _):
            return Shard(path, info.nbytes, info.state)
    return Shard(path, size_of(path), identity=path.storage.identity(path))


# --- locating the data of each piece ---


def _located(tensors: Mapping[str, StatedTensor], shards: Mapping[str, Shard]) -> dict[str, TensorInfo]:
    """The tensors, with the position of every byte."""
    order = {name: number for number, name in enumerate(shards)}
    wanted: list[_Wanted] = []
    entries: dict[str, TensorInfo] = {}
    for name, tensor in tensors.items():
        if tensor.dtype not in ITEM_BYTES:
            place = next(iter(shards.values())).path
            raise UnsupportedFormatError(
                f"{place}: tensor {name!r} has dtype {tensor.dtype}, which cannot be averaged.",
                hint="Quantized weights cannot be averaged. Average the checkpoints from before quantizing.",
            )
        archives = [(piece.box, order[piece.file], piece.offset) for piece in tensor.pieces]
        entries[name] = _joined(name, tensor.dtype, tensor.shape, archives)  # before anything is read
        wanted += [
            (piece.file, SavedTensor(name, tensor.dtype, piece.box[1], piece.offset, piece.nbytes))
            for piece in tensor.pieces
        ]
    groups = _groups(wanted, gap=_GAP if any(isinstance(each.path, RemotePath) for each in shards.values()) else 0)
    starts: dict[tuple[int, int], int] = {}
    for group, found in zip(groups, thread_map(lambda each: _find_all(shards, each), groups), strict=True):
        starts |= {(order[file], saved.offset): at for (file, saved), at in zip(group, found, strict=True)}
    return {name: _moved(entry, starts) if entry.numel else entry for name, entry in entries.items()}


def _moved(entry: TensorInfo, starts: Mapping[tuple[int, int], int]) -> TensorInfo:
    """A tensor with the offsets of its pieces moved from their archives to their data."""
    pieces = tuple(dataclasses.replace(each, offset=starts[each.shard, each.offset]) for each in entry.pieces)
    return dataclasses.replace(entry, offset=starts[entry.shard, entry.offset], pieces=pieces)


_Wanted = tuple[str, SavedTensor]
"""A file, and a tensor to find in it."""


def _groups(wanted: Iterable[_Wanted], *, gap: int) -> list[list[_Wanted]]:
    """Group archives that are read in one request: close to each other, in the order of their bytes."""
    groups: list[list[_Wanted]] = []
    for file, saved in sorted(wanted, key=lambda each: (each[0], each[1].offset)):
        (first_file, first), (_, last) = (groups[-1][0], groups[-1][-1]) if groups else (("", saved), ("", saved))
        is_near = saved.offset - last.offset <= HEAD_BYTES + gap and saved.offset - first.offset < _MOST_AT_ONCE
        if file == first_file and is_near:
            groups[-1].append((file, saved))
        else:
            groups.append([(file, saved)])
    return groups


def _find_all(shards: Mapping[str, Shard], group: Sequence[_Wanted]) -> list[int]:
    """The offset of each tensor's data in its file."""
    (file, first), (_, last) = group[0], group[-1]
    path = shards[file].path
    read = storage_of(path).read
    data = read(path, first.offset, last.offset + min(HEAD_BYTES, last.nbytes))
    found = []
    for _, saved in group:
        head = data[saved.offset - first.offset :][: min(HEAD_BYTES, saved.nbytes)]
        try:
            found.append(find_data(saved, head, partial(read, path, saved.offset)))
        except NotInOrderError as error:
            raise NotInOrderError(f"{path}: tensor {saved.name!r}") from error
        except ValueError as error:
            what = f"{path}, byte {saved.offset:,}: the piece of {saved.name!r} is damaged: {error}."
            raise CorruptFileError(what, hint=_REWRITE) from error
    return found


# --- slices as safetensors ---


def read_slices(text: str) -> dict[str, tuple[int, ...]]:
    """The position of each slice in its tensor, from the header of a safetensors file with slices.

    Raises:
        ValueError: the header does not state it.
    """
    try:
        return {name: sizes_of_tensor(tuple(each["saved_offsets"])) for name, each in parse_json(text).items()}
    except (AttributeError, KeyError, TypeError, RecursionError) as error:
        raise ValueError("saved_offsets are expected by name") from error


def join_slices(slices: Iterable[tuple[str, TensorInfo, tuple[int, ...]]]) -> dict[str, TensorInfo]:
    """Join the slices of tensors in safetensors files; a slice is given by its name, its entry and its position.

    Raises:
        ValueError: the slices of a tensor do not cover it exactly once.
    """
    found: dict[str, dict[Box, TensorInfo]] = defaultdict(dict)
    for name, entry, start in slices:
        found[name][start, entry.shape] = entry  # a replica replaces its original
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
