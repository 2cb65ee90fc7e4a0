"""What averaging would read and write: everything that can be told, or refused, before a weight is read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from ckavg.averaging import advice
from ckavg.averaging.adapters import Layout, Products, check_rank, find_products, lay_out
from ckavg.checkpoints.checkpoint import RESULT_RECORD
from ckavg.checkpoints.inspect import Inspection, as_run, worst_first
from ckavg.checkpoints.run import Run, averaged_statistics, holds_float64
from ckavg.checkpoints.trainer_log import learning_rates
from ckavg.engine.blocks import TILE
from ckavg.engine.distributed import worker_threads
from ckavg.engine.remote import HELD_BYTES
from ckavg.errors import SettingError, raise_all
from ckavg.output.origin import Origin, find_origin
from ckavg.output.output_path import CARD, output_path_problems, path_within, space_problems
from ckavg.output.side_files import gather_side_files, name_of_weights
from ckavg.output.staging import bring_back
from ckavg.output.weight_files import WeightPlan, plan_weights
from ckavg.path.plan import PathPlan, check_sample, plan_path
from ckavg.path.table import ZeroSigma
from ckavg.schemes import Scheme, Timeline
from ckavg.storage.atomic import resolved
from ckavg.storage.base import RemotePath
from ckavg.storage.remote import Fetching, plan_fetching

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
        replay_bytes: bytes that pass 2 reads.
        warnings: what a user should know before it starts.
        products: what is averaged by its products; None: nothing.
        layouts: of each output with products, by the index of its checkpoint: its rank depends on how many it sums.
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
    replay_bytes: int
    warnings: tuple[str, ...]
    products: Products | None = None
    layouts: Mapping[int, Layout] = field(default_factory=dict)

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

    @property
    def foreseen(self) -> tuple[str, ...]:
        """What can be said of the coefficients before anything is read; a result's record says it, too."""
        if self.scheme.needs_path:
            return ()
        timeline = Timeline(self.run.steps, anchor_is_init=self.run.anchor_is_init)
        coefficients = self.scheme.coefficients(timeline).sparing(averaged_statistics(self.run.tensors))
        return advice.about_coefficients(self.scheme, coefficients, self.run.steps)

    @property
    def path_bytes(self) -> int:
        """Bytes that pass 1 reads; 0 for schemes that do not need it, and where the path is known."""
        return self.path.nbytes if self.path else 0

    @property
    def write_bytes(self) -> int:
        """Bytes that will be written."""
        layouts = [self.layout(index) for index in self.outputs]
        return sum(each.weights.nbytes + sum(map(len, each.side_files.values())) for each in layouts)


def plan_average(run: Run, scheme: Scheme, *, out: Path | str | None = None, **options: Any) -> Plan:
    """Say what `average` would read and write, and refuse what cannot be done. Reads no weight and writes nothing.

    Args:
        run, scheme, out: as of `average`.
        options: as of `Options`.

    Raises:
        CkavgError: as of `average`.
    """
    return plan_averages(run, [(scheme, out)], Options(**options))[0]


def plan_averages(
    run: Run, wanted: Sequence[tuple[Scheme, Path | str | None]], options: Options | None = None
) -> list[Plan]:
    """Plans of several averages of one run, which are carried out together; what they share is read once.

    Args:
        run: the checkpoints, the anchor first.
        wanted: schemes, each with the place of its result; at least one.
        options: what else is asked for.

    Raises:
        CkavgError: as of `average`.
    """
    options = options or Options()
    weights = plan_weights(run.last, options.dtype, file_name=name_of_weights(run))
    products = find_products(run, options.lora, options.rank)
    beside = gather_side_files(run, weights)
    origin = find_origin(run, beside.files, options.card)
    needs_path = any(scheme.needs_path for scheme, _ in wanted)
    path = plan_path(run, exclude=options.path_exclude, sample=options.sample) if needs_path else None
    rates = learning_rates(run.last)
    plans = []
    for scheme, out in wanted:
        start = start_of(run, scheme)
        snapshots = _snapshots(run, start, options.snapshot_every)
        of_path = path if scheme.needs_path else None
        warnings = (
            run.warnings + beside.warnings + origin.warnings + advice.before(run, scheme, rates, lora=options.lora)
        )
        plan = Plan(
            run=run,
            scheme=scheme,
            out=output_path(run.home, scheme, out),
            options=options,
            weights=weights,
            side_files=beside.files,
            origin=origin,
            snapshots=snapshots,
            path=of_path,
            replay_bytes=_replay_bytes(run, start, outputs=len(snapshots) + 1),
            warnings=warnings + (of_path.cached.warnings if of_path else ()),
            products=products,
        )
        # All that are visited, and fewer where a weight turns out to be 0.
        most = {index: index - start + 1 for index in plan.outputs}
        pairs = products.pairs if products is not None else ()
        plans.append(plan.with_terms({index: {pair.a: count for pair in pairs} for index, count in most.items()}))
    problems = [
        problem
        for plan in plans
        for problem in output_path_problems(
            plan.out, run.source, run.checkpoints, force=options.force, files=plan.files
        )
    ]
    # Each by itself: those that do not fit together are refused where they are carried out together.
    problems += [problem for plan in plans for problem in space_problems([(plan.out, plan.write_bytes)])]
    raise_all(worst_first(problems))
    return plans


