"""A run that is read from Olah: of a Hub it mirrors, and of a git repository, of which it knows whole files alone."""

from __future__ import annotations

from pathlib import Path

import pytest

import ckavg
from tests.cli.runner import run_cli
from tests.hub.server import Hub
from tests.remote.mirrors import Olah
from tests.remote.outcome import no_view_is_left, weights_of


def assert_the_bytes_of_the_disk(olah: Olah, run: Path, tmp_path: Path, max_disk: int | None) -> None:
    expected = weights_of(ckavg.average(ckavg.open_run(run), ckavg.PEMA(), out=tmp_path / "local").directory)
    opened = ckavg.open_run(f"hf://{olah.name}", revisions=["step*"], max_disk=max_disk)
    assert opened.steps == (10, 20, 30)
    result = ckavg.average(opened, ckavg.PEMA(), out=tmp_path / "remote")
    assert weights_of(result.directory) == expected
    commits = [olah.branches[f"step{step}"] for step in (10, 20, 30)]
    assert [str(each.directory) for each in result.inputs] == [f"hf://{olah.name}@{commit}" for commit in commits]
    assert run_cli("verify", result.directory, "--fetch", "--sources").exit_code == 0
    del opened
    no_view_is_left()


@pytest.mark.parametrize("max_disk", [None, 0])
def test_the_mirror_of_a_hub(hub: Hub, olah: Olah, run: Path, tmp_path: Path, max_disk: int | None) -> None:
    assert_the_bytes_of_the_disk(olah, run, tmp_path, max_disk)


@pytest.mark.parametrize("max_disk", [None, 0])
def test_a_git_repository(olah_of_git: Olah, run: Path, tmp_path: Path, max_disk: int | None) -> None:
    assert_the_bytes_of_the_disk(olah_of_git, run, tmp_path, max_disk)
