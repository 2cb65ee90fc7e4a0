"""A Hugging Face Hub on loopback: what its clients need to push and to pull, with faults on demand.

It holds repositories as trees of bytes, and a user, in memory. Large files go to a storage of its own address, by
signed URLs, as on the real one, so that a token that is sent there would be noticed.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import parse_qs, quote, unquote, urlencode

from tests.hub.wire import Answer, Request, Traffic, Wire, content_of, listening

TOKEN = "hf_" + "SecretSecretSecretSecretSecret1234"
LARGE = 5_000

_FILE = r"/(?!api/)[^/]+/[^/]+/resolve/.*|/api/resolve-cache/.*"
STAGES = {
    "whoami": r"GET /api/whoami-v2",
    "info": r"GET /api/models/[^/]+/[^/]+(/revision/.*)?",
    "refs": r"GET /api/models/[^/]+/[^/]+/refs",
    "list": r"GET /api/models/[^/]+/[^/]+/tree/.*",
    "right": r"GET .*/auth-check/write",
    "owner": r"GET /api/(users|organizations)/.*",
    "create": r"POST /api/repos/create",
    "branch": r"POST .*/branch/.*",
    "preupload": r"POST .*/preupload/.*",
    "batch": r"POST .*/info/lfs/objects/batch",
    "put": r"PUT /storage/.*",
    "verify": r"POST /lfs-verify",
    "yaml": r"POST /api/validate-yaml",
    "commit": r"POST .*/commit/.*",
    "look": r"POST .*/paths-info/.*",
}
"""What a push asks."""

READING = {"head": rf"HEAD ({_FILE})", "resolve": rf"GET ({_FILE})", "fetch": r"GET /storage/.*"}
"""What else those ask who read: for a file's name and place, for its content or place, and for that of a large one."""

Tree = dict[str, tuple[bytes, bool]]
"""By path: the content, and whether it is kept as a large file."""


@dataclass
class Repo:
    private: bool
    commits: dict[str, Tree] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)
    tags: dict[str, str] = field(default_factory=dict)
    pulls: dict[str, str] = field(default_factory=dict)
    messages: list[str] = field(default_factory=list)
    labels: dict[str, str] = field(default_factory=dict)
    """By commit: what it is called in the counts. It keeps its name when the branch moves on."""

    def commit(self, tree: Tree, message: str) -> str:
        oid = hashlib.sha1(f"{len(self.commits)}{message}".encode()).hexdigest()
        self.commits[oid] = tree
        self.messages.append(message)
        return oid

    def resolve(self, revision: str) -> str | None:
        for refs in (self.branches, self.tags, self.pulls):
            if revision in refs:
                return refs[revision]
        return revision if revision in self.commits else None


def _me() -> dict[str, Any]:
    return {
        "type": "user",
        "name": "ada",
        "orgs": [{"name": "lab", "roleInOrg": "write"}, {"name": "club", "roleInOrg": "read"}],
        "auth": {"type": "access_token", "accessToken": {"displayName": "t", "role": "write"}},
    }


