"""The pipeline, on one page: discover → plan → path → schemes → replay → write. Only this module composes the stages.

Modules that need torch are imported where they are used: opening a run, or saying what would be done, must not wait
for them.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from ckavg import advice
from ckavg.engine.progress import OnProgress
from ckavg.errors import SettingError
from ckavg.path.table import PathLength, ZeroSigma, counts
from ckavg.result.card import write_card
from ckavg.result.layout import WeightPlan, plan_weights
from ckavg.result.place import check_place, check_space
from ckavg.result.record import Averaged, Output, Seconds
from ckavg.result.side_files import gather_side_files, read_config
from ckavg.result.staging import ShardFiles, Staging
from ckavg.run.checkpoint import RESULT_RECORD
from ckavg.run.values import Run
from ckavg.schemes import Coefficients, Scheme, Timeline

DTYPES = ("source", "float32", "bfloat16", "float16", "float64")
ACCUMULATE = ("float32", "float64")
CARD = "README.md"


@dataclass(frozen=True, slots=True)
class Plan:
    """What averaging a run would read and write.

    Attributes:
        run: the checkpoints that take part.
        scheme: how they are averaged.
        out: where the result goes.
        dtype: output dtype as it was asked for.
        path_exclude: shell patterns of tensor names that do not count in the path length.
        force: whether an existing result is replaced.
        weights: the weight files of the result.
        side_files: what is copied beside them, by relative path.
        path_bytes: bytes that pass 1 reads; 0 for schemes that do not need it.
        replay_bytes: bytes that pass 2 reads.
        warnings: what a user should know before it starts.
    """

    run: Run
    scheme: Scheme
    out: Path
    dtype: str
    path_exclude: tuple[str, ...]
    force: bool
    weights: WeightPlan
    side_files: dict[str, bytes]
    path_bytes: int
    replay_bytes: int
    warnings: tuple[str, ...]

    @property
    def files(self) -> tuple[str, ...]:
        """Every file of the result, by relative path, sorted."""
        return tuple(sorted({shard.name for shard in self.weights.shards} | {*self.side_files, CARD, RESULT_RECORD}))

    @property
    def write_bytes(self) -> int:
        """Bytes that will be written."""
        return self.weights.nbytes + sum(len(data) for data in self.side_files.values())


def plan_average(
    run: Run,
    scheme: Scheme,
    *,
    out: Path | str | None = None,
    dtype: str = "source",
    path_exclude: Sequence[str] = (),
    force: bool = False,
) -> Plan:
    """Say what `average` would read and write, and refuse what cannot be done. Reads no weight and writes nothing.

    Args, errors: as of `average`.
    """
    if dtype not in DTYPES:
        raise SettingError(f"dtype is {dtype!r}; it must be one of {', '.join(DTYPES)}.")
    place = Path(out) if out is not None else run.source / "averaged" / scheme.label
    check_place(place, run, force=force)
    weights = plan_weights(run.last, dtype)
    side_files = gather_side_files(run, weights)
    start = 0 if scheme.needs_path else scheme.coefficients(_timeline(run, None)).start
    floating = [name for name, entry in run.tensors.items() if entry.is_floating]
    counted = [name for name in floating if counts(name, path_exclude)] if scheme.needs_path else []
    plan = Plan(
        run=run,
        scheme=scheme,
        out=place,
        dtype=dtype,
        path_exclude=tuple(path_exclude),
        force=force,
        weights=weights,
        side_files=side_files,
        path_bytes=sum(point.entries[name].nbytes for point in run.checkpoints for name in counted),
        replay_bytes=sum(point.entries[name].nbytes for point in run.checkpoints[start:] for name in floating)
        + sum(entry.nbytes for entry in run.tensors.values() if not entry.is_floating),
        warnings=run.warnings + advice.before(run, scheme),
    )
    check_space(place, plan.write_bytes)
    return plan


def measure_path(
    run: Run,
    *,
    path_exclude: Sequence[str] = (),
    zero_sigma: ZeroSigma = "exclude",
    device: str = "auto",
    on_progress: OnProgress | None = None,
) -> PathLength:
    """Measure how far the weights of a run travelled: pass 1 alone (Pathwise EMA, Eq. 2).

    Args:
        run: the checkpoints, the anchor first.
        path_exclude: shell patterns of tensor names that do not count.
        zero_sigma: `exclude` leaves tensors without spread out of the sum and of N; `eps` divides by σ_p + 1e-8.
        device: `auto`, `cpu`, `cuda` or `cuda:N`.
        on_progress: called now and then in this thread.

    Raises:
        NonFiniteError: a checkpoint holds NaN or infinity.
        TruncatedShardError, ReadError: a file changed or cannot be read.
        SettingError: there is no such device.
    """
    from ckavg.engine.devices import resolve_device
    from ckavg.engine.stream import Settings
    from ckavg.path.measure import measure

    settings = Settings(device=resolve_device(device), on_progress=on_progress)
    return measure(run, exclude=tuple(path_exclude), zero_sigma=zero_sigma, settings=settings)


def average(
    run: Run,
    scheme: Scheme,
    *,
    out: Path | str | None = None,
    dtype: str = "source",
    accumulate: str = "float32",
    device: str = "auto",
    path_exclude: Sequence[str] = (),
    zero_sigma: ZeroSigma = "exclude",
    force: bool = False,
    on_progress: OnProgress | None = None,
) -> Averaged:
    """Average the checkpoints of a run and write the result as a checkpoint that loads as it stands.

    Args:
        run: the checkpoints, the anchor first; see `open_run`.
        scheme: how: `PEMA`, `BEMA`, `EMA`, `MomentumEMA`, `OUEMA`, `DEMA`, `Mean` or `Last`.
        out: where the result goes; None: `<source>/averaged/<label of the scheme>`.
        dtype: output dtype of floating tensors: `source`, `float32`, `bfloat16`, `float16` or `float64`.
        accumulate: `float32` or `float64`; float64 checkpoints are accumulated in float64 in any case.
        device: where the arithmetic happens: `auto`, `cpu`, `cuda` or `cuda:N`.
        path_exclude: shell patterns of tensors that do not count in the path length.
        zero_sigma: what becomes of tensors without spread; see `measure_path`.
        force: replace an existing result.
        on_progress: called now and then in this thread.

    Returns:
        What was done: coefficients, weights, warnings, and where the result is.

    Raises:
        OutputExistsError: something is at `out` already.
        NonFiniteError: a checkpoint holds NaN or infinity.
        SettingError: the settings do not fit the run.
        CkavgError: any other reason for which there is no result; the sources and `out` are as they were.
    """
    plan = plan_average(run, scheme, out=out, dtype=dtype, path_exclude=path_exclude, force=force)
    (record,) = carry_out([plan], accumulate=accumulate, device=device, zero_sigma=zero_sigma, on_progress=on_progress)
    return record


def carry_out(
    plans: Sequence[Plan],
    *,
    accumulate: str = "float32",
    device: str = "auto",
    zero_sigma: ZeroSigma = "exclude",
    on_progress: OnProgress | None = None,
) -> tuple[Averaged, ...]:
    """Do what plans say, all from one reading of the run they share; each result is what it would be by itself.

    Args:
        plans: of one run, with one `path_exclude`, each to a place of its own; at least one.
        accumulate, device, zero_sigma, on_progress: as of `average`.

    Raises:
        CkavgError: as of `average`. A result that was complete by then stays.
    """
    from ckavg.engine.devices import resolve_device
    from ckavg.engine.stream import Settings
    from ckavg.path.measure import measure
    from ckavg.replay.replay import Average, replay

    begun = time.perf_counter()
    if accumulate not in ACCUMULATE:
        raise SettingError(f"accumulate is {accumulate!r}; it must be one of {', '.join(ACCUMULATE)}.")
    run = plans[0].run
    settings = Settings(device=resolve_device(device), on_progress=on_progress)
    with ExitStack() as stack:
        stagings = [stack.enter_context(Staging(plan.out, force=plan.force)) for plan in plans]
        measuring = time.perf_counter()
        path = None
        if any(plan.scheme.needs_path for plan in plans):
            path = measure(run, exclude=plans[0].path_exclude, zero_sigma=zero_sigma, settings=settings)
        replaying = time.perf_counter()
        timeline = _timeline(run, path)
        coefficients = [plan.scheme.coefficients(timeline) for plan in plans]
        with ExitStack() as files:
            sinks = [
                files.enter_context(ShardFiles(staging.path, plan.weights.shards))
                for staging, plan in zip(stagings, plans, strict=True)
            ]
            averages = [
                Average(each, plan.weights.dtypes, sink)
                for each, plan, sink in zip(coefficients, plans, sinks, strict=True)
            ]
            replayed_bytes = replay(run, averages, wide=accumulate == "float64", settings=settings)
            for sink in sinks:
                sink.sync()
        done = time.perf_counter()
        work = _Work(
            accumulate=_accumulated(run, accumulate),
            zero_sigma=zero_sigma,
            bytes_read=replayed_bytes + (path.bytes_read if path else 0),
            seconds=Seconds(replaying - measuring if path else 0.0, done - replaying, done - begun),
        )
        records = tuple(_record(plan, each, path, work) for plan, each in zip(plans, coefficients, strict=True))
        for plan, record, staging in zip(plans, records, stagings, strict=True):
            for name, data in (plan.side_files | _own_files(record, plan)).items():
                staging.write(name, data)
            staging.commit()
    return records


@dataclass(frozen=True, slots=True, kw_only=True)
class _Work:
    """What all averages of one reading have in common, besides the run."""

    accumulate: str
    zero_sigma: ZeroSigma
    bytes_read: int
    seconds: Seconds


def _timeline(run: Run, path: PathLength | None) -> Timeline:
    if path is None:
        return Timeline(run.steps, anchor_is_init=run.anchor_is_init)
    own = {name: path.tensor_lengths(name) for name in path.counted}
    return Timeline(run.steps, path.lengths, own, run.anchor_is_init)


def _record(plan: Plan, coefficients: Coefficients, measured: PathLength | None, work: _Work) -> Averaged:
    from ckavg.replay.weights import effective_weights

    run, scheme = plan.run, plan.scheme
    path = measured if scheme.needs_path else None
    left_out = _left_out(run, path) if path else ()
    anchor = run.steps[coefficients.start]
    warnings = plan.warnings + advice.about_coefficients(scheme, coefficients, run.steps)
    return Averaged(
        scheme=scheme.name,
        parameters=scheme.parameters(),
        source=run.source,
        selection=run.selection.stated,
        steps=run.steps,
        anchor_step=anchor,
        span=run.steps[-1] - anchor,
        path_length=path.lengths if path else None,
        betas=coefficients.betas,
        alphas=coefficients.alphas,
        weights=effective_weights(coefficients),
        path_exclude=plan.path_exclude,
        zero_sigma=work.zero_sigma,
        excluded_from_path=tuple(sorted({*left_out, *path.without_spread})) if path else (),
        parameters_counted=path.parameters_counted if path else None,
        dtype=plan.dtype,
        accumulate=work.accumulate,
        warnings=warnings + (advice.about_path(path, left_out) if path else ()),
        outputs=(Output(plan.out.name, run.steps[-1], plan.out, plan.files),),
        bytes_read=work.bytes_read,
        seconds=work.seconds,
    )


def _accumulated(run: Run, asked: str) -> str:
    """The dtype in which tensors are accumulated: never less than that of the checkpoints."""
    return "float64" if any("float64" in checkpoint.dtypes for checkpoint in run.checkpoints) else asked


def _left_out(run: Run, path: PathLength) -> tuple[str, ...]:
    """Floating tensors with elements that pass 1 was told not to measure."""
    return tuple(
        sorted(
            name
            for name, entry in run.tensors.items()
            if entry.is_floating and entry.numel and name not in path.tensors
        )
    )


def _own_files(record: Averaged, plan: Plan) -> dict[str, bytes]:
    config, adapter_config = read_config(plan.side_files), read_config(plan.side_files, "adapter_config.json")
    card = write_card(record, plan.scheme, config, adapter_config)
    return {CARD: card.encode(), RESULT_RECORD: record.to_json().encode() + b"\n"}
