"""From what was named to a run, wherever it is: a directory, a repository on the Hub, another file system.

What is not here is listed and put into a mirror (`remote/mirror.py`). The checkpoints that the selection leaves get
their headers and configs, and the mirror is opened as any directory is; no byte of a weight is fetched for it.
"""

from __future__ import annotations

import dataclasses
import fnmatch
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING

from ckavg.checkpoints.checkpoint import own_folders
from ckavg.checkpoints.discover import Candidate, scan
from ckavg.checkpoints.inspect import Inspection, as_run, inspect_run
from ckavg.checkpoints.run import Checkpoint, Remote, Run, Selection
from ckavg.checkpoints.select import selected
from ckavg.errors import CkavgError, CombinedError, MissingShardError, NoCheckpointsError, SettingError
from ckavg.output.side_files import CONFIGS, MOST_BYTES, is_side_file
from ckavg.output.staging import bring_back, bring_back_all
from ckavg.remote.address import Address, address_of, did_you_mean, parse_size
from ckavg.remote.store import GO_ONLINE

if TYPE_CHECKING:
    from ckavg.remote.listing import Place
    from ckavg.remote.mirror import Mirror

_CARD, _WEIGHTS = "README.md", ".safetensors"


def open_run(
    source: Path | str = ".",
    *,
    init: Path | str | None = None,
    init_step: int = 0,
    match: str | None = None,
    steps: Sequence[int] = (),
    skip_step: Sequence[int] = (),
    every: int | None = None,
    every_from: int | None = None,
    from_step: int | None = None,
    to_step: int | None = None,
    last: int | None = None,
    skip_incomplete: bool = False,
    common_only: bool = False,
    copy: Sequence[str] = (),
    revisions: Sequence[str] = (),
    max_disk: int | str | None = None,
) -> Run:
    """Open saved checkpoints as one run. Reads headers only, never a weight.

    Args:
        source: directory with the checkpoints of one training run, `hf://owner/name[@revision][/folder]`, or an address
            of an object store, such as `s3://bucket/run`.
        init: the anchor θ_0, a checkpoint directory, safetensors file or address; None: the first checkpoint selected.
        init_step: optimizer step of `init`.
        match: shell pattern of the names of checkpoints, where several runs lie in one directory.
        steps: exactly these optimizer steps; empty: all.
        skip_step: leave out these optimizer steps.
        every: update frequency f in optimizer steps: visit only checkpoints with (t_k − t_0) mod f = 0.
        every_from: count `every` from this step instead of the anchor's.
        from_step: leave out checkpoints before this optimizer step.
        to_step: leave out checkpoints after this optimizer step.
        last: keep only this many checkpoints, the newest.
        skip_incomplete: leave out checkpoints that are not written in full, each with a warning.
        common_only: average the tensors that all checkpoints have; the others are copied from the last one.
        copy: shell patterns of further files of the last checkpoint that go into the result, by relative path.
        revisions: shell patterns of the revisions of a repository, each of which is a checkpoint.
        max_disk: how many bytes may be fetched to the disk, such as `50GB`; None: all, if there is room. The rest is
            fetched as it is read, and not kept.

    Raises:
        CkavgError: it cannot be averaged; `CombinedError` lists every reason where there are more than one.
    """
    selection = Selection(
        init=None if init is None else Path(init),
        init_step=init_step,
        match=match,
        steps=tuple(steps),
        skip_step=tuple(skip_step),
        every=every,
        every_from=every_from,
        from_step=from_step,
        to_step=to_step,
        last=last,
        skip_incomplete=skip_incomplete,
        common_only=common_only,
        revisions=tuple(revisions),
        copy=tuple(copy),
    )
    return as_run(inspect_source(source, selection, max_disk=max_disk))


def inspect_source(source: Path | str, selection: Selection, *, max_disk: int | str | None = None) -> Inspection:
    """Look at a source, wherever it is, and return its problems beside what is sound, instead of raising them.

    Args:
        source, max_disk: as of `open_run`.
        selection: what is chosen of it.

    Raises:
        HubError: the Hub refused, or cannot be reached.
        NoCheckpointsError, MixedOrderError, ReadError, SettingError: there is nothing to inspect.
    """
    address = address_of(source)
    base = None if selection.init is None else address_of(selection.init)
    if selection.revisions and (address is None or not address.is_hub):
        raise SettingError(
            f"--revisions are those of a repository on the Hub; {source} is none.",
            hint="For example: ckavg inspect hf://owner/name --revisions 'step*'",
        )
    limit = None if max_disk is None else parse_size(max_disk)
    bring_back_all((Path(source) if address is None else Path()) / "averaged")
    for named, elsewhere in ((source, address), (selection.init, base)):
        if named is None or elsewhere is not None:
            continue
        bring_back(Path(named))
        meant = did_you_mean(str(named))
        if meant and not Path(named).exists():
            raise NoCheckpointsError(f"{named} does not exist.", hint=meant)
    if address is None and base is None:
        if limit is not None:
            raise SettingError("--max-disk bounds what is fetched; all of this is here.", hint="Leave it out.")
        return inspect_run(Path(source), selection)
    from ckavg.remote.mirror import Mirror

    mirror = Mirror((address.name if address else "run").replace(":", "-"), max_disk=limit)
    try:
        with as_users_know(mirror):
            return _inspected(mirror, Path(source) if address is None else address, base, selection)
    except BaseException:
        mirror.close()
        raise


