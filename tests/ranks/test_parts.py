"""Parts of an average, each done by itself and joined: any number, any order, killed and restarted, the same bytes."""

from __future__ import annotations

import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from ckavg.output.output_path import JOB, LOCAL
from tests.averaging.test_adapters import write_adapters
from tests.cli.runner import run_cli
from tests.exhaustive import all_but
from tests.ranks.launch import SECONDS, environment
from tests.ranks.test_failures import KILL, sabotage

OFTEN = "from ckavg.engine import stream; stream.SECONDS_BETWEEN_NOTES = 0\n"

WORDS = {
    "mean": ("mean",),
    "pema": ("pema", "--snapshot-every", "10"),
    "sample": ("pema", "--sample", "0.05"),
    "product": ("mean", "--lora", "product"),
    "cut": ("ema", "--lora", "product", "--rank", "2"),
}
"""Averages with all that a pass may have to exchange."""


def contents(directory: Path) -> dict[str, Any]:
    """The files of a result without times and without the number of bytes read twice."""
    found: dict[str, Any] = {
        str(path.relative_to(directory)): path.read_bytes() for path in directory.rglob("*") if path.is_file()
    }
    for name in [name for name in found if name.endswith("ckavg.json")]:
        found[name] = {key: value for key, value in json.loads(found[name]).items() if key != "seconds"}
    del found[LOCAL]
    return found


def fresh(run: Path, place: Path) -> Path:
    shutil.copytree(run, place, copy_function=os.link, ignore=shutil.ignore_patterns("averaged"))
    return place


def partial_of(out: Path) -> Path:
    return out.parent / f".{out.name}.ckavg-partial"


def do_parts(words: tuple[str | Path, ...], out: Path, count: int, seed: int = 0) -> None:
    """All parts in a random order, again and again until each has finished."""
    order = list(range(count))
    left = set(order)
    for _ in range(3):
        random.Random(seed).shuffle(order)
        for part in order:
            done = run_cli(*words, "--out", out, "--part", f"{part}/{count}")
            assert done.exit_code in (0, 3), done.output
            left -= {part} if done.exit_code == 0 else set()
        if not left:
            return
    raise AssertionError(left)


@pytest.mark.parametrize("count", all_but((3,), [1, 3, 7]))
@pytest.mark.parametrize("name", all_but(("pema", "cut"), WORDS))
def test_joined_parts_are_what_one_process_makes(run: Path, tmp_path: Path, name: str, count: int) -> None:
    if "--lora" in WORDS[name]:
        run = write_adapters(tmp_path / "adapters")
    sources = [fresh(run, tmp_path / place / "run") for place in ("alone", "parts")]
    verb, *options = WORDS[name]
    assert run_cli(verb, sources[0], *options, "--out", tmp_path / "alone" / "out").exit_code == 0
    out = tmp_path / "parts" / "out"
    do_parts((verb, sources[1], *options), out, count)
    assert not out.exists()
    joined = run_cli("join", out, "--json")
    assert joined.exit_code == 0, joined.output
    alone, parts = contents(tmp_path / "alone" / "out"), contents(out)
    for of_one in alone, parts:
        for key in [key for key in of_one if key.endswith("ckavg.json")]:
            of_one[key].pop("inputs"), of_one[key].pop("source")
            of_one[key] = json.loads(json.dumps(of_one[key]).replace(str(tmp_path), ""))
    assert parts == alone
    assert not partial_of(out).exists()


