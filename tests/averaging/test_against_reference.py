"""Random runs, every shape and dtype: the written result equals a whole-tensor float64 computation rounded once."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import ckavg
from ckavg.errors import NonFiniteError
from ckavg.schemes import Scheme
from tests import reference
from tests.exhaustive import thinned
from tests.reference import Array, Arrays
from tests.runs import random_run, write_run

STEPS = (0, 7, 50, 51, 200, 1000)
Reference = Callable[[Sequence[Arrays], Sequence[int]], dict[str, Array]]


def _author(run: Sequence[Arrays], steps: Sequence[int], *, burn_in: int) -> dict[str, Array]:
    """The schedule of the authors' offline code, with the defaults of the paper."""
    ages = [step - burn_in + 10 for step in steps[1:]]
    average = reference.weighted(run, [(1 + age) ** -0.5 for age in ages])
    return {name: average[name] + (1 + ages[-1]) ** -0.2 * (run[-1][name] - run[0][name]) for name in average}


def _combined(run: Sequence[Arrays], weights: Sequence[float]) -> dict[str, Array]:
    return {name: sum(w * each[name] for w, each in zip(weights, run, strict=True)) for name in run[0]}  # type: ignore[misc]


def _decayed(run: Sequence[Arrays], decay: Callable[[float], float]) -> dict[str, Array]:
    """Where training would have arrived, had the learning rate followed the decay: θ_0 + Σ_j w_j (θ_j − θ_{j−1})."""
    arrived = dict(run[0])
    for place in range(1, len(run)):
        rate = decay(place / len(run))
        arrived = {name: arrived[name] + rate * (run[place][name] - run[place - 1][name]) for name in arrived}
    return arrived


SCHEMES: Mapping[str, tuple[Scheme, Reference]] = {
    "pema": (ckavg.PEMA(), reference.pema),
    "pema-strong": (ckavg.PEMA(gamma=0.6), lambda run, steps: reference.pema(run, steps, 0.6)),
    "ema": (ckavg.EMA(), reference.ema),
    "ema-tau": (ckavg.EMA(gamma=0.7, tau=20.0), lambda run, steps: reference.ema(run, steps, 0.7, 20.0)),
    "ema-last": (ckavg.EMA(gamma=0.0), lambda run, steps: dict(run[-1])),
    "bema": (ckavg.BEMA(), reference.bema),
    "bema-burn-in": (ckavg.BEMA(burn_in=40), lambda run, steps: reference.bema(run, steps, burn_in=40)),
    "bema-all": (
        ckavg.BEMA(eta=0.4, kappa=0.3, multiplier=2.0, lag=3.0, burn_in=7),
        lambda run, steps: reference.bema(run, steps, eta=0.4, kappa=0.3, multiplier=2.0, lag=3.0, burn_in=7),
    ),
    "bema-author": (
        ckavg.BEMA(form="author", burn_in=7),
        lambda run, steps: _author(run[1:], steps[1:], burn_in=7),
    ),
    "bema-uncorrected": (
        ckavg.BEMA(eta=math.inf),
        lambda run, steps: reference.weighted(run, [(10 + step) ** -0.5 for step in steps[1:]]),
    ),
    "ouema": (ckavg.OUEMA(), reference.ouema),
    "ouema-weak": (ckavg.OUEMA(eta=0.8, kappa=0.3), lambda run, steps: reference.ouema(run, steps, 0.8, 0.3)),
    "dema": (ckavg.DEMA(), reference.dema),
    "dema-quick": (ckavg.DEMA(kappa=0.2), lambda run, steps: reference.dema(run, steps, 0.2)),
    "momentum": (
        ckavg.MomentumEMA(momentum=0.99, batch_scale=2.0),
        lambda run, steps: reference.momentum(run, steps, 0.99, 2.0, per_step=True),
    ),
    "momentum-per-update": (
        ckavg.MomentumEMA(momentum=0.8, momentum_per="update"),
        lambda run, steps: reference.momentum(run, steps, 0.8, 1.0, per_step=False),
    ),
    "pema-tensor": (
        ckavg.PEMA(scope="tensor", gamma=0.4),
        lambda run, steps: reference.pema_by_tensor(run, steps, 0.4),
    ),
    "mean": (ckavg.Mean(), lambda run, steps: reference.mean(run)),
    "mean-linear": (ckavg.Mean(decay="linear"), lambda run, steps: _decayed(run, lambda x: 1 - x)),
    "mean-cosine": (
        ckavg.Mean(decay="cosine"),
        lambda run, steps: _decayed(run, lambda x: math.cos(math.pi * x / 2) ** 2),
    ),
    "mean-minus-sqrt": (ckavg.Mean(decay="minus-sqrt"), lambda run, steps: _decayed(run, lambda x: 1 - x**0.5)),
    "power": (
        ckavg.PowerExponentEMA(exponent=2.5),
        lambda run, steps: _combined(run, [(b**3.5 - a**3.5) / 1000**3.5 for a, b in itertools.pairwise((0, *steps))]),
    ),
    "weights": (
        ckavg.Weights(weights=[3, 0, 1, 2, 2, 2], normalize=True),
        lambda run, steps: _combined(run, [0.3, 0, 0.1, 0.2, 0.2, 0.2]),
    ),
    "weights-negative": (
        ckavg.Weights(weights={7: 1.5, 50: -0.75, 200: -1, 1000: 1.25}),
        lambda run, steps: _combined(run, [0, 1.5, -0.75, 0, -1, 1.25]),
    ),
    "last": (ckavg.Last(), lambda run, steps: dict(run[-1])),
    "bema-unaveraged": (ckavg.BEMA(kappa=0.0, eta=0.0), lambda run, steps: reference.bema(run, steps, kappa=0, eta=0)),
}
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


