"""Stage *discover*: one checkpoint, from its directory or file to its tensor table. Reads headers and indexes."""

from __future__ import annotations

import dataclasses
import itertools
import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path

from ckavg.checkpoints.distributed import SLICES, find_distributed, join_slices, read_distributed, read_slices
from ckavg.checkpoints.headers import SHARDED, Header, KnownHeaders, read_header
from ckavg.checkpoints.layouts import WEIGHTS, as_safetensors
from ckavg.checkpoints.pickles import UnreadPickleError, is_saved_by_torch, read_pickle
from ckavg.checkpoints.run import Checkpoint, Kind, Shard, TensorInfo
from ckavg.checkpoints.unsupported import (
    holds_pickles_alone,
    holds_unsupported,
    is_pickled,
    refused,
    refused_pickle,
)
from ckavg.checkpoints.weight_files import LeftOut, Weights, beside, by_family, find_weights
from ckavg.errors import (
    CkavgError,
    CombinedError,
    CorruptFileError,
    MissingShardError,
    ReadError,
    TruncatedShardError,
    listed,
    raise_all,
)
from ckavg.storage.base import AnyPath, RemotePath
from ckavg.storage.local import Bounds, problem_with, read_object, size_of, storage_of

WHOLE = "model.safetensors"
"""The name of a result's single weight file if its checkpoints are in pieces."""

RESULT_RECORD = "ckavg.json"
"""A directory with this file is a result, never a checkpoint."""

MOST_SHARDS = 10_000
MOST_TENSORS = 1_000_000
"""Limits for one checkpoint. The largest published models have a few hundred files and about 100,000 tensors."""

_MOST_INDEX_BYTES = 1 << 28
_SHARD_OF = re.compile(r".*-(\d+)-of-(\d+)\.safetensors", re.ASCII)
_REWRITE = "Save the checkpoint again, or leave it out with --skip-step."
_WAIT = (
    "It is still being written, or was not copied: wait, or copy it again. --skip-incomplete leaves the checkpoint out."
)


def read_checkpoint(
    path: AnyPath,
    step: int,
    *,
    within: AnyPath | None = None,
    prefix: str | None = None,
    known: KnownHeaders | None = None,
) -> Checkpoint:
    """Read the headers of one checkpoint, a directory or a single weight file.

    Args:
        path, step: of the checkpoint.
        within: the directory that links must not leave; None: `path`.
        prefix: see `Selection`.
        known: headers of other checkpoints of the run; see `read_header`.

    Raises:
        MissingShardError: a shard is missing, or the directory holds no weights.
        TruncatedShardError: a shard is shorter than its header says.
        CorruptFileError: a file is damaged or not a plain file, or the index and the shards disagree.
        UnsupportedFormatError: the weights are in another format.
        ReadError: it cannot be read, or a link leads out of the named directory.
        CombinedError: more than one of these.
    """
    bounds = Bounds.of(path, within or path)
    if path.suffix == WEIGHTS or not path.is_dir():
        return _read_file(path, step, known)
    try:
        found, left_out = find_weights(path, own_folders(path))
    except OSError as error:
        raise ReadError(
            f"{error.filename or path} cannot be listed: {error.strerror}.", hint="Check that you may read it."
        ) from error
    if not found:
        return _read_distributed(path, step, prefix, bounds, left_out)
    groups: list[_Group] = []
    errors: list[CkavgError] = []
    for weights in found:
        try:
            of_folder, of_others = _groups(weights, path, bounds)
        except CkavgError as error:
            errors += error.errors if isinstance(error, CombinedError) else (error,)
            continue
        groups += of_folder
        left_out += of_others
    raise_all(errors)
    kind: Kind = next((weights.kind for weights in found if weights.folder == path), "pipeline")
    return _assemble(path, step, kind, groups, left_out, known)


def _read_distributed(
    path: AnyPath, step: int, prefix: str | None, bounds: Bounds, left_out: list[LeftOut]
) -> Checkpoint:
    """Read a torch.distributed.checkpoint in a directory without safetensors."""
    try:
        folder, others = find_distributed(path)
    except OSError as error:
        raise ReadError(f"{path} cannot be listed: {error.strerror}.", hint="Check that you may read it.") from error
    if folder is None:
        raise _no_weights(path, left_out)
    found = read_distributed(folder, path, prefix=prefix, bounds=bounds)
    left_out = [each for each in left_out if not each[1].endswith(SLICES)] + others + list(found.left_out)
    return Checkpoint(step, path, "model", found.shards, (), found.entries, tuple(sorted(left_out)), saved_as=WHOLE)


