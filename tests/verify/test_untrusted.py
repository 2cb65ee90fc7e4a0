"""A record that means harm: nothing it names is run, asked or waited for, unless the user says so."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import fsspec
import pytest
import torch

import ckavg
from ckavg.errors import ReadError, SettingError
from ckavg.output.record import MOST_BYTES, MOST_VALUES, read_record
from tests.cli.runner import run_cli, snapshot
from tests.runs import random_run, write_run

ATTACKS = (
    "reference://::file://{specification}",
    "reference://::{specification}",
    "reference://x",
    "http://{server}/run",
    "https://{server}/run",
    "zip://checkpoint-0::http://{server}/a.zip",
    "tar://checkpoint-0::http://{server}/a.tar",
    "zip://a.zip",
    "tar://a.tar",
    "generic://http://{server}/run",
    "simplecache::http://{server}/run",
    "filecache::reference://::file://{specification}",
    "s3://bucket::http://{server}/run",
    "s3://bucket::reference://::file://{specification}",
    "hf://datasets/a/b::http://{server}/run",
    "ftp://{server}/run",
    "webhdfs://{server}/run",
    "jupyter://{server}/run",
    "github://a:b@main/run",
    "smb://{server}/run",
    "sftp://{server}/run",
    "dir://x::http://{server}/run",
    "memory://run",
    "file://{specification}",
)
HINT = "unsupported address"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = write_run(tmp_path_factory.mktemp("run"), random_run(0, 3, torch.float32), (0, 10, 20))
    return ckavg.average(ckavg.open_run(run), ckavg.EMA()).directory


@pytest.fixture
def result(made: Path, tmp_path: Path) -> Path:
    return shutil.copytree(made, tmp_path / "result")


@pytest.fixture
def server() -> Iterator[tuple[str, list[str]]]:
    """Host and port on loopback, and what was asked for there."""
    asked: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        def setup(self) -> None:
            asked.append(str(self.client_address))
            super().setup()

        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as listening:
        thread = threading.Thread(target=listening.serve_forever, daemon=True)
        thread.start()
        yield f"127.0.0.1:{listening.server_address[1]}", asked
        listening.shutdown()
        thread.join()


def rewrite(result: Path, **changed: Any) -> None:
    """Put other values into the record; `inputs` are put into each of them."""
    record = json.loads((result / "ckavg.json").read_bytes())
    record["inputs"] = [each | changed.get("inputs", {}) for each in record["inputs"]]
    (result / "ckavg.json").write_text(json.dumps(record | {**changed, "inputs": record["inputs"]}))


@pytest.mark.parametrize("attack", ATTACKS)
def test_no_address_runs_or_asks_anything(
    result: Path, tmp_path: Path, server: tuple[str, list[str]], attack: str
) -> None:
    """No driver of fsspec is even loaded for it: older versions ran code that a `reference://` held."""
    host, asked = server
    canary = tmp_path / "canary"
    run = f"{{{{ cycler.__init__.__globals__.os.system('touch {canary}') }}}}"
    reference = {"version": 1, "templates": {"x": run}, "refs": {"a/model.safetensors": ["{{x}}", 0, 1], run: "1"}}
    reference["gen"] = [{"key": run, "url": run, "dimensions": {"i": [1]}}]
    (tmp_path / "refs.json").write_text(json.dumps(reference))
    drivers = set(fsspec.registry)
    address = attack.format(server=host, specification=tmp_path / "refs.json")
    rewrite(result, inputs={"directory": address}, source=address)
    for words in (
        ["verify", result, "--sources", "--replay", "--fetch", "-q"],
        ["inspect", address, "-q"],
        ["ema", tmp_path, "--init", address, "-q"],
    ):
        done = run_cli(*words)
        assert HINT in " ".join(done.output.split())
        assert done.stderr.count("error: ") == (0 if words[0] == "verify" else 1)
        assert done.exit_code == (1 if words[0] == "verify" else 2)
    assert set(fsspec.registry) == drivers
    assert asked == []
    assert not canary.exists()


@pytest.mark.parametrize("address", ["hf://owner/name@main", "s3://bucket/run", "hf://datasets/owner/name"])
def test_addresses_are_followed_when_the_user_says_so(
    result: Path, server: tuple[str, list[str]], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, address: str
) -> None:
    host, asked = server
    for name in ("HF_ENDPOINT", "AWS_ENDPOINT_URL"):
        monkeypatch.setenv(name, f"http://{host}")
    rewrite(result, inputs={"directory": address})
    before = snapshot(tmp_path)
    for words in (["--sources"], ["--replay"], ["--sources", "--replay", "--json"]):
        done = run_cli("verify", result, *words)
        assert (done.exit_code, done.stdout) == (2, "")
        assert f"the record names {address.partition('@')[0].removesuffix('/run')} (3 checkpoints)" in done.stderr
        assert "--fetch" in done.stderr
    with pytest.raises(SettingError, match="not on this machine"):
        ckavg.verify_result(result, sources=True)
    assert ckavg.verify_result(result).problems == ()
    assert snapshot(tmp_path) == before
    assert asked == []


def test_places_are_shown_before_they_are_asked(
    result: Path, server: tuple[str, list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    host, asked = server
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://{host}")
    rewrite(result, inputs={"directory": "s3://bucket/run"})

    def see(places: Sequence[str]) -> None:
        assert list(places) == ["s3://bucket (3 checkpoints)"]
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        ckavg.verify_result(result, sources=True, fetch=True, on_addresses=see)
    assert asked == []


def test_what_is_read_on_this_machine_is_shown(made: Path) -> None:
    done = run_cli("verify", made, "--sources")
    assert f"reading {made.parent.parent} (3 checkpoints)" in done.stderr
    assert run_cli("verify", made, "--sources", "-q").output == ""


@pytest.mark.parametrize("kind", ["fifo", "device", "folder", "proc", "sys", "net", "text", "empty", "link"])
def test_files_that_are_no_weights_are_neither_waited_for_nor_written(result: Path, tmp_path: Path, kind: str) -> None:
    place, name = tmp_path / "there", "model.safetensors"
    place.mkdir()
    path = place / name
    if kind == "fifo":
        os.mkfifo(path)
    elif kind in ("text", "empty"):
        path.write_text("root:x:0:0:root:/root:/bin/bash\n" if kind == "text" else "")
    elif kind == "link":
        path.symlink_to("/dev/zero")
    elif kind == "folder":
        path.mkdir()
    else:
        at = {"device": "/dev/zero", "proc": "/proc/kmsg", "sys": "/sys/kernel/notes", "net": "/net/host.example.org/x"}
        place, name = Path(at[kind]).parent, Path(at[kind]).name
    size = path.stat().st_size if kind in ("text", "empty") else 0
    rewrite(result, inputs={"directory": str(place), "files": {name: size}})
    before = snapshot(result)
    problems = ckavg.verify_result(result, sources=True, replay=True).problems
    assert len(problems) == 4
    assert all(each.startswith(f"step {10 * step}: {place}") for step, each in enumerate(problems[:3]))
    assert "computed again" in problems[3]
    assert snapshot(result) == before


@pytest.mark.parametrize(
    "content", ["{}", "[", '{"source": 7}', '{"source": "a\\u0000b"}', '{"source": "/dev", "init": 1}']
)
def test_what_is_kept_beside_a_record_may_be_anything(result: Path, content: str) -> None:
    (result / ".ckavg-local.json").write_text(content)
    assert ckavg.verify_result(result).problems == ()
    assert "Traceback" not in run_cli("verify", result, "--sources", "--replay").output


# --- how large a record may be ---

STATUS = Path("/proc/self/status")
PEAK = f"import re, pathlib; print(re.search(r'VmHWM:\\s+(\\d+)', pathlib.Path({str(STATUS)!r}).read_text())[1])"


def peak_of(result: Path, said: str) -> int:
    """MB that `ckavg verify` takes at most, which says this."""
    if not STATUS.exists():
        pytest.skip("nothing tells what a process took")
    code = f"from ckavg.cli.app import app\ntry: app(['verify', {str(result)!r}])\nexcept SystemExit: pass\n{PEAK}"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert said in done.stderr
    return int(done.stdout) >> 10


@pytest.mark.parametrize("unit", ["{},", "[],", '"",', '{"a":0},', "0,"])
def test_a_record_of_small_values_takes_little_memory(result: Path, unit: str) -> None:
    (result / "ckavg.json").write_text(f'{{"a": [{unit * ((MOST_BYTES - 100) // len(unit))}0]}}')
    assert peak_of(result, f"holds more than {MOST_VALUES:,} values") < 200


def test_the_largest_record_that_is_parsed(result: Path) -> None:
    (result / "ckavg.json").write_text(f'{{"a": [{"{}," * (MOST_VALUES // 2 - 9)}0]}}')
    assert peak_of(result, "is missing") < 300


def test_a_large_record_that_is_right_is_read(result: Path) -> None:
    """200 checkpoints of 400 tensors in 30 shards, half of the tensors copied, with a snapshot at every one of them."""
    record = json.loads((result / "ckavg.json").read_bytes())
    count, shards = 200, [f"model-{number:05d}-of-00030.safetensors" for number in range(1, 31)]
    tensors = [f"model.layers.{number}.self_attention.query_projection.weight" for number in range(200)]
    steps, files = list(range(count)), [*shards, *(f"side-file-{number}.json" for number in range(10)), "ckavg.json"]
    record |= {"steps": steps, "betas": [None] + [0.123456789012345] * (count - 1), "weights": [1 / count] * count}
    record |= {"span": count - 1, "anchor_step": 0, "copied": tensors, "excluded_from_path": tensors}
    record["inputs"] = [
        {"step": step, "directory": f"checkpoint-{step}", "files": dict.fromkeys(shards, 5 << 30), "checksum": "0" * 64}
        for step in steps
    ]
    record["outputs"] = [
        {"name": f"checkpoint-{step}", "step": step, "directory": f"checkpoint-{step}", "files": files}
        | {"sha256": dict.fromkeys(files[:-1], "0" * 64)}
        for step in steps
    ]
    text = json.dumps(record, indent=2)
    (result / "ckavg.json").write_text(text)
    assert len(read_record(result).inputs) == count
    assert len(text) < MOST_BYTES / 8


def test_a_record_that_is_larger_is_not_read(result: Path) -> None:
    with (result / "ckavg.json").open("ab") as file:
        file.truncate(MOST_BYTES + 1)
    with pytest.raises(ReadError, match="larger than"):
        read_record(result)
