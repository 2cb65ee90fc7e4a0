"""Stage *discover*: weights in formats that are not read, and the command that converts them. Looks at names alone.

Nothing is ever unpickled here. The commands load pickles with `weights_only=True` (`conversion.py`), or are the
trainer's own.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

from ckavg.checkpoints.conversion import TRAINING_STATE, for_each, from_distributed, from_pickles, interpreter, word
from ckavg.errors import UnsupportedFormatError
from ckavg.storage.base import AnyPath
from ckavg.storage.local import storage_of, walk

PICKLES = (".bin", ".pt", ".pth", ".th", ".ckpt", ".pkl", ".pt.tar", ".pth.tar")
OTHERS = (".distcp", ".nemo", ".h5", ".keras", ".msgpack", ".gguf", ".npz", ".pdparams", ".ocdbt")
_NOT_WEIGHTS = re.compile(
    r"optimizer.*|scheduler.*|scaler.*|rng_state.*|training_args.*|random_states.*|sampler.*|dl_state.*|"
    r"custom_checkpoint.*|.*_optim_states\.pt|common\.pt"
)
_STATE = re.compile(rf"{TRAINING_STATE}|^(?:train(?:er|ing)?(?:_state)?|recipe_state|meta)[.]", re.IGNORECASE)
_ZERO = re.compile(r"(?:bf16_|fp16_)?zero_pp_rank_\d+_mp_rank_\d+_(?:model|optim)_states\.pt")
_RANK = re.compile(r"mp_rank_\d+_model_states\.pt")
_MOST_NAMES = 2000
_DEEPEST = 5

_CONVERTS = "ckavg never unpickles. This command converts them to safetensors"
DOWNLOAD_FIRST = "ckavg never unpickles. Download the run; ckavg inspect of the copy has a command that converts it."
_BESIDE = f"{_CONVERTS} and changes nothing that is there:"


@dataclass(frozen=True, slots=True)
class Unsupported:
    """Weights of one or several checkpoints that are not read.

    Attributes:
        kind: what the files are.
        files: by checkpoint, the file that gives them away.
        advice: what to do, in a sentence; where there is a command, it says what that does.
        command: one line for a shell that converts all of them; empty where there is none.
    """

    kind: str
    files: Mapping[AnyPath, AnyPath]
    advice: str
    command: str


def unsupported_weights(names: Iterable[str]) -> str | None:
    """The first of the files that holds weights in a format that is not read; None where there is none.

    >>> unsupported_weights(["config.json", "optimizer.pt", "pytorch_model.bin"])
    'pytorch_model.bin'
    """
    return next(iter(sorted(name for name in names if _is_unsupported(name))), None)


def stem(name: str) -> str:
    """The name of a file that is not read, without its ending.

    >>> stem("checkpoint-12.pth.tar"), stem("epoch=1-step=100.ckpt"), stem("v1.5.bin")
    ('checkpoint-12', 'epoch=1-step=100', 'v1.5')
    """
    ending = next((ending for ending in PICKLES[::-1] + OTHERS if name.endswith(ending)), "")
    return name.removesuffix(ending)


def holds_unsupported(path: AnyPath) -> bool:
    """Whether a directory, or a file, holds weights in a format that is not read."""
    return bool(_unsupported_names(path))


def conversion(paths: Iterable[AnyPath]) -> Unsupported | None:
    """What to do with all checkpoints whose weights are in formats that are not read; None where there are none.

    Args:
        paths: the checkpoints, directories or files.
    """
    groups: dict[tuple[object, ...], _Group] = {}
    for path in paths:
        found = _unsupported_names(path)
        for form in _FORMATS:
            name = next((name for name in found if form.pattern.fullmatch(name)), None)
            if name is not None:
                laid_out = (path.parent, path.suffix, _numberless(name.rpartition("/")[0]))
                key = (form,) if form.advise is _find_pickles else (form, *laid_out)
                group = groups.setdefault(key, _Group(form))
                group.found[path] = found
                group.names.append(name)
                break
    if not groups:
        return None
    is_here = all(isinstance(path, Path) for group in groups.values() for path in group.found)
    advised = [group.form.advise(group) for group in groups.values()] if is_here else [(DOWNLOAD_FIRST, "")]
    return Unsupported(
        " and ".join(dict.fromkeys(group.form.kind for group in groups.values())),
        {path: file for group in groups.values() for path, file in zip(group.found, group.files, strict=True)},
        " ".join(dict.fromkeys(told for told, _ in advised)),
        " && ".join(command for _, command in advised if command),
    )


def refused(paths: Iterable[AnyPath]) -> UnsupportedFormatError | None:
    """One error for all checkpoints whose weights are in formats that are not read; None where there are none."""
    found = conversion(paths)
    if found is None:
        return None
    path, file = next(iter(found.files.items()))
    if len(found.files) > 1:
        what = f"{len(found.files)} checkpoints hold {found.kind}, such as {file}, not safetensors."
    else:
        what = f"{path} {'is' if file == path else f'holds {file.relative_to(path)},'} not safetensors."
    return UnsupportedFormatError(what, hint=found.advice, command=found.command, unread=tuple(found.files))


def refused_slices(directories: Sequence[AnyPath]) -> UnsupportedFormatError:
    """One error for safetensors that hold slices of tensors, as torch.distributed.checkpoint writes them.

    Args:
        directories: where the slices lie, one directory for each checkpoint.
    """
    here = [directory for directory in directories if isinstance(directory, Path)]
    is_inside = all(directory.name == "sharded" for directory in directories)  # torch's name for it, in a checkpoint
    more = f", and so do {len(directories) - 1} more checkpoints" if len(directories) > 1 else ""
    return UnsupportedFormatError(
        f"{directories[0]} holds slices of tensors, as torch.distributed.checkpoint writes them{more}.",
        hint="This command puts them together and changes nothing that is there:" if here else DOWNLOAD_FIRST,
        command=from_distributed(here, _target("path.parent" if is_inside else "path"), "HuggingFaceStorageReader")
        if here
        else "",
        unread=tuple(directories),
    )


def _is_unsupported(name: str) -> bool:
    return name.endswith(PICKLES + OTHERS) and _NOT_WEIGHTS.fullmatch(name.rpartition("/")[2]) is None


def _is_state(name: str) -> bool:
    """Whether a file holds a trainer's state, or an average that training made, by its name or a folder's."""
    return any(_STATE.search(part) for part in PurePosixPath(name).parts)


def _unsupported_names(path: AnyPath) -> list[str]:
    """What is not read of a directory, by relative path, weights of the model before the rest; of a file its name."""
    names = _names_below(path) if path.is_dir() else [path.name]
    found = [name for name in names if _is_unsupported(name) or _ZERO.fullmatch(name.rpartition("/")[2])]
    return sorted(found, key=lambda name: (_is_state(name), name))


def _names_below(path: AnyPath) -> Iterator[str]:
    """Files of a directory and of those in it, a bounded number of them, by relative path."""
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


def _numberless(name: str) -> str:
    return re.sub(r"\d+", "0", name)


# --- what converts each ---


@dataclass(slots=True)
class _Group:
    """Checkpoints in one format, laid out alike.

    Attributes:
        form: the format.
        found: of each checkpoint, all files that are not read.
        names: of each checkpoint, the file that gives the format away.
    """

    form: _Format
    found: dict[AnyPath, list[str]] = field(default_factory=dict)
    names: list[str] = field(default_factory=list)

    @property
    def first(self) -> AnyPath:
        """The first checkpoint."""
        return next(iter(self.found))

    @property
    def files(self) -> list[AnyPath]:
        """The file of each checkpoint that gives the format away."""
        return [_file(path, name) for path, name in zip(self.found, self.names, strict=True)]

    @property
    def folders(self) -> list[AnyPath]:
        """Where the weights of each checkpoint lie."""
        return [file.parent for file in self.files]

    @property
    def depth(self) -> int:
        """How many folders below the checkpoint that is."""
        return self.names[0].count("/")

    def for_each(self, command: str, *, name: str = '"${d##*/}"', note: str = "") -> tuple[str, str]:
        """Convert each checkpoint, `$d` in the command, to `$o`, in a run of its own beside this one."""
        out = f"{os.path.abspath(self.first.parent)}-safetensors"  # noqa: PTH100 - links stay as they are
        return f"{_CONVERTS}, in {out}{note}:", for_each(self.found, command.replace("$o", f"{word(out)}/{name}"))


def _find_pickles(group: _Group) -> tuple[str, str]:
    pickles = [(path, name) for path, names in group.found.items() for name in names if name.endswith(PICKLES)]
    weights = [each for each in pickles if not (_is_state(each[1]) or _is_beside_weights(*each))]
    return _BESIDE, from_pickles(_file(path, name) for path, name in weights or pickles)


def _find_torch_distributed(group: _Group) -> tuple[str, str]:
    if "policy/weights/" in group.names[0]:
        return group.for_each(
            'uv run examples/converters/convert_dcp_to_hf.py --config="$d"/config.yaml '
            '--dcp-ckpt-path="$d"/policy/weights --hf-ckpt-path=$o'
        )
    if group.first.name.startswith("iter_"):
        return _find_megatron(group)
    if group.folders[0].name.startswith("pytorch_model_fsdp"):
        return _BESIDE, for_each(group.folders, f'accelerate merge-weights "$d" {_above(group.depth)}')
    checkpoint = f"path.parents[{group.depth - 1}]" if group.depth else "path"
    return _BESIDE, from_distributed(group.folders, _target(checkpoint, group.first))


def _find_megatron(group: _Group) -> tuple[str, str]:
    code = "from megatron.bridge import AutoBridge as B; B.from_hf_pretrained('BASE_MODEL').export_ckpt(*sys.argv[1:])"
    return group.for_each(
        f'{interpreter(ours=False)} -c "import sys; {code}" "$d" $o',
        note=", with Megatron Bridge, and needs the base model for BASE_MODEL",
    )


def _find_zero(group: _Group) -> tuple[str, str]:
    """DeepSpeed's script lies beside the folder with the pieces: in the checkpoint, or beside all of them."""
    python = interpreter(ours=False)
    if group.first.suffix == ".ckpt":
        return group.for_each(
            f'{python} "$d"/zero_to_fp32.py "$d" $o --safe_serialization --tag {word(group.folders[0].name)}',
            name='"$(basename "$d" .ckpt)"',
        )
    command = f'{python} "${{d%/*}}"/zero_to_fp32.py "${{d%/*}}" $o --safe_serialization --tag "${{d##*/}}"'
    if group.depth == 0:
        return group.for_each(command)
    return _BESIDE, for_each(group.folders, command.replace("$o", _above(group.depth)))


