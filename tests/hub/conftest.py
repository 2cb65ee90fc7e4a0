"""A Hub on loopback, a client that knows no other, and a result to push to it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import huggingface_hub
import pytest
import torch
from huggingface_hub import constants

import ckavg
from tests.hub.server import TOKEN, Hub, serving
from tests.runs import write_run

STEPS = (0, 10, 20)


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """A Hub whose user is logged in. What the client reads of the environment at import is set here, too."""
    home = tmp_path / "hf-home"
    with serving() as hub:
        for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HUGGING_FACE_HUB_TOKEN", "HF_TOKEN_PATH"):
            monkeypatch.delenv(name, raising=False)
        for name, value in {
            "HF_ENDPOINT": hub.url,
            "HF_HOME": str(home),
            "HF_TOKEN": TOKEN,
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
        }.items():
            monkeypatch.setenv(name, value)
        monkeypatch.setattr(constants, "ENDPOINT", hub.url)
        template = hub.url + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(home / "hub"))
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(home / "token"))
        monkeypatch.setattr(constants, "HF_STORED_TOKENS_PATH", str(home / "stored_tokens"))
        # between attempts it would wait, up to 8 s
        monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", lambda _seconds: None)
        yield hub
        huggingface_hub.close_session()  # connections that are kept may lead to the server of another test
        assert hub.leaked == []


@pytest.fixture
def run(tmp_path: Path) -> Path:
    weights = [
        {"a": torch.full((1000, 300), float(step)), "b": torch.full((600, 500), step + 0.5), "c": torch.ones(3)}
        for step in STEPS
    ]
    return write_run(tmp_path / "run", weights, STEPS, shards=(3,))


@pytest.fixture
def result(run: Path) -> Path:
    """An average in three weight files: two of 1.2 MB, and one of less than a kilobyte."""
    return ckavg.average(ckavg.open_run(run), ckavg.EMA()).directory
