"""What the Hub on loopback holds: repositories as trees of bytes, a user, faults to come, and what happened."""

from __future__ import annotations

import hashlib
import re
import threading
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

TOKEN = "hf_" + "SecretSecretSecretSecretSecret1234"
LARGE = 5_000
DROPPED = 0
"""In the place of a status: the connection is cut."""
HELD = -1
"""Likewise: there is no answer until the end."""
PORTAL = 200
"""Likewise: somebody else answers."""

STAGES = {
    "whoami": r"GET /api/whoami-v2",
    "info": r"GET /api/models/[^/]+/[^/]+",
    "refs": r"GET .*/refs",
    "list": r"GET .*/tree/.*",
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
class Hub:
    """What the server holds, and what happened to it."""

    url: str = ""
    storage_url: str = ""
    me: dict[str, Any] = field(default_factory=_me)
    repos: dict[str, Repo] = field(default_factory=dict)
    taken: set[str] = field(default_factory=set)
    """Names that are those of something else."""
    owners: set[str] = field(default_factory=lambda: {"ada", "lab", "club", "stranger"})
    no_write: set[str] = field(default_factory=set)
    gated: set[str] = field(default_factory=set)
    ignored: set[str] = field(default_factory=set)
    """Files that a .gitignore there keeps out."""
    storage: dict[str, bytes] = field(default_factory=dict)
    faults: dict[str, tuple[int, int]] = field(default_factory=dict)
    """By stage: a status or `DROPPED`, and how many requests it still meets."""
    passes_before: dict[str, int] = field(default_factory=dict)
    """By stage: how many requests are served before its fault."""
    requests: list[str] = field(default_factory=list)
    sent: Counter[str] = field(default_factory=Counter)
    """Bytes that came by PUT, by SHA-256."""
    careless: bool = False
    """Whether a fault repeats the token to whoever sent it."""
    held: threading.Event = field(default_factory=threading.Event)
    released: threading.Event = field(default_factory=threading.Event)
    leaked: list[str] = field(default_factory=list)
    """Requests that carried the token where it does not belong."""
    lock: threading.RLock = field(default_factory=threading.RLock)

    def add(self, name: str, *, private: bool = True, files: Tree | None = None) -> Repo:
        repo = self.repos[name] = Repo(private)
        repo.branches["main"] = repo.commit(files or {".gitattributes": (b"", False)}, "initial commit")
        return repo

    def files(self, name: str, revision: str = "main") -> dict[str, bytes]:
        repo = self.repos[name]
        tree = repo.commits[repo.resolve(revision) or ""]
        return {path: data for path, (data, _) in tree.items() if path != ".gitattributes"}

    def fault(self, line: str) -> int | None:
        """The fault that this request meets, if one."""
        for stage, (status, left) in self.faults.items():
            if left and re.fullmatch(STAGES[stage], line):
                if self.passes_before.get(stage, 0):
                    self.passes_before[stage] -= 1
                    return None
                self.faults[stage] = status, left - 1
                return status
        return None


def oid_of(data: bytes, is_large: bool) -> str:
    if is_large:
        return hashlib.sha256(data).hexdigest()
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


def entry_of(path: str, data: bytes, is_large: bool) -> dict[str, Any]:
    told: dict[str, Any] = {"type": "file", "path": path, "size": len(data), "oid": oid_of(data, is_large)}
    if is_large:
        told["lfs"] = {"oid": hashlib.sha256(data).hexdigest(), "size": len(data), "pointerSize": 130}
    return told
