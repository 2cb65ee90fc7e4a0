"""Tables that fit: numbers whole at any width, bars to scale, and text that any encoding has."""

from __future__ import annotations

import ast
import math
import re
from collections.abc import Sequence
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

import ckavg
from ckavg.cli.tables import Bar, Spark, Table, Words, sparkline
from ckavg.cli.text import ASCII, wrapped

NUMBERS = st.floats(-2, 2, allow_nan=False).map(lambda value: round(value, 4))
WIDTHS = st.integers(1, 130)


def lines_of(table: Table, width: int) -> list[str]:
    return [line.plain for line in table.laid_out(width)[0]]


# --- bars ---


def length(drawn: str) -> float:
    """Of a bar, in characters."""
    parts = {"█": 8, "▐": 4, "│": 0} | {char: eighths for eighths, char in enumerate(" ▏▎▍▌▋▊▉")}
    return sum(parts[char] for char in drawn) / 8


@given(values=st.lists(NUMBERS, min_size=1, max_size=9).filter(any), width=st.integers(8, 40))
def test_bars_are_to_one_scale_on_both_sides_of_one_axis(values: Sequence[float], width: int) -> None:
    drawn = [Bar(value, min(values), max(values)).as_text(width).plain for value in values]
    assert max(map(len, drawn)) <= width
    if min(values) >= 0:
        scale = width / max(values)
        assert not any("│" in each for each in drawn)
    else:
        (axis,) = {each.index("│") for each in drawn}
        scale = min(axis / -min(values), (width - 1 - axis) / max(values) if max(values) > 0 else math.inf)
        for value, each in zip(values, drawn, strict=True):
            assert set(each[axis + 1 :] if value < 0 else each[:axis]) <= {" "}
        assert scale > 0
    for value, each in zip(values, drawn, strict=True):
        assert length(each) == pytest.approx(abs(value) * scale, abs=0.26 if value < 0 else 0.07)


def test_a_bar_reaches_the_ends_of_its_scale() -> None:
    drawn = [Bar(value, -0.5, 1.0).as_text(31).plain for value in (-0.5, -0.25, 0.0, 0.05, 1.0)]
    assert drawn == ["██████████│", "     █████│", "          │", "          │█", "          │" + "█" * 20]
    assert Bar(-0.025, -0.5, 1.0).as_text(31).plain == "         ▐│"
    assert Bar(0.5, 0.0, 1.0).as_text(32).plain == "█" * 16


def test_a_sparkline_of_too_many_shows_sums() -> None:
    values = [0.1, None, 0.2, 0.3, None, None, 0.0, -0.4]
    assert Spark(values).as_text(8).plain == "▃·▅▇··▁-"
    assert Spark(values).as_text(4).plain == sparkline([0.1, 0.5]) + "·-"
    assert len(Spark([1.0] * 1000).as_text(37).plain) == 37


# --- tables ---

CELLS = st.lists(
    st.tuples(st.text("ab-/", min_size=1, max_size=30), NUMBERS, NUMBERS, st.sampled_from(["", "best", "up to date"])),
    min_size=1,
    max_size=6,
)


@given(rows=CELLS, width=WIDTHS)
def test_no_number_and_no_name_is_cut(rows: list[tuple[str, float, float, str]], width: int) -> None:
    table = Table("name", "first", "weights", "value", " ", left=("name", " "), spare=("first", "weights"))
    for name, first, value, mark in rows:
        table.add_row(name, f"{first:.4f}", Spark([0.5] * 20), f"{value:.4f}", Words(mark))
    lines, left_out = table.laid_out(width)
    assert len(lines) == len(rows) + 1
    for line, (name, first, value, mark) in zip(lines[1:], rows, strict=True):
        words = line.plain.split()
        assert words[0] == name
        assert f"{value:.4f}" in words
        assert ("first" in left_out) or f"{first:.4f}" in words
        assert line.plain.endswith(mark)
    kept = [title for title in ("first", "weights") if title not in left_out]
    others = [("name", *(name for name, *_ in rows)), ("value", *(f"{value:.4f}" for *_, value, _ in rows))]
    others.append((" ", *(mark for *_, mark in rows)))
    needed = sum(2 + max(map(len, column)) for column in others) + Spark([0.5]).least
    if kept:
        assert max(line.cell_len for line in lines) <= width, "what has room is no wider than there is"
    elif width >= needed:
        pytest.fail(f"there was room in {width} columns")


