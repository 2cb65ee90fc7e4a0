"""Stage *verify*, third: would the weights of a result load as they are meant to, and is each of them a number?"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from ckavg.checkpoints.checkpoint import read_checkpoint
from ckavg.checkpoints.run import DTYPE_NAMES, Checkpoint, TensorInfo
from ckavg.errors import CkavgError
from ckavg.output.record import Output
from ckavg.output.side_files import CONFIG, DTYPE_KEYS
from ckavg.storage.local import read_object
from ckavg.verify.findings import Finding

_INDEX = ".safetensors.index.json"
_MOST_BYTES = 1 << 28
_SHOWN = 8


def open_weights(
    directory: Path, output: Output, names: Collection[str], *, shown: str = ""
) -> tuple[Checkpoint | None, list[Finding]]:
    """Read the headers of a result as a loader would, and compare them with its indexes and configs.

    Args:
        directory: of the output.
        output: its entry in the record.
        names: its files that can be read.
        shown: what stands before the names of its files in messages.

    Returns:
        The result as a checkpoint, None where it is none; and what is wrong with it.
    """
    recorded = {name for name in output.files if name.endswith(".safetensors")}
    pipes = [path.name for path in directory.glob("*.safetensors") if not path.is_file()]
    if pipes:  # told in the words that are used of any other file
        return None, [Finding("weights", f"{shown}the weights cannot be loaded: {pipes[0]} is not a plain file.")]
    try:
        checkpoint = read_checkpoint(directory, output.step)
    except CkavgError as error:
        return None, [Finding("weights", f"{shown}the weights cannot be loaded: {error.message}")]
    loaded = {str(shard.path.relative_to(directory)) for shard in checkpoint.shards}
    found: list[Finding] = []
    if loaded != recorded:
        other = ", ".join(sorted(loaded ^ recorded)[:_SHOWN])
        found.append(Finding("weights", f"{shown}the weights that would be loaded are not those recorded: {other}."))
    small = {name: directory / name for name in output.files if name in names}
    for name, path in small.items():
        if name.endswith(_INDEX):
            found += _check_index(path, checkpoint, shown + name)
        elif path.name == CONFIG:
            found += _check_config(path, _of_folder(checkpoint, path.parent), shown + name)
    return checkpoint, found


def check_finite(
    checkpoints: Sequence[tuple[str, Checkpoint]],
    on_progress: Callable[[int, int], None],
    *,
    infinite: Collection[str],
) -> tuple[list[Finding], int]:
    """Look for NaN and infinity in all averaged tensors.

    Args:
        checkpoints: the results, each with what stands before the names of its tensors in messages.
        on_progress: called with the bytes done and the bytes to do.
        infinite: tensors that may hold infinities.

    Returns:
        What was found, and how many bytes were read.

    Raises:
        TruncatedShardError, ReadError: a file became shorter meanwhile, or cannot be read.
    """
    found: list[Finding] = []
    before, total = 0, sum(checkpoint.nbytes for _, checkpoint in checkpoints)
    for shown, checkpoint in checkpoints:
        found += [
            Finding("weights", f"{shown}tensor {name!r} holds NaN or infinity: {count:,} of its elements.")
            for name, count in _nonfinite(checkpoint, before, total, on_progress, infinite).items()
        ]
        before += checkpoint.nbytes
        on_progress(before, total)
    return found, before


def _nonfinite(
    checkpoint: Checkpoint,
    before: int,
    total: int,
    on_progress: Callable[[int, int], None],
    infinite: Collection[str],
) -> dict[str, int]:
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

    context = Context(on_progress=lambda news: on_progress(before + news.done, total))
    results = stream("weights", [checkpoint], blocks, make_worker, context).results
    counts = {name: sum(of_blocks) for name, of_blocks in by_tensor(blocks, results).items()}
    return {name: count for name, count in counts.items() if count}


def _of_folder(checkpoint: Checkpoint, folder: Path) -> list[TensorInfo]:
    """The tensors that a loader takes from a folder: of its index and its config, not of the files beside them."""
    inside = {
        place
        for place, shard in enumerate(checkpoint.shards)
        if shard.path.parent == folder and not shard.part.endswith(".safetensors/")
    }
    return [entry for entry in checkpoint.entries.values() if entry.shard in inside]


def _check_index(path: Path, checkpoint: Checkpoint, shown: str) -> list[Finding]:
    index = _json(path)
    metadata = index.get("metadata")
    stated = metadata.get("total_size") if isinstance(metadata, dict) else None
    total = sum(entry.nbytes for entry in _of_folder(checkpoint, path.parent))
    if type(stated) in (int, float) and stated == total:
        return []
    return [Finding("weights", f"{shown} states a total_size of {str(stated)[:40]}; the tensors take {total} bytes.")]


def _check_config(path: Path, entries: Sequence[TensorInfo], shown: str) -> list[Finding]:
    dtypes = {DTYPE_NAMES[entry.dtype] for entry in entries if entry.is_floating}
    stated = set(_stated(_json(path)))
    if len(dtypes) != 1 or stated <= dtypes:
        return []
    wrong, right = ", ".join(sorted(stated - dtypes)), dtypes.pop()
    return [Finding("weights", f"{shown} states the dtype {wrong}, but the weights are {right}.")]


def _stated(config: Mapping[str, Any]) -> list[str]:
    """Every floating dtype that a config states, those of its parts included."""
    parts: list[Mapping[str, Any]] = [config]
    found: list[str] = []
    while parts:
        for key, value in parts.pop().items():
            if isinstance(value, dict):
                parts.append(value)
            elif key in DTYPE_KEYS and isinstance(value, str) and value in DTYPE_NAMES.values():
                found.append(value)
    return found


def _json(path: Path) -> dict[str, Any]:
    """A JSON object; empty where it is none, which its checksum tells already."""
    with suppress(OSError, ValueError):
        return read_object(path, _MOST_BYTES)
    return {}
