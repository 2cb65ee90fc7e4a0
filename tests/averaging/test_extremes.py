"""Numbers near the limits of a dtype are measured and averaged like all others, compared with exact fractions."""

from __future__ import annotations

import itertools
import json
from fractions import Fraction
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

import ckavg
from ckavg.averaging.rules import effective_weights
from ckavg.engine.context import Context
from ckavg.errors import NonFiniteError
from ckavg.path.measure import measure
from ckavg.schemes import Scheme, Timeline
from tests.cli.runner import run_cli
from tests.exhaustive import thinned
from tests.runs import write_run

STEPS = (0, 10, 20, 30)
SCHEMES: list[Scheme] = [
    ckavg.EMA(),
    ckavg.PEMA(),
    ckavg.BEMA(),
    ckavg.BEMA(burn_in=10),
    ckavg.OUEMA(),
    ckavg.DEMA(),
    ckavg.Mean(),
]
LARGEST = {
    torch.float64: 1.797e308,
    torch.float32: 3.4e38,
    torch.bfloat16: 3.38e38,
    torch.float16: 65_000.0,
}


def walk(scale: float, dtype: torch.dtype, numel: int = 200) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(3)
    steps = torch.randn(len(STEPS), numel, generator=generator, dtype=torch.float64).cumsum(0)
    return [{"w": (row * scale).to(dtype)} for row in steps]


def exact_path(checkpoints: list[dict[str, Tensor]]) -> tuple[float, list[float]]:
    """σ and ℓ, in fractions as far as they go."""
    rows = [[Fraction(each) for each in row["w"].double().tolist()] for row in checkpoints]
    mean = sum(rows[0], Fraction(0)) / len(rows[0])
    variance = sum(((each - mean) * (each - mean) for each in rows[0]), Fraction(0)) / (len(rows[0]) - 1)
    scale = Fraction(2) ** (2 * round((float_exponent(variance)) / 2))
    sigma = Fraction(float(variance / scale) ** 0.5) * Fraction(2) ** (round(float_exponent(variance) / 2))
    lengths, length = [0.0], Fraction(0)
    for before, after in itertools.pairwise(rows):
        length += sum(abs(b - a) for a, b in zip(before, after, strict=True)) / sigma / len(rows[0])
        lengths.append(float(length))
    return float(sigma), lengths


def float_exponent(value: Fraction) -> int:
    return value.numerator.bit_length() - value.denominator.bit_length()


@pytest.mark.parametrize(
    ("scale", "sample"),
    thinned([1e-307, 1e-200, 1e-160, 1e-121, 1.0, 1e121, 1e155, 1e160, 1e200, 1e303], [1.0, 0.3], every=2),
)
def test_spreads(tmp_path: Path, scale: float, sample: float) -> None:
    checkpoints = walk(scale, torch.float64)
    path = ckavg.path_length(ckavg.open_run(write_run(tmp_path / "run", checkpoints, STEPS)), sample=sample)
    sigma, lengths = exact_path(checkpoints)
    precise = 1e-12 if sample == 1 else 0.3
    assert path.tensors["w"].sigma == pytest.approx(sigma, rel=precise, abs=0)
    assert path.lengths == pytest.approx(lengths, rel=precise)
    assert path.tensor_lengths("w") == pytest.approx(lengths, rel=precise)


def test_blocks_of_all_sizes(tmp_path: Path) -> None:
    """Each chunk has its own unit; the result does not depend on the tile."""
    scales = torch.tensor([1e-300, 1e-200, 1.0, 1e200, 1e290], dtype=torch.float64).repeat_interleave(16_384)
    checkpoints = [{"w": each["w"] * scales} for each in walk(1.0, torch.float64, len(scales))]
    run = ckavg.open_run(write_run(tmp_path / "run", checkpoints, STEPS))
    one, *others = (measure(run, context=Context(tile=tile, threads=2)) for tile in (1 << 14, 1 << 16, 1 << 18))
    assert all(each.tensors == one.tensors for each in others)
    anchor = checkpoints[0]["w"] * 2.0**-960
    assert one.tensors["w"].sigma == pytest.approx(float(anchor.std()) * 2.0**960, rel=1e-12)


def test_a_path_beyond_float64_is_one_error(tmp_path: Path) -> None:
    scalar = [
        {"s": torch.tensor(value, dtype=torch.float64), "w": torch.arange(9.0) * k}
        for k, value in enumerate((0.0, 1e308, -1e308, 1e308), start=1)
    ]
    source = write_run(tmp_path / "run", scalar, STEPS)
    for verb in ("pema", "path"):
        for more in (["--zero-sigma", "eps"], ["--zero-sigma", "eps", "--sample", "0.5"]):
            refused = run_cli(verb, source, *more)
            assert refused.exit_code == 1, refused.stderr
            assert "tensor 's': the path length is beyond float64" in refused.stderr
            assert "--path-exclude s" in refused.stderr
    assert run_cli("pema", source, "--zero-sigma", "eps", "--path-exclude", "s", "--json").exit_code == 0


