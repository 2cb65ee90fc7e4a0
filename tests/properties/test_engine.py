"""What is tuned for speed changes no byte: tile size, threads, shard cut, batches of averages."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

import ckavg
from ckavg.averaging.replay import Average, replay
from ckavg.engine.blocks import BLOCK, CHUNK
from ckavg.engine.context import Context
from ckavg.errors import SettingError, UnsupportedFormatError
from ckavg.path.measure import measure
from ckavg.schemes import BEMA, DEMA, EMA, OUEMA, PEMA, Last, Mean, Scheme, Timeline
from tests.runs import random_run, write_run
from tests.writers import Kept

TILES = [CHUNK << shift for shift in range(9)]
STEPS = (0, 5, 6, 30)
MANY = (
    BEMA(),
    EMA(),
    EMA(gamma=0.9),
    BEMA(burn_in=6),
    EMA(gamma=0.0),
    BEMA(kappa=0.0),
    OUEMA(),
    DEMA(),
    Mean(),
    Mean(decay="linear"),
    Mean(decay="cosine"),
    Mean(decay="minus-sqrt"),
    Last(),
)


def averages(run: ckavg.Run, *schemes: Scheme) -> list[tuple[Average, Kept]]:
    sizes = {name: entry.nbytes for name, entry in run.tensors.items()}
    writers = [Kept(sizes) for _ in schemes]
    dtypes = {name: entry.dtype for name, entry in run.tensors.items()}
    return [
        (Average(scheme.coefficients(Timeline(run.steps)), dtypes, {len(run.steps) - 1: writer}), writer)
        for scheme, writer in zip(schemes, writers, strict=True)
    ]


def formed(run: ckavg.Run, settings: Context) -> dict[str, bytearray]:
    ((average, writer),) = averages(run, BEMA())
    replay(run, [average], context=settings)
    return writer.tensors


def large_run(root: Path, dtype: torch.dtype) -> ckavg.Run:
    """One tensor of a block and a bit, so that blocks, tiles and chunks all have ragged ends."""
    generator = torch.Generator().manual_seed(0)
    theta = 0.05 * torch.randn(BLOCK + 3 * CHUNK + 77, generator=generator)
    weights = []
    for _ in STEPS:
        theta = theta + 0.01 * torch.randn(theta.shape, generator=generator)
        weights.append({"large": theta.to(dtype), "small": theta[:100].clone()})
    return ckavg.open_run(write_run(root, weights, STEPS))


@pytest.fixture(scope="module", params=[torch.bfloat16, torch.float32], ids=str)
def run(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> ckavg.Run:
    return large_run(tmp_path_factory.mktemp("large"), request.param)


@pytest.fixture(scope="module")
def plain(run: ckavg.Run) -> tuple[ckavg.PathLength, dict[str, bytearray]]:
    """One thread, the smallest tile."""
    settings = Context(threads=1, tile=CHUNK)
    return measure(run, context=settings), formed(run, settings)


@pytest.mark.parametrize(("tile", "threads"), [(CHUNK, 2), (CHUNK << 4, 5), (BLOCK, 2)])
def test_tiles_and_threads_change_nothing(
    run: ckavg.Run, plain: tuple[ckavg.PathLength, dict[str, bytearray]], tile: int, threads: int
) -> None:
    settings = Context(threads=threads, tile=tile)
    path, tensors = plain
    assert measure(run, context=settings).tensors == path.tensors
    assert formed(run, settings) == tensors


@settings(max_examples=15)
@given(
    seed=st.integers(0, 1000),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16, torch.float64]),
    tile=st.sampled_from(TILES),
    threads=st.integers(1, 4),
    shards=st.lists(st.integers(1, 4), min_size=1, max_size=4),
)
def test_results_do_not_depend_on_how_they_are_computed(
    seed: int, dtype: torch.dtype, tile: int, threads: int, shards: Sequence[int]
) -> None:
    weights = random_run(seed, len(STEPS), dtype)
    with tempfile.TemporaryDirectory() as directory:
        one = ckavg.open_run(write_run(Path(directory) / "one", weights, STEPS))
        other = ckavg.open_run(write_run(Path(directory) / "other", weights, STEPS, shards=shards))
        plain, tuned = Context(threads=1, tile=CHUNK), Context(threads=threads, tile=tile)
        assert measure(one, context=plain).tensors == measure(other, context=tuned).tensors
        assert formed(one, plain) == formed(other, tuned)


@settings(max_examples=15)
@given(
    seed=st.integers(0, 1000), scale=st.sampled_from([2.0**-7, 3.0, -0.3, 1e3]), name=st.sampled_from(["odd", "tiles"])
)
def test_path_length_ignores_the_scale_of_a_tensor(seed: int, scale: float, name: str) -> None:
    weights = random_run(seed, 4, torch.float64)
    with tempfile.TemporaryDirectory() as directory:
        before = measure(ckavg.open_run(write_run(Path(directory) / "one", weights, STEPS)))
        for checkpoint in weights:
            checkpoint[name] *= scale
        after = measure(ckavg.open_run(write_run(Path(directory) / "two", weights, STEPS)))
        assert after.lengths == pytest.approx(before.lengths, rel=1e-12)


def test_many_averages_from_one_reading_are_the_single_ones(run: ckavg.Run) -> None:
    together = averages(run, *MANY)
    read = replay(run, [average for average, _ in together]).bytes_read
    for alone, scheme in zip(together, MANY, strict=True):
        ((average, writer),) = averages(run, scheme)
        assert replay(run, [average]).bytes_read <= read
        assert writer.tensors == alone[1].tensors


def test_a_path_of_zero_gives_the_last_checkpoint(tmp_path: Path) -> None:
    weights = random_run(0, 1, torch.float32)[0]
    run = ckavg.open_run(write_run(tmp_path, [weights] * 3, (0, 1, 2)))
    result = ckavg.average(run, PEMA())
    assert result.path_length == (0.0, 0.0, 0.0)
    assert result.betas == (None, 1.0, 1.0)
    assert result.weights == (0.0, 0.0, 1.0)
    assert any("Nothing moved" in warning for warning in result.warnings)


def test_a_stale_save_is_noticed(tmp_path: Path) -> None:
    weights = random_run(0, 3, torch.float32)
    run = ckavg.open_run(write_run(tmp_path, [weights[0], weights[1], weights[1], weights[2]], STEPS))
    result = ckavg.average(run, PEMA())
    assert any("Steps 5 and 6 hold identical weights" in warning for warning in result.warnings)


def test_running_statistics_and_excluded_tensors_do_not_count(tmp_path: Path) -> None:
    weights = [
        {"bn.running_mean": torch.randn(9), "bn.weight": torch.arange(3.0) * k, "lm_head.weight": torch.arange(4.0) * k}
        for k in (1, 2)
    ]
    run = ckavg.open_run(write_run(tmp_path, weights, (0, 1)))
    assert ckavg.path_length(run).parameters_counted == 7
    path = ckavg.path_length(run, path_exclude=("lm_*",))
    assert path.parameters_counted == 3
    result = ckavg.average(run, PEMA(), path_exclude=("lm_*",))
    assert result.excluded_from_path == ("bn.running_mean", "lm_head.weight")


@pytest.mark.parametrize("tile", [0, 1, CHUNK - 1, CHUNK * 3, BLOCK * 2])
def test_tiles_that_do_not_divide_a_block_are_refused(run: ckavg.Run, tile: int) -> None:
    with pytest.raises(SettingError, match="power of two"):
        measure(run, context=Context(tile=tile))


def test_nothing_but_integers(tmp_path: Path) -> None:
    for step in (0, 1):
        (tmp_path / f"checkpoint-{step}").mkdir()
        save_file({"ids": torch.arange(5) + step}, tmp_path / f"checkpoint-{step}" / "model.safetensors")
    with pytest.raises(UnsupportedFormatError, match="holds no tensor to average: 'ids'"):
        ckavg.open_run(tmp_path)
