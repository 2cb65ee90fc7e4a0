"""The Hugging Face Hub: its client, one retry, and one table of what its answers, or their absence, mean.

Errors are told apart by the status of a response or by the name of their class: the HTTP library below huggingface_hub
differs from version to version. An error whose text holds a token or a key is not kept.
"""

from __future__ import annotations

import errno
import json
import os
import re
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, TypeGuard, TypeVar
from urllib.parse import unquote

from ckavg.errors import CkavgError, HubError
from ckavg.storage.redaction import HIDDEN

if TYPE_CHECKING:
    from huggingface_hub import HfApi

Answer = TypeVar("Answer")

WAITS = (1.0, 2.0, 4.0, 8.0)
"""Seconds before each further attempt."""

LONGEST_WAIT = 60.0
"""The most seconds that the Hub may ask to wait for, before it is for the user to wait."""

_CLIENT_RETRIES_SECONDS = 20
"""An attempt that took this long has been repeated by the client itself."""

_LOGIN = "Log in with: hf auth login --force. HF_TOKEN, where it is set, takes precedence over the stored token."
_ANSWERS: dict[str, tuple[str, str]] = {
    "offline": (
        "huggingface_hub is in offline mode",
        "Unset HF_HUB_OFFLINE and TRANSFORMERS_OFFLINE, then run the command again.",
    ),
    "no token": ("there is no token for {endpoint}", "Log in with: hf auth login, or set HF_TOKEN."),
    "timeout": (
        "{endpoint} did not answer in time",
        "Run the command again, with HF_HUB_DOWNLOAD_TIMEOUT=60 where the network is slow.",
    ),
    "no hub": (
        "the answer of {endpoint} is not that of a Hub",
        "Check HF_ENDPOINT, and that no proxy answers in its place: curl -I {endpoint}",
    ),
    "connection": (
        "the connection to {endpoint} failed",
        "Check the network, HF_ENDPOINT and the proxy: curl -I {endpoint}",
    ),
    "transfer": ("the transfer failed", "Run the command again; -v shows where the error came from."),
    # The Hub does not tell a stranger whether a repository exists.
    "401 read": (
        "{endpoint} has no such repository, or shows it only with another token (401)",
        f"Check the name. {_LOGIN}",
    ),
    "401 write": ("{endpoint} does not accept the token (401)", _LOGIN),
    "401 gated": (
        "the repository is gated, and no valid token was sent (401)",
        f"{_LOGIN} Ask for access at {{endpoint}}/{{repo}}",
    ),
    "403": (
        "the token has no {right} access (403)",
        "Make a token with {right} access at {endpoint}/settings/tokens, then: hf auth login --force",
    ),
    "403 gated": (
        "the repository is gated, and the token's user has no access (403)",
        "Ask for access at {endpoint}/{repo}",
    ),
    "quota": (
        "the storage quota of the account is used up ({status})",
        "Free some storage, or extend it at {endpoint}/settings/billing, then run the command again.",
    ),
    "404": (
        "{endpoint} does not have it, or the token may not see it (404)",
        "Check the name and the revision, and who is logged in: hf auth whoami",
    ),
    "409": ("it conflicts with what is there (409)", "Choose another name."),
    "412": ("somebody else has changed the branch meanwhile (412)", "Look at the change, then run the command again."),
    "429": ("{endpoint} takes no more requests for now (429)", "Try again {when}."),
    "5xx": (
        "{endpoint} has an internal error ({status})",
        "Try again in some minutes; https://status.huggingface.co lists known faults.",
    ),
    "other": ("{endpoint} refused it ({status})", "Change what it refuses, then run the command again."),
}
"""By kind of failure: the message, to which the Hub's own words are added, and what to do next."""

_OFFLINE, _NO_TOKEN = "OfflineModeIsEnabled", "LocalTokenNotFoundError"
_FINAL = frozenset({_OFFLINE, _NO_TOKEN, "HFValidationError"})
_CLIENTS = ("huggingface_hub", "httpx", "httpx2", "httpcore", "requests", "urllib3", "hf_xet")
_DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO)
_CLOSED = "client has been closed"
"""After a refused connection the client closes its session, which all threads share, and opens another one."""

_XET_STATUS = re.compile(r"HTTP status (?:client|server) error \((\d{3}) ")
"""hf_xet tells the status of an answer in its text alone."""

