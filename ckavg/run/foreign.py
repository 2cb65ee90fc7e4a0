"""Stage *discover*: weights in formats that are not read, and the command that converts each. Looks at names alone.

Nothing is ever unpickled here. The commands load pickles with `weights_only=True`, or are the trainer's own.
"""

from __future__ import annotations

import os
import re
import shlex
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from ckavg.run.layouts import read_label

PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".distcp", ".nemo", ".h5", ".msgpack", ".gguf", ".npz")
_NOT_WEIGHTS = re.compile(
    r"optimizer.*|scheduler.*|scaler.*|rng_state.*|training_args.*|random_states.*|sampler.*|dl_state.*|"
    r"custom_checkpoint.*|.*_optim_states\.pt|common\.pt"
)
_ZERO = re.compile(r"(?:bf16_|fp16_)?zero_pp_rank_\d+_mp_rank_\d+_(?:model|optim)_states\.pt")
_TAG = re.compile(r"global_step\d+")
_MOST_NAMES = 2000
_DEEPEST = 5


@dataclass(frozen=True, slots=True)
class Foreign:
    """Weights that are not read.

    Attributes:
        name: the file that gives them away, by path relative to the checkpoint.
        advice: what to do: a sentence with a command.
    """

    name: str
    advice: str


def foreign_weights(names: Iterable[str]) -> str | None:
    """The first of the files that holds weights in a format that is not read; None where there is none.

    >>> foreign_weights(["config.json", "optimizer.pt", "pytorch_model.bin"])
    'pytorch_model.bin'
    """
    return next(iter(sorted(name for name in names if _is_foreign(name))), None)


def find_foreign(path: Path) -> Foreign | None:
    """The weights in another format that a directory, or a file, holds; None where there are none.

    Raises:
        OSError: the system would not let us list it.
    """
    names = sorted(_names_below(path)) if path.is_dir() else [path.name]
    found = [name for name in names if _is_foreign(name.rpartition("/")[2]) or _ZERO.fullmatch(name.rpartition("/")[2])]
    for recognised, advise in _FORMATS:
        name = next((name for name in found if recognised.fullmatch(name)), None)
        if name is not None:
            return Foreign(name, advise(path, name, found))
    return Foreign(found[0], "Save the checkpoints as safetensors; ckavg reads nothing else.") if found else None


def _is_foreign(name: str) -> bool:
    return name.endswith(PICKLES) and _NOT_WEIGHTS.fullmatch(name.rpartition("/")[2]) is None


def _names_below(path: Path) -> Iterator[str]:
    """Files of a directory and of those in it, a bounded number of them, by relative path."""
    left = _MOST_NAMES
    for folder, folders, files in os.walk(path):
        place = Path(folder).relative_to(path)
        folders[:] = sorted(name for name in folders if not name.startswith("optimizer_"))
        if len(place.parts) >= _DEEPEST:
            folders.clear()
        for name in sorted(files)[:left]:
            yield (place / name).as_posix()
        left -= len(files)
        if left <= 0:
            return


# --- what converts each ---

_ONE_FILE = (
    "import torch; from safetensors.torch import save_file; w = torch.load({0}, map_location='cpu', weights_only=True)"
    "{1}; save_file({{k: v.clone().contiguous() for k, v in w.items()}}, {2}, {{'format': 'pt'}})"
)


def _python(code: str) -> str:
    plain = not set(code) & set('"$`\\!')  # double quotes read better, where nothing in them means anything to a shell
    return f'python -c "{code}"' if plain else f"python -c {shlex.quote(code)}"


def _convert(command: str) -> str:
    return f"ckavg never unpickles. Convert it to safetensors: {command}"


def _one_file(source: Path, target: Path, key: str = "") -> str:
    return _python(_ONE_FILE.format(repr(str(source)), key, repr(str(target))))


def _of_transformers(path: Path, name: str, found: list[str]) -> str:
    where = repr(str((path / name).parent))
    return _convert(
        _python(
            f"from transformers import AutoModelForCausalLM as M; M.from_pretrained({where}).save_pretrained({where})"
        )
    )


def _of_diffusers(path: Path, name: str, found: list[str]) -> str:
    where = repr(str((path / name).parent))
    return _convert(
        _python(f"from diffusers import AutoModel as M; M.from_pretrained({where}).save_pretrained({where})")
    )


def _of_torch_distributed(path: Path, name: str, found: list[str]) -> str:
    folder = (path / name).parent
    if folder.parts[-2:] == ("policy", "weights") or folder.parts[-3:-1] == ("policy", "weights"):
        where, weights = shlex.quote(str(path)), shlex.quote(str(path / "policy" / "weights"))
        return _convert(
            f"uv run examples/converters/convert_dcp_to_hf.py --config={where}/config.yaml --dcp-ckpt-path={weights} "
            f"--hf-ckpt-path={_beside(path)}"
        )
    if path.name.startswith("iter_"):
        return _of_megatron(path, name, found)
    if path.suffix == ".ckpt":
        one = path.with_name(f"{path.name}.consolidated")
        command = f"python -m lightning.pytorch.utilities.consolidate_checkpoint {shlex.quote(str(path))}"
        return _convert(f"{command} && {_of_lightning(one, one.name, found).partition(': ')[2]}")
    return _convert(f"accelerate merge-weights {shlex.quote(str(folder))} {shlex.quote(str(path))}")