def _read_file(path: AnyPath, step: int, known: KnownHeaders | None) -> Checkpoint:
    found = problem_with(path, Bounds((Path("/"),)))  # a file that the user named may be a link to anywhere
    raise_all([] if found is None else [found])
    if path.suffix != WEIGHTS and not is_pickled(path.name) and path.is_file() and holds_unsupported(path):
        raise _no_weights(path, [])
    if isinstance(path, Path) and path.is_symlink() and not path.exists():
        raise MissingShardError(
            f"{path} is a link to {path.readlink()}, which does not exist.",
            hint="Restore its target, or remove the link. --skip-incomplete leaves the checkpoint out.",
        )
    return _assemble(path, step, "file", [_Group("", path.parent, (path,))], [], known)


def own_folders(path: AnyPath) -> frozenset[str]:
    """The folders that a diffusers pipeline lists as its components."""
    with suppress(OSError, ValueError):
        return frozenset({"scheduler", *read_object(path / "model_index.json", _MOST_INDEX_BYTES)})
    return frozenset()


@dataclasses.dataclass(frozen=True, slots=True)
class _Group:
    """Weight files that are loaded together: the prefix of their tensors, and the file of each tensor by the index."""

    part: str
    folder: AnyPath
    files: tuple[AnyPath, ...]
    index: str = ""
    placed: Mapping[str, str] | None = None


def _groups(weights: Weights, path: AnyPath, bounds: Bounds) -> tuple[list[_Group], list[LeftOut]]:
    """The weights of a folder, and other weight files beside them."""
    folder = weights.folder
    placed, files = None, dict(weights.pickled)
    if weights.index:
        stated = _weight_map(folder / _index_of(weights), bounds)
        files |= {as_safetensors(file): file for file in stated.values()}
        placed = {name: as_safetensors(file) for name, file in stated.items()}
    names = weights.files if placed is None else tuple(sorted(set(placed.values())))
    if len(names) > MOST_SHARDS:
        raise CorruptFileError(f"{folder} consists of {len(names):,} files, more than {MOST_SHARDS:,}.", hint=_REWRITE)
    raise_all(_missing_of_count(folder, names) if placed is None else _missing(folder, names, weights.others, files))
    part = "" if folder == path else f"{folder.relative_to(path).as_posix()}/"
    paths = {name: folder / files.get(name, name) for name in {*names, *weights.others}}
    groups = [_Group(part, folder, tuple(paths[name] for name in names), _index_of(weights), placed)]
    others, left_out = beside(weights, names)
    for name, of_part in others.items():
        raise_all(_missing_of_count(folder, of_part))
        own = [paths[each] for each in of_part]
        may_open = all(problem_with(each, bounds) is None for each in own)
        if weights.pickled and may_open and not all(map(is_saved_by_torch, own)):
            left_out += [("pickle", each) for each in of_part]
            continue
        groups.append(_Group(f"{part}{name}/", folder, tuple(own)))
    of_groups = [file for group in groups for file in group.files]
    raise_all([found for file in of_groups if (found := problem_with(file, bounds)) is not None])
    return groups, [(why, part + files.get(name, name)) for why, name in left_out]


def _index_of(weights: Weights) -> str:
    """The name of the index of some weights; empty if there is none."""
    if not weights.pickled or not weights.index:
        return weights.index
    names = storage_of(weights.folder).list(weights.folder).files
    return next(name for name in sorted(names) if as_safetensors(name) == weights.index)


def _weight_map(index: AnyPath, bounds: Bounds) -> Mapping[str, str]:
    found = problem_with(index, bounds)
    raise_all([] if found is None else [found])
    try:
        if size_of(index) == 0:
            raise TruncatedShardError(f"{index} is empty.", hint=_WAIT)
        weight_map = read_object(index, _MOST_INDEX_BYTES)["weight_map"]
        placed = dict(zip(weight_map, map(str, weight_map.values()), strict=True))
    except OSError as error:
        raise ReadError(f"{index} cannot be read: {error.strerror}.", hint="Check that you may read it.") from error
    except ValueError as error:
        raise CorruptFileError(f"{index} is not a shard index: {error}.", hint=_REWRITE) from error
    except (KeyError, TypeError, AttributeError) as error:
        raise CorruptFileError(f"{index} is not a shard index: it has no weight_map.", hint=_REWRITE) from error
    for file in set(placed.values()):
        is_weights = file.endswith(WEIGHTS) if WEIGHTS in index.name else is_pickled(file)
        if Path(file).name != file or not is_weights or "\0" in file:
            kind = "safetensors files" if WEIGHTS in index.name else "pickles"
            raise CorruptFileError(f"{index} names {file!r}: shards must be {kind} beside their index.", hint=_REWRITE)
    if not placed:
        raise CorruptFileError(f"{index} lists no tensors.", hint=_REWRITE)
    return placed


