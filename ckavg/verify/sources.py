"""Stage *verify*, fourth: where the checkpoints are now, and whether they are what was averaged.

A record says where they were. A run that was moved is looked for beside the result, where it was before, and where the
user says that it is.
"""

from __future__ import annotations

import os
import stat
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from ckavg.checkpoints.checkpoint import read_checkpoint
from ckavg.checkpoints.run import Checkpoint, TensorInfo
from ckavg.errors import CkavgError, CorruptFileError, ReadError
from ckavg.output.published import Local, read_local
from ckavg.output.record import BASE_MODEL, Input, Record
from ckavg.storage.untrusted import open_regular
from ckavg.verify.elsewhere import is_elsewhere, open_elsewhere
from ckavg.verify.findings import Finding

_ACTING = ("/net/", "/sys/", "/proc/")
"""To look below `/net` is to mount what another machine offers; files of the kernel act when they are read."""

_LENGTH = 8
"""Bytes that state the length of a header."""


@dataclass(frozen=True, slots=True)
class Sources:
    """The checkpoints of a result.

    Attributes:
        checkpoints: by index; None for those that take no part, are not there, or are not what they were.
        findings: why they are not.
    """

    checkpoints: tuple[Checkpoint | None, ...]
    findings: tuple[Finding, ...]


def find_sources(
    record: Record,
    directory: Path,
    tensors: Mapping[str, TensorInfo],
    *,
    first: int,
    source: Path | None,
    init: Path | None,
    on_places: Callable[[Sequence[str]], None] = lambda places: None,
) -> Sources:
    """Find the checkpoints of a result and read their headers; sizes are compared before a file is opened.

    Args:
        record: of the result.
        directory: of the result.
        tensors: of the result, all of which every checkpoint must hold in the same shape.
        first: index of the first checkpoint that takes part.
        source: where the run is now; None: where it was.
        init: where the anchor given with `--init` is now.
        on_places: called with the directories in which they are read, before a file there is opened.
    """
    copied = frozenset(record.copied)
    checkpoints: list[Checkpoint | None] = []
    remote: list[Checkpoint | None] = []
    found: list[Finding] = []
    if source is None and any(is_elsewhere(each) for each in record.inputs[first:]):
        remote, found = open_elsewhere(record.inputs, first=first)
    places: dict[int, Place] = {}
    local = read_local(directory)
    for index, recorded in enumerate(record.inputs):
        if index >= first and (not remote or not is_elsewhere(recorded)):
            try:
                places[index] = _found(
                    recorded, _places(record, index, directory, local, source=source, init=init), source
                )
            except CkavgError as error:
                found.append(Finding("sources", f"step {recorded.step}: {error.message}"))
    above = Counter(str(_directory(place).parent) for place in places.values())
    on_places([f"{place} ({count} checkpoints)" for place, count in above.items()])
    for index, recorded in enumerate(record.inputs):
        checkpoint = remote[index] if remote else None
        try:
            if index in places:
                checkpoint = _opened(places[index], record, recorded)
            if checkpoint is not None:
                checkpoint = checkpoint.with_copied(copied)
                is_last = index == len(record.inputs) - 1
                _check_tensors(checkpoint, {name: tensors[name] for name in tensors if is_last or name not in copied})
        except CkavgError as error:
            found.append(Finding("sources", f"step {recorded.step}: {error.message}"))
            checkpoint = None
        checkpoints.append(checkpoint)
    return Sources(tuple(checkpoints), tuple(found))


def check_checksums(
    record: Record,
    checkpoints: Sequence[Checkpoint | None],
    names: Sequence[str],
    on_progress: Callable[[int, int], None],
) -> tuple[list[Finding], int]:
    """Read the averaged tensors of all checkpoints and compare their checksums with the record.

    Args:
        record: of the result.
        checkpoints: by index; None for those that are not there.
        names: the averaged tensors.
        on_progress: called with the bytes done and the bytes to do.

    Returns:
        What was found, and how many bytes were read.

    Raises:
        TruncatedShardError, ReadError: a file became shorter meanwhile, or cannot be read.
    """
    from ckavg.engine.blocks import TILE, Block, cut_blocks
    from ckavg.engine.checksums import checksums
    from ckavg.engine.context import Context
    from ckavg.engine.stream import stream
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

    context = Context(on_progress=lambda news: on_progress(news.done, news.total))
    streamed = stream("sources", read, blocks, make_worker, context)
    for (checkpoint, recorded), checksum in zip(here, checksums(read, blocks, streamed.results), strict=True):
        if checksum != recorded.checksum:
            told = f"step {recorded.step}: the weights in {checkpoint.path} are not those that were averaged"
            found.append(Finding("sources", f"{told}: their checksum is {checksum[:12]}…, it was {recorded.checksum}."))
    return found, streamed.bytes_read


def _unread(steps: Sequence[str]) -> Finding:
    told = "took no part in the average" if len(steps) == 1 else "took no part in the average, and have no checksums"
    return Finding("sources", f"Not read, then and now: step {', '.join(steps)} {told}.", is_problem=False)


Place = Mapping[str, Path]
"""Where the weight files of a checkpoint may be, by their names in the record."""


