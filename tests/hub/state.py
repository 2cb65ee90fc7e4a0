"""What the Hub on loopback holds: repositories as trees of bytes, and a user."""

from __future__ import annotations

import hashlib
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

from tests.hub.faults import DROPPED as DROPPED
from tests.hub.faults import HELD as HELD
from tests.hub.faults import PORTAL as PORTAL
from tests.hub.faults import Traffic

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
