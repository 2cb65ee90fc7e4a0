"""What averaging would read and write: everything that can be told, or refused, before a weight is read."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from ckavg.averaging import advice
from ckavg.averaging.adapters import Layout, Products, check_rank, find_products, lay_out
from ckavg.averaging.recipe import current_result, finished_result
from ckavg.averaging.sources import opened
from ckavg.checkpoints.checkpoint import RESULT_RECORD
from ckavg.checkpoints.fingerprints import Fingerprints, file_fingerprints
from ckavg.checkpoints.inspect import Inspection, as_run, worst_first
from ckavg.checkpoints.run import Run, Selection, averaged_statistics, distinct_tables
from ckavg.checkpoints.trainer_log import Course, read_course
from ckavg.errors import CkavgError, SettingError, listed, raise_all, short_repr
from ckavg.output.origin import Origin, find_origin
from ckavg.output.output_path import CARD, is_result, output_path_problems, path_within, space_problems
from ckavg.output.record import ALL_OTHERS, Record, is_mostly_anchor
from ckavg.output.side_files import gather_side_files, name_of_weights
from ckavg.output.staging import bring_back
from ckavg.output.upload import IN_CACHE, Target, place_here, target_of
from ckavg.output.weight_files import WeightPlan, plan_weights
from ckavg.path.plan import PathPlan, check_sample, plan_path
from ckavg.path.table import ZeroSigma
from ckavg.schemes import Coefficients, Scheme, Timeline
from ckavg.storage.address import output_address
from ckavg.storage.atomic import resolved
from ckavg.storage.base import AnyPath

DTYPES = ("source", "float32", "bfloat16", "float16", "float64")
ACCUMULATE = ("float32", "float64")


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """What was asked for, besides the schemes and where their results go.

    Attributes:
        dtype: output dtype of floating tensors: `source`, `float32`, `bfloat16`, `float16` or `float64`.
        accumulate: `float32` or `float64`; float64 checkpoints are accumulated in float64 in any case.
        path_exclude: shell patterns of tensors that do not count in the path length.
        zero_sigma: `exclude` leaves tensors without spread out of the sum and of N; `eps` divides by σ_p + 1e-8.
        sample: estimate the path length from this fraction of each tensor, in (0, 1]; 1 is exact.
        snapshot_every: also write the average as it stood at every multiple of so many optimizer steps.
        card: a Markdown file whose fields and text come first in the model card of the result.
        allow_nonfinite: average checkpoints that hold NaN or infinity, too.
        allow_anchor: form an average that is in effect its anchor.
        force: replace an existing result.
        lora: how low-rank adapters are averaged: `factors`, tensor by tensor, or `product`, the products s·BA; None:
            as `factors`, and the run need not be one of adapters.
        rank: R, to which averaged products are cut; None: they keep all their columns.

    Raises:
        SettingError: a value is none of those.
    """

    dtype: str = "source"
    accumulate: str = "float32"
    path_exclude: tuple[str, ...] = ()
    zero_sigma: ZeroSigma = "exclude"
    sample: float = 1.0
    snapshot_every: int | None = None
    card: Path | str | None = None
    allow_nonfinite: bool = False
    allow_anchor: bool = False
    force: bool = False
    lora: str | None = None
    rank: int | None = None

    def __post_init__(self) -> None:
        for name, choices in (("dtype", DTYPES), ("accumulate", ACCUMULATE), ("lora", (None, "factors", "product"))):
            if getattr(self, name) not in choices:
                raise SettingError(
                    f"{name} is {getattr(self, name)!r}; it must be one of {', '.join(filter(None, choices))}."
                )
        check_sample(self.sample)
        check_rank(self.lora, self.rank)
        if self.snapshot_every is not None and self.snapshot_every < 1:
            raise SettingError(f"snapshot-every is {self.snapshot_every}; it must be 1 or more optimizer steps.")


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What averaging a run would read and write.

    Attributes:
        run: the checkpoints that take part.
        scheme: how they are averaged.
        out: where the result goes.
        options: what else was asked for.
        weights: the weight files of the result.
        side_files: what is copied beside them, by relative path.
        origin: what the card of the result says of the run.
        snapshots: indices of the checkpoints after which the average is written, too; the last is not among them.
        path: how the path length is had; None for schemes that do not need it.
        course: how training went, as its trainer logged it.
        tried: names of the results that are there already, or are planned with this one.
        replay_bytes: bytes that pass 2 reads.
        warnings: what a user should know before it starts.
        products: what is averaged by its products; None: nothing.
        layouts: of each output with products, by the index of its checkpoint: its rank depends on how many it sums.
        current: the record of the result that is there, or was formed to be sent to an address, where making it again
            would change nothing.
        target: the address that the result goes to; it is formed at `out`, and sent from there.
        is_there: whether `current` is at the address already.
    """

    run: Run
    scheme: Scheme
    out: Path
    options: Options
    weights: WeightPlan
    side_files: dict[str, bytes]
    origin: Origin
    snapshots: tuple[int, ...]
    path: PathPlan | None
    course: Course
    tried: frozenset[str]
    replay_bytes: int
    warnings: tuple[str, ...]
    products: Products | None = None
    layouts: Mapping[int, Layout] = field(default_factory=dict)
    current: Record | None = None
    target: Target | None = None
    is_there: bool = False

    __repr__ = short_repr

    def layout(self, index: int) -> Layout:
        """The files of the output that is written after checkpoint `index`."""
        return self.layouts.get(index) or Layout(self.weights, self.side_files)

    def with_terms(self, terms: Mapping[int, Mapping[str, int]]) -> Plan:
        """The same, where each output, by its index, sums so many products of each pair, by the name of A."""
        if self.products is None:
            return self
        layouts = {
            index: lay_out(self.run, self.products, self.side_files, self.options.dtype, each)
            for index, each in terms.items()
        }
        *_, last = layouts.values()
        return replace(self, weights=last.weights, side_files=last.side_files, layouts=layouts)

    @property
    def files(self) -> tuple[str, ...]:
        """Every file of one output, by relative path, sorted."""
        return tuple(sorted({shard.name for shard in self.weights.shards} | {*self.side_files, CARD, RESULT_RECORD}))

    @property
    def all_files(self) -> tuple[str, ...]:
        """Every file of all outputs, by path in the result."""
        return tuple(
            (out / name).relative_to(self.out).as_posix() for out in self.outputs.values() for name in self.files
        )

    @property
    def weight_files(self) -> dict[Path, int]:
        """Bytes of every weight file, those of snapshots among them, by path in the result."""
        return {
            out.relative_to(self.out) / shard.name: shard.nbytes
            for index, out in self.outputs.items()
            for shard in self.layout(index).weights.shards
        }

    @property
    def outputs(self) -> dict[int, Path]:
        """Where the average goes after each checkpoint that has one written, by its index; the result itself last."""
        steps = self.run.steps
        return {index: self.out / f"checkpoint-{steps[index]}" for index in self.snapshots} | {len(steps) - 1: self.out}

    def shown(self, place: Path | None = None) -> Path:
        """Where the result, or an output of it, is for its user: its path, or its address."""
        place = place or self.out
        return place if self.target is None else self.target.directory / place.relative_to(self.out)

    @property
    def is_up_to_date(self) -> bool:
        """Whether there is nothing to do."""
        return self.current is not None and (self.target is None or self.is_there)

    @property
    def foreseen(self) -> tuple[str, ...]:
        """What can be said of the coefficients before anything is read; a result's record says it, too."""
        known = self.known_coefficients
        return () if known is None else advice.about_coefficients(self.scheme, known, self.run.steps)

    @property
    def known_coefficients(self) -> Coefficients | None:
        """β and α, where they can be told before anything is read; None where they hang on the path."""
        if self.scheme.needs_path:
            return None
        timeline = Timeline(self.run.steps, anchor_is_init=self.run.anchor_is_init)
        return self.scheme.checked_coefficients(timeline).sparing(averaged_statistics(self.run.tensors))

    @property
    def path_bytes(self) -> int:
        """Bytes that pass 1 reads; 0 for schemes that do not need it, and where the path is known."""
        return self.path.nbytes if self.path else 0

    @property
    def write_bytes(self) -> int:
        """Bytes that will be written."""
        layouts = [self.layout(index) for index in self.outputs]
        return sum(each.weights.nbytes + sum(map(len, each.side_files.values())) for each in layouts)


