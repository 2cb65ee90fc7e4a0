"""Kills ckavg again and again, at random moments and at every call that matters, and has each killed command run again.

Run as a program with a run's directory, a number of random moments, a seed, and whether `some` calls of each kind are
enough or `all` of them are to be tried; prints what came of every trial as JSON.
It imports everything once, and every command is a fork of it: a second or so is saved each time.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import ckavg.averaging.pipeline
import ckavg.averaging.replay
import ckavg.cli.average
import ckavg.engine.stream
import ckavg.path.measure
from ckavg.cli import main
from ckavg.output.output_path import LOCAL

CALLS = ("fsync", "rename", "replace", "mkdir", "unlink", "rmdir", "truncate", "pwrite", "open")
NAME = "pema-gamma0.15"
VOLATILE = ("bytes_read", "seconds", "path_kernel")


def forked(words: list[str], before: Callable[[], None] = lambda: None) -> int:
    """Start a command in a process of its own, whose blocks are noted as they are finished."""
    pid = os.fork()
    if pid:
        return pid
    for stream in (1, 2):
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream)
    ckavg.engine.stream.SECONDS_BETWEEN_NOTES = 0.0
    sys.argv = ["ckavg", *words]
    before()
    main()
    os._exit(99)


def status_of(pid: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def kill_at(call: str, number: int) -> Callable[[], None]:
    """In the child: be killed just before a call of this kind, counted from 1."""

    def arrange() -> None:
        real = getattr(os, call)
        count = 0

        def counted(*arguments: Any, **options: Any) -> Any:
            nonlocal count
            count += 1
            if count == number:
                os.kill(os.getpid(), signal.SIGKILL)
            return real(*arguments, **options)

        setattr(os, call, counted)

    return arrange


def contents(directory: Path) -> dict[str, Any]:
    """Every file below a directory, by relative path; of a record, what does not hang on the time."""
    found: dict[str, Any] = {}
    for path in sorted(directory.rglob("*")):
        if path.is_file():
            data: Any = path.read_bytes()
            if path.name == "ckavg.json":
                data = {key: value for key, value in json.loads(data).items() if key not in VOLATILE}
            if path.name == LOCAL:  # which knows the very files that were read and written
                data = json.loads(data)["made"]["recipe"]
            found[str(path.relative_to(directory))] = data
    return found


def prepared(source: Path, *, earlier: Path | None) -> list[str]:
    """An empty place, or one with an earlier result in it, and the words of the command."""
    shutil.rmtree(source / "averaged", ignore_errors=True)
    words = ["pema", str(source), "-q"]
    if earlier is not None:
        shutil.copytree(earlier, source / "averaged" / NAME)
        words.append("--force")
    return words


def trial(source: Path, expected: dict[str, Any], earlier: Path | None, pid: int) -> dict[str, Any]:
    """What a killed command has left, and what the same command makes of it."""
    killed = status_of(pid) == -signal.SIGKILL
    out = source / "averaged" / NAME
    there = contents(out) if out.exists() else None
    before = [None] if earlier is None else [contents(earlier)]
    if earlier is not None and there is None:  # between two renames: the earlier result has another name
        there = contents(source / "averaged" / f".{NAME}.ckavg-replaced")
    whole = there in (*before, expected)
    words = ["pema", str(source), "-q", *(["--force"] if earlier is not None else [])]
    status = status_of(forked(words))
    left = sorted(path.name for path in (source / "averaged").iterdir())
    record = json.loads((out / "ckavg.json").read_text())
    return {
        "killed": killed,
        "whole": whole,
        "status": status == 0,  # what was done by then is up to date
        "same": contents(out) == expected,
        "left": [name for name in left if name not in (NAME, "path.json")],
        "bytes_read": record["bytes_read"],
    }


def timed(source: Path) -> float:
    """How long the command takes by itself, in seconds."""
    words = prepared(source, earlier=None)
    begun = time.perf_counter()
    assert status_of(forked(words)) == 0
    return time.perf_counter() - begun


def trials(source: Path, moments: int, seed: int, which: str) -> Iterator[dict[str, Any]]:
    chosen = random.Random(seed)
    earlier = source.parent / "earlier"
    assert status_of(forked(["ema", str(source), "--gamma", "0.5", "-q", "--out", str(earlier)])) == 0
    seconds = min(timed(source) for _ in range(3))
    expected = contents(source / "averaged" / NAME)
    killed = number = 0
    while killed < moments:  # some moments come when all is done
        place = earlier if number % 2 else None
        pid = forked(prepared(source, earlier=place))
        time.sleep(seconds * chosen.random())
        os.kill(pid, signal.SIGKILL)
        came = trial(source, expected, place, pid)
        yield {"at": "moment", "number": number} | came
        killed, number = killed + came["killed"], number + 1
    for call in CALLS:
        for place in (None, earlier):
            killed, number = True, 1
            while killed and (which == "all" or call == "rename" or number == 1):
                pid = forked(prepared(source, earlier=place), kill_at(call, number))
                came = trial(source, expected, place, pid)
                killed = came["killed"]
                if killed:
                    yield {"at": call, "number": number} | came
                number += 1 if number < 4 else 9


if __name__ == "__main__":
    print(json.dumps(list(trials(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), sys.argv[4]))))  # noqa: T201
