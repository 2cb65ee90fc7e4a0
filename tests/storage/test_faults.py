"""Failures while a remote run is read: at every stage, transient and permanent."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import ckavg
from ckavg.errors import ChangedError
from ckavg.storage.atomic import cache_directory
from ckavg.storage.download import ShortAnswerError, exactly
from tests.cli.runner import run_cli
from tests.hub.server import Hub, Repo
from tests.hub.wire import DROPPED, PORTAL, WHOLE, Broken, Traffic
from tests.storage.outcome import keeps_to_itself, refused, weights_of
from tests.storage.published import REPO, publish_folders
from tests.storage.stores import Store

FOREVER = 10_000
FAULTS: dict[str, Any] = {
    "401": 401,
    "403": 403,
    "429": 429,
    "503": 503,
    "dropped": DROPPED,
    "closed": Broken(1, "closed"),
    "reset": Broken(1, "reset"),
    "short": Broken(1, "short"),
    "portal": PORTAL,
    "whole": WHOLE,
}
STAGES_OF_HUB = ("refs", "list", "head", "resolve", "fetch")
"""What opening revisions and reading them asks."""

LATER = {"hub": 5, "s3": 12}
"""How many requests for files are answered before a fault that comes later: those for headers come first."""

PASSING = [
    *(("hub", stage, "503") for stage in STAGES_OF_HUB),
    *(("hub", "fetch", fault) for fault in ("429", "dropped", "closed", "reset", "short", "portal", "whole")),
    ("s3", "list", "503"),
    *(("s3", "fetch", fault) for fault in ("503", "dropped", "closed", "short", "portal", "whole")),
]
LASTING = [
    *(("hub", stage, fault, False) for stage in STAGES_OF_HUB for fault in ("401", "503")),
    *(("hub", "fetch", fault, True) for fault in ("closed", "portal")),
    *(("s3", stage, fault, stage == "fetch") for stage in ("list", "fetch") for fault in ("403", "503")),
]


def place(name: str, request: pytest.FixtureRequest, run: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Traffic, str]:
    """The run on the Hub or in an object store: what is asked there, and its address."""
    if name == "hub":
        request.getfixturevalue("repo")
        hub: Hub = request.getfixturevalue("hub")
        hub.careless = True  # it repeats the token to whoever sent it
        return hub, f"hf://{REPO}@step*"
    pytest.importorskip("s3fs")
    monkeypatch.setattr("ckavg.storage.hub_errors.time.sleep", lambda _seconds: None)
    monkeypatch.setattr("s3fs.core.S3FileSystem.retries", 1)  # it asks again by itself, and pauses
    store: Store = request.getfixturevalue("s3")
    return store, store.upload(run, "team/run")


@pytest.mark.parametrize(("where", "stage", "fault"), PASSING)
def test_what_passes_costs_nothing(
    request: pytest.FixtureRequest,
    monkeypatch: pytest.MonkeyPatch,
    run: Path,
    expected: dict[str, bytes],
    tmp_path: Path,
    where: str,
    stage: str,
    fault: str,
) -> None:
    traffic, address = place(where, request, run, monkeypatch)
    traffic.faults[stage] = FAULTS[fault], 1
    opened = ckavg.open_run(address, max_disk=0 if fault in ("closed", "whole") else None)
    assert weights_of(ckavg.average(opened, ckavg.PEMA(), out=tmp_path / "out").directory) == expected
    assert traffic.faults[stage][1] == 0
    assert not list((cache_directory() / "files").glob("*")), "nobody else knows of what was downloaded"


@pytest.mark.parametrize(("where", "stage", "fault", "is_later"), LASTING)
def test_what_lasts_is_told_once(
    request: pytest.FixtureRequest,
    monkeypatch: pytest.MonkeyPatch,
    run: Path,
    expected: dict[str, bytes],
    tmp_path: Path,
    where: str,
    stage: str,
    fault: str,
    is_later: bool,
) -> None:
    """Nothing is left under the name of the result, and the same command succeeds once it is over."""
    traffic, address = place(where, request, run, monkeypatch)
    out = tmp_path / "out"
    command = ("pema", address, "--out", str(out), *(("--max-disk", "0") if is_later else ()))
    traffic.faults[stage], traffic.passes_before[stage] = (FAULTS[fault], FOREVER), LATER[where] if is_later else 0
    told = refused(*command, named=REPO if where == "hub" else address)
    if where == "hub":
        assert (f"({fault})" if fault.isdigit() else "127.0.0.1") in told
    keeps_to_itself(told, also=[str(cache_directory())])
    assert not out.exists()
    traffic.faults.clear()
    again = run_cli(*command)
    assert again.exit_code == 0, again.output
    assert weights_of(out) == expected
    assert not list(tmp_path.glob(".*")), "what was interrupted is cleared away"


def test_the_revision_of_folders(hub: Hub, run: Path, expected: dict[str, bytes], tmp_path: Path) -> None:
    publish_folders(hub, REPO, run, revision="v2")
    source, out = f"hf://{REPO}@v2", tmp_path / "remote"
    hub.faults["info"] = 503, FOREVER
    assert "looking for its revision v2" in refused("pema", source, "--out", out, named=REPO)
    hub.faults["info"] = 503, 1
    assert run_cli("pema", source, "--out", out).exit_code == 0
    assert weights_of(out) == expected


@pytest.mark.parametrize("max_disk", [None, 0])
def test_a_hub_that_knows_no_ranges(
    hub: Hub, repo: Repo, expected: dict[str, bytes], tmp_path: Path, max_disk: int | None
) -> None:
    """It answers each request with the whole file: slow, but correct."""
    hub.faults["fetch"] = WHOLE, FOREVER
    run = ckavg.open_run(f"hf://{REPO}@step*", max_disk=max_disk)
    assert weights_of(ckavg.average(run, ckavg.PEMA(), out=tmp_path / "remote").directory) == expected


@pytest.mark.parametrize(
    ("data", "start", "stop", "got"),
    [
        (b"cd", 2, 4, b"cd"),
        (b"abcdef", 2, 4, b"cd"),
        (b"abcdef", 0, 6, b"abcdef"),
        (b"c", 2, 4, None),
        (b"cde", 2, 4, None),
        (b"", 2, 4, None),
    ],
)
def test_ranges_that_were_asked_for(data: bytes, start: int, stop: int, got: bytes | None) -> None:
    """Of a file of six bytes."""
    if got is None:
        with pytest.raises(ShortAnswerError):
            exactly(data, start, stop, 6)
    else:
        assert exactly(data, start, stop, 6) == got


@pytest.mark.parametrize("max_disk", [None, 0])
def test_an_object_that_changes_while_it_is_read(s3: Store, run: Path, tmp_path: Path, max_disk: int | None) -> None:
    address, out = s3.upload(run, "team/run"), tmp_path / "out"
    name = "checkpoint-20/model-00002-of-00002.safetensors"
    opened = ckavg.open_run(address, max_disk=max_disk)
    data = bytearray((run / name).read_bytes())
    data[-1] ^= 0x40
    s3.then["fetch"] = lambda: s3.put(f"team/run/{name}", bytes(data))
    with pytest.raises(ChangedError, match=rf"^{address}/checkpoint-20/model-00002.* was changed or replaced while"):
        ckavg.average(opened, ckavg.PEMA(), out=out)
    assert not out.exists()
    assert not list(tmp_path.glob(".*")), "what was made of two states is not kept"
    assert ckavg.average(ckavg.open_run(address), ckavg.PEMA(), out=out).steps == (10, 20, 30)
    assert not list((cache_directory() / "files").glob("*"))


def test_an_object_that_goes_while_it_is_read(s3: Store, run: Path, tmp_path: Path) -> None:
    address = s3.upload(run, "team/run")
    opened = ckavg.open_run(address, max_disk=0)
    s3.then["fetch"] = lambda: s3.delete("team/run/checkpoint-10/model.safetensors")
    with pytest.raises(ckavg.CkavgError, match=rf"^{address}/checkpoint-10/model.safetensors"):
        ckavg.average(opened, ckavg.PEMA(), out=tmp_path / "out")
    assert not (tmp_path / "out").exists()
