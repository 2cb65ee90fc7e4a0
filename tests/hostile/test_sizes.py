"""Headers that are made to take memory or time: refused within a bound, whatever they ask for."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from pathlib import Path

import pytest

from ckavg.checkpoints.headers import MAX_HEADER_BYTES, MOST_VALUES
from tests.environment.process import PEAK, check_message, ckavg
from tests.exhaustive import all_but
from tests.hostile.contract import MODEL, visible, write_small_run

MOST_PEAK = 700_000_000
"""Bytes of a process that reads one header of 100 MB: what Python builds of the values that are let through."""

ENTRY = b'"%07x":{"dtype":"F32","shape":[0],"data_offsets":[0,0]}'


def _entries(count: int) -> bytes:
    return b"{" + b",".join(ENTRY % number for number in range(count)) + b"}"


HEADERS: dict[str, tuple[Callable[[], bytes], str]] = {
    "deep": (lambda: b"[" * MAX_HEADER_BYTES, "more than"),
    "deep within the limit": (lambda: b"[" * (MOST_VALUES - 2), "recursion"),
    "lists": (lambda: b'{"w":[' + b"[]," * (MAX_HEADER_BYTES // 3 - 4) + b"[]]}", "more than"),
    "lists within the limit": (lambda: b'{"w":[' + b"[]," * (MOST_VALUES // 2 - 4) + b"[]]}", "lacks dtype"),
    "a million tensors": (lambda: _entries(1_000_000), "more than"),
    "half a million tensors": (lambda: _entries(MOST_VALUES // 8 - 1), "without elements"),
    "repeated": (lambda: b"{" + b'"w":0,' * (MOST_VALUES - 4) + b'"w":0}', "appears twice"),
    "a long name": (lambda: b'{"' + b"x" * (MAX_HEADER_BYTES - 10) + b'":0}', "lacks dtype"),
    "a long number": (lambda: b'{"w":' + b"9" * (MAX_HEADER_BYTES - 10) + b"}", "integer string"),
    "a long shape": (
        lambda: b'{"w":{"dtype":"F32","data_offsets":[0,0],"shape":[' + b"4611686018427387904," * 1_900_000 + b"1]}}",
        "needs too many bytes",
    ),
    "spaces": (lambda: b"{" + b" " * (MAX_HEADER_BYTES - 2) + b"}", "holds no tensors"),
    "zeros": (lambda: b"", "corrupt header"),
}


def inspected(run: Path) -> tuple[dict[str, list[str]], int]:
    peak = run.parent / "peak"
    done = ckavg("inspect", "--json", run, before=PEAK, env={"PEAK": str(peak)}, timeout=100)
    assert b"Traceback" not in done.stderr
    assert done.returncode == 1
    found: dict[str, list[str]] = json.loads(done.stdout)
    return found, int(peak.read_text())


TYPICAL = ("deep", "lists within the limit", "a long number", "zeros")


@pytest.mark.parametrize("name", all_but(TYPICAL, HEADERS))
def test_one_header(tmp_path: Path, name: str) -> None:
    make, expected = HEADERS[name]
    run = write_small_run(tmp_path / "run")
    text = make()
    with (run / "checkpoint-20" / MODEL).open("wb") as file:
        file.write(struct.pack("<Q", len(text) or MAX_HEADER_BYTES) + text)
        file.truncate(8 + (len(text) or MAX_HEADER_BYTES))
    found, peak = inspected(run)
    (problem, *_) = found["problems"]
    assert "checkpoint-20" in problem or problem.startswith("step 20: ")
    assert expected in problem
    assert len(problem) < 2_000
    assert peak < MOST_PEAK


def test_a_length_beyond_the_disk_allocates_nothing(tmp_path: Path) -> None:
    run = write_small_run(tmp_path / "run")
    with (run / "checkpoint-20" / MODEL).open("wb") as file:
        file.write(struct.pack("<Q", 2**63))
        file.truncate(1 << 42)
    found, peak = inspected(run)
    assert "claims a header of 9,223,372,036,854,775,808 bytes" in found["problems"][0]
    assert peak < 150_000_000


def test_where_memory_ends(tmp_path: Path) -> None:
    """A limit on the address space that the header just fits into, but not what Python makes of it."""
    run = write_small_run(tmp_path / "run")
    text = b'{"w":[' + b"[]," * (MOST_VALUES // 2 - 4) + b"[]]}"
    (run / "checkpoint-20" / MODEL).write_bytes(struct.pack("<Q", len(text)) + text)
    limit = "import resource; resource.setrlimit(resource.RLIMIT_AS, (150 << 20, 150 << 20))\n"
    done = ckavg("mean", "--quiet", run, before="import ckavg.cli.app\n" + limit)
    check_message(done, "not enough memory")
    assert not visible(run / "averaged")
