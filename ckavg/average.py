"""The pipeline, on one page: discover → plan → path → schemes → replay → write. Only this module carries it out.

Modules that need torch are imported where they are used: opening a run, or saying what would be done, must not wait
for them.
"""

from __future__ import annotations

import dataclasses
import hashlib
import secrets
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ckavg import advice
from ckavg.atomic import resolved
from ckavg.engine.progress import OnProgress
from ckavg.engine.ranks import ALONE, Ranks
from ckavg.errors import SettingError
from ckavg.path.plan import PathPlan, plan_path
from ckavg.path.saved import remember
from ckavg.path.table import PathLength, ZeroSigma
from ckavg.plan import CARD, Plan, check_together, plan_average
from ckavg.result.card import write_card
from ckavg.result.digests import sha256
from ckavg.result.leftovers import tidy
from ckavg.result.record import Averaged, Input, Output, Seconds
from ckavg.result.side_files import read_config
from ckavg.run.checkpoint import RESULT_RECORD
from ckavg.run.stamps import Stamps, check_unchanged, stamps_of, states_of
from ckavg.run.values import Run
from ckavg.schemes import Coefficients, Scheme, Timeline
from ckavg.together import agree, agree_on, opened, settled, staged
from ckavg.version import __version__

if TYPE_CHECKING:
    from ckavg.engine.stream import Settings
    from ckavg.replay.replay import Replayed
    from ckavg.result.staging import Staging

ACCUMULATE = ("float32", "float64")