def plan_average(run: Run | AnyPath | str, scheme: Scheme, *, out: Path | str | None = None, **options: Any) -> Plan:
    """Say what `average` would read and write, and refuse what cannot be done. Reads no weight and writes nothing.

    Args:
        run, scheme, out: as of `average`.
        options: as of `Options`.

    Raises:
        CkavgError: as of `average`.
    """
    return plan_averages([(opened(run), scheme, out)], Options(**options))[0]


Wanted = tuple[Run, Scheme, Path | str | Target | None]
"""An average: its checkpoints, the anchor first, how they are averaged, and where the result goes."""


def plan_averages(wanted: Sequence[Wanted], options: Options | None = None) -> list[Plan]:
    """Plans of several averages, which are carried out together; what they share is read once.

    Args:
        wanted: the averages, of one run or of several selections from one source; at least one.
        options: what else is asked for.

    Raises:
        CkavgError: as of `average`.
    """
    options = options or Options()
    of_run: dict[int, list[Wanted]] = {}
    for each in wanted:
        of_run.setdefault(id(each[0]), []).append(each)
    planned = {
        id(each): plan for some in of_run.values() for each, plan in zip(some, _plan(some, options), strict=True)
    }
    plans = [planned[id(each)] for each in wanted]
    checkpoints = {(each.step, each.path): each for run, _, _ in wanted for each in run.checkpoints}
    problems, outcomes = [], {} if options.force else _results_there(plans)
    for place, plan in enumerate(plans):
        outcome = outcomes.get(place, "")
        if isinstance(outcome, Record):
            plans[place] = replace(plan, current=outcome, is_there=plan.target is not None)
            continue
        if plan.target is not None:
            problems += plan.target.problems(
                checkpoints.values(), force=options.force, files=plan.all_files, differs=outcome
            )
            plans[place] = plan = replace(plan, current=finished_result(plan, file_fingerprints(plan.run)))
        else:
            problems += output_path_problems(
                plan.out,
                plan.run.source,
                tuple(checkpoints.values()),
                force=options.force,
                files=plan.files,
                differs=outcome,
            )
        # Each by itself: those that do not fit together are refused where they are carried out together.
        problems += _space_problems([plan])
        problems += [] if (problem := anchor_problem(plan, plan.known_coefficients)) is None else [problem]
    raise_all(worst_first(problems))
    return plans


