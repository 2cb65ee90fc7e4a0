"""Front matter: whatever is in it, it is read as what was written, or refused."""

from __future__ import annotations

import math
from typing import Any

import pytest
from huggingface_hub import ModelCardData

from ckavg.output.origin import parse_card

ODD = ["a: b", "---", "\n---\n", '"', "\\", "\x00\x7f", "\U0001f600\U000e0041", "- x", "#", "no", "1e5", "{", "é"]
NUMBERS: list[Any] = [0, -7, 1.0, 1e-7, 1e300, -2.5e22, math.inf, -math.inf, True, None, [], {}, [[{}]]]


@pytest.mark.parametrize("value", [*ODD, *NUMBERS], ids=ascii)
def test_front_matter_is_read_as_the_hub_writes_it(value: object) -> None:
    fields: dict[str, Any] = {"a_b": [value]} | ({value: value} if isinstance(value, str) else {})
    block = f"---\n{ModelCardData(**fields).to_yaml()}\n---"
    card = parse_card(f"{block}\ntext".encode())
    assert (dict(card.metadata), card.text) == (fields, "text")
    assert card == parse_card(f"\n\n{block}\r\ntext".encode())
