"""A file under its final name is the old one or the new one, never a part of either."""

from __future__ import annotations

import contextlib
import os
import resource
import stat
from collections.abc import Iterator
from pathlib import Path

import pytest

from ckavg.storage.atomic import replacing, write_bytes


@contextlib.contextmanager
def files_no_larger_than(size: int) -> Iterator[None]:
    """As if the disk were full: the system refuses to let any file grow beyond this."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@contextlib.contextmanager
def umask(mask: int) -> Iterator[None]:
    before = os.umask(mask)
    try:
        yield
        assert os.umask(mask) == mask
    finally:
        os.umask(before)


def contents(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir()}


def test_a_new_file(tmp_path: Path) -> None:
    write_bytes(tmp_path / "table.csv", b"new")
    assert contents(tmp_path) == {"table.csv": b"new"}


def test_a_shorter_file_takes_the_place_of_a_longer_one(tmp_path: Path) -> None:
    file = tmp_path / "table.csv"
    file.write_bytes(b"old and long")
    write_bytes(file, b"new")
    assert contents(tmp_path) == {"table.csv": b"new"}


@pytest.mark.parametrize("old", [b"old", None])
def test_a_write_that_fails_leaves_what_was_there(tmp_path: Path, old: bytes | None) -> None:
    file = tmp_path / "table.csv"
    if old is not None:
        file.write_bytes(old)
    with pytest.raises(OSError, match="File too large"), files_no_larger_than(10):
        write_bytes(file, b"new and too long for the disk")
    assert contents(tmp_path) == ({} if old is None else {"table.csv": old})


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit])
def test_any_way_out_leaves_what_was_there(tmp_path: Path, error: type[BaseException]) -> None:
    file = tmp_path / "picture.png"
    file.write_bytes(b"old")

    def write_half() -> None:
        with replacing(file) as partial:
            partial.write_bytes(b"half")
            raise error

    with pytest.raises(error):
        write_half()
    assert contents(tmp_path) == {"picture.png": b"old"}


def test_the_old_file_is_there_until_the_new_one_is_complete(tmp_path: Path) -> None:
    file = tmp_path / "picture.png"
    file.write_bytes(b"old")
    with replacing(file) as partial:
        partial.write_bytes(b"new")
        assert file.read_bytes() == b"old"
        assert (partial.parent, partial.suffix) == (tmp_path, ".png")
        assert partial.name.startswith(".")
    assert contents(tmp_path) == {"picture.png": b"new"}


def test_a_file_opened_before_still_holds_the_old_bytes(tmp_path: Path) -> None:
    file = tmp_path / "table.csv"
    file.write_bytes(b"old")
    with file.open("rb") as opened:
        write_bytes(file, b"new")
        assert opened.read() == b"old"


def test_a_directory_in_its_place_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "table.csv").mkdir()
    with pytest.raises(OSError, match="directory"):
        write_bytes(tmp_path / "table.csv", b"new")
    assert [path.name for path in tmp_path.iterdir()] == ["table.csv"]
    assert (tmp_path / "table.csv").is_dir()


def test_no_directory_is_made_for_it(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        write_bytes(tmp_path / "nowhere" / "table.csv", b"new")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("mask", "mode"), [(0o022, 0o644), (0o077, 0o600), (0o007, 0o660), (0, 0o666)])
def test_the_mode_follows_the_umask(tmp_path: Path, mask: int, mode: int) -> None:
    with umask(mask):
        write_bytes(tmp_path / "table.csv", b"new")
        (tmp_path / "plain").write_bytes(b"as the system makes it")
    for name in ("table.csv", "plain"):
        assert stat.S_IMODE((tmp_path / name).stat().st_mode) == mode


def test_a_link_is_followed(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    target, link = tmp_path / "elsewhere" / "table.csv", tmp_path / "link.csv"
    link.symlink_to(target)
    for data in (b"new", b"newer"):
        write_bytes(link, data)
        assert link.is_symlink()
        assert contents(target.parent) == {"table.csv": data}


def test_a_link_in_a_circle_is_at_most_an_error_of_the_system(tmp_path: Path) -> None:
    link = tmp_path / "link.csv"
    link.symlink_to(link)
    with contextlib.suppress(OSError):
        write_bytes(link, b"new")
    assert [path.name for path in tmp_path.iterdir()] == ["link.csv"]


def test_what_is_no_plain_file_is_not_replaced_by_one(tmp_path: Path) -> None:
    """A pipe here; a user who may write to /dev would lose /dev/null or /dev/stdout in the same way."""
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    try:
        write_bytes(pipe, b"new")
        assert stat.S_ISFIFO(pipe.stat().st_mode)
        assert os.read(reader, 100) == b"new"
    finally:
        os.close(reader)
    assert [path.name for path in tmp_path.iterdir()] == ["pipe"]
