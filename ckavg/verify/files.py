"""Checks the files of a result: each exists unchanged, the weights load, and every element is finite."""

from __future__ import annotations

import os
import stat
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ckavg.checkpoints.checkpoint import RESULT_RECORD, read_checkpoint
from ckavg.checkpoints.run import DTYPE_NAMES, Checkpoint, TensorInfo
from ckavg.engine.context import Context, OnProgress, Progress
from ckavg.errors import CkavgError, ReadError
from ckavg.output.output_path import CARD
from ckavg.output.record import Output
from ckavg.output.side_files import CONFIG, DTYPE_KEYS
from ckavg.output.weight_files import sha256_of
from ckavg.storage.atomic import resolved
from ckavg.storage.local import read_object
from ckavg.verify.findings import Report

_INDEX = ".safetensors.index.json"
_SINGLE = ".safetensors/"
_MOST_BYTES_OF_JSON = 1 << 28
_HASHED_TOGETHER = 8
_SHOWN = 8


@dataclass(frozen=True, slots=True)
class Part:
    """A result, or a snapshot in it.

    Attributes:
        directory: where its files are.
        output: its entry in the record.
        prefix: of the names of its files and tensors in messages.
    """

    directory: Path
    output: Output
    prefix: str = ""


def check_files(report: Report, parts: Sequence[Part], *, within: Path) -> list[dict[str, int]]:
    """Compare the files of results with the SHA-256 in the record.

    An edited card is a warning, any other change a problem.

    Args:
        report: to add to.
        parts: a result and its snapshots.
        within: the directory of the result, which no link may leave.

    Returns:
        The files of each part that can be read, with their sizes in bytes.
    """
    present = [_find_files(report, part, within) for part in parts]
    hashed = [{name: size for name, size in sizes.items() if name != RESULT_RECORD} for sizes in present]
    listen, done, total = report.listener("files"), 0, sum(sum(sizes.values()) for sizes in hashed)
    for part, sizes in zip(parts, hashed, strict=True):
        for name, digest in zip(sizes, hashes(part.directory / name for name in sizes), strict=True):
            if isinstance(digest, ReadError):
                report.problem("files", f"{part.prefix}{name}: {digest.message}")
            elif digest != (recorded := part.output.sha256[name]):
                changed = f"was changed: its SHA-256 is {digest[:12]}…, it was {recorded[:12]}…."
                report.add("files", f"{part.prefix}{name} {changed}", is_problem=name != CARD)
            done += sizes[name]
            listen(done, total)
    report.files += sum(map(len, present))
    report.bytes_read += done
    return present


def _find_files(report: Report, part: Part, within: Path) -> dict[str, int]:
    """The sizes of the files that can be read. Opens none of them."""
    sizes: dict[str, int] = {}
    inside = resolved(within)
    for name in part.output.files:
        path = part.directory / name
        try:
            status = path.stat()
        except (FileNotFoundError, NotADirectoryError):
            wrong = "is missing."
        except (OSError, ValueError) as error:
            wrong = f"cannot be looked at: {error}."
        else:
            if inside not in resolved(path).parents:
                wrong = "is a link that leaves the result."
            elif not stat.S_ISREG(status.st_mode):
                wrong = "is not a plain file."
            else:
                sizes[name] = status.st_size
                continue
        report.problem("files", f"{part.prefix}{name} {wrong}")
    return sizes


def hashes(paths: Iterable[Path]) -> Iterator[str | ReadError]:
    """The SHA-256 of each file, or the error; several files are read at a time."""

    def hash_file(path: Path) -> str | ReadError:
        try:
            return sha256_of([path])[0]
        except ReadError as error:
            return error

    with ThreadPoolExecutor(_HASHED_TOGETHER) as executor:
        yield from executor.map(hash_file, paths)


def check_others(report: Report, part: Part, folders: Collection[str]) -> None:
    """Warn of files that are not in the record, such as a user's notes. Hidden files are skipped.

    Args:
        report: to add to.
        part: the part whose directory is listed.
        folders: of its snapshots, which have their own records.
    """
    others: list[str] = []
    for folder, inner, names in os.walk(part.directory):
        place = Path(folder).relative_to(part.directory)
        inner[:] = sorted(name for name in inner if not name.startswith(".") and str(place / name) not in folders)
        others += [str(place / name) for name in sorted(names) if not name.startswith(".")]
    others = [part.prefix + name for name in others if name not in part.output.files]
    if others:
        more = f" and {len(others) - _SHOWN} more" if len(others) > _SHOWN else ""
        report.warning("files", f"Not in the record, and not checked: {', '.join(others[:_SHOWN])}{more}.")


