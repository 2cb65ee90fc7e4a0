"""Stage *discover*: the programs that convert what is not read, each as one line for a shell. Nothing is run here.

A program is written below as one would write it into a file. In the command it is the argument of `exec`, so that it
stays in one line. It needs torch and safetensors, and lets torch load tensors alone (`weights_only=True`).
"""

from __future__ import annotations

import glob
import json
import os
import re
import shlex
import shutil
import sys
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path

from ckavg.storage.base import AnyPath

TRAINING_STATE = (
    "(^|[^a-z])(optim(?!al)|opts?($|[^a-z])|sched|scaler|(data_?)?loader|sampler|rng|random_state|"
    "(ema|swa|avg|averaged|shadow)($|[^a-z]))"
)
"""In the name of a file, or of a part of one: no weights, but a trainer's state or an average that training made."""

_WRITE = """
import argparse, json, os, re, sys, torch
from pathlib import Path
from safetensors.torch import save_file

TRAINING_STATE = re.compile("(?i)@TRAINING_STATE")
MODELS = "state_dict", "model_state_dict", "model_state", "model", "module", "net", "network", "params", "student"

def flat(tensors, before=""):
    for name, value in tensors.items():
        if isinstance(value, dict):
            yield from flat(value, f"{before}{name}.")
        elif torch.is_tensor(value):
            yield f"{before}{name}", value

def weights(saved, top=True):
    held = {str(name): value for name, value in saved.items() if any(flat({name: value}))}
    kept = [name for name in held if "." in name or not TRAINING_STATE.search(name)]
    parts = [name for name in kept if isinstance(held[name], dict)]
    loose = [name for name in kept if torch.is_tensor(held[name]) and (held[name].ndim or not parts)]
    known = [name for name in MODELS if name in parts]
    alone = len(parts) == 1 and not loose
    is_wrapped = top and (known or alone) or known and alone and len(saved) > 1
    chosen = (known or parts)[:1] if is_wrapped else parts + loose if top else [*held]
    if len(chosen) < len(held):
        print("left out:", *held.keys() - {*chosen})
    return weights(held[chosen[0]], False) if is_wrapped else {name: held[name] for name in chosen}

def write(saved, source, target):
    found = flat(weights(saved)) if isinstance(saved, dict) else ()
    found = {name: value.detach().clone(memory_format=torch.contiguous_format) for name, value in found}
    if found:
        part = target.with_name(f".{target.name}.part")
        part.unlink(missing_ok=True)
        save_file(found, part, dict(format="pt"))
        os.replace(part, target)
    print(f"wrote {target}" if found else f"no weights in {source}")
    return bool(found)
"""
"""Of what a trainer saved, `{"model": …, "optimizer": …, "ema": …, "epoch": 3}`, writes the tensors of the model.

What has the name of a model is it, or what alone holds tensors; all that is no trainer's state, where there is neither.
Below it only a further wrapper is taken off, so that the names of its tensors stay whole.
"""

_FROM_PICKLES = """
def renamed(name):
    return re.sub("^pytorch_model", "model", re.sub("([.](bin|pt|pth|th|ckpt|pkl|tar))+$", "", name)) + ".safetensors"

def load(path):
    with path.open("rb") as file:
        can_map = file.read(2) == b"PK"
    return torch.load(path, map_location="cpu", weights_only=True, mmap=can_map)

torch.serialization.add_safe_globals([argparse.Namespace])
paths = [*map(Path, sys.argv[1:])]
done = [write(load(path), path, @TARGET) for path in paths]
"""

_INDEXES = """
for index in {index for path in paths for index in path.parent.glob("*.bin.index.json")}:
    stated = json.loads(index.read_text())
    stated["weight_map"] = {name: renamed(file) for name, file in stated["weight_map"].items()}
    other = index.with_name(renamed(index.name[:-11]) + ".index.json")
    other.unlink(missing_ok=True)
    other.write_text(json.dumps(stated, indent=2))
"""

_FROM_DISTRIBUTED = """
import torch.distributed.checkpoint as dcp

def load(reader):
    stored, saved = reader.read_metadata(), {}
    places = stored.planner_data or {}
    tensors = {
        name: torch.empty(each.size, dtype=each.properties.dtype)
        for name, each in stored.state_dict_metadata.items()
        if hasattr(each, "size") and not (places.get(name, ())[1:] and TRAINING_STATE.search(str(places[name][0])))
    }
    dcp.load(tensors, storage_reader=reader, no_dist=True)
    for name, tensor in tensors.items():
        *above, last = places.get(name, (name,))
        place = saved
        for part in above:
            place = place.setdefault(part, {})
        place[last] = tensor
    return saved

for path in map(Path, sys.argv[1:]):
    target = @TARGET
    if not target.exists():
        write(load(dcp.@READER(path)), path, target)
"""


