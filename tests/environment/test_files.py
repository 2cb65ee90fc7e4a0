"""Files that change, vanish or fail while they are read, storage that gives a little at a time, clocks that go back."""

from __future__ import annotations

import errno
import os
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import ckavg
import ckavg.engine.reader as files
from ckavg.checkpoints.fingerprints import check_unchanged
from ckavg.errors import ChangedError, CombinedError, ReadError
from tests.cli.runner import run_cli
from tests.exhaustive import all_but, thinned
from tests.hostile.contract import MODEL, check_mean, check_refusal, sources, visible, write_small_run
from tests.runs import write_run

STEPS = (0, 10, 20)


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return write_small_run(tmp_path / "run")


def files_of(run: Path) -> dict[str, list[Path]]:
    return {str(step): [run / f"checkpoint-{step}" / MODEL] for step in STEPS}


@pytest.mark.parametrize(("most", "cached"), thinned([1, 3, 7], [True, False]))
def test_short_reads_and_writes(run: Path, monkeypatch: pytest.MonkeyPatch, most: int, cached: bool) -> None:
    """As network file systems may give and take them."""
    expected = run_cli("pema", run, "--quiet", "--out", run.parent / "expected")
    assert expected.exit_code == 0
    shutil.rmtree(run / "averaged")
    preadv, pread, pwrite = os.preadv, os.pread, os.pwrite
    calls = 0

    def short_preadv(handle: int, buffers: Any, offset: int, flags: int = 0) -> int:
        nonlocal calls
        calls += 1
        if flags and not cached:
            raise BlockingIOError(errno.EAGAIN, os.strerror(errno.EAGAIN))
        return preadv(handle, [memoryview(buffers[0])[:most]], offset, flags)

    monkeypatch.setattr(os, "preadv", short_preadv)
    monkeypatch.setattr(os, "pread", lambda handle, size, offset: pread(handle, min(size, most), offset))
    monkeypatch.setattr(os, "pwrite", lambda handle, data, offset: pwrite(handle, data[:most], offset))
    result = run_cli("pema", run, "--quiet")
    assert result.exit_code == 0, result.stderr
    assert calls > 20
    assert (run / "averaged" / "pema-gamma0.15" / MODEL).read_bytes() == (run.parent / "expected" / MODEL).read_bytes()


