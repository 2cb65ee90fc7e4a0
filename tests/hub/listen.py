"""The Hub on loopback, for as long as a test lasts."""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from tests.hub.server import Handler
from tests.hub.state import Hub


@contextmanager
def serving() -> Iterator[Hub]:
    """A Hub that listens on a port of its own until the end of the block."""
    hub = Hub()
    handler = type("Handler", (Handler,), {"hub": hub, "traffic": hub})
    with listening(handler) as hub.url, listening(handler) as hub.storage_url:
        try:
            yield hub
        finally:
            hub.released.set()


@contextmanager
def listening(handler: type[BaseHTTPRequestHandler]) -> Iterator[str]:
    """The address at which these answers are given, until the end of the block.

    Raises:
        BaseException: what went wrong in the server itself, once the block has ended well.
    """
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.daemon_threads = True
    bugs: list[BaseException] = []

    def keep_bug(*_: object) -> None:
        error = sys.exception()
        if error is not None and not isinstance(error, OSError):  # a client that hangs up is part of the tests
            bugs.append(error)

    server.handle_error = keep_bug  # type: ignore[method-assign,assignment]
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
    if bugs:
        raise bugs[0]
