"""Stage *discover*: which checkpoints a directory holds, and at which steps. Lists directories, reads trainers' logs
and the headers of single files; opens weights only to compare two files of one step.
"""

from __future__ import annotations

import dataclasses
import fnmatch
import itertools
import shlex
import string
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass

from ckavg.checkpoints.check_consistent import same_weights
from ckavg.checkpoints.checkpoint import RESULT_RECORD, read_checkpoint
from ckavg.checkpoints.distributed import METADATA, holds_distributed
from ckavg.checkpoints.headers import stated_step
from ckavg.checkpoints.layouts import (
    WEIGHTS,
    Clock,
    Label,
    is_averaged,
    is_half_written,
    is_training_state,
    label_revisions,
    label_run,
    read_label,
    read_labels,
    stem_of,
)
from ckavg.checkpoints.pickles import UnreadPickleError, pickled_step
from ckavg.checkpoints.trainer_log import TRAINER_STATE, Logs
from ckavg.checkpoints.unsupported import holds_unsupported, is_pickled, refused, stem, unsupported_weights
from ckavg.checkpoints.weight_files import find_weights, holds_weights, list_folder
from ckavg.errors import (
    CkavgError,
    DuplicateStepError,
    MixedOrderError,
    NoCheckpointsError,
    ReadError,
    UnsupportedFormatError,
    listed,
)
from ckavg.storage.atomic import resolved
from ckavg.storage.base import AnyPath, RemotePath
from ckavg.storage.download import thread_map
from ckavg.storage.local import is_link, size_of, storage_of
from ckavg.storage.remote import storages_of

_LARGEST_STEP = 10**18
_LOOKED_INTO = 50
_PROBES, _PROBE = 32, 4096
_NOT_RUNS = frozenset({"averaged", "runs", "logs", "wandb"})


@dataclass(frozen=True, slots=True)
class Candidate:
    """A directory or file that looks like a checkpoint; its weights have not been looked at.

    Attributes:
        path: the directory or file.
        step: its optimizer step, from its trainer's log or its header if they state one, else from its name.
        label: what its name says.
        stated: whether log or header gave the step.
        log: number of the trainer's log, the same for checkpoints of one run; None without one.
        is_file: whether it is a single file.
    """

    path: AnyPath
    step: int
    label: Label
    stated: bool
    log: int | None = None
    is_file: bool = False

    @property
    def clock(self) -> Clock:
        """What its step counts."""
        return "step" if self.stated else self.label.clock


@dataclass(frozen=True, slots=True)
class Scan:
    """The content of a source: candidates by step, and warnings about the rest."""

    source: AnyPath
    candidates: tuple[Candidate, ...]
    warnings: tuple[str, ...]


def scan(source: AnyPath, *, match: str | None = None) -> Scan:
    """Find the checkpoints in a directory whose names match a shell pattern, in numeric order of their steps.

    Raises:
        NoCheckpointsError: it is not a directory, or holds no checkpoint.
        MixedOrderError: its checkpoints count different things.
        ReadError: it cannot be listed.
    """
    if isinstance(source, RemotePath) and source.storage.has_revisions:
        return _scan_revisions(source, match)
    warnings: list[str] = []
    children = [path for path in _children(source) if match is None or _matches(path, match)]
    logs = Logs()
    labels = _labels(source, children)
    _prefetch(labels)
    found = [_candidate(path, label, logs, warnings) for path, label in labels.items()]
    directories = [candidate for candidate in found if not candidate.is_file]
    twins: set[AnyPath] = set()
    files = [candidate for candidate in found if candidate.is_file]
    if files and not any(_holds_weights(candidate.path) for candidate in directories):
        directories = []  # of another format, or nothing
    candidates = _without_derived(directories or _files_of_runs(files, twins, warnings))
    if not candidates:
        raise _nothing_found(source, match)
    candidates.sort(key=lambda candidate: (candidate.step, candidate.path.name))
    warnings += _passed_over([path for path in children if path not in twins], candidates)
    if not several_runs(candidates):
        warnings += _check_clocks(source, candidates)
    return Scan(source, tuple(candidates), tuple(warnings))


def _scan_revisions(source: RemotePath, match: str | None) -> Scan:
    """The revisions of a repository, by name only."""
    labels = label_revisions([path.name for path in source.iterdir()])
    found = [Candidate(source / name, label.number or 0, label, stated=False) for name, label in labels.items()]
    candidates = _without_derived([each for each in found if match is None or _matches(each.path, match)])
    if not candidates:
        raise NoCheckpointsError(f"{source} has no revisions whose names match {match!r}.")
    candidates.sort(key=lambda candidate: (candidate.step, candidate.path.name))
    return Scan(source, tuple(candidates), tuple(_check_clocks(source, candidates)))


