"""A Hugging Face Hub on loopback: what its clients need to push and to pull, with faults on demand.

Large files go to a storage of its own address, by signed URLs, as on the real one, so that a token that is sent there
would be noticed. All is kept in memory.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
from typing import Any
from urllib.parse import unquote

from tests.hub import reading
from tests.hub.reading import error, is_known, told
from tests.hub.state import LARGE, Hub, Repo, oid_of
from tests.hub.wire import Answer, Request, Wire


class Handler(Wire):
    hub: Hub

    def notice(self, request: Request) -> None:
        if request.path.startswith("/storage/") and request.authorization:
            self.hub.leaked.append(f"{request.method} {request.path}")

    def refuse(self, status: int, message: str) -> Answer:
        return error(status, message)

    def respond(self, request: Request) -> Answer:
        hub, path = self.hub, request.path
        if path.startswith("/storage/"):
            digest = path.removeprefix("/storage/")
            return _store(hub, request, digest) if request.method == "PUT" else reading.fetch(hub, request, digest)
        if path == "/api/whoami-v2":
            return told(hub.me) if is_known(request) else error(401, "Invalid credentials in Authorization header")
        if found := re.fullmatch(r"/api/(users|organizations)/([^/]+)/overview", path):
            if found[2] in hub.owners and (found[1] == "users") == (found[2] in ("ada", "stranger")):
                return told({"user": found[2], "name": found[2], "fullname": found[2], "avatarUrl": ""})
            return error(404, "This user does not exist")
        if path == "/api/repos/create":
            return _create(hub, json.loads(request.body))
        if path == "/api/validate-yaml":
            return told({"errors": [], "warnings": []})
        if path == "/lfs-verify":
            asked = json.loads(request.body)
            is_there = len(hub.storage.get(asked["oid"], b"")) == asked["size"]
            return told({}) if is_there else error(404, "no such object")
        if re.fullmatch(r"/([^/]+/[^/]+)\.git/info/lfs/objects/batch", path):
            return _batch(hub, json.loads(request.body))
        if found := re.fullmatch(r"/api/resolve-cache/models/([^/]+/[^/]+)/(.+)", request.raw_path):
            return reading.resolve(hub, request, found[1], found[2])
        if found := re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/(.*))?", request.raw_path):
            return _of_repo(hub, request, found[1], found[2] or "")
        if found := re.fullmatch(r"/([^/]+/[^/]+)/resolve/(.+)", request.raw_path):
            return reading.resolve(hub, request, found[1], found[2])
        return error(404, "no such page")


def _of_repo(hub: Hub, request: Request, name: str, rest: str) -> Answer:
    repo = reading.repo_for(hub, request, name)
    if isinstance(repo, Answer):
        return repo
    verb, _, rest = rest.partition("/")
    if verb in ("", "revision"):
        return reading.info(hub, request, name, repo, unquote(rest) or "main")
    if verb == "auth-check":
        return _may(hub, name)
    if verb == "refs":
        return reading.refs(request, repo)
    if verb == "branch":
        repo.branches[unquote(rest)] = repo.branches["main"]
        return told({})
    if verb == "tree":
        return reading.tree(hub, request, repo, rest)
    if verb == "paths-info":
        return reading.paths_info(request, repo, rest)
    if verb == "preupload":
        return _preupload(hub, request, repo, unquote(rest))
    if verb == "commit":
        return _commit(hub, request, name, repo, unquote(rest))
    return error(404, "no such page")


def _may(hub: Hub, name: str) -> Answer:
    if name in hub.gated:
        return error(403, "Access to it is restricted", **{"X-Error-Code": "GatedRepo"})
    return error(403, "You have no write access to this model") if name in hub.no_write else told({})


def _create(hub: Hub, asked: dict[str, Any]) -> Answer:
    owner = asked["organization"] or hub.me["name"]
    name = f"{owner}/{asked['name']}"
    if name in hub.repos or name in hub.taken:
        return error(409, "You already created this repo")
    if owner not in hub.owners or owner in hub.no_write:
        return error(403, f"You don't have the rights to create a model under the namespace {owner}")
    hub.add(name, private=asked.get("visibility") == "private" or asked.get("private") is True)
    return told({"url": f"{hub.url}/{name}", "name": name})


def _preupload(hub: Hub, request: Request, repo: Repo, revision: str) -> Answer:
    oid = repo.resolve(revision)
    if oid is None:
        return reading.revision_missing()
    tree = repo.commits[oid]
    files = [
        {
            "path": each["path"],
            "uploadMode": "lfs" if each["size"] > LARGE else "regular",
            "shouldIgnore": each["path"] in hub.ignored,
            "oid": oid_of(*tree[each["path"]]) if each["path"] in tree else None,
        }
        for each in json.loads(request.body)["files"]
    ]
    return told({"files": files})


def _commit(hub: Hub, request: Request, name: str, repo: Repo, revision: str) -> Answer:
    header, *operations = (json.loads(line) for line in request.body.splitlines())
    parent = repo.resolve(revision)
    if parent is None:
        return reading.revision_missing()
    tree = dict(repo.commits[parent])
    for each in operations:
        value = each["value"]
        if each["key"] == "lfsFile" and value["oid"] not in hub.storage:
            return error(422, "The file is not there")
        if each["key"] == "lfsFile":
            data, is_large = hub.storage[value["oid"]], True
        else:
            data, is_large = base64.b64decode(value["content"]), False
        tree[value["path"]] = data, is_large
    oid = repo.commit(tree, header["value"]["summary"])
    made = {"commitUrl": f"{hub.url}/{name}/commit/{oid}", "commitOid": oid}
    if request.query.get("create_pr"):
        number = len(repo.pulls) + 1
        repo.pulls[f"refs/pr/{number}"] = oid
        made["pullRequestUrl"] = f"{hub.url}/{name}/discussions/{number}"
    elif revision in repo.pulls:
        repo.pulls[revision] = oid
    else:
        repo.branches[revision] = oid
    return told(made)


def _batch(hub: Hub, asked: dict[str, Any]) -> Answer:
    objects: list[dict[str, Any]] = []
    for each in asked["objects"]:
        entry: dict[str, Any] = {"oid": each["oid"], "size": each["size"]}
        if each["oid"] not in hub.storage:
            entry["actions"] = {
                "upload": {"href": f"{hub.storage_url}/storage/{each['oid']}?X-Signature=SignedSigned"},
                "verify": {"href": f"{hub.url}/lfs-verify"},
            }
        objects.append(entry)
    return told({"transfer": "basic", "objects": objects})


def _store(hub: Hub, request: Request, digest: str) -> Answer:
    hub.sent[digest] += len(request.body)
    if hashlib.sha256(request.body).hexdigest() != digest:
        return error(400, "the content is not that of the address")
    hub.storage[digest] = request.body
    return Answer()
