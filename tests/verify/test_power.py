"""How likely `--replay` is to notice what is wrong: counted, and compared with what docs/reliability.md says."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import ckavg
from ckavg.checkpoints.run import TensorInfo
from ckavg.schemes import Scheme
from ckavg.verify.replay import draw, where
from tests.runs import random_run, write_run

STEPS = (0, 100, 200, 300, 400, 500)


def entries_of(numels: list[int]) -> dict[str, TensorInfo]:
    return {f"t{place}": TensorInfo("BF16", (numel,), 0, 8) for place, numel in enumerate(numels)}


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_run(tmp_path_factory.mktemp("power") / "run", random_run(0, 6, torch.bfloat16), STEPS)


def noticed(result: Path, seed: int, elements: int = 10_000) -> bool:
    found = ckavg.verify_result(result, replay=True, elements=elements, seed=seed).findings
    return any(each.check == "replay" for each in found)


def damaged(path: Path, name: str, place: int, mask: int) -> None:
    """Change bits of one 16-bit element."""
    weights = load_file(path)
    bits = weights[name].view(-1).view(torch.int16)
    bits[place] ^= mask - 0x10000 if mask > 0x7FFF else mask
    save_file(weights, path, {"format": "pt"})


# --- what is drawn ---


@pytest.mark.parametrize("elements", [1, 3, 7, 100, 1234, 10_000, 200_000])
@pytest.mark.parametrize("numels", [[1], [0, 1, 5], [10, 1000, 100_000], [1] * 40, [7] * 1000, [2**40, 3]])
def test_the_budget_is_used_and_kept(numels: list[int], elements: int) -> None:
    entries = entries_of(numels)
    drawn = draw(entries, elements, seed=5)
    assert sum(map(len, drawn.values())) == min(elements, sum(numels))
    assert len(drawn) == min(elements, sum(numel > 0 for numel in numels))
    for name, places in drawn.items():
        assert list(places) == sorted(set(places))
        assert places[0] >= 0
        assert places[-1] < entries[name].numel
    if elements >= 8 * len(numels):
        assert all(len(places) >= min(8, entries[name].numel) for name, places in drawn.items())
    assert draw(entries, elements, seed=5) == drawn


def test_every_element_is_as_likely() -> None:
    """Of 1,000 draws of 100 out of 1,000, an element is in 100 or so: 6 deviations of the binomial are 57."""
    counts = np.zeros(1000)
    for seed in range(1000):
        (places,) = draw(entries_of([1000]), 100, seed).values()
        counts[list(places)] += 1
    assert counts.sum() == 100_000
    assert np.abs(counts - 100).max() < 57


def test_names_of_elements() -> None:
    assert [where(TensorInfo("F32", shape, 0, 0), 7) for shape in ((10,), (2, 5), (2, 2, 2))] == [
        "[7]",
        "[1, 2]",
        "[1, 1, 1]",
    ]
    assert where(TensorInfo("F32", (), 0, 0), 0) == ""


# --- what is noticed ---


@pytest.mark.exhaustive
def test_one_wrong_element(source: Path, tmp_path: Path) -> None:
    """With n of P elements drawn, it is noticed with probability n / P: here 30 % of 60 attempts, give or take 12."""
    result = ckavg.average(ckavg.open_run(source), ckavg.EMA(), out=tmp_path / "out").directory
    total = sum(each.numel for each in ckavg.open_run(source).tensors.values())
    damaged(result / "model.safetensors", "tiles", 54_321, 0x0101)
    assert noticed(result, 0, elements=total)
    assert 6 <= sum(noticed(result, seed, elements=total * 3 // 10) for seed in range(60)) <= 30


@pytest.mark.exhaustive
def test_every_bit_of_an_element_that_is_drawn(source: Path, tmp_path: Path) -> None:
    """The last bit of a bfloat16 number is a whole unit, and more than half a unit is not allowed."""
    result = ckavg.average(ckavg.open_run(source), ckavg.PEMA(), out=tmp_path / "out").directory
    path = result / "model.safetensors"
    sound = path.read_bytes()
    for bit in range(16):
        damaged(path, "odd", 5 * bit, 1 << bit)
        assert noticed(result, bit, elements=1_000_000), bit
        path.write_bytes(sound)


@pytest.mark.parametrize("name", ["scalar", "single", "odd", "norm", "bias", "tiles"])
def test_a_wrong_tensor(source: Path, tmp_path: Path, name: str) -> None:
    """A tensor of the last checkpoint instead of the average: always noticed, whatever its size."""
    result = ckavg.average(ckavg.open_run(source), ckavg.Mean(), out=tmp_path / "out").directory
    weights, last = load_file(result / "model.safetensors"), load_file(source / "checkpoint-500" / "model.safetensors")
    if name != "norm":  # which stays where it is
        assert not torch.equal(weights[name], last[name])
    weights[name] = last[name] if name != "norm" else last[name] + 1
    save_file(weights, result / "model.safetensors", {"format": "pt"})
    assert all(noticed(result, seed, elements=100) for seed in range(10))


@pytest.mark.parametrize(
    ("right", "wrong"),
    [
        (ckavg.EMA(gamma=0.15), ckavg.EMA(gamma=0.151)),
        (ckavg.PEMA(gamma=0.15), ckavg.PEMA(gamma=0.151)),
        (ckavg.BEMA(eta=0.2), ckavg.BEMA(eta=0.201)),
        (ckavg.OUEMA(eta=0.2), ckavg.OUEMA(eta=0.201)),
        (ckavg.DEMA(kappa=0.5), ckavg.DEMA(kappa=0.501)),
        (ckavg.Mean(), ckavg.EMA(gamma=0.15)),
    ],
    ids=("ema", "pema", "bema", "ouema", "dema", "mean"),
)
def test_wrong_weights(source: Path, tmp_path: Path, right: Scheme, wrong: Scheme) -> None:
    """The average of another hyper-parameter, less than 1 % off, under a record that is sound in itself."""
    run = ckavg.open_run(source)
    result = ckavg.average(run, right, out=tmp_path / "right").directory
    other = ckavg.average(run, wrong, out=tmp_path / "wrong").directory
    record, of_other = (json.loads((place / "ckavg.json").read_bytes()) for place in (result, other))
    record["outputs"][0]["sha256"] |= {
        name: of_other["outputs"][0]["sha256"][name] for name in ("model.safetensors", "README.md")
    }
    for name in ("model.safetensors", "README.md"):
        (result / name).write_bytes((other / name).read_bytes())
    (result / "ckavg.json").write_text(json.dumps(record))
    assert ckavg.verify_result(result, sources=True).problems == ()
    assert all(noticed(result, seed) for seed in range(10))
