"""Fixtures shared by all tests."""

from __future__ import annotations

import pytest
from hypothesis import settings

# The machine that runs the tests may be busy: how long an example takes says nothing about it.
# The same examples every time, so that what fails can be seen again.
settings.register_profile("ckavg", deadline=None, derandomize=True)
settings.load_profile("ckavg")


@pytest.fixture(autouse=True)
def _plain_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """No colours and a fixed width, so that what is printed can be compared."""
    monkeypatch.setenv("NO_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "120")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
