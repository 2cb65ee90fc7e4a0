"""A Hub and an object store on loopback, and a run to read from them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from tests.hub.conftest import hub as hub
from tests.remote.stores import Store, fronting, storing
from tests.runs import write_run

STEPS = (10, 20, 30)


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """Three checkpoints of 1.2 MB in one file, two shards and one file."""
    weights = [
        {"a": torch.full((1000, 200), float(step)), "b": torch.full((200, 500), step + 0.5), "c": torch.ones(3)}
        for step in STEPS
    ]
    return write_run(tmp_path / "run", weights, STEPS, shards=(1, 2, 1))


@pytest.fixture(scope="session")
def _storage() -> Iterator[str]:
    pytest.importorskip("moto.server", reason="no object store without moto[s3], flask and flask-cors")
    with storing() as url:
        yield url


@pytest.fixture
def s3(_storage: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Store]:
    """A bucket of its own, in a store that the environment names; its clients try once, and know no other user."""
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
