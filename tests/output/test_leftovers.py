"""What killed processes have left."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import signal
from pathlib import Path

import pytest
import torch

import ckavg
from ckavg.errors import ChangedError
from ckavg.output.staging import find_leftovers, remove_stale
from ckavg.storage.journal import Journal
from tests.cli.runner import run_cli, snapshot
from tests.environment.process import ckavg as ckavg_process
from tests.runs import random_run, write_run


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return write_run(tmp_path / "run", random_run(0, 3, torch.float32), (0, 10, 20))


def interrupted(directory: Path, *, blocks: int) -> Path:
    directory.mkdir(parents=True)
    (directory / "model.safetensors").write_bytes(b"\0" * 3_000_000)
    journal = Journal(directory / ".ckavg-journal-0", "key")
    if blocks:
        journal.add({number: ["digest"] for number in range(blocks)})
    journal.close()
    return directory


def test_one_that_can_be_continued_is_told_of_and_stays(source: Path) -> None:
    left = interrupted(source / "averaged" / ".ema-gamma0.2.ckavg-partial", blocks=2)
    before = snapshot(left)
    for verb in (["pema"], ["sweep", "mean"]):
        told = run_cli(verb[0], source, *verb[1:])
        assert told.exit_code == 0
        assert f"{left} holds 3 MB of an interrupted average." in told.stderr
    inspected = run_cli("inspect", source, "--json")
    assert f"{left} holds 3 MB" in json.loads(inspected.stdout)["warnings"][-1]
    assert snapshot(left) == before
    (found,) = find_leftovers(source / "averaged")
    assert found.path == left
    assert found.nbytes == pytest.approx(3_000_000, rel=0.02)
    assert find_leftovers(source / "averaged", but=[source / "averaged" / "ema-gamma0.2"]) == ()


def test_one_that_cannot_is_removed(source: Path) -> None:
    left = interrupted(source / "averaged" / ".ema-gamma0.2.ckavg-partial", blocks=0)
    told = run_cli("ema", source)
    assert told.exit_code == 0
    assert "interrupted" not in told.stderr
    assert left.exists()  # perhaps another machine has just begun it
    for path in (*left.iterdir(), left):
        os.utime(path, (0, 0))
    assert run_cli("bema", source).exit_code == 0
    assert not left.exists()


def test_one_that_is_being_written_is_nobody_elses(source: Path) -> None:
    left = interrupted(source / "averaged" / ".ema-gamma0.2.ckavg-partial", blocks=0)
    handle = os.open(left, os.O_RDONLY)
    fcntl.flock(handle, fcntl.LOCK_EX)
    assert "interrupted" not in run_cli("ema", source).stderr
    refused = run_cli("ema", source, "--gamma", "0.2")
    os.close(handle)
    assert refused.exit_code == 1
    assert "error: Another ckavg is writing ema-gamma0.2." in refused.stderr
    assert left.exists()


KILLED_BETWEEN_THE_RENAMES = """
import os, signal
def rename(source, target, real=os.rename):
    if source.name.endswith(".ckavg-partial"):
        os.kill(os.getpid(), signal.SIGKILL)
    real(source, target)
os.rename = rename
"""


@pytest.fixture(scope="module")
def killed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run whose result was being replaced by another one, of snapshots too, and the result as it was beside it."""
    source = write_run(tmp_path_factory.mktemp("killed") / "run", random_run(0, 3, torch.float32), (0, 10, 20))
    result = ckavg.average(ckavg.open_run(source), ckavg.Mean(), snapshot_every=10).directory
    shutil.copytree(result, source.parent / "earlier")
    done = ckavg_process("mean", source, "--force", "--dtype", "bfloat16", "-q", before=KILLED_BETWEEN_THE_RENAMES)
    assert done.returncode == -signal.SIGKILL
    assert sorted(path.name for path in result.parent.iterdir()) == [".mean.ckavg-partial", ".mean.ckavg-replaced"]
    return source


@pytest.mark.parametrize(
    "words",
    [
        ("verify", "averaged/mean"),
        ("verify", "averaged/mean/checkpoint-10"),
        ("verify", "link"),
        ("push", "averaged/mean", "owner/name"),
        ("inspect", "."),
        ("inspect", "averaged/mean"),
        ("path", "."),
        ("mean", "."),
        ("ema", ".", "--dry-run"),
        ("sweep", ".", "ema", "--dry-run"),
        ("ema", ".", "--init", "averaged/mean", "--init-step", "-1", "--dry-run"),
    ],
    ids=" ".join,
)
def test_any_verb_brings_an_earlier_result_back(
    killed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: tuple[str, ...]
) -> None:
    source = tmp_path / "run"
    shutil.copytree(killed, source)
    (source / "link").symlink_to(source / "averaged" / "mean")
    monkeypatch.chdir(source)
    done = run_cli(*words)
    assert "Traceback" not in done.stderr
    assert "holds no ckavg.json" not in done.stderr
    if words[0] == "verify":
        assert done.exit_code == 0, done.stdout
    found, earlier = snapshot(source / "averaged" / "mean"), snapshot(killed.parent / "earlier")
    assert {name: data for name, (*_, data) in found.items()} == {name: data for name, (*_, data) in earlier.items()}
    assert not (source / "averaged" / ".mean.ckavg-replaced").exists()


def test_what_another_process_is_replacing_is_not_brought_back(killed: Path, tmp_path: Path) -> None:
    shutil.copytree(killed, tmp_path / "run")
    averaged = tmp_path / "run" / "averaged"
    handle = os.open(averaged / ".mean.ckavg-partial", os.O_RDONLY)
    fcntl.flock(handle, fcntl.LOCK_EX)
    assert run_cli("verify", averaged / "mean").exit_code == 1
    os.close(handle)
    assert (averaged / ".mean.ckavg-replaced").is_dir()


def test_what_was_replaced_goes(source: Path) -> None:
    result = ckavg.average(ckavg.open_run(source), ckavg.EMA()).directory
    before = snapshot(result)
    aside = result.parent / f".{result.name}.ckavg-replaced"
    shutil.copytree(result, aside)
    (aside / "model.safetensors").unlink()  # what removed it was killed, too
    remove_stale(result.parent)
    assert [path.name for path in result.parent.iterdir()] == [result.name]
    assert snapshot(result) == before


def test_what_has_such_a_name_by_a_link_stays(source: Path, tmp_path: Path) -> None:
    elsewhere = interrupted(tmp_path / "elsewhere", blocks=0)
    (source / "averaged").mkdir()
    (source / "averaged" / ".x.ckavg-partial").symlink_to(elsewhere)
    assert run_cli("ema", source).exit_code == 0
    assert elsewhere.is_dir()


def test_a_checkpoint_that_changes_while_it_is_averaged(source: Path) -> None:
    file = source / "checkpoint-10" / "model.safetensors"
    data = bytearray(file.read_bytes())

    def change(news: ckavg.Progress) -> None:
        if news.done == news.total:
            data[-1] ^= 1
            file.write_bytes(data)

    with pytest.raises(ChangedError, match="changed or replaced while it was read"):
        ckavg.average(ckavg.open_run(source), ckavg.EMA(), on_progress=change)
    assert not (source / "averaged").exists()
