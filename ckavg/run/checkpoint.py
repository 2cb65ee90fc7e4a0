"""Stage *discover*: one checkpoint, from its directory or file to its tensor table. Reads headers and indexes."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path

from ckavg.atomic import read_small
from ckavg.errors import (
    CkavgError,
    CorruptFileError,
    MissingShardError,
    ReadError,
    UnsupportedFormatError,
    raise_all,
)
from ckavg.run.header import read_header
from ckavg.run.layouts import conversion, foreign_weights
from ckavg.run.values import Checkpoint, Entry, Kind, Shard

RESULT_RECORD = "ckavg.json"
"""A directory with this file in it is a result, never a checkpoint."""

MODEL = "model.safetensors"
MODEL_INDEX = "model.safetensors.index.json"
ADAPTER = "adapter_model.safetensors"

_SHARD_OF = re.compile(r".*-(\d+)-of-(\d+)\.safetensors", re.ASCII)
_REWRITE = "Save the checkpoint again, or leave it out with --from-step, --to-step or --last."


def holds_weights(directory: Path) -> bool:
    """Whether the directory itself holds safetensors weights, whole or in part."""
    return (directory / MODEL_INDEX).exists() or any(directory.glob("*.safetensors"))


def read_checkpoint(path: Path, step: int) -> Checkpoint:
    """Read the headers of one checkpoint.

    Args:
        path: a checkpoint directory, or a single safetensors file.
        step: the optimizer step at which it was saved.

    Raises:
        MissingShardError: a shard is not there, or the directory holds no weights.
        TruncatedShardError: a shard is shorter than its header says.
        CorruptFileError: a file is damaged, or the index and the shards disagree.
        UnsupportedFormatError: the weights are in another format.
        ReadError: the system would not let us read it.
        CombinedError: more than one of these.
    """
    if not path.is_dir():
        return _assemble(path, step, "file", [path], None)
    if (path / MODEL).exists():
        return _assemble(path, step, "model", [path / MODEL], None)
    if (path / MODEL_INDEX).exists():
        return _from_index(path, step, path / MODEL_INDEX)
    if (path / ADAPTER).exists():
        return _assemble(path, step, "adapter", [path / ADAPTER], None)
    files = sorted(path.glob("*.safetensors"))
    if not files:
        raise _no_weights(path)
    raise_all(_missing_of_count(path, files))
    return _assemble(path, step, "model", files, None)


def _from_index(path: Path, step: int, index: Path) -> Checkpoint:
    placed = _weight_map(index)
    names = sorted(set(placed.values()))
    checkpoint = _assemble(path, step, "model", [path / name for name in names], index)
    wrong = [name for name in placed if name not in checkpoint.entries]
    wrong += [name for name, entry in checkpoint.entries.items() if placed.get(name) != names[entry.shard]]
    if wrong:
        raise CorruptFileError(
            f"{index} and its shards disagree about {len(wrong)} tensors, such as {wrong[0]!r}.", hint=_REWRITE
        )
    return checkpoint


def _weight_map(index: Path) -> Mapping[str, str]:
    try:
        weight_map = json.loads(read_small(index))["weight_map"]
        placed = {str(name): str(file) for name, file in weight_map.items()}
    except OSError as error:
        raise ReadError(f"{index} cannot be read: {error.strerror}.", hint="Check that you may read it.") from error
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CorruptFileError(f"{index} is not a shard index: it has no weight_map.", hint=_REWRITE) from error
    for file in set(placed.values()):
        if Path(file).name != file or not file.endswith(".safetensors"):
            raise CorruptFileError(
                f"{index} names {file!r}: shards must be safetensors files beside their index.", hint=_REWRITE
            )
    if not placed:
        raise CorruptFileError(f"{index} lists no tensors.", hint=_REWRITE)
    return placed


def _assemble(path: Path, step: int, kind: Kind, files: list[Path], index: Path | None) -> Checkpoint:
    """Merge the headers of all shards into one table; every damaged shard is reported, not only the first."""
    shards: list[Shard] = []
    entries: dict[str, Entry] = {}
    errors: list[CkavgError] = []
    for number, file in enumerate(files):
        try:
            header = read_header(file, shard=number)
        except CkavgError as error:
            errors.append(error)
            continue
        shards.append(Shard(file, header.nbytes))
        for name in header.entries.keys() & entries.keys():
            errors.append(CorruptFileError(f"{path}: tensor {name!r} is in more than one file.", hint=_REWRITE))
        entries.update(header.entries)
    raise_all(errors)
    if not entries:
        raise CorruptFileError(f"{path} holds no tensors.", hint=_REWRITE)
    ignored = (
        () if kind == "file" else {file.name for file in path.glob("*.safetensors")} - {file.name for file in files}
    )
    return Checkpoint(step, path, kind, tuple(shards), index, entries, tuple(sorted(ignored)))


def _missing_of_count(path: Path, files: list[Path]) -> list[CkavgError]:
    """Shards named `…-00002-of-00003` state how many there should be."""
    present = {file.name for file in files}
    missing: set[str] = set()
    for file in files:
        match = _SHARD_OF.fullmatch(file.name)
        if match and int(match[2]) <= 100_000:
            start = file.name[: match.start(1)]
            rest = file.name[match.end(1) :]
            width = len(match[1])
            first = 0 if f"{start}{0:0{width}d}{rest}" in present else 1
            expected = (f"{start}{number:0{width}d}{rest}" for number in range(first, first + int(match[2])))
            missing.update(name for name in expected if name not in present)
    return [
        MissingShardError(
            f"{path / name} does not exist.",
            hint="It is still being written, or was not copied: wait, or copy it again.",
        )
        for name in sorted(missing)
    ]


def _no_weights(path: Path) -> CkavgError:
    try:
        below = sorted(str(child.relative_to(path)) for child in path.rglob("*") if child.is_file())
    except OSError as error:
        return ReadError(f"{path} cannot be listed: {error.strerror}.", hint="Check that you may read it.")
    foreign = foreign_weights([Path(name).name for name in below])
    if foreign:
        return UnsupportedFormatError(f"{path} holds {foreign}, not safetensors.", hint=conversion(foreign, str(path)))
    inner = next((name for name in below if name.endswith(".safetensors")), None)
    if inner:
        return UnsupportedFormatError(
            f"{path} holds its weights in folders ({inner}), which are not looked into.",
            hint="Pipelines of several models are not read. Put one model's checkpoints into a directory of their own.",
        )
    return MissingShardError(
        f"{path} holds no weights.",
        hint="It is still being written, perhaps. Otherwise leave it out with --from-step, --to-step or --last.",
    )