def _places(
    record: Record, index: int, directory: Path, local: Local, *, source: Path | None, init: Path | None
) -> list[Place]:
    """Where a checkpoint may be, the likeliest first; one place alone where the user has named it."""
    recorded, output = record.inputs[index], record.output.directory
    was, is_init = Path(recorded.directory), index == 0 and record.anchor_is_init
    if is_init and init is not None:
        if init.is_file() and len(recorded.files) == 1:
            return [dict.fromkeys(recorded.files, init)]
        return [_inside(init, recorded)]
    as_published = output == Path()
    if not is_init and source is not None:
        return [_inside(source / (was if as_published else _below(was, Path(record.source))), recorded)]
    if as_published:
        if was == Path(BASE_MODEL):
            places = [Path(local.init)] if local.init else []
        else:
            upwards = directory if os.pardir in was.parts else None  # as it was written before, in the result itself
            kept = Path(local.source) if local.source else None
            places = [root / was for root in (kept, directory / record.source, upwards) if root]
    else:  # a record that states paths of the machine where it was made
        places = [was]
        if was.is_absolute() == output.is_absolute():
            beside = directory / os.path.relpath(was, output)
            places = [was, beside] if was.is_absolute() else [beside, was]
    return [_inside(place, recorded) for place in places]


def _inside(directory: Path, recorded: Input) -> Place:
    return {name: directory / name for name in recorded.files}


def _directory(place: Place) -> Path:
    name, path = next(iter(place.items()))
    return Path(str(path).removesuffix(name))


def _below(directory: Path, source: Path) -> Path:
    try:
        return directory.relative_to(source)
    except ValueError:
        return Path(directory.name)


def _found(recorded: Input, places: Sequence[Place], source: Path | None) -> Place:
    """The first place where the files of a checkpoint have the sizes they had. Opens nothing.

    Raises:
        CkavgError: there is none; of the likeliest place, what is wrong there.
    """
    errors: list[CkavgError] = []
    for place in places:
        wrong = _not_followed(place) if source is None else None
        wrong = wrong or _wrong_size(place, recorded)
        if wrong is None:
            return place
        errors.append(wrong)
    if not errors:
        raise CorruptFileError("the record does not tell where it is; name it with --init or --source.")
    raise errors[0]


def _not_followed(place: Place) -> CkavgError | None:
    """Refuse what a record must not have us look at, since looking is an act: of other machines, or of the kernel."""
    directory = os.path.normpath(_directory(place).absolute())
    if directory.startswith(_ACTING):
        return CorruptFileError(f"{directory} is not looked at for a record. Name it with --source, if it is right.")
    return None


def _wrong_size(place: Place, recorded: Input) -> CkavgError | None:
    for name, path in place.items():
        try:
            status = path.stat()
        except (OSError, ValueError):
            return CorruptFileError(f"{path} is not there; it was averaged.")
        if not stat.S_ISREG(status.st_mode):
            return CorruptFileError(f"{path} is not a plain file.")
        if status.st_size <= _LENGTH:
            return CorruptFileError(f"{path} is {status.st_size} bytes long: too short to hold weights.")
        if status.st_size != recorded.files[name]:
            return CorruptFileError(
                f"{path} is {status.st_size:,} bytes long; it was {recorded.files[name]:,} when it was averaged."
            )
    return None


def _opened(place: Place, record: Record, recorded: Input) -> Checkpoint:
    """The checkpoint that these files are: all or some parts of their directory, or a single file among others."""
    path, *more = place.values()
    directory, files = _directory(place), set(place.values())
    for each in files:  # before anything beside it is looked at
        _check_length(each)
    if sum(each.directory == recorded.directory for each in record.inputs) > 1 and not more:
        return read_checkpoint(path, recorded.step)
    try:
        whole = read_checkpoint(directory, recorded.step)
        checkpoint = whole.with_parts({shard.part for shard in whole.shards if shard.path in files})
        if {shard.path for shard in checkpoint.shards} == files:
            return checkpoint
    except CkavgError:
        if more:
            raise
    if more:
        raise CorruptFileError(f"{directory} holds other weights than those that were averaged.")
    return read_checkpoint(path, recorded.step)


def _check_length(path: Path) -> None:
    """Refuse a file that does not begin as weights do."""
    try:
        with open_regular(path) as file:
            length = int.from_bytes(file.read(_LENGTH), "little")
            size = os.fstat(file.fileno()).st_size
    except (OSError, ValueError) as error:
        told = error.strerror if isinstance(error, OSError) else error
        raise ReadError(f"{path} cannot be read: {told}.", hint="Check that you may read it.") from error
    if not 2 <= length <= size - _LENGTH:
        raise CorruptFileError(f"{path} is not safetensors: it claims a header of {length:,} bytes.")


def _check_tensors(checkpoint: Checkpoint, tensors: Mapping[str, TensorInfo]) -> None:
    for name, entry in tensors.items():
        there = checkpoint.entries.get(name)
        if there is None or there.shape != entry.shape or there.is_floating != entry.is_floating:
            told = "is missing" if there is None else f"is {there.dtype} {there.shape}, not {entry.dtype} {entry.shape}"
            raise CorruptFileError(f"{checkpoint.path}: tensor {name!r} {told}, as the result would have it.")
