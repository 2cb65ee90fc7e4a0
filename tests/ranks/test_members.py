"""The status file of a process: errors keep their class, and invalid content is rejected."""

from __future__ import annotations

import dataclasses
import inspect
import json
import os
import pickle
from pathlib import Path
from typing import Any

import pytest

from ckavg import errors
from ckavg.engine import failures
from ckavg.engine.failures import OTHER_PROCESS, as_json, from_json
from ckavg.engine.job import RANK_FILE, Job
from ckavg.engine.members import Member, Status, look_at
from ckavg.errors import CkavgError, CombinedError, MissingPartsError, OutputError, RanksError, SettingError
from ckavg.storage.journal import Journal, JournalReader, as_line

STATUS = Status("a", "launch", 0, 2, "host", 7)


def sent(error: BaseException) -> Any:
    return from_json(json.loads(json.dumps(as_json(error))))


# --- errors ---


def every_error() -> list[CkavgError]:
    kinds = [kind for _, kind in inspect.getmembers(errors, inspect.isclass) if issubclass(kind, CkavgError)]
    plain: list[CkavgError] = [
        kind("what", hint="do", command="this") for kind in kinds if kind not in (CombinedError, MissingPartsError)
    ]
    return [*plain, CombinedError([plain[0], SettingError("two\nlines", hint="and a hint")])]


@pytest.mark.parametrize("error", every_error(), ids=lambda error: type(error).__name__)
def test_our_errors_arrive_as_what_they_are(error: CkavgError) -> None:
    error.add_note("What was measured is kept.")
    try:
        raise error
    except CkavgError as raised:
        got = sent(raised)
    assert (type(got), got.message, got.hint, got.command) == (type(error), error.message, error.hint, error.command)
    kept, trace = got.__notes__
    assert kept == "What was measured is kept."
    assert trace.startswith(OTHER_PROCESS + "Traceback (most recent call last)")
    assert "in test_our_errors_arrive" in trace
    if isinstance(error, CombinedError):
        assert [(type(each), each.message, each.hint) for each in got.errors] == [
            (type(each), each.message, each.hint) for each in error.errors
        ]
    assert len(sent(got).__notes__) == 2  # from hand to hand, the traceback is that of the first


class _OfNobodyElseError(CkavgError):
    pass


class _SpeechlessError(Exception):
    def __str__(self) -> str:
        raise ValueError


@pytest.mark.parametrize(
    ("error", "kind", "text"),
    [
        (KeyboardInterrupt(), KeyboardInterrupt, ""),
        (MemoryError(), MemoryError, ""),
        (SystemExit(130), SystemExit, "130"),
        (SystemExit("why"), SystemExit, "1"),
        (OSError(28, "No space", "a"), OSError, "[Errno 28] No space: 'a'"),
        (OSError(28, "No space"), OSError, "[Errno 28] No space"),
        (FileNotFoundError(2, "No such file", Path("a")), FileNotFoundError, "[Errno 2] No such file: 'a'"),
        (TimeoutError("awaited"), RuntimeError, "TimeoutError: awaited"),
        (ZeroDivisionError("division by zero"), RuntimeError, "ZeroDivisionError: division by zero"),
        (_OfNobodyElseError("what", hint="do"), RuntimeError, "_OfNobodyElseError: what"),
        (_SpeechlessError(), RuntimeError, "_SpeechlessError: "),
        (MissingPartsError([1], 2, "pass 1"), RanksError, "Part 1/2 has not finished its share of pass 1."),
    ],
)
def test_other_exceptions(error: BaseException, kind: type[BaseException], text: str) -> None:
    got = sent(error)
    assert (type(got), str(got).partition("\n")[0]) == (kind, text)
    assert got.__notes__[-1].startswith(OTHER_PROCESS)


@pytest.mark.parametrize("name", ["functools", "Any", "listed", "raise_all", "__builtins__", "Exception", "eval", ""])
def test_no_other_name_makes_an_error_of_its_own(name: str) -> None:
    got = from_json([name, "id", "", ""])
    assert (type(got), str(got)) == (RuntimeError, f"{name}: id")


def test_no_error_commands_a_terminal() -> None:
    """The text of an exception from outside is printed as it is, and so are notes."""
    got = from_json(["X", "\x1b]0;title\x07a\nb", "", "", "\x1b[2J"])
    assert str(got) == "X: \\x1b]0;title\\x07a\nb"
    assert got.__notes__ == ["\\x1b[2J"]