def test_an_error_of_an_estimate_beyond_float64_is_one_error(tmp_path: Path) -> None:
    anchor = torch.randn(4000, dtype=torch.float64) * 1e-200
    run = [{"w": anchor}, *({"w": anchor + k * torch.randn(4000, dtype=torch.float64)} for k in (1, 2, 3))]
    refused = run_cli("path", write_run(tmp_path / "run", run, STEPS), "--sample", "0.1")
    assert refused.exit_code == 1
    assert "tensor 'w': the path length is beyond float64" in refused.stderr


def test_a_clock_beyond_float64_is_one_error() -> None:
    timeline = Timeline((0, 10, 20), (0.0, 1e150, 1e160), {"w": (0.0, 1.0, 2.0)})
    with pytest.raises(ckavg.CkavgError, match="beyond float64"):
        ckavg.PEMA(scope="tensor").coefficients(timeline)


@pytest.mark.parametrize("dtype", LARGEST, ids=str)
def test_averages_near_the_largest_number(tmp_path: Path, dtype: torch.dtype) -> None:
    """Differences of such numbers overflow; if the average does not, it is right."""
    largest = LARGEST[dtype]
    generator = torch.Generator().manual_seed(5)
    signs = torch.randn(len(STEPS), 60, generator=generator, dtype=torch.float64).sign()
    values = (signs * torch.linspace(0.01, 1, 60, dtype=torch.float64) * largest).to(dtype)
    source = write_run(
        tmp_path / "run", [{"w": row, "v": torch.arange(5.0) * k} for k, row in enumerate(values)], STEPS
    )
    run = ckavg.open_run(source)
    for number, scheme in enumerate(SCHEMES):
        timeline = Timeline(STEPS, ckavg.path_length(run, path_exclude=["w"]).lengths)
        weights = effective_weights(scheme.coefficients(timeline))
        exact = [
            sum(
                (Fraction(weight) * Fraction(value) for weight, value in zip(weights, column, strict=True)), Fraction(0)
            )
            for column in values.double().T.tolist()
        ]
        if any(abs(each) > Fraction(torch.finfo(dtype).max) for each in exact):
            with pytest.raises(NonFiniteError, match="a value of the average does not fit"):
                ckavg.average(run, scheme, out=tmp_path / str(number), path_exclude=["w"])
            continue
        done = ckavg.average(run, scheme, out=tmp_path / str(number), path_exclude=["w"])
        result = load_file(done.directory / "model.safetensors")["w"].double().tolist()
        for got, want in zip(result, exact, strict=True):
            assert abs(Fraction(got) - want) <= Fraction(4 * torch.finfo(dtype).eps) * Fraction(largest)
        assert ckavg.verify_result(done.directory, replay=True).problems == ()


def test_schemes_with_a_correction_where_it_fits(tmp_path: Path) -> None:
    """The difference in the correction is twice the largest number, but the result fits."""
    for dtype, largest in LARGEST.items():
        values = [torch.tensor([sign, 0.5 * sign], dtype=torch.float64) * largest for sign in (-1, 1, -1, 1)]
        run = ckavg.open_run(write_run(tmp_path / str(dtype), [{"w": each.to(dtype)} for each in values], STEPS))
        for scheme in (ckavg.BEMA(), ckavg.OUEMA(), ckavg.DEMA()):
            done = ckavg.average(run, scheme, snapshot_every=20)
            weights = effective_weights(scheme.coefficients(Timeline(STEPS)))
            want = sum(Fraction(w) * Fraction(v[0].to(dtype).item()) for w, v in zip(weights, values, strict=True))
            got = Fraction(load_file(done.directory / "model.safetensors")["w"][0].item())
            assert abs(got - want) <= Fraction(8 * torch.finfo(dtype).eps) * Fraction(largest)
            assert ckavg.verify_result(done.directory, replay=True).problems == ()


@pytest.mark.parametrize(("dtype", "scale"), thinned(LARGEST, ["tiny", "large"], every=2))
def test_inspect_deep(tmp_path: Path, dtype: torch.dtype, scale: str) -> None:
    size = (
        LARGEST[dtype] / (2000 if dtype == torch.float64 else 20)
        if scale == "large"
        else float(torch.finfo(dtype).tiny)
    )
    checkpoints = walk(size, dtype)
    done = run_cli("inspect", write_run(tmp_path / "run", checkpoints, STEPS), "--deep", "--json")
    assert done.exit_code == 0, done.stderr
    lengths = json.loads(done.stdout)["health"]["path"]
    want = exact_path(checkpoints)[1]
    assert lengths == pytest.approx([b - a for a, b in itertools.pairwise(want)], rel=1e-5)
