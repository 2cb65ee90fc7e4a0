"""Every number of one reading against float64 over whole tensors, every hash against that of the whole file."""

from __future__ import annotations

import hashlib
import itertools
import json
import math
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import ckavg
from ckavg.checkpoints.inspect import inspect_run
from ckavg.checkpoints.run import Checkpoint, Run, Selection
from ckavg.errors import ReadError, TruncatedShardError
from ckavg.health.examine import examine
from ckavg.health.plan import PIECE
from ckavg.health.reading import Reading, read_all
from ckavg.health.values import TensorStatistics
from tests.runs import Weights, random_run, write_run

STEPS = (0, 7, 50, 51)


def weights_of(count: int, dtype: torch.dtype, seed: int = 0) -> list[dict[str, Tensor]]:
    run = random_run(seed, count, dtype)
    generator = torch.Generator().manual_seed(seed)
    big = torch.randn(2 * PIECE + 17, generator=generator, dtype=torch.float64)
    for weights in run:
        weights["big"] = big.to(dtype, copy=True)
        big += 0.01 * torch.randn(big.shape, generator=generator, dtype=torch.float64)
    return run


def check_tensor(told: TensorStatistics, values: Sequence[Tensor], *, rel: float) -> None:
    """Compare with sums over whole tensors in float64."""
    x = [value.double().flatten() for value in values]
    moved = [torch.zeros_like(x[0]), *((b - a).abs() for a, b in itertools.pairwise(x))]
    past = [torch.zeros(1), *((c - a).abs() for a, c in zip(x, x[2:], strict=False)), torch.zeros(1)][: len(x)]
    assert told.numel == x[0].numel()
    assert told.mean == pytest.approx(float(x[0].mean()), rel=1e-9, abs=1e-12)
    assert told.sigma == pytest.approx(float(torch.std(x[0])) if len(x[0]) > 1 else 0.0, rel=1e-9, abs=1e-15)
    assert told.largest == tuple(float(each.abs().max()) for each in x)
    assert told.distance == pytest.approx([float(each.sum()) for each in moved], rel=rel)
    rest = [math.fsum(float(part.sum() - part.max()) for part in torch.split(each, PIECE)) for each in moved]
    assert told.rest == pytest.approx(rest, rel=rel, abs=rel * max(told.change))
    assert told.change == pytest.approx([float(each.max()) for each in moved], rel=rel)
    assert told.across == pytest.approx([float(each.sum()) for each in past], rel=rel)
    inner = [
        float(torch.relu(torch.maximum(torch.minimum(b - a, b - c), torch.minimum(a - b, c - b))).max())
        for a, b, c in zip(x, x[1:], x[2:], strict=False)
    ]
    spikes = [told.change[1], *inner, told.change[-1]] if len(x) > 1 else [0.0]
    assert told.spike == pytest.approx(spikes, rel=rel, abs=rel * max(told.change))


def check_hashes(run: Run, reading: Reading) -> None:
    assert reading.sha256 == {
        (index, shard): hashlib.sha256(Path(each.path).read_bytes()).hexdigest()
        for index, checkpoint in enumerate(run.checkpoints)
        for shard, each in enumerate(checkpoint.shards)
    }


