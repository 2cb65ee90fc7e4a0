"""Front matter: whatever is in it, a parser of YAML reads it back."""

from __future__ import annotations

import math

import pytest
import yaml

from ckavg.output.front_matter import as_front_matter, parse_card

ODD = [
    "a: b",
    "---",
    "\n---\n",
    '"',
    "\\",
    "\x85\u2028",
    "\x00\x7f",
    "\U0001f600\U000e0041",
    "- x",
    "#",
    "no",
    "1e5",
    "{",
    "é",
]


@pytest.mark.parametrize("value", ODD, ids=ascii)
def test_front_matter_holds_any_text(value: str) -> None:
    fields = {"a_b": value, value: [value, {value: value}]}
    block = as_front_matter(fields)
    assert yaml.safe_load(block.removeprefix("---\n").removesuffix("\n---")) == fields
    assert block.count("\n---") == 1
    assert parse_card(f"{block}\ntext".encode()) == parse_card(f"\n\n{block}\r\ntext".encode())
    assert dict(parse_card(f"{block}\ntext".encode()).metadata) == fields


@pytest.mark.parametrize("value", [0, -7, 1.0, 1e-7, 1e300, -2.5e22, math.inf, -math.inf, True, None, [], {}, [[{}]]])
def test_front_matter_holds_any_value(value: object) -> None:
    block = as_front_matter({"x_y": value})
    assert yaml.safe_load(block.removeprefix("---\n").removesuffix("\n---")) == {"x_y": value}