def plan_in_memory(run: Run, scheme: Scheme, options: Options) -> Plan:
    """The plan of an average that is not written: whatever is where its result would go does not matter.

    Raises:
        CkavgError: as of `average`.
    """
    (plan,) = _plan([(run, scheme, None)], options)
    raise_all([] if (problem := anchor_problem(plan, plan.known_coefficients)) is None else [problem])
    return plan


def _results_there(plans: Sequence[Plan]) -> dict[int, Record | str]:
    """Of each plan at whose place a result is: that result, if it is up to date, or what differs."""
    found: dict[int, Record | str] = {}
    fingerprints: dict[int, Fingerprints] = {}
    for place, plan in enumerate(plans):
        if plan.target.holds_result if plan.target is not None else is_result(resolved(plan.out)):
            run = plan.run
            sources = fingerprints[id(run)] = fingerprints.get(id(run)) or file_fingerprints(run)
            found[place] = current_result(plan, sources)
    return found


def _space_problems(plans: Sequence[Plan]) -> list[CkavgError]:
    """One error for each disk that has too few bytes for what is still to be written there."""
    new = [plan for plan in plans if plan.current is None]
    elsewhere, here = (
        [(plan.out, plan.write_bytes) for plan in new if bool(plan.target) is each] for each in (True, False)
    )
    return space_problems(here) + space_problems(elsewhere, hint=IN_CACHE)


