"""The record, the card and the other small files of a result, made from what was computed."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ckavg.averaging import advice
from ckavg.averaging.plan import Plan
from ckavg.checkpoints.checkpoint import RESULT_RECORD
from ckavg.checkpoints.run import FLOATING, Run
from ckavg.output.card import write_card
from ckavg.output.loading import example
from ckavg.output.output_path import CARD, PLOT
from ckavg.output.published import pinned, published
from ckavg.output.record import Input, Output, Record, Seconds
from ckavg.output.weight_files import sha256
from ckavg.path.table import PathLength
from ckavg.schemes import Coefficients
from ckavg.schemes.base import effective_count, mean_age


@dataclass(frozen=True, slots=True, kw_only=True)
class Work:
    """What computing an average found, beyond what its plan says.

    Attributes:
        accumulate: the dtype in which it was accumulated.
        bytes_read: bytes read for all averages of one reading.
        checksums: of its checkpoints; None for those that do not enter it.
        infinite: tensors that hold the same infinities in all its checkpoints.
        nonfinite: how many of its elements are not finite.
        discarded: the part of its products that truncation removed, by the index of an output; empty if none.
        seconds: how long the reading took.
    """

    accumulate: str
    bytes_read: int
    checksums: tuple[str | None, ...]
    infinite: tuple[str, ...]
    nonfinite: int
    discarded: Mapping[int, float]
    seconds: Seconds


def record_of(plan: Plan, coefficients: Coefficients, path: PathLength | None, work: Work) -> Record:
    """The record of one average.

    Args:
        plan, coefficients: of the average.
        path: of its checkpoints; None if it needs none.
        work: what computing it found.
    """
    from ckavg.averaging.rules import effective_weights

    run, scheme = plan.run, plan.scheme
    left_out = left_out_of_path(run, path) if path else ()
    weights = effective_weights(coefficients)
    anchor = run.steps[coefficients.start]
    warnings = plan.warnings + advice.about_coefficients(scheme, coefficients, run.steps)
    warnings += advice.about_weights(scheme, run.steps, weights)
    warnings += advice.about_anchor_weight(run.steps, weights, coefficients.start, with_init=run.anchor_is_init)
    warnings += advice.about_trend(scheme, plan.course, run.steps, weights, plan.tried)
    return Record(
        scheme=scheme.name,
        parameters=scheme.parameters(),
        source=run.address,
        selection=run.selection.stated,
        steps=run.steps,
        anchor_step=anchor,
        span=run.steps[-1] - anchor,
        path_length=path.lengths if path else None,
        betas=coefficients.betas,
        alphas=coefficients.alphas,
        weights=weights,
        **_readouts(run.steps, weights, coefficients.start, len(weights) - 1),
        path_length_error=path.standard_errors if path else None,
        path_kernel=path.kernel if path else None,
        sample=path.sample if path else 1.0,
        path_exclude=plan.path.exclude if plan.path else (),
        zero_sigma=plan.options.zero_sigma,
        excluded_from_path=tuple(sorted({*left_out, *path.uncounted})) if path else (),
        parameters_counted=path.parameters_counted if path else None,
        dtype=plan.options.dtype,
        accumulate=work.accumulate,
        allow_nonfinite=plan.options.allow_nonfinite,
        lora="product" if plan.products is not None else "factors",
        rank=plan.options.rank,
        uncorrected=coefficients.uncorrected,
        infinite=work.infinite,
        copied=tuple(sorted(name for name, entry in run.tensors.items() if entry.kept and entry.dtype in FLOATING)),
        warnings=warnings
        + (advice.about_path(path, left_out) if path else ())
        + advice.about_infinite(work.infinite)
        + advice.about_nonfinite(work.nonfinite),
        evaluation=None,
        inputs=tuple(
            Input(
                checkpoint.step,
                pinned(checkpoint.directory),
                dict(zip(checkpoint.names, (shard.nbytes for shard in checkpoint.shards), strict=True)),
                checksum,
            )
            for checkpoint, checksum in zip(run.checkpoints, work.checksums, strict=True)
        ),
        outputs=tuple(
            Output(out.name, run.steps[index], out, plan.files, {}, work.discarded.get(index))
            for index, out in plan.outputs.items()
        ),
        bytes_read=work.bytes_read,
        seconds=work.seconds,
    )


def _readouts(steps: Sequence[int], weights: Sequence[float], start: int, last: int) -> dict[str, Any]:
    """Figures derived from the weights of the average after checkpoint `last`, by their names in a record."""
    return {
        "effective_count": effective_count(weights),
        "mean_age": mean_age(steps, weights, last),
        "anchor_weight": weights[start],
    }


def left_out_of_path(run: Run, path: PathLength) -> tuple[str, ...]:
    """Non-empty floating tensors that were excluded from pass 1."""
    measured = set(path.tensors)
    return tuple(
        sorted(
            name for name, entry in run.tensors.items() if entry.is_floating and entry.numel and name not in measured
        )
    )


def _with_plot(record: Record) -> tuple[Record, bytes | None]:
    """The record and the plot for its card. A failed plot becomes a warning: the average must not be lost for it."""
    from ckavg.output.plots import card_svg

    try:
        return record, card_svg(record)
    except Exception as error:  # a broken installation may raise anything
        warning = f"The card has no plot of the weights: matplotlib failed with {type(error).__name__}: {error}."
        return dataclasses.replace(record, warnings=(*record.warnings, warning)), None


def completed(
    plan: Plan, coefficients: Coefficients, record: Record, weight_hashes: Mapping[Path, str]
) -> tuple[Record, dict[str, bytes]]:
    """The record with the SHA-256 of every file; and by path in the result, the files beside the weights.

    Those are the side files, the card and the record of every output.
    """
    from ckavg.averaging.rules import effective_weights

    record, plot = _with_plot(record) if plan.options.plot else (record, None)
    files: dict[str, bytes] = {}
    own_records: list[Record] = []
    for output, (index, out) in zip(record.outputs, plan.outputs.items(), strict=True):
        own, plots = record, {PLOT: plot} if plot is not None else {}
        if index in plan.snapshots:
            weights = effective_weights(coefficients, index)
            readouts = _readouts(record.steps, weights, coefficients.start, index)
            own = dataclasses.replace(record, weights=weights, outputs=(output,), **readouts)
            plots = {}  # there may be very many snapshots
        output = dataclasses.replace(output, files=tuple(sorted({*output.files, *plots})))
        layout, place = plan.layout(index), out.relative_to(plan.out)
        usage = example(layout.side_files, layout.weights.names)
        card = write_card(published(own), plan.scheme, plan.origin, usage, picture=PLOT if plots else None)
        beside = layout.side_files | plots | {CARD: card.encode()}
        files |= {str(place / name): data for name, data in beside.items()}
        hashes = {shard.name: weight_hashes[place / shard.name] for shard in layout.weights.shards}
        hashes |= {name: sha256(data) for name, data in beside.items()}
        own_records.append(dataclasses.replace(own, outputs=(dataclasses.replace(output, sha256=hashes),)))
    record = dataclasses.replace(record, outputs=tuple(own.outputs[0] for own in own_records))
    for own, (index, out) in zip(own_records, plan.outputs.items(), strict=True):
        written = own if index in plan.snapshots else record
        files[str(out.relative_to(plan.out) / RESULT_RECORD)] = published(written).to_bytes()
    return record, files
