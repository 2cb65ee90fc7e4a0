"""`--replay` notices whatever is wrong by more than roundings can make it, at any scale, and nothing else."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import ckavg
from ckavg.schemes import Scheme
from ckavg.verify.arithmetic import unit
from tests import reference
from tests.runs import write_run
from tests.verify.honest import false_alarms

STEPS = (0, 100, 200, 300, 400)
SCALES = {
    torch.float64: (1e-30, 1e-7, 1.0, 1e30),
    torch.float32: (1e-30, 1e-7, 1.0, 1e30),
    torch.bfloat16: (1e-30, 1e-7, 1.0, 1e30),
    torch.float16: (1e-4, 1.0, 1e3),
}
OTHER: dict[Scheme, Scheme] = {
    ckavg.EMA(gamma=0.15): ckavg.EMA(gamma=0.165),
    ckavg.PEMA(gamma=0.15): ckavg.PEMA(gamma=0.165),
    ckavg.BEMA(kappa=0.5): ckavg.BEMA(kappa=0.55),
    ckavg.OUEMA(kappa=0.5): ckavg.OUEMA(kappa=0.55),
    ckavg.DEMA(kappa=0.5): ckavg.DEMA(kappa=0.55),
    ckavg.Weights(weights=(1.5, 0, -2, 1, 0.5)): ckavg.Weights(weights=(1.5, 0, -2, 1.05, 0.45)),
    ckavg.EMA(gamma=0.001): ckavg.EMA(gamma=0.0011),
}
CASES = [(scheme, dtype, scale) for scheme in OTHER for dtype in SCALES for scale in SCALES[dtype]]


def noticed(directory: Path, weights: Mapping[str, Tensor]) -> bool:
    """Whether the replay, without its checksums, tells these weights from those of the result."""
    path = directory / "model.safetensors"
    sound = path.read_bytes()
    save_file(dict(weights), path, {"format": "pt"})
    found = ckavg.verify_result(directory, replay=True, elements=10**6, seed=1).findings
    path.write_bytes(sound)
    return any(each.check == "replay" for each in found)


def is_beyond_rounding(sound: Mapping[str, Tensor], other: Mapping[str, Tensor], terms: reference.Arrays) -> bool:
    """Whether two right results could not be so far apart anywhere: by two units, and those of all terms."""
    code = {torch.float64: "F64", torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}
    for name, tensor in sound.items():
        one, two = tensor.double().numpy(), other[name].double().numpy()
        accumulated = "F64" if tensor.dtype == torch.float64 else "F32"
        largest = np.maximum(np.abs(one), np.abs(two))
        allowed = 2 * unit(largest, code[tensor.dtype]) + 24 * unit(terms[name], accumulated)
        if np.any(np.abs(one - two) > allowed):
            return True
    return False


@pytest.mark.parametrize(("scheme", "dtype", "scale"), CASES, ids=str)
def test_what_exceeds_rounding_is_noticed(tmp_path: Path, scheme: Scheme, dtype: torch.dtype, scale: float) -> None:
    generator = torch.Generator().manual_seed(4)
    walk = torch.randn(len(STEPS), 300, generator=generator, dtype=torch.float64).cumsum(0)
    checkpoints = [{"w": (scale * row).to(dtype), "v": (scale * (2 + row[:40])).to(dtype)} for row in walk]
    run = ckavg.open_run(write_run(tmp_path / "run", checkpoints, STEPS))
    done = ckavg.average(run, scheme, out=tmp_path / "out")
    sound = load_file(done.directory / "model.safetensors")
    assert not noticed(done.directory, sound)
    of_other = load_file(ckavg.average(run, OTHER[scheme], out=tmp_path / "other").directory / "model.safetensors")
    theta = {name: torch.stack([each[name] for each in checkpoints]).double() for name in sound}
    terms = {name: each.abs().amax(0).numpy() for name, each in theta.items()}
    place = int(np.argmax(np.abs(done.weights)))
    weights = torch.tensor(done.weights, dtype=torch.float64)
    weights[place] *= 1.03
    wrong = {
        "γ by 10 %": of_other,
        "a weight by 3 %": {name: torch.tensordot(weights, each, dims=1).to(dtype) for name, each in theta.items()},
        "zeros": sound | {"v": torch.zeros_like(sound["v"])},
        "the last checkpoint": checkpoints[-1],
    }
    for what, other in wrong.items():
        exceeds = is_beyond_rounding(sound, other, terms)
        assert exceeds or what in ("γ by 10 %", "the last checkpoint")
        assert noticed(done.directory, other) or not exceeds, what


def test_values_near_the_unit_that_0_was_taken_to_have(tmp_path: Path) -> None:
    """What was said to be 0 or more, or 16 million units of the last place less, is not the average."""
    checkpoints = [{"w": torch.tensor([1e-7, -3e-8, 2e-7]) * (1 + step)} for step in range(3)]
    done = ckavg.average(ckavg.open_run(write_run(tmp_path / "run", checkpoints, (0, 1, 2))), ckavg.EMA())
    sound = load_file(done.directory / "model.safetensors")
    assert noticed(done.directory, {"w": torch.zeros(3)})
    assert noticed(done.directory, {"w": sound["w"] * (1 + 2.0**-18)})


def test_no_false_alarm(tmp_path: Path) -> None:
    """The experiment of `python -m tests.verify.honest`, in small."""
    assert false_alarms(60, 1, tmp_path) == []
