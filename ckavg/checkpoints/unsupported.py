"""Stage *discover*: weights in unsupported formats, and the command that converts them. Looks only at names.

Nothing is run here. A command is one line for a shell: the trainer's own tool, or a program of ours. Our programs are
written below like files, and become the argument of `exec` in the command. They need torch and safetensors, and let
torch load only tensors (`weights_only=True`).
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
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

from ckavg.checkpoints.layouts import PICKLED
from ckavg.errors import UnsupportedFormatError
from ckavg.storage.base import AnyPath
from ckavg.storage.local import storage_of, walk

PICKLES = (*PICKLED, ".pkl")
OTHERS = (".distcp", ".nemo", ".h5", ".keras", ".msgpack", ".gguf", ".npz", ".pdparams", ".ocdbt")
_NOT_WEIGHTS = re.compile(
    r"optimizer.*|scheduler.*|scaler.*|rng_state.*|training_args.*|random_states.*|sampler.*|dl_state.*|"
    r"custom_checkpoint.*|.*_optim_states\.pt|common\.pt"
)
TRAINING_STATE = (
    "(^|[^a-z])(optim(?!al)|opts?($|[^a-z])|sched|scaler|(data_?)?loader|sampler|rng|random_state|"
    "(ema|swa|avg|averaged|shadow)($|[^a-z]))"
)
"""In the name of a file or a part of one: training state, or an average made in training, rather than weights."""

MODELS = ("state_dict", "model_state_dict", "model_state", "model", "module", "net", "network", "params", "student")
"""The keys under which trainers save the model, the most certain first."""

_STATE = re.compile(rf"{TRAINING_STATE}|^(?:train(?:er|ing)?(?:_state)?|recipe_state|meta)[.]", re.IGNORECASE)
_ZERO = re.compile(r"(?:bf16_|fp16_)?zero_pp_rank_\d+_mp_rank_\d+_(?:model|optim)_states\.pt")
_RANK = re.compile(r"mp_rank_\d+_model_states\.pt")
_MOST_NAMES = 2000
_DEEPEST = 5

NOT_SAFETENSORS = "not safetensors"
_CONVERTS = "This command converts them to safetensors"
DOWNLOAD_FIRST = "Download the run; ckavg inspect of the copy has a command that converts it."
_NO_COMMAND = "Save the checkpoints as safetensors."
_BESIDE = f"{_CONVERTS} and changes nothing that is there:"


def is_pickled(name: str) -> bool:
    """Whether a file is, by its name, one of `torch.save` that may hold a model, in a supported format.

    >>> [is_pickled(name) for name in ("pytorch_model.bin", "optimizer.pt", "mp_rank_00_model_states.pt", "a.pkl")]
    [True, False, False, False]
    """
    return (
        name.endswith(PICKLED)
        and _is_unsupported(name)
        and not _is_state(name)
        and next(form for form in _FORMATS if form.pattern.fullmatch(name)).advise is _find_pickles
    )


def holds_pickles_alone(path: AnyPath) -> bool:
    """Whether all weights of a directory that are not safetensors are pickles, by their names."""
    found = _unsupported_names(path)
    return not any(name.endswith(".distcp") for name in found) and all(
        form.advise is _find_pickles or not any(form.pattern.fullmatch(name) for name in found)
        for form in _FORMATS[:-1]
    )


def unsupported_weights(names: Iterable[str]) -> str | None:
    """The first file with weights that is not safetensors; None if there is none.

    >>> unsupported_weights(["config.json", "optimizer.pt", "pytorch_model.bin"])
    'pytorch_model.bin'
    """
    return next(iter(sorted(name for name in names if _is_unsupported(name))), None)


def stem(name: str) -> str:
    """The name of an unsupported file, without its suffix.

    >>> stem("megatron_gpt--step=10.nemo"), stem("ckpt-10.weights.h5"), stem("v1.5.pkl")
    ('megatron_gpt--step=10', 'ckpt-10.weights', 'v1.5')
    """
    ending = next((ending for ending in PICKLES[::-1] + OTHERS if name.endswith(ending)), "")
    return name.removesuffix(ending)


def holds_unsupported(path: AnyPath) -> bool:
    """Whether a directory or a file holds weights in an unsupported format."""
    return bool(_unsupported_names(path))


def refused(paths: Iterable[AnyPath]) -> UnsupportedFormatError | None:
    """One error for all checkpoints with weights in unsupported formats; None if there are none."""
    groups: dict[tuple[object, ...], _Group] = {}
    for path in dict.fromkeys(paths):
        found = _unsupported_names(path)
        for form in _FORMATS:
            name = next((name for name in found if form.pattern.fullmatch(name)), None)
            if name is not None:
                laid_out = (path.parent, path.suffix, re.sub(r"\d+", "0", name.rpartition("/")[0]))
                key = (form,) if form.advise is _find_pickles else (form, *laid_out)
                group = groups.setdefault(key, _Group(form))
                group.found[path] = found
                group.names.append(name)
                break
    if not groups:
        return None
    unread = {path: file for each in groups.values() for path, file in zip(each.found, each.files, strict=True)}
    path, file = next(iter(unread.items()))
    if len(unread) > 1:
        kinds = " and ".join(dict.fromkeys(group.form.kind for group in groups.values()))
        what = f"{len(unread)} checkpoints hold {kinds}, such as {file}, {NOT_SAFETENSORS}."
    else:
        what = f"{path} {'is' if file == path else f'holds {file.relative_to(path)},'} {NOT_SAFETENSORS}."
    if all(isinstance(path, Path) for path in unread):
        advised = [group.form.advise(group) for group in groups.values()]
    else:
        advised = [(DOWNLOAD_FIRST, "")]
    hint = " ".join(dict.fromkeys(sentence for sentence, _ in advised))
    command = " && ".join(command for _, command in advised if command)
    return UnsupportedFormatError(what, hint=hint, command=command, unread=tuple(unread))


def refused_pickle(checkpoint: AnyPath, file: AnyPath, why: str, *, can_convert: bool) -> UnsupportedFormatError:
    """The error for an unsupported file of `torch.save`, with a command that converts all pickles of its checkpoint."""
    message = f"{file} {why}."
    found = refused([checkpoint]) if can_convert else None
    if found is None:
        return UnsupportedFormatError(message, hint=_NO_COMMAND)
    return UnsupportedFormatError(message, hint=found.hint, command=found.command, unread=(checkpoint,))


def _is_unsupported(name: str) -> bool:
    return name.endswith(PICKLES + OTHERS) and _NOT_WEIGHTS.fullmatch(name.rpartition("/")[2]) is None


def _is_state(name: str) -> bool:
    """Whether a file holds training state, or an average made in training, by its name or a folder's."""
    return any(_STATE.search(part) for part in PurePosixPath(name).parts)


