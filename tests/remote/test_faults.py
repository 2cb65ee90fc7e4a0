"""What goes wrong between the Hub and a run that is read from it: at every stage, once, now and then, and for good."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import ckavg
from tests.cli.runner import run_cli
from tests.exhaustive import unless
from tests.hub.server import Hub, Repo
from tests.hub.wire import DROPPED, PORTAL, WHOLE, Broken
from tests.remote.outcome import keeps_to_itself, refused, weights_of
from tests.remote.published import publish_folders
from tests.remote.questions import REPO

pytestmark = pytest.mark.usefixtures("without_pictures")

FOREVER = 1_000
STAGES = ("refs", "list", "head", "resolve", "fetch")
"""What opening revisions and reading them asks. `info` is asked for where one revision holds folders."""
PASSING: dict[str, Any] = {
    "429": 429,
    "503": 503,
    "dropped": DROPPED,
    "closed": Broken(1, "closed"),
    "reset": Broken(1, "reset"),
    "short": Broken(1, "short"),
    "portal": PORTAL,
    "whole": WHOLE,
}
FAULTS = PASSING | {"401": 401, "403": 403, "404": 404}
SAID = {name: f"({name})" for name in FAULTS if name.isdigit()}
LATER = {"list": 2, "head": 2, "resolve": 5, "fetch": 5}
"""How many requests are answered before a fault that comes later: those for headers come first."""
LATER_OF_WEIGHTS = ("resolve", "fetch")
"""Stages that are asked for while the run is averaged, too."""


def occurs(stage: str, fault: Any) -> bool:
    """Whether a fault shows at a stage: what has no body cannot break off, and ranges are asked for of files alone."""
    if isinstance(fault, Broken):
        return stage != "head"
    return fault != WHOLE or stage in ("resolve", "fetch")


LASTING = [
    (stage, name) for stage in STAGES for name, fault in FAULTS.items() if fault != WHOLE and occurs(stage, fault)
]
TYPICAL = ("503", "401", "closed")
"""Of answers, refusals and connections, one each; the others are tried where all is."""


@pytest.fixture
def expected(run: Path, tmp_path: Path) -> dict[str, bytes]:
    return weights_of(ckavg.average(ckavg.open_run(run), ckavg.PEMA(), out=tmp_path / "local").directory)


@pytest.mark.parametrize(("max_disk", "when"), [(None, "first"), (0, "later")])
@pytest.mark.parametrize(
    ("stage", "fault"),
    [
        pytest.param(stage, name, marks=unless(name in TYPICAL))
        for stage in STAGES
        for name, each in PASSING.items()
        if occurs(stage, each)
    ],
)
def test_what_passes_costs_nothing(
    hub: Hub,
    repo: Repo,
    expected: dict[str, bytes],
    tmp_path: Path,
    stage: str,
    fault: str,
    max_disk: int | None,
    when: str,
) -> None:
    before = 0 if when == "first" or stage == "refs" else LATER[stage]
    hub.faults[stage], hub.passes_before[stage] = (PASSING[fault], 1), before
    run = ckavg.open_run(f"hf://{REPO}@step*", max_disk=max_disk)
    got = ckavg.average(run, ckavg.PEMA(), out=tmp_path / "remote")
    assert weights_of(got.directory) == expected
    assert hub.faults[stage][1] == 0


@pytest.mark.parametrize(
    ("stage", "fault", "when"),
    [
        pytest.param(*each, when, marks=unless(each[1] in TYPICAL))
        for each in LASTING
        for when in ("first", "later")
        if when == "first" or each[0] in LATER_OF_WEIGHTS
    ],
)
def test_what_lasts_is_told_once(
    hub: Hub, repo: Repo, expected: dict[str, bytes], tmp_path: Path, stage: str, fault: str, when: str
) -> None:
    """Nothing is left under the name of the result, and the same command succeeds once it is over."""
    hub.careless = True  # it repeats the token to whoever sent it
    out = tmp_path / "remote"
    command = ("pema", f"hf://{REPO}", "--revisions", "step*", "--out", str(out))
    streamed = ("--max-disk", "0") if when == "later" else ()
    before = 0 if when == "first" or stage == "refs" else LATER[stage]
    hub.faults[stage], hub.passes_before[stage] = (FAULTS[fault], FOREVER), before
    assert SAID.get(fault, "127.0.0.1") in refused(*command, *streamed, named=REPO)
    assert not out.exists()
    keeps_to_itself(run_cli(*command, *streamed, "-v").stderr.replace("Traceback", ""))
    hub.faults.clear()
    again = run_cli(*command, *streamed)
    assert again.exit_code == 0, again.output
    assert weights_of(out) == expected
    assert not list(tmp_path.glob(".*")), "what was interrupted is cleared away"


@pytest.mark.parametrize("fault", FAULTS)
def test_the_revision_of_folders(hub: Hub, run: Path, expected: dict[str, bytes], tmp_path: Path, fault: str) -> None:
    publish_folders(hub, REPO, run, revision="v2")
    source, out = f"hf://{REPO}@v2", tmp_path / "remote"
    hub.faults["info"] = FAULTS[fault], FOREVER
    if fault != "whole":
        told = refused("pema", source, "--out", out, named=REPO)
        assert "looking for its revision v2" in told
        assert SAID.get(fault, "127.0.0.1") in told
    if fault in PASSING:
        hub.faults["info"] = FAULTS[fault], 1
        assert run_cli("pema", source, "--out", out).exit_code == 0
        assert weights_of(out) == expected


@pytest.mark.parametrize("max_disk", [None, 0])
def test_a_hub_that_knows_no_ranges(
    hub: Hub, repo: Repo, expected: dict[str, bytes], tmp_path: Path, max_disk: int | None
) -> None:
    """It answers each with the whole file: dear, and right."""
    hub.faults["fetch"] = WHOLE, FOREVER
    run = ckavg.open_run(f"hf://{REPO}@step*", max_disk=max_disk)
    assert weights_of(ckavg.average(run, ckavg.PEMA(), out=tmp_path / "remote").directory) == expected