def test_nothing_between_processes_can_unpickle() -> None:
    for module in Path(failures.__file__).parent.glob("*.py"):
        for word in ("pickle", "marshal", "shelve", "eval(", "exec(", "torch.load("):
            assert word not in module.read_text(), (module, word)


# --- files ---


def test_what_is_told_is_seen_and_held(tmp_path: Path) -> None:
    path = tmp_path / "file"
    member = Member(path, STATUS)
    status = dataclasses.replace(STATUS, locks=member.status.locks)
    assert status.locks
    assert look_at(path) == (status, True)
    member.tell(beat=1, at="here, where the text is longer")
    member.tell(beat=2, at="here")
    assert look_at(path) == (dataclasses.replace(status, beat=2, at="here"), True)
    with pytest.raises(BlockingIOError, match="process 7 on host"):
        Member(path, STATUS)
    member.tell(state="left")
    member.close()
    member.tell(state="working")
    assert look_at(path) == (dataclasses.replace(status, beat=2, at="here", state="left"), False)
    Member(path, STATUS).close()
    assert [each.name for each in tmp_path.iterdir()] == ["file"]


def valid(**changes: object) -> bytes:
    return as_line(dataclasses.asdict(STATUS) | changes)


HOSTILE = {
    "pickle": pickle.dumps(print),
    "no JSON": b"{",
    "nothing": b"",
    "no text": b"\xff\xfe",
    "half a line": valid()[:-9],
    "no checksum": valid()[9:],
    "other fields": valid(more=1),
    "no object": as_line([1]),
    "another type": valid(rank="0"),
    "a number that is true": valid(rank=True),
    "another state": valid(state="asleep"),
    "an error that is none": valid(error="eval"),
    "deep": b"[" * 100_000,
    "a long number": b"9" * 100_000,
}


@pytest.mark.parametrize("name", HOSTILE)
def test_nothing_comes_of_what_is_no_such_file(tmp_path: Path, name: str) -> None:
    (tmp_path / "file").write_bytes(HOSTILE[name])
    assert look_at(tmp_path / "file") is None
    (tmp_path / "link").symlink_to("file")
    os.mkfifo(tmp_path / "pipe")
    assert [look_at(tmp_path / other) for other in ("link", "pipe", "none")] == [None] * 3


def joined(directory: Path, **changes: Any) -> Job:
    """The second of two processes, the first of which says something."""
    first = Member(directory / f"{RANK_FILE}0", STATUS)
    job = Job(directory, 1, 2, launch="launch", timeout=60)
    job.join()
    first.tell(**changes)
    return job


@pytest.mark.parametrize(
    "error", [[], ["X"], [[], [], [], []], ["CombinedError", 1, 2, 3], ["SystemExit", "a", "", ""]]
)
def test_an_error_that_is_none_ends_the_job_all_the_same(tmp_path: Path, error: list[Any]) -> None:
    job = joined(tmp_path, state="failed", error=error)
    with pytest.raises((RanksError, RuntimeError)):
        job.wait(lambda: [0], "something")


def test_an_error_is_raised_as_it_is(tmp_path: Path) -> None:
    job = joined(tmp_path, state="failed", error=as_json(SettingError("no", hint="yes")))
    with pytest.raises(SettingError, match="no"):
        job.wait(lambda: [0], "something")


def test_another_job_is_refused(tmp_path: Path) -> None:
    first = Member(tmp_path / f"{RANK_FILE}0", STATUS)
    for job in (Job(tmp_path, 1, 2, launch="other"), Job(tmp_path, 1, 3, launch="launch")):
        with pytest.raises(OutputError, match=r"Another job is writing to .* process 7 on host is its first"):
            job.join()
    first.close()


# --- journals ---


def test_a_journal_is_read_as_it_grows(tmp_path: Path) -> None:
    path = tmp_path / "journal"
    reader = JournalReader(path, "key")
    assert reader.read() == {}
    Journal(path, "key").close()
    assert reader.read() == {}
    journal = Journal(path, "key")
    journal.add({1: [0.1], 2: None})
    assert reader.read() == {1: [0.1], 2: None}
    assert reader.read() == {}
    line = as_line([3, "x"])
    with path.open("ab") as file:
        file.write(line[:5])
    assert reader.read() == {}
    with path.open("ab") as file:
        file.write(line[5:] + b"garbage\n" + as_line([4, "y"]))
    assert reader.read() == {3: "x", 4: "y"}
    Journal(path, "other").add({1: 1})
    assert reader.read() == {}
    assert JournalReader(path, "other").read() == {1: 1}
