"""The files that make weights loadable, gathered from the last checkpoint. Reads small files only."""

from __future__ import annotations

import contextlib
import fnmatch
import json
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import PurePath
from typing import Any

from ckavg.checkpoints.checkpoint import RESULT_RECORD, own_folders
from ckavg.checkpoints.layouts import as_safetensors, is_averaged, is_training_state, may_hold_model
from ckavg.checkpoints.run import DTYPE_NAMES, Checkpoint, Run
from ckavg.checkpoints.unsupported import OTHERS, PICKLES, unsupported_weights
from ckavg.checkpoints.weight_files import holds_weights
from ckavg.errors import ReadError, SettingError, listed
from ckavg.output.output_path import CARD, PLOT
from ckavg.output.weight_files import WeightPlan
from ckavg.storage.base import AnyPath, RemotePath
from ckavg.storage.local import Bounds, problem_with, read_object, size_of, storage_of, walk

CONFIG = "config.json"
PIPELINE_CONFIG = "model_index.json"
FOLDER_CONFIGS = {PIPELINE_CONFIG, "modules.json"}
"""Files that list the folders of a model: useless without those."""

DTYPE_KEYS = ("dtype", "torch_dtype")
"""The keys under which configs state a dtype."""

CONFIGS = frozenset(
    {
        "config.json", "adapter_config.json", "model_index.json", "modules.json", "params.json", "config.yaml",
        "config.yml", "open_clip_config.json", "model_config.json", "hparams.yaml", "hparams.yml",
    }
)  # fmt: skip
"""The files that tell a loader what the weights are."""

_LEFT_OUT = frozenset({"zero_to_fp32.py", "latest", "latest_checkpointed_iteration.txt"})
_STEMS_LEFT_OUT = frozenset({"trainer_state", "training_args", "all_results"})
_WRITTEN_BY = "metadata.json"
"""Beside pieces of tensors, it describes how they were saved."""

_LOGS = (".log", ".out", ".err")
_OTHER_WEIGHTS = (
    ".safetensors", ".index.json", ".onnx", ".tflite", ".mlmodel", ".pb", ".ot", ".pickle", ".joblib", ".engine",
)  # fmt: skip
_NOT_BESIDE_A_RUN = (
    ".png", ".jpg", ".jpeg", ".webp", ".gif", ".mp4", ".wav", ".csv", ".tsv", ".jsonl", ".parquet", ".html", ".ipynb",
    ".zip", ".gz", ".tar", ".toml", ".sh",
)  # fmt: skip
"""Files beside the checkpoints that do not belong to the model: samples, data, scripts."""

_MADE_HERE = (CARD, RESULT_RECORD, PLOT)
MOST_BYTES = 200_000_000
"""Limit on a side file: larger ones are not copied."""

_TAKES_FROM_INIT = frozenset({("model", "model"), ("pipeline", "pipeline"), ("model", "file")})
"""Kinds of base model and checkpoint for which the base model supplies missing files."""

_MOST_FILES = 10_000
_DEEPEST = 8


@dataclass(frozen=True, slots=True)
class SideFiles:
    """The files beside the weights, content by relative path, and warnings for the user."""

    files: dict[str, bytes]
    warnings: tuple[str, ...]


