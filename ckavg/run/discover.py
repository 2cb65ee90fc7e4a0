"""Stage *discover*: which checkpoints a directory holds, and at which steps. Lists directories and reads
`trainer_state.json`; opens no weight file (that is `checkpoint.py`).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from ckavg.errors import (
    CkavgError,
    DuplicateStepError,
    MismatchError,
    MixedOrderError,
    NoCheckpointsError,
    ReadError,
    UnsupportedFormatError,
)
from ckavg.run.checkpoint import RESULT_RECORD
from ckavg.run.contents import components, holds_weights, list_folder
from ckavg.run.foreign import conversion, foreign_weights, holds_foreign, stem
from ckavg.run.layouts import Label, is_half_written, looks_unstated, read_label
from ckavg.run.trainer_log import TRAINER_STATE, contradiction, logged_losses, read_trainer_state

_LARGEST_STEP = 10**18
_NAMED = 4
_LOOKED_INTO = 50


@dataclass(frozen=True, slots=True)
class Candidate:
    """A directory or file that looks like a checkpoint; its weights have not been looked at.

    Attributes:
        path: the directory or file.
        step: its optimizer step, from `trainer_state.json` where there is one, else from its name.
        label: what its name says.
        stated: whether `trainer_state.json` gave the step.
        log: number of the log that its trainer kept, which checkpoints of one run have in common; None without one.
    """

    path: Path
    step: int
    label: Label
    stated: bool
    log: int | None = None

    @property
    def is_file(self) -> bool:
        """Whether it is a single file, by its name."""
        return self.path.suffix == ".safetensors"


@dataclass(frozen=True, slots=True)
class Scan:
    """What lies in a source: candidates by step, and what a user should know about the rest."""

    source: Path
    candidates: tuple[Candidate, ...]
    warnings: tuple[str, ...]


def scan(source: Path) -> Scan:
    """Find the checkpoints in a directory, in numeric order of their steps.

    Raises:
        NoCheckpointsError: it is no directory, or holds no checkpoint.
        MixedOrderError: its checkpoints count different things.
        ReadError: the system would not let us list it.
    """
    warnings: list[str] = []
    children = _children(source)
    logs = _Logs()
    found = [candidate for path in children if (candidate := _candidate(path, logs, warnings))]
    directories = [candidate for candidate in found if not candidate.is_file]
    if directories and len(directories) < len(found):
        warnings.append(f"{source}: only its checkpoint directories are read, not the single files beside them.")
    candidates = sorted(directories or found, key=lambda candidate: (candidate.step, candidate.path.name))
    if not candidates:
        raise _nothing_found(source)
    warnings += _passed_over(children, flat=not directories)
    warnings += _check_order(source, candidates)
    return Scan(source, tuple(candidates), tuple(warnings))


def duplicate_steps(candidates: Iterable[Candidate]) -> list[CkavgError]:
    """One error for every step that more than one candidate claims."""
    by_step = defaultdict(list)
    for candidate in candidates:
        by_step[candidate.step].append(candidate.path.name)
    return [
        DuplicateStepError(
            f"step {step} is there {len(names)} times: {', '.join(names)}.",
            hint="Each step may appear once. Move the stale ones out of the directory.",
        )
        for step, names in sorted(by_step.items())
        if len(names) > 1
    ]


def foreign_logs(candidates: Iterable[Candidate]) -> list[CkavgError]:
    """An error where the trainers' logs tell that the candidates are of more than one run."""
    of_log: dict[int, list[str]] = defaultdict(list)
    for candidate in candidates:
        if candidate.log is not None:
            of_log[candidate.log].append(candidate.path.name)
    if len(of_log) < 2:
        return []
    named = " and ".join(_shown(names) for names in of_log.values())
    return [
        MismatchError(
            f"The checkpoints are of {len(of_log)} runs: by their {TRAINER_STATE}, {named} logged different losses for "
            "the same steps.",
            hint="Some are left from an earlier run in the same directory. Move those away, or leave them out with "
            "--from-step, --to-step or --last.",
        )
    ]


@dataclass(slots=True)
class _Logs:
    """The logs seen so far, each by the latest checkpoint that has it; checkpoints of one run share one."""

    known: list[dict[int, set[float]]] = field(default_factory=list)

    def number(self, losses: dict[int, set[float]]) -> int | None:
        """Which log this is, or goes on with; None where it shares no step with any."""
        if not losses:
            return None
        for number, log in enumerate(self.known):
            if log.keys() & losses.keys() and contradiction(log, losses) is None:
                self.known[number] = losses if len(losses) > len(log) else log
                return number
        if any(log.keys() & losses.keys() for log in self.known) or not self.known:
            self.known.append(losses)
            return len(self.known) - 1
        return None


def _children(source: Path) -> list[Path]:
    """What lies in the source, in the order of the numbers in the names."""
    if not source.exists():
        raise NoCheckpointsError(f"{source} does not exist.", hint="Name the directory that holds the checkpoints.")
    if not source.is_dir():
        raise NoCheckpointsError(
            f"{source} is a file, not a directory of checkpoints.",
            hint="Name the directory that holds the checkpoints.",
        )
    try:
        listed = [path for path in source.iterdir() if not path.name.startswith(".")]
    except OSError as error:
        raise ReadError(f"{source} cannot be listed: {error.strerror}.", hint="Check that you may read it.") from error
    labels = {path: read_label(path.stem if path.suffix == ".safetensors" else path.name) for path in listed}
    return sorted(listed, key=lambda path: (label.number if (label := labels[path]) else -1, path.name))


