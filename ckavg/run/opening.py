"""Stage *discover*, all of it in order: a directory becomes a run, or every reason why it cannot."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ckavg.errors import (
    CkavgError,
    CorruptFileError,
    DuplicateStepError,
    MismatchError,
    MissingShardError,
    MixedOrderError,
    OutputError,
    ReadError,
    RunError,
    TooFewCheckpointsError,
    TruncatedShardError,
    UnsupportedFormatError,
    listed,
    raise_all,
)
from ckavg.run.compare import common_part, differences
from ckavg.run.configs import about_adapters_beside, contradictions, quantized, read_facts
from ckavg.run.discover import Scan, duplicate_steps, foreign_logs, scan
from ckavg.run.foreign import refused
from ckavg.run.reading import Reading
from ckavg.run.values import Checkpoint, Remote, Run, Selection

_WORST_FIRST = (
    ReadError, UnsupportedFormatError, MixedOrderError, DuplicateStepError, CorruptFileError, TruncatedShardError,
    MissingShardError, MismatchError, TooFewCheckpointsError, RunError, OutputError,
)  # fmt: skip
"""First what neither waiting nor leaving a checkpoint out cures; last what another place for the result does."""

_NAMED = 4


@dataclass(frozen=True, slots=True)
class Inspection:
    """What was found in a source, good or bad.

    Attributes:
        source: the directory that was named.
        selection: what was chosen of it.
        checkpoints: the selected ones whose headers are sound, ordered by step, the anchor first.
        problems: what stands in the way of averaging them.
        warnings: what does not, but should be known.
        remote: where its files are; None for a run on this machine.
    """

    source: Path
    selection: Selection
    checkpoints: tuple[Checkpoint, ...]
    problems: tuple[CkavgError, ...]
    warnings: tuple[str, ...]
    remote: Remote | None = None

    @property
    def address(self) -> str:
        """What was named, as it was named."""
        return str(self.source) if self.remote is None else self.remote.named(self.source)

    @property
    def home(self) -> Path:
        """Where results go by default: the directory that was named; the current one for a run that is not here."""
        return Path() if self.remote is not None and self.remote.holds(self.source) else self.source


def as_run(found: Inspection) -> Run:
    """The inspected checkpoints as a run; raises what stands in the way."""
    raise_all(found.problems)
    return Run(found.source, found.selection, found.checkpoints, found.warnings, found.remote)


def inspect_run(source: Path, selection: Selection) -> Inspection:
    """Look at a source and return its problems beside what is sound, instead of raising them.

    Raises:
        NoCheckpointsError, MixedOrderError, ReadError, SettingError: there is nothing to inspect.
    """
    found = scan(source)
    read = Reading(found, selection)
    while not read.is_done():
        read.go_on()
    candidates, checkpoints = read.candidates, read.checkpoints
    with_init = selection.init is not None
    problems = [*read.problems, *duplicate_steps(candidates), *foreign_logs(candidates)]
    facts = [read_facts(checkpoint) for checkpoint in checkpoints]
    problems += quantized(checkpoints, facts)
    different, doubtful = contradictions(checkpoints, facts, anchor_is_init=with_init)
    problems += different
    if with_init and checkpoints:
        checkpoints = _only_components_of_the_run(checkpoints)
    problems += differences(checkpoints, anchor_is_init=with_init, common_only=selection.common_only)
    warnings = [*found.warnings, *read.warnings, *doubtful, *_about_ignored(checkpoints)]
    warnings += about_adapters_beside(checkpoints)
    if len(candidates) + with_init < 2:
        problems.append(_too_few(found, len(candidates)))
    if selection.common_only and checkpoints:
        checkpoints = _common(checkpoints, problems, warnings)
    return Inspection(
        found.source, selection, tuple(checkpoints), worst_first(_first_of_kind(problems)), tuple(warnings)
    )


def worst_first(problems: Sequence[CkavgError]) -> tuple[CkavgError, ...]:
    """The problems in the order in which they are told; those of one kind as they come."""
    return tuple(
        sorted(
            problems,
            key=lambda problem: next(
                (rank for rank, kind in enumerate(_WORST_FIRST) if isinstance(problem, kind)), len(_WORST_FIRST)
            ),
        )
    )


def _only_components_of_the_run(checkpoints: list[Checkpoint]) -> list[Checkpoint]:
    """Of a base model that is a pipeline, only the models that the run trains: trainers save no others."""
    init, *own = checkpoints
    if not own or init.kind != "pipeline" or own[-1].kind != "pipeline":
        return checkpoints
    wanted = own[-1].components
    entries = {
        name: entry for name, entry in init.entries.items() if any(name.startswith(f"{part}/") for part in wanted)
    }
    return [dataclasses.replace(init, entries=entries) if entries else init, *own]


def _common(checkpoints: list[Checkpoint], problems: list[CkavgError], warnings: list[str]) -> list[Checkpoint]:
    common = common_part(checkpoints)
    if not common.averaged:
        problems.append(
            MismatchError(
                "No floating tensor is in all checkpoints.", hint="Choose others with --from-step, --to-step or --last."
            )
        )
    if common.copied:
        warnings.append(
            f"Not in every checkpoint, so not averaged but copied from step {checkpoints[-1].step}: "
            f"{_counted(common.copied)}."
        )
    if common.dropped:
        warnings.append(
            f"Not in every checkpoint, nor at step {checkpoints[-1].step}, so left out: {_counted(common.dropped)}."
        )
    return list(common.checkpoints)


def _first_of_kind(problems: Sequence[CkavgError]) -> list[CkavgError]:
    """The problems, those of format counted after the first few: whoever trained in one has all checkpoints in it.
    Those that one command solves are one.
    """
    unread = [path for problem in problems for path in getattr(problem, "unread", ())]
    if len(unread) > 1 and (one := refused(unread)) is not None:
        problems = [one, *(problem for problem in problems if not getattr(problem, "unread", ()))]
    of_format = [problem for problem in problems if isinstance(problem, UnsupportedFormatError)]
    rest = of_format[_NAMED:]
    if not rest:
        return list(problems)
    counted = UnsupportedFormatError(
        f"{len(rest)} more checkpoints are in a format that is not read.", hint="They are to be converted likewise."
    )
    return [problem for problem in problems if problem not in rest] + [counted]


def _counted(names: Sequence[str]) -> str:
    return f"{len(names)} tensor{'s' if len(names) > 1 else ''} ({listed(names)})"


def _about_ignored(checkpoints: list[Checkpoint]) -> tuple[str, ...]:
    told = []
    own = [checkpoint for checkpoint in checkpoints if checkpoint.kind != "pipeline"]
    names = sorted({name for checkpoint in own for name in checkpoint.ignored})
    if names:
        read = checkpoints[-1].shards[0].path.name
        told.append(f"Other weight files beside {read} are neither averaged nor copied: {listed(names)}.")
    averaged = sorted({name for each in checkpoints if each.kind == "pipeline" for name in each.ignored})
    if averaged:
        told.append(f"Averages that training made are neither averaged nor copied: {listed(averaged)}.")
    return tuple(told)


def _too_few(found: Scan, kept: int) -> CkavgError:
    steps = ", ".join(str(candidate.step) for candidate in found.candidates[:12])
    more = ", …" if len(found.candidates) > 12 else ""
    if len(found.candidates) > kept:
        return TooFewCheckpointsError(
            f"The selection leaves {kept} of the {len(found.candidates)} checkpoints in {found.source} "
            f"(steps {steps}{more}).",
            hint="Averaging needs at least two. Widen --from-step, --to-step, --last or --every.",
        )
    return TooFewCheckpointsError(
        f"{found.source} holds one checkpoint (step {steps}); averaging needs at least two.",
        hint="Name the base model with --init, or save more often (save_steps, save_total_limit).",
    )