def gather_side_files(run: Run, weights: WeightPlan) -> SideFiles:
    """Gather config, tokenizer, chat template, adapter config and custom code, but no training state.

    They come from the last checkpoint; missing ones come from the model given with `--init`. The dtype in `config.json`
    is set to that of the weights. Links are followed under the same rules as links to weights.

    Raises:
        SettingError: a pattern of `--copy` matches nothing that can be copied.
        ReadError: a file cannot be read.
    """
    last, anchor = run.last, run.checkpoints[0]
    warnings: list[str] = []
    files = _gather(last, run.named(last), warnings)
    if last.kind != "file" and not _tells_what_it_is(files):
        files = _beside_checkpoints(run, warnings) | files
    if run.anchor_is_init and (anchor.kind, last.kind) in _TAKES_FROM_INIT:
        of_init = _gather(anchor, run.named(anchor), warnings)
        prefixes = tuple(f"{folder}/" if folder else "" for folder in last.folders)
        files = {name: data for name, data in of_init.items() if name.startswith(prefixes)} | files
    files |= _asked_for(run, warnings)
    for folder in last.folders:
        part = f"{folder}/" if folder else ""
        if f"{part}{CONFIG}" in files:
            files[f"{part}{CONFIG}"] = _with_dtype(files[f"{part}{CONFIG}"], weights, part)
    for index in last.indexes:
        place = index.relative_to(last.directory)
        part = "" if place.parent == PurePath() else f"{place.parent.as_posix()}/"
        files[f"{part}{as_safetensors(index.name)}"] = _index(index, *weights.index_of(part))
    if last.saved_as and len(weights.shards) > 1:
        files[f"{last.saved_as}.index.json"] = _index(None, *weights.index_of())
    if not (_tells_what_it_is(files) or _needs_no_config(last)):
        warnings.append(
            "The result has no config, so no loader will know what its weights are: there is none in the checkpoints "
            "or beside them. Name the base model with --init, or put its config.json beside the checkpoints."
        )
    code = sorted(name for name in files if name.endswith(".py"))
    if code:
        warnings.append(
            f"Custom code is copied with the weights: {listed(code)}. Loading the result with trust_remote_code runs "
            "it; read it first."
        )
    return SideFiles(files, tuple(dict.fromkeys(warnings)))


def name_of_weights(run: Run) -> str:
    """The name of the weight file of a result whose checkpoints are single files.

    It is the name that the loader expects by the config; without one, the name that the run has.
    """
    last = run.last
    places = [last.directory, *([run.checkpoints[0].path] if run.anchor_is_init else [])]
    for place in places if last.kind == "file" else ():
        with contextlib.suppress(OSError, ValueError):
            config = read_object(place / CONFIG, MOST_BYTES)
            if "model_type" in config or "architectures" in config:
                return "model.safetensors"
            if "_class_name" in config:
                return "diffusion_pytorch_model.safetensors"
    return last.saved_as


def _tells_what_it_is(files: Mapping[str, bytes]) -> bool:
    return any(name.rpartition("/")[2] in CONFIGS for name in files)


def _needs_no_config(last: Checkpoint) -> bool:
    """Whether the weights are an adapter, or their header says what they are."""
    facts = {key for shard in last.shards for key in shard.metadata} - {"format"}
    return last.kind == "adapter" or bool(facts) or any("lora_" in name for name in last.entries)


def read_config(files: Mapping[str, bytes], name: str = CONFIG) -> dict[str, Any]:
    """The named JSON file among the side files; empty if it is missing or not an object.

    A pipeline has no `config.json`; `model_index.json` or the config of its first component takes its place.
    """
    if name == CONFIG and name not in files:
        of_parts = sorted(each for each in files if each.endswith(f"/{CONFIG}"))
        name = next((each for each in (PIPELINE_CONFIG, *of_parts) if each in files), name)
    try:
        parsed = json.loads(files.get(name, b"{}"))
    except (ValueError, RecursionError):
        return {}
    return parsed if isinstance(parsed, dict) else {}


def _gather(checkpoint: Checkpoint, named: AnyPath, warnings: list[str]) -> dict[str, bytes]:
    directory, is_file = checkpoint.directory, checkpoint.kind == "file"
    skipped = {"adapter_config.json"} if any(why == "adapter" for why, _ in checkpoint.left_out) else set()
    skipped |= FOLDER_CONFIGS if is_file else set()
    pieces = (
        f"{checkpoint.shards[0].path.parent.relative_to(directory).as_posix()}/" if checkpoint.is_distributed else ""
    )
    skipped |= {_WRITTEN_BY} if pieces == "./" else set()
    own = frozenset() if is_file else own_folders(directory)
    names = [
        name
        for name in _names(directory, checkpoint, own, wanted_only=True)
        if is_side_file(PurePath(name), own, beside_a_run=is_file)
        and name not in skipped
        and not (pieces and name.startswith(pieces))
    ]
    return _contents(directory, names, Bounds.of(directory, named), warnings)


