"""Stage *write*: the files that make weights loadable, gathered from the last checkpoint. Reads small files only."""

from __future__ import annotations

import fnmatch
import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import Any

from ckavg.errors import ReadError, SettingError, listed
from ckavg.result.layout import WeightPlan
from ckavg.run.contents import ADAPTERS, holds_weights
from ckavg.run.files import Bounds, problem_with
from ckavg.run.foreign import foreign_weights
from ckavg.run.layouts import is_averaged, may_hold_model
from ckavg.run.values import DTYPE_NAMES, Checkpoint, Run
from ckavg.untrusted import read_small

CONFIG = "config.json"
PIPELINE_CONFIG = "model_index.json"
DTYPE_KEYS = ("dtype", "torch_dtype")
"""Where configs state a dtype."""

_SUFFIXES = frozenset(
    {".json", ".txt", ".model", ".jinja", ".py", ".tiktoken", ".vocab", ".bpe", ".spm", ".yaml", ".yml"}
)
_NAMES = frozenset({"LICENSE", "NOTICE", "LICENSE.md", "USE_POLICY.md"})
_LEFT_OUT = frozenset({"trainer_state.json", "zero_to_fp32.py", "ckavg.json", "training_args.json", "all_results.json"})
_MADE_HERE = ("README.md", "ckavg.json", "ckavg.svg")
_RESULTS = ("_results.json", ".index.json")
_MOST_BYTES = 200_000_000
_MOST_FILES = 10_000
_DEEPEST = 8


@dataclass(frozen=True, slots=True)
class SideFiles:
    """What goes beside the weights.

    Attributes:
        files: content by relative path.
        warnings: what of it a user should know.
    """

    files: dict[str, bytes]
    warnings: tuple[str, ...]


def gather_side_files(run: Run, weights: WeightPlan) -> SideFiles:
    """Config, tokenizer, chat template, adapter config and custom code, by relative path; no training state.

    They come from the last checkpoint; what it lacks comes from the model given with `--init`. The dtype that
    `config.json` states is made to agree with the weights. Links are followed as far as those to weights are.

    Raises:
        SettingError: a pattern of `--copy` matches nothing that can be copied.
        ReadError: the system would not let us read one of them.
    """
    last, anchor = run.last, run.checkpoints[0]
    warnings: list[str] = []
    files = _gather(last, run.named(last), warnings)
    if run.anchor_is_init and anchor.kind == last.kind and last.kind in ("model", "pipeline"):
        of_init = _gather(anchor, run.named(anchor), warnings)
        prefixes = tuple(f"{part}/" if part else "" for part in last.components)
        files = {name: data for name, data in of_init.items() if name.startswith(prefixes)} | files
    files |= _asked_for(run, warnings)
    for part in last.components:
        name = f"{part}/{CONFIG}" if part else CONFIG
        if name in files:
            files[name] = _with_dtype(files[name], _dtypes(weights, part))
    for index in last.indexes:
        files[index.relative_to(last.directory).as_posix()] = _index(index, *weights.index_of(_part_of(last, index)))
    code = sorted(name for name in files if name.endswith(".py"))
    if code:
        warnings.append(
            f"Custom code is copied with the weights: {listed(code)}. It is run by whoever loads the result with "
            "trust_remote_code; read it first."
        )
    return SideFiles(files, tuple(dict.fromkeys(warnings)))


def read_config(files: Mapping[str, bytes], name: str = CONFIG) -> dict[str, Any]:
    """The named JSON file among the side files; empty where it is missing or not an object.

    For `config.json` of a pipeline, which has none, that is `model_index.json` or the config of its first component.
    """
    if name == CONFIG and name not in files:
        of_parts = sorted(each for each in files if each.endswith(f"/{CONFIG}"))
        name = next((each for each in (PIPELINE_CONFIG, *of_parts) if each in files), name)
    try:
        parsed = json.loads(files.get(name, b"{}"))
    except (ValueError, RecursionError):
        return {}
    return parsed if isinstance(parsed, dict) else {}


def _gather(checkpoint: Checkpoint, named: Path, warnings: list[str]) -> dict[str, bytes]:
    directory = checkpoint.directory
    bounds = Bounds.of(directory, named)
    beside_model = checkpoint.kind == "model" and set(checkpoint.ignored) & set(ADAPTERS)
    files: dict[str, bytes] = {}
    for name in _names(directory, checkpoint, wanted_only=True):
        path = directory / name
        if not is_side_file(path) or (beside_model and name == "adapter_config.json"):
            continue
        found = problem_with(path, bounds)
        if found is not None:
            warnings.append(f"Not copied: {found.message}")
        elif path.is_file() and path.stat().st_size <= _MOST_BYTES:
            files[name] = _content(path)
    return files