def open_weights(report: Report, part: Part, names: Collection[str]) -> Checkpoint | None:
    """Read the headers of a result as a loader would, and compare them with its indexes and configs.

    Args:
        report: to add to.
        part: the result, or a snapshot.
        names: its files that can be read.
    """
    directory, output, prefix = part.directory, part.output, part.prefix
    try:
        special = next((path.name for path in directory.glob("*.safetensors") if not path.is_file()), None)
        if special is not None:  # worded like the other messages
            raise ReadError(f"{special} is not a plain file.")
        checkpoint = read_checkpoint(directory, output.step)
    except CkavgError as error:
        report.problem("weights", f"{prefix}the weights cannot be loaded: {error.message}")
        return None
    recorded = {name for name in output.files if name.endswith(".safetensors")}
    loaded = {str(shard.path.relative_to(directory)) for shard in checkpoint.shards}
    if loaded != recorded:
        other = ", ".join(sorted(loaded ^ recorded)[:_SHOWN])
        report.problem("weights", f"{prefix}a loader would take other weights than those recorded: {other}.")
    for name in filter(names.__contains__, output.files):
        path = directory / name
        if name.endswith(_INDEX) or path.name == CONFIG:
            check = _wrong_in_index if name.endswith(_INDEX) else _wrong_in_config
            with suppress(OSError, ValueError):  # not a JSON object: its SHA-256 shows that already
                wrong = check(read_object(path, _MOST_BYTES_OF_JSON), _entries_in(checkpoint, path.parent))
                if wrong is not None:
                    report.problem("weights", f"{prefix}{name} {wrong}")
    return checkpoint


def _entries_in(checkpoint: Checkpoint, folder: Path) -> list[TensorInfo]:
    """The tensors that a loader takes from a folder, by its index and config rather than by the files in it."""
    shards = enumerate(checkpoint.shards)
    inside = {place for place, shard in shards if shard.path.parent == folder and not shard.part.endswith(_SINGLE)}
    return [entry for entry in checkpoint.entries.values() if entry.shard in inside]


def _wrong_in_index(index: Mapping[str, Any], entries: Sequence[TensorInfo]) -> str | None:
    metadata = index.get("metadata")
    stated = metadata.get("total_size") if isinstance(metadata, dict) else None
    total = sum(entry.nbytes for entry in entries)
    if type(stated) in (int, float) and stated == total:
        return None
    return f"states a total_size of {str(stated)[:40]}; the tensors take {total} bytes."


def _wrong_in_config(config: Mapping[str, Any], entries: Sequence[TensorInfo]) -> str | None:
    dtypes = {DTYPE_NAMES[entry.dtype] for entry in entries if entry.is_floating}
    wrong = sorted(set(_stated_dtypes(config)) - dtypes)
    if len(dtypes) != 1 or not wrong:
        return None
    return f"states the dtype {', '.join(wrong)}, but the weights are {dtypes.pop()}."


def _stated_dtypes(config: Mapping[str, Any]) -> Iterator[str]:
    """Every floating dtype that a config states, including those of its parts."""
    parts: list[Mapping[str, Any]] = [config]
    while parts:
        for key, value in parts.pop().items():
            if isinstance(value, dict):
                parts.append(value)
            elif key in DTYPE_KEYS and isinstance(value, str) and value in DTYPE_NAMES.values():
                yield value


def check_finite(report: Report, outputs: Iterable[tuple[str, Checkpoint]], *, infinite: Collection[str]) -> None:
    """Look for NaN and infinity in all averaged tensors.

    Args:
        report: to add to.
        outputs: the results, each with the prefix of its tensors' names in messages.
        infinite: tensors that may have infinities.

    Raises:
        TruncatedShardError, ReadError: a file became shorter, or cannot be read.
    """
    outputs, listen = list(outputs), report.listener("weights")
    before, total = 0, sum(checkpoint.nbytes for _, checkpoint in outputs)
    for prefix, checkpoint in outputs:

        def tell(news: Progress, before: int = before) -> None:
            listen(before + news.done, total)

        for name, count in _count_nonfinite(checkpoint, tell, infinite).items():
            if count:
                report.problem("weights", f"{prefix}tensor {name!r} holds NaN or infinity: {count:,} of its elements.")
        before += checkpoint.nbytes
        listen(before, total)
    report.bytes_read += before


def _count_nonfinite(checkpoint: Checkpoint, tell: OnProgress, infinite: Collection[str]) -> dict[str, int]:
    """How many elements of each tensor are NaN, or infinite without permission."""
    import torch

    from ckavg.engine.blocks import TILE, Block, cut_blocks
    from ckavg.engine.coalescing import Group, by_dtype
    from ckavg.engine.stream import by_tensor, stream_groups
    from ckavg.engine.tiles import TORCH_DTYPES, TileReader, all_finite

    entries = {name: entry for name, entry in checkpoint.entries.items() if entry.is_floating}
    blocks = cut_blocks(entries)

    def make_worker(reader: TileReader) -> Callable[[Sequence[Block]], Sequence[int]]:
        def count(blocks: Sequence[Block]) -> Sequence[int]:
            if len(blocks) > 1:
                group, entry = Group(blocks), entries[blocks[0].name]
                memory = torch.empty(group.size * entry.item_bytes, dtype=torch.uint8)
                reader.raw_group(0, group, memory)
                if all_finite(memory.view(TORCH_DTYPES[entry.dtype])):
                    return [0] * len(blocks)
            return [count_block(block) for block in blocks]

        def count_block(block: Block) -> int:
            entry, wrong = entries[block.name], 0
            for start, stop in block.tiles(TILE):
                raw = reader.raw(0, block.name, start * entry.item_bytes, stop * entry.item_bytes)
                values = raw.view(TORCH_DTYPES[entry.dtype])
                if not all_finite(values):
                    wrong += int((values.isnan() if block.name in infinite else ~values.isfinite()).sum())
            return wrong

        return count

    key, context = by_dtype([checkpoint]), Context(on_progress=tell)
    streamed = stream_groups("weights", [checkpoint], blocks, make_worker, key, context)
    return {name: sum(parts) for name, parts in by_tensor(blocks, streamed.results).items()}