def _find_ranks(group: _Group) -> tuple[str, str]:
    if sum(_RANK.fullmatch(name.rpartition("/")[2]) is not None for name in group.found[group.first]) == 1:
        return _BESIDE, from_pickles(group.files, _target(f"path.parents[{group.depth}]", group.first))
    return group.for_each(
        f'{interpreter(ours=False)} tools/ckpts/convert_neox_to_hf.py --input_dir "$d" --config_file CONFIG.yml '
        "--output_dir $o",
        note="; it is GPT-NeoX's, for only the program that trained a model can join its tensor-parallel pieces",
    )


def _find_verl(group: _Group) -> tuple[str, str]:
    folder = "".join(f"/{word(part)}" for part in PurePosixPath(group.names[0]).parts[:-1])
    return group.for_each(
        f'{interpreter(ours=False)} -m verl.model_merger merge --backend fsdp --local_dir "$d"{folder} --target_dir $o'
    )


def _find_nemo(group: _Group) -> tuple[str, str]:
    return group.for_each(
        f"{interpreter(ours=False)} scripts/checkpoint_converters/convert_llama_nemo_to_hf.py --input_name_or_path "
        f'"$d"{"/*.nemo" if group.first.is_dir() else ""} --output_path pytorch_model.bin --hf_input_path BASE_MODEL '
        "--hf_output_path $o",
        name='"$(basename "$d" .nemo)"',
        note="; NeMo has one such script for each family of models, and needs the base model for BASE_MODEL",
    )


