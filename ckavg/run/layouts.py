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
    r"""(?P<prefix>(?:[\w.=-]*[-_.])?)       # model-, global_, run.3-, epoch=1-
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


_UNSTATED = re.compile(
    r"(?:.*[-_.])?(?:checkpoint|ckpt|step|epoch)s?(?:[-_.].*)?|(?:.*[-_.])?(?:best|final|last|latest)(?:[-_.].*)?",
    re.IGNORECASE | re.ASCII,
)
_HALF_WRITTEN = re.compile(
    r"(?:tmp[-_.].+|.+[-_.](?:tmp|temp|partial|incomplete|ckavg-partial))", re.IGNORECASE | re.ASCII
)
_AVERAGED = re.compile(r".*[-_.]ema", re.IGNORECASE | re.ASCII)
_NO_WEIGHTS_IN = (".", "runs", "logs", "wandb", "averaged", "__pycache__", "pytorch_model_fsdp_", "optimizer_")


def looks_unstated(stem: str) -> bool:
    """Whether a name is one for a checkpoint, but says no step.

    >>> [looks_unstated(stem) for stem in ("checkpoint-best", "final", "best_model", "last", "unet", "runs")]
    [True, True, True, True, False, False]
    """
    return read_label(stem) is None and _UNSTATED.fullmatch(stem) is not None


def is_half_written(name: str) -> bool:
    """Whether a name is one that trainers give to a checkpoint while they write it: `tmp-checkpoint-500`."""
    return _HALF_WRITTEN.fullmatch(name) is not None


def is_averaged(folder: str) -> bool:
    """Whether a folder holds an average that training made: `unet_ema`."""
    return _AVERAGED.fullmatch(folder) is not None


def may_hold_model(folder: str) -> bool:
    """Whether a folder of a checkpoint may belong to the model, rather than to its training.

    >>> [may_hold_model(folder) for folder in ("unet", "tokenizer", "global_step500", "optimizer_0", ".cache")]
    [True, True, False, False, False]
    """
    return not folder.startswith(_NO_WEIGHTS_IN) and read_label(folder) is None