@pytest.mark.parametrize("moment", all_but(("pass 2",), ["pass 1", "opening the files", "pass 2", "noting"]))
def test_a_part_that_was_killed_goes_on(run: Path, tmp_path: Path, moment: str) -> None:
    """Each of three parts is killed once, while another one works; all are started again and wait for each other."""
    out = tmp_path / "out"
    assert run_cli("pema", run, "--out", tmp_path / "alone").exit_code == 0
    shutil.rmtree(run / "averaged", ignore_errors=True)

    def start(part: int, before: str, *more: str) -> subprocess.Popen[str]:
        words = "pema", str(run), "--out", str(out), "--part", f"{part}/3", "--wait", *more
        code = f"{OFTEN}{before}from ckavg.cli import main\nmain()\n"
        return subprocess.Popen(
            [sys.executable, "-c", code, *words], env=environment(), text=True, stderr=subprocess.PIPE
        )

    bad = [start(part, sabotage(run, moment, KILL) if part == 1 else "", "--rank-timeout", "3") for part in range(3)]
    told = [each.communicate(timeout=SECONDS)[1] for each in bad]
    statuses = [each.returncode for each in bad]
    assert statuses[1] == -signal.SIGKILL, told
    assert {statuses[0], statuses[2]} <= {0, 3}
    good = [start(part, "") for part in range(3)]
    errors = [each.communicate(timeout=SECONDS)[1] for each in good]
    assert [each.returncode for each in good] == [0, 0, 0], errors
    assert run_cli("join", out).exit_code == 0
    assert (out / "model.safetensors").read_bytes() == (tmp_path / "alone" / "model.safetensors").read_bytes()


def test_what_is_missing_is_named(run: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    begin = "pema", run, "--out", out
    done = run_cli(*begin, "--part", "1/3")
    assert done.exit_code == 3
    assert "unfinished: Parts 0/3, 2/3 have not finished their shares of pass 1.\n" in done.stderr
    done = run_cli(*begin, "--part", "0/3", "--wait", "--rank-timeout", "1")
    assert done.exit_code == 3
    assert "unfinished: Part 2/3 has not finished its share of pass 1.\n" in done.stderr
    done = run_cli(*begin, "--part", "2/3")
    assert (done.exit_code, done.stdout) == (0, "part 2/3 is finished, not yet: 0/3, 1/3\n")
    done = run_cli("join", out, "--json")
    assert (done.exit_code, done.stdout) == (3, "")
    assert "unfinished: Parts 0/3, 1/3 have not finished their shares of pass 2.\n" in done.stderr
    assert json.loads(run_cli(*begin, "--part", "0/3", "--json").stdout) == {
        "part": 0,
        "parts": 3,
        "missing": [1],
        "result": str(out),
    }
    done = run_cli(*begin, "--part", "1/3")
    assert (done.exit_code, done.stdout) == (0, f"all parts are finished: ckavg join {out}\n")
    assert run_cli("join", out).exit_code == 0
    assert run_cli(*begin, "--part", "1/3").stdout == f"{out} is up to date\n"
    done = run_cli("join", out)
    assert (done.exit_code, f"error: {out} is complete already." in done.stderr) == (1, True)
    done = run_cli("join", tmp_path / "nothing")
    assert done.exit_code == 1
    assert "holds no parts of an average" in done.stderr


def test_parts_of_something_else_are_refused(run: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert run_cli("ema", run, "--out", out, "--part", "0/2").exit_code == 0

    def refused(*words: object, part: str = "1/2") -> str:
        done = run_cli(*map(str, words), "--out", out, "--part", part)
        assert done.exit_code == 1
        return " ".join(done.stderr.split())

    assert "holds parts of another average: gamma 0.15 there, 0.3 asked." in refused("ema", run, "--gamma", 0.3)
    assert "another average: scheme ema there, bema asked" in refused("bema", run)
    assert "parts 2 there, 3 asked." in refused("ema", run, part="1/3")
    assert "checkpoints 4 of steps 0 to 30 there, 2 of steps 20 to 30 asked" in refused("ema", run, "--last", 2)
    weights = run / "checkpoint-10" / "model.safetensors"
    tensors = load_file(weights)
    tensors["bias"] += 1
    save_file(tensors, weights, {"format": "pt"})
    assert "the checkpoints have changed since." in refused("ema", run)
    other = fresh(run, tmp_path / "other")
    (other / "checkpoint-30").rename(other / "checkpoint-40")
    (other / "checkpoint-40" / "trainer_state.json").unlink()
    assert "another average: checkpoints 4 of steps 0 to 30" in refused("ema", other)


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("--part", "3/3"), "--part is '3/3'; it must be I/N"),
        (("--part", "-1/3"), "--part is '-1/3'"),
        (("--part", "one"), "--part is 'one'"),
        (("--wait",), "--wait is of --part"),
        (("--part", "0/2", "--eval", "true", "--eval-goal", "min", "--csv", "x.csv"), "--eval, --csv: a part has no"),
        (("--part", "0/2", "--push-to-hub", "a/b"), "--push-to-hub: a part has no result yet"),
    ],
)
def test_wrong_use(run: Path, words: tuple[str, ...], says: str) -> None:
    done = run_cli("mean", run, *words)
    assert done.exit_code == 2
    assert f"error: {says}" in done.stderr
    assert not (run / "averaged").exists()


