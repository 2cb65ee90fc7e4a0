"""What the benchmarks rest on: what they expect is what ckavg must make, and no time counts for a wrong result."""

from __future__ import annotations

import doctest
import importlib
import json
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import pytest
import torch

import ckavg
from benchmarks import reference
from benchmarks.agreement import first_difference, weight_difference
from benchmarks.cache import State
from benchmarks.contest import Arena, WrongResultError, attempt
from benchmarks.expected import AVERAGES, SWEEP
from benchmarks.mapped import WAYS, sum_pieces
from benchmarks.obvious_loop import path_length
from benchmarks.programs import MEAN, PEMA, Program
from benchmarks.programs import ckavg as command
from benchmarks.synthetic import LEAST_MEGABYTES, build, shorten, step_of, weight_files
from ckavg.averaging.rules import effective_weights
from ckavg.schemes import Timeline
from ckavg.schemes.parse import parse_words

STEPS = (0, 100, 200, 300, 400)
LENGTHS = (0.0, 0.11, 0.2, 0.31, 0.4)


@pytest.fixture(scope="module")
def synthetic(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("benchmarks") / "run"
    build(run, checkpoints=3, megabytes=LEAST_MEGABYTES)
    return run


@pytest.fixture(scope="module")
def arena(synthetic: Path) -> Arena:
    """The means of two checkpoints of three: what they must be, worked out without ckavg."""
    short, scratch = synthetic.parent / "short", synthetic.parent / "scratch"
    shorten(synthetic, short, checkpoints=2)
    files = weight_files(short)
    with ExitStack() as stack:
        checkpoints = reference.Checkpoints(files, stack)
        lengths = reference.path_length(checkpoints)
        steps = [step_of(file.parent) for file in files]
        weights = {name: AVERAGES[name](steps, lengths) for name in (PEMA, MEAN)}
        reference.write_averages(checkpoints, weights, scratch / "expected")
    return Arena(run=short, scratch=scratch, expected=scratch / "expected", path_length=tuple(lengths))


@pytest.mark.parametrize(
    "name",
    [
        *("balloon", "cache", "expected", "gpu_constants", "measure", "programs", "quick", "scaling", "synthetic"),
        "table",
        *(f"evidence.{name}" for name in ("tables", "language_model_run", "small_model_run")),
    ],
)
def test_the_examples_in_docstrings(name: str) -> None:
    results = doctest.testmod(importlib.import_module(f"benchmarks.{name}"))
    assert results.attempted > results.failed == 0


def test_the_sweep_makes_what_is_expected_with_the_weights_of_ckavg() -> None:
    schemes = {word.label: word.scheme for word in parse_words(SWEEP)}
    assert list(schemes) == list(AVERAGES)
    for name, scheme in schemes.items():
        made = effective_weights(scheme.coefficients(Timeline(STEPS, LENGTHS)))
        assert AVERAGES[name](STEPS, LENGTHS) == pytest.approx(made, rel=1e-12, abs=1e-15), name


def test_the_reference_the_obvious_loop_and_ckavg_measure_one_path(arena: Arena) -> None:
    measured = ckavg.path_length(ckavg.open_run(arena.run))
    assert measured.lengths == pytest.approx(arena.path_length, rel=1e-6)
    assert path_length(weight_files(arena.run)) == pytest.approx(arena.path_length, rel=1e-5)


@pytest.mark.exhaustive
def test_a_right_result_has_a_time(arena: Arena) -> None:
    sample = attempt(command(PEMA), arena, State.WARM)
    assert 0 < sample.outside_seconds < sample.seconds
    assert sample.bytes_read == pytest.approx(2 * arena.run_bytes, rel=0.02)  # headers are not counted
    assert not (arena.scratch / "result").exists()
    assert not (arena.run / "averaged").exists()


@pytest.mark.exhaustive
def test_a_wrong_result_has_none(arena: Arena) -> None:
    right = command(MEAN)
    wrong = Program(name="wrong", arguments=right.arguments, results={PEMA: "."}, imports=right.imports)
    with pytest.raises(WrongResultError, match="weights differ"):
        attempt(wrong, arena, State.WARM)


def test_a_wrong_path_has_none(arena: Arena) -> None:
    printed = {"path_length": [0.0, 2 * arena.path_length[-1]], "bytes_read": 1, "seconds": {"path": 1, "replay": 1}}
    wrong = Program(name="wrong", arguments=lambda run, out: ["-c", f"print({json.dumps(printed)!r})"])
    with pytest.raises(WrongResultError, match="path length"):
        attempt(wrong, arena, State.WARM)


@pytest.mark.parametrize("way", WAYS)
def test_mapped_or_not_all_pieces_are_read(synthetic: Path, way: str) -> None:
    files, piece = weight_files(synthetic), 1 << 14
    read = [np.fromfile(file, np.int64, file.stat().st_size // piece * piece // 8) for file in files]
    assert sum_pieces(files, way, piece) == sum(int(each.sum()) for each in read) % (1 << 64)


def test_averages_of_other_tensors_differ(arena: Arena, synthetic: Path, tmp_path: Path) -> None:
    assert first_difference(arena.expected / MEAN, arena.expected / MEAN) is None
    assert first_difference(arena.expected / MEAN, tmp_path) == "the tensor names differ"
    assert first_difference(tmp_path, tmp_path) == "the tensor names differ"
    difference = first_difference(arena.expected / MEAN, synthetic / "checkpoint-0")
    assert difference is not None
    assert "weights differ" in difference


def test_one_unit_of_bfloat16_is_agreement_and_two_are_not() -> None:
    weights = torch.linspace(0.5, 1.98, 500_000).to(torch.bfloat16)
    units = [(weights.view(torch.int16) + further).view(torch.bfloat16) for further in (1, -1, 2)]
    assert [weight_difference(weights, other) for other in units[:2]] == [None, None]
    assert weight_difference(weights, units[2]) is not None
    assert weight_difference(weights, weights.float()) is not None


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_is_wrong(value: float) -> None:
    weights = torch.ones(10, dtype=torch.bfloat16)
    other = weights.clone()
    other[3] = value
    assert weight_difference(weights, other) is not None
    assert weight_difference(other, other) is not None


def test_what_measures_is_small() -> None:
    """A child cannot seem smaller than its parent, so the parent must do without torch."""
    program = "import sys, benchmarks.__main__, benchmarks.quick, benchmarks.gpu\n"
    program += "sys.exit('torch' in sys.modules or 'numpy' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0
