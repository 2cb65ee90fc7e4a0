"""Open a run from its name, wherever it is: a directory, a repository on the Hub, another file system."""

from __future__ import annotations

import dataclasses
import fnmatch
import re
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Literal

from ckavg.checkpoints.inspect import Inspection, as_run, inspect_runs
from ckavg.checkpoints.layouts import label_revisions, read_label
from ckavg.checkpoints.run import Checkpoint, Run, Selection
from ckavg.errors import MissingShardError, MixedOrderError, NoCheckpointsError, SettingError, listed
from ckavg.output.staging import bring_back, bring_back_all
from ckavg.storage.address import Address, address_of, did_you_mean, is_pattern, parse_size
from ckavg.storage.base import AnyPath, RemotePath
from ckavg.storage.hub import Repository
from ckavg.storage.hub_errors import GO_ONLINE
from ckavg.storage.remote import RemoteStorage, open_storage, storages_of

_NUMBER = re.compile(r"\d+(?:[-_]tokens[\w.]+)?$", re.ASCII)


def open_run(
    source: AnyPath | str = ".",
    *,
    init: AnyPath | str | None = None,
    init_step: int = 0,
    match: str | None = None,
    steps: Sequence[int] = (),
    skip_step: Sequence[int] = (),
    every: int | None = None,
    every_from: int | None = None,
    from_step: int | None = None,
    to_step: int | None = None,
    best: int | None = None,
    metric: str | None = None,
    goal: Literal["min", "max"] | None = None,
    last: int | None = None,
    skip_incomplete: bool = False,
    common_only: bool = False,
    copy: Sequence[str] = (),
    revisions: Sequence[str] = (),
    prefix: str | None = None,
    max_disk: int | str | None = None,
) -> Run:
    """Open saved checkpoints as one run. Reads headers only, never a weight.

    Args:
        source: directory with the checkpoints of one training run, `hf://owner/name[@revision][/folder]`, or an address
            of an object store, such as `s3://bucket/run`.
        init: the anchor θ_0, a checkpoint directory, safetensors file or address; None: the first selected checkpoint.
        init_step: optimizer step of `init`.
        match: shell pattern of the names of checkpoints, if a directory holds several runs.
        steps: exactly these optimizer steps; empty: all.
        skip_step: leave out these optimizer steps.
        every: update frequency f in optimizer steps: visit only checkpoints with (t_k − t_0) mod f = 0.
        every_from: count `every` from this step instead of the anchor's.
        from_step: leave out checkpoints before this optimizer step.
        to_step: leave out checkpoints after this optimizer step.
        best: keep only this many checkpoints, the best by a logged metric; applies before `last`.
        metric: its name in `log_history` of the last checkpoint's `trainer_state.json`, such as `eval_loss`.
        goal: whether `min` or `max` of it is best; None: inferred from its name.
        last: keep only this many checkpoints, the newest.
        skip_incomplete: leave out incomplete checkpoints, each with a warning.
        common_only: average the tensors that all checkpoints have, and copy the others from the last one.
        copy: shell patterns of further files of the last checkpoint to copy into the result, by relative path.
        revisions: shell patterns of the revisions of a repository, each of which is a checkpoint.
        prefix: how the names of the model's tensors begin in a torch.distributed.checkpoint; it is removed. None: taken
            from the nesting.
        max_disk: how many bytes may be downloaded to disk, such as `50GB`; None: all, if there is room. The rest is
            streamed.

    Raises:
        CkavgError: it cannot be averaged; `CombinedError` lists all reasons if there are several.
    """
    selection = Selection(
        init=init if init is None or isinstance(init, RemotePath) else Path(init),
        init_step=init_step,
        match=match,
        steps=tuple(steps),
        skip_step=tuple(skip_step),
        every=every,
        every_from=every_from,
        from_step=from_step,
        to_step=to_step,
        best=best,
        metric=metric,
        goal=goal,
        last=last,
        skip_incomplete=skip_incomplete,
        common_only=common_only,
        revisions=tuple(revisions),
        prefix=prefix,
        copy=tuple(copy),
    )
    return as_run(inspect_source(source, selection, max_disk=max_disk))


