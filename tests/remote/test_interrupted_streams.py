"""What is read without being kept, and breaks off: the journals let the next attempt read only what is left."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import ckavg
from ckavg.engine import window
from ckavg.errors import HubError
from ckavg.storage.atomic import cache_directory
from tests.cli.runner import run_cli
from tests.hub.server import Hub
from tests.remote.outcome import no_view_is_left, served_of, told_once, weights_of
from tests.remote.published import publish_revisions
from tests.remote.questions import REPO
from tests.runs import write_run

STEPS = (10, 20, 30, 40)
TENSORS, NUMBERS = 12, 300_000
SIZE = len(STEPS) * TENSORS * NUMBERS * 4
HEADERS = len(STEPS) * (64 << 10)
FOREVER = 10_000
PIECES = len(STEPS) * 14
"""Requests of a pass: pieces of a megabyte, and the ends of the files."""


@pytest.fixture
def source(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """Four checkpoints of 14.4 MB in twelve blocks, read by one connection that is little ahead of the work."""
    monkeypatch.setattr("ckavg.engine.stream.SECONDS_BETWEEN_NOTES", 0.0)
    small = {"nbytes": 8 << 20, "connections": 1}
    monkeypatch.setattr(window.Window.__init__, "__kwdefaults__", small)
    generator = torch.Generator().manual_seed(0)
    weights = [
        {f"layers.{place}": torch.randn(NUMBERS, generator=generator) for place in range(TENSORS)} for _ in STEPS
    ]
    publish_revisions(hub, REPO, write_run(tmp_path / "run", weights, STEPS))
    return f"hf://{REPO}@step*"


@pytest.fixture
def expected(source: str, tmp_path: Path) -> dict[str, bytes]:
    run = ckavg.open_run(tmp_path / "run")
    return weights_of(ckavg.average(run, ckavg.PEMA(), out=tmp_path / "local").directory)


def journals() -> list[Path]:
    return list(cache_directory().glob(".path-*"))


@pytest.mark.parametrize("after", [PIECES // 2, 3 * PIECES // 2])
def test_what_is_finished_is_not_read_again(
    hub: Hub, source: str, expected: dict[str, bytes], tmp_path: Path, after: int
) -> None:
    """A fault in the middle of pass 1, and of pass 2."""
    out = tmp_path / "out"
    run = ckavg.open_run(source, max_disk=0)
    hub.forget()
    hub.faults["fetch"], hub.passes_before["fetch"] = (503, FOREVER), after
    with pytest.raises(HubError, match=r"^lab/run: reading model.safetensors of step\d0 failed.*\(503\)") as met:
        ckavg.average(run, ckavg.PEMA(), out=out)
    assert any("the same command continues from there" in note for note in met.value.__notes__)
    del met, run
    hub.faults.clear()
    came = served_of(hub.served)
    in_pass_1 = after < PIECES
    assert (came < SIZE) == in_pass_1
    assert bool(journals()) == in_pass_1, "once the path is known, it is kept as a whole"
    assert not out.exists()
    no_view_is_left()

    hub.forget()
    result = ckavg.average(ckavg.open_run(source, max_disk=0), ckavg.PEMA(), out=out)
    again = served_of(hub.served) - HEADERS
    assert weights_of(out) == expected
    assert 0 <= again - result.bytes_read < 100, "nothing that was not needed"
    left = 2 * SIZE - came
    assert left <= again <= left + (16 << 20), "what was in the window when it broke off is read again"
    assert (journals(), list(tmp_path.glob(".*"))) == ([], [])
    assert list(cache_directory().glob("files")) == []


def test_on_the_command_line(hub: Hub, source: str, expected: dict[str, bytes], tmp_path: Path) -> None:
    out = tmp_path / "out"
    command = ("bema", source, "--max-disk", "0", "--out", str(out))
    hub.faults["fetch"], hub.passes_before["fetch"] = (401, FOREVER), len(STEPS) + PIECES // 2
    done = run_cli(*command)
    told = told_once(done, REPO)
    assert f"What was finished is kept in {tmp_path}/.out.ckavg-partial: the same command continues from there." in told
    del done
    no_view_is_left()
    hub.faults.clear()
    hub.forget()
    assert run_cli(*command).exit_code == 0
    assert HEADERS < served_of(hub.served) < 0.8 * SIZE
    assert run_cli("bema", tmp_path / "run", "--out", tmp_path / "here").exit_code == 0
    assert weights_of(out) == weights_of(tmp_path / "here")


def test_a_revision_that_is_another_one_by_then(
    hub: Hub, source: str, expected: dict[str, bytes], tmp_path: Path
) -> None:
    """What was finished of other weights is not taken for these."""
    out = tmp_path / "out"
    run = ckavg.open_run(source, max_disk=0)
    hub.faults["fetch"], hub.passes_before["fetch"] = (503, FOREVER), 3 * PIECES // 2
    with pytest.raises(HubError):
        ckavg.average(run, ckavg.PEMA(), out=out)
    hub.faults.clear()
    branches = hub.repos[REPO].branches
    branches["step20"], branches["step30"] = branches["step30"], branches["step20"]
    ckavg.average(ckavg.open_run(source, max_disk=0), ckavg.PEMA(), out=out)
    (tmp_path / "run" / "checkpoint-20").rename(tmp_path / "run" / "other")
    (tmp_path / "run" / "checkpoint-30").rename(tmp_path / "run" / "checkpoint-20")
    (tmp_path / "run" / "other").rename(tmp_path / "run" / "checkpoint-30")
    for step in (20, 30):
        (tmp_path / "run" / f"checkpoint-{step}" / "trainer_state.json").unlink()
    here = ckavg.average(ckavg.open_run(tmp_path / "run"), ckavg.PEMA(), out=tmp_path / "here")
    assert weights_of(out) == weights_of(here.directory) != expected
