"""Remove from texts what must not be shown or uploaded: passwords, tokens, keys, and local paths. Pure text work.

A secret is recognised by the word before it or by its form; a false alarm only replaces a word by three dots.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from pathlib import Path

HIDDEN = "…"
"""The replacement for hidden text."""

_WORD = (
    r"(?:pass(?:word|wd|phrase|code)|pass(?==)|pwd|secret|credentials?|token(?!s|iz)|cookie|signature|sig"
    r"|(?:api|access|secret|private|auth|account|storage|service|encryption|ssh)[_-]?key|auth(?:orization)?(?!or))"
)
_ENDED = rf"[\w.-]{{0,60}}?{_WORD}"  # bounded: a long text must not take quadratic time
_NAME = rf"{_ENDED}(?:[_-][\w.-]{{0,60}})?"
_VALUE = r"(?:\\?\"(?:\\.|[^\"\\])*\"|'[^']*'|(?!\$)[^\s\"'&;|,)}]+)"
_IN_ADDRESS = re.compile(r"(?P<kept>\b[a-z][\w+.-]*:/{1,2})[^\s'\"]{0,300}:[^\s'\"]{0,300}(?=@)", re.IGNORECASE)
_USER_OF_WEB = re.compile(r"(?P<kept>\b(?:https?|ftps?):/{1,2})[^\s'\"]{1,600}(?=@)", re.IGNORECASE)
_SCHEME = re.compile(r"(?P<kept>\bbearer\s+|\bbasic\s+(?=\S*\d))[\w.~+/=-]{6,}", re.IGNORECASE)
_STATED = re.compile(
    rf"(?P<kept>(?<![\w$.-])(?:{_NAME}[\"']?\s*=|{_ENDED}[\"']?\s*:)\s*(?:(?:bearer|basic|token)\s+)?){_VALUE}",
    re.IGNORECASE,
)
_OPTION = re.compile(rf"(?P<kept>(?<!\S)--?{_NAME}\s+)(?!-){_VALUE}", re.IGNORECASE)
_USER_OPTION = re.compile(r"(?P<kept>(?<!\S)(?:-u|--user)[\s=]*['\"]?)[^\s:'\"]{1,300}:[^\s'\";&|]+")
_TOKEN = re.compile(
    r"(?<![A-Za-z0-9])(?P<kept>)(?:hf_(?:[A-Za-z0-9]{12,}|(?=[a-z]*[A-Z0-9])[A-Za-z0-9]{6,})"
    r"|(?:api_org|sk|pk|rk|gsk|r8|gh[pousr]|github_pat|glpat|xox[a-z]|dapi|nvapi|wandb_v\d)[_-][\w-]{12,}"
    r"|(?:AKIA|ASIA)[A-Z0-9]{12,}|AIza[\w-]{20,}|eyJ[\w-]{8,}\.[\w.-]+)"
)
_SECRETS = (_IN_ADDRESS, _USER_OF_WEB, _SCHEME, _STATED, _OPTION, _USER_OPTION, _TOKEN)
_SECRET_NAME = re.compile(_NAME, re.IGNORECASE)
_LEAST = 8
"""A value in the environment with at least this many characters is no ordinary word."""

_QUERY = re.compile(r"(?P<address>\bhttps?:/{1,2}[^\s?#'\"]*)[?#][^\s'\"]*", re.IGNORECASE)
_QUOTED_PATH = re.compile(r"(?P<quote>['\"])(?:~[\w.-]*)?/(?:[^'\"\n/]*/)*(?P<last>[^'\"\n/]+)(?P=quote)")
_PATH = re.compile(
    r"(?:(?<![\w.:/…~\\}-])|(?<=\s-[A-Za-z]))(?:~[\w.-]*|file:/{1,3}[^\s/'\"]*)?(?:/(?:\\.|[^\s/'\"`,;:()<>|\\])+)*/"
    r"(?=[^\s/'\"`,;:()<>|])"
)
_AT_HOST = re.compile(r"(?<![\w./:@-])[\w.+-]{1,64}@[\w-][\w.-]*(?::(?=\S))?")


def without_secrets(text: str) -> str:
    """A text without passwords, tokens and keys, and without the values of secret environment variables.

    >>> without_secrets("https://ada:pw@hub.example.org/run --token hf_aBcDeF123456 max_tokens=5")
    'https://…@hub.example.org/run --token … max_tokens=5'
    >>> without_secrets("AWS_SECRET_ACCESS_KEY=abc curl -H 'Authorization: Bearer x1y2z3' $HF_TOKEN --token $HF_TOKEN")
    "AWS_SECRET_ACCESS_KEY=… curl -H 'Authorization: Bearer …' $HF_TOKEN --token $HF_TOKEN"
    """
    for name, value in os.environ.items():
        if len(value) >= _LEAST and _SECRET_NAME.fullmatch(name) and not (value[0] == "/" and Path(value).exists()):
            text = text.replace(value, HIDDEN)
    for pattern in _SECRETS:
        text = pattern.sub(rf"\g<kept>{HIDDEN}", text)
    return text


def shown_address(text: str) -> str:
    """An address for a message: without user and password and, for the web, without the part after `?` or `#`.

    >>> shown_address("https://ada:secret@example.org/run?X-Amz-Signature=0f"), shown_address("s3://a:b@bucket/run")
    ('https://…@example.org/run', 's3://…@bucket/run')
    """
    return _QUERY.sub(r"\g<address>", without_secrets(text))


def without_paths(text: str, places: Iterable[tuple[str, str]]) -> str:
    """A text without local paths, users and hosts; an unknown path is reduced to its last part.

    Args:
        text: the text.
        places: known paths, each with its replacement.

    >>> without_paths("cd /data/my run/a; python /home/me/eval.py me@box:x {dir}", [("/data/my run", "RUN")])
    'cd RUN/a; python …/eval.py …x {dir}'
    """
    for path, name in sorted(places, key=lambda place: -len(place[0])):
        text = re.sub(rf"(?<![\w.-]){re.escape(path)}(?![\w.-])", name.replace("\\", r"\\"), text)
    text = _QUOTED_PATH.sub(rf"\g<quote>{HIDDEN}/\g<last>\g<quote>", text)
    return _AT_HOST.sub(HIDDEN, _PATH.sub(f"{HIDDEN}/", text))
