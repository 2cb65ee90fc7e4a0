"""Results that go to an object store: complete or absent there, whatever goes wrong, and continued."""

from __future__ import annotations

import itertools
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import boto3
import pytest
import torch
from safetensors.torch import load_file

import ckavg
from ckavg.errors import OutputExistsError, SettingError, WriteError
from ckavg.storage.atomic import cache_directory
from tests.cli.runner import run_cli
from tests.environment.test_faults import small_file_system
from tests.exhaustive import all_but
from tests.hub.wire import DROPPED, LOST, Fault
from tests.runs import write_run
from tests.storage.outcome import keeps_to_itself, told_once
from tests.storage.stores import BUCKET, Store

KEY = "team/results/ema"
OUT = f"s3://{BUCKET}/{KEY}"
FOREVER = 10_000
EVERYTHING = r"(GET|HEAD|PUT|POST|DELETE) /.*"


@pytest.fixture
def store(s3: Store, monkeypatch: pytest.MonkeyPatch) -> Store:
    """The store, of which no request is repeated by the driver itself; repeated ones do not wait."""
    monkeypatch.setattr("ckavg.storage.hub_errors.time.sleep", lambda _seconds: None)
    monkeypatch.setattr("s3fs.core.S3FileSystem.retries", 1)
    s3.stages = {"any": EVERYTHING}
    return s3


@pytest.fixture
def local(run: Path, tmp_path: Path) -> dict[str, bytes]:
    """The same result on this machine, but for the files that say when and where it was made."""
    return settled(files_of(ckavg.average(ckavg.open_run(run), ckavg.EMA(), out=tmp_path / "local").directory))


def files_of(directory: Path) -> dict[str, bytes]:
    return {
        path.relative_to(directory).as_posix(): path.read_bytes() for path in directory.rglob("*") if path.is_file()
    }


def client(store: Store) -> Any:
    """A client that has nothing of ours, behind the counter."""
    return boto3.client("s3", endpoint_url=store.behind)


def there(store: Store, key: str = KEY) -> dict[str, bytes]:
    """What lies under a key, as another client downloads it."""
    s3 = client(store)
    found = s3.list_objects_v2(Bucket=BUCKET, Prefix=f"{key}/").get("Contents", [])
    return {
        each["Key"].removeprefix(f"{key}/"): s3.get_object(Bucket=BUCKET, Key=each["Key"])["Body"].read()
        for each in found
    }


def settled(files: dict[str, bytes]) -> dict[str, bytes]:
    return {
        name: data
        for name, data in files.items()
        if Path(name).name not in ("ckavg.json", "README.md") and not name.startswith(".ckavg-")
    }


def staged() -> list[Path]:
    return [path for path in (cache_directory() / "results").rglob("*") if path.is_file()]


def written(store: Store) -> list[str]:
    """What was written, by name."""
    return [line.rpartition("/")[2] for line in store.requests if line.startswith(("PUT", "POST"))]


# --- what is there ---


def test_the_bytes_of_a_disk_and_nothing_else(store: Store, run: Path, local: dict[str, bytes], tmp_path: Path) -> None:
    done = run_cli("ema", run, "--out", f"{OUT}/")
    assert done.exit_code == 0, done.output
    assert f"result   {OUT}\n" in done.stdout
    got = there(store)
    assert settled(got) == local
    assert got.keys() == {*local, "README.md", "ckavg.json", ".ckavg-local.json"}
    assert str(run.parent).encode() not in b"".join(got.values()), "nothing tells where it was made"
    (tmp_path / "model.safetensors").write_bytes(got["model.safetensors"])
    assert load_file(tmp_path / "model.safetensors")["a"].shape == (1000, 200)
    changes = [line for line in store.requests if not line.startswith(("GET", "HEAD"))]
    assert changes[-2:] == [f"PUT /{BUCKET}/{KEY}/ckavg.json", f"DELETE /{BUCKET}/{KEY}/.ckavg-partial"]
    assert (staged(), list(run.parent.glob("s3:*")), list(Path().glob("s3:*"))) == ([], [], [])