def _plan(wanted: Sequence[Wanted], options: Options) -> list[Plan]:
    """Plans of averages of one run."""
    run = wanted[0][0]
    weights = plan_weights(run.last, options.dtype, file_name=name_of_weights(run))
    products = find_products(run, options.lora, options.rank)
    beside = gather_side_files(run, weights)
    origin = find_origin(run, beside.files, options.card)
    needs_path = any(scheme.needs_path for _, scheme, _ in wanted)
    path = plan_path(run, exclude=options.path_exclude, sample=options.sample) if needs_path else None
    course = read_course(run.last.path)
    tried = _results_in(run.home / "averaged") | {scheme.label for _, scheme, _ in wanted}
    plans: list[Plan] = []
    target: Target | None = None
    for _, scheme, out in wanted:
        if isinstance(out, Target):
            target, place = out, out.place
        else:
            place = output_path(run.home, scheme, run.selection, out, options.lora, options.rank)
            target = None if out is None else target_of(place, like=plans[-1].target if plans else None)
        start = start_of(run, scheme)
        snapshots = _snapshots(run, start, options.snapshot_every)
        of_path = path if scheme.needs_path else None
        warnings = run.warnings + beside.warnings + origin.warnings
        warnings += advice.before(run, scheme, course.rates, lora=options.lora)
        plan = Plan(
            run=run,
            scheme=scheme,
            out=place if target is None else target.place,
            target=target,
            options=options,
            weights=weights,
            side_files=beside.files,
            origin=origin,
            snapshots=snapshots,
            path=of_path,
            course=course,
            tried=tried,
            replay_bytes=_replay_bytes(run, start, outputs=len(snapshots) + 1),
            warnings=warnings + (of_path.cached.warnings if of_path else ()),
            products=products,
        )
        # All that are visited, and fewer where a weight turns out to be 0.
        most = {index: index - start + 1 for index in plan.outputs}
        pairs = products.pairs if products is not None else ()
        plans.append(plan.with_terms({index: {pair.a: count for pair in pairs} for index, count in most.items()}))
    return plans


def _results_in(directory: Path) -> frozenset[str]:
    """The names in a directory of results; none where it cannot be listed."""
    try:
        return frozenset(path.name for path in directory.iterdir())
    except OSError:
        return frozenset()


def anchor_problem(plan: Plan, coefficients: Coefficients | None) -> SettingError | None:
    """The error where an average would be in effect its anchor, and that is not allowed; None as long as its
    coefficients are not known.
    """
    if coefficients is None or plan.options.allow_anchor or coefficients.anchor_weight < 1 - 2 * ALL_OTHERS:
        return None
    from ckavg.averaging.rules import effective_weights  # and with it torch, which a plan can do without

    weights, start = effective_weights(coefficients), coefficients.start
    if not is_mostly_anchor(weights, start, len(weights) - 1):
        return None
    return SettingError(
        f"{plan.out.name}: {100 * weights[start]:.4g} % of the weight is on step {plan.run.steps[start]}, where it "
        "begins: the result would be that checkpoint.",
        hint="Choose settings that forget it sooner, or a later start; or go on with --allow-anchor.",
    )


def output_path(
    home: Path,
    scheme: Scheme,
    selection: Selection,
    out: Path | str | None,
    lora: str | None = None,
    rank: int | None = None,
) -> Path:
    """Where a result goes: where it was asked for, else under its name in `averaged` of the run's home.

    Raises:
        OutputError: nobody asked, and there is a link.
    """
    return Path(out) if out is not None else path_within(home, "averaged", result_name(scheme, selection, lora, rank))


def result_name(scheme: Scheme, selection: Selection, lora: str | None = None, rank: int | None = None) -> str:
    """The name of a result, which tells it from those of other recipes.

    >>> from ckavg.schemes import PEMA
    >>> result_name(PEMA(), Selection(every=100, from_step=400))
    'pema-gamma0.15-every100-from-step400'
    >>> result_name(PEMA(), Selection(), "product", 16)
    'pema-gamma0.15-product-rank16'
    """
    products = f"product-rank{rank}" if rank is not None else "product" if lora == "product" else ""
    return "-".join(filter(None, [scheme.label, selection.label, products]))


