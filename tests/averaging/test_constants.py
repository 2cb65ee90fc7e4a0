"""What is equal in all checkpoints, bit for bit, stays so in the result: any dtype, infinities, −0."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import ckavg
from ckavg.engine.context import Context
from ckavg.errors import NonFiniteError, UnsupportedFormatError
from ckavg.path.measure import measure
from ckavg.schemes import Last, Scheme
from tests.cli.runner import run_cli
from tests.exhaustive import thinned
from tests.runs import write_run

STEPS = (0, 10, 20, 30)
AVERAGES: list[Scheme] = [
    ckavg.EMA(),
    ckavg.EMA(gamma=0.0),
    ckavg.PEMA(),
    ckavg.PEMA(scope="tensor"),
    ckavg.BEMA(burn_in=10),
    ckavg.OUEMA(),
    ckavg.DEMA(),
    ckavg.Mean(),
    ckavg.Weights(weights=(0.25, 0.0, 1.25, -0.5)),
    Last(),
]
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


def bits(tensor: Tensor) -> Tensor:
    return tensor.contiguous().view(-1).view(torch.uint8)


def constants(dtype: torch.dtype) -> dict[str, Tensor]:
    mask = torch.full((40, 40), -torch.inf).triu(1).to(dtype)
    spread = torch.linspace(-1, 1, 20_000).to(dtype)
    spread[[0, 7, 19_999]] = torch.tensor([-torch.inf, torch.inf, -torch.inf]).to(dtype)
    return {
        "mask": mask,
        "spread": spread,
        "none": torch.full((3,), -torch.inf).to(dtype),
        "zeros": torch.tensor([-0.0, 0.0, -0.0]).to(dtype),
        "freqs_cis": torch.polar(torch.ones(64, 32), torch.arange(2048.0).view(64, 32)),
        "f8.table": torch.linspace(-1, 1, 50).to(torch.float8_e4m3fn),
    }


def run_of(dtype: torch.dtype) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    bias = torch.randn(len(STEPS), 30_000, generator=generator)
    bias[:, 20_000:] = -torch.inf  # a padded vocabulary
    bias[:, 5] = -0.0
    return [{"head.bias": row.to(dtype), **constants(dtype)} for row in bias]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_they_stay_what_they_are(tmp_path: Path, dtype: torch.dtype) -> None:
    checkpoints = run_of(dtype)
    run = ckavg.open_run(write_run(tmp_path / "run", checkpoints, STEPS))
    for number, scheme in enumerate(AVERAGES):
        done = ckavg.average(run, scheme, out=tmp_path / str(number))
        result = load_file(done.directory / "model.safetensors")
        for name, tensor in constants(dtype).items():
            assert torch.equal(bits(result[name]), bits(tensor)), f"{name} of {scheme.label}"
        assert done.infinite == ("head.bias", "mask", "none", "spread")
        own = result["head.bias"]
        assert (own[20_000:] == -torch.inf).all()
        assert torch.isfinite(own[:20_000]).all()
        assert own[5] == 0
        assert torch.signbit(own[5])
        assert ckavg.verify_result(done.directory, replay=True, sources=True).problems == ()


@pytest.mark.parametrize(("sample", "dtype"), thinned([1.0, 0.2], DTYPES, every=2))
def test_the_path_is_that_of_the_rest(tmp_path: Path, dtype: torch.dtype, sample: float) -> None:
    checkpoints = run_of(dtype)
    path = ckavg.path_length(ckavg.open_run(write_run(tmp_path / "run", checkpoints, STEPS)), sample=sample)
    assert path.without_spread == ("mask", "none", "zeros")
    assert path.not_finite == ()
    finite = [each["head.bias"][:20_000].double() for each in checkpoints]
    loose = 1e-6 if sample == 1 else 0.3
    assert path.tensors["head.bias"].sigma == pytest.approx(float(finite[0].std()), rel=loose)
    for got, before, after in zip(path.tensors["head.bias"].distances, finite, finite[1:], strict=False):
        assert got == pytest.approx(float((after - before).abs().sum()), rel=loose)
    spread = constants(dtype)["spread"].double()
    assert path.tensors["spread"].sigma == pytest.approx(float(spread[spread.isfinite()].std()), rel=loose)
    assert not any(path.tensors["spread"].distances)


def test_the_compiled_kernel_and_the_path_of_a_run_that_grew(tmp_path: Path) -> None:
    checkpoints = run_of(torch.float32)
    source = write_run(tmp_path / "run", checkpoints, STEPS)
    first = ckavg.path_length(ckavg.open_run(source, to_step=20))
    grown = ckavg.path_length(ckavg.open_run(source))
    assert grown.tensors["head.bias"].distances[:2] == first.tensors["head.bias"].distances
    context = Context(compiled_from_bytes=0)
    assert measure(ckavg.open_run(source), context=context).lengths == pytest.approx(grown.lengths, rel=1e-6)


@pytest.mark.parametrize(("verb", "place"), thinned(["ema", "pema", "bema", "mean"], [0, 1, 3]))
def test_an_infinity_that_others_lack_is_an_error(tmp_path: Path, verb: str, place: int) -> None:
    checkpoints = run_of(torch.float32)
    checkpoints[place]["mask"][3, 2] = -torch.inf
    refused = run_cli(verb, write_run(tmp_path / "run", checkpoints, STEPS))
    assert refused.exit_code == 1
    assert f"step {STEPS[place]}: tensor 'mask' holds NaN or infinity (1 of elements 0 to 1600)" in refused.stderr


def test_another_infinity_is_an_error(tmp_path: Path) -> None:
    checkpoints = run_of(torch.float32)
    checkpoints[2]["mask"][0, 3] = torch.inf
    run = ckavg.open_run(write_run(tmp_path / "run", checkpoints, STEPS))
    for scheme in (ckavg.PEMA(), ckavg.Mean()):
        with pytest.raises(NonFiniteError, match=r"tensor 'mask' holds NaN or infinity \(1 of"):
            ckavg.average(run, scheme)


def test_nan_is_no_constant(tmp_path: Path) -> None:
    """A run that diverged before its first checkpoint has the same NaN in all of them."""
    source = write_run(tmp_path / "run", [{"w": torch.tensor([1.0 + k, torch.nan])} for k in range(4)], STEPS)
    assert run_cli("mean", source).exit_code == 1
    assert run_cli("mean", source, "--allow-nonfinite").exit_code == 0


@pytest.mark.parametrize(("name", "at"), thinned(["freqs_cis", "f8.table"], [0, -1], every=2))
def test_what_cannot_be_averaged_is_compared_in_full(tmp_path: Path, name: str, at: int) -> None:
    """The difference is beyond the bytes that opening a run compares; no result is left behind."""
    checkpoints = run_of(torch.float32)
    big = checkpoints[1][name].repeat(*[600] + [1] * (checkpoints[1][name].dim() - 1))
    for each in checkpoints:
        each[name] = big.clone()
    checkpoints[1][name].view(torch.uint8)[at] ^= 1
    source = write_run(tmp_path / "run", checkpoints, STEPS)
    with pytest.raises(UnsupportedFormatError, match=f"'{name}' .* differs between step 10 and step 30"):
        ckavg.average(ckavg.open_run(source), ckavg.Mean())
    assert not (source / "averaged").exists()


def test_negative_zeros_of_some_checkpoints_are_zeros(tmp_path: Path) -> None:
    values = [torch.tensor([-0.0, 0.0, -0.0, 1.0]), torch.tensor([0.0, -0.0, -0.0, 1.0])]
    run = ckavg.open_run(write_run(tmp_path / "run", [{"w": values[k % 2]} for k in range(4)], STEPS))
    for scheme in AVERAGES[:-1]:
        if scheme != ckavg.EMA(gamma=0.0):
            result = load_file(ckavg.average(run, scheme, force=True).directory / "model.safetensors")["w"]
            assert torch.equal(result, torch.tensor([0.0, 0.0, 0.0, 1.0]))
            assert torch.signbit(result)[2]


def test_a_sweep_gives_the_same(tmp_path: Path) -> None:
    checkpoints = run_of(torch.float32)
    checkpoints[0]["late"] = torch.tensor([5.0, -0.0])
    for each in checkpoints[1:]:
        each["late"] = torch.tensor([-0.0, -0.0])
    source = write_run(tmp_path / "run", checkpoints, STEPS)
    run_cli("sweep", source, "mean", "bema:burn-in=10")
    alone = ckavg.average(ckavg.open_run(source), ckavg.BEMA(burn_in=10), out=tmp_path / "alone")
    swept = next((source / "averaged").glob("bema*"))
    assert (swept / "model.safetensors").read_bytes() == (alone.directory / "model.safetensors").read_bytes()


def test_inspect_deep_has_no_problem_with_masks(tmp_path: Path) -> None:
    checkpoints = run_of(torch.bfloat16)
    source = write_run(tmp_path / "run", checkpoints, STEPS)
    done = run_cli("inspect", source, "--deep", "--json")
    assert done.exit_code == 0, done.stdout
    health = json.loads(done.stdout)["health"]
    assert not [each for each in health["findings"] if each["kind"] == "nonfinite"]
    checkpoints[2]["mask"][3, 2] = -torch.inf
    other = run_cli("inspect", write_run(tmp_path / "other", checkpoints, STEPS), "--deep")
    assert other.exit_code == 1
    assert "holds 1 infinite of 1,600" in other.stdout + other.stderr


def test_verify_tells_infinities_that_no_record_names(tmp_path: Path) -> None:
    done = ckavg.average(ckavg.open_run(write_run(tmp_path / "run", run_of(torch.float32), STEPS)), ckavg.Mean())
    path = done.directory / "model.safetensors"
    weights = load_file(path)
    weights["zeros"][1], weights["mask"][0, 0] = torch.inf, torch.nan
    save_file(weights, path, {"format": "pt"})
    problems = ckavg.verify_result(done.directory, replay=True).problems
    assert "tensor 'zeros' holds NaN or infinity: 1 of its elements." in problems
    assert "tensor 'mask' holds NaN or infinity: 1 of its elements." in problems
