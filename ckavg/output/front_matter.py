"""Stage *write*: the metadata above the text of a card, parsed and written as YAML. Pure; believes nothing it reads."""

from __future__ import annotations

import datetime
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

_BLOCK = re.compile(r"\A\s*---[ \t]*\n(.*?\n)??---[ \t]*(?:\n|\Z)", re.DOTALL)
_OPENS = re.compile(r"\A\s*---[ \t]*\n")
_PLAIN_KEY = re.compile(r"[a-z][a-z0-9]*(?:[_-][a-z0-9]+)+|base|tags|license|language|datasets|metrics|widget")
_DEEPEST = 32
_LONGEST_KEY = 100
_MOST_CHARACTERS = 1_000_000
_LARGEST = 1 << 63


@dataclass(frozen=True, slots=True)
class Card:
    """A model card in two parts.

    Attributes:
        metadata: the fields of its front matter, by name; empty where it has none.
        text: the Markdown below.
    """

    metadata: Mapping[str, Any]
    text: str


def parse_card(content: bytes) -> Card:
    """The front matter and the text of a Markdown file.

    Args:
        content: the file, in UTF-8.

    Raises:
        ValueError: it is no text, or its front matter is not a mapping of plain values; the message says what is wrong.
    """
    try:
        text = content.decode("utf-8-sig").replace("\r\n", "\n").replace("\r", "\n")
    except UnicodeDecodeError as error:
        raise ValueError(f"it is not UTF-8 text (byte {error.start})") from error
    found = _BLOCK.match(text)
    if found is None:
        if _OPENS.match(text):
            raise ValueError("its front matter begins with --- and has no second --- that ends it")
        return Card({}, text)
    return Card(_parsed(found[1] or ""), text[found.end() :])


def as_front_matter(metadata: Mapping[str, Any]) -> str:
    """The fields as a block of YAML between two lines of dashes, one line each, in their order.

    Whatever a value holds, it stays a value: texts are quoted, and no character in them has a meaning.

    >>> print(as_front_matter({"license": "mit", "tags": ["a: b", "---"], "odd key": {"x": 1e-05}}))
    ---
    license: "mit"
    tags: ["a: b", "---"]
    "odd key": {"x": 1.0e-05}
    ---
    """
    lines = [f"{key if _PLAIN_KEY.fullmatch(key) else _quoted(key)}: {_yaml(value)}" for key, value in metadata.items()]
    return "\n".join(["---", *lines, "---"])


def _parsed(block: str) -> dict[str, Any]:
    import yaml  # takes a while, and most runs have no card

    if len(block) > _MOST_CHARACTERS:
        raise ValueError(f"its front matter is longer than {_MOST_CHARACTERS:,} characters")
    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # the same in C, where it was built: ten times as fast
    try:
        depth = 0
        for event in yaml.parse(block, Loader=loader):
            if isinstance(event, yaml.AliasEvent):  # a few of them may stand for more values than memory holds
                raise ValueError("its front matter uses an alias (*name), which is not read")
            depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
            if depth > _DEEPEST:
                raise ValueError(f"its front matter is nested more than {_DEEPEST} deep")
        _check_keys(yaml.compose(block, Loader=loader), yaml)
        parsed = _constructed(block, loader)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f" (line {mark.line + 2})" if mark is not None else ""
        raise ValueError(f"its front matter is not valid YAML{where}") from error
    if parsed is None:
        return {}
    if not isinstance(parsed, dict):
        raise ValueError("its front matter is not a mapping of fields to values")
    _check_plain(parsed)
    return parsed


def _constructed(block: str, loader: Any) -> Any:
    import yaml

    try:
        return yaml.load(block, Loader=loader)  # noqa: S506 - one of the two safe ones
    except (ValueError, TypeError, LookupError, ArithmeticError, AttributeError) as error:  # such as a 30th of February
        raise ValueError("its front matter holds a value that is not what it seems to be") from error


def _check_keys(node: Any, yaml: Any) -> None:
    """Refuse a field that is stated twice: of the two, any parser would silently take another."""
    if isinstance(node, yaml.MappingNode):
        seen: set[str] = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode):
                if key.value in seen:
                    raise ValueError(f"its front matter states {key.value!r} twice")
                seen.add(key.value)
        for _, value in node.value:
            _check_keys(value, yaml)
    elif isinstance(node, yaml.SequenceNode):
        for value in node.value:
            _check_keys(value, yaml)


def _check_plain(value: object) -> None:
    if isinstance(value, dict):
        for key, inner in value.items():
            if not isinstance(key, str) or len(key) > _LONGEST_KEY:
                raise ValueError(f"its front matter has a field whose name is no short text: {str(key)[:40]!r}")
            _check_plain(inner)
    elif isinstance(value, list):
        for inner in value:
            _check_plain(inner)
    elif isinstance(value, int) and abs(value) >= _LARGEST:
        raise ValueError("its front matter holds a number beyond 64 bits")
    elif not isinstance(value, str | int | float | datetime.date | None):
        raise ValueError(f"its front matter holds a value of the kind {type(value).__name__}, which is not read")


def _yaml(value: object) -> str:
    """A value in one line, in the part of YAML that is nearly JSON."""
    if isinstance(value, dict):
        return "{" + ", ".join(f"{_quoted(key)}: {_yaml(inner)}" for key, inner in value.items()) + "}"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(map(_yaml, value)) + "]"
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int):
        return str(value)
    if isinstance(value, float):
        return _number(value)
    return _quoted(value.isoformat() if isinstance(value, datetime.date) else str(value))


def _number(value: float) -> str:
    """A float with a point in it: parsers of YAML 1.1 take 1e-05 for a text."""
    if not math.isfinite(value):
        return ".nan" if math.isnan(value) else f"{'-' if value < 0 else ''}.inf"
    mantissa, exponent, power = repr(value).partition("e")
    return f"{mantissa if '.' in mantissa else f'{mantissa}.0'}{exponent}{power}"


def _quoted(text: str) -> str:
    r"""A text in double quotes. Unlike JSON, YAML has no pairs of escapes for what lies beyond 16 bits.

    >>> print(_quoted('a "b" \\ \n'), _quoted("\U0001f600"), _quoted("\U000e0041"))
    "a \"b\" \\ \x0a" "😀" "\U000e0041"
    """
    return '"' + "".join(map(_escaped, text)) + '"'


def _escaped(char: str) -> str:
    if char in '"\\':
        return f"\\{char}"
    if char.isprintable():
        return char
    code = ord(char)
    return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"
