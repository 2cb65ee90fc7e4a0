"""Saved runs: written with the safetensors library, averaged with ckavg, and read back.

A run is a base model, `base/model.safetensors`, which is the anchor at step 0, and `run/checkpoint-<step>`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import load_file, save_file

import ckavg
from ckavg.averaging.pipeline import carry_out
from ckavg.averaging.plan import Options, plan_averages
from ckavg.engine.context import Context
from ckavg.output.record import Record
from ckavg.schemes import Scheme

Array = NDArray[np.float64]

_TENSOR = "weights"


def save_run(directory: Path, states: Iterable[Array]) -> None:
    """Save the weights at steps 0, 1, 2, … as one float64 tensor each; the first become the base model."""
    for place, state in enumerate(states):
        checkpoint = directory / "run" / f"checkpoint-{place}" if place else directory / "base"
        checkpoint.mkdir(parents=True)
        save_file({_TENSOR: np.ascontiguousarray(state)}, checkpoint / "model.safetensors", {"format": "pt"})


def open_saved(directory: Path, *, every: int | None = None) -> ckavg.Run:
    """The run that `save_run` saved, or every n-th step of it, from its base model on."""
    return ckavg.open_run(directory / "run", init=directory / "base", every=every)


def average_all(
    run: ckavg.Run, schemes: Mapping[str, Scheme], directory: Path, *, snapshot_every: int | None = None
) -> dict[str, Record]:
    """Average a run by several schemes from one reading, as `ckavg sweep` does.

    Returns:
        The record of each average, by the name of its scheme; `outputs` are the snapshots, the last one the average.
    """
    wanted = [(run, scheme, directory / name) for name, scheme in schemes.items()]
    plans = plan_averages(wanted, Options(snapshot_every=snapshot_every))
    return dict(zip(schemes, carry_out(plans, Context(device="cpu")).records, strict=True))


def weights_of(checkpoint: Path) -> Array:
    """The one tensor of a checkpoint or an average."""
    weights: Array = load_file(checkpoint / "model.safetensors")[_TENSOR]
    return weights


def curve_of(record: Record) -> dict[int, Array]:
    """The weights of every snapshot of an average, by step."""
    return {output.step: weights_of(output.directory) for output in record.outputs}