def duplicate_steps(candidates: Iterable[Candidate]) -> list[CkavgError]:
    """One error for every step that more than one candidate claims."""
    by_step = defaultdict(list)
    for candidate in candidates:
        by_step[candidate.step].append(candidate.path.name)
    return [
        DuplicateStepError(
            f"step {step} appears {len(names)} times: {', '.join(names)}.",
            hint="Each step may appear once. Move stale checkpoints away, or choose by name with --match.",
        )
        for step, names in sorted(by_step.items())
        if len(names) > 1
    ]


def several_runs(candidates: Iterable[Candidate]) -> list[CkavgError]:
    """An error if the names of the candidates belong to more than one run."""
    of_stem: dict[str, list[str]] = defaultdict(list)
    for candidate in candidates:
        of_stem[candidate.label.stem].append(candidate.path.name)
    if len(of_stem) < 2:
        return []
    named = "; ".join(listed(names) for names in of_stem.values())
    return [
        MixedOrderError(
            f"The names belong to {len(of_stem)} runs, stages or experiments: {named}.",
            hint="Steps of different runs have no common order. Choose one by name: "
            f"--match {shlex.quote(_pattern(of_stem))}",
        )
    ]


def _beginning(names: Sequence[str]) -> str:
    columns = zip(*names, strict=False)
    return "".join(first[0] for first in itertools.takewhile(lambda each: len(set(each)) == 1, columns))


def _pattern(of_stem: Mapping[str, Sequence[str]]) -> str:
    """A pattern that matches exactly the names of the run with most checkpoints."""
    stem, names = max(of_stem.items(), key=lambda item: len(item[1]))
    others = [name for other in of_stem if other != stem for name in of_stem[other]]
    begin, end = _beginning(names), _beginning([name[::-1] for name in names])[::-1]
    patterns = ([f"{stem}*", f"*{stem}*"] if stem else []) + [f"{begin.rstrip(string.digits)}*", f"*{end}"]
    fitting = (
        pattern
        for pattern in patterns
        if all(fnmatch.fnmatchcase(name, pattern) for name in names)
        and not any(fnmatch.fnmatchcase(name, pattern) for name in others)
    )
    return next(fitting, "GLOB")


# --- the content of the source ---


def _prefetch(paths: Iterable[AnyPath]) -> None:
    """For a remote run, fetch what states the steps of all candidates at the same time: trainers' logs, or headers."""
    remote = [path for path in paths if isinstance(path, RemotePath)]
    folders = [path for path in remote if path.suffix != WEIGHTS]
    for storage in storages_of(remote):
        storage.prefetch(path / TRAINER_STATE for path in folders)
        storage.prefetch([] if folders else remote, heads=True)


def _children(source: AnyPath) -> list[AnyPath]:
    """The entries of the source, in the order of the numbers in their names."""
    if not source.is_dir():
        what = "is a file, not a directory of checkpoints" if source.exists() else "does not exist"
        raise NoCheckpointsError(f"{source} {what}.", hint="Name the directory that holds the checkpoints.")
    try:
        children = [path for path in source.iterdir() if not path.name.startswith(".")]
    except OSError as error:
        raise ReadError(f"{source} cannot be listed: {error.strerror}.", hint="Check that you may read it.") from error
    labels = {path: read_label(_stem(path)) for path in children}
    return sorted(children, key=lambda path: ((label.number or 0) if (label := labels[path]) else -1, path.name))


def _stem(path: AnyPath) -> str:
    return stem_of(path.name)


def _matches(path: AnyPath, pattern: str) -> bool:
    return fnmatch.fnmatchcase(path.name, pattern) or fnmatch.fnmatchcase(_stem(path), pattern)


def _labels(source: AnyPath, children: Sequence[AnyPath]) -> dict[AnyPath, Label]:
    """The entries that are checkpoints by name, directories before files."""
    folders = {path.name: path for path in children if path.suffix != WEIGHTS and _may_be_checkpoint(path)}
    files = {path.name: path for path in children if path.suffix == WEIGHTS} or _pickles(children)
    is_one_model = any((source / name).is_file() for name in ("model_index.json", "modules.json"))
    stems = [_stem(path) for path in files.values()]
    labels = label_run(
        folders, stems, lambda name: _holds_weights(folders[name], of_any_kind=True), is_one_model=is_one_model
    )
    return {(folders | files)[name]: label for name, label in labels.items()}


