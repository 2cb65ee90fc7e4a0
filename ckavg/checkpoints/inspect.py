"""Stage *discover*, all steps in order: a directory becomes a run, or all reasons why it cannot."""

from __future__ import annotations

import dataclasses
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

from ckavg.checkpoints.check_consistent import (
    changing,
    common_part,
    constant_parts,
    differences,
    tied_copies,
    ungathered,
)
from ckavg.checkpoints.configs import (
    contradicting_headers,
    contradictions,
    quantized,
    read_facts,
    several_named_runs,
    ties_embeddings,
    without_entries,
    without_shared,
)
from ckavg.checkpoints.discover import Scan, duplicate_steps, scan, several_runs
from ckavg.checkpoints.loader import Loader
from ckavg.checkpoints.model_names import conversion
from ckavg.checkpoints.run import Checkpoint, Run, Selection, WhyLeftOut
from ckavg.checkpoints.trainer_log import unrelated_logs
from ckavg.checkpoints.unsupported import NOT_SAFETENSORS, refused
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
from ckavg.storage.base import AnyPath

_WORST_FIRST = (
    ReadError, UnsupportedFormatError, MixedOrderError, DuplicateStepError, CorruptFileError, TruncatedShardError,
    MissingShardError, MismatchError, TooFewCheckpointsError, RunError, OutputError,
)  # fmt: skip
"""Errors, worst first: those that neither waiting nor leaving out a checkpoint cures come first, output paths last."""

_NAMED = 4
_LISTED = 12


@dataclass(frozen=True, slots=True)
class Inspection(Run):
    """The content of a source: the selected checkpoints with valid headers, and the problems that prevent averaging."""

    problems: tuple[CkavgError, ...]

    __repr__, __str__ = Run.__repr__, Run.__str__


def as_run(found: Inspection) -> Run:
    """The inspected checkpoints as a run; raises the problems if there are any."""
    raise_all(found.problems)
    return Run(found.source, found.selection, found.checkpoints, found.warnings)


def inspect_run(source: AnyPath, selection: Selection) -> Inspection:
    """Inspect a source; return problems beside the valid checkpoints instead of raising them.

    Raises:
        NoCheckpointsError, MixedOrderError, ReadError, SettingError: there is nothing to inspect.
    """
    return inspect_runs(source, [selection])[0]


def inspect_runs(source: AnyPath, selections: Sequence[Selection]) -> list[Inspection]:
    """Inspect a source for several selections with one `match`; it is listed once.

    Raises:
        CkavgError: see `inspect_run`.
    """
    found = scan(source, match=selections[0].match)
    loader = Loader(found)
    return [_inspected(found, loader, selection) for selection in selections]


def _inspected(found: Scan, loader: Loader, selection: Selection) -> Inspection:
    loader.load(selection)
    candidates, checkpoints = loader.candidates, loader.checkpoints
    with_init = selection.init is not None
    of_several = several_runs(candidates) or several_named_runs(checkpoints[with_init:])
    twice = [] if of_several else duplicate_steps(candidates)
    of_logs = unrelated_logs((candidate.path.name, candidate.log) for candidate in candidates)
    problems = [*loader.problems, *twice, *of_logs, *of_several]
    warnings = [*found.warnings, *loader.warnings]
    if (selection.last or 0) > len(found.candidates):
        warnings.append(f"--last {selection.last} asks for more checkpoints than there are: {len(found.candidates)}.")
    if len(candidates) + with_init < 2:
        problems.append(_too_few(found, len(candidates), checkpoints))
    if checkpoints and not of_several:
        checkpoints = _compared(checkpoints, selection, problems, warnings)
    told = worst_first(_first_of_kind(problems))
    return Inspection(found.source, selection, tuple(checkpoints), tuple(warnings), told)


