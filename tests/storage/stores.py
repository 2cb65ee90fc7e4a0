"""An object store on loopback: moto's, with a counter in front of it that can also lose an answer, or break one."""

from __future__ import annotations

import http.client
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from email.message import Message
from pathlib import Path
from urllib.parse import quote, urlsplit

from tests.hub.wire import Answer, Request, Traffic, Wire, listening

BUCKET = "runs"
STAGES = {
    "list": r"GET /[^/]*/?",
    "head": r"HEAD /[^/]+/.+",
    "fetch": r"GET /[^/]+/.+",
}
_OF_A_HOP = {"connection", "transfer-encoding", "server", "date"}
_OWNER = "AWS4-HMAC-SHA256 Credential=AKIASTANDIN/20260101/us-east-1/s3/aws4_request, SignedHeaders=host, Signature=0"
"""Whose the objects are; the store looks at no more than the name."""
_CODES = {403: "AccessDenied", 404: "NoSuchKey", 429: "SlowDown", 500: "InternalError", 503: "SlowDown"}


@dataclass
class Store(Traffic):
    """What is asked of the store. Files are counted as `bucket/key`."""

    stages: dict[str, str] = field(default_factory=lambda: STAGES)
    url: str = ""
    behind: str = ""
    """The address of the store itself, at which nothing is counted and nothing goes wrong."""
    bucket: str = BUCKET

    def put(self, key: str, data: bytes) -> None:
        """Place one object, behind the counter."""
        status = _order(self.behind, "PUT", f"/{self.bucket}/{quote(key)}", data)
        assert status == 200, status

    def delete(self, key: str) -> None:
        """Remove one object, behind the counter."""
        status = _order(self.behind, "DELETE", f"/{self.bucket}/{quote(key)}")
        assert status == 204, status

    def upload(self, directory: Path, prefix: str = "") -> str:
        """Place all files below a directory under `prefix`.

        Returns:
            The address of the directory, `s3://bucket/prefix`.
        """
        prefix = prefix or directory.name
        for path in sorted(directory.rglob("*")):
            if path.is_file():
                self.put(f"{prefix}/{path.relative_to(directory).as_posix()}", path.read_bytes())
        return f"s3://{self.bucket}/{prefix}"


class Front(Wire):
    """Asks the store behind it."""

    store: Store

    def respond(self, request: Request) -> Answer:
        return ask(self.store.behind, request)

    def refuse(self, status: int, message: str) -> Answer:
        code = _CODES.get(status, "InternalError")
        text = f'<?xml version="1.0" encoding="UTF-8"?><Error><Code>{code}</Code><Message>{message}</Message></Error>'
        return Answer(text.encode(), status, {"Content-Type": "application/xml"})


def ask(url: str, request: Request) -> Answer:
    """Pass a request on, and give back what came of it."""
    connection = http.client.HTTPConnection(urlsplit(url).netloc, timeout=60)
    headers = {name: value for name, value in request.headers.items() if name.lower() not in _OF_A_HOP}
    headers["Content-Length"] = str(len(request.body))
    try:
        connection.request(request.method, request.target, request.body or None, headers)
        told = connection.getresponse()
        body = told.read()
        kept = {name: value for name, value in told.getheaders() if name.lower() not in _OF_A_HOP}
    finally:
        connection.close()
    if request.method != "HEAD":
        kept.pop("Content-Length", None)
    found = re.fullmatch(r"/([^/]+/.+)", request.path) if told.status in (200, 206) else None
    return Answer(body, told.status, kept, found[1] if found else "")


@contextmanager
def storing() -> Iterator[str]:
    """The address of a store that is there until the end of the block."""
    from moto.server import ThreadedMotoServer

    moto = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    moto.start()
    try:
        host, port = moto.get_host_and_port()
        yield f"http://{host}:{port}"
    finally:
        moto.stop()


@contextmanager
def fronting(behind: str) -> Iterator[Store]:
    """The counter in front of that store, which is emptied but for one bucket."""
    store = Store(behind=behind)
    for method, target in (("POST", "/moto-api/reset"), ("PUT", f"/{store.bucket}")):
        status = _order(behind, method, target)
        assert status == 200, (target, status)
    with listening(type("Front", (Front,), {"store": store, "traffic": store})) as store.url:
        try:
            yield store
        finally:
            store.released.set()


def _order(url: str, method: str, target: str, body: bytes = b"") -> int:
    headers = Message()
    headers["Authorization"] = _OWNER
    return ask(url, Request(method, target, headers, body)).status