@dataclass
class Hub(Traffic):
    """What the server holds, and what happened to it."""

    stages: dict[str, str] = field(default_factory=lambda: STAGES | READING)
    url: str = ""
    storage_url: str = ""
    me: dict[str, Any] = field(default_factory=_me)
    repos: dict[str, Repo] = field(default_factory=dict)
    taken: set[str] = field(default_factory=set)
    """Names that are those of something else."""
    owners: set[str] = field(default_factory=lambda: {"ada", "lab", "club", "stranger"})
    no_write: set[str] = field(default_factory=set)
    gated: set[str] = field(default_factory=set)
    """Repositories whose owner has not let the user in: their lists are open, their files are not."""
    granted: set[str] = field(default_factory=set)
    """Likewise, but the user is let in; nobody is without a token."""
    ignored: set[str] = field(default_factory=set)
    """Files that a .gitignore there keeps out."""
    storage: dict[str, bytes] = field(default_factory=dict)
    sent: Counter[str] = field(default_factory=Counter)
    """Bytes that came by PUT, by SHA-256."""
    page: int = 1_000
    """Entries of a tree in one answer."""
    small_elsewhere: bool = False
    """Whether small files, too, are answered with a redirect: to a path on the same host, relative to it."""
    leaked: list[str] = field(default_factory=list)
    """Requests that carried the token where it does not belong."""

    def add(self, name: str, *, private: bool = True, files: Tree | None = None) -> Repo:
        repo = self.repos[name] = Repo(private)
        repo.branches["main"] = self.put(repo, files or {".gitattributes": (b"", False)}, "initial commit")
        return repo

    def put(self, repo: Repo, files: Tree, message: str, *, label: str = "") -> str:
        """A commit of these files alone, which no branch leads to yet; the large ones are in the storage."""
        self.storage.update({hashlib.sha256(data).hexdigest(): data for data, is_large in files.values() if is_large})
        oid = repo.commit(files, message)
        repo.labels[oid] = label or oid
        return oid

    def files(self, name: str, revision: str = "main") -> dict[str, bytes]:
        repo = self.repos[name]
        tree = repo.commits[repo.resolve(revision) or ""]
        return {path: data for path, (data, _) in tree.items() if path != ".gitattributes"}


def oid_of(data: bytes, is_large: bool) -> str:
    """What tells whether a file is the same: the SHA-256 of a large one, the name in git of another."""
    return hashlib.sha256(data).hexdigest() if is_large else blob_of(data)


