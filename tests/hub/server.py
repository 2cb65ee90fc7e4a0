"""A Hugging Face Hub on loopback: what its clients need to push and to pull, with faults on demand.

Large files go to a storage of its own address, by signed URLs, as on the real one, so that a token that is sent there
would be noticed. All is kept in memory.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import socket
import struct
from http.server import BaseHTTPRequestHandler
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

from tests.hub.state import DROPPED, HELD, LARGE, PORTAL, TOKEN, Hub, Repo, entry_of, oid_of


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    hub: Hub

    def log_message(self, *_arguments: object) -> None:
        pass

    def _serve(self) -> None:
        parts = urlsplit(self.path)
        path, self.query = unquote(parts.path), parse_qs(parts.query)
        line = f"{self.command} {path}"
        with self.hub.lock:
            self.hub.requests.append(line)
            if path.startswith("/storage/") and self.headers.get("Authorization"):
                self.hub.leaked.append(line)
            fault = self.hub.fault(line)
        if fault == DROPPED:
            if self.command == "PUT":
                self.rfile.read(min(1000, int(self.headers["Content-Length"])))
            # what is lost on the way: no orderly end, a reset
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.close_connection = True
            self.connection.close()
            return
        if fault == HELD:
            self.hub.held.set()
            self.hub.released.wait()
            return
        self.body = self._read()
        if fault == PORTAL:
            self._answer(b"<html>Welcome to our network</html>", **{"Content-Type": "text/html"})
            return
        if fault is not None:
            told = f"injected, for {self.headers.get('Authorization')}" if self.hub.careless else "injected"
            self._error(fault, told, **({"Retry-After": "7"} if fault == 429 else {}))
            return
        with self.hub.lock:
            self._route(path)

    do_GET = do_POST = do_PUT = do_HEAD = _serve  # noqa: N815

    def _read(self) -> bytes:
        if self.headers.get("Transfer-Encoding") == "chunked":
            pieces = []
            while size := int(self.rfile.readline().split(b";")[0], 16):
                pieces.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(pieces)
        return self.rfile.read(int(self.headers.get("Content-Length") or 0))

    def _answer(self, data: bytes, status: int = 200, /, **headers: str) -> None:
        self.send_response(status)
        for name, value in {"Content-Type": "application/json", **headers}.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def _json(self, value: object) -> None:
        self._answer(json.dumps(value).encode())

    def _error(self, status: int, message: str, **headers: str) -> None:
        self._answer(json.dumps({"error": message}).encode(), status, **{"X-Error-Message": message, **headers})

    def _is_known(self) -> bool:
        return self.headers.get("Authorization") == f"Bearer {TOKEN}"

    def _route(self, path: str) -> None:
        hub = self.hub
        if path.startswith("/storage/"):
            self._storage(path.removeprefix("/storage/"))
        elif path == "/api/whoami-v2":
            if self._is_known():
                self._json(hub.me)
            else:
                self._error(401, "Invalid credentials in Authorization header")
        elif found := re.fullmatch(r"/api/(users|organizations)/([^/]+)/overview", path):
            if found[2] in hub.owners and (found[1] == "users") == (found[2] in ("ada", "stranger")):
                self._json({"user": found[2], "name": found[2], "fullname": found[2], "avatarUrl": ""})
            else:
                self._error(404, "This user does not exist")
        elif path == "/api/repos/create":
            self._create(json.loads(self.body))
        elif path == "/api/validate-yaml":
            self._json({"errors": [], "warnings": []})
        elif path == "/lfs-verify":
            told = json.loads(self.body)
            if len(hub.storage.get(told["oid"], b"")) == told["size"]:
                self._json({})
            else:
                self._error(404, "no such object")
        elif found := re.fullmatch(r"/([^/]+/[^/]+)\.git/info/lfs/objects/batch", path):
            self._batch(json.loads(self.body))
        elif found := re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/(.*))?", path):
            self._of_repo(found[1], found[2] or "")
        elif found := re.fullmatch(r"/([^/]+/[^/]+)/resolve/(refs/pr/\d+|[^/]+)/(.+)", path):
            self._resolve(found[1], found[2], found[3])
        else:
            self._error(404, "no such page")

    def _repo(self, name: str) -> Repo | None:
        repo = self.hub.repos.get(name)
        if repo is None or (repo.private and not self._is_known()):
            self._error(404, "Repository not found", **{"X-Error-Code": "RepoNotFound"})
            return None
        return repo

    def _create(self, asked: dict[str, Any]) -> None:
        owner = asked["organization"] or self.hub.me["name"]
        name = f"{owner}/{asked['name']}"
        if name in self.hub.repos or name in self.hub.taken:
            self._error(409, "You already created this repo")
        elif owner not in self.hub.owners or owner in self.hub.no_write:
            self._error(403, f"You don't have the rights to create a model under the namespace {owner}")
        else:
            self.hub.add(name, private=asked.get("visibility") == "private" or asked.get("private") is True)
            self._json({"url": f"{self.hub.url}/{name}", "name": name})

    def _of_repo(self, name: str, rest: str) -> None:
        repo = self._repo(name)
        if repo is None:
            return
        verb, _, rest = rest.partition("/")
        if verb in ("", "revision"):
            oid = repo.resolve(rest or "main")
            if oid is None:
                self._error(404, "Invalid rev id", **{"X-Error-Code": "RevisionNotFound"})
            else:
                siblings = [{"rfilename": path} for path in repo.commits[oid]]
                self._json({"id": name, "modelId": name, "sha": oid, "private": repo.private, "siblings": siblings})
        elif verb == "auth-check":
            if name in self.hub.gated:
                self._error(403, "Access to it is restricted", **{"X-Error-Code": "GatedRepo"})
            elif name in self.hub.no_write:
                self._error(403, "You have no write access to this model")
            else:
                self._json({})
        elif verb == "refs":
            lists = {
                "branches": ("refs/heads/", repo.branches),
                "tags": ("refs/tags/", repo.tags),
                "pullRequests": ("", repo.pulls),
            }
            refs = {
                kind: [{"name": each, "ref": before + each, "targetCommit": oid} for each, oid in of_kind.items()]
                for kind, (before, of_kind) in lists.items()
            }
            self._json(refs | {"converts": []})
        elif verb == "branch":
            repo.branches[rest] = repo.branches["main"]
            self._json({})
        elif verb == "tree":
            tree = repo.commits[repo.resolve(rest) or repo.branches["main"]]
            self._json([entry_of(path, *each) for path, each in tree.items()])
        elif verb == "paths-info":
            paths = parse_qs(self.body.decode()).get("paths") or json.loads(self.body)["paths"]
            tree = repo.commits[repo.resolve(rest) or ""]
            self._json([entry_of(path, *tree[path]) for path in paths if path in tree])
        elif verb == "preupload" and repo.resolve(rest) is None:
            self._error(404, "Invalid rev id", **{"X-Error-Code": "RevisionNotFound"})
        elif verb == "preupload":
            tree = repo.commits[repo.resolve(rest) or ""]
            files = [
                {
                    "path": each["path"],
                    "uploadMode": "lfs" if each["size"] > LARGE else "regular",
                    "shouldIgnore": each["path"] in self.hub.ignored,
                    "oid": oid_of(*tree[each["path"]]) if each["path"] in tree else None,
                }
                for each in json.loads(self.body)["files"]
            ]
            self._json({"files": files})
        elif verb == "commit":
            self._commit(name, repo, rest)
        else:
            self._error(404, "no such page")

    def _commit(self, name: str, repo: Repo, revision: str) -> None:
        header, *operations = (json.loads(line) for line in self.body.splitlines())
        parent = repo.resolve(revision)
        if parent is None:
            self._error(404, "Invalid rev id", **{"X-Error-Code": "RevisionNotFound"})
            return
        tree = dict(repo.commits[parent])
        for each in operations:
            value = each["value"]
            if each["key"] == "lfsFile":
                data, is_large = self.hub.storage[value["oid"]], True
            else:
                data, is_large = base64.b64decode(value["content"]), False
            tree[value["path"]] = data, is_large
        oid = repo.commit(tree, header["value"]["summary"])
        told = {"commitUrl": f"{self.hub.url}/{name}/commit/{oid}", "commitOid": oid}
        if self.query.get("create_pr"):
            number = len(repo.pulls) + 1
            repo.pulls[f"refs/pr/{number}"] = oid
            told["pullRequestUrl"] = f"{self.hub.url}/{name}/discussions/{number}"
        elif revision in repo.pulls:
            repo.pulls[revision] = oid
        else:
            repo.branches[revision] = oid
        self._json(told)

    def _batch(self, asked: dict[str, Any]) -> None:
        objects: list[dict[str, Any]] = []
        for each in asked["objects"]:
            told: dict[str, Any] = {"oid": each["oid"], "size": each["size"]}
            if each["oid"] not in self.hub.storage:
                told["actions"] = {
                    "upload": {"href": f"{self.hub.storage_url}/storage/{each['oid']}?X-Signature=SignedSigned"},
                    "verify": {"href": f"{self.hub.url}/lfs-verify"},
                }
            objects.append(told)
        self._json({"transfer": "basic", "objects": objects})

    def _storage(self, oid: str) -> None:
        if self.command == "PUT":
            self.hub.sent[oid] += len(self.body)
            if hashlib.sha256(self.body).hexdigest() == oid:
                self.hub.storage[oid] = self.body
                self._answer(b"")
            else:
                self._error(400, "the content is not that of the address")
            return
        self._content(self.hub.storage[oid])

    def _content(self, data: bytes, **headers: str) -> None:
        found = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or "")
        if found is None:
            self._answer(data, 200, **headers)
            return
        begin, end = int(found[1]), int(found[2] or len(data) - 1)
        piece = data[begin : end + 1]
        self._answer(piece, 206, **headers, **{"Content-Range": f"bytes {begin}-{begin + len(piece) - 1}/{len(data)}"})

    def _resolve(self, name: str, revision: str, path: str) -> None:
        repo = self._repo(name)
        if repo is None:
            return
        oid = repo.resolve(revision)
        if oid is None or path not in repo.commits[oid]:
            code = "RevisionNotFound" if oid is None else "EntryNotFound"
            self._error(404, "not found", **{"X-Error-Code": code, **({"X-Repo-Commit": oid} if oid else {})})
            return
        data, is_large = repo.commits[oid][path]
        headers = {"X-Repo-Commit": oid, "ETag": f'"{oid_of(data, is_large)}"'}
        if not is_large:
            self._content(data, **headers)
            return
        digest = hashlib.sha256(data).hexdigest()
        location = f"{self.hub.storage_url}/storage/{digest}?X-Signature=SignedSigned"
        linked = {"X-Linked-Etag": f'"{digest}"', "X-Linked-Size": str(len(data)), "Location": location}
        self._answer(b"", 302, **headers, **linked)
