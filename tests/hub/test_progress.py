"""Progress by byte while a large file is sent, over HTTP and with hf_xet."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import ckavg
from ckavg.hub.transfer import Transfer
from tests.hub import server
from tests.hub.state import DROPPED, Hub
from tests.hub.wire import Answer, Request
from tests.runs import write_run

REPO = "ada/averaged"
LARGE = 12_000_000
"""Elements of the one weight: 48 MB in the file."""


@pytest.fixture
def large(tmp_path: Path) -> Path:
    """An average of one large file."""
    weights = [{"w": torch.rand(LARGE, generator=torch.Generator().manual_seed(step))} for step in (0, 1)]
    run = write_run(tmp_path / "large", weights, (0, 10))
    return ckavg.average(ckavg.open_run(run), ckavg.EMA()).directory


def reports_of(result: Path) -> list[ckavg.Progress]:
    reports: list[ckavg.Progress] = []
    ckavg.push_result(result, REPO, on_progress=reports.append)
    return [each for each in reports if each.stage == "upload"]


def assert_told_by_byte(result: Path, reports: list[ckavg.Progress]) -> None:
    done, total = [each.done for each in reports], reports[0].total
    assert {each.total for each in reports} == {total}
    assert (done[0], done[-1]) == (0, total)
    assert done == sorted(done)
    inside = [each for each in done if 0 < each < (result / "model.safetensors").stat().st_size]
    assert len(inside) >= 3


def test_over_http(hub: Hub, large: Path) -> None:
    assert_told_by_byte(large, reports_of(large))


def test_a_part_that_is_sent_again_takes_nothing_back(hub: Hub, large: Path) -> None:
    hub.faults["put"] = DROPPED, 2
    assert_told_by_byte(large, reports_of(large))


def test_what_is_there_already_is_not_counted_as_sent(hub: Hub, large: Path) -> None:
    ckavg.push_result(large, REPO)
    done = [each.done for each in reports_of(large)]
    assert len(done) == 3, "the beginning, the large file, and all"


def test_with_xet(hub: Hub, large: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The real hf_xet, to a store of its own in a directory, in a process of its own."""
    pytest.importorskip("hf_xet")
    original = server._of_repo

    def of_repo(hub: Hub, request: Request, name: str, rest: str) -> Answer:
        if not rest.startswith("xet-write-token"):
            return original(hub, request, name, rest)
        told = {"casUrl": f"local://{tmp_path / 'store'}", "accessToken": "x", "exp": int(time.time()) + 3_600}
        headers = {f"X-Xet-{key}": str(told[name]) for key, name in XET_HEADERS.items()}
        return Answer(json.dumps(told).encode(), 200, headers)

    (tmp_path / "store").mkdir()
    monkeypatch.setattr(server, "_of_repo", of_repo)
    code = (
        "import json, time, ckavg, ckavg.errors\n"
        "time.sleep = lambda _: None\n"
        "from ckavg.hub.transfer import Transfer\n"
        "reports, positions, reach = [], [], Transfer.reach\n"
        "Transfer.reach = lambda self, position: (positions.append(position), reach(self, position))\n"
        f"try: ckavg.push_result({str(large)!r}, {REPO!r}, on_progress=reports.append)\n"
        "except ckavg.errors.HubError as error: pass\n"  # the Hub on loopback does not see what is in the store
        "print(json.dumps([positions, [each.done for each in reports if each.stage == 'upload']]))"
    )
    env = {name: value for name, value in os.environ.items() if name != "HF_HUB_DISABLE_XET"}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True)
    assert done.stderr == "", "no bars of the client's"
    size = (large / "model.safetensors").stat().st_size
    positions, told = json.loads(done.stdout)
    assert size in positions, "what it reports last; how often before, is a matter of time"
    assert told == sorted(told)
    assert size in told


XET_HEADERS = {"Cas-Url": "casUrl", "Access-Token": "accessToken", "Token-Expiration": "exp"}


def test_reports_are_a_megabyte_apart_and_never_go_back() -> None:
    told: list[int] = []
    transfer = Transfer(told.append)
    for position in (1_000, 2_000_000, 2_500_000, 0, 500_000, 3_500_000):
        transfer.reach(position)
    transfer.complete(4_000_000)
    transfer.reach(100)
    transfer.complete(10)
    assert told == [2_000_000, 3_500_000, 4_000_000, 4_000_010]