def _unsupported_names(path: AnyPath) -> list[str]:
    """The unsupported files of a directory by relative path, weights of the model first; for a file, its name."""
    names = _names_below(path) if path.is_dir() else [path.name]
    found = [name for name in names if _is_unsupported(name) or _ZERO.fullmatch(name.rpartition("/")[2])]
    return sorted(found, key=lambda name: (_is_state(name), name))


def _names_below(path: AnyPath) -> Iterator[str]:
    """Files below a directory, a bounded number of them, by relative path."""
    left = _MOST_NAMES
    for place, folders, files in walk(path):
        folders[:] = [name for name in folders if not name.startswith("optimizer_")]
        if place and place.count("/") + 1 >= _DEEPEST:
            folders.clear()
        for name in files[:left]:
            yield f"{place}/{name}" if place else name
        left -= len(files)
        if left <= 0:
            return


# --- conversion of each format ---


@dataclass(slots=True)
class _Group:
    """Checkpoints of one format and layout: for each, its unsupported files and the file that identifies it."""

    form: _Format
    found: dict[AnyPath, list[str]] = field(default_factory=dict)
    names: list[str] = field(default_factory=list)

    @property
    def first(self) -> AnyPath:
        """The first checkpoint."""
        return next(iter(self.found))

    @property
    def files(self) -> list[AnyPath]:
        """The file of each checkpoint that identifies the format."""
        return [_file(path, name) for path, name in zip(self.found, self.names, strict=True)]

    @property
    def folders(self) -> list[AnyPath]:
        """The folder with the weights of each."""
        return [file.parent for file in self.files]

    @property
    def depth(self) -> int:
        """How many folders below the checkpoint the weights are."""
        return self.names[0].count("/")

    def for_each(self, command: str, note: str = "", *, ending: str = "") -> tuple[str, str]:
        """Convert each checkpoint, `$d` in the command, to `$o`, in a new run beside this one."""
        out = f"{os.path.abspath(self.first.parent)}-safetensors"  # noqa: PTH100 - links stay as they are
        name = f'"$(basename "$d" {ending})"' if ending else '"${d##*/}"'
        command = command.replace("$python", interpreter(ours=False)).replace("$o", f"{word(out)}/{name}")
        return f"{_CONVERTS}, in {out}{note}:", for_each(self.found, command)