def _pickles(children: Sequence[AnyPath]) -> dict[str, AnyPath]:
    """Files of `torch.save` that may be checkpoints, by the names they would have as safetensors."""
    files: dict[str, AnyPath] = {}
    for path in children:
        if is_pickled(path.name) and not path.is_dir():
            files.setdefault(f"{_stem(path)}{WEIGHTS}", path)
    return files


def _may_be_checkpoint(path: AnyPath) -> bool:
    """Whether it is a directory that may be a checkpoint, or a broken link: a checkpoint that was there."""
    if path.name in _NOT_RUNS or is_half_written(path.name):
        return False
    return (path.is_dir() and not _is_result(path)) or (is_link(path) and not path.exists())


def _candidate(path: AnyPath, label: Label, logs: Logs, warnings: list[str]) -> Candidate:
    if path.suffix == WEIGHTS or (is_pickled(path.name) and not path.is_dir()):
        return Candidate(path, label.number or 0, label, stated=False, is_file=True)
    log, stated = _trainer_state(path, logs, warnings)
    if stated is None:
        return Candidate(path, label.number or 0, label, stated=False, log=log)
    if label.clock == "step" and stated != label.number:
        warnings.append(f"{path.name}: {TRAINER_STATE} says step {stated}; that is used, not the number in the name.")
    return Candidate(path, stated, label, stated=True, log=log)


def _is_result(path: AnyPath) -> bool:
    try:
        return (path / RESULT_RECORD).exists()
    except OSError:  # reading it will report the problem
        return False


def _holds_weights(path: AnyPath, *, of_any_kind: bool = False) -> bool:
    """Whether a directory or its folders hold weights: supported ones, or any."""
    try:
        is_read = holds_weights(path) or bool(find_weights(path)[0]) or holds_distributed(path)
        return is_read or (of_any_kind and holds_unsupported(path))
    except (OSError, UnsupportedFormatError):
        return True  # reading it will report the problem


def _trainer_state(path: AnyPath, logs: Logs, warnings: list[str]) -> tuple[int | None, int | None]:
    """Which log a trainer kept beside a checkpoint, and the step that it states."""
    why = "states no global_step"
    step: object = None
    log: int | None = None
    try:
        state, log = logs.read(path)
        step = state.get("global_step")
    except FileNotFoundError:
        return None, None
    except (OSError, ValueError):
        why = "cannot be read"
    if type(step) is int and 0 <= step < _LARGEST_STEP:
        return log, step
    if path.exists():
        warnings.append(f"{path.name}: {TRAINER_STATE} {why}; the step is taken from the name.")
    return log, None


# --- single files: their clocks, and the one without a number ---


def _files_of_runs(found: Sequence[Candidate], twins: set[AnyPath], warnings: list[str]) -> list[Candidate]:
    """Single files with the steps of one clock, by run. Duplicates of the same weights are left out and noted."""
    by_stem: dict[str, list[Candidate]] = defaultdict(list)
    for candidate in found:
        by_stem[candidate.label.stem].append(candidate)
    return [each for of_run in by_stem.values() for each in _without_twins(_on_one_clock(of_run), twins, warnings)]


def _on_one_clock(files: Sequence[Candidate]) -> list[Candidate]:
    """The files of a run with a common order: by headers if all state a step, else the files that count steps."""
    stated = dict(zip(files, thread_map(_stated_step, files), strict=True))
    numbered = [each for each in files if each.label.number is not None]
    if all(step is not None for step in stated.values()):
        _check_headers_consistent([(each, stated[each] or 0) for each in numbered])
        return [_stating(each, step) for each, step in stated.items()]
    clocks = {each.label.clock for each in numbered}
    kept = [each for each in numbered if len(clocks) == 1 or each.label.clock == "step"]
    if not kept:
        return list(files)  # refused later: they have no common order
    if "step" in clocks:
        kept = [_stating(each, stated[each]) for each in kept]
    kept.sort(key=lambda each: each.step)
    ends = [each for each in files if each.label.number is None]
    if len(ends) == 1:
        interval = kept[-1].step - kept[-2].step if len(kept) > 1 else kept[-1].step
        label = dataclasses.replace(ends[0].label, clock=kept[-1].label.clock)
        end = dataclasses.replace(ends[0], step=kept[-1].step + max(interval, 1), label=label)
        kept.append(_stating(end, stated[ends[0]]) if "step" in clocks else end)
    return kept


def _stated_step(file: Candidate) -> int | None:
    """The step that a single file states; None if it cannot be read, since reading its weights reports that."""
    if file.path.suffix == WEIGHTS:
        return stated_step(file.path)
    with suppress(CkavgError, UnreadPickleError):
        return pickled_step(file.path)
    return None


