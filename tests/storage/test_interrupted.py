"""Interrupted downloads and streams continue where they stopped; damage is noticed.

Files are downloaded in small pieces here. Streamed blocks are noted one by one.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch

import ckavg
from ckavg.engine.remote import RemoteReader
from ckavg.errors import HubError, ReadError
from ckavg.storage import download, hub_errors
from ckavg.storage.atomic import cache_directory
from ckavg.storage.base import RemotePath
from ckavg.storage.remote import download_all
from tests.cli.runner import run_cli
from tests.exhaustive import all_but
from tests.hub.server import Hub, Repo
from tests.hub.wire import Broken
from tests.runs import write_run
from tests.storage.outcome import cached_objects, nothing_is_busy, served_of, size_of, told_once, weights_of
from tests.storage.published import REPO, digest_of, publish_revisions, weights
from tests.storage.stores import Store

REVISIONS = f"hf://{REPO}@step*"
FOREVER = 10_000
PIECE = 100_000
HEADER = 64 << 10


@pytest.fixture(autouse=True)
def _small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(download, "PIECE_BYTES", PIECE)
    monkeypatch.setattr(hub_errors, "WAITS", (0.01,) * 4)


def blobs(tmp_path: Path) -> Path:
    return tmp_path / "hf-home" / "hub" / f"models--{REPO.replace('/', '--')}" / "blobs"


def partial(tmp_path: Path) -> dict[str, int]:
    """What there is of files that are not whole, by name."""
    return {path.name: path.stat().st_size for path in blobs(tmp_path).glob("*.incomplete")}


def test_an_answer_that_breaks_off_costs_one_piece(
    hub: Hub, repo: Repo, run: Path, expected: dict[str, bytes], tmp_path: Path
) -> None:
    opened = ckavg.open_run(REVISIONS)
    hub.forget()
    hub.faults["fetch"], hub.passes_before["fetch"] = (Broken(60_000, "reset"), 2), 10
    ckavg.average(opened, ckavg.PEMA(), out=tmp_path / "out")
    assert weights_of(tmp_path / "out") == expected
    assert size_of(run) <= served_of(hub.served) <= size_of(run) + 2 * 60_000


def test_what_was_downloaded_before_an_interrupt_is_not_downloaded_again(
    hub: Hub, repo: Repo, run: Path, expected: dict[str, bytes], tmp_path: Path
) -> None:
    opened = ckavg.open_run(REVISIONS)
    hub.forget()

    def interrupt(progress: ckavg.Progress) -> None:
        if progress.done > 15 * PIECE:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        ckavg.average(opened, ckavg.PEMA(), out=tmp_path / "out", on_progress=interrupt)
    del opened
    assert not (tmp_path / "out").exists()
    assert size_of(run) > served_of(hub.served) >= 15 * PIECE
    ckavg.average(ckavg.open_run(REVISIONS), ckavg.PEMA(), out=tmp_path / "out")
    assert weights_of(tmp_path / "out") == expected
    assert size_of(run) <= served_of(hub.served) <= size_of(run) + 4 * HEADER + 8 * PIECE, "what was on its way is lost"
    assert partial(tmp_path) == {}


SCRIPT = f"""
import sys, ckavg
from ckavg.storage import download
download.PIECE_BYTES = {PIECE}
ckavg.average(ckavg.open_run({REVISIONS!r}), ckavg.PEMA(), out=sys.argv[1])
"""


def started(out: Path) -> subprocess.Popen[bytes]:
    return subprocess.Popen([sys.executable, "-c", SCRIPT, str(out)], env=dict(os.environ), stderr=subprocess.PIPE)


@pytest.mark.parametrize("ends", [signal.SIGKILL, signal.SIGINT])
def test_a_process_that_ends(
    hub: Hub, repo: Repo, run: Path, expected: dict[str, bytes], tmp_path: Path, ends: signal.Signals
) -> None:
    """It does not wait for requests in progress."""
    hub.faults["fetch"], hub.passes_before["fetch"] = (Broken(50_000, "stalled"), FOREVER), 30
    with started(tmp_path / "out") as process:
        assert hub.held.wait(60)
        process.send_signal(ends)
        process.communicate()
    hub.faults.clear()
    hub.released.set()
    assert sum(partial(tmp_path).values()) > 0
    ckavg.average(ckavg.open_run(REVISIONS), ckavg.PEMA(), out=tmp_path / "out")
    assert weights_of(tmp_path / "out") == expected
    assert served_of(hub.served) <= size_of(run) + 8 * HEADER + 40 * 50_000, "what was stalled, a few times over"


@pytest.mark.exhaustive
def test_two_processes_download_each_file_once(
    hub: Hub, repo: Repo, run: Path, expected: dict[str, bytes], tmp_path: Path
) -> None:
    both = [started(tmp_path / name) for name in ("first", "second")]
    for process in both:
        with process:
            _, told = process.communicate()
            assert process.returncode == 0, told.decode()
    assert weights_of(tmp_path / "first") == weights_of(tmp_path / "second") == expected
    assert size_of(run) <= served_of(hub.served) <= size_of(run) + 8 * HEADER


def test_what_was_damaged_meanwhile(
    hub: Hub, repo: Repo, run: Path, expected: dict[str, bytes], tmp_path: Path
) -> None:
    place = blobs(tmp_path) / f"{digest_of(weights(run))}.incomplete"
    place.parent.mkdir(parents=True)
    place.write_bytes(b"\0" * 250_000)
    opened = ckavg.open_run(REVISIONS)
    with pytest.raises(ReadError, match=r"^hf://lab/run@step10: model.safetensors does not have its SHA-256") as met:
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


# --- object stores ---


@pytest.fixture
def address(s3: Store, run: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    pytest.importorskip("s3fs")
    monkeypatch.setattr("ckavg.storage.hub_errors.time.sleep", lambda _seconds: None)
    monkeypatch.setattr("s3fs.core.S3FileSystem.retries", 1)
    return s3.upload(run, "team/run")


def test_who_is_done_first_takes_nothing_from_the_others(
    s3: Store, address: str, run: Path, expected: dict[str, bytes], tmp_path: Path
) -> None:
    first, second = ckavg.open_run(address), ckavg.open_run(address)
    s3.forget()
    both = {
        name: threading.Thread(target=ckavg.average, args=(each, ckavg.PEMA()), kwargs={"out": tmp_path / name})
        for name, each in (("first", first), ("second", second))
    }
    for thread in both.values():
        thread.start()
    for thread in both.values():
        thread.join()
    assert weights_of(tmp_path / "first") == weights_of(tmp_path / "second") == expected
    assert served_of(s3.served) == size_of(run), "each file came once"
    assert cached_objects() == []

    holding = ckavg.open_run(address)
    paths = [shard.path for each in holding.checkpoints for shard in each.shards]
    download_all([path for path in paths if isinstance(path, RemotePath)], lambda _: None)
    ckavg.average(ckavg.open_run(address), ckavg.PEMA(), out=tmp_path / "third")
    assert sum(name.endswith(".safetensors") for name in cached_objects()) == len(paths), "somebody reads them"
    ckavg.average(holding, ckavg.PEMA(), out=tmp_path / "fourth")
    assert weights_of(tmp_path / "third") == weights_of(tmp_path / "fourth") == expected
    assert cached_objects() == []


def test_what_an_interrupted_attempt_downloaded_is_taken_up_and_then_removed(
    s3: Store, address: str, run: Path, tmp_path: Path
) -> None:
    opened = ckavg.open_run(address)
    s3.forget()
    s3.faults["fetch"], s3.passes_before["fetch"] = (403, FOREVER), 20
    with pytest.raises(ckavg.CkavgError, match=r"^s3://runs/team/run/checkpoint-\d0/model\S* may not be read"):
        ckavg.average(opened, ckavg.PEMA(), out=tmp_path / "out")
    assert 1_400_000 < served_of(s3.served) <= 2_000_000, "pieces, some of them the short ends of files"
    assert any(name.endswith(".incomplete") for name in cached_objects())
    s3.faults.clear()
    del opened
    nothing_is_busy()
    ckavg.average(ckavg.open_run(address), ckavg.PEMA(), out=tmp_path / "out")
    assert served_of(s3.served) <= size_of(run) + 4 * HEADER, "nothing came twice"
    assert cached_objects() == []


def test_what_nobody_comes_back_to_goes_after_a_week(s3: Store, address: str, run: Path, tmp_path: Path) -> None:
    for name, days in (("old", 8), ("young", 6)):
        s3.upload(run, name)
        opened = ckavg.open_run(f"s3://runs/{name}")
        ckavg.plan_average(opened, ckavg.PEMA(), out=tmp_path / name)  # reads the small files
        s3.faults["fetch"] = 403, FOREVER
        with pytest.raises(ckavg.CkavgError, match="may not be read"):
            ckavg.average(opened, ckavg.PEMA(), out=tmp_path / name)
        s3.faults.clear()
        del opened
        nothing_is_busy()
        for lock in (cache_directory() / "files").glob("*/.lock"):
            if time.time() - lock.stat().st_mtime < 3600:
                os.utime(lock, (0, time.time() - days * 24 * 3600))
    assert len(list((cache_directory() / "files").iterdir())) == 2
    ckavg.average(ckavg.open_run(address), ckavg.PEMA(), out=tmp_path / "out")
    (left,) = (cache_directory() / "files").iterdir()
    assert time.time() - (left / ".lock").stat().st_mtime < 7 * 24 * 3600


# --- what is fetched as it is read ---

STREAMED_STEPS = (10, 20, 30, 40)
TENSORS, NUMBERS = 12, 300_000
STREAMED = len(STREAMED_STEPS) * TENSORS * NUMBERS * 4
PIECES = len(STREAMED_STEPS) * 14
"""Requests of a pass: pieces of a megabyte, and the ends of the files."""


@pytest.fixture
def source(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """Four checkpoints of 14.4 MB in twelve blocks, read by one connection that is little ahead of the work."""
    monkeypatch.setattr("ckavg.engine.stream.SECONDS_BETWEEN_NOTES", 0.0)
    monkeypatch.setattr(RemoteReader.__init__, "__kwdefaults__", {"nbytes": 8 << 20, "connections": 1})
    generator = torch.Generator().manual_seed(0)
    walk = [
        {f"layers.{place}": torch.randn(NUMBERS, generator=generator) for place in range(TENSORS)}
        for _ in STREAMED_STEPS
    ]
    publish_revisions(hub, REPO, write_run(tmp_path / "run", walk, STREAMED_STEPS))
    return REVISIONS


def journals() -> list[Path]:
    return list(cache_directory().glob(".path-*"))


@pytest.mark.parametrize("after", all_but((3 * PIECES // 2,), [PIECES // 2, 3 * PIECES // 2]))
def test_what_is_finished_is_not_read_again(hub: Hub, source: str, tmp_path: Path, after: int) -> None:
    """A fault in the middle of pass 1, and of pass 2."""
    expected = weights_of(
        ckavg.average(ckavg.open_run(tmp_path / "run"), ckavg.PEMA(), out=tmp_path / "local").directory
    )
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
    assert (came < STREAMED) == in_pass_1
    assert bool(journals()) == in_pass_1, "once the path is known, it is kept as a whole"
    assert not out.exists()
    nothing_is_busy()

    hub.forget()
    result = ckavg.average(ckavg.open_run(source, max_disk=0), ckavg.PEMA(), out=out)
    again = served_of(hub.served) - len(STREAMED_STEPS) * HEADER
    assert weights_of(out) == expected
    assert 0 <= again - result.bytes_read < 100, "nothing that was not needed"
    left = 2 * STREAMED - came
    assert left <= again <= left + (16 << 20), "what was held when it broke off is read again"
    assert (journals(), list(tmp_path.glob(".*"))) == ([], [])
    assert list(cache_directory().glob("files")) == []


def test_on_the_command_line(hub: Hub, source: str, tmp_path: Path) -> None:
    out = tmp_path / "out"
    command = ("bema", source, "--max-disk", "0", "--out", str(out))
    hub.faults["fetch"], hub.passes_before["fetch"] = (401, FOREVER), len(STREAMED_STEPS) + PIECES // 2
    told = told_once(run_cli(*command), REPO)
    assert f"Finished work is kept in {tmp_path}/.out.ckavg-partial: the same command continues from there." in told
    nothing_is_busy()
    hub.faults.clear()
    hub.forget()
    assert run_cli(*command).exit_code == 0
    assert len(STREAMED_STEPS) * HEADER < served_of(hub.served) < 0.8 * STREAMED
    assert run_cli("bema", tmp_path / "run", "--out", tmp_path / "here").exit_code == 0
    assert weights_of(out) == weights_of(tmp_path / "here")


@pytest.mark.exhaustive
def test_a_revision_that_is_another_one_by_then(hub: Hub, source: str, tmp_path: Path) -> None:
    """Finished blocks of other weights are not reused."""
    out = tmp_path / "out"
    run = ckavg.open_run(source, max_disk=0)
    hub.faults["fetch"], hub.passes_before["fetch"] = (503, FOREVER), 3 * PIECES // 2
    with pytest.raises(HubError):
        ckavg.average(run, ckavg.PEMA(), out=out)
    hub.faults.clear()
    branches = hub.repos[REPO].branches
    branches["step20"], branches["step30"] = branches["step30"], branches["step20"]
    changed = ckavg.average(ckavg.open_run(source, max_disk=0), ckavg.PEMA(), out=out)
    fresh = ckavg.average(ckavg.open_run(source), ckavg.PEMA(), out=tmp_path / "fresh")
    here = ckavg.average(ckavg.open_run(tmp_path / "run"), ckavg.PEMA(), out=tmp_path / "here")
    assert weights_of(changed.directory) == weights_of(fresh.directory) != weights_of(here.directory)
