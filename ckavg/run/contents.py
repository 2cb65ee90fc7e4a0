"""Stage *discover*: which files of a checkpoint's directory are its weights. Lists directories; opens no file."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from ckavg.errors import UnsupportedFormatError
from ckavg.run.foreign import conversion
from ckavg.run.layouts import is_averaged, may_hold_model
from ckavg.run.values import Kind

ADAPTERS = ("adapter_model.safetensors", "pytorch_lora_weights.safetensors")
"""The names under which PEFT and diffusers save an adapter."""

_MODELS = ("model", "diffusion_pytorch_model")
_INDEX = re.compile(r".+\.safetensors\.index(?:\.[\w-]+)?\.json", re.ASCII)
_WHOLE = re.compile(r"(?:ft-)?model.*|consolidated.*|.*-\d+-of-\d+\.safetensors", re.ASCII)
_PICKLED = re.compile(r"(?:diffusion_)?pytorch_model.*\.bin", re.ASCII)
_DEEPEST = 3


@dataclass(frozen=True, slots=True)
class Contents:
    """The weights that one folder holds.

    Attributes:
        folder: the folder.
        kind: `model` or `adapter`.
        files: names of its weight files where no index lists them.
        index: name of the shard index that does; empty where there is none.
        others: names of all weight files that are there.
    """

    folder: Path
    kind: Kind
    files: tuple[str, ...]
    index: str
    others: frozenset[str]


@dataclass(frozen=True, slots=True)
class Listing:
    """What lies in a directory: names of files (and whatever else is no directory), and of directories."""

    files: frozenset[str]
    folders: tuple[str, ...]


def list_folder(directory: Path) -> Listing:
    """The names in a directory.

    Raises:
        OSError: the system would not let us.
    """
    files, folders = set(), []
    with os.scandir(directory) as entries:
        for entry in entries:
            if _is_folder(entry) and not entry.name.endswith(".safetensors"):
                folders.append(entry.name)
            else:
                files.add(entry.name)
    return Listing(frozenset(files), tuple(sorted(folders)))


def holds_weights(directory: Path) -> bool:
    """Whether the directory itself holds safetensors weights, whole or in part; False where it cannot be listed."""
    try:
        return _has_weights(list_folder(directory).files)
    except OSError:
        return False


def choose(folder: Path, names: frozenset[str]) -> Contents | None:
    """The weights among the files of a folder; None where there are none.

    `model.safetensors` comes before an index, as for those who load them, and both before files without an index. An
    adapter beside a whole model is not read.

    Raises:
        UnsupportedFormatError: it holds several models, and none has the name that loaders look for.
    """
    weights = frozenset(name for name in names if name.endswith(".safetensors"))
    for stem in _MODELS:
        if f"{stem}.safetensors" in weights:
            return Contents(folder, "model", (f"{stem}.safetensors",), "", weights)
        if f"{stem}.safetensors.index.json" in names:
            return Contents(folder, "model", (), f"{stem}.safetensors.index.json", weights)
    indexes = sorted(name for name in names if _INDEX.fullmatch(name))
    if len(indexes) > 1:
        raise UnsupportedFormatError(
            f"{folder} holds several models, each with an index: {', '.join(indexes[:4])}.",
            hint="Leave the one that is to be averaged, or rename its index to model.safetensors.index.json.",
        )
    if indexes:
        return Contents(folder, "model", (), indexes[0], weights)
    own = weights.difference(ADAPTERS)
    adapters = tuple(name for name in ADAPTERS if name in weights)
    if adapters and not any(_WHOLE.fullmatch(name) for name in own):
        return Contents(folder, "adapter", adapters[:1], "", weights)
    return Contents(folder, "model", tuple(sorted(own)), "", weights) if own else None


def components(directory: Path, folders: Iterable[str]) -> tuple[list[Contents], list[str]]:
    """The models in the folders of a checkpoint that holds none itself, and the folders that were passed over.

    Folders that training made an average in (`unet_ema`) are passed over.

    Raises:
        UnsupportedFormatError: a component has its weights in another format than the others.
        OSError: the system would not let us list a folder.
    """
    found: list[Contents] = []
    averaged: list[str] = []
    pickled: list[Path] = []
    for folder, listing in _folders_below(directory, folders, averaged, depth=1):
        contents = choose(folder, listing.files)
        if contents is not None:
            found.append(contents)
        else:
            pickled += [folder / name for name in sorted(listing.files) if _PICKLED.fullmatch(name)][:1]
    if found and pickled and (foreign := conversion([directory])) is not None:
        raise UnsupportedFormatError(
            f"{directory} holds models as safetensors, but {pickled[0].relative_to(directory)} is a pickle.",
            hint=foreign.advice,
            command=foreign.command,
            unread=(directory,),
        )
    return found, averaged


def weights_below(directory: Path, folders: Iterable[str]) -> list[str]:
    """Folders with weights in a checkpoint that holds weights itself."""
    return [
        f"{name}/"
        for name in folders
        if may_hold_model(name) and not (directory / name).is_symlink() and holds_weights(directory / name)
    ]


def _folders_below(
    directory: Path, folders: Iterable[str], averaged: list[str], *, depth: int
) -> Iterator[tuple[Path, Listing]]:
    for name in folders:
        if not may_hold_model(name):
            continue
        folder = directory / name
        if folder.is_symlink():
            continue
        listing = list_folder(folder)
        if is_averaged(name):
            averaged += [name] if _has_weights(listing.files) else []
            continue
        yield folder, listing
        if depth < _DEEPEST:
            yield from _folders_below(folder, listing.folders, averaged, depth=depth + 1)


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link in a circle
        return False


def _has_weights(names: Iterable[str]) -> bool:
    return any(name.endswith(".safetensors") or _INDEX.fullmatch(name) for name in names)