def test_an_identical_command_has_nothing_to_do(store: Store, run: Path) -> None:
    assert run_cli("ema", run, "--out", OUT).exit_code == 0
    store.forget()
    again = run_cli("ema", run, "--out", OUT)
    assert f"{OUT} is up to date" in again.stdout
    assert not written(store)
    said = json.loads(run_cli("ema", run, "--out", OUT, "--json").stdout)
    assert (said["up_to_date"], said["outputs"][0]["directory"]) == (True, OUT)
    record = ckavg.average(ckavg.open_run(run), ckavg.EMA(), out=OUT)
    assert (str(record.directory), str(record.directory / "ckavg.json")) == (OUT, f"{OUT}/ckavg.json")
    assert not written(store)


def test_a_result_that_changed_there_is_not_up_to_date(store: Store, run: Path) -> None:
    assert run_cli("ema", run, "--out", OUT).exit_code == 0
    store.put(f"{KEY}/config.json", b"{}")
    told = told_once(run_cli("ema", run, "--out", OUT), OUT)
    assert "its own files have changed since: config.json" in told
    assert run_cli("ema", run, "--out", OUT, "--force").exit_code == 0
    assert there(store)["config.json"] != b"{}"


def test_another_result_is_replaced_with_force_alone(store: Store, run: Path) -> None:
    assert run_cli("ema", run, "--out", OUT, "--snapshot-every", "10").exit_code == 0
    assert "checkpoint-20/model.safetensors" in there(store)
    store.forget()
    told = told_once(run_cli("ema", run, "--gamma", "0.3", "--out", OUT), OUT)
    assert "--force" in told
    assert not written(store)
    assert run_cli("ema", run, "--gamma", "0.3", "--out", OUT, "--force", "--quiet").exit_code == 0
    got = there(store)
    assert json.loads(got["ckavg.json"])["parameters"]["gamma"] == 0.3
    assert not [name for name in got if name.startswith("checkpoint")], "no file of the earlier one is left"
    removed = f"DELETE /{BUCKET}/{KEY}/ckavg.json"
    assert store.requests.index(removed) < store.requests.index(f"PUT /{BUCKET}/{KEY}/model.safetensors")


@pytest.mark.parametrize("options", [(), ("--force",)])
@pytest.mark.parametrize("name", ["notes.txt", "model.safetensors", "ema/x"])
def test_what_is_no_result_is_left_alone(store: Store, run: Path, name: str, options: tuple[str, ...]) -> None:
    store.put(f"{KEY}/{name}", b"mine")
    store.forget()
    told_once(run_cli("ema", run, "--out", OUT, *options), OUT)
    assert (written(store), there(store)) == ([], {name: b"mine"})


def test_a_file_of_somebody_in_a_result_is_not_lost(store: Store, run: Path) -> None:
    assert run_cli("ema", run, "--out", OUT).exit_code == 0
    store.put(f"{KEY}/mine.txt", b"mine")
    told = told_once(run_cli("ema", run, "--gamma", "0.3", "--out", OUT, "--force"), OUT)
    assert "mine.txt" in told
    assert there(store)["mine.txt"] == b"mine"


def test_an_object_of_the_very_name(store: Store, run: Path) -> None:
    store.put(KEY, b"mine")
    assert "is not a result" in told_once(run_cli("ema", run, "--out", OUT), OUT)


def test_in_a_checkpoint_or_over_the_run(store: Store, run: Path) -> None:
    source = store.upload(run, "run")
    assert "inside the checkpoint" in told_once(run_cli("ema", source, "--out", f"{source}/checkpoint-10/x"), source)
    assert "not a result" in told_once(run_cli("ema", source, "--out", source), source)


@pytest.mark.parametrize("key", ["a b/ü", "a+b/c=d&e", "50%/100%25", "~x/'q'"])
def test_strange_names(store: Store, run: Path, local: dict[str, bytes], key: str) -> None:
    out = f"s3://{BUCKET}/{key}"
    assert str(ckavg.average(ckavg.open_run(run), ckavg.EMA(), out=out).directory) == out
    assert settled(there(store, key)) == local
    store.forget()
    ckavg.average(ckavg.open_run(run), ckavg.EMA(), out=out)
    assert not written(store)


def test_a_run_and_its_result_in_one_store(store: Store, run: Path, local: dict[str, bytes]) -> None:
    """The path is cached beside the run, where the next command finds it, also on another machine."""
    source = store.upload(run, "run")
    out = f"{source}/averaged/pema"
    assert run_cli("pema", source, "--out", out).exit_code == 0
    assert settled(there(store, "run/averaged/pema")).keys() == local.keys()
    assert "path.json" in there(store, "run/averaged")
    for file in cache_directory().glob("path-*.json"):
        file.unlink()
    told = run_cli("pema", source, "--gamma", "0.3", "--out", f"{source}/averaged/other", "--dry-run").stdout
    assert "the path is cached" in told
    store.put("run/averaged/path.json", there(store, "run/averaged")["path.json"].replace(b"0.0", b"0.5"))
    told = run_cli("pema", source, "--gamma", "0.3", "--out", f"{source}/averaged/other", "--dry-run").output
    assert "It is ignored" in told
    assert "the path is cached" not in told