def opened(run: Run | AnyPath | str) -> Run:
    """A run as it is; a directory or address opened with all its checkpoints.

    Raises:
        CkavgError: see `open_run`.
    """
    return run if isinstance(run, Run) else open_run(run)


def inspect_source(source: AnyPath | str, selection: Selection, *, max_disk: int | str | None = None) -> Inspection:
    """Inspect a source, wherever it is; return problems beside the valid checkpoints instead of raising them.

    Args:
        source, max_disk: see `open_run`.
        selection: which checkpoints.

    Raises:
        CkavgError: see `inspect_sources`.
    """
    return inspect_sources(source, [selection], max_disk=max_disk)[0]


def inspect_sources(
    source: AnyPath | str, selections: Sequence[Selection], *, max_disk: int | str | None = None
) -> list[Inspection]:
    """Inspect a source for several selections; it is listed once for all of them.

    They may differ only in `every`, `every_from`, `from_step`, `to_step` and `last`.

    Raises:
        HubError: the Hub refused, or cannot be reached.
        NoCheckpointsError, MixedOrderError, ReadError, SettingError: there is nothing to inspect.
    """
    address, selection = address_of(str(source)), selections[0]
    base = None if selection.init is None else address_of(str(selection.init))
    if selection.revisions and (address is None or not address.is_hub):
        raise SettingError(
            f"--revisions applies to a repository on the Hub; {source} is not one.",
            hint="For example: ckavg inspect hf://owner/name --revisions 'step*'",
        )
    limit = None if max_disk is None else parse_size(max_disk)
    if address is None and base is None and limit is not None:
        raise SettingError("--max-disk limits downloads; all of this is on this machine.", hint="Leave it out.")
    bring_back_all((Path(source) if address is None else Path()) / "averaged")
    for named, remote_address in ((source, address), (selection.init, base)):
        if named is not None and remote_address is None:
            _check_local(Path(named))
    place: AnyPath = Path(source)
    warnings: tuple[str, ...] = ()
    if address is not None:
        storage, warnings = _open(address, selection.revisions, limit)
        place = storage.root
    if base is not None:
        if base.revision is not None and is_pattern(base.revision):
            raise SettingError(f"--init {base} may match several revisions.", hint="Name one: hf://owner/name@REVISION")
        root = open_storage(base, max_disk=limit).root
        selections = [dataclasses.replace(each, init=root) for each in selections]
    try:
        found = inspect_runs(place, selections)
    except NoCheckpointsError as error:
        if address is not None and address.is_hub:
            error.hint = _revisions_to_try(address) or error.hint
        raise
    remote = storages_of([place, *(checkpoint.path for each in found for checkpoint in each.checkpoints)])
    for problem in (problem for each in found for problem in each.problems):
        if isinstance(problem, MissingShardError) and any(each.is_offline for each in remote):
            problem.hint = f"It is not in the cache, or only in part. {GO_ONLINE}"
    return [
        dataclasses.replace(each, warnings=(*warnings, *each.warnings, *_alike(each.checkpoints))) for each in found
    ]


def _check_local(named: Path) -> None:
    """Restore an earlier result that a killed process had moved aside; refuse a path that is meant as an address."""
    bring_back(named)
    meant = did_you_mean(str(named))
    if meant and not named.exists():
        raise NoCheckpointsError(f"{named} does not exist.", hint=meant)


def _open(address: Address, revisions: Sequence[str], max_disk: int | None) -> tuple[RemoteStorage, tuple[str, ...]]:
    """The storage of an address, and warnings about what it leaves out."""
    patterns = [*revisions]
    if address.revision is not None and is_pattern(address.revision):
        patterns.append(address.revision)
    elif revisions and address.revision is not None:
        raise SettingError(
            f"{address} names a revision, and --revisions names others.",
            hint="Leave one of them out: @REVISION or --revisions.",
        )
    if not patterns:
        return open_storage(address, max_disk=max_disk), ()
    storage, unstated = _open_revisions(address, patterns, max_disk)
    warning = f"Skipped revisions whose names state no step: {listed(unstated)}."
    return storage, (warning,) if unstated else ()


