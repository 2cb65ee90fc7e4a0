"""The Hugging Face Hub: its client, one retry, and one table of what its errors mean.

Errors are recognised by the status of a response or by the names of their classes: the HTTP library below
huggingface_hub differs from version to version. An error whose text holds a token or a key is not kept.
"""

from __future__ import annotations

import errno
import json
import os
import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, TypeGuard, TypeVar

from ckavg.errors import CkavgError, HubError, ReadError
from ckavg.storage.redaction import HIDDEN, shown_address, without_secrets

if TYPE_CHECKING:
    from huggingface_hub import HfApi

Answer = TypeVar("Answer")

WAITS = (1.0, 2.0, 4.0, 8.0)
"""Seconds before each further attempt."""

LONGEST_WAIT = 60.0
"""Wait at most this long when the Hub asks to; beyond that, tell the user to."""

_CLIENT_RETRIES_SECONDS = 20
"""An attempt that took this long was already retried by the client."""

GO_ONLINE = "Unset HF_HUB_OFFLINE and TRANSFORMERS_OFFLINE, then run the command again."
"""The hint when something is not in the cache while offline."""

_LOGIN = "Log in with: hf auth login --force. HF_TOKEN, where it is set, takes precedence over the stored token."
_CLIENT = r"\b(huggingface_hub|httpx2?|httpcore|requests|urllib3|hf_xet)\."
_FINAL = re.compile(r"\.(OfflineModeIsEnabled|LocalTokenNotFoundError|HFValidationError)\b")
_DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO)

_ANSWERS: tuple[tuple[str, str, str], ...] = (
    (r".*\.OfflineModeIsEnabled\b", "huggingface_hub is in offline mode", GO_ONLINE),
    (
        r".*\.LocalTokenNotFoundError\b",
        "there is no token for {endpoint}",
        "Log in with: hf auth login, or set HF_TOKEN.",
    ),
    (
        r"40[13].*\.GatedRepoError\b",
        "the repository is gated, and the token's user has no access ({status}){words}",
        "Ask for access at {endpoint}/{repo}, and log in: hf auth login --force",
    ),
    # Without access, the Hub does not reveal whether a repository exists.
    (
        "401 read",
        "{endpoint} has no such repository, or shows it only with another token (401){words}",
        f"Check the name. {_LOGIN}",
    ),
    ("401", "{endpoint} does not accept the token (401){words}", _LOGIN),
    (
        "(402|403|413).*(storage limit|quota)",
        "the storage quota of the account is used up ({status}){words}",
        "Free some storage, or extend it at {endpoint}/settings/billing, then run the command again.",
    ),
    (
        "403",
        "the token has no {right} access (403){words}",
        "Make a token with {right} access at {endpoint}/settings/tokens, then: hf auth login --force",
    ),
    (
        "404",
        "{endpoint} does not have it, or the token may not see it (404){words}",
        "Check the name and the revision, and who is logged in: hf auth whoami",
    ),
    ("409", "it conflicts with what is there (409){words}", "Choose another name."),
    ("412", "the branch has changed meanwhile (412){words}", "Look at the change, then run the command again."),
    ("429", "{endpoint} accepts no more requests for now (429){words}", "Try again {when}."),
    (
        r"[5-9]\d\d",
        "{endpoint} has an internal error ({status}){words}",
        "Try again in some minutes; https://status.huggingface.co lists known faults.",
    ),
    (r"\d", "{endpoint} refused it ({status}){words}", "Change what it refuses, then run the command again."),
    (
        r"none \w+ [^;]*builtins\.(ValueError|KeyError)\b",
        "the answer of {endpoint} is not that of a Hub{words}",
        "Check HF_ENDPOINT, and that no proxy answers in its place: curl -I {endpoint}",
    ),
    (
        r".*\w*Timeout\w*[ ;]",
        "{endpoint} did not answer in time",
        "Run the command again, with HF_HUB_DOWNLOAD_TIMEOUT=60 where the network is slow.",
    ),
    (
        rf"none.*({_CLIENT}|builtins\.(OSError|RuntimeError))",
        "the connection to {endpoint} failed{words}",
        "Check the network, HF_ENDPOINT and the proxy: curl -I {endpoint}",
    ),
)
"""A pattern for a failure as `_explain` writes it, the message, the hint. The first match counts."""

_CLOSED = "client has been closed"
"""After a refused connection the client closes the session that all threads share, and opens a new one."""

_XET_STATUS = re.compile(r"HTTP status (?:client|server) error \((\d{3}) ")
"""hf_xet gives the status of a response only in its text."""

_MAX_REASON = 300
_MOST_SEARCHED = 100_000


def connect(*, token: bool | None = None, show_bars: bool = False) -> HfApi:
    """The client for the user's endpoint, without logs of its own.

    Args:
        token: as in huggingface_hub: True requires a token, None uses one if there is one.
        show_bars: whether it draws its own progress bars; HF_HUB_DISABLE_PROGRESS_BARS overrides it.
    """
    from huggingface_hub import HfApi, constants
    from huggingface_hub.utils import disable_progress_bars, enable_progress_bars, logging  # type: ignore[attr-defined]

    if constants.HF_HUB_DISABLE_PROGRESS_BARS is None:
        (enable_progress_bars if show_bars else disable_progress_bars)()
    if not os.environ.get("HF_HUB_VERBOSITY") and not os.environ.get("HF_DEBUG"):
        # each retry would log a warning that holds a signed address
        logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    return HfApi(endpoint=os.environ.get("HF_ENDPOINT") or None, token=token)


