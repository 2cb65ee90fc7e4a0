"""A command that is killed leaves a whole result or none, and the same command then gives the undisturbed result."""

from __future__ import annotations

import json
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.cli.runner import snapshot
from tests.runs import write_run

ROOT = Path(__file__).parents[2]
MOMENTS = {"some": 15, "all": 60}


@pytest.fixture(scope="module", params=["some", pytest.param("all", marks=pytest.mark.exhaustive)])
def which(request: pytest.FixtureRequest) -> str:
    """Whether a call is killed once, or at several of its places."""
    return str(request.param)


@pytest.fixture(scope="module")
def told(which: str, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    generator = torch.Generator().manual_seed(0)
    start = {f"layer{number}": torch.randn(1 << 18, generator=generator) for number in range(24)}
    moved = [
        {name: (tensor + 0.01 * step * torch.randn(1 << 18, generator=generator)) for name, tensor in start.items()}
        for step in range(4)
    ]
    source = write_run(tmp_path_factory.mktemp("killed") / "run", moved, (0, 10, 20, 30), shards=(2,))
    before = snapshot(source)
    words = [sys.executable, "-m", "tests.killed.trials", str(source), str(MOMENTS[which]), "0", which]
    ran = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, timeout=900)
    assert ran.returncode == 0, ran.stderr
    after = snapshot(source)
    assert {name: after[name] for name in before} == before
    results: list[dict[str, Any]] = json.loads(ran.stdout)
    return results


def test_enough_was_killed_everywhere(which: str, told: list[dict[str, Any]]) -> None:
    killed = Counter(each["at"] for each in told if each["killed"])
    assert killed["moment"] == MOMENTS[which]
    assert killed["rename"] == 3  # alone; the earlier result aside, then into its place
    assert min(killed[call] for call in ("fsync", "replace", "mkdir", "unlink", "truncate", "pwrite", "open")) >= 2
    sys.stdout.write(f"{dict(killed)}\n")  # shown with -rP
    whole = max(each["bytes_read"] for each in told)
    assert (
        sum(0 < each["bytes_read"] < whole for each in told) > MOMENTS[which] // 3
    )  # continued, rather than begun again


@pytest.mark.parametrize("promise", ["whole", "status", "same"])
def test_every_one_of_them(told: list[dict[str, Any]], promise: str) -> None:
    assert [(each["at"], each["number"]) for each in told if not each[promise]] == []


def test_nothing_is_left_beside_the_result(told: list[dict[str, Any]]) -> None:
    assert [(each["at"], each["number"], each["left"]) for each in told if each["left"]] == []
