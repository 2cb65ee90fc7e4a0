"""What the released program did, it still does: statuses, results and records byte for byte, and the texts for now."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator
from typing import Any

import pytest

from tests.released.commands import COMMANDS
from tests.released.record import EXPECTED, TEXTS, observe, parts


@pytest.fixture(scope="module")
def observed() -> dict[str, dict[str, Any]]:
    behaviour, texts = parts(observe())
    return {EXPECTED.name: behaviour, TEXTS.name: texts}


def differences(want: Any, got: Any, place: str = "") -> Iterator[str]:
    """Where two values of JSON differ, and how."""
    if isinstance(want, dict) and isinstance(got, dict):
        for name in want.keys() | got.keys():
            yield from differences(want.get(name, "nothing"), got.get(name, "nothing"), f"{place} / {name}")
    elif isinstance(want, list) and isinstance(got, list) and len(want) == len(got):
        for number, (one, other) in enumerate(zip(want, got, strict=True)):
            name = one["command"] if isinstance(one, dict) and "command" in one else str(number)
            yield from differences(one, other, f"{place} / {name}")
    elif want != got and not (place.startswith("demo") and is_trained_alike(want, got)):
        yield f"{place}: {str(want)[:300]} became {str(got)[:300]}"


def is_trained_alike(want: Any, got: Any) -> bool:
    """Whether values of a model that was trained here may be of one training: its last bits are the processor's."""
    if isinstance(want, float) and isinstance(got, float):
        return math.isclose(want, got, rel_tol=1e-6)
    return isinstance(want, str) and all(re.fullmatch("[0-9a-f]{16}", str(each)) for each in (want, got))


@pytest.mark.parametrize("scenario", ["options", *COMMANDS, "pushed"])
@pytest.mark.parametrize("file", [EXPECTED, TEXTS], ids=lambda file: file.stem)
def test_what_was_released_is_as_it_was(file: Any, scenario: str, observed: dict[str, dict[str, Any]]) -> None:
    want = json.loads(file.read_text(encoding="utf-8"))[scenario]
    found = list(differences(want, observed[file.name][scenario], scenario))
    assert not found, "\n".join(sorted(found))
