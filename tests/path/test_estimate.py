"""The path from a sample: close to the exact one, with errors as large as stated."""

from __future__ import annotations

import itertools
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import ckavg
from ckavg.checkpoints.run import TensorInfo
from ckavg.engine.blocks import CHUNK, TILE
from ckavg.errors import NonFiniteError, SettingError
from ckavg.path.sampling import choose_samples, cut_samples
from tests import reference
from tests.cli.runner import run_cli
from tests.exhaustive import few_or_all
from tests.runs import random_run, write_run

STEPS = (0, 10, 20, 30, 40)


def uneven_run(root: Path, seed: int, *, dtype: torch.dtype = torch.bfloat16) -> Path:
    """Weights whose rows differ in scale and in how far they travel, as those of a trained model do."""
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(600, 1, generator=generator).exp()
    walk = {
        "large": rows * torch.randn(600, 1024, generator=generator),
        "other": 0.02 * torch.randn(300, 1000, generator=generator),
        "small": torch.randn(200, generator=generator),
        "norm": torch.ones(1024),
    }
    run = []
    for _ in STEPS:
        run.append({name: tensor.to(dtype, copy=True) for name, tensor in walk.items()})
        for name, tensor in walk.items():
            scale = 0.01 * torch.randn(len(tensor), *(1,) * (tensor.dim() - 1), generator=generator).exp()
            tensor += scale * tensor.std() * torch.randn(tensor.shape, generator=generator) + 1e-3 * (name == "norm")
    return write_run(root, run, STEPS, shards=(2,))


def exact(source: Path) -> list[float]:
    lengths, _, _ = reference.path_length([reference.load_floats(source / f"checkpoint-{step}") for step in STEPS])
    return lengths


@pytest.mark.parametrize("runs", few_or_all(10, 24))
def test_errors_are_as_large_as_they_say(tmp_path: Path, runs: int) -> None:
    """Over many runs, the errors in units of the standard error are about standard normal at every step."""
    scores = []
    for seed in range(runs):
        source = uneven_run(tmp_path / str(seed), seed)
        path = ckavg.path_length(ckavg.open_run(source), sample=0.02)
        errors = path.standard_errors
        assert errors is not None
        assert errors[0] == 0
        scores.append(
            [
                (got - want) / error
                for got, want, error in zip(path.lengths, exact(source), errors, strict=True)
                if error
            ]
        )
    standard = np.array(scores)
    assert standard.shape == (runs, len(STEPS) - 1)
    assert np.all(np.abs(standard.mean(axis=0)) < 4 / math.sqrt(runs))
    assert np.all((standard.std(axis=0) > 0.5) & (standard.std(axis=0) < 1.5))


def test_sampled_tensors_are_read_in_part_and_small_ones_whole(tmp_path: Path) -> None:
    run = ckavg.open_run(uneven_run(tmp_path, 0))
    path = ckavg.path_length(run, sample=0.02)
    whole = sum(entry.nbytes for point in run.checkpoints for entry in point.entries.values())
    assert path.bytes_read < 0.03 * whole
    measured = ckavg.path_length(run)
    assert path.tensors["small"].distances == pytest.approx(measured.tensors["small"].distances, rel=1e-7)
    assert path.tensors["small"].sigma == pytest.approx(measured.tensors["small"].sigma, rel=1e-12)
    assert set(path.tensors["small"].variances) == {0.0}
    assert path.without_spread == measured.without_spread == ("norm",)
    assert path.parameters_counted == measured.parameters_counted


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
def test_a_sample_of_all_is_the_exact_path(tmp_path: Path, dtype: torch.dtype) -> None:
    """Half of a tensor or more is read as the whole; 0.999 of each tensor is all of it."""
    source = write_run(tmp_path, random_run(3, len(STEPS), dtype), STEPS)
    path = ckavg.path_length(ckavg.open_run(source), sample=0.999)
    assert path.lengths == pytest.approx(exact(source), rel=1e-7)
    assert path.standard_errors == (0.0,) * len(STEPS)


def test_the_same_sample_every_time(tmp_path: Path) -> None:
    run = ckavg.open_run(uneven_run(tmp_path, 1))
    first, second = (ckavg.path_length(run, sample=0.05) for _ in range(2))
    assert first.tensors == second.tensors


def test_errors_shrink_with_the_sample(tmp_path: Path) -> None:
    run = ckavg.open_run(uneven_run(tmp_path, 2))
    ends = []
    for fraction in (0.01, 0.1, 0.4):
        errors = ckavg.path_length(run, sample=fraction).standard_errors
        assert errors is not None
        ends.append(errors[-1])
    assert ends[0] > ends[1] > 2 * ends[2] > 0