def _compared(
    checkpoints: list[Checkpoint], selection: Selection, problems: list[CkavgError], warnings: list[str]
) -> list[Checkpoint]:
    """The checkpoints as parts of one run, reduced to what is averaged; problems and warnings are added."""
    with_init = selection.init is not None
    checkpoints = _with_common_parts(checkpoints, with_init=with_init)
    facts = [read_facts(checkpoint) for checkpoint in checkpoints]
    problems += ungathered(checkpoints)
    problems += quantized(checkpoints, facts)
    different, doubtful = contradictions(checkpoints, facts, anchor_is_init=with_init)
    in_headers, also_doubtful, hashes = contradicting_headers(checkpoints, anchor_is_init=with_init)
    problems += different + in_headers
    warnings += [*doubtful, *also_doubtful, *_about_left_out(checkpoints)]
    checkpoints[-1] = without_entries(checkpoints[-1], hashes)
    checkpoints = [without_shared(*each) for each in zip(checkpoints, facts, strict=True)]
    checkpoints = _without_copies(checkpoints, [ties_embeddings(each) for each in facts], warnings)
    mismatches = differences(checkpoints, anchor_is_init=with_init, common_only=selection.common_only)
    problems += mismatches
    if selection.common_only:
        checkpoints, nothing, not_everywhere = common_part(checkpoints)
        problems += nothing
        warnings += not_everywhere
    elif not mismatches:
        problems += changing(checkpoints)
        constant = constant_parts(checkpoints)
        tables = {
            id(each.entries): each.with_copied(constant).entries for each in checkpoints
        }  # keeps equal tables shared
        checkpoints = [dataclasses.replace(each, entries=tables[id(each.entries)]) for each in checkpoints]
    problems += [] if problems else _nothing_to_average(checkpoints[-1])
    return checkpoints


def worst_first(problems: Sequence[CkavgError]) -> tuple[CkavgError, ...]:
    """The problems in the order to report them; those of one kind keep their order."""
    ranks = {kind: rank for rank, kind in enumerate(_WORST_FIRST)}
    return tuple(
        sorted(problems, key=lambda problem: min(ranks.get(kind, len(ranks)) for kind in type(problem).__mro__))
    )


def _with_common_parts(checkpoints: list[Checkpoint], *, with_init: bool) -> list[Checkpoint]:
    """The checkpoints with only the parts of the model that all of them have.

    Trainers save the trained parts; the other parts of a base model are left out without a warning.
    """
    init, own = checkpoints[:with_init], checkpoints[with_init:]
    if not own:
        return checkpoints
    common = set(own[-1].parts).intersection(*(each.parts for each in own))
    if common and not any(each.kind == "pipeline" for each in own):
        own = [each.with_parts(common, why="not everywhere") for each in own]
    wanted = set(own[-1].parts)
    return [each.with_parts(wanted) if wanted & set(each.parts) else each for each in init] + own


def _without_copies(
    checkpoints: list[Checkpoint], tied: Sequence[bool | None], warnings: list[str]
) -> list[Checkpoint]:
    """The checkpoints without heads that only some of them store, as copies of the embedding."""
    copies = tied_copies(checkpoints, tied)
    for name, original in copies.items():
        steps = [str(each.step) for each in checkpoints if name in each.entries]
        warnings.append(
            f"{name!r} is stored only at step {listed(steps)}, where it equals {original!r}. It is tied to that, as in "
            "the other checkpoints, and left out."
        )
    return [
        dataclasses.replace(each, entries={name: entry for name, entry in each.entries.items() if name not in copies})
        if copies.keys() & each.entries.keys()
        else each
        for each in checkpoints
    ]


def _nothing_to_average(last: Checkpoint) -> list[CkavgError]:
    if any(entry.is_floating and entry.numel for entry in last.entries.values()):
        return []
    name, entry = next(iter(last.entries.items()))
    return [
        UnsupportedFormatError(
            f"{last.path} holds no tensor to average: {name!r} has dtype {entry.dtype!r}, which cannot be averaged.",
            hint="Expected tensors of float32, bfloat16, float16 or float64. Quantized weights cannot be averaged: "
            "average the checkpoints from before quantizing.",
        )
    ]


