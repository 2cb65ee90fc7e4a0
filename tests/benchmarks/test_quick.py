"""What is told of measured commands: ratios within a turn, what follows of a GPU, and what an error of ℓ moves."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch

import ckavg
from benchmarks import gpu, measure, quick
from benchmarks.gpu_constants import CPU, GPU, Pass, Sample, told_of
from benchmarks.measure import CommandError, Measured
from benchmarks.sampled import betas_of, half_unit, most_off, moved_weights
from tests.runs import random_run, write_run


def turn(scale: float, *, torch_seconds: float = 1.0, mean: float = 3.0) -> quick.Turn:
    """A turn in which everything took so many times as long."""
    seconds = {case.name: 2.0 for case in quick.CASES} | {quick.TORCH: torch_seconds, "mean": mean, quick.READING: 0.5}
    return {name: Measured(scale * each, 10**6, None, "", 2 * scale * each) for name, each in seconds.items()}


def test_ratios_are_taken_within_a_turn_and_less_the_start() -> None:
    lines = {line["name"]: line for line in quick.lines_of([turn(1), turn(5), turn(3, mean=4.0)])}
    assert list(lines) == [case.name for case in quick.CASES]
    mean = lines["mean"]
    assert (mean["median"], mean["min"], mean["max"]) == (4.0, 4.0, 6.0)  # (3 − 1) / 0.5, whatever the machine did
    assert (mean["cpu"], mean["to"]) == ({"median": 4.0, "min": 4.0, "max": 6.0}, "reading")
    assert lines["pema"]["median"] == 1.0  # (2 − 1) / (2 × 0.5)
    assert lines["--help"]["median"] == 2.0
    assert (lines[quick.TORCH]["median"], lines[quick.TORCH]["unit"], lines[quick.TORCH]["to"]) == (3.0, "s", None)


def test_what_a_turn_left_out_counts_in_the_others() -> None:
    short = turn(7)
    del short[quick.LOOP]
    (line,) = [line for line in quick.lines_of([turn(1), turn(1), short]) if line["name"] == quick.LOOP]
    assert (line["median"], line["seconds"]) == (1.0, 2.0)


def test_another_checkout_is_compared_case_by_case() -> None:
    lines = quick.lines_of([turn(1), turn(2)], [turn(1, mean=5.0), turn(2, mean=5.0)], base="abc")
    compared = {line["name"]: line for line in lines if line["to"] == "abc"}
    assert set(compared) == {case.name for case in quick.CASES if case.is_ours}
    assert compared["mean"]["median"] == 0.5
    assert compared["--help"]["median"] == 1.0
    row = quick.row_of([json.dumps(line) for line in lines])
    assert row.count("|") == 2 + sum(bool(case.to) for case in quick.CASES)  # the date, and no seconds
    assert "abc" not in row


@pytest.mark.exhaustive
def test_two_checkouts_of_which_one_writes_other_bytes(tmp_path: Path) -> None:
    for name, data in (("ours", b"one"), ("theirs", b"two")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "model.safetensors").write_bytes(data)
    quick._check_same(tmp_path / "ours", tmp_path / "ours", "mean")
    with pytest.raises(CommandError, match=r"mean writes another model\.safetensors"):
        quick._check_same(tmp_path / "ours", tmp_path / "theirs", "mean")


def test_a_command_that_takes_too_long_is_ended() -> None:
    assert measure.run(["-c", "print(1)"], limit=60).stdout == "1\n"
    with pytest.raises(CommandError, match="took longer than 1 s"):
        measure.run(["-c", "import time; time.sleep(600)"], limit=1)
    with pytest.raises(CommandError, match="took longer than 1 s"):
        list(gpu._lines(["-c", "import time; time.sleep(600)"], 1))
    assert list(gpu._lines(["-c", "print('one'); print('two')"], 60)) == ["one", "two"]


# --- what follows of a GPU ---


def test_the_parts_of_a_gpu_check_fit_into_its_time() -> None:
    assert sum(part.seconds for part in gpu.PARTS) <= 8 * 60
    assert all(part.name in gpu.plan_of(8) for part in gpu.PARTS)


def test_constants_follow_from_figures() -> None:
    slow, fast = (Sample(outside + 20 / rate, 10 / rate, 10 / rate, 1e10, 0, 0) for outside, rate in ((1, 5), (4, 20)))
    passes = [Pass(CPU, 1, 16, 9.0, 9.0), Pass(GPU, 1 << 22, 8, 20.0, 20.0), Pass(GPU, 1 << 20, 4, 19.5, 19.5)]
    told = told_of({("pema", CPU): [slow], ("pema", GPU): [fast]}, passes)
    assert "_GPU_FEEDERS = 4\n" in told
    assert "tile = 1048576 " in told
    assert "_AUTO_GPU_BYTES = 20000000000 " in told  # (4 − 1) ÷ (1/5 − 1/20) GB/s
    assert "auto stays the CPU" in told_of({("mean", CPU): [fast], ("mean", GPU): [slow]}, passes)
    assert told_of({}, []).count("not measured") == 2


# --- what an error of ℓ moves ---


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_half_a_unit_lies_between_neighbours(dtype: torch.dtype) -> None:
    values = torch.tensor([1.0, 1.5, 0.0301, -3.7, 1e-3, 0.0]).to(dtype)
    up = torch.nextafter(values, torch.full_like(values, math.inf)).double() - values.double()
    assert torch.equal(half_unit(values.double(), dtype)[:-1], up[:-1] / 2)
    assert half_unit(values.double(), dtype)[-1] > 0  # that of the smallest normal numbers


@pytest.mark.parametrize("gamma", [0.05, 0.3])
def test_no_more_weights_move_than_the_bound_says(tmp_path: Path, gamma: float) -> None:
    run = ckavg.open_run(write_run(tmp_path, random_run(1, 5, torch.float32), range(0, 500, 100)))
    sampled = ckavg.path_length(run, sample=0.02)
    exact = ckavg.path_length(run)
    betas = [betas_of(path.lengths, run.steps, gamma) for path in (exact, sampled)]
    off = most_off(sampled, gamma)
    assert all(abs(one - other) <= most for one, other, most in zip(*betas, off, strict=True))
    numel, real, most = moved_weights(run, betas[0], betas[1], off)
    assert numel == sum(entry.numel for entry in run.tensors.values() if entry.is_floating)
    assert 0 < real[torch.bfloat16] <= most[torch.bfloat16] < real[torch.float32] <= most[torch.float32] <= numel
    assert moved_weights(run, betas[0], betas[0], (0.0,) * 5)[1:] == (dict.fromkeys(real, 0),) * 2
