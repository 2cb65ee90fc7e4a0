"""stdin, stdout and stderr that take nothing, and terminals that show little."""

from __future__ import annotations

import json
import os
import pty
import resource
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest

from tests.cli.runner import placeless, run_cli
from tests.environment.process import ROOT, check_message, ckavg
from tests.exhaustive import all_but, thinned
from tests.hostile.contract import MODEL, sources, visible, write_small_run

FULL = Path("/dev/full")
VERBS = (("inspect",), ("mean", "--json"), ("path",), ("mean", "--quiet"), ("sweep", "RUN", "mean", "last"))
QUICK = (("inspect",), ("mean", "--dry-run"))
"""Verbs that do not wait for torch."""


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return write_small_run(tmp_path / "run")


def of_verb(verb: tuple[str, ...], run: Path) -> list[str]:
    return [str(run) if word == "RUN" else word for word in (verb if "RUN" in verb else (*verb, "RUN"))]


def closing(*streams: int) -> Callable[[], None]:
    def close() -> None:
        for stream in streams:
            os.close(stream)

    return close


@pytest.mark.parametrize("verb", all_but(VERBS[1:2], VERBS), ids=" ".join)
@pytest.mark.parametrize("streams", all_but(((0, 1, 2),), [(1,), (2,), (0, 1, 2)]), ids=str)
def test_closed(run: Path, verb: tuple[str, ...], streams: tuple[int, ...]) -> None:
    before = sources(run)
    done = ckavg(*of_verb(verb, run), preexec=closing(*streams))
    assert done.returncode == 0
    assert b"Traceback" not in done.stderr
    assert (done.stdout == b"") == (1 in streams)
    assert sources(run) == before
    if verb[-1] in ("--json", "last"):
        result = run / "averaged" / "mean"
        assert run_cli("mean", run, "--out", run / "averaged" / "again", "--quiet").exit_code == 0
        assert (result / MODEL).read_bytes() == (run / "averaged" / "again" / MODEL).read_bytes()


def test_nothing_is_printed_into_a_result(run: Path) -> None:
    """A library that writes to a number instead of a stream must not meet a weight file there."""
    shout = """
import os
import ckavg.averaging.replay as replay
quiet = replay.stream_groups
def shout(*arguments):
    os.write(1, b"x" * 99)
    os.write(2, b"x" * 99)
    return quiet(*arguments)
replay.stream_groups = shout
"""
    done = ckavg("mean", run, "--quiet", before=shout, preexec=closing(1, 2))
    assert done.returncode == 0
    assert run_cli("mean", run, "--quiet", "--out", run / "averaged" / "again").exit_code == 0
    for file in (run / "averaged" / "again").glob("*.safetensors"):
        assert (run / "averaged" / "mean" / file.name).read_bytes() == file.read_bytes()


@pytest.mark.skipif(not FULL.exists(), reason="no device that is always full")
@pytest.mark.parametrize(
    "verb",
    [
        *all_but(VERBS[1:2], VERBS),
        *all_but((("--help",),), [*QUICK[1:], ("--help",), ("--version",), ("mean", "--help")]),
    ],
    ids=" ".join,
)
def test_stdout_is_full(run: Path, verb: tuple[str, ...]) -> None:
    arguments = of_verb(verb, run) if not verb[-1].startswith(("--help", "--version")) else list(verb)
    with FULL.open("wb") as full:
        done = ckavg(*arguments, stdout=full)
    check_message(done, "stdout cannot be written: No space left on device")
    if verb == ("mean", "--json"):
        assert visible(run / "averaged") == ["mean"]


@pytest.mark.skipif(not FULL.exists(), reason="no device that is always full")
@pytest.mark.parametrize("verb", all_but(VERBS[1:2], VERBS), ids=" ".join)
def test_stderr_is_full(run: Path, verb: tuple[str, ...]) -> None:
    with FULL.open("wb") as full:
        done = ckavg(*of_verb(verb, run), stderr=full)
        assert done.returncode == 0
        assert done.stdout
        refused = ckavg("mean", run / "nowhere", stderr=full)
        assert refused.returncode == 1