def _beside_checkpoints(run: Run, warnings: list[str]) -> dict[str, bytes]:
    """The side files in the directory of the run itself."""
    names = sorted(
        name
        for name in storage_of(run.source).list(run.source).files
        if name not in FOLDER_CONFIGS and is_side_file(PurePath(name), beside_a_run=True)
    )
    return _contents(run.source, names, Bounds.of(run.source, run.source), warnings)


def _contents(directory: AnyPath, names: Iterable[str], bounds: Bounds, warnings: list[str]) -> dict[str, bytes]:
    files: dict[str, bytes] = {}
    names = list(names)
    if isinstance(directory, RemotePath):
        small = (directory / name for name in names)
        directory.storage.prefetch(path for path in small if path.is_file() and size_of(path) <= MOST_BYTES)
    for name in names:
        path = directory / name
        found = problem_with(path, bounds)
        if found is not None:
            warnings.append(f"Not copied: {found.message}")
        elif path.is_file() and size_of(path) <= MOST_BYTES:
            files[name] = _content(path)
    return files


def _asked_for(run: Run, warnings: list[str]) -> dict[str, bytes]:
    """The files that `--copy` names: any file of the last checkpoint except weights and the result's own files."""
    patterns, last = run.selection.copy, run.last
    if not patterns:
        return {}
    if last.kind == "file":
        raise SettingError(
            "copy: the checkpoints are single files; there is nothing to copy.", hint="Leave out --copy."
        )
    names = list(_names(last.directory, last, frozenset(), wanted_only=False))
    bounds = Bounds.of(last.directory, run.named(last))
    files: dict[str, bytes] = {}
    for pattern in patterns:
        matched = [name for name in names if fnmatch.fnmatchcase(name, pattern) and name not in _MADE_HERE]
        if not matched:
            raise SettingError(
                f"copy: {pattern!r} matches no file in {last.directory}.",
                hint="Patterns match paths relative to the checkpoint, such as 'eval/*.csv'.",
            )
        weights = [name for name in matched if _is_weights(name)]
        if len(weights) == len(matched):
            raise SettingError(f"copy: {pattern!r} matches only weights ({listed(weights)}), which are never copied.")
        if weights:
            warnings.append(f"--copy {pattern} also matches weights, which are never copied: {listed(weights)}.")
        files |= {name: _permitted(last.directory / name, bounds) for name in matched if name not in weights}
    return files


def _permitted(path: AnyPath, bounds: Bounds) -> bytes:
    found = problem_with(path, bounds)
    if found is not None:
        raise found
    if size_of(path) > MOST_BYTES:
        raise SettingError(
            f"copy: {path} has {size_of(path):,} bytes, more than {MOST_BYTES:,}.",
            hint="Copy it by hand when the result is complete.",
        )
    return _content(path)


def _content(path: AnyPath) -> bytes:
    try:
        return storage_of(path).read_small(path, MOST_BYTES)
    except (OSError, ValueError) as error:
        why = error.strerror if isinstance(error, OSError) else error
        raise ReadError(f"{path} cannot be read: {why}.", hint="Check that you may read it.") from error


def _names(directory: AnyPath, checkpoint: Checkpoint, own: frozenset[str], *, wanted_only: bool) -> Iterator[str]:
    """Files of a checkpoint by relative path, sorted. Links to directories are not followed: they may form a cycle."""
    count = 0
    try:
        for where, folders, files in walk(directory):
            place = PurePath(where)
            is_deep = checkpoint.kind == "file" or len(place.parts) >= _DEEPEST
            folders[:] = [
                name
                for name in folders
                if not is_deep and (not wanted_only or _belongs(checkpoint, place / name, directory, own))
            ]
            count += len(files)
            if count > _MOST_FILES:
                raise ReadError(
                    f"{directory} holds more than {_MOST_FILES:,} files.",
                    hint="Move files away that are not part of the model.",
                )
            yield from ((place / name).as_posix() for name in files)
    except OSError as error:
        raise ReadError(
            f"{error.filename} cannot be read: {error.strerror}.", hint="Check that you may read it."
        ) from error


