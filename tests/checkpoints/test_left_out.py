"""What is left out of a run, or taken into a result, when it is asked for: --skip-incomplete, --common-only, --copy."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import ckavg
from ckavg.errors import CombinedError, CorruptFileError, MismatchError, MissingShardError, SettingError
from tests import reference
from tests.cli.runner import run_cli
from tests.runs import write_checkpoint, write_run

STEPS = (10, 20, 30, 40)
MODEL = "model.safetensors"


def weights(step: int) -> dict[str, Tensor]:
    return {"w": torch.linspace(0, 1, 12).view(3, 4) * step, "b": torch.tensor([0.5, float(step)])}


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return write_run(tmp_path / "run", [weights(step) for step in STEPS], STEPS)


# --- incomplete checkpoints ---


INDEX, SHARD = "model.safetensors.index.json", "model-00001-of-00002.safetensors"
INCOMPLETE = {
    "cut short": f"{MODEL} is 100 bytes long",
    "empty": "is 0 bytes long",
    "no weights": "holds no weights",
    "no shard": f"{SHARD} does not exist",
    "no shard and no index": f"{SHARD} does not exist",
    "empty index": "index.json is empty",
}


def damage(checkpoint: Path, how: str) -> None:
    """Leave a checkpoint as an interrupted save does."""
    if "shard" in how or "index" in how:
        step = int(checkpoint.name.partition("-")[2])
        shutil.rmtree(checkpoint)
        write_checkpoint(checkpoint, weights(step), shards=2)
        (checkpoint / SHARD).unlink()
    if how in ("cut short", "empty"):
        os.truncate(checkpoint / MODEL, 100 if how == "cut short" else 0)
    elif how == "no weights":
        (checkpoint / MODEL).unlink()
    elif how == "no shard and no index":
        (checkpoint / INDEX).unlink()
    elif how == "empty index":
        (checkpoint / INDEX).write_bytes(b"")


@pytest.mark.parametrize(("how", "step"), [*((how, 20) for how in INCOMPLETE), ("empty", 10), ("no shard", 40)])
def test_incomplete_checkpoints_are_left_out(source: Path, how: str, step: int) -> None:
    damage(source / f"checkpoint-{step}", how)
    with pytest.raises(ckavg.CkavgError, match=INCOMPLETE[how]):
        ckavg.open_run(source)
    run = ckavg.open_run(source, skip_incomplete=True)
    assert run.steps == tuple(each for each in STEPS if each != step)
    (warning,) = run.warnings
    assert warning.startswith(f"Skipped: checkpoint-{step} is incomplete: ")
    assert INCOMPLETE[how] in warning


def test_last_counts_the_complete_ones(source: Path) -> None:
    damage(source / "checkpoint-40", "no weights")
    damage(source / "checkpoint-20", "empty")
    assert ckavg.open_run(source, last=2, skip_incomplete=True).steps == (10, 30)


def test_damage_is_no_incompleteness(source: Path) -> None:
    (source / "checkpoint-20" / MODEL).write_bytes(b"\xff" * 100)
    with pytest.raises(CorruptFileError):
        ckavg.open_run(source, skip_incomplete=True)


def test_an_incomplete_anchor_is_refused(source: Path, tmp_path: Path) -> None:
    base = write_checkpoint(tmp_path / "base", weights(0))
    damage(base, "no weights")
    with pytest.raises(MissingShardError, match="base holds no weights"):
        ckavg.open_run(source, init=base, skip_incomplete=True)


def test_skipping_is_recorded_and_reproduced(source: Path) -> None:
    damage(source / "checkpoint-40", "cut short")
    done = run_cli("ema", source, "--skip-incomplete", "--json")
    assert done.exit_code == 0, done.stderr
    told = json.loads(done.stdout)
    assert told["selection"] == {"skip_incomplete": True}
    assert told["steps"] == [10, 20, 30]
    assert "warning: Skipped: checkpoint-40 is incomplete" in done.stderr
    card = (Path(told["outputs"][0]["directory"]) / "README.md").read_text()
    assert "    ckavg ema --gamma 0.15 --skip-incomplete\n" in card
    inspected = run_cli("inspect", source, "--skip-incomplete")
    assert inspected.exit_code == 0
    assert "--skip-incomplete" in inspected.stdout.splitlines()[-1]


# --- tensors that not all checkpoints have ---


def test_common_tensors_are_averaged_and_others_copied(source: Path) -> None:
    for step, extra in (
        (10, {"early": torch.ones(3)}),
        (30, {"frozen": torch.ones(2)}),
        (40, {"frozen": torch.zeros(2)}),
    ):
        save_file(weights(step) | extra, source / f"checkpoint-{step}" / MODEL)
    with pytest.raises(CombinedError, match="common_only=True averages those"):
        ckavg.open_run(source)
    run = ckavg.open_run(source, common_only=True)
    assert run.warnings == (
        "Not in every checkpoint, so copied from step 40 instead of averaged: 1 tensor (frozen).",
        "Not in every checkpoint, nor at step 40, so left out: 1 tensor (early).",
    )
    for scheme in (ckavg.PEMA(), ckavg.EMA()):
        result = ckavg.average(run, scheme, dtype="bfloat16" if scheme.name == "ema" else "source")
        found = load_file(result.directory / MODEL)
        assert found.keys() == {"w", "b", "frozen"}
        assert torch.equal(found["frozen"], torch.zeros(2))
        assert found["frozen"].dtype == torch.float32
        checkpoints = [{name: t.double().numpy() for name, t in weights(step).items()} for step in STEPS]
        expected = getattr(reference, scheme.name)(checkpoints, STEPS)
        for name in expected:
            np.testing.assert_allclose(found[name].double().numpy(), expected[name], rtol=2**-8, atol=1e-6)
        assert result.selection == {"common_only": True}
        assert " --common-only" in (result.directory / "README.md").read_text()


def test_common_only_changes_nothing_where_all_have_all(source: Path) -> None:
    result = ckavg.average(ckavg.open_run(source), ckavg.PEMA())
    again = ckavg.average(ckavg.open_run(source, common_only=True), ckavg.PEMA(), out=source / "again")
    assert (result.directory / MODEL).read_bytes() == (again.directory / MODEL).read_bytes()
    assert again.bytes_read < result.bytes_read  # the path is known from before
    assert again.warnings == result.warnings


@pytest.mark.parametrize("changed", [torch.ones(3), torch.ones(2).half()], ids=("shape", "dtype"))
def test_conflicts_stay_errors(source: Path, changed: Tensor) -> None:
    save_file(weights(30) | {"b": changed}, source / "checkpoint-30" / MODEL)
    with pytest.raises(ckavg.CkavgError, match="step 30: tensor 'b' is"):
        ckavg.open_run(source, common_only=True)


def test_nothing_in_common_is_refused(source: Path) -> None:
    save_file({"other": torch.ones(2)}, source / "checkpoint-40" / MODEL)
    with pytest.raises(MismatchError, match="No floating tensor is in all checkpoints"):
        ckavg.open_run(source, common_only=True)


def test_snapshots_need_what_they_copy(source: Path) -> None:
    for step in (20, 30, 40):
        save_file(weights(step) | {"frozen": torch.full((2,), float(step))}, source / f"checkpoint-{step}" / MODEL)
    run = ckavg.open_run(source, common_only=True)
    result = ckavg.average(run, ckavg.EMA(), snapshot_every=20)
    assert torch.equal(load_file(result.directory / "checkpoint-20" / MODEL)["frozen"], torch.full((2,), 20.0))
    save_file(weights(20), source / "checkpoint-20" / MODEL)
    with pytest.raises(SettingError, match="step 20 lacks tensors of the last checkpoint"):
        ckavg.plan_average(ckavg.open_run(source, common_only=True), ckavg.EMA(), snapshot_every=20)


# --- further files ---


def test_copied_files(source: Path) -> None:
    last = source / "checkpoint-40"
    for name in ("eval/scores.csv", "eval/more/notes.md", "logs/events.log", "trainer_state.json", "training_args.bin"):
        (last / name).parent.mkdir(parents=True, exist_ok=True)
        (last / name).write_text(name)
    (last / "trainer_state.json").write_text('{"global_step": 40}')
    done = run_cli("ema", source, "--copy", "eval/*", "--copy", "trainer_state.json", "--copy", "*.bin", "--json")
    assert done.exit_code == 0, done.stderr
    told = json.loads(done.stdout)
    directory = Path(told["outputs"][0]["directory"])
    assert told["selection"] == {"copy": ["eval/*", "trainer_state.json", "*.bin"]}
    for name in ("eval/scores.csv", "eval/more/notes.md", "trainer_state.json", "training_args.bin"):
        assert (directory / name).read_bytes() == (last / name).read_bytes()
        assert name in told["outputs"][0]["files"]
    assert not (directory / "logs").exists()
    assert "--copy 'eval/*' --copy trainer_state.json --copy '*.bin'\n" in (directory / "README.md").read_text()


@pytest.mark.parametrize(
    ("pattern", "told"),
    [
        ("nothing*", "'nothing\\*' matches no file"),
        ("*.safetensors", "matches only weights"),
        ("pytorch_model.bin", "matches only weights"),
        ("../checkpoint-10/*", "matches no file"),
        ("/etc/passwd", "matches no file"),
        ("README.md", "matches no file"),
        ("huge.csv", "has 200,000,001 bytes, more than 200,000,000"),
    ],
)
def test_what_is_never_copied(source: Path, pattern: str, told: str) -> None:
    last = source / "checkpoint-40"
    (last / "pytorch_model.bin").write_bytes(b"pickle")
    (last / "README.md").write_text("a card")
    (last / "huge.csv").touch()
    os.truncate(last / "huge.csv", 200_000_001)
    with pytest.raises(SettingError, match=told):
        ckavg.plan_average(ckavg.open_run(source, copy=(pattern,)), ckavg.EMA())


def test_what_is_copied_and_said(source: Path) -> None:
    (source / "checkpoint-40" / "modeling_mine.py").write_text("import os")
    plan = ckavg.plan_average(ckavg.open_run(source, copy=("*",)), ckavg.EMA())
    assert f"--copy * also matches weights, which are never copied: {MODEL}." in plan.warnings
    assert plan.side_files["modeling_mine.py"] == b"import os"
    assert any("Custom code is copied with the weights: modeling_mine.py." in warning for warning in plan.warnings)
