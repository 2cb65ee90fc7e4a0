"""What averaging will read and write: everything that can be said, or refused, before a weight is read."""

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
    """What was asked for, besides the schemes and output paths; for the fields see `average`.

    With `lora` None, adapters are averaged tensor by tensor, and the run need not hold any.

    Raises:
        SettingError: a value is not one of these.
    """

    dtype: str = "source"
    accumulate: str = "float32"
    path_exclude: tuple[str, ...] = ()
    zero_sigma: ZeroSigma = "exclude"
    sample: float = 1.0
    snapshot_every: int | None = None
    card: Path | str | None = None
    plot: bool = False
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
    """What averaging a run will read and write.

    Attributes:
        run: the checkpoints.
        scheme: how they are averaged.
        out: where the result goes.
        options: what else was asked for.
        weights: the weight files of the result.
        side_files: files copied beside them, by relative path.
        origin: what the card of the result says of the run.
        snapshots: indices of the checkpoints after which the average is also written, without the last one.
        path: how the path length is measured; None for schemes that do not need it.
        course: how training went, from the trainer's log.
        tried: names of results that exist already or are planned with this one.
        replay_bytes: bytes that pass 2 reads.
        warnings: for the user, before the work starts.
        products: adapters to average as products; None: none.
        layouts: the files of each output with products, by the index of its checkpoint; they depend on its rank.
        current: the record of an up-to-date result, at `out` or waiting there for its upload; None: form it.
        target: the address that the result goes to; it is formed at `out` and uploaded from there.
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
        """The plan with the number of products that each output sums: by its index, then by the name of A."""
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
        """Bytes of every weight file, including snapshots, by path in the result."""
        return {
            out.relative_to(self.out) / shard.name: shard.nbytes
            for index, out in self.outputs.items()
            for shard in self.layout(index).weights.shards
        }

    @property
    def outputs(self) -> dict[int, Path]:
        """The directory of each snapshot and of the result, by the index of its checkpoint; the result is last."""
        steps = self.run.steps
        return {index: self.out / f"checkpoint-{steps[index]}" for index in self.snapshots} | {len(steps) - 1: self.out}

    def shown(self, place: Path | None = None) -> Path:
        """The path or address of the result, or of one of its outputs, to show to the user."""
        place = place or self.out
        return place if self.target is None else self.target.directory / place.relative_to(self.out)

    @property
    def is_up_to_date(self) -> bool:
        """Whether there is nothing to do."""
        return self.current is not None and (self.target is None or self.is_there)

    @property
    def foreseen(self) -> tuple[str, ...]:
        """Advice about the coefficients, if they are known before anything is read; the record repeats it."""
        known = self.known_coefficients
        return () if known is None else advice.about_coefficients(self.scheme, known, self.run.steps)

    @property
    def known_coefficients(self) -> Coefficients | None:
        """β and α, if they are known before anything is read; None if they depend on the path."""
        if self.scheme.needs_path:
            return None
        timeline = Timeline(self.run.steps, anchor_is_init=self.run.anchor_is_init)
        return self.scheme.checked_coefficients(timeline).sparing(averaged_statistics(self.run.tensors))

    @property
    def path_bytes(self) -> int:
        """Bytes that pass 1 reads; 0 if the scheme needs no path, or the path is cached."""
        return self.path.nbytes if self.path else 0

    @property
    def write_bytes(self) -> int:
        """Bytes that will be written."""
        layouts = [self.layout(index) for index in self.outputs]
        return sum(each.weights.nbytes + sum(map(len, each.side_files.values())) for each in layouts)


def plan_average(run: Run | AnyPath | str, scheme: Scheme, *, out: Path | str | None = None, **options: Any) -> Plan:
    """Say what `average` would read and write, or why it would fail. Reads no weight and writes nothing.

    Args:
        run, scheme, out: see `average`.
        options: see `Options`.

    Raises:
        CkavgError: see `average`.
    """
    return plan_averages([(opened(run), scheme, out)], Options(**options))[0]


Wanted = tuple[Run, Scheme, Path | str | Target | None]
"""A requested average: its run, its scheme and its output path."""


def plan_averages(wanted: Sequence[Wanted], options: Options | None = None) -> list[Plan]:
    """Plans of several averages to carry out together; shared checkpoints are read once.

    Args:
        wanted: the averages, of one run or of several selections from one source; at least one.
        options: what else is asked for.

    Raises:
        CkavgError: see `average`.
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
        # One by one: `check_compatible` looks at all of them together.
        problems += _space_problems([plan])
        problems += [] if (problem := anchor_problem(plan, plan.known_coefficients)) is None else [problem]
    raise_all(worst_first(problems))
    return plans


def plan_in_memory(run: Run, scheme: Scheme, options: Options) -> Plan:
    """The plan of an average that is not written; its output path does not matter.

    Raises:
        CkavgError: see `average`.
    """
    (plan,) = _plan([(run, scheme, None)], options)
    raise_all([] if (problem := anchor_problem(plan, plan.known_coefficients)) is None else [problem])
    return plan


