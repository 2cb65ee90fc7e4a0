"""Which device a run gets, and the sums of a GPU, told on any machine."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

import ckavg
from ckavg.engine import devices
from ckavg.engine.blocks import BLOCK, CHUNK, TILE, check_tile
from ckavg.engine.context import Context
from ckavg.engine.devices import gpu_tile, resolve_device, tuned
from ckavg.engine.distributed import available_cores
from ckavg.errors import SettingError
from ckavg.path import sums as path_sums
from ckavg.path.measure import measure
from ckavg.path.sums import sum_by_halves
from tests.exhaustive import all_but
from tests.runs import random_run, write_run


def pretend(monkeypatch: pytest.MonkeyPatch, *, gpus: int, free: int = 80_000_000_000, cores: int = 4) -> None:
    """A machine with so many GPUs, with so much memory free."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpus > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device=None: (free, 80_000_000_000))
    monkeypatch.setattr(devices, "available_cores", lambda processes=1: cores // processes)


def test_names_of_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch, gpus=2)
    assert resolve_device("cpu") == resolve_device("auto") == "cpu"
    assert [resolve_device(name) for name in ("cuda", "cuda:0", "cuda:01")] == ["cuda", "cuda:0", "cuda:1"]
    for name in ("cuda:2", "cuda:10"):
        with pytest.raises(SettingError, match="torch finds no such GPU"):
            resolve_device(name)
    for name in ("", "gpu", "cuda:", "cuda:-1", "cuda:x", "cuda:²", "cuda 0", "CPU", "mps"):
        with pytest.raises(SettingError, match="it must be auto, cpu, cuda or cuda:N"):
            resolve_device(name)
    pretend(monkeypatch, gpus=0)
    with pytest.raises(SettingError, match="torch finds no such GPU"):
        resolve_device("cuda")


def test_threads_and_tile_fit_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    assert tuned(Context(), averages=8) == Context()
    pretend(monkeypatch, gpus=1, cores=32)
    assert tuned(Context(device="cuda")) == Context(device="cuda", threads=8, tile=BLOCK)
    assert tuned(Context(device="cuda", threads=2), averages=8) == Context(device="cuda", threads=2, tile=BLOCK)
    pretend(monkeypatch, gpus=1, free=1_000_000_000, cores=3)
    assert tuned(Context(device="cuda")) == Context(device="cuda", threads=3, tile=BLOCK >> 1)
    pretend(monkeypatch, gpus=1, free=50_000_000, cores=3)
    with pytest.raises(SettingError, match=r"only 0\.1 GB of its memory are free"):
        tuned(Context(device="cuda"))


@pytest.mark.parametrize("threads", [1, 3, 8, 16])
@pytest.mark.parametrize("averages", [1, 2, 8, 20])
def test_tiles_for_a_gpu_divide_a_block_and_stay_within_its_memory(threads: int, averages: int) -> None:
    tile = gpu_tile(threads, averages, 4_000_000_000)
    assert tile is not None
    assert check_tile(tile) == tile >= TILE
    assert threads * (10 + 2 * averages) * tile * 8 <= 4_000_000_000
    assert gpu_tile(threads, averages, 1_000_000) is None


def test_cores_are_counted() -> None:
    assert available_cores() >= available_cores(2) >= available_cores(10**6) == 1


def test_sums_by_halves() -> None:
    values = torch.rand(3, 16, 1024, dtype=torch.float64)
    assert torch.allclose(sum_by_halves(values, 1), values.sum(dim=1), rtol=1e-15)
    assert torch.allclose(sum_by_halves(values, 2), values.sum(dim=2), rtol=1e-14)
    assert torch.equal(sum_by_halves(values[1:2], 2), sum_by_halves(values, 2)[1:2])


@pytest.mark.parametrize(
    "dtype", all_but((torch.bfloat16, torch.float64), [torch.bfloat16, torch.float16, torch.float32, torch.float64])
)
def test_a_path_summed_by_halves(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype) -> None:
    """As a GPU does it: the same path, by any tile, with more steps than are kept at once."""
    count = path_sums.MOST_ROWS + 4
    run = ckavg.open_run(write_run(tmp_path, random_run(0, count, dtype), range(count)))
    want = measure(run)

    def halved(values: Tensor, dim: int, *, dtype: torch.dtype | None = None, out: Tensor | None = None) -> Tensor:
        total = sum_by_halves(values if dtype is None else values.to(dtype), dim)
        return total if out is None else out.copy_(total)

    monkeypatch.setattr(path_sums, "_sum", halved)
    got = [measure(run, context=Context(tile=tile)) for tile in (CHUNK, 4 * CHUNK, BLOCK)]
    assert got[0].tensors == got[1].tensors == got[2].tensors
    assert got[0].lengths == pytest.approx(want.lengths, rel=1e-13 if dtype == torch.float64 else 1e-8)
    assert got[0].without_spread == want.without_spread
