"""What is told of a run, and that nothing is told of a sound one."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

import ckavg
from ckavg.health.examine import examine
from ckavg.health.values import Finding, Health
from tests.health.training import RATES, sound_run
from tests.runs import Weights, write_run

EVEN = tuple(range(0, 1200, 100))
UNEVEN = (0, 10, 20, 50, 100, 200, 210, 500, 1000, 1001, 2000)
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
Damage = Callable[[list[dict[str, Tensor]]], None]


def health_of(tmp_path: Path, weights: list[dict[str, Tensor]], steps: tuple[int, ...]) -> Health:
    run = ckavg.open_run(write_run(tmp_path, weights, steps))
    return examine(run.source, run.checkpoints, threads=2)


def told(health: Health) -> set[tuple[str, int | None, str | None]]:
    """All but frozen tensors: one is, and norms in bfloat16 may be."""
    return {(each.kind, each.step, each.tensor) for each in health.findings if each.kind != "frozen"}


@pytest.mark.parametrize(("rate", "dtype"), [*zip(RATES, (*DTYPES, *DTYPES), strict=False)], ids=str)
@pytest.mark.parametrize("steps", [EVEN, UNEVEN, (0, 100, 200), (500, 1000, 1500, 2000, 2500, 9000)], ids=len)
def test_nothing_is_told_of_a_sound_run(tmp_path: Path, steps: tuple[int, ...], rate: str, dtype: torch.dtype) -> None:
    speed = 1e-6 if dtype == torch.bfloat16 else 3e-5  # most of the norms and biases are rounded to what they were
    assert told(health_of(tmp_path, sound_run(1, steps, RATES[rate], dtype, speed=speed), steps)) == set()


def at(place: int, name: str, index: int | slice, value: float) -> Damage:
    def damage(run: list[dict[str, Tensor]]) -> None:
        run[place][name].view(-1)[index] = value

    return damage


@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
@pytest.mark.parametrize(
    ("damage", "kind", "step", "tensor"),
    [
        (at(5, "up.weight", 77, math.nan), "nonfinite", 500, "up.weight"),
        (at(0, "gate", 0, math.inf), "nonfinite", 0, "gate"),
        (at(5, "up.weight", 77, 1e30), "spike", 500, "up.weight"),
        (at(5, "up.weight", 77, 0.9), "spike", 500, "up.weight"),
        (at(5, "embed.weight", slice(0, 2048), 0.0), "foreign", 500, "embed.weight"),
        (at(0, "up.weight", 77, 3.0), "spike", 0, "up.weight"),
        (at(11, "up.weight", 77, -3.0), "spike", 1100, "up.weight"),
        (at(6, "frozen.weight", 9, 0.02), "spike", 600, "frozen.weight"),
        (at(4, "norm.weight", 9, 0.0), "spike", 400, "norm.weight"),
    ],
)
def test_one_damage(tmp_path: Path, damage: Damage, kind: str, step: int, tensor: str, dtype: torch.dtype) -> None:
    run = sound_run(2, EVEN, RATES["warm-up, cosine"], dtype, speed=1e-5)
    damage(run)
    assert told(health_of(tmp_path, run, EVEN)) == {(kind, step, tensor)}


@pytest.mark.parametrize("place", [0, 5, 11])
@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
def test_a_value_that_vanishes(tmp_path: Path, place: int, dtype: torch.dtype) -> None:
    run = sound_run(2, EVEN, RATES["constant"], dtype, speed=1e-4)
    run[place]["up.weight"].view(-1)[77] = 1e-25
    assert told(health_of(tmp_path, run, EVEN)) == {("dip", EVEN[place], "up.weight")}


def test_zeros_and_values_that_are_always_tiny_have_not_vanished(tmp_path: Path) -> None:
    run = sound_run(2, EVEN, RATES["constant"], torch.float32, speed=1e-4)
    for place, weights in enumerate(run):
        weights["up.weight"].view(-1)[:10] = 1e-30 if place % 2 else 0.01
        weights["embed.weight"].view(-1)[:10] = 1e-30
    run[5]["down.weight"].view(-1)[:10] = 0.0
    assert {kind for kind, _, _ in told(health_of(tmp_path, run, EVEN))} <= {"spike"}


@pytest.mark.parametrize("place", [0, 1, 2])
@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
def test_a_huge_value_among_three_checkpoints(tmp_path: Path, place: int, dtype: torch.dtype) -> None:
    steps = (0, 100, 200)
    run = sound_run(2, steps, RATES["constant"], dtype, speed=1e-5)
    run[place]["up.weight"][3, 4] = 1e20
    assert told(health_of(tmp_path, run, steps)) == {("spike", steps[place], "up.weight")}


def test_every_value_is_counted(tmp_path: Path) -> None:
    run = sound_run(3, EVEN[:3], RATES["constant"], torch.float32)
    run[1]["up.weight"].view(-1)[:5] = math.nan
    run[1]["up.weight"].view(-1)[5:8] = math.inf
    (finding,) = [each for each in health_of(tmp_path, run, EVEN[:3]).findings if each.is_problem]
    message = "step 100: tensor 'up.weight' holds 5 NaN and 3 infinite of 32,768."
    assert finding == Finding("nonfinite", 100, "up.weight", message)


def test_stale_saves(tmp_path: Path) -> None:
    run = sound_run(4, EVEN, RATES["constant"], torch.bfloat16)
    run[4] = run[5] = run[3]
    health = health_of(tmp_path, run, EVEN)
    assert told(health) == {("stale", 400, None), ("stale", 500, None)}
    assert [place for place, length in enumerate(health.path) if length == 0] == [3, 4]


def test_nothing_moves(tmp_path: Path) -> None:
    run = sound_run(4, EVEN[:2], RATES["constant"], torch.bfloat16)
    assert told(health_of(tmp_path, [run[0], run[0]], EVEN[:2])) == {("stale", 100, None)}


def shuffled(weights: Weights) -> dict[str, Tensor]:
    """Weights of the same distribution that have nothing to do with these."""
    generator = torch.Generator().manual_seed(0)
    return {
        name: value.view(-1)[torch.randperm(value.numel(), generator=generator)].view(value.shape)
        for name, value in weights.items()
    }


@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
@pytest.mark.parametrize(("place", "steps"), [(5, EVEN), (1, EVEN[:3]), (0, EVEN), (11, EVEN)])
def test_a_foreign_checkpoint(tmp_path: Path, place: int, steps: tuple[int, ...], dtype: torch.dtype) -> None:
    run = sound_run(5, steps, RATES["constant"], dtype, speed=1e-5)
    run[place] = shuffled(run[place])
    found = told(health_of(tmp_path, run, steps))
    assert ("foreign", steps[place], None) in found
    assert {step for _, step, _ in found} == {steps[place]}


def test_a_foreign_tensor(tmp_path: Path) -> None:
    run = sound_run(5, EVEN, RATES["constant"], torch.bfloat16, speed=1e-5)
    run[7]["up.weight"] = shuffled(run[7])["up.weight"]
    assert told(health_of(tmp_path, run, EVEN)) == {("foreign", 700, "up.weight")}