def may_pass(error: Exception) -> bool:
    """Whether a retry may succeed: after 408, 429, 5xx, a lost connection, or an incomplete response."""
    status = status_of(error)
    if status is not None:
        return status in (408, 429) or status >= 500
    names = _names(error)
    if isinstance(error, CkavgError) or is_disk_error(error) or _FINAL.search(names):
        return False
    if isinstance(error, RuntimeError) and _CLOSED in str(error):
        return True
    return isinstance(error, OSError | json.JSONDecodeError) or re.search(_CLIENT, names) is not None


def retry(attempt: Callable[[], Answer], *, is_transient: Callable[[Exception], bool] = may_pass) -> Answer:
    """Call `attempt`, up to 5 times while it raises transient errors; return its value.

    Raises:
        Exception: the last error, or the first that is not transient.
    """
    for wait in WAITS:
        begun = time.monotonic()
        try:
            return attempt()
        except Exception as error:
            asked = _retry_after(error) or 0.0
            is_repeated = time.monotonic() - begun > _CLIENT_RETRIES_SECONDS
            if not is_transient(error) or asked > LONGEST_WAIT or is_repeated:
                raise
            time.sleep(max(wait, asked))
    return attempt()


@contextmanager
def hub_errors(doing: str, repo: str, api: HfApi, *, right: str = "write") -> Iterator[None]:
    """Convert errors of the client to ours.

    Args:
        doing: the action, such as "creating the repository".
        repo: the repository.
        api: the client.
        right: the right that the token needs: `write` or `read`.

    Raises:
        HubError: what the client's error means, and what to do next.
        ReadError: the client cannot read or write a local file.
    """
    try:
        yield
    except CkavgError:
        raise
    except Exception as error:
        explained = _explain(error, f"{repo}: {doing} failed", repo, api, right)
        if explained is None:  # a bug
            raise
        raise explained from without_credentials(error)


def ask(doing: str, repo: str, api: HfApi, request: Callable[[], Answer], *, right: str = "write") -> Answer:
    """The response to a request, with retries; see `retry` and `hub_errors`."""
    with hub_errors(doing, repo, api, right=right):
        return retry(request)


def is_disk_error(error: Exception) -> TypeGuard[OSError]:
    """Whether a local file failed rather than the network."""
    if type(error).__module__ != "builtins" or not isinstance(error, OSError):
        return False
    return bool(error.filename) or error.errno in _DISK_ERRORS


def status_of(error: BaseException) -> int | None:
    """The status of the Hub's response; None if there was none."""
    response = _response(error)
    if response is not None:
        return int(response.status_code)
    found = _XET_STATUS.search(str(error))
    return int(found[1]) if found else None


def endpoint_of(api: HfApi) -> str:
    """The address of the Hub without user and password, to show it."""
    scheme, separator, rest = api.endpoint.partition("://")
    return f"{scheme}{separator}{rest.rpartition('@')[2]}"


def without_credentials(error: Exception) -> Exception | None:
    """The error, for a traceback; None if that would show credentials."""
    chain = "\n".join(str(each) for each in _causes(error))[:_MOST_SEARCHED]
    return error if _without_token(chain) == chain else None


def _without_token(text: str) -> str:
    """A text without secrets and without the stored token."""
    from huggingface_hub import get_token

    token = get_token()
    return without_secrets(text.replace(token, HIDDEN) if token else text)


def _explain(error: Exception, failed: str, repo: str, api: HfApi, right: str) -> CkavgError | None:
    """What an error of the client means; None for a bug."""
    if is_disk_error(error):
        hint = "Free some space, set HF_HOME to a directory of yours, or download less with --max-disk."
        return ReadError(f"{failed}: {error.filename or 'the disk'}: {error.strerror}.", hint=hint)
    status, seconds = status_of(error), _retry_after(error)
    last = list(_causes(error))[-1]
    words = (getattr(each, "server_message", None) for each in _causes(error))
    is_answer = _response(error) is not None
    reason = str(next(filter(None, words), "")) if is_answer else str(last) or type(last).__name__
    signature = f"{status or 'none'} {right} {_names(error)} {reason.lower()}"
    found = next((row for row in _ANSWERS if re.match(row[0], signature, re.DOTALL)), None)
    if found is None:
        return None
    shown = " ".join(shown_address(_without_token(reason)).split()).rstrip(".")
    values = {
        "endpoint": endpoint_of(api),
        "repo": repo,
        "right": right,
        "status": status,
        "when": "in some minutes" if seconds is None else f"in {seconds:.0f} seconds",
        "words": f": {shown[:_MAX_REASON]}{'…' if len(shown) > _MAX_REASON else ''}" if shown else "",
    }
    message, hint = (each.format_map(values) for each in found[1:])
    return HubError(f"{failed}: {message}.", hint=hint)


def _retry_after(error: BaseException) -> float | None:
    """Seconds that the Hub asks to wait; None if it does not say."""
    response = _response(error)
    asked = str(response.headers.get("Retry-After") or "") if response is not None else ""
    return float(asked) if asked.isdigit() else None


def _causes(error: BaseException) -> Iterator[BaseException]:
    """An exception and its causes, outermost first."""
    current: BaseException | None = error
    seen: set[int] = set()
    while current is not None and id(current) not in seen:
        seen.add(id(current))
        yield current
        current = current.__cause__ or (None if current.__suppress_context__ else current.__context__)


def _response(error: BaseException) -> Any:
    responses = (getattr(each, "response", None) for each in _causes(error))
    return next((each for each in responses if getattr(each, "status_code", None) is not None), None)


def _names(error: BaseException) -> str:
    """The classes of an error and, after semicolons, of its causes: `httpx.ConnectError httpx.NetworkError; …`."""
    return "; ".join(
        " ".join(f"{kind.__module__.partition('.')[0]}.{kind.__name__}" for kind in type(each).__mro__)
        for each in _causes(error)
    )