def _open_revisions(address: Address, patterns: Sequence[str], max_disk: int | None) -> tuple[RemoteStorage, list[str]]:
    """Revisions of a repository as folders of one storage, and the revisions whose names state no step."""
    repository = Repository(address.place)
    known = repository.revisions()
    matched = [name for name in known if any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)]
    if not matched:
        in_cache = " in the cache, and huggingface_hub is in offline mode" if repository.is_offline else ""
        raise NoCheckpointsError(
            f"{address}: no revision matches {' or '.join(map(repr, patterns))}; it has {_shown(known)}{in_cache}.",
            hint=GO_ONLINE if in_cache else "Name them with --revisions, in quotes: --revisions 'step*'",
        )
    labels = label_revisions([_as_folder(name) for name in matched])
    unstated = [name for name in matched if _as_folder(name) not in labels]
    if not labels:
        raise NoCheckpointsError(
            f"{address}: no matching revision states a step: {listed(unstated)}.",
            hint="Expected names such as step1000 or stage1-step1000-tokens5B.",
        )
    stems = sorted({label.stem for label in labels.values()})
    if len(stems) > 1:
        raise MixedOrderError(
            f"{address}: the revisions mix stages ({', '.join(stem or 'none' for stem in stems)}), whose steps have no "
            "common order.",
            hint=f"Choose one stage: --revisions '{next(filter(None, stems))}*'",
        )
    trees = {
        _as_folder(name): repository.tree(name, address.folder, commit=known[name])
        for name in matched
        if name not in unstated
    }
    return RemoteStorage(address, trees, max_disk=max_disk), unstated


def _as_folder(revision: str) -> str:
    return revision.replace("/", "--")


def _revisions_to_try(address: Address) -> str:
    """A hint for a repository that may hold its checkpoints as revisions; empty if it does not."""
    patterns = _patterns(Repository(address.place).revisions())
    options = " or ".join(f"--revisions '{pattern}'" for pattern in patterns[:3])
    return f"Its revisions look like checkpoints: {options}" if options else ""


def _patterns(revisions: Mapping[str, str]) -> list[str]:
    """Patterns of revisions that look like checkpoints, the ones with most matches first."""
    labelled = [name for name in revisions if read_label(_as_folder(name))]
    counts = Counter(f"{_NUMBER.sub('', name)}*" for name in labelled)
    return [pattern for pattern, count in counts.most_common() if count > 1]


def _shown(revisions: Mapping[str, str]) -> str:
    patterns = _patterns(revisions)
    names = [*patterns, *(name for name in revisions if not any(fnmatch.fnmatchcase(name, each) for each in patterns))]
    return listed(names) if names else "none"


def _alike(checkpoints: Sequence[Checkpoint]) -> Iterator[str]:
    """A warning for checkpoints with the same weights: one may have been uploaded in place of another."""
    by_content: dict[tuple[str, ...], list[int]] = defaultdict(list)
    for checkpoint in checkpoints:
        infos = [
            shard.path.storage.info(shard.path) for shard in checkpoint.shards if isinstance(shard.path, RemotePath)
        ]
        hashes = [info.identity for info in infos if info is not None and info.is_hash and info.identity]
        if hashes and len(hashes) == len(checkpoint.shards):
            by_content[tuple(sorted(hashes))].append(checkpoint.step)
    for steps in by_content.values():
        if len(steps) > 1:
            yield (
                f"Steps {', '.join(map(str, steps))} hold the same weights, by the hashes of their files: perhaps one "
                "was uploaded in place of another. Leave out the wrong ones with --from-step, --to-step or --revisions."
            )
