"""Shard indexes that say nothing, or point where they should not."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.exhaustive import few_or_all
from tests.hostile.contract import (
    INDEX,
    MODEL,
    REPEATABLE,
    STEPS,
    check_mean,
    check_refusal,
    mean_of,
    sources,
    visible,
    write_small_run,
)
from tests.hostile.values import spoilt

LAST = f"checkpoint-{STEPS[-1]}"
SHARDS = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")
NAMED = {"w": SHARDS[0], "b": SHARDS[1], "ids": SHARDS[0]}
SOUND = {"metadata": {"total_size": 80}, "weight_map": NAMED}


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return write_small_run(tmp_path / "run", shards=2)


def check_result(run: Path) -> None:
    files = {str(step): [run / f"checkpoint-{step}" / MODEL] for step in STEPS[:-1]}
    check_mean(run, files | {LAST: [run / LAST / name for name in SHARDS]}, run / "averaged" / "mean")
    index = json.loads((run / "averaged" / "mean" / INDEX).read_bytes())
    assert (index["weight_map"], index["metadata"]["total_size"]) == (NAMED, 80)


@pytest.mark.parametrize("examples", few_or_all(25, 150))
def test_spoilt(run: Path, examples: int) -> None:
    seen: set[bytes] = set()

    @settings(REPEATABLE, max_examples=examples)
    @given(spoilt(SOUND) | st.sampled_from(["metadata", "weight_map"]).flatmap(lambda part: spoilt(SOUND, (part,))))
    def check(text: bytes) -> None:
        seen.add(text)
        (run / LAST / INDEX).write_bytes(text)
        result = mean_of(run)
        if result.exit_code:
            check_refusal(result, run, f"{LAST}/{INDEX}", f"{LAST}/", f"step {STEPS[-1]}")
        else:
            assert json.loads(text)["weight_map"] == NAMED
            check_result(run)

    check()
    sys.stdout.write(f"{len(seen)} distinct examples\n")  # shown with -rP
    assert len(seen) >= examples * 5 // 6


PLACES = (
    "../checkpoint-10/model.safetensors", "..", ".", "", "/etc/passwd", "/etc/passwd\0.safetensors", "a/b.safetensors",
    "./model-00002-of-00002.safetensors", "model-00002-of-00002.safetensors/", "~/model.safetensors",
    "model\0.safetensors", "model\n.safetensors",
    "\ud800.safetensors", "é" * 200 + ".safetensors", "x" * 300 + ".safetensors",
    "x" * 70_000 + ".safetensors", "x/" * 2_000 + "y.safetensors", "\x1b[2J.safetensors", "\u202e.safetensors",
    "MODEL.BIN",
    "folder.safetensors", "pipe.safetensors", "dangling.safetensors", "circle.safetensors", "zero.safetensors",
    "passwd.safetensors", "[red].safetensors", "-rf.safetensors", "..safetensors", ".safetensors",
    "model.safetensors\n",
    "socket.safetensors", "absolute", None, True, 3, 1e400, ["model.safetensors"], {"file": "model.safetensors"},
)  # fmt: skip


@pytest.mark.parametrize("number", range(len(PLACES)))
def test_pointing_elsewhere(run: Path, number: int) -> None:
    place = PLACES[number]
    last = run / LAST
    (last / "folder.safetensors").mkdir()
    os.mkfifo(last / "pipe.safetensors")
    (last / "dangling.safetensors").symlink_to("nowhere")
    (last / "circle.safetensors").symlink_to("circle.safetensors")
    (last / "zero.safetensors").symlink_to("/dev/zero")
    (last / "passwd.safetensors").symlink_to("/etc/passwd")
    if place == "absolute":
        place = str(last / SHARDS[1])
    (last / INDEX).write_text(json.dumps({"weight_map": NAMED | {"b": place}}))
    check_refusal(mean_of(run), run, f"{LAST}/{INDEX}", f"{LAST}/")


@pytest.mark.parametrize("name", ["b\n| x |", "\x1b[31mb", "[link=https://example.org]b", "\u202eb", "x" * 100_000])
def test_tensor_names_in_messages(run: Path, name: str) -> None:
    (run / LAST / INDEX).write_text(json.dumps({"weight_map": NAMED | {name: SHARDS[0]}}))
    check_refusal(mean_of(run), run, "disagree about 1 tensors")


@pytest.mark.parametrize("kind", ["pipe", "folder", "device", "circle", "huge"])
def test_an_index_that_is_no_plain_file(run: Path, kind: str) -> None:
    index = run / LAST / INDEX
    index.unlink()
    if kind == "pipe":
        os.mkfifo(index)
    elif kind == "folder":
        index.mkdir()
    elif kind == "huge":
        with index.open("wb") as file:
            file.truncate(1 << 40)
    else:
        index.symlink_to("/dev/zero" if kind == "device" else index.name)
    before = sources(run)
    result = mean_of(run)
    if kind == "folder":  # not of the files, and so passed over; the shards say how many they are
        assert result.exit_code == 0
        assert visible(run / "averaged") == ["mean"]
    else:
        check_refusal(result, run, f"{LAST}/{INDEX} is ", f"{LAST}/{INDEX} cannot be read")
    assert sources(run) == before