def _candidate(path: Path, logs: _Logs, warnings: list[str]) -> Candidate | None:
    if path.suffix == ".safetensors":
        label = read_label(path.stem)
        return Candidate(path, label.number, label, stated=False) if label else None
    label = read_label(path.name)
    if label is None or not path.is_dir() or is_half_written(path.name) or _is_result(path):
        return None
    if path.name.isdigit() and not _holds_any(path):
        return None
    state = _trainer_state(path, warnings)
    stated = _stated_step(path, state, warnings)
    if stated is not None and label.clock == "step" and stated != label.number:
        warnings.append(f"{path.name}: {TRAINER_STATE} says step {stated}; that is used, not the number in the name.")
    log = logs.number(logged_losses(state or {}))
    return Candidate(path, label.number if stated is None else stated, label, stated=stated is not None, log=log)


def _is_result(path: Path) -> bool:
    try:
        return (path / RESULT_RECORD).exists()
    except OSError:  # whoever reads it says what is wrong
        return False


def _holds_any(path: Path) -> bool:
    """Whether a directory holds weights of any kind, in it or in its folders: a bare number says too little."""
    try:
        listing = list_folder(path)
        return holds_weights(path) or bool(components(path, listing.folders)[0]) or holds_foreign(path)
    except (OSError, UnsupportedFormatError):
        return True  # whoever reads it says what is wrong


def _trainer_state(path: Path, warnings: list[str]) -> Mapping[str, object] | None:
    try:
        return read_trainer_state(path)
    except FileNotFoundError:
        return None
    except (OSError, ValueError):
        warnings.append(f"{path.name}: {TRAINER_STATE} cannot be read; the step is taken from the name.")
        return None


def _stated_step(path: Path, state: Mapping[str, object] | None, warnings: list[str]) -> int | None:
    if state is None:
        return None
    step = state.get("global_step")
    if type(step) is int and 0 <= step < _LARGEST_STEP:
        return step
    warnings.append(f"{path.name}: {TRAINER_STATE} states no global_step; the step is taken from the name.")
    return None


def _passed_over(children: Iterable[Path], *, flat: bool) -> list[str]:
    """Warnings about what holds weights, has the name of a checkpoint, and is none that could be read."""
    unstated, half = [], []
    for path in children:
        is_file = path.suffix == ".safetensors"
        if is_file and flat and looks_unstated(path.stem):
            unstated.append(path.name)
        elif is_file or not (looks_unstated(path.name) or is_half_written(path.name)) or not path.is_dir():
            continue
        elif is_half_written(path.name):
            half.append(path.name)
        elif holds_weights(path) and not _is_result(path):
            unstated.append(path.name)
    told = []
    if unstated:
        told.append(
            f"Passed over, for the name states no step: {_shown(unstated)}. To have one take part, give it a name "
            "such as step_500."
        )
    if half:
        told.append(f"Passed over, for a trainer names them so while it writes them: {_shown(half)}.")
    return told


def _shown(names: Sequence[str]) -> str:
    return ", ".join(names[:_NAMED]) + (f" and {len(names) - _NAMED} more" if len(names) > _NAMED else "")


def _check_order(source: Path, candidates: Sequence[Candidate]) -> list[str]:
    """Refuse what has no common order; return warnings about clocks that do not count optimizer steps."""
    stages = sorted({candidate.label.stage for candidate in candidates})
    if len(stages) > 1:
        named = ", ".join(stage or "none" for stage in stages)
        raise MixedOrderError(
            f"{source} mixes stages ({named}), whose steps have no common order.",
            hint="Move each stage into a directory of its own and average it there.",
        )
    clocks = {"step" if candidate.stated else candidate.label.clock for candidate in candidates}
    if len(clocks) > 1:
        example = {("step" if c.stated else c.label.clock): c.path.name for c in candidates}
        raise MixedOrderError(
            f"{source} mixes names that count different things: {', '.join(sorted(example.values()))}.",
            hint="Leave one kind in the directory; steps, epochs and numbered saves have no common order.",
        )
    if "save" in clocks:
        return ["The names count saves, not optimizer steps, and so do the steps shown and used here."]
    if "epoch" in clocks:
        return ["The names count epochs, not optimizer steps, and so do the steps shown and used here."]
    return []


def _nothing_found(source: Path) -> CkavgError:
    names = sorted(path.name for path in source.iterdir())
    if holds_weights(source):
        return NoCheckpointsError(
            f"{source} is one checkpoint, not a directory of checkpoints.", hint=f"Try its parent: {source.parent}"
        )
    foreign = [name for name in names if foreign_weights([name])]
    numbered = [name for name in foreign if read_label(stem(name))]
    found = conversion(source / name for name in numbered or foreign)
    if found is not None:
        more = f" and {len(foreign) - 1} more like it" if len(foreign) > 1 else ""
        return NoCheckpointsError(
            f"{source} holds no safetensors checkpoints, only {foreign[0]}{more}.",
            hint=found.advice,
            command=found.command,
        )
    inside = [path for path in _folders(source) if any(read_label(child.name) for child in _folders(path))]
    if inside:
        return NoCheckpointsError(
            f"{source} holds no checkpoints, but {inside[0].name} in it seems to.", hint=f"Try {inside[0]}"
        )
    return NoCheckpointsError(
        f"{source} holds no checkpoints.",
        hint="Expected directories such as checkpoint-500/ or step_500/, or files such as step_500.safetensors.",
    )


def _folders(directory: Path) -> list[Path]:
    try:
        return [directory / name for name in list_folder(directory).folders][:_LOOKED_INTO]
    except OSError:
        return []
