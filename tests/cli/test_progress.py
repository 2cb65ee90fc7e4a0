"""Progress where nothing is drawn: every stage begins and ends, passes are numbered, and there is no flood of lines."""

from __future__ import annotations

from collections.abc import Iterable

import pytest

from ckavg.cli.progress import show_progress
from ckavg.engine.context import Pass, Progress

MB = 1_000_000


def lines(
    capsys: pytest.CaptureFixture[str], news: Iterable[Progress], *, passes: int = 1, first: str = ""
) -> list[str]:
    """What is said of news, without rates."""
    with show_progress(passes, quiet=False, first=first) as listener:
        assert listener is not None
        for each in news:
            listener(each)
    captured = capsys.readouterr()
    assert captured.out == ""
    return [line.split(" MB, ")[0] for line in captured.err.splitlines()]


def whole(stage: Pass, *, kept: int = 0) -> list[Progress]:
    return [Progress(stage, done * MB, 3 * MB, kept) for done in (0, 1, 3)]


def test_an_average(capsys: pytest.CaptureFixture[str]) -> None:
    news = [*whole("path", kept=2 * MB), *whole("replay"), *whole("files")]
    assert lines(capsys, news, passes=2, first="reading 3 checkpoints") == [
        "reading 3 checkpoints",
        "pass 1 of 2, measuring the path: 3.0 MB; 2.0 MB more were done before it was interrupted",
        "pass 1 of 2, measuring the path: 100 %, 3.0 of 3.0",
        "pass 2 of 2, averaging: 3.0 MB",
        "pass 2 of 2, averaging: 100 %, 3.0 of 3.0",
        "syncing and hashing: 3.0 MB",
        "writing card and record",
    ]


def test_several_readings_are_numbered_on(capsys: pytest.CaptureFixture[str]) -> None:
    one = [*whole("fetch"), *whole("path"), *whole("replay"), *whole("files")]
    said = lines(capsys, [*one, *one[3:]], passes=5)
    begun = [line.removesuffix(": 3.0 MB") for line in said if line.endswith(": 3.0 MB")]
    assert begun == [
        "pass 1 of 5, fetching",
        *("pass 2 of 5, measuring the path", "pass 3 of 5, averaging", "syncing and hashing"),
        *("pass 4 of 5, measuring the path", "pass 5 of 5, averaging", "syncing and hashing"),
    ]


def test_other_stages_have_no_number(capsys: pytest.CaptureFixture[str]) -> None:
    assert lines(capsys, [*whole("files"), *whole("upload"), Progress("upload", 3 * MB, 3 * MB)]) == [
        *("hashing the files: 3.0 MB", "hashing the files: 100 %, 3.0 of 3.0"),
        *("uploading: 3.0 MB", "uploading: 100 %, 3.0 of 3.0"),
    ]
    assert lines(capsys, [Progress("weights", 0, 0)])[0] == "looking for NaN: 0 bytes"


def test_no_flood(capsys: pytest.CaptureFixture[str]) -> None:
    said = lines(capsys, (Progress("replay", done, 100_000) for done in range(100_001)))
    assert 2 <= len(said) <= 2 + 10


def test_quiet_says_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    with show_progress(1, quiet=True, first="reading") as listener:
        assert listener is None
    assert capsys.readouterr() == ("", "")
