"""The values that define every convention, to 1e-9, through files and the whole pipeline."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

import ckavg
from ckavg.averaging.rules import effective_weights
from ckavg.schemes import Scheme, Timeline
from tests.reference import load_floats
from tests.runs import write_run

CLOSE = 1e-9
SCALARS = (0.0, 1.0, 3.0, 2.0, 5.0, 4.0)


@pytest.fixture
def scalars(tmp_path: Path) -> ckavg.Run:
    weights = [{"x": torch.tensor(value, dtype=torch.float64)} for value in SCALARS]
    return ckavg.open_run(write_run(tmp_path / "run", weights, range(0, 2001, 400)))


@pytest.fixture
def three_tensors(tmp_path: Path) -> ckavg.Run:
    start = {"a": [0.0, 1.0, 2.0, 3.0], "b": [-1.0, 1.0], "c": [1.0, 1.0]}
    moves = {
        "a": [[0.1, -0.1, 0.2, 0], [0, 0.1, 0.1, -0.2], [0.05, 0, -0.05, 0.1]],
        "b": [[0.1, 0.1], [-0.1, 0.05], [0.3, 0.1]],
        "c": [[0.01, 0], [0, 0.02], [0, 0.01]],
    }
    current = {name: torch.tensor(values, dtype=torch.float64) for name, values in start.items()}
    run = [current]
    for place in range(3):
        current = {name: current[name] + torch.tensor(moves[name][place], dtype=torch.float64) for name in current}
        run.append(current)
    return ckavg.open_run(write_run(tmp_path / "run", run, (0, 50, 100, 150)))


@pytest.mark.parametrize(
    ("scheme", "value"),
    [
        (ckavg.BEMA(), 1.281403938668),
        (ckavg.BEMA(form="author"), 1.281126561769),
        (ckavg.BEMA(burn_in=400), 1.912217010252),
        (ckavg.BEMA(eta=math.inf), 0.407586354687),
        (ckavg.BEMA(min_beta=0.05), 1.570899146471),
        (ckavg.OUEMA(), 0.539640062280),
        (ckavg.DEMA(), 0.785338518338),
        (ckavg.MomentumEMA(momentum=0.9, momentum_per="update"), 1.29631),
        (ckavg.Mean(), 2.5),
        (ckavg.Last(), 4.0),
    ],
    ids=lambda value: value.label if isinstance(value, Scheme) else "",
)
def test_scalars(scalars: ckavg.Run, tmp_path: Path, scheme: Scheme, value: float) -> None:
    result = ckavg.average(scalars, scheme, out=tmp_path / "out")
    close = CLOSE if round(value, 5) != value else 5e-6
    assert float(load_floats(result.directory)["x"]) == pytest.approx(value, rel=0, abs=close)
    weighted = sum(weight * theta for weight, theta in zip(result.weights, SCALARS, strict=True))
    assert weighted == pytest.approx(value, rel=0, abs=close)


def test_inner_average_of_bema(scalars: ckavg.Run, tmp_path: Path) -> None:
    """Its inner EMA is EMA with β = (10 + t)^(−1/2): age plus an offset of 10."""
    result = ckavg.average(scalars, ckavg.EMA(gamma=0.5, tau=10.0), out=tmp_path / "out")
    assert float(load_floats(result.directory)["x"]) == pytest.approx(0.407586354687, rel=0, abs=CLOSE)


def test_path_of_three_tensors(three_tensors: ckavg.Run) -> None:
    path = ckavg.path_length(three_tensors)
    assert path.without_spread == ("c",)
    assert path.parameters_counted == 6
    assert path.lengths == pytest.approx((0, 0.075210003989, 0.144527451468, 0.217487792522), rel=0, abs=CLOSE)


def test_pema_of_three_tensors(three_tensors: ckavg.Run, tmp_path: Path) -> None:
    result = ckavg.average(three_tensors, ckavg.PEMA(), out=tmp_path / "out")
    assert result.betas[0] is None
    assert result.betas[1:] == pytest.approx((0.830346593917, 0.769924623484, 0.730745816110), rel=0, abs=CLOSE)
    got = load_floats(result.directory)
    assert got["a"] == pytest.approx([0.135486309030, 0.994856106002, 2.255165869870, 2.885464333158], rel=0, abs=CLOSE)
    assert got["b"] == pytest.approx([-0.775632361169, 1.218926161949], rel=0, abs=CLOSE)
    assert got["c"] == pytest.approx([1.009894901822, 1.026068483006], rel=0, abs=CLOSE)
    assert result.excluded_from_path == ("c",)
    assert any("c" in warning and "spread" in warning for warning in result.warnings)


def test_pema_pairing_next(three_tensors: ckavg.Run, tmp_path: Path) -> None:
    result = ckavg.average(three_tensors, ckavg.PEMA(pairing="next"), out=tmp_path / "out")
    got = load_floats(result.directory)
    expected = [0.138496231174, 0.996096692872, 2.257600461698, 2.884799076605]
    assert got["a"] == pytest.approx(expected, rel=0, abs=CLOSE)
    assert result.betas[1] == 1.0
    assert result.weights[0] == 0.0


def test_pema_scope_tensor(three_tensors: ckavg.Run, tmp_path: Path) -> None:
    scheme = ckavg.PEMA(scope="tensor")
    path = ckavg.path_length(three_tensors)
    own = {name: path.tensor_lengths(name) for name in path.counted}
    coefficients = scheme.coefficients(Timeline(three_tensors.steps, path.lengths, own))
    betas = (0.817303384290, 0.752179426051, 0.730745816110)
    assert coefficients.tensor_betas["a"][1:] == pytest.approx(betas, rel=0, abs=CLOSE)
    assert coefficients.tensor_betas.keys() == {"a", "b"}
    got = load_floats(ckavg.average(three_tensors, scheme, out=tmp_path / "out").directory)
    expected = [0.135318216097, 0.994546402070, 2.254351887138, 2.886419926889]
    assert got["a"] == pytest.approx(expected, rel=0, abs=CLOSE)
    assert got["c"] == pytest.approx([1.009894901822, 1.026068483006], rel=0, abs=CLOSE)


def test_pema_clock_updates_counts_them(three_tensors: ckavg.Run) -> None:
    lengths = ckavg.path_length(three_tensors).lengths
    betas = ckavg.PEMA(clock="updates").coefficients(Timeline(three_tensors.steps, lengths)).betas
    assert betas[1:] == pytest.approx([(1 + 3 * lengths[-1] * length) ** -0.15 for length in lengths[1:]])


def test_zero_sigma_eps_is_the_literal_text(three_tensors: ckavg.Run) -> None:
    path = ckavg.path_length(three_tensors, zero_sigma="eps")
    sigma = {"a": (5 / 3) ** 0.5 + 1e-8, "b": 2**0.5 + 1e-8, "c": 1e-8}
    first = (0.4 / sigma["a"] + 0.2 / sigma["b"] + 0.01 / sigma["c"]) / 8
    assert path.parameters_counted == 8
    assert path.lengths[1] == pytest.approx(first, rel=1e-9)


def test_pema_betas_on_a_straight_path() -> None:
    steps = tuple(range(0, 1801, 50))
    betas = ckavg.PEMA().coefficients(Timeline(steps, tuple(step / 1800 for step in steps))).betas
    assert betas[1] == pytest.approx(0.554452663, rel=0, abs=CLOSE)
    assert betas[9] == pytest.approx(0.399828289, rel=0, abs=CLOSE)
    assert betas[36] == pytest.approx(0.324842574, rel=0, abs=CLOSE)


def test_bema_weights_of_a_long_run() -> None:
    coefficients = ckavg.BEMA().coefficients(Timeline(tuple(range(0, 7201, 400))))
    inner = effective_weights(ckavg.EMA(gamma=0.5, tau=10.0).coefficients(Timeline(tuple(range(0, 7201, 400)))))
    weights = effective_weights(coefficients)
    assert coefficients.alphas is not None
    assert inner[0] == pytest.approx(0.697540, abs=5e-7)
    assert coefficients.alphas[-1] == pytest.approx(0.169205, abs=5e-7)
    assert weights[0] == pytest.approx(0.528335, abs=5e-7)
    assert weights[-1] == pytest.approx(0.180982, abs=5e-7)