def test_a_store_that_takes_no_path(store: Store, run: Path, tmp_path: Path) -> None:
    source = store.upload(run, "run")
    store.stages["any"], store.faults["any"] = r"PUT /.*", (403, FOREVER)
    done = run_cli("pema", source, "--out", tmp_path / "out")
    assert done.exit_code == 0
    assert written(store) == ["path.json"], "once, and without a word"
    assert "403" not in done.output
    assert list(cache_directory().glob("path-*.json"))


def test_a_sweep_and_a_search(store: Store, run: Path) -> None:
    told = run_cli("sweep", run, "ema:gamma=0.1,0.2", "last", "--out", f"s3://{BUCKET}/sweep")
    assert told.exit_code == 0, told.output
    assert f"results  s3://{BUCKET}/sweep\n" in told.stdout
    names = {name.partition("/")[0] for name in there(store, "sweep")}
    assert names == {"ema-gamma0.1", "ema-gamma0.2", "last"}
    again = run_cli("sweep", run, "ema:gamma=0.1,0.2", "mean", "--out", f"s3://{BUCKET}/sweep").stdout
    assert again.count("up to date") == 2
    command = ("best", run, "--eval", "echo $(( $(stat -c %s {dir}/model.safetensors) ))", "--eval-goal", "min")
    told = run_cli(*command, "--budget", "3", "--out", f"s3://{BUCKET}/best")
    assert told.exit_code == 0, told.output
    assert f"result   s3://{BUCKET}/best" in told.stdout
    record = json.loads(there(store, "best")["ckavg.json"])
    assert record["evaluation"]["best_of"] == 3
    assert staged() == []


def test_an_evaluation_runs_here_and_goes_with_the_result(store: Store, run: Path) -> None:
    evaluated = ("--eval", "test -f {dir}/model.safetensors && echo 1.5", "--eval-goal", "min")
    assert run_cli("ema", run, "--out", OUT).exit_code == 0
    store.forget()
    done = run_cli("ema", run, "--out", OUT, *evaluated)
    assert done.exit_code == 0, done.output
    assert json.loads(there(store)["ckavg.json"])["evaluation"]["value"] == 1.5
    assert "1.5" in there(store)["README.md"].decode()
    assert "model.safetensors" not in written(store)
    store.forget()
    assert run_cli("ema", run, "--out", OUT, *evaluated).exit_code == 0
    assert not written(store)


def test_it_is_verified_where_it_is(store: Store, run: Path, tmp_path: Path) -> None:
    assert run_cli("ema", run, "--out", OUT, "--snapshot-every", "10").exit_code == 0
    done = run_cli("verify", OUT, "--replay", "--source", run)
    assert done.exit_code == 0, done.output
    assert done.stdout.startswith(f"{OUT}\n")
    assert run_cli("ema", run, "--out", tmp_path / "here", "--gamma", "0.3").exit_code == 0
    difference = run_cli("diff", OUT, tmp_path / "here")
    assert difference.exit_code == 0, difference.output
    assert "ema " in run_cli("ls", OUT.removesuffix("/ema")).stdout
    listed = json.loads(run_cli("ls", OUT, "--json").stdout)["results"]
    assert [each["directory"] for each in listed] == [f"{OUT}/checkpoint-20", OUT]
    weights = bytearray(there(store)["model.safetensors"])
    weights[-1] ^= 1
    store.put(f"{KEY}/model.safetensors", bytes(weights))
    assert run_cli("verify", OUT).exit_code == 1
    for verb in (("push", OUT, "owner/name"), ("verify", f"{OUT}/nothing"), ("verify", "hf://owner/name")):
        told_once(run_cli(*verb), verb[1])
    assert staged() == []


# --- what goes wrong ---


def finished(store: Store, command: tuple[Any, ...], local: dict[str, bytes]) -> None:
    """The same command succeeds once the fault is over, and leaves nothing but the result."""
    store.faults.clear()
    done = run_cli(*command)
    assert done.exit_code == 0, done.output
    got = there(store)
    assert settled(got) == local
    assert got.keys() == {*local, "README.md", "ckavg.json", ".ckavg-local.json"}
    assert staged() == []