def _belongs(checkpoint: Checkpoint, place: PurePath, directory: AnyPath, own: frozenset[str]) -> bool:
    """Whether a folder belongs to the averaged model rather than to training or to another model."""
    leads_to_own = any(f"{folder}/".startswith(f"{place.as_posix()}/") for folder in checkpoint.folders)
    return _may_be_wanted(place, own) and (leads_to_own or not holds_weights(directory / place.as_posix()))


def _may_be_wanted(folder: PurePath, own: Collection[str]) -> bool:
    """Whether a folder may hold side files, by its name."""
    name, depth = folder.name, len(folder.parts) - 1
    is_state = is_training_state(name) and not (depth == 0 and name in own)
    return may_hold_model(name, depth) and not (is_state or is_averaged(name))


def is_side_file(path: PurePath, own: Collection[str] = (), *, beside_a_run: bool = False) -> bool:
    """Whether a file, by its name, goes beside the weights of a result: not weights, training state, logs or pickles.

    Args:
        path: relative to its checkpoint.
        own: folders that belong to the model, whatever their names.
        beside_a_run: whether it is in the directory of the checkpoints rather than in one of them.

    >>> [is_side_file(PurePath(name)) for name in ("bpe.codes", "scheduler.pt", "trainer_state.json", "runs/events.1")]
    [True, False, False, False]
    """
    name, stem = path.name, path.name.partition(".")[0]
    if not all(_may_be_wanted(folder, own) for folder in path.parents if folder.name):
        return False
    of_training = name in _LEFT_OUT or stem in _STEMS_LEFT_OUT or name.endswith("_results.json")
    if len(path.parts) == 1:
        of_training = of_training or (is_training_state(stem) and not stem.endswith("config"))
    log = name.endswith(_LOGS) or name.startswith("events.out.")
    elsewhere = beside_a_run and name.lower().endswith(_NOT_BESIDE_A_RUN)
    weights = name.endswith((*PICKLES, *OTHERS, *_OTHER_WEIGHTS))
    return not (name.startswith(".") or name in _MADE_HERE or of_training or log or elsewhere or weights)


def _is_weights(name: str) -> bool:
    return name.endswith((".safetensors", ".index.json")) or unsupported_weights([name]) is not None


def _with_dtype(config: bytes, weights: WeightPlan, part: str) -> bytes:
    """A config with the dtype of the weights; unchanged to the byte if it has that already, or if there are several."""
    names = (name for shard in weights.of(part) for name in shard.offsets)
    dtypes = {DTYPE_NAMES[weights.dtypes[name]] for name in names if name in weights.dtypes}
    parsed = read_config({CONFIG: config})
    with contextlib.suppress(RecursionError):  # deeper than any config that a loader could read
        if len(dtypes) == 1 and _set_dtype(parsed, next(iter(dtypes))):
            text = json.dumps(parsed, indent=2, ensure_ascii=False)
            return text.encode(errors="backslashreplace") + b"\n"  # as JSON escapes lone surrogates
    return config


def _set_dtype(config: dict[str, Any], dtype: str) -> bool:
    changed = False
    for key, value in config.items():
        if key in DTYPE_KEYS and value in DTYPE_NAMES.values() and value != dtype:
            config[key] = dtype
            changed = True
        elif isinstance(value, dict):
            changed |= _set_dtype(value, dtype)
    return changed


def _index(index: AnyPath | None, placed: Mapping[str, str], total_size: int) -> bytes:
    """A shard index with the metadata of another one."""
    metadata = read_config({CONFIG: _content(index)}).get("metadata") if index is not None else None
    stated = (metadata if isinstance(metadata, dict) else {}) | {"total_size": total_size}
    return json.dumps({"metadata": stated, "weight_map": placed}, indent=2).encode() + b"\n"