def test_a_part_is_none_of_a_job(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0"}.items():
        monkeypatch.setenv(name, value)
    done = run_cli("mean", run, "--part", "0/2")
    assert done.exit_code == 2
    assert "RANK and WORLD_SIZE are set" in done.stderr


def test_one_process_ends_what_parts_have_begun_and_the_other_way_round(run: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert run_cli("mean", run, "--out", tmp_path / "alone").exit_code == 0
    assert run_cli("mean", run, "--out", out, "--part", "0/2").exit_code == 0
    done = run_cli("mean", run, "--out", out)
    assert done.exit_code == 0
    assert "more were done before it was interrupted" in done.stderr
    assert contents(out)["model.safetensors"] == contents(tmp_path / "alone")["model.safetensors"]


def test_one_part_is_done_once_at_a_time(run: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    hang = f"while not os.path.exists({str(tmp_path / 'go-on')!r}): time.sleep(0.05)"
    code = f"{sabotage(run, 'pass 2', hang)}from ckavg.cli import main\nmain()\n"
    words = "mean", str(run), "--out", str(out), "--part", "0/2"
    first = subprocess.Popen([sys.executable, "-c", code, *words], env=environment() | {"RANK": "0"})
    while not (run.parent / "acted").exists():
        assert first.poll() is None
    done = run_cli(*words)
    assert done.exit_code == 1
    assert re.search(
        rf"error: Rank 0 of the processes writing to .* exists already: process {first.pid} on", done.stderr
    )
    done = run_cli("join", out)
    assert done.exit_code == 3
    assert "unfinished: Part 0/2 has not finished its share of the work in progress." in done.stderr
    (tmp_path / "go-on").touch()
    assert first.wait(SECONDS) == 0


HOSTILE: dict[str, Any] = {
    "no JSON": b"\x80\x04N.",
    "a list": [],
    "nothing": {},
    "an option that is none": {"options": {"dtype": "source", "eval_command": "touch canary"}},
    "a type that is none": {"selection": {"last": "touch canary"}},
    "a scheme that is none": {"scheme": "os.system"},
    "parameters that are none": {"parameters": {"gamma": "__import__('os')"}},
    "another place": {"out": "/etc/passwd"},
    "a count that is none": {"count": -1},
    "another recipe": {"parameters": {"gamma": 0.5}},
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_description_is_not_trusted(run: Path, tmp_path: Path, name: str) -> None:
    out = tmp_path / "out"
    assert run_cli("ema", run, "--out", out, "--part", "0/1").exit_code == 0
    file, change = partial_of(out) / JOB, HOSTILE[name]
    if isinstance(change, dict) and change:
        change = json.loads(file.read_text()) | change
    file.write_bytes(change if isinstance(change, bytes) else json.dumps(change).encode())
    done = run_cli("join", out)
    assert done.exit_code == 1
    assert re.search("error: .*(is not valid|another result|another average)", done.stderr.replace("\n", " "))
    assert not out.exists()