def _first_of_kind(problems: Sequence[CkavgError]) -> list[CkavgError]:
    """The problems, with those that one command solves merged, and format problems counted after the first few: usually
    all checkpoints have the same one.
    """
    unread = [path for problem in problems for path in getattr(problem, "unread", ())]
    if len(unread) > 1:
        problems = [
            *filter(None, [_with_reason(refused(unread), problems)]),
            *(problem for problem in problems if not getattr(problem, "unread", ())),
        ]
    of_format = [problem for problem in problems if isinstance(problem, UnsupportedFormatError)]
    rest = of_format[_NAMED:]
    if not rest:
        return list(problems)
    counted = UnsupportedFormatError(
        f"{len(rest)} more checkpoints are in an unsupported format.", hint="Convert them in the same way."
    )
    return [problem for problem in problems if problem not in rest] + [counted]


def _with_reason(
    refusal: UnsupportedFormatError | None, problems: Sequence[CkavgError]
) -> UnsupportedFormatError | None:
    """The error for all unsupported checkpoints, with the reason for the first pickle among them."""
    unread = [each.message for each in problems if getattr(each, "unread", ())]
    of_pickles = [message for message in unread if NOT_SAFETENSORS not in message]
    if refusal is None or not of_pickles:
        return refusal
    message = f"{refusal.message} {of_pickles[0]}"
    return UnsupportedFormatError(message, hint=refusal.hint, command=refusal.command, unread=refusal.unread)


def _about_left_out(checkpoints: Sequence[Checkpoint]) -> list[str]:
    """Warnings about weights in the checkpoints that are not averaged."""
    by_why: dict[WhyLeftOut, list[str]] = defaultdict(list)
    for why, name in sorted({each for checkpoint in checkpoints for each in checkpoint.left_out}):
        by_why[why].append(name)
    last, warnings = checkpoints[-1], []
    if "adapter" in by_why:
        warnings.append(
            f"{last.path.name} holds an adapter beside a whole model. The whole model is averaged; the adapter "
            "and its config are neither averaged nor copied."
        )
    beside = sorted(name for why in ("second model", "copy", "link", "adapter") for name in by_why[why])
    if beside:
        read = last.shards[0].path.name
        warnings.append(f"Other weight files beside {read} are neither averaged nor copied: {listed(beside, _LISTED)}.")
    texts: dict[WhyLeftOut, str] = {
        "average": "Averages made in training are neither averaged nor copied",
        "training state": "Training state is neither averaged nor copied",
        "pickle": "Pickles outside the model are neither averaged nor copied",
        "other format": "Not safetensors, so neither averaged nor copied",
        "not everywhere": "Not in every checkpoint, so neither averaged nor copied",
    }
    if last.is_distributed and (found := conversion(last.entries)) is not None:
        warnings.append(
            f"The tensors have the names of {found[0]}, and so has the result. For the names of Hugging Face, convert "
            f"the checkpoints with {found[1]}, which reads distributed checkpoints."
        )
    return warnings + [f"{text}: {listed(by_why[why], _LISTED)}." for why, text in texts.items() if by_why[why]]


def _too_few(found: Scan, kept: int, checkpoints: Sequence[Checkpoint]) -> CkavgError:
    steps = listed([str(candidate.step) for candidate in found.candidates], _LISTED)
    if len(found.candidates) > kept:
        return TooFewCheckpointsError(
            f"The selection leaves {kept} of the {len(found.candidates)} checkpoints in {found.source} "
            f"(steps {steps}).",
            hint="Averaging needs at least two. Widen --steps, --from-step, --to-step, --best, --last or --every.",
        )
    of_adapter = any(each.kind == "adapter" for each in checkpoints)
    base = "the adapter as it was before training" if of_adapter else "the base model"
    return TooFewCheckpointsError(
        f"{found.source} holds one checkpoint (step {steps}); averaging needs at least two.",
        hint=f"Name {base} with --init, or save more often (save_steps, save_total_limit).",
    )
