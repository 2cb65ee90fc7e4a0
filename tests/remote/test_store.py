"""The object store on loopback, as s3fs reads it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.hub.wire import DROPPED, WHOLE, Broken
from tests.remote.published import weights
from tests.remote.stores import Store

s3fs: Any = pytest.importorskip("s3fs")


@pytest.fixture
def files(s3: Store) -> Any:
    """A client that knows nothing of earlier tests."""
    client = s3fs.S3FileSystem(skip_instance_cache=True)
    client.retries = 1
    return client


def test_a_run_is_listed(s3: Store, files: Any, run: Path) -> None:
    assert s3.upload(run, "team/run") == "s3://runs/team/run"
    assert s3.requests == [], "what is placed there is not counted"
    found = files.find("s3://runs/team/run", detail=True)
    expected = {
        f"runs/team/run/{path.relative_to(run).as_posix()}": path.stat().st_size
        for path in run.rglob("*")
        if path.is_file()
    }
    assert {name: each["size"] for name, each in found.items()} == expected
    assert s3.served.total() == 0
    assert s3.served_by_stage["list"] > 0


def test_a_range_is_read_and_counted(s3: Store, files: Any, run: Path) -> None:
    s3.upload(run)
    data = weights(run)
    assert files.cat_file("runs/run/checkpoint-10/model.safetensors", start=1000, end=5000) == data[1000:5000]
    assert s3.served == {"runs/run/checkpoint-10/model.safetensors": 4000}
    assert s3.ranges[-1] == ("GET /runs/run/checkpoint-10/model.safetensors", "bytes=1000-4999")
    s3.forget()
    with files.open("runs/run/checkpoint-30/model.safetensors", "rb", block_size=65_536, cache_type="none") as file:
        file.seek(700_000)
        assert file.read(123) == weights(run, 30)[700_000:700_123]
    assert s3.served == {"runs/run/checkpoint-30/model.safetensors": 123}
    s3.forget()
    assert files.cat_file("runs/run/checkpoint-10/model.safetensors") == data
    assert s3.served.total() == s3.served_by_stage["fetch"] == len(data)


def test_an_object_that_changes(s3: Store, files: Any, run: Path) -> None:
    s3.put("run/config.json", b"before")
    before = files.info("runs/run/config.json")["ETag"]
    s3.then["fetch"] = lambda: s3.put("run/config.json", b"after!")
    assert files.cat_file("runs/run/config.json") == b"before"
    assert files.cat_file("runs/run/config.json") == b"after!"
    files.invalidate_cache()
    assert files.info("runs/run/config.json")["ETag"] != before


@pytest.mark.parametrize(
    ("status", "error"), [(403, PermissionError), (404, FileNotFoundError), (500, OSError), (503, OSError)]
)
def test_a_status_at_every_stage(s3: Store, files: Any, status: int, error: type[OSError]) -> None:
    s3.put("run/config.json", b"{}")
    asked: dict[str, Callable[[], object]] = {
        "list": lambda: files.ls("runs/run", refresh=True),
        "head": lambda: files.info("runs/run/config.json", refresh=True),
        "fetch": lambda: files.cat_file("runs/run/config.json"),
    }
    for stage, ask in asked.items():
        s3.faults[stage] = status, 10
        with pytest.raises(error):
            ask()
        s3.faults.clear()
        ask()


@pytest.mark.parametrize("how", ["closed", "reset"])
def test_an_answer_that_breaks_off(s3: Store, files: Any, run: Path, how: Any) -> None:
    s3.upload(run)
    s3.faults["fetch"] = Broken(70_000, how), 10
    with pytest.raises(Exception, match=r"(?i)payload|reset|disconnected|closed"):
        files.cat_file("runs/run/checkpoint-10/model.safetensors", start=0, end=400_000)
    tries = s3.requests.count("GET /runs/run/checkpoint-10/model.safetensors")
    assert s3.served.total() == 70_000 * tries


def test_a_connection_that_is_cut(s3: Store, files: Any) -> None:
    s3.put("run/config.json", b"{}")
    s3.faults["fetch"] = DROPPED, 20
    with pytest.raises(Exception, match=r"(?i)connect"):
        files.cat_file("runs/run/config.json")
    assert s3.served.total() == 0
    s3.faults.clear()
    assert files.cat_file("runs/run/config.json") == b"{}"


def test_fewer_bytes_and_more_than_were_asked_for(s3: Store, files: Any, run: Path) -> None:
    """What an fsspec client passes on without a word: its reader has to count."""
    s3.upload(run)
    data = weights(run)
    s3.faults["fetch"] = Broken(10, "short"), 1
    assert files.cat_file("runs/run/checkpoint-10/model.safetensors", start=0, end=50) == data[:10]
    s3.faults["fetch"] = WHOLE, 1
    assert files.cat_file("runs/run/checkpoint-10/model.safetensors", start=100, end=150) == data
