"""What goes wrong between an object store and a run that is read from it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import ckavg
from ckavg.errors import ChangedError
from ckavg.storage.atomic import cache_directory
from tests.hub.wire import DROPPED, PORTAL, WHOLE, Broken
from tests.remote.outcome import keeps_to_itself, no_view_is_left, refused, weights_of
from tests.remote.stores import Store

pytestmark = pytest.mark.usefixtures("without_pictures")

pytest.importorskip("s3fs")

FOREVER = 10_000
PASSING: dict[str, Any] = {
    "503": 503,
    "dropped": DROPPED,
    "closed": Broken(1, "closed"),
    "short": Broken(1, "short"),
    "portal": PORTAL,
    "whole": WHOLE,
}
FAULTS = PASSING | {"403": 403, "404": 404}
NEVER_ON_A_LIST = ("portal", "whole")
"""What is no XML at all is taken for an empty list by the driver, and so for a place where nothing is."""
LATER = 12
"""How many files are answered for before a fault that comes later: configs and headers come first."""


@pytest.fixture(autouse=True)
def _no_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ckavg.remote.tries.time.sleep", lambda _seconds: None)
    monkeypatch.setattr("s3fs.core.S3FileSystem.retries", 1)  # it asks again by itself, and pauses


@pytest.fixture
def address(s3: Store, run: Path) -> str:
    return s3.upload(run, "team/run")


@pytest.fixture
def expected(run: Path, tmp_path: Path) -> dict[str, bytes]:
    return weights_of(ckavg.average(ckavg.open_run(run), ckavg.PEMA(), out=tmp_path / "local").directory)


@pytest.mark.parametrize(("max_disk", "when"), [(None, "first"), (0, "later")])
@pytest.mark.parametrize(
    ("stage", "fault"),
    [("fetch", fault) for fault in PASSING] + [("list", fault) for fault in PASSING if fault not in NEVER_ON_A_LIST],
)
def test_what_passes_costs_nothing(
    s3: Store,
    address: str,
    expected: dict[str, bytes],
    tmp_path: Path,
    stage: str,
    fault: str,
    max_disk: int | None,
    when: str,
) -> None:
    """The list is asked for twice: in the end it tells whether the files are the same."""
    before = 0 if when == "first" else {"list": 1, "fetch": LATER}[stage]
    s3.faults[stage], s3.passes_before[stage] = (PASSING[fault], 1), before
    run = ckavg.open_run(address, max_disk=max_disk)
    got = ckavg.average(run, ckavg.PEMA(), out=tmp_path / "remote")
    assert weights_of(got.directory) == expected
    assert s3.faults[stage][1] == 0
    assert not list((cache_directory() / "files").glob("*")), "nobody else knows of what was fetched whole"


@pytest.mark.parametrize(("max_disk", "when"), [(None, "first"), (0, "later")])
@pytest.mark.parametrize(
    ("stage", "fault"),
    [(stage, fault) for stage in ("list", "fetch") for fault in FAULTS if fault != "whole"],
)
def test_what_lasts_is_told_once(
    s3: Store,
    address: str,
    expected: dict[str, bytes],
    tmp_path: Path,
    stage: str,
    fault: str,
    max_disk: int | None,
    when: str,
) -> None:
    out = tmp_path / "remote"
    command = ("pema", address, "--out", str(out), *(() if max_disk is None else ("--max-disk", str(max_disk))))
    before = 0 if when == "first" else {"list": 1, "fetch": LATER}[stage]
    s3.faults[stage], s3.passes_before[stage] = (FAULTS[fault], FOREVER), before
    told = refused(*command, named="s3://runs/team/run")
    keeps_to_itself(told, also=[str(cache_directory())])
    assert not out.exists()
    s3.faults.clear()
    assert ckavg.average(ckavg.open_run(address, max_disk=max_disk), ckavg.PEMA(), out=out).directory == out
    assert weights_of(out) == expected
    assert not list(tmp_path.glob(".*")), "what was interrupted is cleared away"
    no_view_is_left()


@pytest.mark.parametrize("max_disk", [None, 0])
def test_an_object_that_changes_while_it_is_read(s3: Store, address: str, tmp_path: Path, max_disk: int | None) -> None:
    out, name = tmp_path / "out", "team/run/checkpoint-20/model-00002-of-00002.safetensors"
    run = ckavg.open_run(address, max_disk=max_disk)
    data = bytearray((tmp_path / "run" / name.removeprefix("team/run/")).read_bytes())
    data[-1] ^= 0x40
    s3.then["fetch"] = lambda: s3.put(name, bytes(data))
    with pytest.raises(ChangedError, match=rf"^{address}/checkpoint-20/model-00002.* was changed or replaced while"):
        ckavg.average(run, ckavg.PEMA(), out=out)
    assert not out.exists()
    assert not list(tmp_path.glob(".*")), "what was made of two states is not kept"
    assert ckavg.average(ckavg.open_run(address), ckavg.PEMA(), out=out).steps == (10, 20, 30)
    assert not list((cache_directory() / "files").glob("*"))


def test_an_object_that_goes_while_it_is_read(s3: Store, address: str, tmp_path: Path) -> None:
    run = ckavg.open_run(address, max_disk=0)
    s3.then["fetch"] = lambda: s3.delete("team/run/checkpoint-10/model.safetensors")
    with pytest.raises(ckavg.CkavgError, match=rf"^{address}/checkpoint-10/model.safetensors"):
        ckavg.average(run, ckavg.PEMA(), out=tmp_path / "out")
    assert not (tmp_path / "out").exists()
