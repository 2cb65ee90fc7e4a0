"""Downloads that are interrupted go on where they were, within a file, too; and what was damaged is noticed."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Literal

import pytest

import ckavg
from ckavg.errors import HubError, ReadError
from ckavg.remote import download
from ckavg.storage.atomic import cache_directory
from tests.hub.server import Hub, Repo
from tests.hub.wire import Broken
from tests.remote.outcome import no_view_is_left, served_of, weights_of
from tests.remote.published import digest_of, weights
from tests.remote.questions import REPO

REVISIONS = f"hf://{REPO}@step*"
FOREVER = 10_000
PIECE = 100_000
HEADERS = 4 * (64 << 10)


@pytest.fixture(autouse=True)
def _small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(download, "PIECE_BYTES", PIECE)


@pytest.fixture
def expected(run: Path, tmp_path: Path) -> dict[str, bytes]:
    return weights_of(ckavg.average(ckavg.open_run(run), ckavg.PEMA(), out=tmp_path / "local").directory)


def size_of(run: Path) -> int:
    return sum(path.stat().st_size for path in run.rglob("*.safetensors"))


def blobs(tmp_path: Path) -> Path:
    return tmp_path / "hf-home" / "hub" / f"models--{REPO.replace('/', '--')}" / "blobs"


def partial(tmp_path: Path) -> dict[str, int]:
    """What there is of files that are not whole, by name."""
    return {path.name: path.stat().st_size for path in blobs(tmp_path).glob("*.incomplete")}


def test_what_is_there_is_not_fetched_again(
    hub: Hub, repo: Repo, run: Path, expected: dict[str, bytes], tmp_path: Path
) -> None:
    opened = ckavg.open_run(REVISIONS)
    hub.forget()
    hub.faults["fetch"], hub.passes_before["fetch"] = (403, FOREVER), 20
    with pytest.raises(HubError, match=r"^lab/run: reading model\S* of step\d0 failed.*\(403\)"):
        ckavg.average(opened, ckavg.PEMA(), out=tmp_path / "out")
    assert sum(partial(tmp_path).values()) + served_of({}) > 0
    assert not (tmp_path / "out").exists()
    del opened
    hub.faults.clear()
    came = served_of(hub.served)
    assert came == pytest.approx(20 * PIECE, abs=PIECE * 4)
    ckavg.average(ckavg.open_run(REVISIONS), ckavg.PEMA(), out=tmp_path / "out")
    assert weights_of(tmp_path / "out") == expected
    assert size_of(run) <= served_of(hub.served) <= size_of(run) + HEADERS, "nothing but headers came twice"
    assert partial(tmp_path) == {}


@pytest.mark.parametrize("how", ["closed", "reset", "short"])
def test_an_answer_that_breaks_off_costs_one_piece(
    hub: Hub,
    repo: Repo,
    run: Path,
    expected: dict[str, bytes],
    tmp_path: Path,
    how: Literal["closed", "reset", "short"],
) -> None:
    opened = ckavg.open_run(REVISIONS)
    hub.forget()
    hub.faults["fetch"], hub.passes_before["fetch"] = (Broken(60_000, how), 2), 10
    ckavg.average(opened, ckavg.PEMA(), out=tmp_path / "out")
    assert weights_of(tmp_path / "out") == expected
    assert size_of(run) <= served_of(hub.served) <= size_of(run) + 2 * 60_000


def test_ctrl_c(
    hub: Hub, repo: Repo, run: Path, expected: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened = ckavg.open_run(REVISIONS)
    hub.forget()

    def interrupt(progress: ckavg.Progress) -> None:
        if progress.done > 15 * PIECE:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        ckavg.average(opened, ckavg.PEMA(), out=tmp_path / "out", on_progress=interrupt)
    del opened
    assert size_of(run) > served_of(hub.served) >= 15 * PIECE
    ckavg.average(ckavg.open_run(REVISIONS), ckavg.PEMA(), out=tmp_path / "out")
    assert weights_of(tmp_path / "out") == expected
    assert size_of(run) <= served_of(hub.served) <= size_of(run) + HEADERS + 8 * PIECE, "what was on its way is lost"


SCRIPT = f"""
import sys, ckavg
from ckavg.remote import download
download.PIECE_BYTES = {PIECE}
ckavg.average(ckavg.open_run({REVISIONS!r}), ckavg.PEMA(), out=sys.argv[1])
"""


def started(out: Path) -> subprocess.Popen[bytes]:
    return subprocess.Popen([sys.executable, "-c", SCRIPT, str(out)], env=dict(os.environ), stderr=subprocess.PIPE)


@pytest.mark.parametrize("ends", [signal.SIGKILL, signal.SIGINT])
def test_a_process_that_ends(
    hub: Hub, repo: Repo, run: Path, expected: dict[str, bytes], tmp_path: Path, ends: signal.Signals
) -> None:
    """A view is left only by who was killed, and goes with the next run."""
    hub.faults["fetch"], hub.passes_before["fetch"] = (Broken(50_000, "stalled"), FOREVER), 30
    with started(tmp_path / "out") as process:
        assert hub.held.wait(60)
        process.send_signal(ends)
        process.communicate()
    hub.faults.clear()
    hub.released.set()
    assert len(list((cache_directory() / "views").iterdir())) == (ends == signal.SIGKILL)
    before = partial(tmp_path)
    assert sum(before.values()) > 0
    ckavg.average(ckavg.open_run(REVISIONS), ckavg.PEMA(), out=tmp_path / "out")
    assert weights_of(tmp_path / "out") == expected
    assert served_of(hub.served) <= size_of(run) + 2 * HEADERS + 40 * 50_000, "what was stalled, a few times over"
    no_view_is_left()


def test_what_was_damaged_meanwhile(
    hub: Hub, repo: Repo, run: Path, expected: dict[str, bytes], tmp_path: Path
) -> None:
    place = blobs(tmp_path) / f"{digest_of(weights(run))}.incomplete"
    place.parent.mkdir(parents=True)
    place.write_bytes(b"\0" * 250_000)
    opened = ckavg.open_run(REVISIONS)
    with pytest.raises(
        ReadError, match=r"^hf://lab/run@step10: model.safetensors came with other content than its"
    ) as met:
        ckavg.average(opened, ckavg.PEMA(), out=tmp_path / "out")
    assert "run the command again" in met.value.hint
    assert not place.exists()
    ckavg.average(opened, ckavg.PEMA(), out=tmp_path / "out")
    assert weights_of(tmp_path / "out") == expected


@pytest.mark.parametrize("size", [10_000_000, 1_200_248])
def test_a_partial_file_that_is_as_long_as_it_should_be_or_longer(
    hub: Hub, repo: Repo, run: Path, expected: dict[str, bytes], tmp_path: Path, size: int
) -> None:
    data = weights(run)
    place = blobs(tmp_path) / f"{digest_of(data)}.incomplete"
    place.parent.mkdir(parents=True)
    place.write_bytes((data + b"\0" * size)[: max(size, len(data))])
    opened = ckavg.open_run(REVISIONS)
    hub.forget()
    ckavg.average(opened, ckavg.PEMA(), out=tmp_path / "out")
    assert weights_of(tmp_path / "out") == expected
    assert served_of(hub.served) == size_of(run) - len(data)


def test_two_processes_fetch_each_file_once(
    hub: Hub, repo: Repo, run: Path, expected: dict[str, bytes], tmp_path: Path
) -> None:
    both = [started(tmp_path / name) for name in ("first", "second")]
    for process in both:
        with process:
            _, told = process.communicate()
            assert process.returncode == 0, told.decode()
    assert weights_of(tmp_path / "first") == weights_of(tmp_path / "second") == expected
    assert size_of(run) <= served_of(hub.served) <= size_of(run) + 2 * HEADERS
    no_view_is_left()
