"""What the checks of a GPU are made of: runs, averages kept in memory, and what it means that two agree."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor

import ckavg
from ckavg.averaging.replay import Average, replay
from ckavg.checkpoints.run import Run
from ckavg.engine.blocks import BLOCK, CHUNK
from ckavg.engine.context import Context
from ckavg.engine.tiles import TORCH_DTYPES
from ckavg.errors import CkavgError
from ckavg.path.measure import measure
from ckavg.path.table import PathLength
from ckavg.schemes import Scheme, Timeline
from tests import reference
from tests.runs import random_run, write_run
from tests.writers import Kept

Tensors = Mapping[str, Tensor]

STEPS = (0, 5, 6, 30, 100)

_ROUNDINGS = 4
"""Units of the accumulation dtype, at the size of the terms: between two ways to round a chain of updates."""


class Dropped:
    """A writer that keeps nothing."""

    def put(self, name: str, offset: int, values: Tensor) -> None:
        pass


def formed(
    run: Run,
    schemes: Sequence[Scheme],
    context: Context,
    *,
    wide: bool = False,
    dtype: str | None = None,
    path: PathLength | None = None,
) -> list[dict[str, Tensor]]:
    """The floating tensors of averages of a run, flat; every β is told by `path`, whatever the device."""
    entries = {name: entry for name, entry in run.tensors.items() if entry.is_floating}
    dtypes = {name: dtype or entry.dtype for name, entry in entries.items()}
    sizes = {name: entry.numel * TORCH_DTYPES[dtypes[name]].itemsize for name, entry in entries.items()}
    sizes |= {name: entry.nbytes for name, entry in run.tensors.items() if name not in entries}
    timeline = timeline_of(run, path or measure(run))
    writers = [Kept(sizes) for _ in schemes]
    averages = [
        Average(scheme.coefficients(timeline), dtypes, {len(run.steps) - 1: writer})
        for scheme, writer in zip(schemes, writers, strict=True)
    ]
    replay(run, averages, wide=wide, context=context)
    return [
        {
            name: torch.frombuffer(data, dtype=TORCH_DTYPES[dtypes[name]])
            for name, data in writer.tensors.items()
            if name in entries
        }
        for writer in writers
    ]


def timeline_of(run: Run, path: PathLength) -> Timeline:
    return Timeline(run.steps, path.lengths, {name: path.tensor_lengths(name) for name in path.counted})


def assert_close(got: Tensors, want: Tensors, terms: reference.Arrays, accumulated: torch.dtype) -> None:
    """Within 1 unit of the last place; where terms cancel, within a few of the accumulation dtype at their size."""
    assert got.keys() == want.keys()
    for name, expected in want.items():
        one, other = got[name].double().numpy().ravel(), expected.double().numpy().ravel()
        assert got[name].dtype == expected.dtype
        allowed = np.maximum(
            reference.ulp(other, expected.dtype), _ROUNDINGS * reference.ulp(terms[name].ravel(), accumulated)
        )
        excess = np.abs(one - other) / allowed
        assert np.all(excess <= 1), f"{name}: {np.max(excess):.3g} times the tolerance"


def terms_of(run: Run) -> reference.Arrays:
    """How large each weight gets in any checkpoint."""
    checkpoints = [reference.load_floats(Path(checkpoint.path)) for checkpoint in run.checkpoints]
    return {name: np.max([np.abs(each[name]) for each in checkpoints], axis=0) for name in checkpoints[0]}


def assert_same_path(got: PathLength, want: PathLength, tolerance: float) -> None:
    np.testing.assert_allclose(got.lengths, want.lengths, rtol=tolerance, atol=0)
    for name, tensor in want.tensors.items():
        np.testing.assert_allclose(got.tensors[name].sigma, tensor.sigma, rtol=1e-12, atol=0)
    assert got.without_spread == want.without_spread
    assert got.bytes_read == want.bytes_read


def refusal(work: Callable[[], object]) -> str:
    """What is said of a run that is refused."""
    try:
        work()
    except CkavgError as error:
        return f"{type(error).__name__}: {error}"
    raise AssertionError("it was not refused")


def small_run(root: Path, dtype: torch.dtype, *, steps: Sequence[int] = STEPS) -> Run:
    return ckavg.open_run(write_run(root, random_run(len(steps), len(steps), dtype), steps, shards=(1, 2)))


def large_run(root: Path, dtype: torch.dtype, *, numel: int = BLOCK + 3 * CHUNK + 77) -> Run:
    """More than a block, so that blocks, tiles and chunks have ragged ends."""
    generator = torch.Generator().manual_seed(0)
    theta = 0.05 * torch.randn(numel, generator=generator)
    weights = []
    for _ in STEPS[:4]:
        theta = theta + 0.01 * torch.randn(numel, generator=generator)
        weights.append({"large": theta.to(dtype), "small": theta[:100].clone()})
    return ckavg.open_run(write_run(root, weights, STEPS[:4]))


def loaded(directory: Path) -> dict[str, Tensor]:
    return {name: each for file in directory.glob("*.safetensors") for name, each in load_file(file).items()}