def _stating(file: Candidate, step: int | None) -> Candidate:
    return file if step is None else dataclasses.replace(file, step=step, stated=True)


def _check_headers_consistent(numbered: Sequence[tuple[Candidate, int]]) -> None:
    """Refuse headers that order the files of one clock differently than their names."""
    by_number = sorted(numbered, key=lambda each: (each[0].label.clock, each[0].label.number or 0, each[1]))
    for (before, first), (after, second) in itertools.pairwise(by_number):
        if before.label.clock == after.label.clock and first > second:
            raise MixedOrderError(
                f"{after.path.name} states step {second} in its header, but {before.path.name}, whose number comes "
                f"first, states step {first}.",
                hint="One of them is left from another run, or training restarted its count. Choose by --match.",
            )


def _without_twins(files: Sequence[Candidate], twins: set[AnyPath], warnings: list[str]) -> list[Candidate]:
    """The files without duplicates of the same weights: the last checkpoint of a run is often saved twice."""
    kept: list[Candidate] = []
    for each in sorted(files, key=lambda each: (each.step, each.label.number is None)):
        is_end = each.label.number is None and not each.stated
        twin = kept[-1] if kept and (kept[-1].step == each.step or is_end) else None
        if twin is not None and _hold_the_same(twin.path, each.path):
            warnings.append(f"{each.path.name} holds the same weights as {twin.path.name}: they are one checkpoint.")
            twins.add(each.path)
            continue
        if is_end:
            warnings.append(
                f"{each.path.name} states no step: it is assumed to be the end of the run, at step {each.step}, one "
                "interval after the last."
            )
        kept.append(each)
    return kept


def _hold_the_same(one: AnyPath, other: AnyPath) -> bool:
    with suppress(CkavgError):
        return same_weights(read_checkpoint(one, 0), read_checkpoint(other, 0))
    return False


# --- what is skipped ---


def _without_derived(candidates: Sequence[Candidate]) -> list[Candidate]:
    """The candidates without those derived from others: `step_100_hf` beside `step_100`.

    Of two runs or clocks, one of them in an unsupported format, the other is used. Averages made in training are left
    out.
    """
    runs: dict[tuple[str, Clock], list[Candidate]] = defaultdict(list)
    for candidate in candidates:
        runs[candidate.label.stem, candidate.clock].append(candidate)
    kept = [of_run for (stem, _), of_run in runs.items() if not is_averaged(stem)] or [*runs.values()]
    if len(kept) > 1:
        held = [[of_run for of_run in kept if any(map(holds, of_run))] for holds in (_holds_safetensors, _is_read)]
        kept = next(filter(None, held), kept)
    left = [candidate for of_run in kept for candidate in of_run]
    by_number: dict[int | None, list[Candidate]] = defaultdict(list)
    for candidate in left:
        by_number[candidate.label.number].append(candidate)
    return [each for each in left if not any(_is_derived(each, other) for other in by_number[each.label.number])]


def _holds_safetensors(candidate: Candidate) -> bool:
    path = candidate.path
    with suppress(OSError, UnsupportedFormatError):
        return path.suffix == WEIGHTS if candidate.is_file else not all(each.pickled for each in find_weights(path)[0])
    return False


def _is_read(candidate: Candidate) -> bool:
    return candidate.is_file or _holds_weights(candidate.path)


def _is_derived(one: Candidate, other: Candidate) -> bool:
    """Whether one, of the same number as the other, is made from it."""
    name, its_name = _stem(one.path), _stem(other.path)
    is_longer = name.startswith(its_name) and name[len(its_name) :][:1] in ("-", "_", ".", " ")
    return is_longer and one.label.stem != other.label.stem


def _passed_over(children: Iterable[AnyPath], candidates: Sequence[Candidate]) -> list[str]:
    """Warnings about everything that holds weights and is not used."""
    taken = {resolved(candidate.path) for candidate in candidates}
    flat = candidates[0].is_file
    unstated, half = [], []
    for path in children:
        if resolved(path) in taken or path.name in _NOT_RUNS:
            continue
        if path.suffix == WEIGHTS or (flat and is_pickled(path.name)):
            if flat or not _is_in(path, candidates[-1].path):
                unstated.append(path.name)
        elif path.is_dir() and is_half_written(path.name):
            half.append(path.name)
        elif path.is_dir() and not _is_result(path) and _holds_weights(path):
            unstated.append(path.name)
    told = []
    if unstated:
        like = "step_500.safetensors" if flat else "step_500"
        told.append(f"Skipped: no step in the name: {listed(unstated)}. To include one, give it a name such as {like}.")
    if half:
        told.append(f"Skipped: temporary checkpoint, still being written: {listed(half)}.")
    return told


