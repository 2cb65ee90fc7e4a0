"""Stage *discover*: one checkpoint, from its directory or file to its tensor table. Reads headers and indexes."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from ckavg.errors import (
    CkavgError,
    CombinedError,
    CorruptFileError,
    MissingShardError,
    ReadError,
    TruncatedShardError,
    raise_all,
)
from ckavg.run.contents import Contents, choose, components, list_folder, weights_below
from ckavg.run.files import Bounds, problem_with, read_object
from ckavg.run.foreign import holds_foreign, refused
from ckavg.run.header import read_header
from ckavg.run.values import Checkpoint, Entry, Shard

RESULT_RECORD = "ckavg.json"
"""A directory with this file in it is a result, never a checkpoint."""

MOST_SHARDS = 10_000
MOST_TENSORS = 1_000_000
"""Of one checkpoint. The largest models that are published have a few hundred files and some 100,000 tensors."""

_MOST_INDEX_BYTES = 1 << 28
_SHARD_OF = re.compile(r".*-(\d+)-of-(\d+)\.safetensors", re.ASCII)
_REWRITE = "Save the checkpoint again, or leave it out with --from-step, --to-step or --last."
_WAIT = (
    "It is still being written, or was not copied: wait, or copy it again. --skip-incomplete leaves the checkpoint out."
)


def read_checkpoint(path: Path, step: int, *, within: Path | None = None) -> Checkpoint:
    """Read the headers of one checkpoint.

    Args:
        path: a checkpoint directory, or a single safetensors file.
        step: the optimizer step at which it was saved.
        within: the directory that the user named, in which links may lead; None: the checkpoint itself.

    Raises:
        MissingShardError: a shard is not there, or the directory holds no weights.
        TruncatedShardError: a shard is shorter than its header says.
        CorruptFileError: a file is damaged or no plain file, or the index and the shards disagree.
        UnsupportedFormatError: the weights are in another format.
        ReadError: the system would not let us read it, or a link leads out of what was named.
        CombinedError: more than one of these.
    """
    bounds = Bounds.of(path, within or path)
    if path.suffix == ".safetensors" or not path.is_dir():
        found = problem_with(path, Bounds((*bounds.roots, Path("/"))))  # named by itself, a link may lead anywhere
        raise_all([] if found is None else [found])
        if path.suffix != ".safetensors" and path.is_file() and holds_foreign(path):
            raise _no_weights(path)
        return _assemble(path, step, [_Part("", "", (path,), None)])
    try:
        listing = list_folder(path)
        contents = choose(path, listing.files)
        if contents is not None:
            aside = weights_below(path, listing.folders)
            checkpoint = _assemble(path, step, [_part(contents, "", bounds)])
            used = {shard.path.name for shard in checkpoint.shards}
            ignored = (*sorted(contents.others - used), *aside)
            return dataclasses.replace(checkpoint, kind=contents.kind, ignored=ignored)
        parts, averaged = components(path, listing.folders)
    except OSError as error:
        raise ReadError(
            f"{error.filename or path} cannot be listed: {error.strerror}.", hint="Check that you may read it."
        ) from error
    if not parts:
        raise _no_weights(path)
    checkpoint = _assemble(path, step, _parts(path, parts, bounds))
    return dataclasses.replace(checkpoint, kind="pipeline", ignored=tuple(f"{name}/" for name in averaged))


@dataclasses.dataclass(frozen=True, slots=True)
class _Part:
    """The weight files of one folder: how its tensors' names begin, and in which file the index puts each."""

    prefix: str
    index: str
    files: tuple[Path, ...]
    placed: Mapping[str, str] | None


def _parts(path: Path, contents: Sequence[Contents], bounds: Bounds) -> list[_Part]:
    parts: list[_Part] = []
    errors: list[CkavgError] = []
    for each in contents:
        try:
            parts.append(_part(each, f"{each.folder.relative_to(path).as_posix()}/", bounds))
        except CkavgError as error:
            errors += error.errors if isinstance(error, CombinedError) else (error,)
    raise_all(errors)
    return parts


def _part(contents: Contents, prefix: str, bounds: Bounds) -> _Part:
    folder = contents.folder
    placed = _weight_map(folder / contents.index, bounds) if contents.index else None
    names = contents.files if placed is None else sorted(set(placed.values()))
    if len(names) > MOST_SHARDS:
        raise CorruptFileError(f"{folder} consists of {len(names):,} files, more than {MOST_SHARDS:,}.", hint=_REWRITE)
    files = tuple(folder / name for name in names)
    raise_all(_missing_of_count(folder, names) if placed is None else _missing(folder, names, contents.others))
    raise_all([found for file in files if (found := problem_with(file, bounds)) is not None])
    return _Part(prefix, contents.index, files, placed)


