"""Stage *remote*: which checkpoints an address holds, shown in a mirror by name and size."""

from __future__ import annotations

import fnmatch
import re
from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

from ckavg.checkpoints.checkpoint import RESULT_RECORD
from ckavg.checkpoints.layouts import label_run, read_label, read_labels
from ckavg.checkpoints.trainer_log import TRAINER_STATE
from ckavg.errors import MixedOrderError, NoCheckpointsError, SettingError, listed
from ckavg.remote.hub import Repository
from ckavg.remote.mirror import Mirror
from ckavg.remote.objects import ObjectTree
from ckavg.remote.parallel import at_once
from ckavg.remote.store import GO_ONLINE, Tree
from ckavg.storage.address import Address, is_pattern

CARD = "README.md"
_CONFIGS = ("config.json", "adapter_config.json", "model_index.json")
INDEX = ".safetensors.index"
_WEIGHTS = ".safetensors"
_UNLISTED = f"not-listed-yet{_WEIGHTS}"
_NUMBER = re.compile(r"\d+(?:[-_]tokens[\w.]+)?$", re.ASCII)


@dataclass(slots=True)
class Place:
    """A checkpoint in the mirror.

    Attributes:
        path: its directory there, or its file.
        tree: where its files are.
        prefix: what their paths begin with in the tree, and not in the mirror.
        names: their paths in the tree; empty until they are listed.
    """

    path: Path
    tree: Tree
    prefix: str = ""
    names: list[str] = field(default_factory=list)

    @property
    def directory(self) -> Path:
        """Where its side files are."""
        return self.path.parent if self.path.suffix == _WEIGHTS else self.path

    def show(self, mirror: Mirror) -> None:
        """List its files, if that has not been done."""
        if not self.names:
            self.names = list(self.tree.files)
            mirror.add(self.path, self.tree, self.names)
            (self.path / _UNLISTED).unlink(missing_ok=True)


def list_run(mirror: Mirror, address: Address, revisions: Sequence[str]) -> tuple[dict[Path, Place], list[str]]:
    """Show the checkpoints of an address in a mirror: revisions of a repository, or folders and files in one place.

    Args:
        mirror: where they are shown.
        address: what was named.
        revisions: patterns of revisions, each of which is a checkpoint.

    Returns:
        The checkpoints by path in the mirror, and what a user should know about the rest.

    Raises:
        NoCheckpointsError: there are none.
        HubError, ReadError: the place refuses, or cannot be reached.
    """
    mirror.stand_for(mirror.root, str(address))
    if not address.is_hub:
        return _folders(mirror, address, ObjectTree(address), None), []
    repository = Repository(address.place)
    patterns = [*revisions]
    if address.revision is not None and is_pattern(address.revision):
        patterns.append(address.revision)
    elif revisions and address.revision is not None:
        raise SettingError(
            f"{address} names one revision, and --revisions others.",
            hint="Leave one of them out: @REVISION or --revisions.",
        )
    if patterns:
        return _revisions(mirror, address, repository, patterns)
    tree = repository.tree(address.revision or "main", address.folder)
    return _folders(mirror, address, tree, repository), []


def open_places(mirror: Mirror, places: Sequence[Place]) -> None:
    """Put what opening a run reads into the places of checkpoints: configs, indexes, the headers of weights.

    Raises:
        HubError, ReadError: it could not be fetched.
    """
    at_once(lambda place: place.show(mirror), places)
    for place in places:
        in_place = {name: name.removeprefix(place.prefix) for name in place.names}
        small = [name for name, here in in_place.items() if PurePosixPath(here).name in _CONFIGS or INDEX in here]
        mirror.bring(place.directory, place.tree, small, prefix=place.prefix)
        mirror.open_headers(place.directory / here for here in in_place.values() if here.endswith(_WEIGHTS))


def tree_at(address: Address) -> Tree:
    """The files of an address that names one place.

    Raises:
        HubError: there is no such revision, or the Hub refused, or cannot be reached.
    """
    if not address.is_hub:
        return ObjectTree(address)
    return Repository(address.place).tree(address.revision or "main", address.folder)


def list_model(mirror: Mirror, address: Address, path: Path) -> Place:
    """Show one model in a mirror: that of `--init`.

    Raises:
        HubError, ReadError: the place refuses, or cannot be reached.
    """
    if address.revision is not None and is_pattern(address.revision):
        raise SettingError(f"--init {address} may be several revisions.", hint="Name one: hf://owner/name@REVISION")
    place = Place(path, tree_at(address))
    place.show(mirror)
    mirror.stand_for(path, str(address))
    return place