def test_a_moments_fault_costs_nothing(store: Store, run: Path, local: dict[str, bytes]) -> None:
    store.stages["any"], store.faults["any"] = r"PUT /.*", (503, 4)
    done = run_cli("ema", run, "--out", OUT)
    assert done.exit_code == 0, done.output
    assert settled(there(store)) == local


@pytest.mark.parametrize("cut", all_but(((DROPPED, 4),), [(DROPPED, 4), (DROPPED, 1), (LOST, 1), (503, 1)]))
def test_cut_at_each_request(store: Store, run: Path, local: dict[str, bytes], cut: tuple[Fault, int]) -> None:
    """From there on no request is answered. Every third time the next command succeeds; otherwise it is cut again."""
    command, (fault, each), failed = ("ema", run, "--out", OUT, "--quiet"), cut, 0
    for number, served in enumerate(itertools.count(0, each)):
        store.faults["any"], store.passes_before["any"] = (fault, FOREVER), served
        done = run_cli(*command)
        if store.faults["any"][1] == FOREVER:
            break
        got = there(store)
        if done.exit_code:
            failed += 1
            told = told_once(done, OUT)
            assert settled(got).items() <= local.items(), "each file is whole, or not there"
            if "model.safetensors" in got:
                assert "kept in" in told
                assert "the same command uploads the rest" in told
        assert ("ckavg.json" in got) >= (done.exit_code == 0)
        if "ckavg.json" in got:
            assert settled(got) == local
        if number % 3 == 2:
            finished(store, command, local)
            for name in there(store):
                store.delete(f"{KEY}/{name}")
    assert failed > 10 // each


def test_an_upload_that_was_cut_is_continued(store: Store, run: Path, local: dict[str, bytes]) -> None:
    """Nothing is averaged or uploaded again, and nothing of an earlier result is left."""
    assert run_cli("ema", run, "--gamma", "0.3", "--snapshot-every", "10", "--out", OUT).exit_code == 0
    command = ("ema", run, "--out", OUT, "--force")
    store.stages = {"last": rf"PUT /{BUCKET}/{KEY}/ckavg.json"}
    store.faults["last"] = 403, FOREVER
    told = told_once(run_cli(*command), OUT)
    assert "may not be written" in told
    assert "ckavg.json" not in there(store)
    store.forget()
    store.faults.clear()
    again = run_cli(*command)
    assert again.exit_code == 0, again.output
    assert "averaging" not in again.stderr
    assert set(written(store)) & {*local} == set()
    assert settled(there(store)) == local
    assert staged() == []


@pytest.mark.parametrize("options", [(), ("--max-disk", "0")])
def test_refused_before_anything_is_read(store: Store, run: Path, options: tuple[str, ...]) -> None:
    source = store.upload(run, "run")
    store.stages, store.faults = {"put": r"PUT /.*"}, {"put": (403, FOREVER)}
    store.forget()
    told = told_once(run_cli("ema", source, "--out", OUT, *options), OUT)
    assert "may not be written" in told
    assert not [file for file in store.served if file.endswith(".safetensors") and store.served[file] > 100_000]
    assert (there(store), staged()) == ({}, [])


def test_what_may_be_written_and_not_removed(store: Store, run: Path) -> None:
    store.stages, store.faults = {"delete": r"(DELETE|POST) /.*"}, {"delete": (403, FOREVER)}
    assert "may not be removed" in told_once(run_cli("ema", run, "--out", OUT), OUT)


def test_no_such_bucket(store: Store, run: Path) -> None:
    assert "does not exist" in told_once(run_cli("ema", run, "--out", "s3://nowhere/x"), "s3://nowhere/x")


def test_another_command_at_the_same_place(store: Store, run: Path) -> None:
    """The latest command wins: here it starts between the weights and the record."""
    mark = json.dumps({"token": "0" * 32, "files": ["model.safetensors"]}).encode()
    store.stages = {"weights": rf"PUT /{BUCKET}/{KEY}/model.safetensors"}
    store.then["weights"] = lambda: store.put(f"{KEY}/.ckavg-partial", mark)
    told = told_once(run_cli("ema", run, "--out", OUT), OUT)
    assert "Another command has begun" in told
    assert "ckavg.json" not in there(store)