def _results_there(plans: Sequence[Plan]) -> dict[int, Record | str]:
    """For each plan whose result exists: the record if it is up to date, else what differs."""
    found: dict[int, Record | str] = {}
    fingerprints: dict[int, Fingerprints] = {}
    for place, plan in enumerate(plans):
        if plan.target.holds_result if plan.target is not None else is_result(resolved(plan.out)):
            run = plan.run
            sources = fingerprints[id(run)] = fingerprints.get(id(run)) or file_fingerprints(run)
            found[place] = current_result(plan, sources)
    return found


def _space_problems(plans: Sequence[Plan]) -> list[CkavgError]:
    """One error for each disk that has too little room for what the plans will write there."""
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
        # An upper bound: products with weight 0 drop out later.
        most = {index: index - start + 1 for index in plan.outputs}
        pairs = products.pairs if products is not None else ()
        plans.append(plan.with_terms({index: {pair.a: count for pair in pairs} for index, count in most.items()}))
    return plans


def _results_in(directory: Path) -> frozenset[str]:
    """The names in a directory of results; none if it cannot be listed."""
    try:
        return frozenset(path.name for path in directory.iterdir())
    except OSError:
        return frozenset()


def anchor_problem(plan: Plan, coefficients: Coefficients | None) -> SettingError | None:
    """The error if an average would be almost its anchor, unless that is allowed; None without coefficients."""
    if coefficients is None or plan.options.allow_anchor or coefficients.anchor_weight < 1 - 2 * ALL_OTHERS:
        return None
    from ckavg.averaging.rules import effective_weights  # imports torch

    weights, start = effective_weights(coefficients), coefficients.start
    if not is_mostly_anchor(weights, start, len(weights) - 1):
        return None
    return SettingError(
        f"{plan.out.name}: {100 * weights[start]:.4g} % of the weight is on step {plan.run.steps[start]}, where it "
        "begins: the result would be that checkpoint.",
        hint="Choose settings that forget it sooner, or a later start; or add --allow-anchor.",
    )


def output_path(
    home: Path,
    scheme: Scheme,
    selection: Selection,
    out: Path | str | None,
    lora: str | None = None,
    rank: int | None = None,
) -> Path:
    """Where a result goes: `out` if given, else under its name in `averaged` of the run's home.

    Raises:
        OutputError: `out` is not given, and a link is in the way.
    """
    return Path(out) if out is not None else path_within(home, "averaged", result_name(scheme, selection, lora, rank))


def result_name(scheme: Scheme, selection: Selection, lora: str | None = None, rank: int | None = None) -> str:
    """The name of a result, different for every recipe.

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
    """The inspected checkpoints as runs, if neither they nor the output paths have a problem.

    A result that a killed process had moved aside from an output path gets its name back.

    Args:
        found: what was found in the source, for each selection.
        places: the output paths.
        words: how the user wrote each selection.
        force: whether existing results may be replaced.

    Raises:
        CkavgError: there is a problem; `CombinedError` lists several, the worst first.
    """
    elsewhere = {place for place in places if output_address(place) is not None}
    for place in places:
        bring_back(place_here(place))
    problems = _problems(found, words)
    if problems:  # without any, planning checks the output paths and knows how much is written
        checkpoints = {(each.step, each.path): each for one in found for each in one.checkpoints}
        for place in (place for place in places if place not in elsewhere):
            problems += output_path_problems(place, found[0].source, tuple(checkpoints.values()), force=force)
        if checkpoints:  # a result has about the size of the newest one
            newest = max(checkpoints.values(), key=lambda each: each.step)
            problems += space_problems([(place, newest.nbytes) for place in places if place not in elsewhere])
    raise_all(worst_first(problems))
    return [as_run(each) for each in found]


def _problems(found: Sequence[Inspection], words: Sequence[str]) -> list[CkavgError]:
    """The problems of some selections, each once; with the words it belongs to unless those are all."""
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
    """Index of the checkpoint with which an average begins; the anchor if β depends on the path."""
    if scheme.needs_path:
        return 0
    return scheme.checked_coefficients(Timeline(run.steps, anchor_is_init=run.anchor_is_init)).start


def _replay_bytes(run: Run, start: int, *, outputs: int) -> int:
    """Bytes that pass 2 reads: averaged tensors, and copied ones for each output."""
    floating = [name for name, entry in run.tensors.items() if entry.is_floating]
    tables = distinct_tables(run.checkpoints[start:])
    averaged = sum(count * sum(table[name].nbytes for name in floating) for table, count in tables)
    return averaged + outputs * sum(entry.nbytes for entry in run.tensors.values() if not entry.is_floating)


def _snapshots(run: Run, start: int, every: int | None) -> tuple[int, ...]:
    """Indices of the checkpoints at a multiple of `every`, after the start of the average and before its end."""
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
                hint="Leave out --snapshot-every with --common-only, or stop before the checkpoints with more tensors.",
            )
    return chosen


def check_compatible(plans: Sequence[Plan]) -> None:
    """Refuse plans that are valid alone but cannot be carried out together.

    Raises:
        SettingError: two have the same output path.
        WriteError: the disk has no room for all of them.
    """
    places = [resolved(plan.out) for plan in plans]
    twice = next((place for place in places if places.count(place) > 1), None)
    if twice is not None:
        raise SettingError(f"Two averages would go to {twice}.", hint="Give each its own output path.")
    raise_all(_space_problems(plans))