def _find_others(group: _Group) -> tuple[str, str]:
    return "Save the checkpoints as safetensors; ckavg reads nothing else.", ""


def _file(path: AnyPath, name: str) -> AnyPath:
    return path / name if path.is_dir() else path


def _is_beside_weights(path: AnyPath, name: str) -> bool:
    """Whether the folder of a checkpoint in which a file lies holds weights that are read."""
    if not path.is_dir():
        return False
    return any(each.endswith(".safetensors") for each in storage_of(path).list((path / name).parent).files)


def _above(levels: int) -> str:
    """The directory so many levels above `$d`, for a shell."""
    return f'"${{d%{"/*" * levels}}}"'


def _target(checkpoint: str, example: AnyPath = Path()) -> str:
    """Where ckavg finds the weights: in the checkpoint, or beside a directory that is named as a file would be.

    Args:
        checkpoint: an expression of Python.
        example: the path of one.
    """
    return f'{checkpoint}.with_suffix(".safetensors")' if example.suffix else f'{checkpoint} / "model.safetensors"'


@dataclass(frozen=True, slots=True)
class _Format:
    """What its files are, which of them gives it away, and what to do: a sentence, and a command or none."""

    kind: str
    pattern: re.Pattern[str]
    advise: Callable[[_Group], tuple[str, str]]


_FORMATS = tuple(
    _Format(kind, re.compile(f"(?:.*/)?{pattern}"), advise)
    for kind, pattern, advise in (
        ("files of Megatron", r"mp_rank_\d+(?:_\d+)*/(?:model_optim_rng|model_rng)\.pt", _find_megatron),
        ("files of DeepSpeed", _ZERO.pattern, _find_zero),
        ("files of DeepSpeed", _RANK.pattern, _find_ranks),
        ("files of torch.distributed", r"[^/]+\.distcp", _find_torch_distributed),
        ("files of verl", r"model_world_size_\d+_rank_\d+\.pt", _find_verl),
        ("NeMo archives", r"[^/]+\.nemo", _find_nemo),
        ("pickles", rf"[^/]+(?:{'|'.join(map(re.escape, PICKLES))})", _find_pickles),
        ("weights in other formats", r"[^/]+", _find_others),
    )
)
"""The most telling first."""
