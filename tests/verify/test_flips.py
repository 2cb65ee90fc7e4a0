"""The experiments behind the figures in docs/reliability.md, in small."""

from __future__ import annotations

from pathlib import Path

import torch

import ckavg
from tests.runs import write_run
from tests.verify.flips import COLUMNS, of_inspect, of_verify
from tests.verify.test_health import sound_run


def test_a_byte_of_a_result_or_of_its_sources(tmp_path: Path) -> None:
    plain, sources, replay, every = COLUMNS
    counts = of_verify(tmp_path, torch.bfloat16, times=6)
    assert counts["the result"][plain] == 6
    assert counts["a checkpoint"][plain] == 0
    assert counts["a checkpoint"][sources] == 6
    assert counts["a checkpoint"][replay] <= counts["a checkpoint"][every] <= 6


def test_a_byte_of_a_run(tmp_path: Path) -> None:
    steps = range(0, 400, 50)
    run = ckavg.open_run(write_run(tmp_path / "run", sound_run(7, steps, torch.bfloat16), steps))
    before = [Path(shard.path).read_bytes() for checkpoint in run.checkpoints for shard in checkpoint.shards]
    counts = of_inspect(run, times=12)
    named, total = counts["sign and exponent"]
    assert total // 3 <= named <= total
    assert counts["others"] == (0, 12)
    assert before == [Path(shard.path).read_bytes() for checkpoint in run.checkpoints for shard in checkpoint.shards]
