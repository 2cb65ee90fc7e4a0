"""The pipeline, on one page: discover → plan → path → schemes → replay → write. Only this module composes the stages.

Modules that need torch are imported where they are used: opening a run, or saying what would be done, must not wait
for them.
"""

from __future__ import annotations

import dataclasses
import hashlib
import secrets
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ckavg import __version__
from ckavg.averaging.distributed import agreed_fingerprints, finalize, met_to_measure, open_writers, staged
from ckavg.averaging.plan import Options, Plan, check_compatible, plan_averages
from ckavg.averaging.prepare import Prepared, measure_path, prepare
from ckavg.averaging.publish import begin_sending, discard_sent, publish, read_published, send_results
from ckavg.averaging.reading import Reading, fetching_of, fetching_of_path, readings
from ckavg.averaging.sources import opened
from ckavg.checkpoints.fingerprints import check_unchanged, file_fingerprints, fingerprint_run
from ckavg.checkpoints.run import Run
from ckavg.engine.context import Context, OnProgress, listening
from ckavg.engine.distributed import ALONE, Ranks
from ckavg.engine.remote import fetch
from ckavg.errors import MissingPartsError
from ckavg.output.record import Record
from ckavg.output.staging import remove_stale
from ckavg.path.plan import PathPlan, PathReading, plan_path
from ckavg.path.table import PathLength, ZeroSigma
from ckavg.schemes import Scheme
from ckavg.storage.atomic import resolved
from ckavg.storage.base import AnyPath

if TYPE_CHECKING:
    from ckavg.averaging.copying import TensorWriter
    from ckavg.averaging.replay import Replayed
    from ckavg.output.staging import Staging


def path_length(
    run: Run | AnyPath | str,
    *,
    path_exclude: Sequence[str] = (),
    zero_sigma: ZeroSigma = "exclude",
    sample: float = 1.0,
    allow_nonfinite: bool = False,
    device: str = "auto",
    progress: bool | OnProgress = False,
    on_progress: OnProgress | None = None,
    ranks: Ranks = ALONE,
) -> PathLength:
    """Measure how far the weights of a run travelled: pass 1 alone (Pathwise EMA, Eq. 2).

    A path that was measured before is read from the cache: `averaged/path.json` in the run's directory or, where that
    cannot be written, a file in the user's cache.

    Args:
        run: the checkpoints, the anchor first, or the directory or address of all of them.
        path_exclude: shell patterns of tensor names to leave out.
        zero_sigma: `exclude` leaves tensors without spread out of the sum and of N; `eps` divides by σ_p + 1e-8.
        sample: estimate it from this fraction of each tensor, in (0, 1]; 1 is exact.
        allow_nonfinite: leave out tensors that hold NaN or infinity, instead of refusing them.
        device: `auto`, `cpu`, `cuda` or `cuda:N`.
        progress: True draws a bar on stderr; a function is called now and then in this thread.
        on_progress: the earlier name of `progress`.
        ranks: the processes that share the work, each of which calls this; see `all_ranks`.

    Raises:
        NonFiniteError: a checkpoint holds NaN or infinity.
        ChangedError, TruncatedShardError, ReadError: a file changed or cannot be read.
        SettingError: there is no such device, or `sample` is not in (0, 1].
    """
    from ckavg.engine.devices import tuned

    options = Options(
        path_exclude=tuple(path_exclude), zero_sigma=zero_sigma, sample=sample, allow_nonfinite=allow_nonfinite
    )
    run = opened(run)
    plan = plan_path(run, exclude=options.path_exclude, sample=sample)
    with listening(progress or on_progress or False) as listener:
        return _path_length(run, plan, options, tuned(Context(device=device, on_progress=listener, ranks=ranks)))


def _path_length(run: Run, plan: PathPlan, options: Options, context: Context) -> PathLength:
    ranks = context.ranks
    fetch(fetching_of_path(run, plan), context.on_progress)
    with met_to_measure(run, ranks, options, _kind(context)) as met:
        context = replace(context, ranks=met)
        fingerprints = agreed_fingerprints(run, met)
        (path,) = measure_path(run, [run], PathReading.single(plan), fingerprints, options, context)
        if ranks.is_first:
            _check_unchanged(run)
        return path