def output_path(home: Path, scheme: Scheme, out: Path | str | None) -> Path:
    """Where a result goes: where it was asked for, else under the scheme's name in `averaged` of the run's home.

    Raises:
        OutputError: nobody asked, and there is a link.
    """
    return Path(out) if out is not None else path_within(home, "averaged", scheme.label)


def checked(found: Inspection, places: Sequence[Path], *, force: bool = False) -> Run:
    """The inspected checkpoints as a run, if nothing speaks against it, nor against the places of results.

    A result that a killed process had moved aside from such a place gets its name back.

    Args:
        found: what was found in the source.
        places: where results would go.
        force: whether results that are there may be replaced.

    Raises:
        CkavgError: something does; `CombinedError` lists all of it at once, the worst first.
    """
    for place in places:
        bring_back(place)
    if not found.problems:
        return as_run(found)  # the plan says what is wrong with the places, and knows how much is written
    problems = list(found.problems)
    for place in places:
        problems += output_path_problems(place, found.source, found.checkpoints, force=force)
    if found.checkpoints:  # a result has about the size of the newest one
        problems += space_problems([(place, found.checkpoints[-1].nbytes) for place in places])
    raise_all(worst_first(problems))
    return as_run(found)


def start_of(run: Run, scheme: Scheme) -> int:
    """Index of the checkpoint with which an average begins: the anchor, where β hangs on the path."""
    if scheme.needs_path:
        return 0
    return scheme.coefficients(Timeline(run.steps, anchor_is_init=run.anchor_is_init)).start


def _replay_bytes(run: Run, start: int, *, outputs: int) -> int:
    """Bytes that pass 2 reads: of what is averaged, and of what is copied to each output."""
    floating = [name for name, entry in run.tensors.items() if entry.is_floating]
    averaged = sum(point.entries[name].nbytes for point in run.checkpoints[start:] for name in floating)
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
    raise_all(space_problems([(plan.out, plan.write_bytes) for plan in plans]))


def fetching_of(plans: Sequence[Plan]) -> Fetching | None:
    """What carrying out these plans fetches, and how; None for a run on this machine."""
    run = plans[0].run
    path = next((plan.path for plan in plans if plan.path), None)
    start = min(start_of(run, plan.scheme) for plan in plans)
    return _planned(_readings(run, path, start), other_bytes=sum(plan.write_bytes for plan in plans))


def fetching_of_path(run: Run, path: PathPlan) -> Fetching | None:
    """What measuring a path fetches, and how; None for a run on this machine."""
    return _planned(_readings(run, path, len(run.checkpoints)), other_bytes=0)


def _planned(readings: dict[RemotePath, float], *, other_bytes: int) -> Fetching | None:
    return plan_fetching(readings, other_bytes=other_bytes) if readings else None


def _readings(run: Run, path: PathPlan | None, start: int) -> dict[RemotePath, float]:
    """How often each weight file elsewhere is read: in pass 1, and from checkpoint number `start` on in pass 2."""
    readings: dict[RemotePath, float] = {}
    to_read = path.to_read if path is not None and path.nbytes else ()
    for index, checkpoint in enumerate(run.checkpoints):
        count = (path.sample if path is not None and index in to_read else 0.0) + (index >= start)
        for shard in checkpoint.shards:
            if isinstance(shard.path, RemotePath):
                readings[shard.path] = readings.get(shard.path, 0.0) + count
    return readings


_LIBRARIES = 235_000_000
"""Python, torch and the other libraries, before anything is read: measured on Linux with torch for the CPU."""

_PLOT = 45_000_000
"""matplotlib, and what it takes for the picture in a card."""

_PER_ENTRY = 450
"""A tensor in the table of a checkpoint: its name, its shape, and their places in a dictionary."""

_PER_DISTANCE = 100
"""A number of the path, by tensor and checkpoint, and its line in `path.json`."""

_STATE_TILES = 3
_RAW_BYTES_OF_ELEMENT = 8


def memory_bytes(plans: Sequence[Plan]) -> int:
    """Peak memory of carrying out plans of one run together on the CPU, in bytes; an estimate.

    Every thread has two buffers for bytes as they are stored, the widened tile, and the tiles of each average's state.
    The tables of the checkpoints and the side files come on top, and what the libraries take by themselves.

    Args:
        plans: what is carried out together; at least one.
    """
    run = plans[0].run
    wide = holds_float64(run.checkpoints)
    tiles = (1 + _STATE_TILES * len(plans)) * TILE * (8 if wide else 4)
    buffers = worker_threads() * (2 * TILE * _RAW_BYTES_OF_ELEMENT + tiles)
    tables = {id(checkpoint.entries): len(checkpoint.entries) for checkpoint in run.checkpoints}
    known = _PER_ENTRY * sum(tables.values())
    if any(plan.path for plan in plans):
        known += _PER_DISTANCE * len(run.tensors) * len(run.checkpoints)
    pairs = plans[0].products.pairs if plans[0].products is not None else ()
    # Of a pair, all checkpoints in float64, the columns of the sum, and as much again where they are cut.
    known += max((3 * 8 * len(run.checkpoints) * sum(pair.numel) for pair in pairs), default=0)
    beside = sum(len(data) for data in plans[0].side_files.values())
    headers = sum(len(shard.header) for shard in plans[0].weights.shards)
    fetching = fetching_of(plans)
    window = min(HELD_BYTES, fetching.streamed_bytes) if fetching is not None else 0
    libraries = _LIBRARIES + (_PLOT if find_spec("matplotlib") else 0)
    return libraries + buffers + known + 2 * (beside + headers) + window
