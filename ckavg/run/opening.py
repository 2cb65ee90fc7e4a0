"""Stage *discover*, all of it in order: a directory becomes a run, or every reason why it cannot."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from ckavg.errors import CkavgError, CombinedError, DuplicateStepError, RunError, TooFewCheckpointsError, raise_all
from ckavg.run.checkpoint import read_checkpoint
from ckavg.run.compare import differences
from ckavg.run.discover import Scan, duplicate_steps, scan
from ckavg.run.select import select_steps
from ckavg.run.values import Checkpoint, Run, Selection


@dataclass(frozen=True, slots=True)
class Inspection:
    """What was found in a source, good or bad.

    Attributes:
        source: the directory that was named.
        selection: what was chosen of it.
        checkpoints: the selected ones whose headers are sound, ordered by step, the anchor first.
        problems: what stands in the way of averaging them.
        warnings: what does not, but should be known.
    """

    source: Path
    selection: Selection
    checkpoints: tuple[Checkpoint, ...]
    problems: tuple[CkavgError, ...]
    warnings: tuple[str, ...]


def open_run(
    source: Path | str = ".",
    *,
    init: Path | str | None = None,
    init_step: int = 0,
    every: int | None = None,
    every_from: int | None = None,
    from_step: int | None = None,
    to_step: int | None = None,
    last: int | None = None,
) -> Run:
    """Open a directory of saved checkpoints as one run. Reads headers only, never a weight.

    Args:
        source: directory with the checkpoints of one training run.
        init: the anchor θ_0, a checkpoint directory or safetensors file; None: the first checkpoint selected.
        init_step: optimizer step of `init`.
        every: update frequency f in optimizer steps: visit only checkpoints with (t_k − t_0) mod f = 0.
        every_from: count `every` from this step instead of the anchor's.
        from_step: leave out checkpoints before this optimizer step.
        to_step: leave out checkpoints after this optimizer step.
        last: keep only this many checkpoints, the newest.

    Raises:
        CkavgError: it cannot be averaged; `CombinedError` lists every reason where there are more than one.
    """
    selection = Selection(
        init=None if init is None else Path(init),
        init_step=init_step,
        every=every,
        every_from=every_from,
        from_step=from_step,
        to_step=to_step,
        last=last,
    )
    return as_run(inspect_run(Path(source), selection))


def as_run(found: Inspection) -> Run:
    """The inspected checkpoints as a run; raises what stands in the way."""
    raise_all(found.problems)
    return Run(found.source, found.selection, found.checkpoints, found.warnings)


def inspect_run(source: Path, selection: Selection) -> Inspection:
    """Look at a source and return its problems beside what is sound, instead of raising them.

    Raises:
        NoCheckpointsError, MixedOrderError, ReadError, SettingError: there is nothing to inspect.
    """
    init, init_step = selection.init, selection.init_step
    found = scan(source)
    anchor_step = init_step if init is not None else None
    kept = select_steps(
        [candidate.step for candidate in found.candidates],
        every=selection.every,
        every_from=selection.every_from,
        from_step=selection.from_step,
        to_step=selection.to_step,
        last=selection.last,
        anchor_step=anchor_step,
    )
    candidates = [found.candidates[index] for index in kept]
    problems: list[CkavgError] = list(duplicate_steps(candidates))
    places = [(candidate.path, candidate.step) for candidate in candidates]
    if init is not None:
        places.insert(0, (init, init_step))
        problems += _check_anchor(places)
    checkpoints: list[Checkpoint] = []
    for path, step in places:
        try:
            checkpoints.append(read_checkpoint(path, step))
        except CombinedError as error:
            problems += error.errors
        except CkavgError as error:
            problems.append(error)
    problems += differences(checkpoints, anchor_is_init=init is not None)
    if len(candidates) + (init is not None) < 2:
        problems.append(_too_few(found, len(candidates)))
    warnings = found.warnings + _about_ignored(checkpoints)
    return Inspection(found.source, selection, tuple(checkpoints), tuple(problems), warnings)


def _about_ignored(checkpoints: list[Checkpoint]) -> tuple[str, ...]:
    names = sorted({name for checkpoint in checkpoints for name in checkpoint.ignored})
    if not names:
        return ()
    shown = ", ".join(names[:3]) + (", …" if len(names) > 3 else "")
    read = checkpoints[-1].shards[0].path.name
    return (f"Other weight files beside {read} are neither averaged nor copied: {shown}.",)


def _check_anchor(places: list[tuple[Path, int]]) -> list[CkavgError]:
    (init, init_step), rest = places[0], places[1:]
    if not init.exists():
        places.pop(0)
        return [RunError(f"--init {init} does not exist.", hint="Name the base model's directory or safetensors file.")]
    if not rest or rest[0][1] > init_step:
        return []
    return [
        DuplicateStepError(
            f"--init {init} is taken to be step {init_step}, but the run begins at step {rest[0][1]}.",
            hint="The run has its own anchor: leave out --init. "
            "Or say with --init-step and --from-step where each begins.",
        )
    ]


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