_DEQUANTIZE = """
import sys
from pathlib import Path
from transformers import AutoModelForCausalLM
for path in map(Path, sys.argv[1:]):
    target = path.parent.with_name(path.parent.name + "-dequantized") / path.name
    AutoModelForCausalLM.from_pretrained(path).dequantize().save_pretrained(target)
"""


def from_pickles(paths: Iterable[AnyPath], target: str = "path.with_name(renamed(path.name))") -> str:
    """Convert files that `torch.save` wrote, and the indexes beside them.

    Args:
        paths: the files.
        target: where the weights of one go, an expression of Python about its `path`.
    """
    paths = list(paths)
    indexes = _INDEXES if any("-of-" in path.name for path in paths) else ""
    return _program(f"{_WRITE}{_FROM_PICKLES}{indexes}sys.exit(not any(done))".replace("@TARGET", target), paths)


def from_distributed(paths: Iterable[AnyPath], target: str, reader: str = "FileSystemReader") -> str:
    """Convert directories that torch.distributed.checkpoint wrote; what is there already is left as it is.

    Args:
        paths: the directories.
        target: where the weights of one go, an expression of Python about its `path`.
        reader: the reader of torch.distributed.checkpoint that knows the format.
    """
    return _program(_WRITE + _FROM_DISTRIBUTED.replace("@TARGET", target).replace("@READER", reader), paths)


def dequantized(paths: Iterable[AnyPath]) -> str:
    """Have transformers write quantized models anew, into a directory beside that of the run."""
    return _program(_DEQUANTIZE, paths)


def for_each(paths: Iterable[AnyPath], command: str) -> str:
    """Run a command for each path, named `$d` in it, until one fails."""
    return f"(for d in {_words(paths)}; do {command} || exit; done)"


def interpreter(*, ours: bool) -> str:
    """What to type for Python.

    Args:
        ours: it must have torch and safetensors; else whatever the user's `python` is.
    """
    found = shutil.which("python")
    if found is not None and not (ours and Path(found).parent != Path(sys.executable).parent):
        return "python"
    return word(sys.executable or "python")


def word(text: str) -> str:
    r"""The text as a word of any shell's command line, without a character that a terminal would obey.

    >>> print(word("run"), word("it's a run"), word("a\nb"))
    run 'it'"'"'s a run' "$(printf 'a\012b')"
    """
    if text.isprintable():
        return shlex.quote(text)
    plain = (char if char.isprintable() and char not in "\\%'" else _in_octal(char) for char in text)
    return f"\"$(printf '{''.join(plain)}')\""


def _in_octal(char: str) -> str:
    return "".join(f"\\{byte:03o}" for byte in os.fsencode(char))


def _program(source: str, paths: Iterable[AnyPath]) -> str:
    lines = source.replace("@TRAINING_STATE", TRAINING_STATE).replace("    ", " ").splitlines()
    text = json.dumps("\n".join(filter(None, lines)))
    return f"{interpreter(ours=True)} -c {shlex.quote(f'exec({text})')} {_words(paths)}"


def _words(paths: Iterable[AnyPath]) -> str:
    """Words that name exactly these paths: patterns, where they match nothing else."""
    alike: defaultdict[str, list[str]] = defaultdict(list)
    for path in map(str, paths):
        path = f"./{path}" if path.startswith("-") or "/" not in path else path  # no option; `${d%/*}` is above it
        alike[re.sub(r"\d+", "0", path)].append(path)
    return " ".join(_pattern(group) or " ".join(map(word, group)) for group in alike.values())


def _pattern(paths: list[str]) -> str | None:
    """A pattern for paths that differ in numbers alone; None where it would match others, too."""
    columns = zip(*(re.split(r"(\d+)", path) for path in paths), strict=True)
    parts = "".join(column[0] if len(set(column)) == 1 else "\0" for column in columns).split("\0")
    for star in ("*", "[0-9]*"):
        if len(paths) > 1 and sorted(glob.glob(star.join(map(glob.escape, parts)))) == sorted(paths):  # noqa: PTH207
            return star.join(word(part) if part else "" for part in parts)
    return None