def average(
    run: Run | AnyPath | str,
    scheme: Scheme,
    *,
    out: Path | str | None = None,
    dtype: str = "source",
    accumulate: str = "float32",
    device: str = "auto",
    path_exclude: Sequence[str] = (),
    zero_sigma: ZeroSigma = "exclude",
    sample: float = 1.0,
    snapshot_every: int | None = None,
    card: Path | str | None = None,
    plot: bool = False,
    allow_nonfinite: bool = False,
    allow_anchor: bool = False,
    force: bool = False,
    lora: str | None = None,
    rank: int | None = None,
    progress: bool | OnProgress = False,
    on_progress: OnProgress | None = None,
    ranks: Ranks = ALONE,
) -> Record:
    """Average the checkpoints of a run and write the result as a checkpoint that loads like any other.

    An existing result is returned without reading a weight if it has the same recipe and the checkpoints have not
    changed since.

    Args:
        run: the checkpoints, the anchor first, from `open_run`; or the directory or address of all of them.
        scheme: how to average: `PEMA`, `BEMA`, `EMA`, `MomentumEMA`, `PowerEMA`, `PowerExponentEMA`, `OUEMA`, `DEMA`,
            `Mean`, `Weights`, `Last`, or a `Scheme` of your own.
        out: where the result goes, a directory or an address such as `s3://bucket/result`; None:
            `<source>/averaged/<scheme and selection>`, such as `ema-gamma0.15-last10`.
        dtype: output dtype of floating tensors: `source`, `float32`, `bfloat16`, `float16` or `float64`.
        accumulate: `float32` or `float64`; float64 checkpoints are accumulated in float64 in any case.
        device: the device that computes: `auto`, `cpu`, `cuda` or `cuda:N`.
        path_exclude: shell patterns of tensors to leave out of the path length.
        zero_sigma: how tensors without spread count; see `path_length`.
        sample: estimate the path length from this fraction of each tensor; see `path_length`.
        snapshot_every: also write the average as it stood after each checkpoint whose step is a multiple of this, to
            `<out>/checkpoint-<step>`.
        card: a Markdown file whose fields and text come first in the model card of the result.
        plot: draw the weights into the model card, as `ckavg.svg`; needs matplotlib, and is left out without it.
        allow_nonfinite: also average checkpoints that hold NaN or infinity; the result holds them in the same places.
        allow_anchor: form the average even if 99 % of the weight or more is on its anchor.
        force: replace an existing result.
        lora: how to average low-rank adapters: `factors`, tensor by tensor, or `product`, the products s·BA.
        rank: with `product`, the rank to truncate the average to; None: keep it exact, with the sum of all ranks.
        progress: True draws a bar on stderr; a function is called now and then in this thread.
        on_progress: the earlier name of `progress`.
        ranks: the processes that share the work, each of which calls this; see `all_ranks`.

    Returns:
        The record: coefficients, weights, warnings, and where the result is.

    Raises:
        OutputExistsError: something else is at `out` already.
        NonFiniteError: a checkpoint holds NaN or infinity.
        SettingError: the settings do not fit the run.
        CkavgError: any other reason why there is no result; the sources and `out` are unchanged.
    """
    options = Options(
        dtype=dtype,
        accumulate=accumulate,
        path_exclude=tuple(path_exclude),
        zero_sigma=zero_sigma,
        sample=sample,
        snapshot_every=snapshot_every,
        card=card,
        plot=plot,
        allow_nonfinite=allow_nonfinite,
        allow_anchor=allow_anchor,
        force=force,
        lora=lora,
        rank=rank,
    )
    plans = plan_averages([(opened(run), scheme, out)], options)
    with listening(progress or on_progress or False, 1 + bool(plans[0].path_bytes)) as listener:
        context = Context(device=device, on_progress=listener, ranks=ranks)
        records = send_results(plans, carry_out(plans, context).records, context)
    discard_sent(plans, ranks)
    return records[0]


@dataclass(frozen=True, slots=True)
class Done:
    """The outcome of some plans, in their order.

    Attributes:
        records: a record for each plan.
        paths: the path of the checkpoints of each plan; None for a plan that needed none.
    """

    records: tuple[Record, ...]
    paths: tuple[PathLength | None, ...]


def carry_out(plans: Sequence[Plan], context: Context) -> Done:
    """Carry out plans in one reading of the checkpoints. Each result is the same as if it were formed alone.

    A result that is up to date is not formed again. A result for an address is formed at `Plan.out`; `send_results`
    uploads it.

    Args:
        plans: at least one; of one source, with the same options, each with its own output path.
        context: where it runs; the device as the user named it.

    Raises:
        CkavgError: see `average`. Results that are complete by then stay.
    """
    with begin_sending(plans, context.ranks):
        check_compatible(plans)
        done: dict[int, Sequence[Any]] = {id(plan): (plan.current, None) for plan in plans if plan.current is not None}
        new = [plan for plan in plans if plan.current is None]
        if new:
            from ckavg.engine.devices import tuned

            context = tuned(context, averages=len(new))
        for reading in readings(new):
            for plan, *outcome in zip(reading.plans, *_carry_out(reading, context), strict=True):
                done[id(plan)] = outcome
    records, paths = zip(*(done[id(plan)] for plan in plans), strict=True)
    return Done(records, paths)


