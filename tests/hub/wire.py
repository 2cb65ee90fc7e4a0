"""How the servers on loopback talk: requests in, answers out, and whatever goes wrong on the way."""

from __future__ import annotations

import re
import socket
import struct
from collections.abc import Mapping
from dataclasses import dataclass, field
from email.message import Message
from http.server import BaseHTTPRequestHandler
from urllib.parse import parse_qs, unquote, urlsplit

from tests.hub.faults import DROPPED, HELD, LOST, PORTAL, WHOLE, Broken, Fault, Traffic

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
