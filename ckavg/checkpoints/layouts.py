"""Stage *discover*: which names are checkpoints of one run, and which step each states. Pure: looks only at names.

Names in one directory with the same stem and a varying number are one run: `checkpoint-100`, `mylora-000002`,
`0000100_adapters`, `stage1-step1000-tokens5B`. If a word says what a number counts, that number is the step; otherwise
the varying number is. The rest of the name is the stem, and two stems are two runs.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Literal

Clock = Literal["step", "save", "epoch", "number"]
"""What the number in a name counts; `number` if unknown."""

_STEP_WORDS = frozenset(
    {"step", "steps", "globalstep", "iter", "iters", "iteration", "iterations", "it", "ba", "update", "updates"}
)
_SAVE_WORDS = frozenset({"checkpoint", "checkpoints", "ckpt", "chkpt", "save"})
_EPOCH_WORDS = frozenset({"epoch", "epochs", "ep"})
_COMPANIONS = _EPOCH_WORDS | {"tokens", "tok", "samples", "loss", "acc", "accuracy", "ppl"}
"""Words whose numbers change with the step, and do not distinguish runs."""

_PARTS = frozenset(
    {
        "block", "component", "decoder", "dense", "encoder", "exp", "experiment", "expert", "experts", "fold", "gpu",
        "ingredient", "layer", "layers", "module", "part", "phase", "rank", "run", "seed", "shard", "stage", "trial",
        "v", "version", "worker",
    }
)  # fmt: skip
"""Words whose numbers distinguish runs or parts of a model: never a step."""

_TOKEN = re.compile(
    r"(?P<time>(?:19|20)\d\d[-_.]?[01]\d[-_.]?[0-3]\d(?:[T_ -]?[0-2]\d[-_:.h]?[0-5]\d(?:[-_:.m]?[0-5]\d)?)(?!\d)"
    r"|(?:19|20)\d\d-[01]\d-[0-3]\d(?!\d))"
    r"|(?P<decimal>\d+\.\d+(?![.\d]))"
    r"|(?P<number>\d+)(?P<unit>[kKmMbB](?![A-Za-z]))?",
    re.ASCII,
)
_WORD = re.compile(r"([A-Za-z]+)([-_=. ]{0,2})$", re.ASCII)
_LETTERS = re.compile(r"[^\W\d_]+")
_GLOBAL = re.compile(r"(?:^|[-_. ])global[-_. ]?$", re.IGNORECASE | re.ASCII)
_BARE = re.compile(r"\d+[kKmM]?", re.ASCII)
_UNITS = {"": 1, "k": 1_000, "m": 1_000_000}
_SHARD = re.compile(r".*-\d+-of-\d+|(?:consolidated|tp_rank|pp_rank)[-_.]\d+", re.IGNORECASE | re.ASCII)
_SECOND = re.compile(r"model_\d+", re.ASCII)
_LEAST = 10
_END = re.compile(r"(?:^|[-_. ])(?:final|last|latest|end)$", re.IGNORECASE | re.ASCII)
_MAX_DIGITS = 18
_SEPARATORS = "-_=. "


@dataclass(frozen=True, slots=True)
class Label:
    """What a checkpoint's name says.

    Attributes:
        number: its number; None for a final file without one.
        clock: what that number counts.
        stem: the rest of the name, the same for all checkpoints of a run; often empty.
    """

    number: int | None
    clock: Clock
    stem: str


@dataclass(frozen=True, slots=True)
class _Number:
    """A number in a name: its word begins at `start`, its digits at `digits`."""

    start: int
    digits: int
    end: int
    value: int
    word: str
    separator: str
    unit: str
    is_glued: bool

    @property
    def clock(self) -> Clock | None:
        """What it counts, judged by its word."""
        if self.is_glued:
            return None
        if self.word in _STEP_WORDS:
            return "step"
        if self.word in _SAVE_WORDS:  # accelerate counts its saves; HF Trainer writes a hyphen and counts steps
            return "save" if self.word == "checkpoint" and self.separator == "_" else "step"
        return "epoch" if self.word in _EPOCH_WORDS else None

    @property
    def may_count(self) -> bool:
        """Whether it may be a step, judged by its word and its unit."""
        return self.word not in _PARTS | _COMPANIONS and self.unit in _UNITS and not self.is_glued


def read_label(stem: str) -> Label | None:
    """Read the step from a single name, of a directory or of a file without its suffix; None if it states none.

    >>> read_label("checkpoint-1200")
    Label(number=1200, clock='step', stem='')
    >>> read_label("stage1-step1000-tokens5B")
    Label(number=1000, clock='step', stem='stage1')
    >>> read_label("iter_0001000").number, read_label("epoch=1-step=100").number, read_label("100k").number
    (1000, 100, 100000)
    >>> read_label("model-00001-of-00003"), read_label("mylora-000002")
    (None, None)
    """
    numbers = _numbers(stem)
    counting = [number for number in numbers if number.clock is not None]
    if counting and not _SHARD.fullmatch(stem):
        return _label(stem, numbers, min(reversed(counting), key=_rank))
    bare = len(numbers) == 1 and (numbers[0].digits, numbers[0].end) == (0, len(stem)) and numbers[0].may_count
    return _label(stem, numbers, numbers[0]) if bare else None


def label_run(
    folders: Collection[str], files: Collection[str], holds_weights: Callable[[str], bool], *, is_one_model: bool
) -> dict[str, Label]:
    """The names that are checkpoints, with their labels: folders first, then weight files, with the safetensors suffix.

    A word such as `step` makes a folder a checkpoint even without weights: it may still be written. A number alone
    needs weights, and a number after any other word counts only if no folder has a better name. With `is_one_model`,
    the folders are parts of one model.
    """
    labels = {
        name: label
        for name in folders
        if (label := read_label(name)) is not None and (not _BARE.fullmatch(name) or holds_weights(name))
    }
    if not labels and not is_one_model:
        found = read_labels([name for name in folders if holds_weights(name)])
        numbered = {name: label for name, label in found.items() if label.number is not None}
        labels = numbered if max((label.number or 0 for label in numbered.values()), default=0) >= _LEAST else {}
    flat = [name for name in files if not (is_training_state(name) or ("model" in files and _SECOND.fullmatch(name)))]
    return labels | {f"{name}{WEIGHTS}": label for name, label in read_labels(flat).items()}


def label_revisions(names: Collection[str]) -> dict[str, Label]:
    """The revisions of a repository that are checkpoints: those whose names state a step."""
    labels = label_run(names, [], lambda name: True, is_one_model=False) or read_labels(names)
    return {name: label for name, label in labels.items() if label.number is not None}


def read_labels(stems: Collection[str]) -> dict[str, Label]:
    """Read the steps from the names in one directory; names that are not checkpoints are left out.

    >>> labels = read_labels(["mylora-000002", "mylora-000001", "mylora", "vae"])
    >>> labels["mylora-000001"]
    Label(number=1, clock='number', stem='mylora')
    >>> labels["mylora"], "vae" in labels
    (Label(number=None, clock='number', stem='mylora'), False)
    >>> sorted({label.stem for label in read_labels(["a_v1_10", "a_v1_20", "a_v2_10"]).values()})
    ['a_v1', 'a_v2']
    """
    labels = {stem: label for stem in stems if (label := read_label(stem)) is not None}
    alike: dict[str, dict[str, list[_Number]]] = defaultdict(dict)
    for stem in stems:
        if stem not in labels and not _SHARD.fullmatch(stem) and (numbers := _numbers(stem)):
            alike[re.sub(r"\d+", "#", stem, flags=re.ASCII)][stem] = numbers
    single: dict[str, Label] = {}
    for group in alike.values():
        if len(group) == 1:
            ((stem, numbers),) = group.items()
            may_be = [number for number in numbers if number.may_count]
            if may_be:
                single[stem] = _label(stem, numbers, may_be[-1])
            continue
        place = _varying(list(group.values()))
        if place is not None:
            labels |= {stem: _label(stem, numbers, numbers[place]) for stem, numbers in group.items()}
    ends = {stem: Label(None, "number", _END.sub("", stem).strip(_SEPARATORS)) for stem in stems if stem not in labels}
    known = {label.stem for label in labels.values()} | {stem for stem in ends if stem not in single}
    labels |= {stem: label for stem, label in single.items() if label.stem in known and label.stem}
    counted = {label.stem for label in labels.values()} - {""}
    return labels | {stem: end for stem, end in ends.items() if stem not in labels and end.stem in counted}


def _rank(number: _Number) -> int:
    """The preference among several numbers in a name: steps, then saves, then epochs."""
    return 0 if number.word in _STEP_WORDS else 1 if number.word in _SAVE_WORDS else 2


def _varying(group: list[list[_Number]]) -> int | None:
    """The last position at which the numbers of similar names differ and may be steps."""
    for place in reversed(range(len(group[0]))):
        numbers = [each[place] for each in group]
        if all(each.may_count for each in numbers) and len({each.value for each in numbers}) > 1:
            return place
    return None


def _numbers(stem: str) -> list[_Number]:
    found = []
    for match in _TOKEN.finditer(stem):
        digits = match["number"]
        if digits is None or len(digits) > _MAX_DIGITS:
            continue
        word = _WORD.search(stem, 0, match.start())
        unit = (match["unit"] or "").lower()
        start = match.start() if word is None else word.start(1)
        named, separator = ("", "") if word is None else (word[1].lower(), word[2])
        value = int(digits) * _UNITS.get(unit, 1)
        behind = _LETTERS.match(stem, match.end())
        if behind is not None and behind[0].lower() in _STEP_WORDS | _EPOCH_WORDS:  # 500steps
            words = match.start(), match.start(), behind.end(), value, behind[0].lower(), "", unit, False
            found.append(_Number(*words))
            continue
        is_glued = behind is not None  # 30x is not 30
        found.append(_Number(start, match.start(), match.end(), value, named, separator, unit, is_glued))
    return found


def _label(stem: str, numbers: list[_Number], step: _Number) -> Label:
    """The label with this number as its step; numbers that change with it are removed from the stem."""
    begin = step.start if step.clock else step.digits
    spans = [(begin, step.end)]
    if step.word in _STEP_WORDS and (found := _GLOBAL.search(stem, 0, begin)):
        spans.append((found.start(), begin))
    after = step.end
    for number in numbers:  # epoch and batch, which some trainers put after the step: save-500-2-0
        if number.start >= after and not number.word and not stem[after : number.digits].strip(_SEPARATORS):
            spans.append((after, number.end))
            after = number.end
    spans += [(each.start, each.end) for each in numbers if each.word in _COMPANIONS and each != step]
    for match in _TOKEN.finditer(stem):
        if match["time"]:
            spans.append(match.span())
        elif match["decimal"] and (word := _WORD.search(stem, 0, match.start())):
            if word[2].endswith("="):
                spans.append((stem.rfind("-", 0, match.start()) + 1, match.end()))
            elif word[1].lower() in _COMPANIONS:
                spans.append((word.start(), match.end()))
    kept = _cut(stem, spans)
    return Label(step.value, step.clock or ("step" if not kept else "number"), kept)


def _cut(stem: str, spans: list[tuple[int, int]]) -> str:
    """A name without some spans, the rest joined by the separators between them."""
    pieces, end = [], 0
    for start, stop in sorted(spans):
        if start >= end:
            pieces.append(stem[end:start])
        end = max(end, stop)
    pieces.append(stem[end:])
    kept = ""
    for piece in pieces:
        bare = piece.strip(_SEPARATORS)
        if bare:
            mark = piece[:1] if piece[:1] in _SEPARATORS else "-"
            kept += (mark if kept else "") + bare
    return kept


# --- names of weight files ---

WEIGHTS = ".safetensors"
PICKLED = (".bin", ".pt", ".pth", ".th", ".ckpt", ".pt.tar", ".pth.tar")
"""Suffixes of files of `torch.save`."""

_ENDING = re.compile(
    rf"(.+?)(?:{'|'.join(map(re.escape, (WEIGHTS, *reversed(PICKLED))))})(\.index(?:\.[\w-]+)?\.json)?", re.ASCII
)
_TORCH_NAME = re.compile(r"^pytorch_model(?:_fsdp)?(?![A-Za-z])")


def stem_of(name: str) -> str:
    """The name of a weight file without its suffix; any other name unchanged.

    >>> stem_of("checkpoint-12.pth.tar"), stem_of("epoch=1-step=100.ckpt"), stem_of("model-v1.5"), stem_of("step_5")
    ('checkpoint-12', 'epoch=1-step=100', 'model-v1.5', 'step_5')
    """
    found = _ENDING.fullmatch(name)
    return name if found is None or found[2] else found[1]


def as_safetensors(name: str) -> str:
    """The name in a result of a weight file of a checkpoint, or of an index.

    >>> as_safetensors("pytorch_model-00001-of-00002.bin"), as_safetensors("pytorch_model.bin.index.json")
    ('model-00001-of-00002.safetensors', 'model.safetensors.index.json')
    >>> as_safetensors("adapter_model.bin"), as_safetensors("lit_model.pth"), as_safetensors("unet.safetensors")
    ('adapter_model.safetensors', 'lit_model.safetensors', 'unet.safetensors')
    """
    found = _ENDING.fullmatch(name)
    return name if found is None else f"{_TORCH_NAME.sub('model', found[1])}{WEIGHTS}{found[2] or ''}"


# --- other names ---

_HALF_WRITTEN = re.compile(
    r"(?:tmp[-_.].+|.+[-_.](?:tmp|temp|partial|incomplete|ckavg-partial))", re.IGNORECASE | re.ASCII
)
_AVERAGED = re.compile(r"(?:.*[-_.])?(?<!non_)(?:ema|swa|avg|averaged|shadow)(?:[-_.].*)?", re.IGNORECASE | re.ASCII)
_TRAINING_STATE = re.compile(
    r"(?:.*[-_.])?(?:train(?:ing|er)?[-_]state|optim(?:izer)?s?|(?:lr[-_])?schedulers?|rng|random[-_]states?|grad[-_]scaler"
    r"|scaler|data(?:loader|sampler)|sampler|master[-_](?:weights|params))(?:[-_.\d].*)?",
    re.IGNORECASE | re.ASCII,
)
_NO_WEIGHTS_IN = (".", "runs", "logs", "wandb", "averaged", "__pycache__", "pytorch_model_fsdp_")
_NUMBERED = re.compile(r"\d{1,4}", re.ASCII)


def is_half_written(name: str) -> bool:
    """Whether trainers use the name for a checkpoint that they are writing: `tmp-checkpoint-500`."""
    return _HALF_WRITTEN.fullmatch(name) is not None


def is_averaged(name: str) -> bool:
    """Whether a folder, or a weight file without its suffix, holds an average made in training: `unet_ema`."""
    return _AVERAGED.fullmatch(name) is not None


def is_training_state(name: str) -> bool:
    """Whether a folder, or a file without its suffix, holds training state rather than the model.

    >>> [is_training_state(name) for name in ("training_state", "optimizer_0", "rng_state", "optimus", "unet")]
    [True, True, True, False, False]
    """
    return _TRAINING_STATE.fullmatch(name) is not None


def may_hold_model(folder: str, depth: int = 0) -> bool:
    """Whether a folder of a checkpoint may belong to the model, by its name. If it is `depth` folders below the
    checkpoint, a number is that of a layer.

    >>> [may_hold_model(folder) for folder in ("unet", "tokenizer", "global_step500", "runs", ".cache", "0")]
    [True, True, False, False, False, False]
    >>> may_hold_model("0", depth=2)
    True
    """
    if folder.startswith(_NO_WEIGHTS_IN):
        return False
    return read_label(folder) is None or (depth > 0 and _NUMBERED.fullmatch(folder) is not None)