def test_blank_titles_are_not_shown() -> None:
    table = Table("", " ", left=("", " "))
    table.add_row("files", "ok")
    assert lines_of(table, 80) == ["files  ok"]


def test_columns_go_in_their_order_and_are_named() -> None:
    table = Table("step", "a", "b", "weight", " ", left=(" ",), spare=(" ", "b", "a"))
    table.add_row("100", "0.1234", "0.5678", "1.0000", Bar(1.0, 0.0, 1.0))
    assert lines_of(table, 80)[1] == " 100  0.1234  0.5678  1.0000  " + "█" * 32
    assert lines_of(table, 40)[1] == " 100  0.1234  0.5678  1.0000  " + "█" * 10
    assert (lines_of(table, 37)[1], table.laid_out(37)[1]) == (" 100  0.1234  0.5678  1.0000", [])
    assert (lines_of(table, 27)[1], table.laid_out(27)[1]) == (" 100  0.1234  1.0000", ["b"])
    assert (lines_of(table, 5)[1], table.laid_out(5)[1]) == (" 100  1.0000", ["a", "b"])


def test_what_wraps_keeps_its_place() -> None:
    table = Table("check", "says", left=("check", "says"), wraps=("says",))
    table.add_row("files", "nothing is missing or changed (6 files)")
    table.add_heading("more of them, and a long line of it")
    assert lines_of(table, 27) == [
        *("check  says", "files  nothing is missing", "       or changed (6 files)"),
        *("more of them, and a long", "line of it"),
    ]


# --- text ---


@given(text=st.text("abc /.:-12%MB±", max_size=200), width=WIDTHS, used=st.integers(0, 12))
def test_lines_break_between_words_alone(text: str, width: int, used: int) -> None:
    lines = wrapped(text, width, used).split("\n")
    assert " ".join(lines).split() == text.split()
    for number, line in enumerate(lines):
        assert len(line) + (used if number == 0 else 0) <= width or " " not in line or re.search(r"\d \S", line)
    assert not re.search(r"\d\n(%|MB|±)(\n| |$)", "\n".join(lines)), "a number stays with its unit"


PRINTED = {
    char
    for path in Path(ckavg.__file__).parent.rglob("*.py")
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
    if isinstance(node, ast.Constant) and isinstance(node.value, str)
    for char in node.value
    if not char.isascii()
}


def test_everything_that_is_said_has_a_spelling_in_ascii() -> None:
    spelled = {char: char.encode("ascii", ASCII).decode() for char in PRINTED}
    in_docstrings = set("\u0302\u0303é模")
    assert not {char for char, text in spelled.items() if "\\" in text or "?" in text} - in_docstrings
    assert {char: spelled[char] for char in "ℓβθ…±█│"} == {
        **{"ℓ": "l", "β": "beta", "θ": "theta", "…": "...", "±": "+/-", "█": "#", "│": "|"}
    }


@given(text=st.text(max_size=50))
@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "cp1252", "koi8-r"])
def test_any_text_goes_into_any_encoding(encoding: str, text: str) -> None:
    shown = text.encode(encoding, ASCII).decode(encoding)
    assert "".join(char for char in text if char.encode(encoding, "ignore")) == text or shown != text
    assert text.count("?") <= shown.count("?"), "no question mark is lost"
    if "?" not in text:
        assert "?" not in shown
    if text.isascii():
        assert shown == text


def test_what_is_drawn_is_as_wide_in_ascii() -> None:
    bars = [Bar(value, low, 1.0).as_text(32).plain for low in (0.0, -0.7) for value in (low, 0.03, 0.5, 1.0)]
    for drawn in [*bars, sparkline([0.1 * value for value in range(-1, 10)])]:
        assert len(drawn.encode("ascii", ASCII)) == len(drawn)