def _is_in(file: AnyPath, checkpoint: AnyPath) -> bool:
    """Whether a checkpoint holds a copy of a weight file, judged by some of its bytes: the Trainer saves its last
    weights again beside the checkpoints.
    """
    twin = checkpoint / file.name
    with suppress(CkavgError, OSError):
        read = storage_of(file).read
        size = size_of(file)
        places = [size * part // _PROBES for part in range(_PROBES)]
        return size_of(twin) == size and all(
            read(file, place, min(place + _PROBE, size))
            == storage_of(twin).read(twin, place, min(place + _PROBE, size))
            for place in places
        )
    return False


def _check_clocks(source: AnyPath, candidates: Sequence[Candidate]) -> list[str]:
    """Refuse candidates that count different things; return warnings about clocks other than optimizer steps."""
    examples = {candidate.clock: candidate.path.name for candidate in candidates}
    if len(examples) > 1:
        raise MixedOrderError(
            f"{source} mixes names that count different things: {', '.join(sorted(examples.values()))}.",
            hint="Steps, epochs and numbered saves have no common order. Choose one kind by name: --match GLOB",
        )
    (clock,) = examples
    if clock == "number":
        return ["The names do not say what their numbers count. They are assumed to be optimizer steps."]
    told = f"The names count {clock}s, not optimizer steps; so do the steps shown and used here."
    return [] if clock == "step" else [told]


# --- without checkpoints ---


def _nothing_found(source: AnyPath, match: str | None) -> CkavgError:
    names = sorted(path.name for path in source.iterdir() if not path.name.startswith("."))
    if match is not None and names:
        return NoCheckpointsError(
            f"{source} holds no checkpoints whose names match {match!r}.", hint=f"It holds {listed(names)}."
        )
    if (
        holds_weights(source)
        or (source / METADATA).is_file()
        or any((source / name).is_file() for name in ("model_index.json", "modules.json"))
    ):
        return _one_checkpoint(source)
    foreign = [] if any(map(is_pickled, names)) else [name for name in names if unsupported_weights([name])]
    found = refused(_numbered(source, foreign))
    if found is not None:
        more = f" and {len(foreign) - 1} more like it" if len(foreign) > 1 else ""
        return NoCheckpointsError(
            f"{source} holds no safetensors checkpoints, only {foreign[0]}{more}.",
            hint=found.hint,
            command=found.command,
        )
    folders = _folders(source)
    inside = [path for path in folders if any(read_label(child.name) for child in _folders(path))]
    if inside:
        return NoCheckpointsError(
            f"{source} holds no checkpoints, but {inside[0].name} in it seems to.", hint=f"Try {inside[0]}"
        )
    seen = [f"{path.name}/" for path in folders if _holds_weights(path)] + [name for name in names if is_pickled(name)]
    told = f" It holds weights in {listed(seen)}, whose names state no step." if seen else ""
    return NoCheckpointsError(
        f"{source} holds no checkpoints.{told}",
        hint="Expected directories such as checkpoint-500/ or step_500/, or files such as step_500.safetensors.",
    )


def _numbered(source: AnyPath, names: Sequence[str]) -> list[AnyPath]:
    """The files whose names state a step; all of them if none does."""
    labels = read_labels([stem(name) for name in names])
    return [source / name for name in names if stem(name) in labels] or [source / name for name in names]


def _one_checkpoint(source: AnyPath) -> CkavgError:
    """The error for a directory that is a checkpoint itself, or holds files that are not a run."""
    above = resolved(source).parent
    labels = _labels(above, _folders(above))
    if len(labels) > 1 and any(path.name == resolved(source).name for path in labels):
        hint = f"Try its parent: {source.parent}"
    else:
        hint = (
            "An average needs several checkpoints of one run, such as checkpoint-500/ and checkpoint-1000/, or "
            "step_500.safetensors and step_1000.safetensors. Name the directory that holds them."
        )
    return NoCheckpointsError(f"{source} is one checkpoint, not a directory of checkpoints.", hint=hint)


def _folders(directory: AnyPath) -> list[AnyPath]:
    try:
        names = list_folder(directory).folders
    except OSError:
        return []
    wanted = (name for name in names if not (name.startswith(".") or is_training_state(name)))
    return [directory / name for name in wanted][:_LOOKED_INTO]
