"""Means with a decay have the weights of the training they imitate, for any run."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import ckavg
from ckavg.averaging.rules import effective_weights
from ckavg.errors import SettingError
from ckavg.schemes import Mean, Timeline
from ckavg.schemes.mean import Decay
from tests import reference
from tests.cli.runner import run_cli
from tests.runs import random_run, write_checkpoint, write_run

DECAYS: Mapping[Decay, Callable[[float], float]] = {
    "linear": lambda x: 1.0 - x,
    "cosine": lambda x: 0.5 + 0.5 * math.cos(math.pi * x),
    "minus-sqrt": lambda x: 1.0 - x**0.5,
}
DECAYED = pytest.mark.parametrize("decay", DECAYS)


def emulated(decay: Decay, count: int) -> list[float]:
    """Weights of the checkpoints where training would have arrived: θ_0 + Σ_j w_j (θ_j − θ_{j−1}) of unit vectors."""
    theta = np.eye(count)
    arrived = theta[0].copy()
    for place in range(1, count):
        arrived += DECAYS[decay](place / count) * (theta[place] - theta[place - 1])
    return list(arrived)


def weights(decay: Decay, count: int) -> tuple[float, ...]:
    return effective_weights(Mean(decay=decay).coefficients(Timeline(tuple(range(0, 50 * count, 50)))))


def weight_files(directory: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in directory.glob("*.safetensors")}


@given(decay=st.sampled_from(tuple(DECAYS)), count=st.integers(1, 200))
def test_weights_are_those_of_the_emulated_training(decay: Decay, count: int) -> None:
    got = weights(decay, count)
    assert got == pytest.approx(emulated(decay, count), abs=1e-14)
    assert sum(got) == pytest.approx(1, abs=1e-13)
    assert min(got) > 0


@given(count=st.integers(1, 200))
def test_linear_is_the_plain_mean(count: int) -> None:
    assert weights("linear", count) == pytest.approx([1 / count] * count, abs=1e-14)


@given(count=st.integers(2, 200))
def test_minus_sqrt_gives_most_to_the_oldest_and_less_to_each_after_it(count: int) -> None:
    got = weights("minus-sqrt", count)
    assert all(older > newer for older, newer in itertools.pairwise(got))
    assert got[0] == pytest.approx(count**-0.5, rel=1e-12)


@given(count=st.integers(3, 200))
def test_cosine_is_symmetric_and_gives_most_to_the_middle(count: int) -> None:
    got = weights("cosine", count)
    assert got == pytest.approx(got[::-1], abs=1e-14)
    assert max(got) == pytest.approx(got[count // 2], abs=1e-14)
    assert got[0] < got[count // 2]


@pytest.mark.parametrize(
    ("decay", "expected"),
    [("linear", (0.5, 0.5)), ("cosine", (0.5, 0.5)), ("minus-sqrt", (math.sqrt(0.5), 1 - math.sqrt(0.5)))],
)
def test_two_checkpoints(tmp_path: Path, decay: Decay, expected: tuple[float, float]) -> None:
    run = random_run(seed=2, count=2, dtype=torch.float32)
    source = write_run(tmp_path / "run", run, (10, 400))
    result = ckavg.average(ckavg.open_run(source), Mean(decay=decay))
    assert result.weights == pytest.approx(expected, abs=1e-15)
    checkpoints = [reference.load_floats(source / f"checkpoint-{step}") for step in (10, 400)]
    want = {name: expected[0] * checkpoints[0][name] + expected[1] * checkpoints[1][name] for name in checkpoints[0]}
    got = reference.load_floats(result.directory)
    reference.assert_rounded_once(got, want, checkpoints, torch.float32, accumulated=torch.float32)


@DECAYED
def test_steps_between_the_checkpoints_do_not_matter(decay: Decay) -> None:
    uneven = Mean(decay=decay).coefficients(Timeline((0, 1, 700, 701, 9000)))
    assert effective_weights(uneven) == weights(decay, 5)


@DECAYED
def test_the_model_given_with_init_is_not_among_them(tmp_path: Path, decay: Decay) -> None:
    run = random_run(seed=3, count=5, dtype=torch.bfloat16)
    base = write_checkpoint(tmp_path / "base", run[0])
    source = write_run(tmp_path / "run", run[1:], (10, 20, 30, 40))
    without = ckavg.average(ckavg.open_run(source), Mean(decay=decay), out=tmp_path / "without")
    result = ckavg.average(ckavg.open_run(source, init=base), Mean(decay=decay), out=tmp_path / "with")
    assert result.weights == (0.0, *without.weights)
    assert without.weights == pytest.approx(emulated(decay, 4), abs=1e-15)
    assert weight_files(result.directory) == weight_files(without.directory)


def test_one_checkpoint_beside_the_base_model_is_the_result(tmp_path: Path) -> None:
    run = random_run(seed=4, count=2, dtype=torch.bfloat16)
    base = write_checkpoint(tmp_path / "base", run[0])
    source = write_run(tmp_path / "run", run[1:], (10,))
    result = ckavg.average(ckavg.open_run(source, init=base), Mean(decay="minus-sqrt"))
    assert result.weights == (0.0, 1.0)
    assert weight_files(result.directory) == weight_files(source / "checkpoint-10")


@DECAYED
def test_the_newest_few_decay_among_themselves(tmp_path: Path, decay: Decay) -> None:
    run = random_run(seed=5, count=6, dtype=torch.float16)
    source = write_run(tmp_path / "run", run, range(6))
    alone = write_run(tmp_path / "alone", run[3:], range(3, 6))
    result = ckavg.average(ckavg.open_run(source, last=3), Mean(decay=decay), out=tmp_path / "last")
    assert result.weights == pytest.approx(emulated(decay, 3), abs=1e-15)
    want = ckavg.average(ckavg.open_run(alone), Mean(decay=decay), out=tmp_path / "all")
    assert weight_files(result.directory) == weight_files(want.directory)


def test_labels() -> None:
    assert Mean(decay="cosine").label == "mean-decaycosine"
    assert Mean(decay="minus-sqrt").label == "mean-decayminus-sqrt"
    assert Mean(decay="none").label == "mean"


@pytest.mark.parametrize("decay", ["sqrt", "", "Cosine", "None", "minus_sqrt"])
def test_an_unknown_decay_is_refused(decay: str) -> None:
    with pytest.raises(SettingError, match=f"decay is '{decay}'; it must be one of none, linear, cosine, minus-sqrt"):
        Mean(decay=decay)  # type: ignore[arg-type]


def test_the_option_of_the_command(tmp_path: Path) -> None:
    source = write_run(tmp_path / "run", random_run(seed=6, count=3, dtype=torch.float32), (0, 1, 2))
    assert run_cli("mean", source, "--decay", "sqrt").exit_code == 2
    result = run_cli("mean", source, "--decay", "minus-sqrt")
    assert result.exit_code == 0, result.stderr
    assert result.stdout.startswith("Mean: decay minus-sqrt\n")
    card = (source / "averaged" / "mean-decayminus-sqrt" / "README.md").read_text()
    assert "- Hyper-parameters: decay = minus-sqrt\n" in card
    assert "    ckavg mean --decay minus-sqrt\n" in card