def test_where_the_system_knows_no_preadv(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """macOS has the one without flags only, and some systems have none."""
    for name in ("_HAS_PREADV", "_HAS_NOWAIT", "_HAS_FADVISE"):
        monkeypatch.setattr(files, name, False)
    pread = os.pread
    monkeypatch.setattr(os, "pread", lambda handle, size, offset: pread(handle, min(size, 5), offset))
    assert run_cli("mean", run, "--quiet").exit_code == 0
    check_mean(run, files_of(run), run / "averaged" / "mean")


@pytest.mark.parametrize(
    ("error", "verb"), thinned([errno.EIO, errno.ESTALE, errno.ENOMEM, errno.EACCES], ["mean", "pema", "path"])
)
def test_the_disk_fails(run: Path, monkeypatch: pytest.MonkeyPatch, error: int, verb: str) -> None:
    before = sources(run)
    preadv = os.preadv
    calls = 0

    def failing(*arguments: Any) -> int:
        nonlocal calls
        calls += 1
        if calls > 1:
            raise OSError(error, os.strerror(error))
        return preadv(*arguments)

    monkeypatch.setattr(os, "preadv", failing)
    check_refusal(run_cli(verb, run, "--quiet"), run, f"{MODEL} cannot be read: {os.strerror(error)}")
    assert sources(run) == before


@pytest.mark.parametrize("name", ["checkpoint-20/model.safetensors", "checkpoint-0/model.safetensors"])
def test_the_disk_fails_where_headers_are(run: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    opened = os.open

    def failing(path: Any, flags: int, *more: Any, **options: Any) -> int:
        if os.fspath(path) == str(run / name):
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return opened(path, flags, *more, **options)

    monkeypatch.setattr(os, "open", failing)
    check_refusal(run_cli("mean", run, "--quiet"), run, f"{name} cannot be read: {os.strerror(errno.EIO)}")


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Several blocks, so that something can happen between them."""
    root = tmp_path_factory.mktemp("large")
    tensors = [{f"w{n}": torch.full((1 << 17,), float(step + n)) for n in range(24)} for step in range(3)]
    write_run(root / "run", tensors, STEPS)
    yield root / "run"
    shutil.rmtree(root)


def _shrink(file: Path) -> None:
    with file.open("r+b") as opened:
        opened.truncate(5_000)


def _write_into(file: Path) -> None:
    with file.open("r+b") as opened:
        opened.seek(-8, os.SEEK_END)
        opened.write(b"\0" * 8)


def _replace(file: Path) -> None:
    other = file.with_suffix(".new")
    other.write_bytes(file.read_bytes())
    other.replace(file)


HAPPENS: dict[str, tuple[Callable[[Path], None], str]] = {
    "shrinks": (_shrink, "ends at byte 5,000|was changed"),
    "is emptied": (lambda file: os.truncate(file, 0), "ends at byte 0|was changed"),
    "is written to": (_write_into, "was changed or replaced while it was read"),
    "is replaced": (_replace, "was changed or replaced while it was read"),
}


@pytest.mark.parametrize(("what", "scheme"), thinned(HAPPENS, [ckavg.Mean(), ckavg.PEMA()], every=2))
def test_a_file_that_changes_while_it_is_read(large: Path, tmp_path: Path, what: str, scheme: Any) -> None:
    happen, expected = HAPPENS[what]
    run = tmp_path / "run"
    shutil.copytree(large, run)
    file = run / "checkpoint-10" / MODEL
    happened = False

    def on_progress(news: ckavg.Progress) -> None:
        nonlocal happened
        if news.done and not happened:
            happened = True
            happen(file)

    with pytest.raises(ckavg.CkavgError, match=expected) as met:
        ckavg.average(ckavg.open_run(run), scheme, on_progress=on_progress)
    assert str(file) in met.value.message
    assert happened
    assert set(visible(run / "averaged")) <= {"path.json"}  # of what had not changed


@pytest.mark.parametrize("scheme", [ckavg.Mean(), ckavg.PEMA()], ids=["mean", "pema"])
def test_a_checkpoint_that_is_deleted_while_it_is_read(large: Path, tmp_path: Path, scheme: Any) -> None:
    """As a trainer does that keeps the newest few."""
    run = tmp_path / "run"
    shutil.copytree(large, run)
    happened = False

    def on_progress(news: ckavg.Progress) -> None:
        nonlocal happened
        if news.done and not happened:
            happened = True
            shutil.rmtree(run / "checkpoint-10")

    with pytest.raises(ckavg.CkavgError, match="cannot be read: No such file or directory") as met:
        ckavg.average(ckavg.open_run(run), scheme, out=tmp_path / "out", on_progress=on_progress)
    assert str(run / "checkpoint-10" / MODEL) in met.value.message
    assert not (tmp_path / "out").exists()


def test_what_is_a_change(large: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(large, run)
    checkpoints = ckavg.open_run(run).checkpoints
    files = [run / f"checkpoint-{step}" / MODEL for step in STEPS]
    (tmp_path / "link").hardlink_to(files[0])
    files[0].chmod(0o600)
    files[0].read_bytes()
    check_unchanged(checkpoints)
    files[0].touch()
    _replace(files[1])
    files[2].unlink()
    with pytest.raises(CombinedError) as met:
        check_unchanged(checkpoints)
    assert [type(each) for each in met.value.errors] == [ChangedError, ChangedError, ReadError]


@pytest.mark.parametrize("change", all_but((-3600.0, 1e6), [-1e6, -3600.0, 1e6, -2e9]), ids=str)
def test_clocks_that_are_set(run: Path, monkeypatch: pytest.MonkeyPatch, change: float) -> None:
    """While the program runs, and between two runs."""
    clean = run_cli("pema", run, "--quiet", "--out", run.parent / "clean")
    assert clean.exit_code == 0
    shutil.rmtree(run / "averaged")
    real, real_ns = time.time, time.time_ns
    calls = 0

    def shifted() -> float:
        nonlocal calls
        calls += 1
        return change if calls % 2 else 0.0

    monkeypatch.setattr(time, "time", lambda: real() + shifted())
    monkeypatch.setattr(time, "time_ns", lambda: real_ns() + int(shifted() * 1e9))
    for _ in range(2):
        result = run_cli("pema", run, "--quiet", "--force")
        assert result.exit_code == 0, result.stderr
        assert (run / "averaged" / "pema-gamma0.15" / MODEL).read_bytes() == (run.parent / "clean" / MODEL).read_bytes()


@pytest.mark.parametrize("stamp", all_but((-1, 2**31), [0, -1, -(10**9), 2**31, 4 * 10**9, 10**10]), ids=str)
def test_times_of_files(run: Path, stamp: int) -> None:
    for path in (*run.rglob("*"), run):
        os.utime(path, (stamp, stamp))
    before = sources(run)
    for _ in range(2):
        assert run_cli("pema", run, "--quiet", "--force").exit_code == 0
    assert run_cli("inspect", run, "--json").exit_code == 0
    assert sources(run) == before