def _revisions(
    mirror: Mirror, address: Address, repository: Repository, patterns: Sequence[str]
) -> tuple[dict[Path, Place], list[str]]:
    known = repository.revisions()
    matched = [name for name in known if any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)]
    if not matched:
        kept = " in the cache, and huggingface_hub is in offline mode" if repository.is_offline else ""
        raise NoCheckpointsError(
            f"{address}: no revision matches {' or '.join(map(repr, patterns))}; it has {_shown(known)}{kept}.",
            hint=GO_ONLINE if kept else "Name them with --revisions, in quotation marks: --revisions 'step*'",
        )
    places: dict[Path, Place] = {}
    labels = read_labels([name.replace("/", "--") for name in matched])
    unstated = [
        name for name in matched if (label := labels.get(name.replace("/", "--"))) is None or label.number is None
    ]
    for name in sorted(set(matched) - set(unstated), key=matched.index):
        safe = name.replace("/", "--")
        path = mirror.root / safe
        places[path] = Place(path, repository.tree(name, address.folder, commit=known[name]))
        mirror.stand_for(path, str(Address("hf", address.place, name, address.folder)))
        path.mkdir(exist_ok=True)
        (path / _UNLISTED).touch()  # a number says too little without weights beside it
    if not places:
        raise NoCheckpointsError(
            f"{address}: no revision that matches states a step: {listed(unstated)}.",
            hint="Expected names such as step1000 or stage1-step1000-tokens5B.",
        )
    _check_stages(address, {labels[path.name].stem for path in places})
    told = f"Passed over, for the name of the revision states no step: {listed(unstated)}."
    return places, [told] if unstated else []


def _check_stages(address: Address, stems: Collection[str]) -> None:
    """Refuse revisions of several runs or stages, in words that a repository is chosen from."""
    if len(stems) > 1:
        named = ", ".join(stem or "none" for stem in sorted(stems))
        raise MixedOrderError(
            f"{address}: the revisions mix stages ({named}), whose steps have no common order.",
            hint=f"Choose those of one stage: --revisions '{next(filter(None, sorted(stems)))}*'",
        )


def _folders(mirror: Mirror, address: Address, tree: Tree, repository: Repository | None) -> dict[Path, Place]:
    folders: dict[str, list[str]] = defaultdict(list)
    for name in tree.files:
        first, slash, _ = name.partition("/")
        folders[first if slash else ""].append(name)
    top = folders.pop("", [])
    labels = label_run(
        folders,
        [name.removesuffix(_WEIGHTS) for name in top if name.endswith(_WEIGHTS)],
        lambda name: any(each.endswith(_WEIGHTS) for each in folders[name]),
        is_one_model=bool({"model_index.json", "modules.json"} & set(top)),
    )
    places: dict[Path, Place] = {}
    for first, names in folders.items():
        path, prefix = mirror.root / first, f"{first}/"
        if first in labels:
            places[path] = Place(path, tree, prefix, names)
            mirror.add(path, tree, names, prefix=prefix, url=f"{tree.url}/{first}")
            mirror.bring(path, tree, [name for name in names if name == f"{first}/{TRAINER_STATE}"], prefix=prefix)
        else:  # shown, so that they are told of
            shown = [name for name in names if name.endswith((_WEIGHTS, RESULT_RECORD))]
            mirror.add(path, tree, shown, prefix=prefix, url=f"{tree.url}/{first}")
    flat = [name for name in top if name in labels]
    places |= {mirror.root / name: Place(mirror.root / name, tree, "", [name]) for name in flat}
    if not places:
        raise _nothing(address, top, repository)
    mirror.add(mirror.root, tree, [name for name in top if name.endswith(_WEIGHTS) or name == CARD])
    mirror.bring(mirror.root, tree, [name for name in top if name == CARD])
    if len(flat) == len(places):
        mirror.open_headers(mirror.root / name for name in flat)
    return places


def _nothing(address: Address, top: Iterable[str], repository: Repository | None) -> NoCheckpointsError:
    """What to say of a place without checkpoints; a repository may hold them as revisions."""
    is_one = any(name.endswith(_WEIGHTS) for name in top)
    what = f"{address} is one checkpoint, not a run." if is_one else f"{address} holds no checkpoints."
    suggested = [] if repository is None else _patterns(repository.revisions())
    if suggested:
        options = " or ".join(f"--revisions '{pattern}'" for pattern in suggested[:3])
        return NoCheckpointsError(what, hint=f"Its revisions look like checkpoints: {options}")
    return NoCheckpointsError(
        what, hint="Expected folders such as checkpoint-500/ or step_500/, or revisions that are named so."
    )


def _patterns(revisions: Mapping[str, str]) -> list[str]:
    """Patterns of revisions that look like checkpoints, those that match most first."""
    labelled = [name for name in revisions if read_label(name.replace("/", "--"))]
    counts = Counter(f"{_NUMBER.sub('', name)}*" for name in labelled)
    return [pattern for pattern, count in counts.most_common() if count > 1]


def _shown(revisions: Mapping[str, str]) -> str:
    patterns = _patterns(revisions)
    names = [*patterns, *(name for name in revisions if not any(fnmatch.fnmatchcase(name, each) for each in patterns))]
    return listed(names) if names else "none"