def _carry_out(reading: Reading, context: Context) -> tuple[tuple[Record, ...], tuple[PathLength | None, ...]]:
    """Form averages together; return their records and paths."""
    begun = time.perf_counter()
    plans, run, ranks = reading.plans, reading.run, context.ranks
    if ranks.mode in ("alone", "job") and ranks.is_first:
        for directory in {resolved(plan.out).parent for plan in plans}:
            remove_stale(directory)
    runs = {id(plan.run): plan.run for plan in plans}
    sources = {key: file_fingerprints(each) for key, each in runs.items()}
    if ranks.mode != "join":  # joining reads no weights
        fetch(fetching_of(plans), context.on_progress)
    with staged(run, plans, ranks, _kind(context)) as (stagings, met):
        context = replace(context, ranks=met)
        prepared = prepare(reading, context)
        replayed, hashes = _replay(prepared, stagings, context)
        met.leave()
        if ranks.is_first:
            _check_unchanged(run)
            seconds = prepared.seconds(begun)
            records = publish(prepared, replayed, hashes, stagings, seconds, sources, met)
    if not ranks.is_first:
        records = tuple(read_published(plan) for plan in prepared.plans)
    for storage in run.storages:
        storage.remove_downloads()
    return records, prepared.paths


def do_part(plan: Plan, context: Context) -> tuple[int, ...]:
    """Do one part of an average, the one that `context.ranks` names, next to its output path.

    Returns:
        The parts that are not finished yet, counted from 0. If there are none, the parts can be joined.

    Raises:
        MissingPartsError: this part needs parts that are not finished.
        CkavgError: see `average`.
    """
    from ckavg.engine.devices import tuned

    (reading,) = readings([plan])
    context = tuned(context)
    fetch(fetching_of([plan]), context.on_progress)
    with staged(reading.run, [plan], context.ranks, _kind(context)) as (stagings, met):
        prepared = prepare(reading, replace(context, ranks=met))
        try:
            _replay(prepared, stagings, replace(context, ranks=replace(met, waits=False)))
        except MissingPartsError as error:
            return error.parts
        _check_unchanged(plan.run)
    return ()


def in_memory(plan: Plan, writer: TensorWriter, context: Context) -> None:
    """Form the average of a plan and hand its bytes to a writer, tensor by tensor.

    Raises:
        CkavgError: see `average`.
    """
    from ckavg.averaging.replay import Average, replay
    from ckavg.engine.devices import tuned

    (reading,), context = readings([plan]), tuned(context)
    fetch(fetching_of([plan]), context.on_progress)
    prepared = prepare(reading, context)
    last = len(plan.run.checkpoints) - 1
    replay(
        plan.run,
        [Average(prepared.coefficients[0], plan.weights.dtypes, {last: writer}, reading.places[0])],
        wide=plan.options.accumulate == "float64",
        allow_nonfinite=plan.options.allow_nonfinite,
        context=context,
    )
    _check_unchanged(plan.run)
    for storage in plan.run.storages:
        storage.remove_downloads()


def _replay(
    prepared: Prepared, stagings: Sequence[Staging], context: Context
) -> tuple[Replayed, list[dict[Path, str]]]:
    """Run pass 2; return with it the SHA-256 of every weight file, by plan and by path in the result.

    A part returns no hashes: joining computes them.
    """
    from ckavg.averaging.replay import Average, replay

    reading, coefficients, ranks = prepared.reading, prepared.coefficients, context.ranks
    plans, run, options = reading.plans, reading.run, reading.plans[0].options
    fingerprints = prepared.fingerprints if ranks.is_shared else fingerprint_run(run)
    request = (
        __version__,
        fingerprints,
        reading.places,
        [dataclasses.astuple(each) for each in coefficients],
        [
            (shard.name, hashlib.sha256(shard.header).digest())
            for plan in plans
            for index in plan.outputs
            for shard in plan.layout(index).weights.shards
        ],
        (options.lora, options.rank),
        [[str(out.relative_to(plan.out)) for out in plan.outputs.values()] for plan in plans],
        options.accumulate,
        options.allow_nonfinite,
        _kind(context),
    )
    key = hashlib.sha256(repr(request).encode()).hexdigest() if None not in fingerprints else secrets.token_hex(32)
    with open_writers(plans, stagings, key, ranks) as (writers, journals):
        averages = [
            Average(each, plan.weights.dtypes, own, places)
            for each, plan, own, places in zip(coefficients, plans, writers, reading.places, strict=True)
        ]
        replayed = replay(
            run,
            averages,
            products=plans[0].products,
            wide=options.accumulate == "float64",
            allow_nonfinite=options.allow_nonfinite,
            context=context,
            journals=journals,
        )
        hashes = [] if ranks.mode == "part" else finalize(plans, stagings, writers, key, context)
    return replayed, hashes


def _check_unchanged(run: Run) -> None:
    check_unchanged(run.checkpoints)
    for storage in run.storages:
        storage.check_unchanged()


def _kind(context: Context) -> str:
    """The device without its number."""
    return context.device.partition(":")[0]