def measure_path(
    run: Run,
    *,
    path_exclude: Sequence[str] = (),
    zero_sigma: ZeroSigma = "exclude",
    sample: float = 1.0,
    device: str = "auto",
    on_progress: OnProgress | None = None,
    ranks: Ranks = ALONE,
) -> PathLength:
    """Measure how far the weights of a run travelled: pass 1 alone (Pathwise EMA, Eq. 2).

    What was measured before of the same files is not measured again: the table is kept in `averaged/path.json` of the
    run's directory or, where that cannot be written, in the user's cache.

    Args:
        run: the checkpoints, the anchor first.
        path_exclude: shell patterns of tensor names that do not count.
        zero_sigma: `exclude` leaves tensors without spread out of the sum and of N; `eps` divides by σ_p + 1e-8.
        sample: estimate it from this fraction of each tensor, in (0, 1]; 1 is exact.
        device: `auto`, `cpu`, `cuda` or `cuda:N`.
        on_progress: called now and then in this thread.
        ranks: the processes that share the work, each of which calls this; see `all_ranks`.

    Raises:
        NonFiniteError: a checkpoint holds NaN or infinity.
        TruncatedShardError, ReadError: a file changed or cannot be read.
        SettingError: there is no such device, or `sample` is no fraction.
    """
    from ckavg.engine.devices import fitted, resolve_device
    from ckavg.engine.stream import Settings

    with ranks.as_one():
        plan = plan_path(run, exclude=path_exclude, sample=sample)
        nbytes = plan.nbytes // ranks.world if plan.sample == 1 else 0  # an estimate is the CPU's in any case
        own = ranks.own_device(resolve_device(device, nbytes=nbytes))
        settings = fitted(Settings(device=own, on_progress=on_progress, ranks=ranks))
        agree(run, ranks, plan.exclude, zero_sigma, sample)
        return _measure(run, plan, zero_sigma, settings)


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
    sample: float = 1.0,
    snapshot_every: int | None = None,
    force: bool = False,
    on_progress: OnProgress | None = None,
    ranks: Ranks = ALONE,
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
        sample: estimate the path length from this fraction of each tensor; see `measure_path`.
        snapshot_every: also write the average as it stood after each checkpoint whose step is a multiple of this, to
            `<out>/checkpoint-<step>`.
        force: replace an existing result.
        on_progress: called now and then in this thread.
        ranks: the processes that share the work, each of which calls this; see `all_ranks`.

    Returns:
        What was done: coefficients, weights, warnings, and where the result is.

    Raises:
        OutputExistsError: something is at `out` already.
        NonFiniteError: a checkpoint holds NaN or infinity.
        SettingError: the settings do not fit the run.
        CkavgError: any other reason for which there is no result; the sources and `out` are as they were.
    """
    with ranks.as_one():
        plan = plan_average(
            run,
            scheme,
            out=out,
            dtype=dtype,
            path_exclude=path_exclude,
            sample=sample,
            snapshot_every=snapshot_every,
            force=force,
        )
        done = carry_out(
            [plan], accumulate=accumulate, device=device, zero_sigma=zero_sigma, on_progress=on_progress, ranks=ranks
        )
        return done.records[0]


@dataclass(frozen=True, slots=True)
class Done:
    """What was carried out: a record for each plan, in their order, and the path; None where no plan needed it."""

    records: tuple[Averaged, ...]
    path: PathLength | None


def carry_out(
    plans: Sequence[Plan],
    *,
    accumulate: str = "float32",
    device: str = "auto",
    zero_sigma: ZeroSigma = "exclude",
    on_progress: OnProgress | None = None,
    ranks: Ranks = ALONE,
) -> Done:
    """Do what plans say, all from one reading of the run they share; each result is what it would be by itself.

    Args:
        plans: of one run, with one way to have its path, each to a place of its own; at least one.
        accumulate, device, zero_sigma, on_progress, ranks: as of `average`.

    Raises:
        CkavgError: as of `average`. A result that was complete by then stays.
    """
    from ckavg.engine.devices import fitted, resolve_device
    from ckavg.engine.stream import Settings

    begun = time.perf_counter()
    run = plans[0].run
    with ranks.as_one(), ExitStack() as stack:
        if accumulate not in ACCUMULATE:
            raise SettingError(f"accumulate is {accumulate!r}; it must be one of {', '.join(ACCUMULATE)}.")
        check_together(plans)
        nbytes = max(plan.path_bytes for plan in plans) + max(plan.replay_bytes for plan in plans)
        own = ranks.own_device(resolve_device(device, nbytes=nbytes // ranks.world, averages=len(plans)))
        settings = fitted(Settings(device=own, on_progress=on_progress, ranks=ranks), averages=len(plans))
        agree_on(plans, ranks, accumulate, zero_sigma)
        if ranks.is_first:
            for directory in {resolved(plan.out).parent for plan in plans}:
                tidy(directory)
        stagings = staged(plans, ranks, stack)
        stamps, states = stamps_of(run), states_of(run)
        measuring = time.perf_counter()
        planned = next((plan.path for plan in plans if plan.path), None)
        path = _measure(run, planned, zero_sigma, settings) if planned else None
        replaying = time.perf_counter()
        timeline = _timeline(run, path)
        coefficients = [plan.scheme.coefficients(timeline) for plan in plans]
        replayed, digests = _replay(plans, coefficients, stagings, accumulate, stamps, settings)
        if ranks.is_first:
            check_unchanged(run, states)
        done = time.perf_counter()
        work = _Work(
            accumulate=_accumulated(run, accumulate),
            zero_sigma=zero_sigma,
            bytes_read=replayed.bytes_read + (path.bytes_read if path else 0),
            checksums=replayed.checksums,
            seconds=Seconds(replaying - measuring if path and path.bytes_read else 0.0, done - replaying, done - begun),
        )

        def finish() -> tuple[Averaged, ...]:
            records = []
            for plan, each, staging, of_weights in zip(plans, coefficients, stagings, digests, strict=True):
                record, files = _completed(plan, each, _record(plan, each, path, work), of_weights)
                for name, data in files.items():
                    staging.write(name, data)
                records.append(record)
            for staging in stagings:
                staging.commit()
            return tuple(records)

        records = ranks.first(finish)
    return Done(records, path)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Work:
    """What all averages of one reading have in common, besides the run."""

    accumulate: str
    zero_sigma: ZeroSigma
    bytes_read: int
    checksums: tuple[str | None, ...]
    seconds: Seconds


def _replay(
    plans: Sequence[Plan],
    coefficients: Sequence[Coefficients],
    stagings: Sequence[Staging],
    accumulate: str,
    stamps: Stamps,
    settings: Settings,
) -> tuple[Replayed, list[dict[Path, str]]]:
    """Pass 2, and the SHA-256 of every weight file that came of it, by plan and by path in the result."""
    from ckavg.replay.replay import Average, replay

    run, ranks = plans[0].run, settings.ranks
    layouts = [[(shard.name, shard.header) for shard in plan.weights.shards] for plan in plans]
    places = [[str(out) for out in plan.outputs.values()] for plan in plans]
    what = __version__, stamps, coefficients, layouts, places, accumulate, settings.device.partition(":")[0]
    key = hashlib.sha256(repr(what).encode()).hexdigest() if None not in stamps else secrets.token_hex(32)
    with opened(plans, stagings, key, ranks) as (sinks, ledger):
        averages = [
            Average(each, plan.weights.dtypes, of_plan)
            for each, plan, of_plan in zip(coefficients, plans, sinks, strict=True)
        ]
        replayed = replay(run, averages, wide=accumulate == "float64", settings=settings, ledger=ledger)
        digests = settled(plans, stagings, sinks, ranks)
    ranks.wait()
    return replayed, digests


def _measure(run: Run, plan: PathPlan, zero_sigma: ZeroSigma, settings: Settings) -> PathLength:
    from ckavg.path.estimate import estimate
    from ckavg.path.measure import measure
    from ckavg.path.unfinished import Unfinished

    plan = settings.ranks.first(lambda: plan)  # what is known depends on file times, which machines may see differently
    if plan.sample < 1:
        return estimate(run, plan.sample, exclude=plan.exclude, zero_sigma=zero_sigma, settings=settings)
    with Unfinished(run, plan.recalled.stamps, settings.ranks) as unfinished:
        path = measure(
            run,
            exclude=plan.exclude,
            zero_sigma=zero_sigma,
            known=plan.recalled.known,
            settings=settings,
            unfinished=unfinished,
        )
    if settings.ranks.is_first:
        if path.bytes_read:
            remember(run, path, plan.recalled.stamps)
        unfinished.clear()
    return path


def _timeline(run: Run, path: PathLength | None) -> Timeline:
    if path is None:
        return Timeline(run.steps, anchor_is_init=run.anchor_is_init)
    own = {name: path.tensor_lengths(name) for name in path.counted}
    return Timeline(run.steps, path.lengths, own, run.anchor_is_init)


def _record(plan: Plan, coefficients: Coefficients, measured: PathLength | None, work: _Work) -> Averaged:
    from ckavg.replay.weights import effective_weights

    run, scheme = plan.run, plan.scheme
    path = measured if scheme.needs_path else None
    left_out = left_out_of_path(run, path) if path else ()
    weights = effective_weights(coefficients)
    anchor = run.steps[coefficients.start]
    warnings = plan.warnings + advice.about_coefficients(scheme, coefficients, run.steps)
    warnings += advice.about_weights(run.steps, weights)
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
        weights=weights,
        path_length_error=path.standard_errors if path else None,
        path_kernel=path.kernel if path else None,
        sample=path.sample if path else 1.0,
        path_exclude=plan.path.exclude if plan.path else (),
        zero_sigma=work.zero_sigma,
        excluded_from_path=tuple(sorted({*left_out, *path.without_spread})) if path else (),
        parameters_counted=path.parameters_counted if path else None,
        dtype=plan.dtype,
        accumulate=work.accumulate,
        warnings=warnings + (advice.about_path(path, left_out) if path else ()),
        evaluation=None,
        inputs=tuple(
            Input(
                checkpoint.step,
                checkpoint.directory,
                {str(shard.path.relative_to(checkpoint.directory)): shard.nbytes for shard in checkpoint.shards},
                checksum,
            )
            for checkpoint, checksum in zip(run.checkpoints, work.checksums, strict=True)
        ),
        outputs=tuple(Output(out.name, run.steps[index], out, plan.files, {}) for index, out in plan.outputs.items()),
        bytes_read=work.bytes_read,
        seconds=work.seconds,
    )


def _accumulated(run: Run, asked: str) -> str:
    """The dtype in which tensors are accumulated: never less than that of the checkpoints."""
    return "float64" if any("float64" in checkpoint.dtypes for checkpoint in run.checkpoints) else asked


def left_out_of_path(run: Run, path: PathLength) -> tuple[str, ...]:
    """Floating tensors with elements that pass 1 was told not to measure."""
    return tuple(
        sorted(
            name
            for name, entry in run.tensors.items()
            if entry.is_floating and entry.numel and name not in path.tensors
        )
    )


def _completed(
    plan: Plan, coefficients: Coefficients, record: Averaged, of_weights: Mapping[Path, str]
) -> tuple[Averaged, dict[str, bytes]]:
    """The record with the SHA-256 of every file, and what goes beside the weights of every output, by path in the
    result: side files, the card, and the record of that output.
    """
    from ckavg.replay.weights import effective_weights

    config, adapter_config = read_config(plan.side_files), read_config(plan.side_files, "adapter_config.json")
    files: dict[str, bytes] = {}
    of_outputs: list[Averaged] = []
    for output, (index, out) in zip(record.outputs, plan.outputs.items(), strict=True):
        own = record
        if index in plan.snapshots:
            own = dataclasses.replace(record, weights=effective_weights(coefficients, index), outputs=(output,))
        card = write_card(own, plan.scheme, config, adapter_config)
        place = out.relative_to(plan.out)
        beside = plan.side_files | {CARD: card.encode()}
        files |= {str(place / name): data for name, data in beside.items()}
        digests = {shard.name: of_weights[place / shard.name] for shard in plan.weights.shards}
        digests |= {name: sha256(data) for name, data in beside.items()}
        of_outputs.append(dataclasses.replace(own, outputs=(dataclasses.replace(output, sha256=digests),)))
    record = dataclasses.replace(record, outputs=tuple(own.outputs[0] for own in of_outputs))
    for own, (index, out) in zip(of_outputs, plan.outputs.items(), strict=True):
        of_output = own if index in plan.snapshots else record
        files[str(out.relative_to(plan.out) / RESULT_RECORD)] = of_output.to_bytes()
    return record, files
