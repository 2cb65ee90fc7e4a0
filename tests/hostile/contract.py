"""What holds for any input, however bad: one message or a right result, and the sources as they were."""

from __future__ import annotations

import json
import os
import shutil
import stat
from collections.abc import Mapping
from pathlib import Path

import torch
from hypothesis import HealthCheck, settings
from safetensors.torch import load
from typer.testing import Result

from tests.cli import runner
from tests.cli.runner import run_cli
from tests.runs import write_checkpoint

REPEATABLE = settings(
    derandomize=True,
    database=None,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
"""The same examples wherever and whenever the tests run, so that their number is a figure one can state."""

STEPS = (0, 10, 20)
MODEL = "model.safetensors"
INDEX = "model.safetensors.index.json"

Sources = Mapping[str, tuple[object, ...]]


def weights(shift: float) -> dict[str, torch.Tensor]:
    """Small tensors of each kind: two that are averaged, one that is copied."""
    return {
        "w": torch.arange(12.0).view(3, 4) + shift,
        "b": torch.tensor([0.5, shift]),
        "ids": torch.arange(3) + int(shift),
    }


def write_small_run(root: Path, *, shards: int = 1) -> Path:
    """Three checkpoints; the last one has `shards` weight files."""
    for place, step in enumerate(STEPS):
        last = step == STEPS[-1]
        write_checkpoint(root / f"checkpoint-{step}", weights(2 * place), step=step, shards=shards if last else 1)
    return root


def sources(run: Path) -> Sources:
    """What the system says of everything below a run but its results, and the bytes of plain files; opens no pipe."""
    found: dict[str, tuple[object, ...]] = {}
    for folder, folders, files in os.walk(run):
        folders[:] = [name for name in folders if (Path(folder), name) != (run, "averaged")]
        for name in (*folders, *files):
            path = Path(folder) / name
            status = path.lstat()
            plain = stat.S_ISREG(status.st_mode) and status.st_size < 1 << 20
            found[str(path.relative_to(run))] = (
                status.st_mode,
                status.st_ino,
                status.st_mtime_ns if not stat.S_ISDIR(status.st_mode) else 0,
                status.st_size,
                path.read_bytes() if plain and os.access(path, os.R_OK) else b"",
            )
    return found


def check_text(text: str) -> None:
    """Nothing in it that a terminal would obey, or not show."""
    assert all(line.isprintable() for line in text.split("\n")), text


def check_refusal(result: Result, run: Path, *named: str) -> None:
    """One message that names the culprit by one of these words, status 1, and nothing that looks like a result."""
    assert result.exit_code == 1, (result.exit_code, result.stdout, result.stderr)
    assert result.stdout == ""
    assert result.stderr.startswith("error: ")
    assert result.stderr.count("error: ") == 1, result.stderr
    assert "Traceback" not in result.stderr
    assert any(word in result.stderr for word in named), (named, result.stderr)
    assert len(result.stderr) < 60_000
    check_text(result.stderr)
    assert not visible(run / "averaged"), visible(run / "averaged")


def visible(place: Path) -> list[str]:
    """What a user would see there; hidden names of unfinished work are not results."""
    return sorted(runner.visible(place)) if place.exists() else []


def check_mean(run: Path, files: Mapping[str, list[Path]], result: Path) -> None:
    """The result is the mean of what the safetensors library reads from these files of each checkpoint."""
    loaded = [
        {name: value for file in each for name, value in load(file.read_bytes()).items()} for each in files.values()
    ]
    found = {name: value for file in result.glob("*.safetensors") for name, value in load(file.read_bytes()).items()}
    assert found.keys() == loaded[-1].keys()
    for name, value in found.items():
        if value.is_floating_point():
            mean = torch.stack([each[name].double() for each in loaded]).mean(0)
            torch.testing.assert_close(value.double(), mean, rtol=1e-6, atol=1e-6)
        else:
            assert torch.equal(value, loaded[-1][name])
    record = json.loads((result / "ckavg.json").read_bytes())
    assert sum(record["weights"]) == 1 or abs(sum(record["weights"]) - 1) < 1e-12


def mean_of(run: Path, *options: str) -> Result:
    """Average a run afresh, quietly, and see that neither this nor `inspect` changed a source."""
    before = sources(run)
    shutil.rmtree(run / "averaged", ignore_errors=True)
    inspected = run_cli("inspect", run, "--json")
    assert inspected.exit_code in (0, 1)
    if inspected.stdout:
        json.loads(inspected.stdout)
    for text in (inspected.stdout, inspected.stderr):
        check_text(text)
        assert "Traceback" not in text
    result = run_cli("mean", run, "--quiet", *options)
    assert sources(run) == before
    check_text(result.stderr)
    return result
