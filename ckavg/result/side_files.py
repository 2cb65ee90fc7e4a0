"""Stage *write*: the files that make weights loadable, gathered from the last checkpoint. Reads small files only."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ckavg.atomic import resolved
from ckavg.errors import ReadError
from ckavg.result.layout import WeightPlan
from ckavg.run.layouts import read_label
from ckavg.run.values import DTYPE_NAMES, Run

CONFIG = "config.json"

_SUFFIXES = frozenset(
    {".json", ".txt", ".model", ".jinja", ".py", ".tiktoken", ".vocab", ".bpe", ".spm", ".yaml", ".yml"}
)
_NAMES = frozenset({"LICENSE", "NOTICE", "LICENSE.md", "USE_POLICY.md"})
_LEFT_OUT = frozenset({"trainer_state.json", "zero_to_fp32.py", "ckavg.json", "training_args.json", "all_results.json"})
_RESULTS = ("_results.json", ".index.json")
_LEFT_OUT_FOLDERS = ("runs", "logs", "wandb", "averaged", "__pycache__", "pytorch_model_fsdp_", "optimizer_")
_MOST_BYTES = 200_000_000
_DTYPE_KEYS = ("dtype", "torch_dtype")


def gather_side_files(run: Run, weights: WeightPlan) -> dict[str, bytes]:
    """Config, tokenizer, chat template, adapter config and custom code, by relative path; no training state.

    They come from the last checkpoint; what it lacks comes from the model given with `--init`. The dtype that
    `config.json` states is made to agree with the weights.

    Raises:
        ReadError: the system would not let us read one of them.
    """
    last, anchor = run.last, run.checkpoints[0]
    files = _gather(last.directory, deep=last.kind != "file")
    if run.anchor_is_init and anchor.kind == last.kind == "model":
        files = _gather(anchor.directory, deep=True) | files
    if CONFIG in files:
        files[CONFIG] = _with_dtype(files[CONFIG], weights)
    if last.index is not None:
        files[last.index.name] = _index(last.index, weights)
    return files


def read_config(files: Mapping[str, bytes], name: str = CONFIG) -> dict[str, Any]:
    """The named JSON file among the side files; empty where it is missing or not an object."""
    try:
        parsed = json.loads(files.get(name, b"{}"))
    except (ValueError, RecursionError):
        return {}
    return parsed if isinstance(parsed, dict) else {}


def _gather(directory: Path, *, deep: bool, above: tuple[Path, ...] = ()) -> dict[str, bytes]:
    files: dict[str, bytes] = {}
    above = *above, resolved(directory)  # a link to one of these would never come to an end
    try:
        for path in sorted(directory.iterdir()):
            if path.is_dir() and deep and _is_wanted_folder(path.name) and resolved(path) not in above:
                files |= {f"{path.name}/{name}": data for name, data in _gather(path, deep=True, above=above).items()}
            elif path.is_file() and _is_wanted(path):
                files[path.name] = path.read_bytes()
    except OSError as error:
        raise ReadError(
            f"{error.filename} cannot be read: {error.strerror}.", hint="Check that you may read it."
        ) from error
    return files


def _is_wanted(path: Path) -> bool:
    if path.name in _LEFT_OUT or path.name.endswith(_RESULTS) or path.name.startswith("."):
        return False
    return (path.suffix in _SUFFIXES or path.name in _NAMES) and path.stat().st_size <= _MOST_BYTES


def _is_wanted_folder(name: str) -> bool:
    return not name.startswith((".", *_LEFT_OUT_FOLDERS)) and read_label(name) is None


def _with_dtype(config: bytes, weights: WeightPlan) -> bytes:
    """Unchanged to the byte where it agrees already, or where there is no one dtype to state."""
    dtypes = {DTYPE_NAMES[code] for code in weights.dtypes.values()}
    parsed = read_config({CONFIG: config})
    try:
        if len(dtypes) != 1 or not _set_dtype(parsed, dtypes.pop()):
            return config
        return json.dumps(parsed, indent=2, ensure_ascii=False).encode() + b"\n"
    except UnicodeEncodeError:  # an escape that stands for no character
        return json.dumps(parsed, indent=2).encode() + b"\n"
    except RecursionError:  # deeper than any config that a loader could read
        return config


def _set_dtype(config: dict[str, Any], dtype: str) -> bool:
    changed = False
    for key, value in config.items():
        if key in _DTYPE_KEYS and value in DTYPE_NAMES.values() and value != dtype:
            config[key] = dtype
            changed = True
        elif isinstance(value, dict):
            changed |= _set_dtype(value, dtype)
    return changed


def _index(index: Path, weights: WeightPlan) -> bytes:
    try:
        parsed = read_config({CONFIG: index.read_bytes()})
    except OSError as error:
        raise ReadError(f"{index} cannot be read: {error.strerror}.", hint="Check that you may read it.") from error
    metadata = parsed.get("metadata")
    stated = (metadata if isinstance(metadata, dict) else {}) | {"total_size": weights.total_size}
    return (
        json.dumps({"metadata": stated, "weight_map": dict(sorted(weights.placed.items()))}, indent=2).encode() + b"\n"
    )
