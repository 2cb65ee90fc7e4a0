"""Revisions and files of a repository on the Hugging Face Hub, read with its own client.

Branches and tags are resolved to commits when they are listed, so a branch that moves later changes nothing. Downloads
go into the client's own cache, where other programs find them.

Ranges are requested here rather than by `HfFileSystem.cat_file`: if a mirror answers with the whole file, that takes
its first bytes for the requested ones.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from contextlib import suppress
from functools import cached_property, partial
from pathlib import Path
from typing import TypeVar

from ckavg.errors import HubError
from ckavg.storage.address import Address
from ckavg.storage.atomic import open_own
from ckavg.storage.base import FileInfo, OnBytes
from ckavg.storage.download import complete, exactly
from ckavg.storage.hub_errors import GO_ONLINE, ask, connect

Value = TypeVar("Value")

_LARGE, _SMALL = "sha256", "git"
"""How files are identified, also in the cache: large ones by SHA-256, small ones by git's hash."""


class Repository:
    """A model repository and its client. Makes no request before a method is called."""

    def __init__(self, repo: str) -> None:
        from huggingface_hub import constants

        self.name = repo
        self.api = connect()
        self.is_offline = bool(constants.HF_HUB_OFFLINE)
        self.cache = Path(constants.HF_HUB_CACHE) / f"models--{repo.replace('/', '--')}"

    def revisions(self) -> Mapping[str, str]:
        """The commit of every branch and tag; offline, of those in the cache.

        Raises:
            HubError: the Hub refused, or cannot be reached.
        """
        if self.is_offline:
            refs = self.cache / "refs"
            paths = sorted(path for path in refs.rglob("*") if path.is_file()) if refs.is_dir() else []
            return {path.relative_to(refs).as_posix(): path.read_text().strip() for path in paths}
        found = self.ask("listing its revisions", lambda: self.api.list_repo_refs(self.name))
        return {ref.name: ref.target_commit for ref in (*found.tags, *found.branches)}

    def tree(self, revision: str | None, folder: str = "", *, commit: str | None = None) -> HubTree:
        """The files of a revision.

        Args:
            revision: branch, tag or commit; None: `main`.
            folder: folder in the repository; empty for all of it.
            commit: its commit, if known.

        Raises:
            HubError: there is no such revision, or the Hub refused, or cannot be reached.
        """
        name = revision or "main"
        if commit is None and self.is_offline:
            commit = self.revisions().get(name)
            if commit is None and (self.cache / "snapshots" / name).is_dir():
                commit = name
            if commit is None:
                raise self.not_in_cache(name)
        if commit is None:
            info = self.ask(f"looking for its revision {name}", lambda: self.api.repo_info(self.name, revision=name))
            commit = str(info.sha)
        return HubTree(self, revision, commit, folder)

    def not_in_cache(self, revision: str) -> HubError:
        """The error for a revision that is not in the cache while offline."""
        return HubError(
            f"{self.name}: revision {revision} is not in the cache at {self.cache.parent}, and huggingface_hub is in "
            "offline mode.",
            hint=GO_ONLINE,
        )

    def ask(self, doing: str, request: Callable[[], Value]) -> Value:
        """The response to a request; see `ckavg.storage.hub_errors.ask`."""
        return ask(doing, self.name, self.api, request, right="read")


