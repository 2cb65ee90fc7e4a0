"""The compiled kernel of pass 1 against the plain path and against float64."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import ckavg
from ckavg.engine.blocks import CHUNK
from ckavg.engine.context import Context
from ckavg.errors import NonFiniteError
from ckavg.path.kernels import load_kernel
from ckavg.path.measure import measure
from tests import reference
from tests.runs import random_run, write_run

STEPS = (0, 7, 50, 51)
COMPILED, PLAIN = (Context(compiled_from_bytes=nbytes, tile=CHUNK * 2) for nbytes in (0, 1 << 60))


@given(
    seed=st.integers(0, 2**32 - 1),
    chunks=st.integers(1, 3),
    scale=st.floats(1e-6, 1e6),
    dtype=st.sampled_from([torch.bfloat16, torch.float32]),
)
def test_distances_of_chunks(seed: int, chunks: int, scale: float, dtype: torch.dtype) -> None:
    kernel = load_kernel()
    assert kernel is not None
    generator = torch.Generator().manual_seed(seed)
    before, after = ((scale * torch.randn(chunks * CHUNK, generator=generator)).to(dtype) for _ in range(2))
    out = torch.empty(chunks, dtype=torch.float64)
    kernel(before, after, out)
    want = (after.double() - before.double()).abs().view(chunks, CHUNK).sum(dim=1)
    torch.testing.assert_close(out, want, rtol=2e-8, atol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float16, torch.float64], ids=str)
def test_path_is_that_of_the_plain_path(tmp_path: Path, dtype: torch.dtype) -> None:
    source = write_run(tmp_path, random_run(4, len(STEPS), dtype), STEPS, shards=(2, 1))
    run = ckavg.open_run(source)
    compiled, plain = measure(run, context=COMPILED), measure(run, context=PLAIN)
    assert (compiled.kernel, plain.kernel) == ("numba", "torch")
    assert compiled.lengths == pytest.approx(plain.lengths, rel=1e-9 if dtype == torch.bfloat16 else 4e-9)
    lengths, _, _ = reference.path_length([reference.load_floats(source / f"checkpoint-{step}") for step in STEPS])
    assert compiled.lengths == pytest.approx(lengths, rel=4e-9)
    assert {name: each.sigma for name, each in compiled.tensors.items()} == {
        name: each.sigma for name, each in plain.tensors.items()
    }


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


def test_small_runs_do_not_wait_for_it(tmp_path: Path) -> None:
    run = ckavg.open_run(write_run(tmp_path, random_run(0, 2, torch.bfloat16), (0, 1)))
    assert measure(run).kernel == "torch"


def test_without_numba_there_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "numba", None)
    load_kernel.cache_clear()
    try:
        assert load_kernel() is None
    finally:
        load_kernel.cache_clear()
