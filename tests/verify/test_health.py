"""What `inspect --deep` says of a run, and that it says nothing of a sound one."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor

import ckavg
from ckavg.checkpoints.inspect import inspect_run
from ckavg.checkpoints.run import Selection
from ckavg.verify.findings import Finding
from ckavg.verify.health import Health, examine
from tests.runs import write_run

EVEN = tuple(range(0, 1200, 100))
UNEVEN = (0, 10, 20, 50, 100, 200, 210, 500, 1000, 1001, 2000)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
RATES: dict[str, Callable[[float], float]] = {
    "constant": lambda _: 1.0,
    "warm-up, cosine": lambda done: min(1.0, done / 0.1) * 0.5 * (1 + math.cos(math.pi * done)),
    "warm-up, line to 0": lambda done: min(1.0, done / 0.03) * (1 - done),
    "stable, then decay": lambda done: min(1.0, (1 - done) / 0.2),
    "fast, then slow": lambda done: 1 / (0.02 + done),
}
"""Learning rate by the part of the training that is done."""

Weights = list[dict[str, Tensor]]


def sound_run(
    seed: int, steps: Sequence[int], dtype: torch.dtype, *, rate: str = "constant", speed: float = 1e-5
) -> Weights:
    """Weights at each step that move as those of a trained model do, with all that is apt to look like damage.

    Every step moves an element by its learning rate along a drift and a noise of heavy tails, both larger in some
    elements than in others; rows of the embedding only when their token comes up, the frozen tensor never.
    """
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    weights = {
        "embed.weight": 0.02 * normal(1000, 32),
        "up.weight": 0.02 * normal(256, 128),
        "down.weight": 0.02 * normal(128, 256) * (1 + 20 * (normal(256) > 2.5)),
        "norm.weight": torch.ones(128, dtype=torch.float64),
        "bias": torch.zeros(128, dtype=torch.float64),
        "lora_A.weight": 0.1 * normal(8, 128),
        "lora_B.weight": torch.zeros(256, 8, dtype=torch.float64),
        "frozen.weight": 0.02 * normal(64, 64),
        "gate": torch.zeros((), dtype=torch.float64),
    }
    drifts = {name: 0.1 * normal(*value.shape) for name, value in weights.items()}
    sizes = {name: torch.exp(0.5 * normal(*value.shape)) for name, value in weights.items()}
    frequency = 1 / torch.arange(1, 1001, dtype=torch.float64)
    run = [{name: value.to(dtype, copy=True) for name, value in weights.items()}]
    for before, step in itertools.pairwise(steps):
        taken, done = step - before, ((before + step) / 2 - steps[0]) / (steps[-1] - steps[0])
        for name, value in weights.items():
            if name.startswith("frozen"):
                continue
            tails = torch.sqrt(5 / (normal(5, *value.shape) ** 2).sum(dim=0))
            moved = taken * drifts[name] + math.sqrt(taken) * normal(*value.shape) * tails
            if name.startswith("embed"):
                seen = torch.rand(1000, generator=generator, dtype=torch.float64) < 1 - (1 - frequency / 8) ** taken
                moved *= seen[:, None]
            value += speed * RATES[rate](done) * sizes[name] * moved
        run.append({name: value.to(dtype, copy=True) for name, value in weights.items()})
    return run


def health_of(root: Path, weights: Weights, steps: tuple[int, ...]) -> Health:
    run = ckavg.open_run(write_run(root, weights, steps))
    return examine(run.source, run.checkpoints)


def found(health: Health) -> set[tuple[str, int | None, str | None]]:
    """All but frozen tensors: one is, and norms in bfloat16 may be."""
    return {(each.check, each.step, each.tensor) for each in health.findings if each.check != "frozen"}


@pytest.mark.parametrize(("rate", "dtype"), [*zip(RATES, (*DTYPES, *DTYPES), strict=False)], ids=str)
@pytest.mark.parametrize("steps", [EVEN, UNEVEN, (0, 100, 200), (500, 1000, 1500, 2000, 2500, 9000)], ids=len)
def test_nothing_is_said_of_a_sound_run(tmp_path: Path, steps: tuple[int, ...], rate: str, dtype: torch.dtype) -> None:
    speed = 1e-6 if dtype == torch.bfloat16 else 3e-5  # most of the norms and biases are rounded to what they were
    assert found(health_of(tmp_path, sound_run(1, steps, dtype, rate=rate, speed=speed), steps)) == set()


@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
@pytest.mark.parametrize(
    ("place", "tensor", "elements", "value", "kind"),
    [
        (5, "up.weight", 77, math.nan, "nonfinite"),
        (0, "gate", 0, math.inf, "nonfinite"),
        (5, "up.weight", 77, 1e30, "foreign"),
        (0, "up.weight", 77, 1e5, "foreign"),
        (11, "up.weight", 77, -1e30, "foreign"),
        (6, "frozen.weight", 9, 1e3, "foreign"),
        (5, "embed.weight", slice(0, 10_000), 0.0, "foreign"),
    ],
)
def test_one_damage(
    tmp_path: Path, place: int, tensor: str, elements: int | slice, value: float, kind: str, dtype: torch.dtype
) -> None:
    run = sound_run(2, EVEN, dtype, rate="warm-up, cosine")
    run[place][tensor].view(-1)[elements] = value
    assert found(health_of(tmp_path, run, EVEN)) == {(kind, EVEN[place], tensor)}


@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
@pytest.mark.parametrize(("place", "steps"), [(5, EVEN), (1, EVEN[:3]), (0, EVEN), (11, EVEN), (4, EVEN[:5])])
def test_a_foreign_checkpoint(tmp_path: Path, place: int, steps: tuple[int, ...], dtype: torch.dtype) -> None:
    """Weights of the same distribution that have nothing to do with those of the run."""
    run = sound_run(5, steps, dtype)
    generator = torch.Generator().manual_seed(0)
    run[place] = {
        name: value.view(-1)[torch.randperm(value.numel(), generator=generator)].view(value.shape)
        for name, value in run[place].items()
    }
    findings = found(health_of(tmp_path, run, steps))
    assert ("foreign", steps[place], None) in findings
    assert {step for _, step, _ in findings} == {steps[place]}


def test_every_value_is_counted(tmp_path: Path) -> None:
    run = sound_run(3, EVEN[:3], torch.float32)
    run[1]["up.weight"].view(-1)[:5] = math.nan
    run[1]["up.weight"].view(-1)[5:8] = math.inf
    (finding,) = (each for each in health_of(tmp_path, run, EVEN[:3]).findings if each.is_problem)
    message = "step 100: tensor 'up.weight' holds 5 NaN and 3 infinite of 32,768."
    assert finding == Finding("nonfinite", message, step=100, tensor="up.weight")


def test_the_same_infinity_everywhere_is_a_mask(tmp_path: Path) -> None:
    run = sound_run(3, EVEN[:3], torch.float32)
    for weights in run:
        weights["up.weight"].view(-1)[:5] = -math.inf
    assert found(health_of(tmp_path, run, EVEN[:3])) == set()


def test_stale_saves(tmp_path: Path) -> None:
    run = sound_run(4, EVEN, torch.bfloat16, speed=1e-4)
    run[1] = run[2] = run[0]
    run[5] = run[6] = run[4]
    health = health_of(tmp_path / "some", run, EVEN)
    assert found(health) == {("stale", step, None) for step in (100, 200, 500, 600)}
    assert [EVEN[place + 1] for place, length in enumerate(health.path) if length == 0] == [100, 200, 500, 600]
    assert found(health_of(tmp_path / "all", run[:2], EVEN[:2])) == {("stale", 100, None)}


def test_frozen_tensors_are_named_where_others_move(tmp_path: Path) -> None:
    health = health_of(tmp_path, sound_run(4, EVEN[:3], torch.float32), EVEN[:3])
    (finding,) = health.findings
    message = "tensor 'frozen.weight' is the same in all checkpoints."
    assert finding == Finding("frozen", message, is_problem=False, tensor="frozen.weight")


def test_one_checkpoint_and_none(tmp_path: Path) -> None:
    source = write_run(tmp_path, sound_run(4, (0, 1), torch.float32), (0, 1))
    checkpoints = inspect_run(source, Selection()).checkpoints
    assert examine(source, checkpoints[:1]).findings == ()
    assert examine(source, ()) == Health((), (), (), {}, 0)