@contextmanager
def as_users_know(remote: Remote | None) -> Iterator[None]:
    """Have an error name the files of a run that is not here as its user knows them."""
    try:
        yield
    except CkavgError as error:
        if remote is not None:
            _rename(error, remote.told)
        raise


def _rename(error: CkavgError, told: Callable[[str], str]) -> None:
    if isinstance(error, CombinedError):
        for each in error.errors:
            _rename(each, told)
    error.message, error.hint = told(error.message), told(error.hint)
    if told(error.command) != error.command:
        error.hint = (
            "ckavg never unpickles. Download the run; ckavg inspect of the copy has a command that converts it."
        )
        error.command = ""


def _inspected(mirror: Mirror, source: Path | Address, base: Address | None, selection: Selection) -> Inspection:
    from ckavg.remote.listing import list_model, list_run, open_places

    places: dict[Path, Place] = {}
    told: list[str] = []
    if isinstance(source, Address):
        places, told = list_run(mirror, source, selection.revisions)
        source = mirror.root
        open_places(mirror, [places[candidate.path] for candidate in _chosen(mirror, selection)])
    if base is not None:
        init = mirror.root.parent / "init" / base.name
        selection = dataclasses.replace(selection, init=init)
        places[init] = list_model(mirror, base, init)
        open_places(mirror, [places[init]])
    found = inspect_run(source, selection, read=mirror.peek)
    if found.checkpoints:
        ends = {found.checkpoints[0].path, found.checkpoints[-1].path} if base else {found.checkpoints[-1].path}
        for path in ends & places.keys():
            _bring_side_files(mirror, places[path], selection.copy)
    mirror.seal()
    checkpoints = tuple(mirror.identified(each) for each in found.checkpoints)
    for problem in found.problems:
        if isinstance(problem, MissingShardError) and mirror.is_offline:
            problem.hint = f"It is not in the cache, or not all of it. {GO_ONLINE}"
        _rename(problem, mirror.told)
    return dataclasses.replace(
        found,
        checkpoints=checkpoints,
        warnings=(*told, *map(mirror.told, found.warnings), *_alike(mirror, checkpoints)),
        remote=mirror,
    )


def _chosen(mirror: Mirror, selection: Selection) -> Sequence[Candidate]:
    """Those whose headers will be read; more than that where some turn out to be incomplete."""
    candidates = scan(mirror.root, match=selection.match, read=mirror.peek).candidates
    if selection.skip_incomplete:
        return candidates
    kept = selected([candidate.step for candidate in candidates], selection)
    return [candidates[index] for index in kept]


def _bring_side_files(mirror: Mirror, place: Place, patterns: Sequence[str]) -> None:
    """Fetch what goes into a result beside the weights, and what its card is made from."""
    own, names = own_folders(place.directory), []
    for name in place.names:
        here = PurePosixPath(name.removeprefix(place.prefix))
        asked = any(fnmatch.fnmatchcase(str(here), pattern) for pattern in patterns)
        wanted = is_side_file(here, own) and place.tree.files[name].size <= MOST_BYTES
        if (asked or here.name == _CARD or wanted) and not str(here).endswith(_WEIGHTS):
            names.append(name)
    mirror.bring(place.directory, place.tree, names, prefix=place.prefix)
    if (place.prefix or place.path.suffix == _WEIGHTS) and not any(
        PurePosixPath(name).name in CONFIGS for name in names
    ):
        beside = [
            name
            for name, file in place.tree.files.items()
            if "/" not in name and is_side_file(PurePosixPath(name), beside_a_run=True) and file.size <= MOST_BYTES
        ]
        mirror.bring(mirror.root, place.tree, beside)


def _alike(mirror: Mirror, checkpoints: Sequence[Checkpoint]) -> Iterator[str]:
    """A warning for checkpoints with the same weights, as one that was uploaded in the place of another leaves them."""
    by_content: dict[tuple[str, ...], list[int]] = defaultdict(list)
    for checkpoint in checkpoints:
        content = [mirror.content_hash(shard.path) for shard in checkpoint.shards]
        if content and None not in content:
            by_content[tuple(sorted(map(str, content)))].append(checkpoint.step)
    for steps in by_content.values():
        if len(steps) > 1:
            told = ", ".join(map(str, steps))
            yield (
                f"Steps {told} hold the same weights, by the hashes of their files: one was uploaded in the place of "
                "another, perhaps. Leave out those that are wrong with --from-step, --to-step or --revisions."
            )
