"""Links, pipes and folders in the place of what ckavg writes: an archive may bring them, and nothing is lost by them.

Whatever is planted leads to a checkpoint. A command does without it, or is refused with one message that names it.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import signal
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from types import FrameType

import pytest

import ckavg
from ckavg.storage.download import complete
from ckavg.storage.objects import Downloads
from tests.cli.runner import run_cli
from tests.exhaustive import all_but, thinned
from tests.hostile.contract import MODEL, check_text, sources, write_small_run

KINDS = ("folder link", "file link", "hard link", "dangling", "pipe", "folder")
VICTIM = "checkpoint-10"


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A small run; what waits for a pipe is ended."""

    def ended(number: int, frame: FrameType | None) -> None:
        raise TimeoutError("it waits")

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr("ckavg.engine.stream.SECONDS_BETWEEN_NOTES", 0.0)
    before = signal.signal(signal.SIGALRM, ended)
    signal.alarm(60)
    yield write_small_run(tmp_path / "run", shards=2)
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


def plant(place: Path, kind: str, run: Path) -> None:
    """Put something in a place that leads to a checkpoint, or waits for somebody."""
    victim = run / VICTIM / MODEL
    place.parent.mkdir(parents=True, exist_ok=True)
    if place.is_dir():
        shutil.rmtree(place)
    place.unlink(missing_ok=True)
    if kind == "folder link":
        place.symlink_to(os.path.relpath(victim.parent, place.parent))
    elif kind == "file link":
        place.symlink_to(os.path.relpath(victim, place.parent))
    elif kind == "hard link":
        place.hardlink_to(victim)
    elif kind == "dangling":
        place.symlink_to(run / VICTIM / "nothing")
    elif kind == "pipe":
        os.mkfifo(place)
    else:
        place.mkdir()
        (place / "thesis.tex").write_text("three years")
        os.utime(place / "thesis.tex", (0, 0))
        os.utime(place, (0, 0))


def state(place: Path) -> object:
    """What a planted thing is; of a folder, what is in it."""
    status = place.lstat()
    return status.st_ino, status.st_mode, status.st_nlink, sorted(os.listdir(place)) if place.is_dir() else None  # noqa: PTH208


def check(run: Path, place: Path, *words: str | Path, allowed: tuple[int, ...] = (0, 1)) -> int:
    """Run a command; neither what was planted nor the checkpoints are touched. Its status."""
    before, planted = sources(run), state(place)
    done = run_cli(*words, "--quiet")
    assert sources(run) == before
    assert state(place) == planted
    assert done.exit_code in allowed, done.stderr
    assert done.stderr.count("error: ") == done.exit_code, done.stderr
    assert not done.exit_code or str(place) in done.stderr, done.stderr
    check_text(done.stderr)
    return done.exit_code


REFUSED = (
    ("averaged", ("mean",)),
    ("averaged/mean", ("mean",)),
    ("averaged/.mean.ckavg-partial", ("mean",)),
    ("averaged/mean", ("sweep", "mean")),
    ("averaged/.mean.ckavg-partial", ("sweep", "mean")),
)
"""Without what is there no result can be written."""


@pytest.mark.parametrize(("case", "kind"), thinned(REFUSED, KINDS), ids=str)
def test_in_the_place_of_a_result(run: Path, case: tuple[str, tuple[str, ...]], kind: str) -> None:
    name, (verb, *schemes) = case
    plant(run / name, kind, run)
    if name == "averaged" and kind == "folder":
        pytest.skip("that is a folder")
    for more in (("--dry-run",), (), ("--force",)):
        if more == ("--dry-run",) and kind == "folder" and "partial" in name:
            continue  # looked into only once nobody else can write there
        assert check(run, run / name, verb, run, *schemes, *more) == 1


@pytest.mark.parametrize("kind", all_but(("folder link", "hard link"), KINDS))
def test_in_a_directory_that_a_user_named(run: Path, kind: str) -> None:
    plant(run / "out" / "mean", kind, run)
    assert check(run, run / "out" / "mean", "sweep", run, "mean", "--force", "--out", run / "out") == 1


