"""Stage *discover*: which files in a checkpoint's directory are weights of the model. Lists folders; opens no file.

A weight file belongs to the model unless it is training state, an average made in training, or another copy of the
weights beside it. Left-out files are returned with the reason.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace

from ckavg.checkpoints.layouts import WEIGHTS, as_safetensors, is_averaged, is_training_state, may_hold_model
from ckavg.checkpoints.run import Kind, WhyLeftOut
from ckavg.checkpoints.unsupported import PICKLES, holds_pickles_alone, is_pickled, unsupported_weights
from ckavg.errors import UnsupportedFormatError
from ckavg.storage.base import AnyPath, Listing
from ckavg.storage.local import is_link, storage_of

ADAPTERS = ("adapter_model.safetensors", "pytorch_lora_weights.safetensors")
"""The file names of adapters in PEFT and diffusers."""

_MODELS = ("model", "diffusion_pytorch_model")
_INDEX = re.compile(r".+\.safetensors\.index(?:\.[\w-]+)?\.json", re.ASCII)
_WHOLE = re.compile(r"(?:ft-)?model.*|consolidated.*|.*-\d+-of-\d+\.safetensors", re.ASCII)
_PICKLED = re.compile(r"(?:(?:diffusion_)?pytorch_model|adapter_model|pytorch_lora_weights)\b.*\.bin", re.ASCII)
"""Pickles that are models by their names, regardless of other files."""

_COUNTED = re.compile(r"-\d+-of-\d+$", re.ASCII)
_CONSOLIDATED = re.compile(r"consolidated(?:[-_.]\d+)?", re.ASCII)
_SECOND = re.compile(r"model_\d+", re.ASCII)
_VARIANT = re.compile(
    r"(?:fp|bf|f|int|uint|nf|q)\d+|\d+bit|half|pruned|non|no|ema|quant\w*|gguf|awq|gptq|onnx|original", re.ASCII
)
_DEEPEST = 8

LeftOut = tuple[WhyLeftOut, str]
"""Why weights are not read, and their relative path."""


@dataclass(frozen=True, slots=True)
class Weights:
    """The weights of one folder that a loader would use, as files or an index that lists them. `others` are all weight
    files that may belong to the model. Pickles appear with the names they would have as safetensors; `pickled` maps
    those to their own.
    """

    folder: AnyPath
    kind: Kind
    files: tuple[str, ...]
    index: str
    others: frozenset[str]
    pickled: Mapping[str, str] = field(default_factory=dict)


def list_folder(directory: AnyPath) -> Listing:
    """The names in a directory; anything named like a weight file counts as one.

    Raises:
        OSError: it cannot be listed.
    """
    found = storage_of(directory).list(directory)
    named = {name for name in found.folders if name.endswith(WEIGHTS)}
    return Listing(found.files | named, tuple(name for name in found.folders if name not in named))


def holds_weights(directory: AnyPath) -> bool:
    """Whether the directory itself holds safetensors weights, complete or not; False if it cannot be listed."""
    try:
        return _has_weights(list_folder(directory).files)
    except OSError:
        return False


def find_weights(directory: AnyPath, own: Iterable[str] = ()) -> tuple[list[Weights], list[LeftOut]]:
    """The weights of a checkpoint, in its directory and its folders, and what is left out.

    Args:
        directory: of the checkpoint.
        own: folders that belong to the model regardless of their names: those listed in `model_index.json`.

    Raises:
        UnsupportedFormatError: a folder holds several models, and none has the name that loaders look for.
        OSError: a folder cannot be listed.
    """
    found: list[Weights] = []
    left_out: list[LeftOut] = []
    pickled: list[Weights] = []
    others: list[str] = []
    for folder, files in _walk(directory, directory, frozenset(own), left_out, depth=0):
        place = "" if folder == directory else f"{folder.relative_to(directory).as_posix()}/"
        names = frozenset(name for name in files if name.endswith(WEIGHTS))
        excluded = {name: why for name in names if (why := _not_of_model(name)) is not None}
        weights = _choose(folder, names - excluded.keys(), files)
        found += [] if weights is None else [weights]
        pickled += _choose_pickles(folder, files) if weights is None else []
        left_out += [(why, place + name) for name, why in sorted(excluded.items())]
        others += sorted(place + name for name in files if unsupported_weights([name]) is not None)
    if found or not holds_pickles_alone(directory):
        pickled = [each for each in pickled if any(map(_PICKLED.fullmatch, each.pickled.values()))]
    found += pickled
    read = {each.folder / name for each in pickled for name in each.pickled.values()}
    left_out += [
        ("pickle" if name.endswith(PICKLES) else "other format", name)
        for name in others
        if directory / name not in read
    ]
    return found, left_out


def _choose_pickles(folder: AnyPath, files: frozenset[str]) -> list[Weights]:
    """The pickles of a folder that a loader would use, under the names they would have as safetensors."""
    pickled: dict[str, str] = {}
    for name in sorted(files, key=lambda name: (_PICKLED.fullmatch(name) is None, name)):
        if is_pickled(name) and not _not_of_model(as_safetensors(name)):
            pickled.setdefault(
                as_safetensors(name), name
            )  # of two files for one model, prefer the one that loaders look for
    weights = _choose(folder, frozenset(pickled), frozenset(map(as_safetensors, files)))
    return [] if weights is None or not pickled else [replace(weights, pickled=pickled)]


def _choose(folder: AnyPath, weights: frozenset[str], names: frozenset[str]) -> Weights | None:
    """The weights that a loader would use from the files of a folder; None if there are none.

    As in loaders, `model.safetensors` comes before an index, and both before files without an index. An adapter beside
    a whole model is not read.
    """
    for stem in _MODELS:
        if f"{stem}{WEIGHTS}" in weights:
            return Weights(folder, "model", (f"{stem}{WEIGHTS}",), "", weights)
        if f"{stem}{WEIGHTS}.index.json" in names:
            return Weights(folder, "model", (), f"{stem}{WEIGHTS}.index.json", weights)
    indexes = sorted(name for name in names if _INDEX.fullmatch(name))
    if len(indexes) > 1:
        raise UnsupportedFormatError(
            f"{folder} holds several models, each with an index: {', '.join(indexes[:4])}.",
            hint="Keep only the one to average, or rename its index to model.safetensors.index.json.",
        )
    if indexes:
        return Weights(folder, "model", (), indexes[0], weights)
    own = weights.difference(ADAPTERS)
    adapters = tuple(name for name in ADAPTERS if name in weights)
    if adapters and not any(_WHOLE.fullmatch(name) for name in own):
        return Weights(folder, "adapter", adapters[:1], "", weights)
    families = by_family(own)
    whole = [name for stem, of_stem in families.items() if not _CONSOLIDATED.fullmatch(stem) for name in of_stem]
    return Weights(folder, "model", tuple(sorted(whole or own)), "", weights) if own else None


def beside(weights: Weights, used: Collection[str]) -> tuple[dict[str, tuple[str, ...]], list[tuple[WhyLeftOut, str]]]:
    """Parts of the model beside the files that a loader uses, each with its files; and what is left out, and why."""
    stems = set(by_family(used))
    parts: dict[str, tuple[str, ...]] = {}
    left_out: list[tuple[WhyLeftOut, str]] = []
    for stem, names in by_family(weights.others.difference(used)).items():
        why: WhyLeftOut | None = None
        if weights.kind == "model" and set(names) & set(ADAPTERS):
            why = "adapter"
        elif _SECOND.fullmatch(stem) and "model" in stems:
            why = "second model"
        elif _CONSOLIDATED.fullmatch(stem) or _without_variant(stem) in [re.split(r"[-_.]", each) for each in stems]:
            why = "copy"  # in another dtype, in one piece, or from an earlier save
        if why is None:
            parts[stem + WEIGHTS] = names
        else:
            left_out += [(why, name) for name in names]
    return parts, left_out


def by_family(names: Iterable[str]) -> dict[str, tuple[str, ...]]:
    """Weight files by the stem of their names, with the shards of one model together; sorted.

    >>> by_family(["m-00002-of-00002.safetensors", "m-00001-of-00002.safetensors", "head.safetensors"])
    {'head': ('head.safetensors',), 'm': ('m-00001-of-00002.safetensors', 'm-00002-of-00002.safetensors')}
    """
    families: dict[str, list[str]] = defaultdict(list)
    for name in sorted(names):
        families[_COUNTED.sub("", name.removesuffix(WEIGHTS))].append(name)
    return {stem: tuple(of_stem) for stem, of_stem in families.items()}


def _not_of_model(name: str) -> WhyLeftOut | None:
    stem = _COUNTED.sub("", name.removesuffix(WEIGHTS))
    if is_training_state(stem):
        return "training state"
    return "average" if is_averaged(stem) else None


def _without_variant(name: str) -> list[str]:
    """The words of a name, without those that distinguish copies of one model."""
    return [word for word in re.split(r"[-_.]", name) if not _VARIANT.fullmatch(word)]


def _walk(
    directory: AnyPath, folder: AnyPath, own: frozenset[str], left_out: list[LeftOut], *, depth: int
) -> Iterator[tuple[AnyPath, frozenset[str]]]:
    """The folders that may hold weights of the model, with the names of their files."""
    listing = list_folder(folder)
    yield folder, listing.files
    if depth == _DEEPEST:
        return
    for name in listing.folders:
        inner = folder / name
        why: WhyLeftOut | None = None
        if not may_hold_model(name, depth):
            if name.startswith((".", "averaged")):
                continue
            why = "copy"
        elif is_link(inner):
            why = "link"
        elif is_averaged(name):
            why = "average"
        elif is_training_state(name) and not (depth == 0 and name in own):
            why = "training state"
        elif _has_weights(listing.files) and not _without_variant(name):
            why = "copy"
        if why is None:
            yield from _walk(directory, inner, own, left_out, depth=depth + 1)
        elif holds_weights(inner):
            left_out.append((why, f"{inner.relative_to(directory).as_posix()}/"))


def _has_weights(names: Iterable[str]) -> bool:
    return any(name.endswith(WEIGHTS) or _INDEX.fullmatch(name) for name in names)
