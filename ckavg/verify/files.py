"""The files of a result: is each there and what it was, would the weights load, and is every element a number?"""

from __future__ import annotations

import os
import stat
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ckavg.checkpoints.checkpoint import RESULT_RECORD, read_checkpoint
from ckavg.checkpoints.run import DTYPE_NAMES, Checkpoint, TensorInfo
from ckavg.errors import CkavgError, ReadError
from ckavg.output.output_path import CARD
from ckavg.output.record import Output
from ckavg.output.side_files import CONFIG, DTYPE_KEYS
from ckavg.output.weight_files import sha256_of
from ckavg.storage.atomic import resolved
from ckavg.storage.local import read_object
from ckavg.verify.findings import Finding, Report

_INDEX = ".safetensors.index.json"
_MOST_BYTES_OF_JSON = 1 << 28
_HASHED_TOGETHER = 8
_SHOWN = 8


@dataclass(frozen=True, slots=True)
class Present:
    """The files of an output that can be read, with their sizes in bytes, and what is wrong with the others."""

    sizes: dict[str, int]
    findings: tuple[Finding, ...]


def find_files(directory: Path, output: Output, *, within: Path, prefix: str = "") -> Present:
    """Look for the files of an output; opens none.

    Args:
        directory: of the output.
        output: its entry in the record.
        within: the directory of the result, out of which no link may lead.
        prefix: what stands before the names of its files in messages.
    """
    sizes: dict[str, int] = {}
    found: list[Finding] = []
    inside = resolved(within)
    for name in output.files:
        path = directory / name
        try:
            status = path.stat()
        except (FileNotFoundError, NotADirectoryError):
            found.append(Finding("files", f"{prefix}{name} is not there."))
        except (OSError, ValueError) as error:
            found.append(Finding("files", f"{prefix}{name} cannot be looked at: {error}."))
        else:
            if inside not in resolved(path).parents:
                found.append(Finding("files", f"{prefix}{name} is a link that leads out of the result."))
            elif not stat.S_ISREG(status.st_mode):
                found.append(Finding("files", f"{prefix}{name} is not a plain file."))
            else:
                sizes[name] = status.st_size
    return Present(sizes, tuple(found))


def check_hashes(
    directory: Path, output: Output, names: Collection[str], *, on_done: Callable[[str], None], prefix: str = ""
) -> list[Finding]:
    """Compare the SHA-256 of files with the record. An edited card is worth a warning, any other change is a problem.

    Args:
        directory, output, prefix: as of `find_files`.
        names: the files to read.
        on_done: called with the name of each file that was read.
    """
    found: list[Finding] = []
    hashed = [name for name in output.files if name in names and name != RESULT_RECORD]
    for place in range(0, len(hashed), _HASHED_TOGETHER):
        some = hashed[place : place + _HASHED_TOGETHER]
        for name, digest in zip(some, _hashes([directory / name for name in some]), strict=True):
            on_done(name)
            if isinstance(digest, ReadError):
                found.append(Finding("files", f"{prefix}{name}: {digest.message}"))
            elif digest != (recorded := output.sha256[name]):
                changed = f"was changed: its SHA-256 is {digest[:12]}…, it was {recorded[:12]}…."
                found.append(Finding("files", f"{prefix}{name} {changed}", is_problem=name != CARD))
    return found


def _hashes(paths: list[Path]) -> list[str | ReadError]:
    """The SHA-256 of each file, or why it cannot be read."""
    try:
        return list(sha256_of(paths))
    except ReadError as error:
        return [error] if len(paths) == 1 else [digest for path in paths for digest in _hashes([path])]


def check_others(directory: Path, output: Output, folders: Collection[str], *, prefix: str = "") -> list[Finding]:
    """Name the files that are there but not in the record, somebody's notes perhaps; hidden ones are skipped.

    Args:
        directory, output, prefix: as of `find_files`.
        folders: of the snapshots in it, which have records of their own.
    """
    others: list[str] = []
    for folder, inner, names in os.walk(directory):
        place = Path(folder).relative_to(directory)
        inner[:] = sorted(name for name in inner if not name.startswith(".") and str(place / name) not in folders)
        others += [str(place / name) for name in sorted(names) if not name.startswith(".")]
    others = [name for name in others if name not in output.files]
    if not others:
        return []
    more = f" and {len(others) - _SHOWN} more" if len(others) > _SHOWN else ""
    names_shown = ", ".join(prefix + name for name in others[:_SHOWN])
    return [Finding("files", f"Not in the record, and not checked: {names_shown}{more}.", is_problem=False)]


