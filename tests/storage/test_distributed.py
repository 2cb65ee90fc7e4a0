"""A run of torch.distributed.checkpoint in an object store: the same bytes as from a disk, with few requests."""

from __future__ import annotations

import importlib
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import ckavg
from tests.storage.outcome import served_of, weights_of
from tests.storage.stores import Store

pytestmark = pytest.mark.filterwarnings("ignore")

STEPS = (10, 20, 30)


def model(step: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(step)
    return {f"layers.{number}": torch.randn(100, 700, generator=generator) for number in range(4)}


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """Three checkpoints with two moments for each weight."""
    save: Any = importlib.import_module("torch.distributed.checkpoint.state_dict_saver").save
    for step in STEPS:
        weights = model(step)
        moments = {name: {"exp_avg": each * 2, "exp_avg_sq": each**2} for name, each in weights.items()}
        with warnings.catch_warnings(action="ignore"):
            state = {"model": weights, "optimizer": {"state": moments}}
            save(state, checkpoint_id=tmp_path / f"run/step-{step}", no_dist=True)
    return tmp_path / "run"


@pytest.mark.parametrize("max_disk", [None, 0])
def test_the_same_bytes_from_a_store(s3: Store, run: Path, tmp_path: Path, max_disk: int | None) -> None:
    expected = weights_of(ckavg.average(ckavg.open_run(run), ckavg.PEMA(), out=tmp_path / "here").directory)
    address = s3.upload(run, "team/run")
    s3.forget()
    opened = ckavg.open_run(address, max_disk=max_disk)
    first = served_of(s3.served, ".distcp")
    assert first < 3 * 4 * 2000, "the beginnings of the pieces"
    result = ckavg.average(opened, ckavg.PEMA(), out=tmp_path / "there").directory
    assert weights_of(result) == expected
    weights = sum(each.nbytes for each in model(0).values()) * len(STEPS)
    assert served_of(s3.served, ".distcp") - first <= 2.2 * weights, "the optimizer stays where it is"
    verified = ckavg.verify_result(result, replay=True, sources=True, fetch=True)
    assert [each.message for each in verified.findings if each.is_problem] == []
    assert verified.elements
