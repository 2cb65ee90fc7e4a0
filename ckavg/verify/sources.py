"""Stage *verify*, fourth: where the checkpoints are now, and whether they are what was averaged.

A record says where they were. A run that was moved is looked for beside the result, where it was before, and where the
user says that it is.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from ckavg.errors import CkavgError, CorruptFileError
from ckavg.result.record import Input
from ckavg.run.checkpoint import read_checkpoint
from ckavg.run.values import Checkpoint, Entry, Remote
from ckavg.verify.elsewhere import Elsewhere, is_elsewhere, open_elsewhere
from ckavg.verify.findings import Finding
from ckavg.verify.record import Record


@dataclass(frozen=True, slots=True)
class Sources:
    """The checkpoints of a result.

    Attributes:
        checkpoints: by index; None for those that take no part, are not there, or are not what they were.
        findings: why they are not.
        elsewhere: those that are not on this machine; None where all are.
    """

    checkpoints: tuple[Checkpoint | None, ...]
    findings: tuple[Finding, ...]
    elsewhere: Elsewhere | None = None


def find_sources(
    record: Record,
    directory: Path,
    tensors: Mapping[str, Entry],
    *,
    first: int,
    source: Path | None,
    init: Path | None,
) -> Sources:
    """Find the checkpoints of a result and read their headers; sizes are compared before a file is opened.

    Args:
        record: of the result.
        directory: of the result.
        tensors: of the result, all of which every checkpoint must hold in the same shape.
        first: index of the first checkpoint that takes part.
        source: where the run is now; None: where it was.
        init: where the anchor given with `--init` is now.
    """
    copied = frozenset(record.copied)
    checkpoints: list[Checkpoint | None] = []
    remote = None
    if source is None and any(is_elsewhere(each) for each in record.inputs[first:]):
        remote = open_elsewhere(record.inputs, first=first)
    found: list[Finding] = [] if remote is None else list(remote.findings)
    for index, recorded in enumerate(record.inputs):
        checkpoint = None
        if index >= first and not (remote is not None and is_elsewhere(recorded) and not remote.checkpoints[index]):
            try:
                checkpoint = (remote and remote.checkpoints[index]) or _found(
                    record, index, _places(record, index, directory, source=source, init=init)
                )
                checkpoint = checkpoint.with_copied(copied)
                is_last = index == len(record.inputs) - 1
                _check_tensors(checkpoint, {name: tensors[name] for name in tensors if is_last or name not in copied})
            except CkavgError as error:
                found.append(Finding("sources", f"step {recorded.step}: {error.message}"))
                checkpoint = None
        checkpoints.append(checkpoint)
    return Sources(tuple(checkpoints), tuple(found), remote)


def check_checksums(
    record: Record,
    checkpoints: Sequence[Checkpoint | None],
    names: Sequence[str],
    on_progress: Callable[[int, int], None],
    remote: Remote | None = None,
) -> tuple[list[Finding], int]:
    """Read the averaged tensors of all checkpoints and compare their checksums with the record.

    Args:
        record: of the result.
        checkpoints: by index; None for those that are not there.
        names: the averaged tensors.
        on_progress: called with the bytes done and the bytes to do.
        remote: where those are that are not on this machine.

    Returns:
        What was found, and how many bytes were read.

    Raises:
        TruncatedShardError, ReadError: a file became shorter meanwhile, or cannot be read.
    """
    from ckavg.engine.blocks import TILE, Block, cut_blocks
    from ckavg.engine.checksums import checksums
    from ckavg.engine.stream import Settings, stream
    from ckavg.engine.tiles import TileReader

    unread = [str(each.step) for each in record.inputs if each.checksum is None]
    found = [_unread(unread)] if unread else []
    here = [
        (each, recorded)
        for each, recorded in zip(checkpoints, record.inputs, strict=True)
        if each is not None and recorded.checksum is not None
    ]
    read = [checkpoint for checkpoint, _ in here]
    if not read or not names:
        return found, 0
    blocks = cut_blocks({name: read[-1].entries[name] for name in names})

    def make_worker(reader: TileReader) -> Callable[[Block], tuple[str, ...]]:
        def digests(block: Block) -> tuple[str, ...]:
            sums = reader.sum_up(block)
            for start, stop in block.tiles(TILE):
                for index, checkpoint in enumerate(read):
                    item = checkpoint.entries[block.name].item_bytes
                    reader.raw(index, block.name, start * item, stop * item)
            return sums.digests()

        return digests

    settings = Settings(on_progress=lambda news: on_progress(news.done, news.total), remote=remote)
    streamed = stream("sources", read, blocks, make_worker, settings)
    for (checkpoint, recorded), checksum in zip(here, checksums(read, blocks, streamed.results), strict=True):
        if checksum != recorded.checksum:
            place = checkpoint.path if remote is None else remote.named(checkpoint.path)
            told = f"step {recorded.step}: the weights in {place} are not those that were averaged"
            found.append(Finding("sources", f"{told}: their checksum is {checksum[:12]}…, it was {recorded.checksum}."))
    return found, streamed.bytes_read


def _unread(steps: Sequence[str]) -> Finding:
    told = "took no part in the average" if len(steps) == 1 else "took no part in the average, and have no checksums"
    return Finding("sources", f"Not read, then and now: step {', '.join(steps)} {told}.", is_problem=False)


Place = Mapping[str, Path]
"""Where the weight files of a checkpoint may be, by their names in the record."""


def _places(record: Record, index: int, directory: Path, *, source: Path | None, init: Path | None) -> list[Place]:
    """Where a checkpoint may be, the likeliest first; one place alone where the user has named it."""
    recorded, output = record.inputs[index], record.output.directory
    was = Path(recorded.directory)
    if index == 0 and record.anchor_is_init and init is not None:
        if init.is_file() and len(recorded.files) == 1:
            return [dict.fromkeys(recorded.files, init)]
        return [_inside(init, recorded)]
    if not (index == 0 and record.anchor_is_init) and source is not None:
        return [_inside(source / _below(was, Path(record.source)), recorded)]
    places = [was]
    if was.is_absolute() == output.is_absolute():
        beside = directory / os.path.relpath(was, output)
        places = [was, beside] if was.is_absolute() else [beside, was]
    return [_inside(place, recorded) for place in places]


def _inside(directory: Path, recorded: Input) -> Place:
    return {name: directory / name for name in recorded.files}


def _below(directory: Path, source: Path) -> Path:
    try:
        return directory.relative_to(source)
    except ValueError:
        return Path(directory.name)


def _found(record: Record, index: int, places: Sequence[Place]) -> Checkpoint:
    """The checkpoint at the first place where its files have the sizes they had.

    Raises:
        CkavgError: there is none; of the likeliest place, what is wrong there.
    """
    recorded = record.inputs[index]
    beside = sum(each.directory == recorded.directory for each in record.inputs)
    errors: list[CkavgError] = []
    for place in places:
        wrong = _wrong_size(place, recorded)
        if wrong is None:
            path, *more = place.values()
            return read_checkpoint(path, recorded.step) if beside > 1 and not more else _opened(place, recorded.step)
        errors.append(wrong)
    raise errors[0]


def _wrong_size(place: Place, recorded: Input) -> CkavgError | None:
    for name, path in place.items():
        try:
            status = path.stat()
        except (OSError, ValueError):
            return CorruptFileError(f"{path} is not there; it was averaged.")
        if not stat.S_ISREG(status.st_mode):
            return CorruptFileError(f"{path} is not a plain file.")
        if status.st_size != recorded.files[name]:
            return CorruptFileError(
                f"{path} is {status.st_size:,} bytes long; it was {recorded.files[name]:,} when it was averaged."
            )
    return None


def _opened(place: Place, step: int) -> Checkpoint:
    """The checkpoint that these files are: all or some parts of their directory, or a single file among others."""
    (name, path), *more = place.items()
    directory, files = Path(str(path).removesuffix(name)), set(place.values())
    try:
        whole = read_checkpoint(directory, step)
        checkpoint = whole.with_parts({shard.part for shard in whole.shards if shard.path in files})
        if {shard.path for shard in checkpoint.shards} == files:
            return checkpoint
    except CkavgError:
        if more:
            raise
    if more:
        raise CorruptFileError(f"{directory} holds other weights than those that were averaged.")
    return read_checkpoint(path, step)


def _check_tensors(checkpoint: Checkpoint, tensors: Mapping[str, Entry]) -> None:
    for name, entry in tensors.items():
        there = checkpoint.entries.get(name)
        if there is None or there.shape != entry.shape or there.is_floating != entry.is_floating:
            told = "is missing" if there is None else f"is {there.dtype} {there.shape}, not {entry.dtype} {entry.shape}"
            raise CorruptFileError(f"{checkpoint.path}: tensor {name!r} {told}, as the result would have it.")