def _weight_map(index: Path, bounds: Bounds) -> Mapping[str, str]:
    found = problem_with(index, bounds)
    raise_all([] if found is None else [found])
    try:
        if index.stat().st_size == 0:
            raise TruncatedShardError(f"{index} is empty.", hint=_WAIT)
        weight_map = read_object(index, _MOST_INDEX_BYTES)["weight_map"]
        placed = {str(name): str(file) for name, file in weight_map.items()}
    except OSError as error:
        raise ReadError(f"{index} cannot be read: {error.strerror}.", hint="Check that you may read it.") from error
    except ValueError as error:
        raise CorruptFileError(f"{index} is not a shard index: {error}.", hint=_REWRITE) from error
    except (KeyError, TypeError, AttributeError) as error:
        raise CorruptFileError(f"{index} is not a shard index: it has no weight_map.", hint=_REWRITE) from error
    for file in set(placed.values()):
        if Path(file).name != file or not file.endswith(".safetensors") or "\0" in file:
            raise CorruptFileError(
                f"{index} names {file!r}: shards must be safetensors files beside their index.", hint=_REWRITE
            )
    if not placed:
        raise CorruptFileError(f"{index} lists no tensors.", hint=_REWRITE)
    return placed


def _assemble(path: Path, step: int, parts: Sequence[_Part]) -> Checkpoint:
    """Merge the headers of all shards into one table; every damaged shard is reported, not only the first."""
    shards: list[Shard] = []
    entries: dict[str, Entry] = {}
    errors: list[CkavgError] = []
    for part in parts:
        placed: dict[str, str] = {}
        sound = len(errors)
        for file in part.files:
            try:
                header = read_header(file, shard=len(shards))
            except CkavgError as error:
                errors.append(error)
                continue
            shards.append(Shard(file, header.nbytes, header.state))
            for name in header.entries.keys() & placed.keys():
                errors.append(
                    CorruptFileError(f"{file.parent}: tensor {name!r} is in more than one file.", hint=_REWRITE)
                )
            placed.update(dict.fromkeys(header.entries, file.name))
            entries.update((part.prefix + name, entry) for name, entry in header.entries.items())
            if len(entries) > MOST_TENSORS:
                raise CorruptFileError(f"{path} holds more than {MOST_TENSORS:,} tensors.", hint=_REWRITE)
        if len(errors) == sound and part.placed is not None:
            errors += _disagreement(path / part.prefix / part.index, part.placed, placed)
    raise_all(errors)
    if not entries:
        raise CorruptFileError(f"{path} holds no tensors.", hint=_REWRITE)
    indexes = tuple(path / part.prefix / part.index for part in parts if part.index)
    return Checkpoint(step, path, "file", tuple(shards), indexes, entries)


def _disagreement(index: Path, stated: Mapping[str, str], found: Mapping[str, str]) -> list[CkavgError]:
    wrong = [name for name in {**stated, **found} if stated.get(name) != found.get(name)]
    if not wrong:
        return []
    return [
        CorruptFileError(
            f"{index} and its shards disagree about {len(wrong)} tensors, such as {wrong[0]!r}.", hint=_REWRITE
        )
    ]


def _missing(path: Path, names: Sequence[str], present: frozenset[str]) -> list[CkavgError]:
    absent = [name for name in names if name not in present]
    if not absent:
        return []
    more = f", and neither do {len(absent) - 1} more of its {len(names)} shards" if len(absent) > 1 else ""
    return [MissingShardError(f"{path / absent[0]} does not exist{more}.", hint=_WAIT)]


def _missing_of_count(path: Path, files: Sequence[str]) -> list[CkavgError]:
    """Shards named `…-00002-of-00003` state how many there should be."""
    present = frozenset(files)
    errors: list[CkavgError] = []
    seen: set[tuple[str, str]] = set()
    for file in files:
        match = _SHARD_OF.fullmatch(file)
        if match is None:
            continue
        start, rest, width = file[: match.start(1)], file[match.end(1) :], len(match[1])
        if (start, rest) in seen or len(match[2]) > len(str(MOST_SHARDS)) or int(match[2]) > MOST_SHARDS:
            continue
        seen.add((start, rest))
        first = 0 if f"{start}{0:0{width}d}{rest}" in present else 1
        expected = [f"{start}{number:0{width}d}{rest}" for number in range(first, first + int(match[2]))]
        errors += _missing(path, expected, present)
    return errors


def _no_weights(path: Path) -> CkavgError:
    try:
        foreign = refused([path])
    except OSError as error:
        return ReadError(f"{path} cannot be listed: {error.strerror}.", hint="Check that you may read it.")
    return foreign or MissingShardError(
        f"{path} holds no weights.",
        hint="It is still being written, perhaps; --skip-incomplete leaves it out. So do --from-step, --to-step and "
        "--last.",
    )