def test_a_file_that_another_has_put_there(store: Store, run: Path) -> None:
    store.stages = {"weights": rf"PUT /{BUCKET}/{KEY}/model.safetensors"}
    size = sum(path.stat().st_size for path in (run / "checkpoint-10").glob("*.safetensors"))
    store.then["weights"] = lambda: store.put(f"{KEY}/model.safetensors", b"0" * size)
    told = told_once(run_cli("ema", run, "--out", OUT), OUT)
    assert "model.safetensors differs from what was uploaded" in told
    assert "ckavg.json" not in there(store)
    assert run_cli("ema", run, "--out", OUT).exit_code == 0


def large_run(directory: Path) -> Path:
    """Two checkpoints of 48 MB, which are sent in three parts."""
    weights = [{"a": torch.full((12_000, 1000), float(step))} for step in (10, 20)]
    return write_run(directory / "large", weights, (10, 20))


def ckavg_process(*words: str | Path, **environment: str) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [sys.executable, "-m", "ckavg", *map(str, words)],
        env=os.environ | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )


@pytest.mark.parametrize("at", ["part", "done", "record"])
def test_killed_while_it_sends(s3: Store, tmp_path: Path, at: str) -> None:
    run = large_run(tmp_path)
    s3.stages = {
        "part": rf"PUT /{BUCKET}/{KEY}/model.safetensors",
        "done": rf"POST /{BUCKET}/{KEY}/model.safetensors",
        "record": rf"PUT /{BUCKET}/{KEY}/.ckavg-local.json",
    }
    process = ckavg_process("ema", run, "--out", OUT)
    s3.passes_before = {}
    starts = {"done": 2}.get(at, 1)
    counted = [0]

    def kill() -> None:
        counted[0] += 1
        if counted[0] == starts:
            process.kill()
        else:
            s3.then[at] = kill

    s3.then[at] = kill
    process.communicate(timeout=120)
    assert process.returncode == -9
    got = there(s3)
    assert "ckavg.json" not in got
    assert ("model.safetensors" in got) == (at != "part")
    s3.forget()
    again = ckavg_process("ema", run, "--out", OUT)
    told = again.communicate(timeout=120)[0].decode()
    assert again.returncode == 0, told
    assert "averaging" not in told
    sent = [line for line in s3.requests if line == f"PUT /{BUCKET}/{KEY}/model.safetensors"]
    assert len(sent) == (3 if at == "part" else 0), "parts of what had not come, and of nothing else"
    assert there(s3).keys() == {
        "model.safetensors",
        "config.json",
        "tokenizer.json",
        "README.md",
        "ckavg.json",
    } | {".ckavg-local.json"}
    assert staged() == []


def test_an_interrupt_leaves_no_part(s3: Store, tmp_path: Path) -> None:
    run = large_run(tmp_path)
    s3.stages = {"part": rf"PUT /{BUCKET}/{KEY}/model.safetensors"}
    process = ckavg_process("ema", run, "--out", OUT)

    def interrupt() -> None:
        process.send_signal(signal.SIGINT)
        s3.then["part"] = lambda: time.sleep(1.5)  # another part is on its way for so long

    s3.then["part"] = interrupt
    told = process.communicate(timeout=120)[0].decode()
    assert process.returncode == 130, told
    assert "the same command sends it" in told
    assert "model.safetensors" not in there(s3)
    assert not client(s3).list_multipart_uploads(Bucket=BUCKET).get("Uploads")


