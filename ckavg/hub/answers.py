"""Stage *publish*: what the Hub's answers, or their absence, mean to a user. Pure; knows no client library.

Clients differ in the classes of their errors from version to version, so these are told apart by what all of them have:
the response and its status, or a name.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any
from urllib.parse import unquote

from ckavg.errors import HubError

_OF_CLIENTS = ("huggingface_hub", "httpx", "httpx2", "httpcore", "requests", "urllib3", "hf_xet")
_MOST_OF_A_REASON = 300
_STATUS_OF_XET = re.compile(r"HTTP status (?:client|server) error \((\d{3}) ")
_KEY = re.compile(r"[?&][^\s=&]*(?:signature|credential|token|key)[^\s=&]*=", re.IGNORECASE)
_LOGIN = "Log in with: hf auth login"


def explained(
    error: Exception, *, doing: str, repo: str, endpoint: str, quoting: bool = True, right: str = "write"
) -> HubError | None:
    """What a client's exception means, and what to do next; None for one that is no answer of the Hub: a bug.

    Args:
        error: what the client raised.
        doing: what was being done, such as "creating the repository".
        repo: the repository.
        endpoint: address of the Hub.
        quoting: whether the words of the answer may be repeated.
        right: what the token must give a right to: to `write`, or to `read`.
    """
    said = _shortened if quoting else _withheld
    begun = f"{repo}: {doing} failed"
    chain = list(chain_of(error))
    for each in chain:
        response: Any = getattr(each, "response", None)
        if getattr(response, "status_code", None) is not None:
            gated = "Gated" in type(each).__name__
            reason, after = said(_reason(response)), str(response.headers.get("Retry-After") or "")
            return _refused(response.status_code, reason, after, begun, repo, endpoint, right, is_gated=gated)
    names = {kind.__name__ for each in chain for kind in type(each).__mro__}
    if "OfflineModeIsEnabled" in names:
        return HubError(
            f"{begun}: huggingface_hub is in offline mode.",
            hint="Unset HF_HUB_OFFLINE and TRANSFORMERS_OFFLINE, then run the command again.",
        )
    if "LocalTokenNotFoundError" in names:
        return no_token(repo, endpoint)
    if "JSONDecodeError" in names:  # which one HTTP library counts among the failures of a connection
        return _no_hub(begun, endpoint, said(str(error)))
    if any("Timeout" in name for name in names) and "NewConnectionError" not in names:
        return HubError(
            f"{begun}: {endpoint} did not answer in time.",
            hint="Run the command again, with HF_HUB_DOWNLOAD_TIMEOUT=60 where the network is slow.",
        )
    if any(_is_of_client(each) for each in chain) or isinstance(error, OSError):
        told = str(chain[-1]) or type(chain[-1]).__name__
        if found := _STATUS_OF_XET.search(told):
            return _refused(int(found[1]), said(told), "", begun, repo, endpoint, right)
        return HubError(
            f"{begun}: the connection to {endpoint} failed: {said(told)}.",
            hint=f"Check the network, HF_ENDPOINT and the proxy: curl -I {endpoint}",
        )
    if isinstance(error, ValueError | KeyError):  # of the client, which could make nothing of an answer
        return _no_hub(begun, endpoint, said(str(error)))
    if isinstance(error, RuntimeError):  # of a transfer
        return HubError(f"{begun}: {said(str(error))}.", hint="Run the command again; -v shows where it came from.")
    return None


def _no_hub(begun: str, endpoint: str, why: str) -> HubError:
    return HubError(
        f"{begun}: the answer of {endpoint} is not that of a Hub: {why}.",
        hint=f"Check HF_ENDPOINT, and that no proxy answers in its place: curl -I {endpoint}",
    )


def without_password(endpoint: str) -> str:
    """An address without the user and the password that may stand before its host.

    >>> without_password("https://ada:secret@hub.example.org/hf"), without_password("https://huggingface.co")
    ('https://hub.example.org/hf', 'https://huggingface.co')
    """
    scheme, between, rest = endpoint.partition("://")
    return f"{scheme}{between}{rest.rpartition('@')[2]}"


def passwords_in(endpoint: str) -> tuple[str, ...]:
    """What of an address must not be shown, as it stands there and as it is meant.

    >>> passwords_in("https://ada:s%40cret@hub.example.org"), passwords_in("https://huggingface.co")
    (('s%40cret', 's@cret'), ())
    """
    user, _, password = endpoint.partition("://")[2].rpartition("@")[0].partition(":")
    secret = password or user  # a token may stand in the place of the user
    return (secret, unquote(secret)) if secret else ()


def holds_key(error: BaseException) -> bool:
    """Whether the text of an exception, or of its causes, holds a signed address: whoever has it may use the file."""
    return any(_KEY.search(str(each)) for each in chain_of(error))


def no_token(repo: str, endpoint: str) -> HubError:
    """Nobody is logged in."""
    return HubError(f"{repo}: there is no token for {endpoint}.", hint=f"{_LOGIN}, or set HF_TOKEN.")


def may_not_write(repo: str, endpoint: str, why: str) -> HubError:
    """The token does not give the right to write."""
    return HubError(
        f"{repo}: the token may not write there: {why}.",
        hint=f"Make a token with write access at {endpoint}/settings/tokens, then: hf auth login --force",
    )


def _refused(
    status: int, reason: str, after: str, begun: str, repo: str, endpoint: str, right: str, *, is_gated: bool = False
) -> HubError:
    """What a status means. `reason` is in the Hub's own words, `after` its seconds to wait; both may be empty."""
    told = f": {reason}" if reason else ""
    if status == 401 and right == "read":  # of what it shows to nobody, the Hub does not tell whether it exists
        if is_gated:
            return HubError(
                f"{begun}: the repository is gated, and no token that {endpoint} accepts was sent (401){told}.",
                hint=f"{_LOGIN} --force; access is asked for at {endpoint}/{repo}",
            )
        return HubError(
            f"{begun}: {endpoint} knows no such repository, or shows it only with another token (401){told}.",
            hint=f"Check the name. {_LOGIN} --force; HF_TOKEN, where it is set, comes before what is stored.",
        )
    if status == 401:
        return HubError(
            f"{begun}: {endpoint} does not accept the token (401){told}.",
            hint=f"{_LOGIN} --force; HF_TOKEN, where it is set, comes before what is stored.",
        )
    if status == 403:
        if is_gated:
            return HubError(
                f"{begun}: the repository is gated, and the token's user has no access (403){told}.",
                hint=f"Ask for access at {endpoint}/{repo}",
            )
        return HubError(
            f"{begun}: the token has no right to it (403){told}.",
            hint=f"Make a token with {right} access at {endpoint}/settings/tokens, then: hf auth login --force",
        )
    if status == 404:
        return HubError(
            f"{begun}: {endpoint} knows no such thing, or the token may not see it (404){told}.",
            hint="Check the name and the revision, and who is logged in: hf auth whoami",
        )
    if status == 409:
        return HubError(f"{begun}: it conflicts with what is there (409){told}.", hint="Choose another name.")
    if status == 429:
        when = f"in {after} seconds" if after.isdigit() else "in some minutes"
        return HubError(f"{begun}: {endpoint} takes no more requests for now (429){told}.", hint=f"Try again {when}.")
    if status >= 500:
        return HubError(
            f"{begun}: {endpoint} has a fault of its own ({status}){told}.",
            hint="Try again in some minutes; https://status.huggingface.co tells of known faults.",
        )
    return HubError(
        f"{begun}: {endpoint} refused it ({status}){told}.", hint="Change what it refuses, then run the command again."
    )


def _reason(response: Any) -> str:
    """The Hub's own words."""
    words = response.headers.get("X-Error-Message")
    if not words:
        try:
            words = response.json().get("error")
        except Exception:  # whatever a body that is no JSON makes of it
            words = None
    return words if isinstance(words, str) else ""


def _shortened(text: str) -> str:
    """In one line, without the query of an address, which may be a key to a storage."""
    line = " ".join(word.partition("?")[0] if "://" in word else word for word in text.split())
    line = line.rstrip(".")
    return line if len(line) <= _MOST_OF_A_REASON else f"{line[:_MOST_OF_A_REASON]}…"


def _withheld(text: str) -> str:
    return "its words hold the token, and are not shown" if text else ""


def chain_of(error: BaseException) -> Iterator[BaseException]:
    """An exception and what caused it, the outermost first."""
    current: BaseException | None = error
    seen: set[int] = set()
    while current is not None and id(current) not in seen:
        seen.add(id(current))
        yield current
        current = current.__cause__ or (None if current.__suppress_context__ else current.__context__)


def _is_of_client(error: BaseException) -> bool:
    return any(kind.__module__.partition(".")[0] in _OF_CLIENTS for kind in type(error).__mro__)
