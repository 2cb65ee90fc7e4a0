"""A run for several processes, and an end for each of them."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from tests.runs import random_run, write_run


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return write_run(tmp_path / "run", random_run(seed=1, count=4, dtype=torch.bfloat16), (0, 10, 20, 30))


@pytest.fixture
def jobs() -> Iterator[list[subprocess.Popen[str]]]:
    """Processes that are killed in the end, whatever has become of them."""
    started: list[subprocess.Popen[str]] = []
    yield started
    for each in started:
        each.kill()
        each.communicate()