_MAX_REASON = 300
_KEY = re.compile(r"[?&][^\s=&]*(?:signature|credential|token|key)[^\s=&]*=", re.IGNORECASE)


def connect(*, token: bool | None = None, show_bars: bool = False) -> HfApi:
    """The client of the user's endpoint, without logs of its own.

    Args:
        token: as huggingface_hub understands it: True requires one, None uses one where there is one.
        show_bars: whether it draws its own progress bars; HF_HUB_DISABLE_PROGRESS_BARS, where it is set, decides alone.
    """
    from huggingface_hub import HfApi, constants
    from huggingface_hub.utils import disable_progress_bars, enable_progress_bars, logging  # type: ignore[attr-defined]

    if constants.HF_HUB_DISABLE_PROGRESS_BARS is None:
        (enable_progress_bars if show_bars else disable_progress_bars)()
    if not os.environ.get("HF_HUB_VERBOSITY") and not os.environ.get("HF_DEBUG"):
        # each retry would be a warning, with the address of a storage and its key
        logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    return HfApi(endpoint=os.environ.get("HF_ENDPOINT") or None, token=token)


def retry(attempt: Callable[[], Answer], *, is_transient: Callable[[Exception], bool] | None = None) -> Answer:
    """What `attempt` returns; it is called up to 5 times while it raises what may pass by itself.

    Args:
        attempt: one request, or several.
        is_transient: whether what it raised may pass; `may_pass` where nothing is given.

    Raises:
        Exception: what it raised last, or the first that does not pass.
    """
    for wait in WAITS:
        begun = time.monotonic()
        try:
            return attempt()
        except Exception as error:
            asked = retry_after(error) or 0.0
            is_repeated = time.monotonic() - begun > _CLIENT_RETRIES_SECONDS
            if not (is_transient or may_pass)(error) or asked > LONGEST_WAIT or is_repeated:
                raise
            time.sleep(max(wait, asked))
    return attempt()


@contextmanager
def hub_errors(doing: str, repo: str, api: HfApi, *, right: str = "write") -> Iterator[None]:
    """Make an error of the client one of ours.

    Args:
        doing: what is being done, such as "creating the repository".
        repo: the repository.
        api: the client.
        right: what the token must give a right to: to `write`, or to `read`.

    Raises:
        HubError: what the client's error means, and what to do next.
    """
    try:
        yield
    except CkavgError:
        raise
    except Exception as error:
        explained = _explain(error, doing, repo, api, right)
        if explained is None:
            raise
        text = "".join(traceback.format_exception(error))
        holds_secret = any(secret in text for secret in _secrets(api)) or _KEY.search(text)
        raise explained from (None if holds_secret else error)


def ask(doing: str, repo: str, api: HfApi, request: Callable[[], Answer], *, right: str = "write") -> Answer:
    """The answer to a request that may be repeated; see `retry` and `hub_errors`."""
    with hub_errors(doing, repo, api, right=right):
        return retry(request)


def may_pass(error: Exception) -> bool:
    """Whether the same request may succeed in a moment: after 408, 429, 5xx, a lost connection, or half an answer."""
    status = status_of(error)
    if status is not None:
        return status in (408, 429) or status >= 500
    if isinstance(error, CkavgError) or is_disk_error(error) or _FINAL & _names(error):
        return False
    if isinstance(error, RuntimeError) and _CLOSED in str(error):
        return True
    return _is_of_client(error) or isinstance(error, OSError | json.JSONDecodeError)


def is_disk_error(error: Exception) -> TypeGuard[OSError]:
    """Whether the system would not let the client read or write a file, rather than the network fail."""
    if type(error).__module__ != "builtins" or not isinstance(error, OSError):
        return False
    return bool(error.filename) or error.errno in _DISK_ERRORS


def status_of(error: BaseException) -> int | None:
    """The status with which the Hub has answered; None where it has not."""
    response = _response(error)
    if response is not None:
        return int(response.status_code)
    found = _XET_STATUS.search(str(error))
    return int(found[1]) if found else None


def retry_after(error: BaseException) -> float | None:
    """Seconds for which the Hub asks to be left alone; None where it does not say."""
    response = _response(error)
    asked = str(response.headers.get("Retry-After") or "") if response is not None else ""
    return float(asked) if asked.isdigit() else None


