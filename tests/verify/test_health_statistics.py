"""The numbers behind `inspect --deep`, against sums over whole tensors in float64."""

from __future__ import annotations

import hashlib
import itertools
import math
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor

import ckavg
from ckavg.checkpoints.inspect import inspect_run
from ckavg.checkpoints.run import Selection
from ckavg.engine.blocks import TILE
from ckavg.errors import ReadError, TruncatedShardError
from ckavg.verify.health import TensorStatistics, examine, measure_tensors
from tests.runs import random_run, write_run

STEPS = (0, 7, 50, 51)
AT = [5, TILE + 3]


def weights_of(dtype: torch.dtype) -> list[dict[str, Tensor]]:
    run = random_run(0, len(STEPS), dtype)
    generator = torch.Generator().manual_seed(0)
    big = torch.randn(2 * TILE + 17, generator=generator, dtype=torch.float64)
    for weights in run:
        weights["big"] = big.to(dtype, copy=True)
        big += 0.01 * torch.randn(big.shape, generator=generator, dtype=torch.float64)
    return run


def measured(root: Path, weights: Sequence[dict[str, Tensor]], **written: Sequence[int]) -> dict[str, TensorStatistics]:
    run = ckavg.open_run(write_run(root, weights, STEPS[: len(weights)], **written))
    return {each.name: each for each in measure_tensors(run.checkpoints)[0]}


def check(got: TensorStatistics, values: Sequence[Tensor], *, rel: float) -> None:
    x = [torch.where(torch.isfinite(value), value, torch.nan).double().flatten() for value in values]
    zero = torch.zeros(1)
    moved = [zero, *((b - a).abs() for a, b in itertools.pairwise(x))]
    across = [zero, *((c - a).abs() for a, c in zip(x, x[2:], strict=False)), zero][: len(x)]
    first = x[0][~x[0].isnan()]
    assert got.numel == x[0].numel()
    assert got.sigma == pytest.approx(float(first.std()) if len(first) > 1 else 0.0, rel=1e-9, abs=1e-15)
    assert got.nan == tuple(int(value.isnan().sum()) for value in values)
    assert got.infinite == tuple(int(value.isinf().sum()) for value in values)
    for name, parts in {"size": [each.abs() for each in x], "distance": moved, "across": across}.items():
        assert getattr(got, name) == pytest.approx([float(each.nansum()) for each in parts], rel=rel), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_every_number(tmp_path: Path, dtype: torch.dtype) -> None:
    weights = weights_of(dtype)
    found = measured(tmp_path, weights, shards=(1, 3, 1, 2))
    assert found.keys() == {name for name, each in weights[0].items() if each.is_floating_point() and each.numel()}
    for name, tensor in found.items():
        check(tensor, [each[name] for each in weights], rel=1e-12 if dtype == torch.float64 else 2e-6)
        assert tensor.epsilon == torch.finfo(dtype).eps


def test_values_that_are_not_finite(tmp_path: Path) -> None:
    weights = weights_of(torch.float32)
    weights[0]["bias"][3] = math.inf
    weights[1]["big"][AT] = torch.tensor([math.nan, -math.inf])
    weights[3]["tiles"][:] = math.nan
    found = measured(tmp_path, weights)
    for name in ("bias", "big", "tiles", "odd"):
        check(found[name], [each[name] for each in weights], rel=2e-6)


def test_sums_beyond_float32_and_float64(tmp_path: Path) -> None:
    ramp = torch.linspace(0.5, 1, 40_000, dtype=torch.float64)
    far = [{"w": (sign * 3e38 * ramp).float(), "wide": sign * 1e308 * ramp} for sign in (1, -1, 1)]
    found = measured(tmp_path, far)
    check(found["w"], [each["w"] for each in far], rel=1e-12)
    assert found["wide"].distance[1] == math.inf
    assert found["wide"].nan == found["wide"].infinite == (0, 0, 0)


def test_path_is_that_of_pass_1(tmp_path: Path) -> None:
    run = ckavg.open_run(write_run(tmp_path, weights_of(torch.bfloat16), STEPS))
    health = examine(run.source, run.checkpoints)
    lengths = ckavg.path_length(run).lengths
    assert health.path == pytest.approx([after - before for before, after in itertools.pairwise(lengths)], rel=1e-6)
    assert health.sha256 == {}


def test_no_path_where_values_are_not_finite(tmp_path: Path) -> None:
    weights = weights_of(torch.float32)
    weights[1]["big"][5] = math.nan
    run = ckavg.open_run(write_run(tmp_path, weights, STEPS))
    path = examine(run.source, run.checkpoints).path
    assert path[:2] == (None, None)
    assert path[2] is not None


def test_tensors_that_differ_along_the_run(tmp_path: Path) -> None:
    """What the headers found to be a problem is read all the same: by name and shape."""
    weights = weights_of(torch.float32)
    weights[2]["bias"] = torch.ones(7)
    del weights[3]["norm"]
    source = write_run(tmp_path, weights, STEPS)
    (source / "checkpoint-7" / "model.safetensors").write_bytes(b"damaged")
    found = inspect_run(source, Selection())
    assert len(found.problems) == 3
    seen: list[ckavg.Progress] = []
    health = examine(source, found.checkpoints, sha256=True, on_progress=seen.append)
    tensors = {(each.name, each.numel): each for each in measure_tensors(found.checkpoints)[0]}
    assert tensors["bias", 130].held == (0, 2)
    assert tensors["bias", 7].held == (1,)
    assert tensors["norm", 64].held == (0, 1)
    check(tensors["bias", 130], [weights[0]["bias"], weights[3]["bias"]], rel=2e-6)
    files = {f"checkpoint-{step}/model.safetensors" for step in (0, 50, 51)}
    assert health.sha256 == {file: hashlib.sha256((source / file).read_bytes()).hexdigest() for file in files}
    assert (seen[0].done, seen[-1].done) == (0, seen[-1].total)
    assert seen[-1].total == health.bytes_read
    assert [news.done for news in seen] == sorted(news.done for news in seen)


def test_a_file_that_shrinks_or_goes_is_one_error(tmp_path: Path) -> None:
    run = ckavg.open_run(write_run(tmp_path, weights_of(torch.float32), STEPS))
    path = Path(run.checkpoints[2].shards[0].path)
    path.write_bytes(path.read_bytes()[:-1000])
    with pytest.raises(TruncatedShardError, match="checkpoint-50"):
        examine(run.source, run.checkpoints)
    path.unlink()
    with pytest.raises(ReadError, match="checkpoint-50"):
        examine(run.source, run.checkpoints)
