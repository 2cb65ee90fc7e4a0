"""What is fetched whole from an object store: shared, taken up again, and removed once nobody needs it."""

from __future__ import annotations

import os
import threading
import time
from pathlib import Path

import pytest

import ckavg
from ckavg.remote import download
from ckavg.storage.atomic import cache_directory
from tests.remote.outcome import no_view_is_left, served_of, weights_of
from tests.remote.stores import Store

pytest.importorskip("s3fs")

FOREVER = 10_000


@pytest.fixture(autouse=True)
def _no_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ckavg.remote.tries.time.sleep", lambda _seconds: None)
    monkeypatch.setattr("s3fs.core.S3FileSystem.retries", 1)


@pytest.fixture
def address(s3: Store, run: Path) -> str:
    return s3.upload(run, "team/run")


def kept() -> list[str]:
    """All files that are kept."""
    return sorted(path.name for path in (cache_directory() / "files").rglob("*") if path.is_file())


def test_who_is_done_first_takes_nothing_from_the_others(s3: Store, address: str, run: Path, tmp_path: Path) -> None:
    expected = weights_of(ckavg.average(ckavg.open_run(run), ckavg.PEMA(), out=tmp_path / "local").directory)
    size = sum(path.stat().st_size for path in run.rglob("*.safetensors"))
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
    assert served_of(s3.served) == size, "each file came once"
    assert kept() == []

    holding = ckavg.open_run(address)
    assert holding.remote is not None
    paths = {shard.path: 2.0 for each in holding.checkpoints for shard in each.shards}
    holding.remote.fetch(holding.remote.plan(paths, other_bytes=0), lambda _: None)
    ckavg.average(ckavg.open_run(address), ckavg.PEMA(), out=tmp_path / "third")
    assert sum(name.endswith(".safetensors") for name in kept()) == len(paths), "somebody reads them"
    ckavg.average(holding, ckavg.PEMA(), out=tmp_path / "fourth")
    assert weights_of(tmp_path / "third") == weights_of(tmp_path / "fourth") == expected
    assert kept() == []


def test_what_an_interrupted_attempt_fetched_is_taken_up_and_then_removed(
    s3: Store, address: str, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(download, "PIECE_BYTES", 100_000)
    size = sum(path.stat().st_size for path in run.rglob("*.safetensors"))
    opened = ckavg.open_run(address)
    s3.forget()
    s3.faults["fetch"], s3.passes_before["fetch"] = (403, FOREVER), 20
    with pytest.raises(ckavg.CkavgError, match=r"^s3://runs/team/run/checkpoint-\d0/model\S* may not be read"):
        ckavg.average(opened, ckavg.PEMA(), out=tmp_path / "out")
    assert 1_500_000 < served_of(s3.served) <= 2_000_000, "twenty pieces, some of them the short ends of files"
    assert any(name.endswith(".incomplete") for name in kept())
    s3.faults.clear()
    del opened
    no_view_is_left()
    ckavg.average(ckavg.open_run(address), ckavg.PEMA(), out=tmp_path / "out")
    headers = 4 * (64 << 10)
    assert served_of(s3.served) <= size + headers, "nothing came twice"
    assert kept() == []


def test_what_nobody_comes_back_to_goes_after_a_week(s3: Store, address: str, run: Path, tmp_path: Path) -> None:
    for name, days in (("old", 8), ("young", 6)):
        s3.upload(run, name)
        opened = ckavg.open_run(f"s3://runs/{name}")
        s3.faults["fetch"] = 403, FOREVER
        with pytest.raises(ckavg.CkavgError, match="may not be read"):
            ckavg.average(opened, ckavg.PEMA(), out=tmp_path / name)
        s3.faults.clear()
        del opened
        no_view_is_left()
        for lock in (cache_directory() / "files").glob("*/.lock"):
            if time.time() - lock.stat().st_mtime < 3600:
                os.utime(lock, (0, time.time() - days * 24 * 3600))
    assert len(list((cache_directory() / "files").iterdir())) == 2
    ckavg.average(ckavg.open_run(address), ckavg.PEMA(), out=tmp_path / "out")
    (left,) = (cache_directory() / "files").iterdir()
    assert time.time() - (left / ".lock").stat().st_mtime < 7 * 24 * 3600