def _asked_for(run: Run, warnings: list[str]) -> dict[str, bytes]:
    """What `--copy` names: any file of the last checkpoint but weights, and what a result has of its own."""
    patterns, last = run.selection.copy, run.last
    if not patterns:
        return {}
    if last.kind == "file":
        raise SettingError("copy: the checkpoints are single files, which have no files beside them.")
    names = list(_names(last.directory, last, wanted_only=False))
    bounds = Bounds.of(last.directory, run.named(last))
    files: dict[str, bytes] = {}
    for pattern in patterns:
        matched = [name for name in names if fnmatch.fnmatchcase(name, pattern) and name not in _MADE_HERE]
        if not matched:
            raise SettingError(
                f"copy: {pattern!r} matches no file in {last.directory}.",
                hint="Patterns are compared with paths relative to the checkpoint, such as 'eval/*.csv'.",
            )
        weights = [name for name in matched if _is_weights(name)]
        if len(weights) == len(matched):
            raise SettingError(f"copy: {pattern!r} matches weights alone ({listed(weights)}), which are never copied.")
        if weights:
            warnings.append(f"Weights are never copied, though --copy {pattern} matches them: {listed(weights)}.")
        for name in matched:
            if name not in weights:
                files[name] = _permitted(last.directory / name, bounds)
    return files


def _permitted(path: Path, bounds: Bounds) -> bytes:
    found = problem_with(path, bounds)
    if found is not None:
        raise found
    if path.stat().st_size > _MOST_BYTES:
        raise SettingError(
            f"copy: {path} has {path.stat().st_size:,} bytes, more than {_MOST_BYTES:,}.",
            hint="Copy it by hand once the result is there.",
        )
    return _content(path)


def _content(path: Path) -> bytes:
    try:
        return read_small(path, _MOST_BYTES)
    except (OSError, ValueError) as error:
        why = error.strerror if isinstance(error, OSError) else error
        raise ReadError(f"{path} cannot be read: {why}.", hint="Check that you may read it.") from error


def _names(directory: Path, checkpoint: Checkpoint, *, wanted_only: bool) -> Iterator[str]:
    """Files of a checkpoint by relative path, sorted. Links to directories are not followed: they may form a circle."""
    count = 0
    for folder, folders, files in os.walk(directory, onerror=_raise):
        place = Path(folder).relative_to(directory)
        if checkpoint.kind == "file" or len(place.parts) >= _DEEPEST:
            folders.clear()
        folders[:] = sorted(
            name
            for name in folders
            if not wanted_only or (may_hold_model(name) and _belongs(checkpoint, Path(folder) / name))
        )
        for name in sorted(files):
            count += 1
            if count > _MOST_FILES:
                raise ReadError(
                    f"{directory} holds more than {_MOST_FILES:,} files.",
                    hint="Move what is no part of the model away.",
                )
            yield (place / name).as_posix()


def _belongs(checkpoint: Checkpoint, folder: Path) -> bool:
    """Whether a folder is of what is averaged, rather than another model that lies beside it."""
    if is_averaged(folder.name):
        return False
    return checkpoint.kind == "pipeline" or not holds_weights(folder)


def _raise(error: OSError) -> None:
    raise ReadError(
        f"{error.filename} cannot be read: {error.strerror}.", hint="Check that you may read it."
    ) from error


def is_side_file(path: PurePath) -> bool:
    """Whether a file, by its name, goes beside the weights of a result."""
    if path.name in _LEFT_OUT or path.name.endswith(_RESULTS) or path.name.startswith("."):
        return False
    return path.suffix in _SUFFIXES or path.name in _NAMES


def _is_weights(name: str) -> bool:
    return name.endswith((".safetensors", ".index.json")) or foreign_weights([name]) is not None


def _part_of(checkpoint: Checkpoint, index: Path) -> str:
    return index.parent.relative_to(checkpoint.directory).as_posix() if checkpoint.kind == "pipeline" else ""


def _dtypes(weights: WeightPlan, part: str) -> set[str]:
    names = (name for shard in weights.of(part) for name in shard.offsets)
    return {DTYPE_NAMES[weights.dtypes[name]] for name in names if name in weights.dtypes}


def _with_dtype(config: bytes, dtypes: set[str]) -> bytes:
    """Unchanged to the byte where it agrees already, or where there is no one dtype to state."""
    parsed = read_config({CONFIG: config})
    try:
        if len(dtypes) != 1 or not _set_dtype(parsed, next(iter(dtypes))):
            return config
        return json.dumps(parsed, indent=2, ensure_ascii=False).encode() + b"\n"
    except UnicodeEncodeError:  # an escape that stands for no character
        return json.dumps(parsed, indent=2).encode() + b"\n"
    except RecursionError:  # deeper than any config that a loader could read
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


def _index(index: Path, placed: Mapping[str, str], total_size: int) -> bytes:
    metadata = read_config({CONFIG: _content(index)}).get("metadata")
    stated = (metadata if isinstance(metadata, dict) else {}) | {"total_size": total_size}
    return json.dumps({"metadata": stated, "weight_map": placed}, indent=2).encode() + b"\n"
