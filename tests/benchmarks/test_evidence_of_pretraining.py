"""What the evidence of pretraining rests on: branches that differ in the learning rate alone, and careful verdicts."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from benchmarks.evidence import pretraining, pretraining_run
from ckavg.demo import LlamaShape

pytestmark = pytest.mark.usefixtures("one_thread")

TINY = pretraining_run.Setting(
    steps=12,
    save_every=3,
    windows=(50,),
    warm_up=2,
    batch=2,
    seeds=(0, 1, 2),
    shape=LlamaShape(hidden_size=16, intermediate_size=16, num_hidden_layers=1, max_position_embeddings=64),
)


def test_a_branch_that_does_not_decay_is_the_stable_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pretraining_run, "DECAYS", {"none": lambda x: 1.0, "stop": lambda x: 0.0})
    ends = pretraining_run.train(tmp_path / "0", TINY, 0)
    run = tmp_path / "0" / "run"
    assert sorted(int(each.name.split("-")[1]) for each in run.iterdir()) == [0, 3, 6, 9, 12]
    for which, step in (("none", 12), ("stop", 6)):
        branch = load_file(ends[which, 50] / "model.safetensors")
        stable = load_file(run / f"checkpoint-{step}" / "model.safetensors")
        assert all(torch.equal(branch[name], stable[name]) for name in stable)


def test_everything_is_judged() -> None:
    losses = pretraining.judge(TINY, 0)
    assert all(4.5 < loss < 5.8 for loss in losses.values())  # ln 256 = 5.55 knows nothing
    assert losses["merged linear 50"] != losses["last"] != losses["decayed linear 50"]
    of_all = {name: [loss, loss + 0.01, loss + 0.03] for name, loss in losses.items()}
    names = [table.name for table in pretraining.tables_of(TINY, of_all)]
    assert names == ["pretraining-seeds", "pretraining-decays", "pretraining-averages"]
    assert len(pretraining.panels_of(TINY, of_all)) == 3


def test_few_seeds_decide_little() -> None:
    losses = {"one": [1.0, 1.1, 1.2], "other": [1.5, 1.6, 1.70001], "near": [1.0, 1.12, 1.21]}
    assert pretraining.difference(losses, "one", "other")[1] == "lower"
    assert pretraining.difference(losses, "other", "one")[1] == "higher"
    assert pretraining.difference(losses, "near", "one") == ("0.0100 ± 0.0058", "undecided")