@pytest.mark.parametrize("verb", all_but(VERBS[1:2], VERBS), ids=" ".join)
def test_nobody_reads_to_the_end(run: Path, verb: tuple[str, ...]) -> None:
    reading, writing = os.pipe()
    os.close(reading)
    done = ckavg(*of_verb(verb, run), stdout=writing)
    os.close(writing)
    assert done.returncode == 1
    assert b"Traceback" not in done.stderr
    assert b"rror" not in done.stderr


def test_head_takes_a_line(run: Path) -> None:
    for step in range(30, 60):
        (run / f"checkpoint-{step}").symlink_to("checkpoint-10")
    line = f"{sys.executable} -m ckavg inspect --json '{run}' | head -1"
    done = subprocess.run(
        ["bash", "-c", line], capture_output=True, env=os.environ | {"PYTHONPATH": str(ROOT)}, check=True
    )
    assert (done.stdout, done.stderr) == (b"{\n", b"")


ASCII = {"LC_ALL": "C", "LANG": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "PYTHONIOENCODING": "ascii"}


@pytest.mark.parametrize(
    "locale", all_but((ASCII,), [ASCII, {**ASCII, "LC_ALL": "POSIX", "PYTHONIOENCODING": ""}]), ids=["ascii", "POSIX"]
)
@pytest.mark.parametrize("verb", all_but(VERBS[1:2], VERBS), ids=" ".join)
def test_locales_without_text(tmp_path: Path, verb: tuple[str, ...], locale: Mapping[str, str]) -> None:
    run = write_small_run(tmp_path / "modèle 模型")
    done = ckavg(*of_verb(verb, run), env=locale)
    assert done.returncode == 0, done.stderr
    if verb[-1] == "--quiet":  # a path is printed to the byte
        assert done.stdout == os.fsencode(run / "averaged" / "mean") + b"\n"
    else:
        assert done.stdout.isascii()
    assert done.stderr.isascii()
    assert b"Traceback" not in done.stderr
    if verb[-1] == "--json":
        record = json.loads(done.stdout)
        assert os.fsencode(record["source"]) == os.fsencode(run)
        written = json.loads((run / "averaged" / "mean" / "ckavg.json").read_text())
        assert placeless(written) == placeless(record)
        assert (run / "averaged" / "mean" / "README.md").read_text().startswith("---\n")


@pytest.mark.parametrize(
    ("env", "verb"),
    thinned([{"TERM": "dumb"}, {"COLUMNS": "1"}, {"COLUMNS": "0"}, {"TERM": "", "NO_COLOR": ""}], [*QUICK, ("mean",)]),
    ids=str,
)
def test_terminals(run: Path, verb: tuple[str, ...], env: Mapping[str, str]) -> None:
    """All three streams are a terminal, of which everything is read."""
    ours, theirs = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-m", "ckavg", *of_verb(verb, run)],
        stdin=theirs, stdout=theirs, stderr=theirs,
        env={key: value for key, value in (os.environ | {"PYTHONPATH": str(ROOT)} | dict(env)).items() if value},
    )  # fmt: skip
    os.close(theirs)
    text = b""
    try:
        while piece := os.read(ours, 1 << 16):
            text += piece
    except OSError:  # how Linux says that the other end is closed
        pass
    os.close(ours)
    assert process.wait(60) == 0, text
    assert b"Traceback" not in text
    assert visible(run / "averaged") == [
        name for name in ("last", "mean", "path.json") if name in visible(run / "averaged")
    ]


def test_where_files_may_not_grow(run: Path) -> None:
    """Beyond such a limit the system sends SIGXFSZ, which ends a program that does not ignore it."""

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100, 100))

    before = sources(run)
    done = ckavg("pema", run, preexec=limit)
    check_message(done, "cannot be written: File too large")
    assert visible(run / "averaged") == []
    assert sources(run) == before
