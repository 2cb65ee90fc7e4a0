"""The experiment behind the figures in docs/reliability.md, in small."""

from __future__ import annotations

from pathlib import Path

import torch

from tests.verify.flips import COLUMNS, experiment


def test_a_byte_that_changed(tmp_path: Path) -> None:
    plain, sources, replay, every = COLUMNS
    counts = experiment(tmp_path, torch.bfloat16, times=6)
    assert counts["the result"][plain] == 6
    assert counts["a checkpoint"][plain] == 0
    assert counts["a checkpoint"][sources] == 6
    assert counts["a checkpoint"][replay] <= counts["a checkpoint"][every] <= 6
