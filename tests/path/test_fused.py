"""Pass 1 compiled: the plain path to the bit, and close to float64."""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import ckavg
from ckavg.engine.blocks import CHUNK
from ckavg.engine.context import Context
from ckavg.engine.reader import Files
from ckavg.engine.tiles import TileReader
from ckavg.errors import NonFiniteError, TruncatedShardError
from ckavg.path.kernels import CompiledSums, load_kernel
from ckavg.path.measure import measure
from tests import reference
from tests.runs import random_run, write_run

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="what is in the page cache is told by Linux alone")

STEPS = (0, 7, 50, 51)
COMPILED, PLAIN = (Context(compiled_from_bytes=nbytes, tile=CHUNK * 2) for nbytes in (0, 1 << 60))


@settings(max_examples=15)
@given(
    seed=st.integers(0, 1000),
    count=st.integers(2, 5),
    scale=st.floats(1e-6, 1e3),
    dtype=st.sampled_from([torch.bfloat16, torch.float32, torch.float16, torch.float64]),
    tile=st.sampled_from([CHUNK, 16 * CHUNK]),
    threads=st.integers(1, 3),
)
def test_path_is_that_of_the_plain_path_to_the_bit(
    seed: int, count: int, scale: float, dtype: torch.dtype, tile: int, threads: int
) -> None:
    weights = [
        {name: t * scale if t.is_floating_point() else t for name, t in each.items()}
        for each in random_run(seed, count, dtype)
    ]
    compiled = Context(compiled_from_bytes=0, tile=tile, threads=threads)
    with tempfile.TemporaryDirectory() as directory:
        run = ckavg.open_run(write_run(Path(directory), weights, range(count)))
        assert measure(run, context=compiled).tensors == measure(run, context=PLAIN).tensors


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_path_is_that_of_the_reference(tmp_path: Path, dtype: torch.dtype) -> None:
    source = write_run(tmp_path, random_run(4, len(STEPS), dtype), STEPS, shards=(2, 1))
    run = ckavg.open_run(source)
    compiled, plain = measure(run, context=COMPILED), measure(run, context=PLAIN)
    assert (compiled.kernel, plain.kernel) == ("llvm", "torch")
    lengths, _, _ = reference.path_length([reference.load_floats(source / f"checkpoint-{step}") for step in STEPS])
    assert compiled.lengths == pytest.approx(lengths, rel=4e-9)


@pytest.mark.parametrize(("numel", "kernel"), [(1 << 16, "torch"), ((1 << 16) + 1, "llvm")])
def test_nothing_is_compiled_for_tensors_that_are_joined(tmp_path: Path, numel: int, kernel: str) -> None:
    weights = [{name: torch.full((numel,), float(step)) for name in "ab"} for step in STEPS]
    run = ckavg.open_run(write_run(tmp_path, weights, STEPS))
    path = measure(run, context=Context(compiled_from_bytes=len(STEPS) * 4 * numel))
    assert path.kernel == kernel


@pytest.mark.parametrize("count", [2, 40, 160])
def test_whole_chunks_are_compiled(tmp_path: Path, count: int) -> None:
    """Of long runs, less than a chunk of each checkpoint is read at once, and few chunks are summed."""
    generator = torch.Generator().manual_seed(0)
    weights = [{"w": torch.randn(3 * CHUNK + 5, generator=generator).bfloat16()} for _ in range(count)]
    run = ckavg.open_run(write_run(tmp_path, weights, range(count)))
    kernel = load_kernel("BF16")
    assert kernel is not None
    with Files(threads=1) as files:
        sums = CompiledSums(TileReader(run.checkpoints, files, tile=4 * CHUNK), [(0, 1)], [0])
        found = sums.form(kernel, "w", 0, 3 * CHUNK + 5, 2)
    assert found is not None
    assert found.shape == (9, 3)
    moved = (weights[1]["w"].double() - weights[0]["w"].double())[: 3 * CHUNK].abs().view(3, CHUNK).sum(dim=1)
    torch.testing.assert_close(found[0], moved, rtol=2e-8, atol=0)
    assert measure(run, context=COMPILED).tensors == measure(run, context=PLAIN).tensors


def test_dtypes_that_differ_along_the_run_take_the_plain_path(tmp_path: Path) -> None:
    weights = random_run(5, 3, torch.float32)
    base = {name: t.bfloat16() if t.is_floating_point() else t for name, t in weights[0].items()}
    write_run(tmp_path / "base", [base], (0,))
    run = ckavg.open_run(write_run(tmp_path / "run", weights[1:], (1, 2)), init=tmp_path / "base" / "checkpoint-0")
    assert measure(run, context=COMPILED).lengths == measure(run, context=PLAIN).lengths


def test_nan_is_refused_and_an_overflow_is_not(tmp_path: Path) -> None:
    far = [{"w": torch.full((40_000,), sign * 3e38) * torch.linspace(0.5, 1, 40_000)} for sign in (1.0, -1.0)]
    run = ckavg.open_run(write_run(tmp_path / "far", far, (0, 1)))
    assert measure(run, context=COMPILED).lengths == pytest.approx(measure(run, context=PLAIN).lengths, rel=1e-12)
    far[1]["w"][7] = float("nan")
    run = ckavg.open_run(write_run(tmp_path / "nan", far, (0, 1)))
    with pytest.raises(NonFiniteError, match="step 1: tensor 'w' holds NaN"):
        measure(run, context=COMPILED)


def test_a_file_cut_short_is_an_error(tmp_path: Path) -> None:
    run = ckavg.open_run(write_run(tmp_path, random_run(0, 3, torch.bfloat16), (0, 1, 2)))
    path = Path(run.checkpoints[1].shards[0].path)
    with path.open("r+b") as file:
        file.truncate(path.stat().st_size // 2)
    with pytest.raises(TruncatedShardError, match="it was longer when the run was opened"):
        measure(run, context=COMPILED)


def test_small_runs_do_not_wait_for_it(tmp_path: Path) -> None:
    run = ckavg.open_run(write_run(tmp_path, random_run(0, 2, torch.bfloat16), (0, 1)))
    assert measure(run).kernel == "torch"


def test_without_llvmlite_there_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "llvmlite", None)
    assert load_kernel("BF16") is None
