"""Pass 2 compiled against the plain way: the same bytes, checksums and errors, whatever is averaged."""

from __future__ import annotations

import math
import os
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import ckavg
from ckavg.averaging.kernels import CompiledTiles, Kind, load_kernel
from ckavg.averaging.replay import Average, Replayed, replay
from ckavg.engine.blocks import CHUNK, Block
from ckavg.engine.context import Context
from ckavg.engine.reader import Files
from ckavg.engine.tiles import TileReader
from ckavg.errors import NonFiniteError, TruncatedShardError
from ckavg.schemes import BEMA, DEMA, EMA, OUEMA, PEMA, Mean, Scheme, Timeline, Weights
from tests.runs import write_run
from tests.writers import Kept

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="what is in the page cache is told by Linux alone")

COMPILED, PLAIN = (Context(compiled_from_bytes=nbytes, tile=4 * CHUNK, threads=1) for nbytes in (0, 1 << 60))
CODES = {torch.bfloat16: "BF16", torch.float32: "F32", torch.float16: "F16", torch.float64: "F64"}
SIZE = 5 * CHUNK + 77
SCHEMES: tuple[Scheme, ...] = (
    PEMA(),
    EMA(gamma=0.9),
    BEMA(),
    BEMA(eta=math.inf),
    DEMA(),
    OUEMA(),
    Mean(),
    Weights(weights=(1.5, -1.0, 0.25, 0.25), normalize=False),
)


def walk(seed: int, count: int, dtype: torch.dtype) -> list[dict[str, Tensor]]:
    """With zeros of both signs, in all checkpoints and in some, and what is too short to be compiled."""
    generator = torch.Generator().manual_seed(seed)
    theta, run = 0.05 * torch.randn(SIZE, generator=generator), []
    mask = torch.randint(0, 6, (SIZE,), generator=generator)
    for _ in range(count):
        theta = theta + 0.01 * torch.randn(SIZE, generator=generator)
        some = torch.where(torch.rand(SIZE, generator=generator) < 0.5, -0.0, 0.0)
        large = theta.masked_fill(mask == 0, -0.0).masked_fill(mask == 1, 0.0)
        large = torch.where(mask == 2, some, large)
        run.append(
            {
                "w.running_mean": theta.to(dtype, copy=True),
                "large": large.to(dtype),
                "small": theta[:100].to(dtype, copy=True),
            }
        )
    return run


def formed(
    run: ckavg.Run, schemes: Sequence[Scheme], dtypes: Sequence[str], context: Context, *, snapshots: bool = False
) -> tuple[Replayed, list[dict[str, bytearray]]]:
    sizes = {name: entry.numel * 8 for name, entry in run.tensors.items()}
    timeline = Timeline(run.steps, tuple(0.1 * index for index in range(len(run.steps))))
    averages, kept = [], []
    for scheme, code in zip(schemes, dtypes, strict=True):
        writers = {index: Kept(sizes) for index in range(len(run.steps)) if snapshots or index == len(run.steps) - 1}
        own = scheme.coefficients(timeline)
        own = own if own.rule == "sum" else own.sparing(["w.running_mean"])
        averages.append(Average(own, dict.fromkeys(run.tensors, code), writers))
        kept += [writer.tensors for writer in writers.values()]
    return replay(run, averages, context=context), kept


@settings(max_examples=20)
@given(
    seed=st.integers(0, 1000),
    dtype=st.sampled_from([torch.bfloat16, torch.float32, torch.float16]),
    chosen=st.lists(st.tuples(st.sampled_from(SCHEMES), st.sampled_from(["BF16", "F32"])), min_size=1, max_size=5),
    snapshots=st.booleans(),
    tile=st.sampled_from([CHUNK, 2 * CHUNK, 256 * CHUNK]),
    threads=st.integers(1, 3),
)
def test_bytes_and_checksums_are_those_of_the_plain_way(
    seed: int, dtype: torch.dtype, chosen: list[tuple[Scheme, str]], snapshots: bool, tile: int, threads: int
) -> None:
    schemes, codes = zip(*chosen, strict=True)
    compiled = Context(compiled_from_bytes=0, tile=tile, threads=threads)
    with tempfile.TemporaryDirectory() as directory:
        run = ckavg.open_run(write_run(Path(directory), walk(seed, 4, dtype), (1, 5, 6, 30)))
        one, other = (formed(run, schemes, codes, way, snapshots=snapshots) for way in (compiled, PLAIN))
        assert one == other


