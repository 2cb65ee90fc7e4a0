"""Requests that are made again: how often, after how long, and which are not."""

from __future__ import annotations

import time

import pytest

from ckavg.remote.tries import TRIES, with_retries


class RefusedError(Exception):
    """An answer of a Hub, as its clients raise it."""

    def __init__(self, after: str | None) -> None:
        super().__init__("too many requests")
        headers = {} if after is None else {"Retry-After": after}
        self.response = type("Response", (), {"status_code": 429, "headers": headers})()


@pytest.fixture
def pauses(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Seconds that would be waited."""
    waited: list[float] = []
    monkeypatch.setattr(time, "sleep", waited.append)
    return waited


def failing(times: int, after: str | None) -> list[Exception]:
    return [RefusedError(after) for _ in range(times)]


def ask(errors: list[Exception]) -> str:
    if errors:
        raise errors.pop()
    return "answer"


def test_the_pauses_grow_and_end(pauses: list[float]) -> None:
    errors = failing(TRIES - 1, None)
    assert with_retries(lambda: ask(errors), passes=lambda _: True) == "answer"
    assert len(pauses) == TRIES - 1
    for pause, longest in zip(pauses, (0.5, 1, 2, 4), strict=True):
        assert longest / 2 <= pause <= longest
    errors = failing(TRIES, None)
    with pytest.raises(RefusedError):
        with_retries(lambda: ask(errors), passes=lambda _: True)


def test_as_long_as_it_is_asked_for(pauses: list[float]) -> None:
    errors = failing(2, "7")
    assert with_retries(lambda: ask(errors), passes=lambda _: True) == "answer"
    assert pauses == [7, 7]


@pytest.mark.parametrize(("after", "passes"), [("3600", True), ("1", False)])
def test_what_would_take_an_hour_or_never_passes_is_raised_at_once(
    after: str, passes: bool, pauses: list[float]
) -> None:
    errors = failing(1, after)
    with pytest.raises(RefusedError):
        with_retries(lambda: ask(errors), passes=lambda _: passes)
    assert pauses == []