_MEGATRON = (
    '$python -c "import sys; from megatron.bridge import AutoBridge as B; '
    """B.from_hf_pretrained('BASE_MODEL').export_ckpt(*sys.argv[1:])" "$d" $o""",
    ", with Megatron Bridge, and needs the base model for BASE_MODEL",
)
_NEOX = (
    '$python tools/ckpts/convert_neox_to_hf.py --input_dir "$d" --config_file CONFIG.yml --output_dir $o',
    "; it is GPT-NeoX's, for only the program that trained a model can join its tensor-parallel pieces",
)
_NEMO = (
    '$python scripts/checkpoint_converters/convert_llama_nemo_to_hf.py --input_name_or_path "$d"$archive '
    "--output_path pytorch_model.bin --hf_input_path BASE_MODEL --hf_output_path $o",
    "; NeMo has one such script for each family of models, and needs the base model for BASE_MODEL",
)


def _find_pickles(group: _Group) -> tuple[str, str]:
    pickles = [(path, name) for path, names in group.found.items() for name in names if name.endswith(PICKLES)]
    weights = [
        (path, name)
        for path, name in pickles
        if not _is_state(name) and not (path.is_dir() and _holds_safetensors((path / name).parent))
    ]
    return _BESIDE, from_pickles(_file(path, name) for path, name in weights or pickles)


def _find_zero(group: _Group) -> tuple[str, str]:
    """DeepSpeed's script is beside the folder with the pieces: in the checkpoint, or beside all checkpoints."""
    if group.first.suffix == ".ckpt":
        tag = word(group.folders[0].name)
        return group.for_each(f'$python "$d"/zero_to_fp32.py "$d" $o --safe_serialization --tag {tag}', ending=".ckpt")
    command = '$python "${d%/*}"/zero_to_fp32.py "${d%/*}" $o --safe_serialization --tag "${d##*/}"'
    if group.depth == 0:
        return group.for_each(command)
    command = command.replace("$python", interpreter(ours=False)).replace("$o", _above(group.depth))
    return _BESIDE, for_each(group.folders, command)


def _find_ranks(group: _Group) -> tuple[str, str]:
    if sum(_RANK.fullmatch(name.rpartition("/")[2]) is not None for name in group.found[group.first]) == 1:
        return _BESIDE, from_pickles(group.files, _target(f"path.parents[{group.depth}]", group.first))
    return group.for_each(*_NEOX)


def _find_verl(group: _Group) -> tuple[str, str]:
    folder = "".join(f"/{word(part)}" for part in PurePosixPath(group.names[0]).parts[:-1])
    return group.for_each(f'$python -m verl.model_merger merge --backend fsdp --local_dir "$d"{folder} --target_dir $o')


def _find_nemo(group: _Group) -> tuple[str, str]:
    command, note = _NEMO
    return group.for_each(command.replace("$archive", "/*.nemo" * group.first.is_dir()), note, ending=".nemo")


def _file(path: AnyPath, name: str) -> AnyPath:
    return path / name if path.is_dir() else path


def _holds_safetensors(folder: AnyPath) -> bool:
    return any(name.endswith(".safetensors") for name in storage_of(folder).list(folder).files)


def _above(levels: int) -> str:
    """The directory `levels` levels above `$d`, for a shell."""
    return f'"${{d%{"/*" * levels}}}"'


def _target(checkpoint: str, example: AnyPath = Path()) -> str:
    """A Python expression for the path where ckavg finds the weights: in the checkpoint, or beside a directory that is
    named like a file, such as the example.
    """
    return f'{checkpoint}.with_suffix(".safetensors")' if example.suffix else f'{checkpoint} / "model.safetensors"'


@dataclass(frozen=True, slots=True)
class _Format:
    """A format: its kind, the file that identifies it, and how to convert it: a sentence, and a command or none."""

    kind: str
    pattern: re.Pattern[str]
    advise: Callable[[_Group], tuple[str, str]]


_FORMATS = tuple(
    _Format(kind, re.compile(f"(?:.*/)?{pattern}"), advise)
    for kind, pattern, advise in (
        (
            "files of Megatron",
            r"mp_rank_\d+(?:_\d+)*/(?:model_optim_rng|model_rng)\.pt",
            lambda group: group.for_each(*_MEGATRON),
        ),
        ("files of DeepSpeed", _ZERO.pattern, _find_zero),
        ("files of DeepSpeed", _RANK.pattern, _find_ranks),
        ("files of verl", r"model_world_size_\d+_rank_\d+\.pt", _find_verl),
        ("NeMo archives", r"[^/]+\.nemo", _find_nemo),
        ("unsupported pickles", rf"[^/]+(?:{'|'.join(map(re.escape, PICKLES))})", _find_pickles),
        ("weights in other formats", r"[^/]+", lambda group: (_NO_COMMAND, "")),
    )
)
"""The most specific first."""