def test_several_processes_of_one_machine(s3: Store, run: Path, local: dict[str, bytes], tmp_path: Path) -> None:
    command = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "ckavg")
    done = subprocess.run(
        [sys.executable, *command, "ema", str(run), "--out", OUT, "--plot", str(tmp_path / "plot.svg")],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert f"result   {OUT}" in done.stdout
    assert settled(there(s3)) == local | {"ckavg.svg": there(s3)["ckavg.svg"]}
    assert s3.requests.count(f"PUT /{BUCKET}/{KEY}/model.safetensors") == 1
    assert staged() == []


def test_a_full_disk_is_found_before_anything_is_read(
    store: Store, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with small_file_system(tmp_path / "small", 1 << 20) as disk:
        monkeypatch.setenv("XDG_CACHE_HOME", str(disk))
        told = told_once(run_cli("ema", run, "--out", OUT), str(disk))
    assert "the result needs" in told
    assert "XDG_CACHE_HOME" in told
    assert not written(store)


def test_two_commands_of_one_machine(store: Store, run: Path) -> None:
    from ckavg.output.upload import target_of

    held = target_of(OUT)
    assert held is not None
    held.begin()
    assert "Another ckavg is writing" in told_once(run_cli("ema", run, "--out", OUT), OUT)
    held.discard()
    assert run_cli("ema", run, "--out", OUT).exit_code == 0


# --- what is no place for a result ---


@pytest.mark.parametrize(
    ("out", "why"),
    [
        ("s4://bucket/x", "one of s3://, gs://"),
        ("s3:bucket/x", "one of s3://, gs://"),
        ("s3:\\bucket\\x", "one of s3://, gs://"),
        ("C:\\models\\x", "one of s3://, gs://"),
        ("file:///tmp/x", "Did you mean /tmp/x"),
        ("hf://owner/name", "--push-to-hub owner/name"),
        ("hf://buckets/owner/name", "--push-to-hub"),
        ("zip://x::s3://bucket/x", "without '::'"),
        ("s3://bucket/x?versionId=1", "special meaning"),
        ("s3://bucket/x#1", "special meaning"),
        ("s3://bucket/*", "special meaning"),
        ("s3://key:secret@bucket/x", "password"),
        ("gs://bucket/x", "gcsfs"),
        ("http://127.0.0.1:9/x", "only reads"),
    ],
)
@pytest.mark.parametrize("verb", ["ema", "sweep", "best"])
def test_what_is_no_address_is_refused(run: Path, tmp_path: Path, out: str, why: str, verb: str) -> None:
    if verb == "ema":
        kind = WriteError if out.startswith("http") else SettingError
        with pytest.raises(kind, match=r".") as raised:
            ckavg.average(ckavg.open_run(run), ckavg.EMA(), out=out)
        assert why in raised.value.as_typed
    words = {"sweep": ("ema",), "best": ("--eval", "echo 1 {dir}", "--eval-goal", "min")}.get(verb, ())
    before = set(Path().iterdir())
    done = run_cli(verb, run, *words, "--out", out)
    assert done.exit_code in (1, 2)
    assert why in done.stderr
    keeps_to_itself(done.stderr)
    assert "secret@" not in done.stderr
    assert set(Path().iterdir()) == before


def test_a_bucket_is_no_result(store: Store, run: Path, local: dict[str, bytes]) -> None:
    assert "a whole bucket" in told_once(run_cli("ema", run, "--out", f"s3://{BUCKET}"), BUCKET, status=2)
    assert run_cli("sweep", run, "ema", "--out", f"s3://{BUCKET}").exit_code == 0
    assert settled(there(store, "ema-gamma0.15")) == local


@pytest.mark.parametrize("option", ["--plot", "--report", "--csv"])
def test_other_files_go_to_a_disk(run: Path, option: str) -> None:
    name = {"--plot": "x.svg", "--report": "x.html", "--csv": "x.csv"}[option]
    done = run_cli("ema", run, option, f"s3://{BUCKET}/{name}", "--eval", "echo 1 {dir}", "--eval-goal", "min")
    assert f"s3://{BUCKET}/{name} is an address" in told_once(done, name)
    assert not (run / "averaged").exists()


@pytest.fixture
def _forgetful() -> Iterator[None]:
    from fsspec.implementations.memory import MemoryFileSystem

    yield
    MemoryFileSystem.store.clear()
    MemoryFileSystem.pseudo_dirs[:] = [""]


@pytest.mark.usefixtures("_forgetful")
def test_any_file_system_that_can_be_written(run: Path, local: dict[str, bytes]) -> None:
    from fsspec.implementations.memory import MemoryFileSystem

    def average(gamma: float = 0.15, *, force: bool = False) -> ckavg.Record:
        return ckavg.average(ckavg.open_run(run), ckavg.EMA(gamma=gamma), out="memory://results/ema", force=force)

    assert str(average().directory) == "memory://results/ema"
    fs = MemoryFileSystem()
    got = {path.removeprefix("/results/ema/"): fs.cat_file(path) for path in fs.find("/results/ema")}
    assert settled(got) == local
    modified = fs.info("/results/ema/model.safetensors")["created"]
    average()
    assert fs.info("/results/ema/model.safetensors")["created"] == modified
    with pytest.raises(OutputExistsError):
        average(0.3)
    average(0.3, force=True)
    assert fs.info("/results/ema/model.safetensors")["created"] > modified