def blob_of(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


def pointer_of(data: bytes) -> bytes:
    """What git keeps in the place of a large file."""
    digest = hashlib.sha256(data).hexdigest()
    return f"version https://git-lfs.github.com/spec/v1\noid sha256:{digest}\nsize {len(data)}\n".encode()


def entry_of(path: str, data: bytes, is_large: bool) -> dict[str, Any]:
    kept = pointer_of(data) if is_large else data
    told: dict[str, Any] = {"type": "file", "path": path, "size": len(data), "oid": blob_of(kept)}
    if is_large:
        told["lfs"] = {"oid": hashlib.sha256(data).hexdigest(), "size": len(data), "pointerSize": len(kept)}
    return told


# --- for those who read ---

DATE = "2026-01-01T00:00:00.000Z"


def told(value: object, **headers: str) -> Answer:
    return Answer(json.dumps(value).encode(), headers=headers)


def error(status: int, message: str, **headers: str) -> Answer:
    return Answer(json.dumps({"error": message}).encode(), status, {"X-Error-Message": message, **headers})


def is_known(request: Request) -> bool:
    return request.authorization == f"Bearer {TOKEN}"


def repo_for(hub: Hub, request: Request, name: str) -> Repo | Answer:
    """A repository, for somebody who may know that it exists."""
    if request.authorization is not None and not is_known(request) and not request.authorization.startswith("Basic "):
        return error(401, "Invalid credentials in Authorization header")
    repo = hub.repos.get(name)
    if repo is not None and (is_known(request) or not repo.private):
        return repo
    if is_known(request):
        return error(404, "Repository not found", **{"X-Error-Code": "RepoNotFound"})
    # those without a token are not told whether there is such a repository
    return error(401, "Invalid username or password.")


def revision_missing() -> Answer:
    return error(404, "Invalid rev id", **{"X-Error-Code": "RevisionNotFound"})


def info(hub: Hub, request: Request, name: str, repo: Repo, revision: str) -> Answer:
    oid = repo.resolve(revision)
    if oid is None:
        return revision_missing()
    siblings: list[dict[str, Any]] = []
    for path, (data, is_large) in repo.commits[oid].items():
        entry = entry_of(path, data, is_large)
        more = {"size": entry["size"], "blobId": entry["oid"]} | ({"lfs": lfs_of(entry)} if is_large else {})
        siblings.append({"rfilename": path} | (more if request.query.get("blobs") else {}))
    gated = "manual" if name in hub.gated | hub.granted else False
    return told(
        {
            "_id": "0" * 24,
            "id": name,
            "modelId": name,
            "sha": oid,
            "private": repo.private,
            "gated": gated,
            "lastModified": DATE,
            "siblings": siblings,
        }
    )


def lfs_of(entry: dict[str, Any]) -> dict[str, Any]:
    """In this one place, the Hub calls the SHA-256 of a large file by its name."""
    return {
        "sha256": entry["lfs"]["oid"],
        "size": entry["lfs"]["size"],
        "pointerSize": entry["lfs"]["pointerSize"],
    }


def refs(request: Request, repo: Repo) -> Answer:
    """All of them in one answer: this list has no pages."""
    lists = {"branches": ("refs/heads/", repo.branches), "tags": ("refs/tags/", repo.tags), "converts": ("", {})}
    if request.query.get("include_prs"):
        lists["pullRequests"] = ("", repo.pulls)
    return told(
        {
            kind: [{"name": each, "ref": before + each, "targetCommit": oid} for each, oid in of_kind.items()]
            for kind, (before, of_kind) in lists.items()
        }
    )


def tree(hub: Hub, request: Request, repo: Repo, rest: str) -> Answer:
    """A folder: what is in it, or with `recursive` what is below it, in pages."""
    revision, folder = revision_and_path(rest)
    oid = repo.resolve(revision)
    if oid is None:
        return revision_missing()
    files = repo.commits[oid]
    entries = list(_entries(files, expanded=_is_set(request.query, "expand"), repo=repo, oid=oid).values())
    if folder:
        entries = [each for each in entries if each["path"].startswith(f"{folder}/")]
        if not entries:
            return error(404, f"{folder} does not exist on {revision}", **{"X-Error-Code": "EntryNotFound"})
    if not _is_set(request.query, "recursive"):
        depth = folder.count("/") + 1 if folder else 0
        entries = [each for each in entries if each["path"].count("/") == depth]
    begin = int(request.query.get("cursor", ["0"])[0])
    page = entries[begin : begin + hub.page]
    if begin + hub.page >= len(entries):
        return told(page)
    query = {key: value[0] for key, value in request.query.items()} | {"cursor": str(begin + hub.page)}
    return told(page, Link=f'<{hub.url}{request.raw_path}?{urlencode(query)}>; rel="next"')


def paths_info(request: Request, repo: Repo, rest: str) -> Answer:
    oid = repo.resolve(unquote(rest))
    if oid is None:
        return revision_missing()
    body = request.body.decode()
    asked = json.loads(body) if body.startswith("{") else parse_qs(body)
    known = _entries(repo.commits[oid], expanded=_is_set(asked, "expand"), repo=repo, oid=oid)
    return told([known[path] for path in asked["paths"] if path in known])


def resolve(hub: Hub, request: Request, name: str, rest: str) -> Answer:
    """A file by its name: the content of a small one, the place of a large one."""
    repo = repo_for(hub, request, name)
    if isinstance(repo, Answer):
        return repo
    revision, path = revision_and_path(rest)
    oid = repo.resolve(revision)
    if oid is None:
        return revision_missing()
    if (name in hub.granted and not is_known(request)) or name in hub.gated:
        message = f"Access to model {name} is restricted"
        return error(403 if is_known(request) else 401, message, **{"X-Error-Code": "GatedRepo"})
    if path not in repo.commits[oid]:
        return error(404, "TensorInfo not found", **{"X-Error-Code": "EntryNotFound", "X-Repo-Commit": oid})
    data, is_large = repo.commits[oid][path]
    file = f"{name}@{repo.labels.get(oid, oid)}/{path}"
    headers = {"X-Repo-Commit": oid, "ETag": f'"{blob_of(pointer_of(data) if is_large else data)}"'}
    if is_large:
        digest = hashlib.sha256(data).hexdigest()
        location = f"{hub.storage_url}/storage/{digest}?X-Signature=SignedSigned&X-File={quote(file, safe='')}"
        linked = {"X-Linked-Etag": f'"{digest}"', "X-Linked-Size": str(len(data)), "Location": location}
        return Answer(b"", 302, headers | linked)
    if hub.small_elsewhere and not request.path.startswith("/api/resolve-cache/"):
        location = f"/api/resolve-cache/models/{name}/{oid}/{quote(path)}"
        linked = {"X-Linked-Etag": headers["ETag"], "X-Linked-Size": str(len(data)), "Location": location}
        return Answer(b"", 307, headers | linked)
    return content_of(request, data, file, headers)


def fetch(hub: Hub, request: Request, digest: str) -> Answer:
    """The content of a large file, for whoever has its signed address."""
    if digest not in hub.storage or "X-Signature" not in request.query:
        return Answer(b"<Error><Code>AccessDenied</Code></Error>", 403, {"Content-Type": "application/xml"})
    file = request.query.get("X-File", [digest])[0]
    return content_of(request, hub.storage[digest], file, {"ETag": f'"{digest}"'})


def revision_and_path(rest: str) -> tuple[str, str]:
    """What follows `tree/` or `resolve/`, still quoted: slashes in a revision are, but for those of a pull request."""
    found = re.fullmatch(r"(refs/pr/\d+|[^/]+)/?(.*)", rest)
    return (unquote(found[1]), unquote(found[2])) if found else ("", "")


def _entries(files: Tree, *, expanded: bool, repo: Repo, oid: str) -> dict[str, dict[str, Any]]:
    entries: dict[str, dict[str, Any]] = {}
    for path, (data, is_large) in files.items():
        parts = path.split("/")
        for depth in range(1, len(parts)):
            folder = "/".join(parts[:depth])
            name = hashlib.sha1(f"{oid}{folder}".encode()).hexdigest()
            entries[folder] = {"type": "directory", "path": folder, "size": 0, "oid": name}
        entries[path] = entry_of(path, data, is_large)
    if expanded:
        title = repo.messages[list(repo.commits).index(oid)]
        for entry in entries.values():
            entry["lastCommit"] = {"id": oid, "title": title, "date": DATE}
    return entries


def _is_set(query: dict[str, Any], name: str) -> bool:
    value = query.get(name, False)
    return str(value[0] if isinstance(value, list) else value).lower() in ("1", "true")


# --- requests ---


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
            return _store(hub, request, digest) if request.method == "PUT" else fetch(hub, request, digest)
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
            return resolve(hub, request, found[1], found[2])
        if found := re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/(.*))?", request.raw_path):
            return _of_repo(hub, request, found[1], found[2] or "")
        if found := re.fullmatch(r"/([^/]+/[^/]+)/resolve/(.+)", request.raw_path):
            return resolve(hub, request, found[1], found[2])
        return error(404, "no such page")


def _of_repo(hub: Hub, request: Request, name: str, rest: str) -> Answer:
    repo = repo_for(hub, request, name)
    if isinstance(repo, Answer):
        return repo
    verb, _, rest = rest.partition("/")
    if verb in ("", "revision"):
        return info(hub, request, name, repo, unquote(rest) or "main")
    if verb == "auth-check":
        return _may(hub, name)
    if verb == "refs":
        return refs(request, repo)
    if verb == "branch":
        if unquote(rest) in repo.branches:
            return error(409, "This branch exists already")
        repo.branches[unquote(rest)] = repo.branches["main"]
        return told({})
    if verb == "tree":
        return tree(hub, request, repo, rest)
    if verb == "paths-info":
        return paths_info(request, repo, rest)
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
        return revision_missing()
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
        return revision_missing()
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
