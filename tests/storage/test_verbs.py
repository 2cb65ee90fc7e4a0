"""Every command on a remote run; afterwards no downloads are left on this machine."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest

from ckavg.storage.atomic import cache_directory
from tests.checkpoints.test_parts import write_sharded
from tests.cli.runner import run_cli
from tests.hub.server import Hub, Repo
from tests.storage.outcome import cached_objects, keeps_to_itself, nothing_is_busy, served_of, size_of, weights_of
from tests.storage.published import REPO
from tests.storage.stores import Store

FAR = (f"hf://{REPO}", "--revisions", "step*")


def ran(*command: str | Path) -> str:
    """The stdout of a command that succeeds."""
    done = run_cli(*command)
    assert done.exit_code == 0, done.output
    keeps_to_itself(done.output)
    told = done.stdout
    del done
    nothing_is_busy()
    return told


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")


@pytest.fixture(params=["hub", "s3"])
def far(request: pytest.FixtureRequest, run: Path) -> tuple[str, ...]:
    """The run on the Hub, or in an object store, as words of a command."""
    if request.param == "hub":
        request.getfixturevalue("repo")
        return FAR
    store: Store = request.getfixturevalue("s3")
    return (store.upload(run),)


def test_inspect(far: tuple[str, ...], run: Path) -> None:
    there, here = (json.loads(ran("inspect", *words, "--json")) for words in (far, (run,)))
    assert [each["step"] for each in there["checkpoints"]] == [each["step"] for each in here["checkpoints"]]
    assert there["source"] == far[0]
    assert there["checkpoints"][0]["directory"] in (f"{far[0]}@step10", f"{far[0]}/checkpoint-10")
    shown = ran("inspect", *far)
    assert far[0] in shown
    assert "checkpoint-10 (anchor)" in shown or "step10 (anchor)" in shown


def test_inspect_deep(far: tuple[str, ...], run: Path) -> None:
    there, here = (json.loads(ran("inspect", *words, "--deep", "--json")) for words in (far, (run,)))
    digests = {name.partition("/")[2]: digest for name, digest in here["health"]["sha256"].items()}
    assert {name.partition("/")[2]: digest for name, digest in there["health"]["sha256"].items()} == digests
    assert there["health"]["findings"] == here["health"]["findings"]
    assert cached_objects() == []


def test_path(request: pytest.FixtureRequest, far: tuple[str, ...], run: Path, tmp_path: Path) -> None:
    places = {name: tmp_path / f"{name}.csv" for name in ("there", "streamed", "here")}
    ran("path", *far, "--csv", places["there"])
    for table in cache_directory().glob("path-*.json"):
        table.unlink()
    if "s3" in request.fixturenames:  # where it is kept beside the run
        request.getfixturevalue("s3").delete("run/averaged/path.json")
    ran("path", *far, "--max-disk", "0", "--csv", places["streamed"])
    ran("path", run, "--csv", places["here"])
    rows = {name: list(csv.reader(place.read_text().splitlines())) for name, place in places.items()}
    assert rows["there"] == rows["streamed"] == rows["here"]
    assert cached_objects() == []


def test_path_of_a_sample(far: tuple[str, ...], run: Path) -> None:
    told = json.loads(ran("path", *far, "--sample", "0.5", "--json"))
    exact = json.loads(ran("path", run, "--json"))
    assert told.keys() >= exact.keys() - {"directory"}
    assert cached_objects() == []


def test_sweep(far: tuple[str, ...], run: Path, tmp_path: Path) -> None:
    words = ("pema:gamma=0.1,0.2", "mean", "last")
    ran("sweep", far[0], *words, *far[1:], "--out", tmp_path / "there")
    ran("sweep", run, *words, "--out", tmp_path / "here-too")
    there, here = tmp_path / "there", tmp_path / "here-too"
    names = sorted(path.name for path in here.iterdir())
    assert len(names) == 4
    assert {name: weights_of(there / name) for name in names} == {name: weights_of(here / name) for name in names}
    assert cached_objects() == []


def test_snapshots_and_verify(far: tuple[str, ...], run: Path, tmp_path: Path) -> None:
    out = tmp_path / "here" / "averaged" / "pema-gamma0.15"
    ran("pema", *far, "--snapshot-every", "10")
    ran("pema", run, "--snapshot-every", "10", "--out", tmp_path / "expected")
    folders = (".", "checkpoint-20")
    assert all(weights_of(out / each) == weights_of(tmp_path / "expected" / each) for each in folders)
    ran("verify", out)
    ran("verify", out, "--fetch", "--sources")
    ran("verify", out, "--fetch", "--sources", "--replay")
    assert cached_objects() == []
    ran("verify", out / "checkpoint-20", "--fetch", "--sources")


def test_parts_are_verified_where_they_are(s3: Store, tmp_path: Path) -> None:
    address = s3.upload(write_sharded(tmp_path / "parts", "critic.safetensors", "a/b.safetensors"))
    ran("ema", address, "--out", tmp_path / "out")
    ran("verify", tmp_path / "out", "--fetch", "--sources", "--replay")


def test_verify_tells_what_is_gone(hub: Hub, repo: Repo, tmp_path: Path) -> None:
    ran("ema", *FAR, "--out", tmp_path / "out")
    del repo.commits[repo.branches.pop("step20")]
    done = run_cli("verify", tmp_path / "out", "--fetch", "--sources")
    assert done.exit_code == 1
    assert "step 20" in done.output
    keeps_to_itself(done.output)
    del done
    nothing_is_busy()
    del hub.repos[REPO]
    done = run_cli("verify", tmp_path / "out", "--fetch", "--sources")
    assert done.exit_code == 1
    keeps_to_itself(done.output)
    del done
    nothing_is_busy()


def test_inspection_fetches_no_more_than_it_needs(hub: Hub, repo: Repo, run: Path) -> None:
    ran("inspect", *FAR)
    assert served_of(hub.served) == 4 * (64 << 10)
    hub.forget()
    ran("inspect", *FAR, "--deep")
    assert served_of(hub.served) == 4 * (64 << 10) + size_of(run)
    hub.forget()
    ran("ema", *FAR)
    assert served_of(hub.served) == 0, "all of it is in the cache by then"