@pytest.mark.parametrize("threads", [1, 2, 5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_every_number(tmp_path: Path, dtype: torch.dtype, threads: int) -> None:
    weights = weights_of(len(STEPS), dtype)
    run = ckavg.open_run(write_run(tmp_path, weights, STEPS, shards=(2,)))
    reading = read_all(run.checkpoints, threads=threads)
    told = {tensor.name: tensor for tensor in reading.tensors}
    assert told.keys() == {name for name, value in weights[0].items() if value.is_floating_point()}
    assert told["empty"].distance == (0.0,) * len(STEPS)
    for name, tensor in told.items():
        if tensor.numel:
            check_tensor(tensor, [each[name] for each in weights], rel=1e-12 if dtype == torch.float64 else 2e-6)
    check_hashes(run, reading)
    assert reading.bytes_read == sum(checkpoint.nbytes for checkpoint in run.checkpoints)


def test_threads_change_no_number(tmp_path: Path) -> None:
    run = ckavg.open_run(write_run(tmp_path, weights_of(4, torch.bfloat16), STEPS))
    readings = [read_all(run.checkpoints, threads=threads) for threads in (1, 2, 3, 8)]
    assert all(reading == readings[0] for reading in readings)


def in_order(run: Run, weights: Sequence[Weights], orders: Sequence[Sequence[str]]) -> None:
    """Write the files of a run again, each with its tensors in an order of its own; safetensors itself sorts them."""
    for checkpoint, each, names in zip(run.checkpoints, weights, orders, strict=True):
        header, data = {}, b""
        for name in names:
            raw = each[name].contiguous().flatten().view(torch.uint8).numpy().tobytes() if each[name].numel() else b""
            dtype = {torch.int64: "I64", torch.bool: "BOOL", torch.float32: "F32"}[each[name].dtype]
            shape = list(each[name].shape)
            header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [len(data), len(data) + len(raw)]}
            data += raw
        text = json.dumps(header).encode()
        Path(checkpoint.shards[0].path).write_bytes(len(text).to_bytes(8, "little") + text + data)


def test_files_of_another_order_are_read_once_more(tmp_path: Path) -> None:
    weights = weights_of(4, torch.float32)
    source = write_run(tmp_path, weights, STEPS)
    names = list(weights[0])
    in_order(ckavg.open_run(source), weights, [names, names[::-1], names, names])
    run = ckavg.open_run(source)
    reading = read_all(run.checkpoints, threads=2)
    check_hashes(run, reading)
    for tensor in reading.tensors:
        if tensor.numel:
            check_tensor(tensor, [each[tensor.name] for each in weights], rel=2e-6)
    data = sum(entry.nbytes for entry in run.checkpoints[1].entries.values())
    assert reading.bytes_read == sum(checkpoint.nbytes for checkpoint in run.checkpoints) + data


def test_shards_cut_differently(tmp_path: Path) -> None:
    weights = weights_of(4, torch.bfloat16)
    run = ckavg.open_run(write_run(tmp_path, weights, STEPS, shards=(1, 3, 1, 2)))
    seen: list[ckavg.Progress] = []
    reading = read_all(run.checkpoints, threads=2, on_progress=seen.append)
    check_hashes(run, reading)
    for tensor in reading.tensors:
        if tensor.numel:
            check_tensor(tensor, [each[tensor.name] for each in weights], rel=2e-6)
    assert (seen[0].done, seen[-1].done) == (0, seen[-1].total)
    assert seen[-1].total == reading.bytes_read >= sum(checkpoint.nbytes for checkpoint in run.checkpoints)


def test_path_is_that_of_pass_1(tmp_path: Path) -> None:
    run = ckavg.open_run(write_run(tmp_path, weights_of(4, torch.bfloat16), STEPS))
    health = examine(run.source, run.checkpoints)
    lengths = ckavg.measure_path(run).lengths
    assert health.path == pytest.approx([after - before for before, after in itertools.pairwise(lengths)], rel=1e-6)


def test_values_that_are_not_finite_count_as_unchanged(tmp_path: Path) -> None:
    weights = weights_of(4, torch.float32)
    clean = [each["big"].clone() for each in weights]
    weights[1]["big"][[5, PIECE + 3]] = torch.tensor([math.nan, -math.inf])
    run = ckavg.open_run(write_run(tmp_path, weights, STEPS))
    told = {tensor.name: tensor for tensor in read_all(run.checkpoints, threads=2).tensors}["big"]
    assert (told.nan, told.infinite) == ((0, 1, 0, 0), (0, 1, 0, 0))
    kept = torch.ones(len(clean[0]), dtype=torch.bool)
    kept[[5, PIECE + 3]] = False
    for place in (1, 2):
        want = (clean[place].double() - clean[place - 1].double())[kept].abs().sum()
        assert told.distance[place] == pytest.approx(float(want), rel=2e-6)
    health = examine(run.source, run.checkpoints)
    assert health.path[:2] == (None, None)
    assert health.path[2] is not None


def test_differences_too_large_for_float32(tmp_path: Path) -> None:
    far = [{"w": torch.full((40_000,), sign * 3e38) * torch.linspace(0.5, 1, 40_000)} for sign in (1, -1, 1)]
    run = ckavg.open_run(write_run(tmp_path, far, (0, 1, 2)))
    (told,) = read_all(run.checkpoints, threads=2).tensors
    want = float((far[1]["w"].double() - far[0]["w"].double()).abs().sum())
    assert told.distance == pytest.approx((0, want, want), rel=1e-12)
    assert told.spike[1] == torch.finfo(torch.float32).max
    assert told.nan == told.infinite == (0, 0, 0)


def test_a_huge_value_leaves_the_rest_as_it_is(tmp_path: Path) -> None:
    weights = weights_of(3, torch.float32)
    weights[1]["bias"][7] = 3e37
    run = ckavg.open_run(write_run(tmp_path, weights, STEPS[:3]))
    told = {tensor.name: tensor for tensor in read_all(run.checkpoints, threads=2).tensors}["bias"]
    moved = (weights[1]["bias"].double() - weights[0]["bias"].double()).abs()
    assert told.rest[1] == pytest.approx(float(torch.cat([moved[:7], moved[8:]]).sum()), rel=1e-6)


def test_tensors_that_differ_along_the_run(tmp_path: Path) -> None:
    """What the headers found to be a problem is read all the same: by name and shape."""
    weights = [dict(each) for each in weights_of(4, torch.float32)]
    weights[2]["bias"] = torch.ones(7)
    del weights[3]["norm"]
    source = write_run(tmp_path, weights, STEPS)
    (source / "checkpoint-7" / "model.safetensors").write_bytes(b"damaged")
    found = inspect_run(source, Selection())
    assert len(found.problems) == 3
    reading = read_all(found.checkpoints, threads=2)
    told = {(tensor.name, tensor.numel): tensor for tensor in reading.tensors}
    assert told["bias", 130].held == (0, 2)
    assert told["bias", 7].held == (1,)
    assert told["norm", 64].held == (0, 1)
    check_tensor(told["bias", 130], [weights[0]["bias"], weights[3]["bias"]], rel=2e-6)
    health = examine(source, found.checkpoints)
    assert set(health.sha256) == {f"checkpoint-{step}/model.safetensors" for step in (0, 50, 51)}


def test_one_directory_twice(tmp_path: Path) -> None:
    """A checkpoint that is named as the anchor, too: its file is hashed twice, each time from front to back."""
    source = write_run(tmp_path, weights_of(3, torch.float32), (10, 20, 30))
    run = ckavg.open_run(source, init=source / "checkpoint-20")
    health = examine(run.source, run.checkpoints, threads=2)
    digest = hashlib.sha256((source / "checkpoint-20" / "model.safetensors").read_bytes()).hexdigest()
    assert health.sha256["checkpoint-20/model.safetensors"] == digest


@pytest.mark.parametrize("threads", [1, 4])
def test_a_file_that_shrinks_is_one_error(tmp_path: Path, threads: int) -> None:
    run = ckavg.open_run(write_run(tmp_path, weights_of(4, torch.float32), STEPS))
    path = run.checkpoints[2].shards[0].path
    Path(path).write_bytes(Path(path).read_bytes()[:-1000])
    with pytest.raises(TruncatedShardError, match="checkpoint-50"):
        read_all(run.checkpoints, threads=threads)
    Path(path).unlink()
    with pytest.raises(ReadError, match="checkpoint-50"):
        read_all(run.checkpoints, threads=threads)


def test_no_checkpoints() -> None:
    none: tuple[Checkpoint, ...] = ()
    assert read_all(none, threads=2) == Reading((), {}, 0)


def test_a_header_longer_than_a_buffer(tmp_path: Path) -> None:
    weights = {"w": torch.ones(5)}
    for step in (0, 1):
        directory = tmp_path / f"checkpoint-{step}"
        directory.mkdir()
        save_file(weights, directory / "model.safetensors", {"note": "x" * (3 << 20)})
        assert load_file(directory / "model.safetensors").keys() == {"w"}
    run = ckavg.open_run(tmp_path)
    reading = read_all(run.checkpoints, threads=2)
    check_hashes(run, reading)
    assert reading.bytes_read == sum(checkpoint.nbytes for checkpoint in run.checkpoints)
