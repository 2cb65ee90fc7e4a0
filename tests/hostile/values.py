"""JSON that nobody should write: tokens, values, and sound documents with something else in one place."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from hypothesis import strategies as st

Path = tuple[str | int, ...]


class Raw(str):
    """A token that stands in the text as it is, whether JSON knows it or not."""

    __slots__ = ()


TOKENS = st.sampled_from(
    [
        "NaN", "Infinity", "-Infinity", "1e400", "-1e400", "-0", "-0.0", "1E2", "0x10", "01", "+1", ".5", "1.", "nul",
        "True", "'w'", "9" * 19, "9" * 400, "9" * 4_299, "9" * 100_000, "-" + "9" * 100_000, "1" + "0" * 4_500,
        "18446744073709551616", "9223372036854775808", "9223372036854775807", "4611686018427387904", "1e18", "2.0",
        "[" * 500 + "]" * 500, "[" * 950 + "]" * 950, "[" * 100_000, '{"a":' * 900 + "1" + "}" * 900,
        "[" + "4611686018427387904," * 400 + "1]", "[" + "0," * 2_000 + "1]",
        '"\\ud800"', '"\\udc80x"', '"\\u0000"', '"\\n"', '"\\u202e"', '"\t"', '"\\u001b[31m"',
        '"' + "x" * 30_000 + '"', "",
    ]
).map(Raw)  # fmt: skip

VALUES = (
    TOKENS
    | st.none()
    | st.booleans()
    | st.integers(-(2**70), 2**70)
    | st.integers(-3, 100)
    | st.floats(-100, 100)
    | st.text(max_size=8)
    | st.lists(st.integers(-2, 20), max_size=5)
    | st.dictionaries(st.text(max_size=3), st.integers(0, 9), max_size=2)
    | st.lists(TOKENS, min_size=1, max_size=2)
)


def render(value: Any) -> str:
    """As JSON; an object is a list of pairs where a name is to appear twice."""
    if isinstance(value, Raw):
        return str(value)
    if isinstance(value, dict):
        value = Pairs(value.items())
    if isinstance(value, Pairs):
        inner = (f"{name if isinstance(name, Raw) else json.dumps(name)}:{render(each)}" for name, each in value)
        return "{" + ",".join(inner) + "}"
    if isinstance(value, list):
        return f"[{','.join(map(render, value))}]"
    return json.dumps(value)


class Pairs(list[tuple[str, Any]]):
    """An object in which names may repeat."""


def places(value: Any, here: Path = ()) -> Iterator[Path]:
    """Every place in a document, the document itself first."""
    yield here
    if isinstance(value, dict | list):
        for key, each in value.items() if isinstance(value, dict) else enumerate(value):
            yield from places(each, (*here, key))


def replaced(value: Any, place: Path, by: Any) -> Any:
    """The document with something else in one place."""
    if not place:
        return by
    key, *rest = place
    copy: Any = dict(value) if isinstance(value, dict) else list(value)
    copy[key] = replaced(value[key], tuple(rest), by)
    return copy


def without(value: Any, place: Path) -> Any:
    """The document without what is in one place, which is not all of it."""
    key, *rest = place
    copy: Any = dict(value) if isinstance(value, dict) else list(value)
    if rest:
        copy[key] = without(value[key], tuple(rest))
    else:
        del copy[key]
    return copy


@st.composite
def spoilt(draw: st.DrawFn, sound: Any, within: Path = ()) -> bytes:
    """The text of a sound document that was spoilt in one of the ways in which files are.

    Args:
        draw: of Hypothesis.
        sound: the document.
        within: replace, remove or repeat only what lies below this place.
    """
    text = render(sound).encode()
    everywhere = [place for place in places(sound) if place[: len(within)] == within]
    below = [place for place in everywhere if len(place) > len(within)]
    way = draw(st.sampled_from(["replace"] * 6 + ["remove", "rename", "twice", "cut", "bytes", "noise", "encoding"]))
    named = [place for place in below if isinstance(place[-1], str)]
    if way == "replace" or (way == "remove" and not below) or (way in ("rename", "twice") and not named):
        text = render(replaced(sound, draw(st.sampled_from(everywhere)), draw(VALUES))).encode()
    elif way == "remove":
        text = render(without(sound, draw(st.sampled_from(below)))).encode()
    elif way in ("rename", "twice"):
        *parent, key = draw(st.sampled_from(named))
        holder = sound
        for step in parent:
            holder = holder[step]
        name = draw(TOKENS.filter(lambda token: token.startswith('"')) | st.text(max_size=5))
        pairs = Pairs((name if way == "rename" and each == key else each, value) for each, value in holder.items())
        if way == "twice":
            pairs.append((str(key), draw(VALUES) if draw(st.booleans()) else holder[key]))
        text = render(replaced(sound, tuple(parent), pairs)).encode()
    elif way == "cut":
        text = text[: draw(st.integers(0, len(text) - 1))]
    elif way == "bytes":
        at = draw(st.integers(0, len(text)))
        text = text[:at] + draw(st.binary(max_size=4)) + text[at + draw(st.integers(0, 3)) :]
    elif way == "noise":
        text = draw(st.binary(max_size=200))
    else:
        encoding = draw(st.sampled_from(["utf-16", "utf-16-le", "utf-32", "utf-8-sig", "space", "after", "zero"]))
        others = {"space": b" \n" + text, "after": text + b" {}", "zero": text + b"\0"}
        text = others.get(encoding) or text.decode().encode(encoding)
    return text