def _of_megatron(path: Path, name: str, found: list[str]) -> str:
    code = f"AutoBridge.from_hf_pretrained('BASE_MODEL').export_ckpt({str(path)!r}, {str(_converted(path))!r})"
    return _convert(_python(f"from megatron.bridge import AutoBridge; {code}") + " (Megatron Bridge)")


def _of_deepspeed(path: Path, name: str, found: list[str]) -> str:
    """Of a Trainer's checkpoint, which holds the tag's folder and the script; or of the tag's folder itself."""
    zero = [each for each in found if _ZERO.fullmatch(each.rpartition("/")[2])]
    if not zero:
        ranks = [each for each in found if re.fullmatch(r"(?:.*/)?mp_rank_\d+_model_states\.pt", each)]
        if len(ranks) == 1:
            at = path / ranks[0]
            target = _converted(path) if _TAG.fullmatch(path.name) else path
            made = f"mkdir -p {shlex.quote(str(target))} && " if target != path else ""
            return _convert(made + _one_file(at, target / "model.safetensors", "['module']"))
        return _convert(
            "these are tensor-parallel pieces, which only the program that trained the model can join; for GPT-NeoX: "
            f"python tools/ckpts/convert_neox_to_hf.py --input_dir {shlex.quote(str(path))} --config_file CONFIG.yml "
            f"--output_dir {_beside(path)}"
        )
    inside = Path(zero[0]).parent
    tag = inside.name if inside.parts else path.name
    root = path / inside.parent if inside.parts else path.parent
    target = path if inside.parts and path.suffix != ".ckpt" else _converted(path)
    quoted = shlex.quote(str(root))
    command = f"python {quoted}/zero_to_fp32.py {quoted} {shlex.quote(str(target))} --safe_serialization"
    return _convert(f"{command} --tag {shlex.quote(tag)}")


def _of_lightning(path: Path, name: str, found: list[str]) -> str:
    stated = re.search(r"step[-_=]?(\d+)", name)
    at = path / name if path.is_dir() else path
    target = at.parent / f"step_{int(stated[1]) if stated else 'N'}.safetensors"
    return _convert(_one_file(at, target, "['state_dict']"))


def _of_nemo(path: Path, name: str, found: list[str]) -> str:
    at = path / name if path.is_dir() else path
    return _convert(
        "python scripts/checkpoint_converters/convert_llama_nemo_to_hf.py "
        f"--input_name_or_path {shlex.quote(str(at))} --output_path pytorch_model.bin --hf_input_path BASE_MODEL "
        f"--hf_output_path {_beside(at)} (NeMo has one such script for each family of models)"
    )


def _of_verl(path: Path, name: str, found: list[str]) -> str:
    local = shlex.quote(str((path / name).parent))
    return _convert(
        f"python -m verl.model_merger merge --backend fsdp --local_dir {local} --target_dir {_beside(path)}"
    )


def _of_pickle(path: Path, name: str, found: list[str]) -> str:
    at = path / name if path.is_dir() else path
    return _convert(_one_file(at, at.with_suffix(".safetensors")))


def _of_none(path: Path, name: str, found: list[str]) -> str:
    return "Save the checkpoints as safetensors; ckavg reads nothing else."


def _converted(path: Path) -> Path:
    """Where a converted checkpoint goes: into another directory, so that its step is there once."""
    label = read_label(path.name)
    return path.parent.with_name(f"{path.parent.name}-safetensors") / (f"step_{label.number}" if label else path.name)


def _beside(path: Path) -> str:
    return shlex.quote(str(_converted(path)))


_FORMATS: tuple[tuple[re.Pattern[str], Callable[[Path, str, list[str]], str]], ...] = (
    (re.compile(r"(?:.*/)?mp_rank_\d+(?:_\d+)*/(?:model_optim_rng|model_rng)\.pt"), _of_megatron),
    (re.compile(rf"(?:.*/)?(?:{_ZERO.pattern}|mp_rank_\d+_model_states\.pt)"), _of_deepspeed),
    (re.compile(r"(?:.*/)?[^/]+\.distcp"), _of_torch_distributed),
    (re.compile(r"(?:.*/)?model_world_size_\d+_rank_\d+\.pt"), _of_verl),
    (re.compile(r"(?:.*/)?[^/]+\.nemo"), _of_nemo),
    (re.compile(r"(?:.*/)?[^/]+\.ckpt"), _of_lightning),
    (re.compile(r"(?:.*/)?pytorch_model[^/]*\.bin"), _of_transformers),
    (re.compile(r"(?:.*/)?diffusion_pytorch_model[^/]*\.bin"), _of_diffusers),
    (re.compile(r"(?:.*/)?[^/]+\.(?:bin|pt|pth|pkl)"), _of_pickle),
    (re.compile(r"(?:.*/)?[^/]+\.(?:h5|msgpack|gguf|npz)"), _of_none),
)
"""What gives each format away, the most telling first, and what to advise."""
