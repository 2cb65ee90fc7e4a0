"""Stage *discover*: which checkpoints a directory holds, and at which steps. Lists directories and reads
`trainer_state.json`; opens no weight file (that is `checkpoint.py`).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from ckavg.errors import CkavgError, DuplicateStepError, MixedOrderError, NoCheckpointsError, ReadError
from ckavg.run.checkpoint import RESULT_RECORD, holds_weights
from ckavg.run.layouts import Label, conversion, foreign_weights, read_label
from ckavg.run.trainer_log import TRAINER_STATE, read_trainer_state


@dataclass(frozen=True, slots=True)
class Candidate:
    """A directory or file that looks like a checkpoint; its weights have not been looked at.

    Attributes:
        path: the directory or file.
        step: its optimizer step, from `trainer_state.json` where there is one, else from its name.
        label: what its name says.
        stated: whether `trainer_state.json` gave the step.
    """

    path: Path
    step: int
    label: Label
    stated: bool


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
    found = [candidate for path in _children(source) if (candidate := _candidate(path, warnings))]
    directories = [candidate for candidate in found if candidate.path.is_dir()]
    if directories and len(directories) < len(found):
        warnings.append(f"{source}: only its checkpoint directories are read, not the single files beside them.")
    candidates = sorted(directories or found, key=lambda candidate: (candidate.step, candidate.path.name))
    if not candidates:
        raise _nothing_found(source)
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


def _children(source: Path) -> list[Path]:
    if not source.exists():
        raise NoCheckpointsError(f"{source} does not exist.", hint="Name the directory that holds the checkpoints.")
    if not source.is_dir():
        raise NoCheckpointsError(
            f"{source} is a file, not a directory of checkpoints.",
            hint="Name the directory that holds the checkpoints.",
        )
    try:
        return sorted(path for path in source.iterdir() if not path.name.startswith("."))
    except OSError as error:
        raise ReadError(f"{source} cannot be listed: {error.strerror}.", hint="Check that you may read it.") from error


def _candidate(path: Path, warnings: list[str]) -> Candidate | None:
    if path.is_file():
        label = read_label(path.stem) if path.suffix == ".safetensors" else None
        return Candidate(path, label.number, label, stated=False) if label else None
    label = read_label(path.name)
    if label is None or (path / RESULT_RECORD).exists():
        return None
    if path.name.isdigit() and not holds_weights(path):
        return None
    stated = _stated_step(path, warnings)
    if stated is not None and label.clock == "step" and stated != label.number:
        warnings.append(f"{path.name}: {TRAINER_STATE} says step {stated}; that is used, not the number in the name.")
    return Candidate(path, label.number if stated is None else stated, label, stated=stated is not None)


def _stated_step(path: Path, warnings: list[str]) -> int | None:
    try:
        step = read_trainer_state(path).get("global_step")
    except FileNotFoundError:
        return None
    except (OSError, ValueError, RecursionError):
        warnings.append(f"{path.name}: {TRAINER_STATE} cannot be read; the step is taken from the name.")
        return None
    if type(step) is int and 0 <= step < 10**18:  # of 18 digits at most, as in names
        return step
    warnings.append(f"{path.name}: {TRAINER_STATE} states no global_step; the step is taken from the name.")
    return None


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
    names = [path.name for path in source.iterdir()]
    if holds_weights(source):
        return NoCheckpointsError(
            f"{source} is one checkpoint, not a directory of checkpoints.", hint=f"Try its parent: {source.parent}"
        )
    foreign = foreign_weights(names)
    if foreign:
        return NoCheckpointsError(
            f"{source} holds no safetensors checkpoints, only {foreign}.", hint=conversion(foreign, str(source))
        )
    return NoCheckpointsError(
        f"{source} holds no checkpoints.",
        hint="Expected directories such as checkpoint-500/ or step_500/, or files such as step_500.safetensors.",
    )