def test_nan_in_the_sample_is_refused(tmp_path: Path) -> None:
    weights = random_run(0, 3, torch.float32)
    weights[1]["tiles"][:] = float("nan")
    run = ckavg.open_run(write_run(tmp_path, weights, (0, 1, 2)))
    with pytest.raises(NonFiniteError, match="step 1: tensor 'tiles' holds NaN"):
        ckavg.path_length(run, sample=0.01)


def test_differences_that_overflow_float32_are_summed_in_float64(tmp_path: Path) -> None:
    weights = [{"w": torch.full((100_000,), sign * 3e38) * torch.linspace(0.5, 1, 100_000)} for sign in (1.0, -1.0)]
    run = ckavg.open_run(write_run(tmp_path, weights, (0, 1)))
    path = ckavg.path_length(run, sample=0.1)
    assert path.lengths[1] == pytest.approx(ckavg.path_length(run).lengths[1], rel=0.05)


@pytest.mark.parametrize("fraction", [0.0, -0.1, 1.5, float("nan")])
def test_what_is_no_fraction_is_refused(tmp_path: Path, fraction: float) -> None:
    source = write_run(tmp_path, random_run(0, 2, torch.float32), (0, 1))
    with pytest.raises(SettingError, match="it must be a fraction in"):
        ckavg.path_length(ckavg.open_run(source), sample=fraction)
    result = run_cli("bema", source, "--sample", str(fraction))
    assert (result.exit_code, (source / "averaged").exists()) == (2, False)


def test_a_result_says_that_its_path_was_sampled(tmp_path: Path) -> None:
    source = uneven_run(tmp_path, 5)
    shown = run_cli("pema", source, "--sample", "0.02").stdout
    assert "from a sample of 2 %" in shown
    result = source / "averaged" / "pema-gamma0.15"
    assert "estimated from 2 % of each tensor, standard error 0.0" in (result / "README.md").read_text()
    assert "ckavg pema --gamma 0.15 --sample 0.02" in (result / "README.md").read_text()
    exactly = ckavg.average(ckavg.open_run(source), ckavg.PEMA(), out=tmp_path / "exact")
    sampled = ckavg.average(ckavg.open_run(source), ckavg.PEMA(), out=tmp_path / "sampled", sample=0.02)
    assert (exactly.sample, exactly.path_length_error, sampled.sample) == (1.0, None, 1.0)  # known by then


@given(
    sizes=st.lists(st.one_of(st.integers(1, 10**5), st.integers(1, 10**10)), min_size=1, max_size=5),
    fraction=st.floats(1e-6, 1, exclude_max=True),
)
def test_strips(sizes: list[int], fraction: float) -> None:
    """Strips are in order, disjoint, inside the tensor, of the requested size, and their weights cover it."""
    named = {str(place): numel for place, numel in enumerate(sizes)}
    fraction = min(fraction, 10**8 / sum(sizes))
    chosen = choose_samples(named, fraction)
    assert chosen == choose_samples(named, fraction)
    sampled = [each for each in chosen.values() if each.fraction < 1]
    assert len({each.length for each in sampled}) <= 1
    assert sum(len(each.starts) for each in sampled) <= max(2 * 65_536, 2 * fraction * sum(sizes) / CHUNK) + 8 * 5
    for name, numel in named.items():
        strips = chosen[name]
        assert math.fsum(strips.weights) == pytest.approx(numel)
        if strips.fraction == 1:
            assert strips.starts == (0,)
            assert strips.length == numel
            continue
        assert all(before + strips.length <= after for before, after in itertools.pairwise(strips.starts))
        assert strips.starts[0] >= 0
        assert strips.starts[-1] + strips.length <= numel
        assert strips.length <= CHUNK
        assert len(strips.starts) >= 8
        assert fraction * numel <= strips.elements <= fraction * numel + 8 * strips.length


def test_every_element_of_the_strips_is_read_once() -> None:
    entries = {
        "sampled": TensorInfo("F32", (5_000, 4_000), 0, 100),
        "whole": TensorInfo("F32", (3,), 0, 8),
        "half": TensorInfo("F32", (700_000,), 0, 20),
    }
    samples = choose_samples({"sampled": 20_000_000, "whole": 3}, 0.2) | choose_samples({"half": 700_000}, 0.6)
    units = cut_samples(entries, samples)
    assert [name for name, _ in itertools.groupby(unit.name for unit in units)] == ["whole", "half", "sampled"]
    assert all(unit.size <= TILE for unit in units)
    starts = [start for unit in units if unit.name == "sampled" for start in unit.starts]
    assert tuple(starts) == samples["sampled"].starts
    ranges = [each for unit in units if unit.name == "half" for each in unit.ranges]
    assert ranges == [(0, 262144), (262144, 524288), (524288, 700_000)]