@pytest.mark.parametrize("kind", all_but(("folder link", "hard link"), KINDS))
def test_where_an_earlier_result_would_be_kept(run: Path, kind: str) -> None:
    assert run_cli("mean", run, "--quiet", "--last", "2", "--out", run / "averaged" / "mean").exit_code == 0
    earlier = {path.name: path.read_bytes() for path in (run / "averaged" / "mean").iterdir()}
    aside = run / "averaged" / ".mean.ckavg-replaced"
    plant(aside, kind, run)
    assert check(run, aside, "mean", run, "--force") == 1
    assert {path.name: path.read_bytes() for path in (run / "averaged" / "mean").iterdir()} == earlier
    for words in (("verify", run / "averaged" / "mean"), ("inspect", run), ("ema", run)):
        check(run, aside, *words, allowed=(0,))


INSIDE = (
    MODEL,
    ".ckavg-journal-0",
    ".ckavg-journal-1",
    "ckavg.json",
    "README.md",
    "config.json",
    "checkpoint-10",
    ".ckavg-rank-0",
    ".ckavg-agreed-parts-paths",
    ".ckavg-job.json",
)


@pytest.mark.parametrize(("name", "kind"), thinned(INSIDE, KINDS))
def test_in_what_an_interrupted_average_has_left(
    run: Path, monkeypatch: pytest.MonkeyPatch, name: str, kind: str
) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(import_module("ckavg.averaging.publish"), "completed", interrupt)
        with pytest.raises(KeyboardInterrupt):
            ckavg.average(ckavg.open_run(run), ckavg.Mean())
    partial = run / "averaged" / ".mean.ckavg-partial"
    assert (partial / ".ckavg-journal-0").is_file()
    name = min(path.name for path in partial.glob("*.safetensors")) if name == MODEL else name
    plant(partial / name, kind, run)
    if kind == "folder" and name.startswith("checkpoint"):
        pytest.skip("that of a snapshot is a folder")
    for words in (("mean", run), ("mean", run, "--force"), ("inspect", run), ("ema", run)):
        check(run, partial / name, *words, allowed=(1,) if words[0] == "mean" else (0,))
    for path in (*partial.iterdir(), partial):
        if path.name != name:
            os.utime(path, (0, 0))
    check(run, partial / name, "ema", run, "--gamma", "0.2", allowed=(0,))


@pytest.mark.parametrize(
    ("name", "kind"), thinned(["averaged", "averaged/path.json", "averaged/.ckavg-partial.path.json"], KINDS)
)
def test_in_the_place_of_the_path(run: Path, name: str, kind: str) -> None:
    """It is kept in the cache then, or under another name for a moment."""
    plant(run / name, kind, run)
    if name == "averaged" and kind == "folder":
        pytest.skip("that is a folder")
    check(run, run / name, "path", run, allowed=(0,))
    check(run, run / name, "pema", run, "--out", run.parent / "out", allowed=(0,))
    assert ckavg.path_length(ckavg.open_run(run)).bytes_read == 0


@pytest.mark.parametrize(("old", "kind"), thinned([False, True], KINDS))
def test_in_the_place_of_the_journal_of_the_path(
    run: Path, monkeypatch: pytest.MonkeyPatch, kind: str, old: bool
) -> None:
    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("ckavg.path.measure._completed", interrupt)
        with pytest.raises(KeyboardInterrupt):
            ckavg.path_length(ckavg.open_run(run))
    (journal,) = (run / "averaged").glob(".path-*")
    plant(journal, kind, run)
    if old and kind != "hard link":
        os.utime(journal, (0, 0), follow_symlinks=False)
    check(run, journal, "pema", run, "--out", run.parent / "out", allowed=(0,))
    other = journal.with_name(".path-of-my-thesis.ckavg-partial")
    other.write_text("three years")
    os.utime(other, (0, 0))
    check(run, other, "path", run, "--every", "20", allowed=(0,))


@pytest.mark.parametrize("kind", all_but(("folder link", "hard link"), KINDS))
def test_beside_a_file_that_a_user_named(run: Path, kind: str) -> None:
    place = run / ".ckavg-partial.table.csv"
    plant(place, kind, run)
    check(run, place, "path", run, "--csv", run.parent / "table.csv", allowed=(0,))
    place = run.parent / ".ckavg-partial.table.csv"
    plant(place, kind, run)
    check(run, place, "path", run, "--csv", run.parent / "table.csv", allowed=(0,))
    assert (run.parent / "table.csv").read_text().startswith("step,")