def checked(
    found: Sequence[Inspection], places: Sequence[Path], *, words: Sequence[str] = ("",), force: bool = False
) -> list[Run]:
    """The inspected checkpoints as runs, if nothing speaks against it, nor against the places of results.

    A result that a killed process had moved aside from such a place gets its name back.

    Args:
        found: what was found in the source, by each selection.
        places: where results would go.
        words: by which the user asked for each selection.
        force: whether results that are there may be replaced.

    Raises:
        CkavgError: something does; `CombinedError` lists all of it at once, the worst first.
    """
    elsewhere = {place for place in places if output_address(place) is not None}
    for place in places:
        bring_back(place_here(place))
    problems = _problems(found, words)
    if problems:  # otherwise the plan says what is wrong with the places, and knows how much is written
        checkpoints = {(each.step, each.path): each for one in found for each in one.checkpoints}
        for place in (place for place in places if place not in elsewhere):
            problems += output_path_problems(place, found[0].source, tuple(checkpoints.values()), force=force)
        if checkpoints:  # a result has about the size of the newest one
            newest = max(checkpoints.values(), key=lambda each: each.step)
            problems += space_problems([(place, newest.nbytes) for place in places if place not in elsewhere])
    raise_all(worst_first(problems))
    return [as_run(each) for each in found]


def _problems(found: Sequence[Inspection], words: Sequence[str]) -> list[CkavgError]:
    """What speaks against some selections, each once; with the words it belongs to where those are not all."""
    owners: dict[tuple[type[CkavgError], str], list[int]] = {}
    problems: dict[tuple[type[CkavgError], str], CkavgError] = {}
    for number, each in enumerate(found):
        for problem in each.problems:
            key = type(problem), problem.as_typed
            problems[key] = problem
            owners.setdefault(key, []).append(number)
    for key, numbers in owners.items():
        if len(numbers) < len(found):
            problems[key] = copy.copy(problems[key])
            problems[key].message = f"{listed([words[number] for number in numbers])}: {problems[key].message}"
    return list(problems.values())


def start_of(run: Run, scheme: Scheme) -> int:
    """Index of the checkpoint with which an average begins: the anchor, where β hangs on the path."""
    if scheme.needs_path:
        return 0
    return scheme.checked_coefficients(Timeline(run.steps, anchor_is_init=run.anchor_is_init)).start


def _replay_bytes(run: Run, start: int, *, outputs: int) -> int:
    """Bytes that pass 2 reads: of what is averaged, and of what is copied to each output."""
    floating = [name for name, entry in run.tensors.items() if entry.is_floating]
    tables = distinct_tables(run.checkpoints[start:])
    averaged = sum(count * sum(table[name].nbytes for name in floating) for table, count in tables)
    return averaged + outputs * sum(entry.nbytes for entry in run.tensors.values() if not entry.is_floating)


def _snapshots(run: Run, start: int, every: int | None) -> tuple[int, ...]:
    """Indices of the checkpoints between the beginning of the average and the last one that fall on a multiple."""
    steps = run.steps
    if every is None or start == len(steps) - 1:
        return ()
    between = range(start + 1, len(steps) - 1)
    chosen = tuple(index for index in between if steps[index] % every == 0)
    if not chosen:
        raise SettingError(
            f"snapshot-every is {every}, but no checkpoint between step {steps[start]}, where the average begins, and "
            f"step {steps[-1]}, where it ends, is at a multiple of {every}.",
            hint="Choose a multiple of the interval at which checkpoints were saved.",
        )
    for index in chosen:
        absent = len(run.tensors.keys() - run.checkpoints[index].entries.keys())
        if absent:
            raise SettingError(
                f"snapshot-every: step {steps[index]} lacks tensors of the last checkpoint ({absent} of them), which a "
                "snapshot would have to copy.",
                hint="Leave out --snapshot-every with --common-only, or stop before the checkpoints that have more.",
            )
    return chosen


def check_compatible(plans: Sequence[Plan]) -> None:
    """Refuse plans that cannot be carried out together, each sound by itself.

    Raises:
        SettingError: two have one place.
        WriteError: the disk has no room for all of them.
    """
    places = [resolved(plan.out) for plan in plans]
    twice = next((place for place in places if places.count(place) > 1), None)
    if twice is not None:
        raise SettingError(f"Two averages would go to {twice}.", hint="Give each a place of its own.")
    raise_all(_space_problems(plans))