def open_weights(
    directory: Path, output: Output, names: Collection[str], *, prefix: str = ""
) -> tuple[Checkpoint | None, list[Finding]]:
    """Read the headers of a result as a loader would, and compare them with its indexes and configs.

    Args:
        directory, output, prefix: as of `find_files`.
        names: its files that can be read.

    Returns:
        The result as a checkpoint, None where it is none; and what is wrong with it.
    """
    try:
        special = next((path.name for path in directory.glob("*.safetensors") if not path.is_file()), None)
        if special is not None:  # in the words that are used of any other file
            raise ReadError(f"{special} is not a plain file.")
        checkpoint = read_checkpoint(directory, output.step)
    except CkavgError as error:
        return None, [Finding("weights", f"{prefix}the weights cannot be loaded: {error.message}")]
    recorded = {name for name in output.files if name.endswith(".safetensors")}
    loaded = {str(shard.path.relative_to(directory)) for shard in checkpoint.shards}
    found: list[Finding] = []
    if loaded != recorded:
        other = ", ".join(sorted(loaded ^ recorded)[:_SHOWN])
        found.append(Finding("weights", f"{prefix}the weights that would be loaded are not those recorded: {other}."))
    for name in output.files:
        path = directory / name
        if name not in names or not (name.endswith(_INDEX) or path.name == CONFIG):
            continue
        wrong = (_wrong_in_index if name.endswith(_INDEX) else _wrong_in_config)(
            _json_object(path), _entries_of(checkpoint, path.parent)
        )
        if wrong is not None:
            found.append(Finding("weights", f"{prefix}{name} {wrong}"))
    return checkpoint, found


def _entries_of(checkpoint: Checkpoint, folder: Path) -> list[TensorInfo]:
    """The tensors that a loader takes from a folder: of its index and its config, not of the files beside them."""
    inside = {
        place
        for place, shard in enumerate(checkpoint.shards)
        if shard.path.parent == folder and not shard.part.endswith(".safetensors/")
    }
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
    """Every floating dtype that a config states, those of its parts included."""
    parts: list[Mapping[str, Any]] = [config]
    while parts:
        for key, value in parts.pop().items():
            if isinstance(value, dict):
                parts.append(value)
            elif key in DTYPE_KEYS and isinstance(value, str) and value in DTYPE_NAMES.values():
                yield value


def _json_object(path: Path) -> dict[str, Any]:
    """A JSON object; empty where the file is none, which its SHA-256 shows already."""
    with suppress(OSError, ValueError):
        return read_object(path, _MOST_BYTES_OF_JSON)
    return {}


def check_finite(report: Report, outputs: Iterable[tuple[str, Checkpoint]], *, infinite: Collection[str]) -> None:
    """Look for NaN and infinity in all averaged tensors.

    Args:
        report: to add to.
        outputs: the results, each with what stands before the names of its tensors in messages.
        infinite: tensors that may hold infinities.

    Raises:
        TruncatedShardError, ReadError: a file became shorter meanwhile, or cannot be read.
    """
    outputs, listen = list(outputs), report.listener("weights")
    before, total = 0, sum(checkpoint.nbytes for _, checkpoint in outputs)
    for prefix, checkpoint in outputs:

        def tell(done: int, before: int = before) -> None:
            listen(before + done, total)

        for name, count in _count_nonfinite(checkpoint, tell, infinite).items():
            wrong = f"{prefix}tensor {name!r} holds NaN or infinity: {count:,} of its elements."
            report.problem("weights", wrong)
        before += checkpoint.nbytes
        listen(before, total)
    report.bytes_read += before


def _count_nonfinite(checkpoint: Checkpoint, tell: Callable[[int], None], infinite: Collection[str]) -> dict[str, int]:
    """How many elements are NaN or infinite, of the tensors that hold any."""
    from ckavg.engine.blocks import TILE, Block, cut_blocks
    from ckavg.engine.context import Context
    from ckavg.engine.stream import by_tensor, stream
    from ckavg.engine.tiles import TORCH_DTYPES, TileReader, all_finite

    entries = {name: entry for name, entry in checkpoint.entries.items() if entry.is_floating}
    blocks = cut_blocks(entries)

    def make_worker(reader: TileReader) -> Callable[[Block], int]:
        def count(block: Block) -> int:
            entry, wrong = entries[block.name], 0
            for start, stop in block.tiles(TILE):
                raw = reader.raw(0, block.name, start * entry.item_bytes, stop * entry.item_bytes)
                values = raw.view(TORCH_DTYPES[entry.dtype])
                if not all_finite(values):
                    wrong += int((values.isnan() if block.name in infinite else ~values.isfinite()).sum())
            return wrong

        return count

    streamed = stream("weights", [checkpoint], blocks, make_worker, Context(on_progress=lambda news: tell(news.done)))
    counts = {name: sum(parts) for name, parts in by_tensor(blocks, streamed.results).items()}
    return {name: count for name, count in counts.items() if count}
