"""Addresses of remote runs and repositories, and the links to the Hub that people paste. Pure."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path, PosixPath
from urllib.parse import unquote

from ckavg.errors import SettingError
from ckavg.storage.redaction import shown_address

SCHEMES = ("hf", "s3", "gs", "gcs", "abfs", "abfss", "az")
"""The schemes of addresses. fsspec has drivers for more, but some run what they read, and others contact any host."""

_ADDRESS = re.compile(r"(?P<scheme>[A-Za-z][A-Za-z0-9+.-]+):(?P<slashes>/+|:.*:/+)(?P<rest>[^/].*)", re.DOTALL)
_ONE_SLASH = re.compile(r"\A(?!file:|local:)([A-Za-z][A-Za-z0-9+.-]+):/(?=[^/])")
_MEANT = re.compile(
    rf"[A-Za-z][A-Za-z0-9+.-]*:(?:/|:.*:/|\\)|(?:{'|'.join(SCHEMES)}|file|https?):", re.DOTALL | re.IGNORECASE
)
_SPECIAL = re.compile(r"[?#*\[\]\\\x00-\x1f\x7f]")
_CREDENTIALS = "Put credentials where the driver expects them: in its configuration, or in the environment."
_HUB = re.compile(r"(?P<repo>[^/@]+(?:/[^/@]+)?)(?:@(?P<revision>[^/]+))?(?:/(?P<folder>.+))?")
_OTHER_KINDS = ("datasets", "spaces", "buckets", "kernels")
_SIZE = re.compile(r"(?P<number>\d+(?:\.\d+)?)\s*(?:(?P<prefix>[KMGT])(?P<binary>i?)B?|B)?", re.IGNORECASE)
_POWERS = {"K": 1, "M": 2, "G": 3, "T": 4}
_PART = r"[A-Za-z0-9][\w.-]*"
_LINK = re.compile(
    r"(?:https?:/{1,2}(?:[^/\s]*@)?)?(?:www\.)?(?:huggingface\.co|hf\.co)/(?P<kind>(?:datasets|spaces)/)?"
    rf"(?P<repo>{_PART}(?:/{_PART})?)(?:/(?P<view>tree|blob|resolve|raw|commit)/(?P<rest>[^?#]*))?(?:[/?#].*)?",
    re.ASCII | re.DOTALL,
)
_REPO_ID = re.compile(
    rf"(?P<hf>hf:/{{0,2}})?(?P<repo>{_PART}/{_PART})(?P<revision>@[^/]+)?(?P<folder>(?(hf)|(?(revision)|(?!)))(?:/[^/]+)+)?/?",
    re.ASCII,
)


@dataclass(frozen=True, slots=True)
class Address:
    """The address of a remote run.

    Attributes:
        scheme: `hf`, or the name of another file system, such as `s3`.
        place: the repository `owner/name`, or what follows `://` for other file systems.
        revision: branch, tag, commit, or a pattern of these; None if none is named. Only for the Hub.
        folder: folder in the repository; empty for all of it.
    """

    scheme: str
    place: str
    revision: str | None = None
    folder: str = ""

    def __str__(self) -> str:
        revision = f"@{self.revision.replace('/', '%2F')}" if self.revision else ""
        return f"{self.scheme}://{self.place}{revision}{f'/{self.folder}' if self.folder else ''}"

    @property
    def is_hub(self) -> bool:
        """Whether it is a model repository on the Hugging Face Hub."""
        return self.scheme == "hf" and self.place.partition("/")[0] not in _OTHER_KINDS

    @property
    def name(self) -> str:
        """Its last part, to name a directory after."""
        return (self.folder or self.place).rstrip("/").rpartition("/")[2]


class AddressPath(PosixPath):
    """A path whose text is an address, also for paths below it. It does not exist on this machine."""

    def __str__(self) -> str:
        return _ONE_SLASH.sub(r"\1://", super().__str__())


def address_of(source: Path | str) -> Address | None:
    """Read an address such as `hf://owner/name@revision` or `s3://bucket/run`; None for a path on this machine.

    A `Path` turns the two slashes of an address into one; that is accepted.

    Raises:
        SettingError: it names no repository on the Hub; its scheme is not supported; or it holds a password.

    >>> address_of("hf://allenai/OLMo-2-0425-1B@stage1-*")
    Address(scheme='hf', place='allenai/OLMo-2-0425-1B', revision='stage1-*', folder='')
    >>> str(address_of(Path("s3://bucket/run/"))), address_of("./checkpoints")
    ('s3://bucket/run', None)
    """
    text = _ONE_SLASH.sub(r"\1://", str(source))
    match = _ADDRESS.fullmatch(text)
    if match is None:
        return None
    if match["scheme"].lower() not in SCHEMES or match["slashes"] not in ("/", "//") or "::" in text:
        kinds = ", ".join(f"{scheme}://" for scheme in SCHEMES)
        raise SettingError(
            f"{shown_address(text)}: unsupported address, expected a directory, or one of {kinds}, without '::'.",
            hint=did_you_mean(text) or "Download the run, and name its directory.",
        )
    if (shown := shown_address(text)) != text:
        raise SettingError(f"{shown} holds a password or a key, which is not allowed in an address.", hint=_CREDENTIALS)
    scheme, rest = match["scheme"].lower(), match["rest"].rstrip("/")
    address = Address(scheme, rest)
    if not address.is_hub:
        return address
    found = _HUB.fullmatch(rest)
    if found is None:
        raise SettingError(f"{source} names no repository.", hint="For example: hf://owner/name@revision")
    revision = found["revision"]
    return Address(scheme, found["repo"], unquote(revision) if revision else None, found["folder"] or "")


def output_address(out: Path | str) -> Address | None:
    """Read the address that a result goes to, such as `s3://bucket/dir/result`; None for a path on this machine.

    Any fsspec file system is accepted that can be written to.

    Raises:
        SettingError: results cannot go there; or it looks like an address and is not one.

    >>> str(output_address("memory://results/")), output_address("./averaged/c:d")
    ('memory://results', None)
    """
    if not is_meant_for_address(out):
        return None
    text = _ONE_SLASH.sub(r"\1://", str(out))
    match, kinds = _ADDRESS.fullmatch(text), ", ".join(f"{scheme}://" for scheme in SCHEMES if scheme != "hf")
    scheme = match["scheme"].lower() if match is not None else ""
    here = scheme in ("file", "local")
    if match is None or match["slashes"] != "//" or "::" in text or here or scheme not in (*SCHEMES, *_protocols()):
        raise SettingError(
            f"{shown_address(text)}: unsupported address for a result, expected a directory, or one of {kinds}, "
            "without '::'.",
            hint=did_you_mean(text) or "For example: s3://bucket/run/averaged/pema",
        )
    if scheme == "hf":
        raise SettingError(
            f"{shown_address(text)}: results go to the Hub as one commit, not with --out.",
            hint="Leave out --out, and add --push-to-hub owner/name.",
        )
    if (shown := shown_address(text)) != text:
        raise SettingError(f"{shown} holds a password or a key, which is not allowed in an address.", hint=_CREDENTIALS)
    address = Address(scheme, match["rest"].rstrip("/"))
    parts = address.place.split("/")
    if {"", ".", ".."} & {*parts} or {*parts[-1][:1]} & {"."} or _SPECIAL.search(address.place):
        raise SettingError(
            f"{text} has a special meaning in storages: an empty part, one of . .. ? # * [ ] \\, a dot at the start "
            "of the last part, or a control character.",
            hint="Choose another name.",
        )
    if len(parts) == 1 and scheme in SCHEMES:
        raise SettingError(f"{text} is a whole bucket.", hint=f"Name a directory in it: {address}/averaged")
    return address


def is_meant_for_address(path: Path | str) -> bool:
    """Whether a name looks like an address rather than a local file or directory."""
    return _MEANT.match(str(path)) is not None


def _protocols() -> list[str]:
    from fsspec import available_protocols

    return list(available_protocols())


def did_you_mean(text: str) -> str:
    """A question that suggests a correct address or repository; empty without a suggestion."""
    here = re.fullmatch(r"(?:file|local):(?://(?=/)|/?(?=/))(.+)", text, re.DOTALL)
    meant = here[1] if here else as_address(text)
    return f"Did you mean {meant}?" if meant else ""


def as_address(text: str) -> str:
    """The address of `owner/name[@revision][/folder]`, or of a link to it; empty for anything else.

    >>> as_address("owner/name"), as_address("https://huggingface.co/owner/name/tree/step10/folder?x=1")
    ('hf://owner/name', 'hf://owner/name@step10/folder')
    >>> as_address("https:/huggingface.co/owner/name/resolve/main/model.safetensors"), as_address("../run")
    ('hf://owner/name@main', '')
    """
    link = _LINK.fullmatch(text)
    if link is not None:
        revision, *folders = [part for part in (link["rest"] or "").split("/") if part] or [""]
        folders = folders[:-1] if link["view"] in ("blob", "resolve", "raw") else folders
        at = f"@{revision}" if revision else ""
        return "/".join([f"hf://{link['kind'] or ''}{link['repo']}{at}", *folders])
    found = _REPO_ID.fullmatch(text)
    return f"hf://{found['repo']}{found['revision'] or ''}{found['folder'] or ''}" if found else ""


def as_repository(text: str) -> tuple[str, str]:
    """Name and revision of a model repository from its address or a link to it; empty for anything else.

    >>> as_repository("hf://owner/name@step10"), as_repository("https://huggingface.co/owner/name")
    (('owner/name', 'step10'), ('owner/name', ''))
    """
    found = _REPO_ID.fullmatch(as_address(text))
    return ("", "") if found is None or found["folder"] else (found["repo"], (found["revision"] or "")[1:])


def is_pattern(revision: str) -> bool:
    """Whether it may match several revisions."""
    return not {*"*?["}.isdisjoint(revision)


def parse_size(text: str | int) -> int:
    """Parse a number of bytes, such as `50GB`, `512MiB` or `0`; SettingError if it is not one.

    >>> parse_size("1.5GB"), parse_size("2 MiB"), parse_size("100")
    (1500000000, 2097152, 100)
    """
    if isinstance(text, int) and text >= 0:
        return text
    match = _SIZE.fullmatch(str(text).strip())
    if match is None:
        raise SettingError(f"{text!r} is not a size.", hint="For example: 50GB, 512MiB, or 0.")
    power = _POWERS[match["prefix"].upper()] if match["prefix"] else 0
    return int(float(match["number"]) * (1024 if match["binary"] else 1000) ** power)
