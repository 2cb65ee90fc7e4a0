"""Stage *remote*: which failures of the Hub's client pass by themselves.

Knows no client library: errors are told apart by the status of a response, or by a name.
"""

from __future__ import annotations

import errno
from typing import TypeGuard

from ckavg.hub.answers import chain_of

_FINAL = {"OfflineModeIsEnabled", "LocalTokenNotFoundError", "HFValidationError"}
_OF_CLIENTS = ("huggingface_hub", "httpx", "httpx2", "httpcore", "requests", "urllib3")
_OF_DISKS = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO)
_CLOSED = "client has been closed"
"""Where a connection is refused, the client closes its session, which all threads share; it opens another one."""


def may_pass(error: Exception) -> bool:
    """Whether the same request may go better after a while: after 429, 5xx, a lost connection, or half an answer."""
    chain = list(chain_of(error))
    for each in chain:
        status = getattr(getattr(each, "response", None), "status_code", None)
        if status is not None:
            return status in (408, 429) or bool(status >= 500)
    if is_of_disk(error) or _FINAL & {kind.__name__ for each in chain for kind in type(each).__mro__}:
        return False
    if isinstance(error, RuntimeError) and _CLOSED in str(error):
        return True
    of_client = any(kind.__module__.partition(".")[0] in _OF_CLIENTS for each in chain for kind in type(each).__mro__)
    return of_client or isinstance(error, OSError | ValueError | KeyError)


def is_of_disk(error: Exception) -> TypeGuard[OSError]:
    """Whether the system would not let the client write, rather than the network fail."""
    if type(error).__module__ != "builtins" or not isinstance(error, OSError):
        return False
    return bool(error.filename) or error.errno in _OF_DISKS
