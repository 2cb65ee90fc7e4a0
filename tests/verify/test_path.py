"""`--replay` measures the path again, and does not take what was kept or recorded of it for true."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal

import pytest
import torch

import ckavg
from ckavg.averaging.rules import effective_weights
from ckavg.checkpoints.fingerprints import fingerprint_run
from ckavg.path.cache import save_path
from ckavg.path.table import TensorPaths
from ckavg.verify import replay
from tests.runs import random_run, write_run

STEPS = (0, 10, 20, 30)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return write_run(tmp_path / "run", random_run(2, len(STEPS), torch.float32), STEPS)


def problems(directory: Path) -> tuple[str, ...]:
    return ckavg.verify_result(directory, replay=True, seed=0).problems


@pytest.mark.parametrize("scope", ["global", "tensor"])
@pytest.mark.parametrize("whole", [1 << 30, 0])
def test_an_edited_path_that_the_average_was_formed_with(
    source: Path, monkeypatch: pytest.MonkeyPatch, scope: Literal["global", "tensor"], whole: int
) -> None:
    """It was in the table of what was measured before, and everything follows from it."""
    honest = ckavg.path_length(ckavg.open_run(source))
    run = ckavg.open_run(source)
    monkeypatch.setattr(replay, "_READ_WHOLE", whole)
    assert problems(ckavg.average(run, ckavg.PEMA(scope=scope), out=source / "sound").directory) == ()
    edited = {
        name: type(tensor)(tensor.numel, tensor.sigma, tuple(3 * each for each in tensor.distances))
        for name, tensor in honest.tensors.items()
    }
    (source / "averaged/path.json").unlink()
    longer = type(honest)(honest.steps, TensorPaths.of(edited), honest.zero_sigma, 1)
    save_path(run, longer, fingerprint_run(run))
    done = ckavg.average(run, ckavg.PEMA(scope=scope), out=source / "edited")
    assert done.path_length == longer.lengths
    assert ckavg.verify_result(done.directory).problems == ()
    first = problems(done.directory)[0]
    assert first.startswith(f"path_length is {longer.lengths[1]} at step 10; the path of the sources is ")


@pytest.mark.parametrize("place", [1, 2, 3])
def test_a_record_whose_path_is_not_that_of_the_sources(source: Path, place: int) -> None:
    """β, and the weights, are made to follow from it."""
    result = ckavg.average(ckavg.open_run(source), ckavg.PEMA()).directory
    record = json.loads((result / "ckavg.json").read_bytes())
    lengths = list(record["path_length"])
    lengths[place] = lengths[place - 1] + 0.999 * (lengths[place] - lengths[place - 1])
    coefficients = ckavg.PEMA().coefficients(ckavg.schemes.Timeline(STEPS, tuple(lengths)))
    record |= {"path_length": lengths, "betas": coefficients.betas, "weights": effective_weights(coefficients)}
    record |= dict.fromkeys(("effective_count", "mean_age", "anchor_weight"))
    (result / "ckavg.json").write_text(json.dumps(record))
    assert ckavg.verify_result(result).problems == ()
    wrong = f"path_length is {lengths[place]} at step {STEPS[place]}"
    assert any(each.startswith(wrong) for each in problems(result))


@pytest.mark.parametrize("options", [{"sample": 0.2}, {"zero_sigma": "eps"}, {"path_exclude": ["t*"]}], ids=str)
@pytest.mark.parametrize("whole", [1 << 30, 0])
def test_a_path_that_is_right(
    source: Path, monkeypatch: pytest.MonkeyPatch, options: dict[str, Any], whole: int
) -> None:
    monkeypatch.setattr(replay, "_READ_WHOLE", whole)
    for scope in ("global", "tensor"):
        done = ckavg.average(ckavg.open_run(source), ckavg.PEMA(scope=scope), out=source / scope, **options)
        assert problems(done.directory) == ()
