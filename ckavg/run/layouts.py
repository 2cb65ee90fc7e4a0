"""Stage *discover*: which names are checkpoints, and which step each name states. Pure: looks at names alone."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

Clock = Literal["step", "save", "epoch"]

_WORDS: dict[str, Clock] = {
    "checkpoint-": "step",
    "checkpoint_": "save",  # accelerate counts its saves; HF Trainer writes a hyphen and counts steps
    "step": "step",
    "epoch": "epoch",
}

_NUMBERED = re.compile(
    r"""(?P<prefix>(?:[\w.-]*[-_.])?)        # model-, global_, run.3-
        (?P<word>checkpoint[-_]|ckpt|step|epoch|iter(?:ation)?)
        [-_=]?(?P<number>\d+)
        (?P<suffix>(?:[-_]tokens[\w.]+)?)    # stage1-step1000-tokens5B
    """,
    re.VERBOSE | re.IGNORECASE | re.ASCII,
)
_BARE = re.compile(r"\d+", re.ASCII)
_STAGE = re.compile(r"(stage\d+|phase\d+)", re.IGNORECASE)
_MAX_DIGITS = 18


@dataclass(frozen=True, slots=True)
class Label:
    """What a checkpoint's name says: its number, what that number counts, and the stage it belongs to (often none)."""

    number: int
    clock: Clock
    stage: str


def read_label(stem: str) -> Label | None:
    """Read the step from the name of a directory, or of a file without its ending; None where there is none.

    >>> read_label("checkpoint-1200")
    Label(number=1200, clock='step', stage='')
    >>> read_label("stage1-step1000-tokens5B")
    Label(number=1000, clock='step', stage='stage1')
    >>> read_label("iter_0001000").number, read_label("model-step-100").number, read_label("100").number
    (1000, 100, 100)
    >>> read_label("model-00001-of-00003") is None
    True
    """
    if _BARE.fullmatch(stem):
        return Label(int(stem), "step", "") if len(stem) <= _MAX_DIGITS else None
    match = _NUMBERED.fullmatch(stem)
    if match is None or len(match["number"]) > _MAX_DIGITS:
        return None
    word = match["word"].lower()
    clock: Clock = next((clock for start, clock in _WORDS.items() if word.startswith(start)), "step")
    stage = _STAGE.search(match["prefix"])
    return Label(int(match["number"]), clock, stage.group().lower() if stage else "")


_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".distcp", ".nemo", ".h5", ".msgpack", ".gguf")
_NOT_WEIGHTS = ("optimizer", "scheduler", "scaler", "rng_state", "training_args", "random_states")

_CONVERT = (
    "python -c \"from transformers import AutoModelForCausalLM as M; M.from_pretrained('{0}').save_pretrained('{0}')\""
)
_CONVERSIONS = (
    (re.compile(r".*\.distcp"), "accelerate merge-weights {0} {0}"),
    (re.compile(r"(zero_pp_rank|mp_rank)_.*"), "python {0}/zero_to_fp32.py {0} {0} --safe_serialization"),
    (re.compile(r"pytorch_model.*\.bin"), _CONVERT),
)


def foreign_weights(names: list[str]) -> str | None:
    """The first of the file names that holds weights in a format ckavg does not read; None where there is none.

    >>> foreign_weights(["config.json", "optimizer.pt", "pytorch_model.bin"])
    'pytorch_model.bin'
    """
    for name in sorted(names):
        if name.endswith(_PICKLES) and not name.startswith(_NOT_WEIGHTS):
            return name
    return None


def conversion(name: str, where: str) -> str:
    """What to do about weights in the foreign file `name` in the directory `where`: a sentence with a command."""
    for pattern, command in _CONVERSIONS:
        if pattern.fullmatch(name):
            return f"ckavg never unpickles. Convert it to safetensors: {command.format(where)}"
    return "ckavg reads safetensors only and never unpickles. Save the checkpoints as safetensors."