def causes(error: BaseException) -> Iterator[BaseException]:
    """An exception and what caused it, the outermost first."""
    current: BaseException | None = error
    seen: set[int] = set()
    while current is not None and id(current) not in seen:
        seen.add(id(current))
        yield current
        current = current.__cause__ or (None if current.__suppress_context__ else current.__context__)


def endpoint_of(api: HfApi) -> str:
    """The address of the Hub as it may be shown: without the user and the password that may stand before its host."""
    scheme, separator, rest = api.endpoint.partition("://")
    return f"{scheme}{separator}{rest.rpartition('@')[2]}"


def _explain(error: Exception, doing: str, repo: str, api: HfApi, right: str) -> HubError | None:
    """What an error of the client means; None for one that is none: a bug."""
    status = status_of(error)
    if status is None:
        kind, reason = _kind_without_answer(error)
    else:
        reason = _words_of(error)
        kind = _kind_of_answer(status, reason, right, is_gated="GatedRepoError" in _names(error))
    if not kind:
        return None
    for secret in _secrets(api):
        reason = reason.replace(secret, HIDDEN)
    seconds = retry_after(error)
    values = {
        "endpoint": endpoint_of(api),
        "repo": repo,
        "right": right,
        "status": status,
        "when": "in some minutes" if seconds is None else f"in {seconds:.0f} seconds",
    }
    message, hint = (each.format_map(values) for each in _ANSWERS[kind])
    words = f": {_shorten(reason)}" if reason else ""
    return HubError(f"{repo}: {doing} failed: {message}{words}.", hint=hint)


def _kind_of_answer(status: int, reason: str, right: str, *, is_gated: bool) -> str:
    if is_gated and status in (401, 403):
        return f"{status} gated"
    if status == 401:
        return f"401 {right}"
    if status in (402, 403, 413) and ("storage limit" in reason.lower() or "quota" in reason.lower()):
        return "quota"
    if status >= 500:
        return "5xx"
    return str(status) if str(status) in _ANSWERS else "other"


def _kind_without_answer(error: Exception) -> tuple[str, str]:
    """The kind of a failure without an answer, or with one that is none, and its reason; empty for a bug."""
    names, last = _names(error), list(causes(error))[-1]
    if _OFFLINE in names:
        return "offline", ""
    if _NO_TOKEN in names:
        return "no token", ""
    if isinstance(error, ValueError | KeyError):
        return "no hub", str(error)
    if any("Timeout" in name for name in names):
        return "timeout", ""
    if _is_of_client(error) or isinstance(error, OSError):
        return "connection", str(last) or type(last).__name__
    return ("transfer", str(error)) if isinstance(error, RuntimeError) else ("", "")


def _words_of(error: Exception) -> str:
    """The Hub's own words; empty where it has none."""
    response = _response(error)
    if response is None:
        return str(error)
    words = response.headers.get("X-Error-Message")
    if not words:
        try:
            words = response.json().get("error")
        except Exception:  # whatever a body that is no JSON makes of it
            words = None
    return words if isinstance(words, str) else ""


def _shorten(text: str) -> str:
    """In one line, without the query of an address, which may be a key to a storage."""
    line = " ".join(word.partition("?")[0] if "://" in word else word for word in text.split()).rstrip(".")
    return line if len(line) <= _MAX_REASON else f"{line[:_MAX_REASON]}…"


def _secrets(api: HfApi) -> list[str]:
    """The token, and what of the address must not be shown, as it stands there and as it is meant."""
    from huggingface_hub import get_token

    user, _, password = api.endpoint.partition("://")[2].rpartition("@")[0].partition(":")
    secret = password or user  # a token may stand in the place of the user
    return [each for each in (get_token(), secret, unquote(secret)) if each]


def _response(error: BaseException) -> Any:
    responses = (getattr(each, "response", None) for each in causes(error))
    return next((each for each in responses if getattr(each, "status_code", None) is not None), None)


def _names(error: BaseException) -> set[str]:
    return {kind.__name__ for each in causes(error) for kind in type(each).__mro__}


def _is_of_client(error: BaseException) -> bool:
    kinds = (kind for each in causes(error) for kind in type(each).__mro__)
    return any(kind.__module__.partition(".")[0] in _CLIENTS for kind in kinds)
