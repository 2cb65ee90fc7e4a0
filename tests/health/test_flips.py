"""The experiment of docs/reliability.md, `python -m tests.health.flips`, on a made-up run."""

from __future__ import annotations

from pathlib import Path

import torch

import ckavg
from tests.health.flips import damages, findings
from tests.health.training import RATES, sound_run
from tests.runs import write_run


def test_damaged_exponents_are_noticed_and_nothing_else_is_blamed(tmp_path: Path) -> None:
    steps = range(0, 400, 50)
    weights = sound_run(7, steps, RATES["constant"], torch.bfloat16, speed=1e-5)
    run = ckavg.open_run(write_run(tmp_path / "run", weights, steps))
    before = [Path(shard.path).read_bytes() for checkpoint in run.checkpoints for shard in checkpoint.shards]
    assert {finding.kind for finding in findings(run)} == {"frozen"}
    done = list(damages(run, trials=12, seed=3))
    high = [damage for damage in done if damage.part == "sign and exponent"]
    assert 0 < len(high) < 12
    assert sum(damage.is_noticed for damage in high) >= len(high) // 2
    assert [damage.others for damage in done] == [1] * 12  # the frozen tensor
    assert before == [Path(shard.path).read_bytes() for checkpoint in run.checkpoints for shard in checkpoint.shards]
