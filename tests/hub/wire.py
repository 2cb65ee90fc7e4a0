"""Servers on loopback: requests in, answers out, and whatever goes wrong on the way, on demand."""

from __future__ import annotations

import re
import socket
import struct
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from email.message import Message
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Literal
from urllib.parse import parse_qs, unquote, urlsplit

DROPPED = 0
"""In the place of a status: the connection is cut."""
HELD = -1
"""Likewise: there is no answer until the end."""
WHOLE = -2
"""Likewise: the whole file with status 200, whatever range was asked for."""
LOST = -3
"""Likewise: what was asked is done, and the connection is cut in the place of the answer."""
PORTAL = 200
"""Likewise: somebody else answers."""


@dataclass(frozen=True, slots=True)
class Broken:
    """In the place of a status: an answer that begins well, and whose body ends after so many bytes.

    `closed` ends the connection in order, `reset` does not (what was on its way may be lost, too). `short` is a
    complete answer of fewer bytes than it should have, and `stalled` has nothing follow until the end.
    """

    after: int
    how: Literal["closed", "reset", "short", "stalled"]


Fault = int | Broken


@dataclass(kw_only=True)
class Traffic:
    """Faults to come, and what happened."""

    stages: dict[str, str] = field(default_factory=dict)
    """By name: a pattern of the method and the path of the requests that belong to it."""
    faults: dict[str, tuple[Fault, int]] = field(default_factory=dict)
    """By stage: a status, or one of the above, and how many requests it still meets."""
    passes_before: dict[str, int] = field(default_factory=dict)
    """By stage: how many requests are served before its fault."""
    then: dict[str, Callable[[], object]] = field(default_factory=dict)
    """By stage: what is done once, between its next answer and whatever is asked after it."""
    requests: list[str] = field(default_factory=list)
    ranges: list[tuple[str, str]] = field(default_factory=list)
    """Requests that asked for a range, and for which."""
    served: Counter[str] = field(default_factory=Counter)
    """Bytes of content that went out, by file, as in `owner/name@revision/file`."""
    served_by_stage: Counter[str] = field(default_factory=Counter)
    """Bytes of all bodies that went out, lists and messages included."""
    careless: bool = False
    """Whether a fault repeats the token to whoever sent it."""
    held: threading.Event = field(default_factory=threading.Event)
    released: threading.Event = field(default_factory=threading.Event)
    lock: threading.RLock = field(default_factory=threading.RLock)

    def stage(self, line: str) -> str:
        """The stage that a request belongs to; empty where it belongs to none."""
        return next((stage for stage, pattern in self.stages.items() if re.fullmatch(pattern, line)), "")

    def fault(self, line: str) -> Fault | None:
        """The fault that this request meets, if one."""
        stage = self.stage(line)
        fault, left = self.faults.get(stage, (0, 0))
        if not left:
            return None
        if self.passes_before.get(stage, 0):
            self.passes_before[stage] -= 1
            return None
        self.faults[stage] = fault, left - 1
        return fault

    def count(self, stage: str, content: str, size: int) -> None:
        """Take down that so many bytes of a body are out, of the content of a file if it has a name."""
        with self.lock:
            self.served_by_stage[stage] += size
            if content:
                self.served[content] += size

    def forget(self) -> None:
        """Begin to count anew."""
        with self.lock:
            self.requests.clear()
            self.ranges.clear()
            self.served.clear()
            self.served_by_stage.clear()


PIECE = 1 << 16


@dataclass(frozen=True, slots=True)
class Request:
    method: str
    target: str
    """As it was sent, with the query."""
    headers: Message
    body: bytes

    @property
    def raw_path(self) -> str:
        """Still quoted: a slash in a name differs from one between names."""
        return urlsplit(self.target).path

    @property
    def path(self) -> str:
        return unquote(self.raw_path)

    @property
    def query(self) -> dict[str, list[str]]:
        return parse_qs(urlsplit(self.target).query)

    @property
    def authorization(self) -> str | None:
        return self.headers.get("Authorization")


@dataclass(frozen=True, slots=True)
class Answer:
    body: bytes = b""
    status: int = 200
    headers: Mapping[str, str] = field(default_factory=dict)
    content: str = ""
    """The file whose content the body is, if it is one."""