def _assemble(
    path: AnyPath,
    step: int,
    kind: Kind,
    groups: Sequence[_Group],
    left_out: Sequence[LeftOut],
    known: KnownHeaders | None,
) -> Checkpoint:
    """Merge the headers of all files into one table; every damaged file is reported."""
    shards: list[Shard] = []
    tables: list[Mapping[str, TensorInfo]] = []
    errors: list[CkavgError] = []
    left_out = list(left_out)
    sliced: list[tuple[_Group, dict[AnyPath, Header]]] = []
    for group in groups:
        try:
            headers, of_pickles = _headers(path, group, first=len(shards), known=known)
            left_out += of_pickles
        except CkavgError as error:
            errors += error.errors if isinstance(error, CombinedError) else (error,)
            continue
        if any(SHARDED in header.metadata for header in headers.values()):
            if any(each.folder in (group.folder / "consolidated", group.folder.parent) for each in groups):
                left_out += [
                    ("copy", file.relative_to(path).as_posix()) for file in group.files
                ]  # a joined copy of the pieces
            else:
                sliced.append((group, headers))
            continue
        total = sum(len(header.entries) for header in headers.values())
        if kind != "file" and 2 * sum(header.moments for header in headers.values()) >= total > 0:
            left_out += [("training state", file.relative_to(path).as_posix()) for file in group.files]
            continue
        parts = _parts(group, headers)
        for file, header in headers.items():
            part = parts[file]
            own = header.entries
            tables.append({part + name: entry for name, entry in own.items()} if part else own)
            identity = file.storage.identity(file) if isinstance(file, RemotePath) else None
            shards.append(Shard(file, header.info.nbytes, header.info.state, identity, part, header.metadata))
        if sum(map(len, tables)) > MOST_TENSORS:
            raise CorruptFileError(f"{path} holds more than {MOST_TENSORS:,} tensors.", hint=_REWRITE)
    raise_all(errors)
    if sliced:
        left_out += [("second model", shard.path.relative_to(path).as_posix()) for shard in shards]
        return _join_sliced(path, step, sliced, left_out)
    if not shards:
        raise _no_weights(path, left_out)
    entries = tables[0] if len(tables) == 1 else dict(itertools.chain.from_iterable(each.items() for each in tables))
    if not entries:
        raise CorruptFileError(f"{path} holds no tensors.", hint=_REWRITE)
    indexes = tuple(group.folder / group.index for group in groups if group.index)
    return Checkpoint(step, path, kind, tuple(shards), indexes, entries, tuple(sorted(left_out)))


def _join_sliced(
    path: AnyPath, step: int, sliced: Sequence[tuple[_Group, Mapping[AnyPath, Header]]], left_out: Sequence[LeftOut]
) -> Checkpoint:
    """A checkpoint whose slices torch.distributed.checkpoint wrote as safetensors."""
    files = [(file, header) for _, headers in sliced for file, header in headers.items()]
    shards: list[Shard] = []
    found: list[tuple[str, TensorInfo, tuple[int, ...]]] = []
    for number, (file, header) in enumerate(files):
        identity = file.storage.identity(file) if isinstance(file, RemotePath) else None
        shards.append(Shard(file, header.info.nbytes, header.info.state, identity))
        try:
            starts = read_slices(header.metadata.get(SHARDED, "{}"))
        except ValueError as error:
            raise CorruptFileError(f"{file} does not state where its slices begin: {error}.", hint=_REWRITE) from error
        for name, entry in header.entries.items():
            start = starts.get(name, (0,) * len(entry.shape))
            found.append((name, dataclasses.replace(entry, shard=number), start))
    try:
        entries = join_slices(found)
    except ValueError as error:
        raise CorruptFileError(f"{path}: {error}.", hint=_REWRITE) from error
    return Checkpoint(step, path, "model", tuple(shards), (), entries, tuple(sorted(left_out)), saved_as=WHOLE)