@pytest.mark.parametrize(("name", "dtype"), thinned(SCHEMES, DTYPES, every=2))
def test_result_is_the_reference_rounded_once(tmp_path: Path, name: str, dtype: torch.dtype) -> None:
    scheme, expected = SCHEMES[name]
    weights = random_run(seed=len(name), count=len(STEPS), dtype=dtype)
    source = write_run(tmp_path / "run", weights, STEPS, shards=(3, 1, 2))
    checkpoints = [reference.load_floats(source / f"checkpoint-{step}") for step in STEPS]

    result = ckavg.average(ckavg.open_run(source), scheme, out=tmp_path / "out")

    accumulated = torch.float64 if dtype == torch.float64 else torch.float32
    want = expected(checkpoints, STEPS)
    got = reference.load_floats(result.directory)
    reference.assert_rounded_once(got, want, checkpoints, dtype, accumulated=accumulated)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_accumulating_in_float64_is_rounded_exactly_once(tmp_path: Path, dtype: torch.dtype) -> None:
    weights = random_run(seed=1, count=len(STEPS), dtype=dtype)
    source = write_run(tmp_path / "run", weights, STEPS)
    checkpoints = [reference.load_floats(source / f"checkpoint-{step}") for step in STEPS]
    result = ckavg.average(ckavg.open_run(source), ckavg.BEMA(), out=tmp_path / "out", accumulate="float64")
    got = reference.load_floats(result.directory)
    reference.assert_rounded_once(
        got, reference.bema(checkpoints, STEPS), checkpoints, dtype, accumulated=torch.float64
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_path_length_is_the_reference(tmp_path: Path, dtype: torch.dtype) -> None:
    weights = random_run(seed=2, count=len(STEPS), dtype=dtype)
    source = write_run(tmp_path / "run", weights, STEPS, shards=(1, 2, 3))
    checkpoints = [reference.load_floats(source / f"checkpoint-{step}") for step in STEPS]
    lengths, without_spread, counted = reference.path_length(checkpoints)

    path = ckavg.path_length(ckavg.open_run(source))

    assert path.lengths == pytest.approx(lengths, rel=1e-14 if dtype == torch.float64 else 1e-8)
    assert list(path.without_spread) == without_spread == ["norm", "scalar", "single"]
    assert path.parameters_counted == counted


@pytest.mark.parametrize("output", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_output_dtype_is_as_asked(tmp_path: Path, output: torch.dtype) -> None:
    weights = random_run(seed=3, count=len(STEPS), dtype=torch.float32)
    source = write_run(tmp_path / "run", weights, STEPS)
    checkpoints = [reference.load_floats(source / f"checkpoint-{step}") for step in STEPS]
    result = ckavg.average(
        ckavg.open_run(source), ckavg.EMA(), out=tmp_path / "out", dtype=str(output).removeprefix("torch.")
    )
    stored = load_file(result.directory / "model.safetensors")
    assert {tensor.dtype for tensor in stored.values() if tensor.is_floating_point()} == {output}
    got = reference.load_floats(result.directory)
    reference.assert_rounded_once(
        got, reference.ema(checkpoints, STEPS), checkpoints, output, accumulated=torch.float32
    )


def test_what_is_not_floating_comes_from_the_last_checkpoint(tmp_path: Path) -> None:
    weights = random_run(seed=4, count=3, dtype=torch.bfloat16)
    source = write_run(tmp_path / "run", weights, (0, 1, 2), shards=(2,))
    result = ckavg.average(ckavg.open_run(source), ckavg.EMA(), out=tmp_path / "out")
    stored: dict[str, torch.Tensor] = {}
    for file in result.directory.glob("*.safetensors"):
        stored |= load_file(file)
    assert stored.keys() == weights[-1].keys()
    assert torch.equal(stored["position_ids"], weights[-1]["position_ids"])
    assert torch.equal(stored["mask"], weights[-1]["mask"])


def test_init_of_another_dtype_is_the_anchor(tmp_path: Path) -> None:
    weights = random_run(seed=5, count=3, dtype=torch.float32)
    base = {name: t.bfloat16() if t.is_floating_point() else t for name, t in weights[0].items()}
    write_run(tmp_path / "base", [base], (0,))
    source = write_run(tmp_path / "run", weights[1:], (10, 20))
    run = ckavg.open_run(source, init=tmp_path / "base" / "checkpoint-0")
    assert run.steps == (0, 10, 20)
    checkpoints = [reference.load_floats(Path(checkpoint.path)) for checkpoint in run.checkpoints]
    result = ckavg.average(run, ckavg.PEMA(), out=tmp_path / "out")
    want = reference.pema(checkpoints, (0, 10, 20))
    got = reference.load_floats(result.directory)
    reference.assert_rounded_once(got, want, checkpoints, torch.float32, accumulated=torch.float32)


@pytest.mark.parametrize("scheme", [ckavg.EMA(gamma=0.0), ckavg.BEMA(kappa=0.0)], ids=["ema", "bema"])
def test_nan_is_refused_even_where_the_scheme_forgets_it(tmp_path: Path, scheme: Scheme) -> None:
    weights = [{"w": torch.tensor([1.0, 2.0])} for _ in range(4)]
    weights[1]["w"][0] = float("nan")
    run = ckavg.open_run(write_run(tmp_path, weights, range(4)))
    with pytest.raises(NonFiniteError, match="step 1: tensor 'w' holds NaN"):
        ckavg.average(run, scheme)


def test_an_average_that_overflows_while_it_is_formed(tmp_path: Path) -> None:
    weights = [{"w": torch.tensor([sign * 3e38])} for sign in (1.0, -1.0)]
    run = ckavg.open_run(write_run(tmp_path, weights, (0, 1)))
    result = ckavg.average(run, ckavg.EMA())
    want = 3e38 - 2 * 3e38 * 2**-0.15
    assert float(reference.load_floats(result.directory)["w"][0]) == pytest.approx(want, rel=1e-7)
    with pytest.raises(NonFiniteError, match="does not fit F32"):
        ckavg.average(run, ckavg.OUEMA(kappa=0.0))