@pytest.mark.skipif(os.geteuid() != 0, reason="only root may give files away")
@pytest.mark.parametrize(
    ("name", "words"),
    [("averaged/.mean.ckavg-partial/", ("mean",)), ("averaged/.mean.ckavg-partial/" + MODEL, ("mean",))],
)
def test_what_is_of_another_user(run: Path, name: str, words: tuple[str, ...]) -> None:
    """They could change it while it is written."""
    place = run / name
    place.mkdir(parents=True) if name.endswith("/") else place.parent.mkdir(parents=True)
    if not name.endswith("/"):
        place.write_bytes(b"half")
        (place.parent / ".ckavg-journal-0").touch()
    os.chown(place, 12345, 12345)
    assert check(run, place, *words, run) == 1


@pytest.mark.skipif(os.geteuid() != 0, reason="only root may give files away")
def test_a_file_system_that_gives_files_another_owner(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As NFS does with root: what we make there is not ours by its owner, and is continued all the same."""
    (run / "averaged" / ".mean.ckavg-partial").mkdir(parents=True)
    monkeypatch.setattr(os, "geteuid", lambda: 12345)
    assert run_cli("mean", run, "--quiet").exit_code == 0


def test_a_link_that_a_user_named_is_followed(run: Path, tmp_path: Path) -> None:
    """To an empty directory, or an earlier result; anything else is no place for a result."""
    (tmp_path / "disk").mkdir()
    (tmp_path / "link").symlink_to("disk")
    for more in ((), ("--force",)):
        assert run_cli("mean", run, "--out", tmp_path / "link", "--quiet", *more).exit_code == 0
        assert (tmp_path / "disk" / "ckavg.json").is_file()
        assert (tmp_path / "link").is_symlink()
    plant(tmp_path / "other", "folder link", run)
    assert check(run, tmp_path / "other", "mean", run, "--force", "--out", tmp_path / "other") == 1


@pytest.mark.parametrize(("name", "kind"), thinned([".thesis.ckavg-partial", ".thesis.ckavg-replaced"], KINDS))
def test_what_has_a_name_like_a_leftover(run: Path, name: str, kind: str) -> None:
    plant(run / "averaged" / name, kind, run)
    for words in (("mean", run), ("inspect", run), ("path", run)):
        check(run, run / "averaged" / name, *words, allowed=(0,))


@pytest.mark.parametrize(
    ("name", "kind"),
    thinned(["files", "files/thesis", "files/" + "0" * 32], ["folder link", "folder"], every=2),
)
def test_in_the_cache(run: Path, tmp_path: Path, name: str, kind: str) -> None:
    """What is there of other runs that are not here is removed once nobody holds its lock: ours alone."""
    (run / VICTIM / ".lock").touch()
    os.utime(run / VICTIM / ".lock", (0, 0))
    place = tmp_path / "cache" / "ckavg" / name
    plant(place, kind, run)
    if kind == "folder" and name == "files/thesis":
        (place / ".lock").touch()
        os.utime(place / ".lock", (0, 0))
    before, planted = sources(run), state(place)
    Downloads("s3://bucket/run").remove()
    assert sources(run) == before
    if (name, kind) != ("files", "folder"):
        assert state(place) == planted


def refused(place: Path) -> contextlib.AbstractContextManager[object]:
    return pytest.raises(ckavg.CkavgError, match=re.escape(str(place)))


@pytest.mark.parametrize(("name", "kind"), thinned(["", ".lock", "inner", "incomplete"], KINDS))
def test_in_the_place_of_what_is_fetched(run: Path, name: str, kind: str) -> None:
    downloads = Downloads("s3://bucket/run")
    place = downloads.target(MODEL, 1)
    planted = {"inner": place.parent, "incomplete": place.with_name(f"{MODEL}.incomplete")}.get(
        name, place.parent.parent / name
    )
    plant(planted, kind, run)
    before = sources(run)
    with contextlib.nullcontext() if kind == "folder" and name in ("", "inner") else refused(planted):
        downloads.hold(place)
        complete(lambda start, stop: bytes(stop - start), 10, place, lambda _: None, url="s3://bucket/run")
        assert place.read_bytes() == bytes(10)
    assert sources(run) == before
    assert os.path.lexists(planted)
