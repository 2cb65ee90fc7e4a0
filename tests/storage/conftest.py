"""A Hub and an object store on loopback, and a run to read from them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from huggingface_hub import constants

import ckavg
from tests.hub.conftest import hub as hub
from tests.hub.server import Hub, Repo
from tests.runs import write_run
from tests.storage import mirrors
from tests.storage.outcome import wait_for_fetching, weights_of
from tests.storage.published import REPO, publish_revisions
from tests.storage.stores import Store, fronting, storing

STEPS = (10, 20, 30)


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture(autouse=True)
def _settled(request: pytest.FixtureRequest) -> Iterator[None]:
    """Requests that were under way when something failed end before the servers do; they share the client's session."""
    hub = request.getfixturevalue("hub") if "hub" in request.fixturenames else None
    yield
    if hub is not None:
        hub.released.set()
    wait_for_fetching()


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """Three checkpoints of 1.2 MB in one file, two shards and one file."""
    weights = [
        {"a": torch.full((1000, 200), float(step)), "b": torch.full((200, 500), step + 0.5), "c": torch.ones(3)}
        for step in STEPS
    ]
    return write_run(tmp_path / "run", weights, STEPS, shards=(1, 2, 1))


@pytest.fixture
def expected(run: Path, tmp_path: Path) -> dict[str, bytes]:
    """The weight files of its average on this machine."""
    return weights_of(ckavg.average(ckavg.open_run(run), ckavg.PEMA(), out=tmp_path / "local").directory)


@pytest.fixture
def repo(hub: Hub, run: Path) -> Repo:
    """The run as the revisions `step10`, `step20` and `step30` of `lab/run`."""
    return publish_revisions(hub, REPO, run)


@pytest.fixture(scope="session")
def _storage() -> Iterator[str]:
    pytest.importorskip("moto.server", reason="no object store without moto[s3], flask and flask-cors")
    with storing() as url:
        yield url


@pytest.fixture
def s3(_storage: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Store]:
    """A fresh bucket in the store that the environment names; clients do not retry and have no other credentials."""
    with fronting(_storage) as store:
        for name in ("AWS_PROFILE", "AWS_SESSION_TOKEN", "AWS_ENDPOINT_URL_S3", "AWS_CA_BUNDLE"):
            monkeypatch.delenv(name, raising=False)
        for name, value in {
            "AWS_ENDPOINT_URL": store.url,
            "AWS_ACCESS_KEY_ID": "AKIASTANDIN",
            "AWS_SECRET_ACCESS_KEY": "SecretOfTheStore",
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_CONFIG_FILE": str(tmp_path / "no-config"),
            "AWS_SHARED_CREDENTIALS_FILE": str(tmp_path / "no-credentials"),
            "AWS_EC2_METADATA_DISABLED": "true",
            "AWS_MAX_ATTEMPTS": "1",
        }.items():
            monkeypatch.setenv(name, value)
        yield store


def _known_to_the_client(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_ENDPOINT", url)
    monkeypatch.setattr(constants, "ENDPOINT", url)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", url + "/{repo_id}/resolve/{revision}/{filename}")


@pytest.fixture
def olah(hub: Hub, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[mirrors.Olah]:
    """Olah as the Hub of the client, with the run as revisions of `lab/run`, which it gets from the Hub on loopback.

    It asks again for what a branch leads to after ten minutes.
    """
    if reason := mirrors.missing():
        pytest.skip(reason)
    publish_revisions(hub, REPO, run)
    with mirrors.mirroring_hub(hub, REPO, tmp_path / "olah") as olah:
        _known_to_the_client(olah.url, monkeypatch)
        yield olah


@pytest.fixture
def olah_of_git(hub: Hub, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[mirrors.Olah]:
    """Likewise, but the run lies in a git repository, and nothing of our own takes part; it knows no ranges."""
    if reason := mirrors.missing():
        pytest.skip(reason)
    repo = publish_revisions(hub, REPO, run)
    with mirrors.mirroring_git(repo, REPO, tmp_path / "olah") as olah:
        _known_to_the_client(olah.url, monkeypatch)
        yield olah
    assert hub.requests == []