def content_of(request: Request, data: bytes, content: str, headers: Mapping[str, str]) -> Answer:
    """A file, or the range of it that was asked for; several ranges at once are answered with all of it."""
    headers = {"Content-Type": "application/octet-stream", "Accept-Ranges": "bytes", **headers}
    asked = request.headers.get("Range")
    found = re.fullmatch(r"bytes=(\d*)-(\d*)", asked or "")
    if found is None or found[1] == found[2] == "":
        return Answer(data, 200, headers, content)
    if found[1]:
        begin, end = int(found[1]), min(int(found[2] or len(data)) + 1, len(data))
    else:
        begin, end = max(0, len(data) - int(found[2])), len(data)
    if begin >= len(data):
        return Answer(b"", 416, {"Content-Range": f"bytes */{len(data)}"})
    headers |= {"Content-Range": f"bytes {begin}-{end - 1}/{len(data)}"}
    return Answer(data[begin:end], 206, headers, content)


class Wire(BaseHTTPRequestHandler):
    """Answers requests, but for the faults that its traffic has in store."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    traffic: Traffic

    def respond(self, request: Request) -> Answer:
        """What there is to say; nobody else is answered at the same time."""
        raise NotImplementedError

    def refuse(self, status: int, message: str) -> Answer:
        """An error in the words of this server."""
        raise NotImplementedError

    def notice(self, request: Request) -> None:
        """Look at what has come, before it meets a fault."""

    def log_message(self, *_arguments: object) -> None:
        pass

    def _serve(self) -> None:
        traffic = self.traffic
        request = Request(self.command, self.path, self.headers, b"")
        line = f"{self.command} {request.path}"
        with traffic.lock:
            traffic.requests.append(line)
            if asked := self.headers.get("Range"):
                traffic.ranges.append((line, asked))
            self.notice(request)
            fault, stage = traffic.fault(line), traffic.stage(line)
        if fault == DROPPED:
            if self.command == "PUT":
                self.rfile.read(min(1000, int(self.headers["Content-Length"])))
            self._reset()
            return
        if fault == HELD:
            traffic.held.set()
            traffic.released.wait()
            return
        if fault == WHOLE:
            del self.headers["Range"]
        request = Request(self.command, self.path, self.headers, self._read())
        with traffic.lock:
            answer = self._injected(fault) or self.respond(request)
            traffic.then.pop(stage, lambda: None)()
        if fault == LOST:
            self._reset()
            return
        self._send(answer, stage, fault if isinstance(fault, Broken) else None)

    do_GET = do_POST = do_PUT = do_HEAD = do_DELETE = _serve  # noqa: N815

    def _injected(self, fault: Fault | None) -> Answer | None:
        if fault in (None, WHOLE, LOST) or isinstance(fault, Broken):
            return None
        if fault == PORTAL:
            return Answer(b"<html>Welcome to our network</html>", headers={"Content-Type": "text/html"})
        told = f"injected, for {self.headers.get('Authorization')}" if self.traffic.careless else "injected"
        answer = self.refuse(fault, told)
        return Answer(answer.body, fault, {**answer.headers, **({"Retry-After": "7"} if fault == 429 else {})})

    def _read(self) -> bytes:
        if self.headers.get("Transfer-Encoding") == "chunked":
            pieces = []
            while size := int(self.rfile.readline().split(b";")[0], 16):
                pieces.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(pieces)
        return self.rfile.read(int(self.headers.get("Content-Length") or 0))

    def _send(self, answer: Answer, stage: str, broken: Broken | None) -> None:
        body, headers = answer.body, {"Content-Type": "application/json", **answer.headers}
        if broken is not None and broken.how == "short":
            body, broken = body[: broken.after], None
        self.send_response(answer.status)
        for name, value in ({"Content-Length": str(len(body))} | headers).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "HEAD":
            return
        for begin in range(0, len(body) if broken is None else broken.after, PIECE):
            piece = body[begin : min(begin + PIECE, broken.after if broken is not None else len(body))]
            # before: whoever has the last byte may look at the counts at once
            self.traffic.count(stage, answer.content, len(piece))
            try:
                self.wfile.write(piece)
            except OSError:
                self.traffic.count(stage, answer.content, -len(piece))
                raise
        if broken is None:
            return
        if broken.how == "stalled":
            self.traffic.held.set()
            self.traffic.released.wait()
        if broken.how == "reset":
            self._reset()
        self.close_connection = True

    def _reset(self) -> None:
        # what is lost on the way: no orderly end, a reset
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.close_connection = True
        self.connection.close()


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