# --- programs of ours ---

_WRITE = """
import argparse, json, os, re, sys, torch
from pathlib import Path
from safetensors.torch import save_file

TRAINING_STATE = re.compile("(?i)@TRAINING_STATE")
MODELS = @MODELS

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
"""Writes the tensors of the model from a saved value, such as `{"model": …, "optimizer": …, "ema": …, "epoch": 3}`.

The model is the value with the name of a model, or the only value that holds tensors; without either, everything except
training state. Inside it, only a further wrapper is removed, so that the names of tensors stay complete.
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
        write(load(dcp.FileSystemReader(path)), path, target)
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
    """Convert files of `torch.save` and the indexes beside them; `target` is Python with `path`, one file."""
    paths = list(paths)
    indexes = _INDEXES if any("-of-" in path.name for path in paths) else ""
    return _program(f"{_WRITE}{_FROM_PICKLES}{indexes}sys.exit(not any(done))".replace("@TARGET", target), paths)


def from_distributed(folder: AnyPath, checkpoint: AnyPath) -> str:
    """Convert a folder of torch.distributed.checkpoint; existing files are left unchanged."""
    depth = len(folder.relative_to(checkpoint).parts)
    target = _target(f"path.parents[{depth - 1}]" if depth else "path")
    return _program(_WRITE + _FROM_DISTRIBUTED.replace("@TARGET", target), [folder])


def dequantized(paths: Iterable[AnyPath]) -> str:
    """Dequantize models with transformers, into a directory beside that of the run."""
    return _program(_DEQUANTIZE, paths)


def for_each(paths: Iterable[AnyPath], command: str) -> str:
    """Run a command for each path, `$d` in it, until one fails."""
    return f"(for d in {_words(paths)}; do {command} || exit; done)"


def interpreter(*, ours: bool) -> str:
    """The Python to type: the user's `python`, or with `ours` the current one, which has torch and safetensors."""
    found = shutil.which("python")
    if found is not None and not (ours and Path(found).parent != Path(sys.executable).parent):
        return "python"
    return word(sys.executable or "python")


def word(text: str) -> str:
    r"""The text as a word of any shell's command line, without control characters.

    >>> print(word("run"), word("it's a run"), word("a\nb"))
    run 'it'"'"'s a run' "$(printf 'a\012b')"
    """
    if text.isprintable():
        return shlex.quote(text)
    plain = (
        char if char.isprintable() and char not in "\\%'" else "".join(f"\\{byte:03o}" for byte in os.fsencode(char))
        for char in text
    )
    return f"\"$(printf '{''.join(plain)}')\""


def _program(source: str, paths: Iterable[AnyPath]) -> str:
    source = source.replace("@TRAINING_STATE", TRAINING_STATE).replace("@MODELS", repr(MODELS)).replace("    ", " ")
    text = json.dumps("\n".join(filter(None, source.splitlines())))
    return f"{interpreter(ours=True)} -c {shlex.quote(f'exec({text})')} {_words(paths)}"


def _words(paths: Iterable[AnyPath]) -> str:
    """Words that name exactly these paths, as patterns if those match nothing else."""
    alike: defaultdict[str, list[str]] = defaultdict(list)
    for path in map(str, paths):
        path = (
            f"./{path}" if path.startswith("-") or "/" not in path else path
        )  # not an option; `${d%/*}` is its parent
        alike[re.sub(r"\d+", "0", path)].append(path)
    return " ".join(_pattern(group) or " ".join(map(word, group)) for group in alike.values())


def _pattern(paths: list[str]) -> str | None:
    """A pattern for paths that differ only in numbers; None if it would match other paths too."""
    columns = zip(*(re.split(r"(\d+)", path) for path in paths), strict=True)
    parts = "".join(column[0] if len(set(column)) == 1 else "\0" for column in columns).split("\0")
    for star in ("*", "[0-9]*"):
        if len(paths) > 1 and sorted(glob.glob(star.join(map(glob.escape, parts)))) == sorted(paths):  # noqa: PTH207
            return star.join(word(part) if part else "" for part in parts)
    return None