@pytest.mark.parametrize("count", [2, 40, 160])
def test_runs_of_any_length(tmp_path: Path, count: int) -> None:
    """Of long ones, less than a chunk of each checkpoint is read at once."""
    run = ckavg.open_run(write_run(tmp_path, walk(1, count, torch.bfloat16), range(count)))
    schemes = EMA(), Mean()
    assert formed(run, schemes, ("BF16", "F32"), COMPILED) == formed(run, schemes, ("BF16", "F32"), PLAIN)


@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("scheme", SCHEMES, ids=repr)
def test_whole_chunks_are_compiled(tmp_path: Path, scheme: Scheme, stored: torch.dtype) -> None:
    run = ckavg.open_run(write_run(tmp_path, walk(2, 4, stored), (1, 5, 6, 30)))
    own = scheme.coefficients(Timeline(run.steps, (0.0, 0.1, 0.2, 0.3)))
    assert load_kernel(Kind(CODES[stored], ((own.rule, CODES[stored]),))) is not None
    with Files(threads=1) as files:
        reader = TileReader(run.checkpoints, files, tile=4 * CHUNK)
        taken: list[tuple[str, int, int]] = []
        writers = [(3, 0, lambda name, offset, values: taken.append((name, offset, len(values))))]
        tiles = CompiledTiles(
            run.checkpoints,
            reader,
            [(own, dict.fromkeys(run.tensors, CODES[stored]))],
            [[index] for index in range(4)],
            writers,
            tile=4 * CHUNK,
        )
        block = Block("large", 0, SIZE)
        form = tiles.begin(block, reader.sum_up(block))
        assert form is not None
        assert form(0, SIZE) == 5 * CHUNK
        assert sum(nbytes for _, _, nbytes in taken) == 5 * CHUNK * stored.itemsize
        assert tiles.begin(Block("small", 0, 100), reader.sum_up(block)) is None


def test_what_is_not_in_memory_is_read_the_plain_way(tmp_path: Path) -> None:
    run = ckavg.open_run(write_run(tmp_path, walk(3, 4, torch.bfloat16), (1, 5, 6, 30)))
    want = formed(run, (EMA(),), ("BF16",), PLAIN)
    os.sync()
    for checkpoint in run.checkpoints[::2]:
        with Path(checkpoint.shards[0].path).open("rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    assert formed(run, (EMA(),), ("BF16",), COMPILED) == want


@pytest.mark.parametrize("scheme", [EMA(), BEMA(), Mean(), EMA(gamma=0.0)], ids=repr)
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_what_is_not_finite_is_refused(tmp_path: Path, scheme: Scheme, value: float) -> None:
    weights = walk(4, 4, torch.float32)
    weights[1]["large"][3 * CHUNK + 5] = value
    run = ckavg.open_run(write_run(tmp_path, weights, (1, 5, 6, 30)))
    for way in (COMPILED, PLAIN):
        with pytest.raises(NonFiniteError, match=r"step 5: tensor 'large' holds NaN or infinity \(1 of"):
            formed(run, (scheme,), ("F32",), way)


@pytest.mark.parametrize("scheme", SCHEMES, ids=repr)
def test_what_overflows_on_the_way_is_formed_again(tmp_path: Path, scheme: Scheme) -> None:
    weights = walk(5, 4, torch.float32)
    for sign, each in zip((1, -1, 1, -1), weights, strict=True):
        each["large"][2 * CHUNK : 2 * CHUNK + 9] = sign * 1.5e38
        for mask in weights:
            mask["large"][7] = -math.inf
    run = ckavg.open_run(write_run(tmp_path, weights, (1, 5, 6, 30)))
    ways: list[object] = []
    for way in (COMPILED, PLAIN):
        try:
            ways.append(formed(run, (scheme,), ("F32",), way))
        except NonFiniteError as error:
            ways.append(str(error))
    assert ways[0] == ways[1]


def test_a_file_cut_short_is_an_error(tmp_path: Path) -> None:
    run = ckavg.open_run(write_run(tmp_path, walk(6, 4, torch.bfloat16), (1, 5, 6, 30)))
    path = Path(run.checkpoints[2].shards[0].path)
    os.truncate(path, path.stat().st_size // 2)
    with pytest.raises(TruncatedShardError, match="it was longer when the run was opened"):
        formed(run, (EMA(),), ("BF16",), COMPILED)


def test_without_llvmlite_there_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "llvmlite", None)
    assert load_kernel(Kind("BF16", (("ema", "BF16"),) * 7)) is None
    run = ckavg.open_run(write_run(tmp_path, walk(7, 2, torch.bfloat16), (1, 5)))
    assert formed(run, (Mean(),) * 7, ("BF16",) * 7, COMPILED) == formed(run, (Mean(),) * 7, ("BF16",) * 7, PLAIN)
