"""What the Hub on loopback says to those who read: what there is, where it lies, and who may see it."""

from __future__ import annotations

import hashlib
import json
import re
from typing import Any
from urllib.parse import parse_qs, quote, unquote, urlencode

from tests.hub.state import TOKEN, Hub, Repo, Tree, blob_of, entry_of, pointer_of
from tests.hub.wire import Answer, Request, content_of

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
