"""Stage *publish* and others: repositories of the Hub by the names that people know them by. Pure."""

from __future__ import annotations

import re

_PART = r"[A-Za-z0-9][\w.-]*"
_LINK = re.compile(
    r"(?:https?:/{1,2}(?:[^/\s]*@)?)?(?:www\.)?(?:huggingface\.co|hf\.co)/(?P<kind>(?:datasets|spaces)/)?"
    rf"(?P<repo>{_PART}(?:/{_PART})?)(?:/(?P<view>tree|blob|resolve|raw|commit)/(?P<rest>[^?#]*))?(?:[/?#].*)?",
    re.ASCII | re.DOTALL,
)
_ID = re.compile(
    rf"(?P<hf>hf:/{{0,2}})?(?P<repo>{_PART}/{_PART})(?P<revision>@[^/]+)?(?P<folder>(?(hf)|(?(revision)|(?!)))(?:/[^/]+)+)?/?",
    re.ASCII,
)
_FILES = ("blob", "resolve", "raw")


def as_address(text: str) -> str:
    """The address of what is named `owner/name[@revision][/folder]`, or by a link to it; empty for anything else.

    >>> as_address("owner/name"), as_address("https://huggingface.co/owner/name/tree/step10/folder?x=1")
    ('hf://owner/name', 'hf://owner/name@step10/folder')
    >>> as_address("https:/huggingface.co/owner/name/resolve/main/model.safetensors"), as_address("../run")
    ('hf://owner/name@main', '')
    """
    link = _LINK.fullmatch(text)
    if link is not None:
        revision, *folders = [part for part in (link["rest"] or "").split("/") if part] or [""]
        folders = folders[:-1] if link["view"] in _FILES else folders
        at = f"@{revision}" if revision else ""
        return "/".join([f"hf://{link['kind'] or ''}{link['repo']}{at}", *folders])
    found = _ID.fullmatch(text)
    if found is None:
        return ""
    return f"hf://{found['repo']}{found['revision'] or ''}{found['folder'] or ''}"


def as_repository(text: str) -> tuple[str, str]:
    """Name and revision of a model repository as an upload wants them, of what else names it; empty if nothing does.

    >>> as_repository("hf://owner/name@step10"), as_repository("https://huggingface.co/owner/name")
    (('owner/name', 'step10'), ('owner/name', ''))
    """
    found = _ID.fullmatch(as_address(text))
    return ("", "") if found is None or found["folder"] else (found["repo"], (found["revision"] or "")[1:])