class HubTree:
    """The files of one commit, or of a folder in it; see `Tree`."""

    is_shared = True

    def __init__(self, repository: Repository, revision: str | None, commit: str, folder: str) -> None:
        self._repository = repository
        self._revision = revision or "main"
        self._commit = commit
        self._prefix = f"{folder}/" if folder else ""
        self._snapshot = repository.cache / "snapshots" / commit / folder
        self.url = str(Address("hf", repository.name, revision, folder))
        self.pinned_url = str(Address("hf", repository.name, commit, folder))
        self.is_offline = repository.is_offline
        self.directory = repository.cache.parent

    @cached_property
    def files(self) -> Mapping[str, FileInfo]:
        """See `Tree`."""
        if self.is_offline:
            return self._files_in_cache()
        from huggingface_hub.hf_api import RepoFile

        def list_files() -> Mapping[str, FileInfo]:
            found = self._repository.api.list_repo_tree(
                self._repository.name, self._prefix.rstrip("/") or None, recursive=True, revision=self._commit
            )
            files = (each for each in found if isinstance(each, RepoFile))
            return {each.path.removeprefix(self._prefix): _info(each) for each in files}

        place = f"{self._revision}/{self._prefix}".rstrip("/")
        return self._repository.ask(f"listing the files of {place}", list_files)

    def read(self, name: str, start: int, stop: int) -> bytes:
        """See `Tree`."""
        from huggingface_hub import constants, hf_hub_url
        from huggingface_hub.utils import build_hf_headers, hf_raise_for_status, http_backoff  # type: ignore[attr-defined]

        if self.is_offline:
            raise self._repository.not_in_cache(self._revision)
        path = self._prefix + name
        url = hf_hub_url(self._repository.name, path, revision=self._commit, endpoint=self._repository.api.endpoint)
        headers = build_hf_headers() | {"Range": f"bytes={start}-{stop - 1}", "Accept-Encoding": "identity"}

        def read_range() -> bytes:
            response = http_backoff("GET", url, headers=headers, timeout=float(constants.HF_HUB_DOWNLOAD_TIMEOUT))
            hf_raise_for_status(response)
            return exactly(response.content, start, stop, self.files[name].nbytes)

        return self._repository.ask(f"reading {path} of {self._revision}", read_range)

    def local(self, name: str) -> Path | None:
        """See `Tree`."""
        path = self._snapshot / name
        return path if path.is_file() else None

    def download(self, name: str, on_bytes: OnBytes) -> Path:
        """See `Tree`."""
        from huggingface_hub import hf_hub_download

        if self.is_offline:
            found = self.local(name)
            if found is None:
                raise self._repository.not_in_cache(self._revision)
            return found
        info, path = self.files[name], self._prefix + name
        kind, _, digest = (info.identity or "").partition(":")
        if kind == _LARGE:  # the client would restart after an interrupt; it links to a blob that exists
            target = self._repository.cache / "blobs" / digest
            url = f"{self.url}: {name}"
            complete(partial(self.read, name), info.nbytes, target, on_bytes, url=url, sha256=digest)

        def download() -> Path:
            endpoint = self._repository.api.endpoint
            return Path(str(hf_hub_download(self._repository.name, path, revision=self._commit, endpoint=endpoint)))

        downloaded = self._repository.ask(f"downloading {path} of {self._revision}", download)
        self._remember_revision()
        return downloaded

    def remove_downloads(self) -> None:
        """See `Tree`: the cache is shared, so nothing is removed."""

    def check_unchanged(self) -> None:
        """See `Tree`: a commit does not change."""

    def _remember_revision(self) -> None:
        """Note the commit of the revision in the cache, for offline use later."""
        if self._revision == self._commit:
            return
        ref = self._repository.cache / "refs" / self._revision
        with suppress(OSError):
            ref.parent.mkdir(parents=True, exist_ok=True)
            with os.fdopen(open_own(ref, os.O_WRONLY | os.O_TRUNC), "w") as file:
                file.write(self._commit)

    def _files_in_cache(self) -> Mapping[str, FileInfo]:
        found = {}
        for path in sorted(each for each in self._snapshot.rglob("*") if each.is_file()):
            blob = path.resolve()
            identity = f"{_LARGE if len(blob.name) == 64 else _SMALL}:{blob.name}"
            found[path.relative_to(self._snapshot).as_posix()] = FileInfo(blob.stat().st_size, None, identity, True)
        if not found:
            raise self._repository.not_in_cache(self._revision)
        return found


def _info(file: object) -> FileInfo:
    size: int = getattr(file, "size", 0)
    lfs, blob = getattr(file, "lfs", None), getattr(file, "blob_id", None)
    identity = f"{_LARGE}:{lfs.sha256}" if lfs is not None else f"{_SMALL}:{blob}" if blob else None
    return FileInfo(size, identity=identity, is_hash=identity is not None)