def _headers(
    path: AnyPath, group: _Group, *, first: int, known: KnownHeaders | None
) -> tuple[dict[AnyPath, Header], list[LeftOut]]:
    """The headers of the files, and what is left out of them, including pickles without tensors."""
    headers: dict[AnyPath, Header] = {}
    left_out: list[LeftOut] = []
    errors: list[CkavgError] = []
    for file in group.files:
        try:
            shard = first + len(headers)
            is_pickle = is_pickled(file.name)
            header = read_pickle(file, shard=shard) if is_pickle else read_header(file, shard=shard, known=known)
            left_out += header.left_out
            if header.entries or group.placed is not None or not is_pickle:
                headers[file] = header
            elif not header.left_out:
                left_out.append(("pickle", file.name if file == path else file.relative_to(path).as_posix()))
        except UnreadPickleError as error:
            errors.append(refused_pickle(path, file, error.why, can_convert=error.can_convert))
        except CkavgError as error:
            errors.append(error)
    if not errors and group.placed is not None:
        found = {name: as_safetensors(file.name) for file, header in headers.items() for name in header.entries}
        wrong = [name for name in {**group.placed, **found} if group.placed.get(name) != found.get(name)]
        if wrong:
            index = group.folder / group.index
            what = f"{index} and its shards disagree about {len(wrong)} tensors, such as {wrong[0]!r}."
            errors.append(CorruptFileError(what, hint=_REWRITE))
    raise_all(errors)
    return headers, left_out


def _parts(group: _Group, headers: Mapping[AnyPath, Header]) -> dict[AnyPath, str]:
    """The prefix for the tensors of each file. Separate models in one folder may have the same tensor names:
    `actor.safetensors` beside `critic.safetensors`.

    Raises:
        CorruptFileError: files that are loaded together hold the same tensors.
    """
    seen: dict[str, AnyPath] = {}
    twice: dict[str, tuple[AnyPath, AnyPath]] = {}
    for file, header in headers.items():
        twice |= {name: (seen[name], file) for name in header.entries.keys() & seen.keys()}
        seen |= dict.fromkeys(header.entries, file)
    if not twice:
        return dict.fromkeys(headers, group.part)
    files = {as_safetensors(file.name): file for file in headers}
    families = {
        files[name]: f"{group.part}{stem}{WEIGHTS}/" for stem, names in by_family(files).items() for name in names
    }
    for name, (first, second) in twice.items():
        if group.placed is not None or families[first] == families[second]:
            raise CorruptFileError(
                f"{group.folder}: tensor {name!r} is in more than one file, {first.name} and {second.name}, and so are "
                f"{len(twice) - 1} others.",
                hint=_REWRITE,
            )
    return families


def _missing(
    path: AnyPath, names: Sequence[str], present: frozenset[str], files: Mapping[str, str]
) -> list[CkavgError]:
    """The error for missing files; `files` gives the names of those that are not safetensors."""
    absent = [name for name in names if name not in present]
    if not absent:
        return []
    more = f", and neither do {len(absent) - 1} more of its {len(names)} shards" if len(absent) > 1 else ""
    return [MissingShardError(f"{path / files.get(absent[0], absent[0])} does not exist{more}.", hint=_WAIT)]


def _missing_of_count(path: AnyPath, files: Sequence[str]) -> list[CkavgError]:
    """The error for missing shards: names such as `…-00002-of-00003` state how many there are."""
    present = frozenset(files)
    errors: list[CkavgError] = []
    counted = [match for file in sorted(files) if (match := _SHARD_OF.fullmatch(file))]
    for match in {(each.string[: each.start(1)], each.string[each.end(1) :]): each for each in counted}.values():
        start, rest, width = match.string[: match.start(1)], match.string[match.end(1) :], len(match[1])
        if len(match[2]) <= len(str(MOST_SHARDS)) and int(match[2]) <= MOST_SHARDS:
            first = 0 if f"{start}{0:0{width}d}{rest}" in present else 1
            expected = [f"{start}{number:0{width}d}{rest}" for number in range(first, first + int(match[2]))]
            errors += _missing(path, expected, present, {})
    return errors


def _no_weights(path: AnyPath, left_out: Sequence[LeftOut]) -> CkavgError:
    others = [f"{name} ({why})" for why, name in left_out if why not in ("pickle", "other format")]
    if others:
        return MissingShardError(
            f"{path} holds no weights of a model, only {listed(others)}.",
            hint="Leave the checkpoint out with --skip-incomplete or --skip-step.",
        )
    try:
        foreign = refused([path])
    except OSError as error:
        return ReadError(f"{path} cannot be listed: {error.strerror}.", hint="Check that you may read it.")
    if any(why == "pickle" for why, _ in left_out) and holds_pickles_alone(path):
        of_files = "" if left_out[0][1] == path.name else f" in {listed([name for _, name in left_out])}"
        return CorruptFileError(f"{path} holds no state dict{of_files}, tensors by name.", hint=_REWRITE)
    return foreign or MissingShardError(
        f"{path} holds no weights.",
        hint="It may still be being written; leave it out with --skip-incomplete or --skip-step.",
    )
