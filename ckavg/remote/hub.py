"""Stage *remote*: revisions and files of a repository on the Hugging Face Hub, read with its own client.

Branches and tags are taken as the commits they are at when they are listed, so that a branch that moves meanwhile
changes nothing. Files that are fetched whole go into the client's own cache, where other programs find them.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import cached_property
from pathlib import Path
from typing import TypeVar

from ckavg.errors import HubError, ReadError
from ckavg.remote.download import Partial, complete
from ckavg.remote.store import GO_ONLINE, OnBytes, RemoteFile
from ckavg.remote.tries import exactly, with_retries
from ckavg.storage.address import Address
from ckavg.storage.atomic import open_own
from ckavg.storage.hub_errors import connect, hub_errors, is_disk_error, may_pass

Value = TypeVar("Value")

_LARGE, _SMALL = "sha256", "git"
"""What files are known by: large ones by their SHA-256, small ones as git does. The cache keeps them by these names."""


class Repository:
    """A model repository, and what its client needs to read it. Looks at nothing before it is asked to."""

    def __init__(self, repo: str) -> None:
        from huggingface_hub import constants

        self.name = repo
        self.api = connect()
        self.is_offline = bool(constants.HF_HUB_OFFLINE)
        self.cache = Path(constants.HF_HUB_CACHE) / f"models--{repo.replace('/', '--')}"

    def revisions(self) -> Mapping[str, str]:
        """The commit of every branch and tag. Offline, of those that the cache knows.

        Raises:
            HubError: the Hub refused, or cannot be reached.
        """
        if self.is_offline:
            return _kept_refs(self.cache / "refs")
        refs = self.ask("listing its revisions", lambda: self.api.list_repo_refs(self.name))
        return {ref.name: ref.target_commit for ref in (*refs.tags, *refs.branches)}

    def tree(self, revision: str, folder: str = "", *, commit: str | None = None) -> HubTree:
        """The files of a revision.

        Args:
            revision: branch, tag or commit.
            folder: where in the repository; empty for all of it.
            commit: the commit that it is at, if that is known.

        Raises:
            HubError: there is no such revision, or the Hub refused, or cannot be reached.
        """
        if commit is None and self.is_offline:
            commit = self.revisions().get(revision)
            if commit is None and (self.cache / "snapshots" / revision).is_dir():
                commit = revision
            if commit is None:
                raise self.not_kept(revision)
        if commit is None:
            info = self.ask(
                f"looking for its revision {revision}", lambda: self.api.repo_info(self.name, revision=revision)
            )
            commit = str(info.sha)
        return HubTree(self, revision, commit, folder)

    def not_kept(self, revision: str) -> HubError:
        """Offline, and not in the cache."""
        return HubError(
            f"{self.name}: revision {revision} is not in the cache at {self.cache.parent}, and huggingface_hub is in "
            "offline mode.",
            hint=GO_ONLINE,
        )

    def ask(self, doing: str, request: Callable[[], Value]) -> Value:
        """What a request gives, which is made again where it fails for what may pass.

        Raises:
            HubError: the Hub refused, or cannot be reached.
            ReadError: the cache cannot be written.
        """
        with self._asking(doing):
            return with_retries(request, passes=may_pass)

    @contextmanager
    def _asking(self, doing: str) -> Iterator[None]:
        """Make an error of the client one of ours."""
        with hub_errors(doing, self.name, self.api, right="read"):
            try:
                yield
            except OSError as error:
                if not is_disk_error(error):
                    raise
                raise ReadError(
                    f"{self.name}: {doing} failed: {error.filename or self.cache.parent}: {error.strerror}.",
                    hint="Free some space, name a directory of yours with HF_HOME, or fetch less with --max-disk.",
                ) from error


class HubTree:
    """The files of one commit, or of a folder in it; see `Tree`."""

    keeps = True

    def __init__(self, repository: Repository, revision: str, commit: str, folder: str) -> None:
        self._repository = repository
        self._revision = revision
        self._prefix = f"{folder}/" if folder else ""
        self._is_remembered = False
        self.commit = commit
        self.url = str(Address("hf", repository.name, revision, folder))
        self.pinned_url = str(Address("hf", repository.name, commit, folder))

    @property
    def is_offline(self) -> bool:
        """See `Tree`."""
        return self._repository.is_offline

    @cached_property
    def files(self) -> Mapping[str, RemoteFile]:
        """See `Tree`."""
        if self._repository.is_offline:
            return self._kept_files()
        from huggingface_hub.hf_api import RepoFile

        def listed() -> Mapping[str, RemoteFile]:
            found = self._repository.api.list_repo_tree(
                self._repository.name, self._prefix.rstrip("/") or None, recursive=True, revision=self.commit
            )
            return {
                each.path.removeprefix(self._prefix): RemoteFile(each.size, *_identity(each))
                for each in found
                if isinstance(each, RepoFile)
            }

        place = f"{self._revision}/{self._prefix}".rstrip("/")
        return self._repository.ask(f"listing the files of {place}", listed)

    def read(self, name: str, start: int, stop: int) -> bytes:
        """See `Tree`."""
        from huggingface_hub import hf_hub_url
        from huggingface_hub.utils import build_hf_headers, hf_raise_for_status, http_backoff  # type: ignore[attr-defined]

        if self._repository.is_offline:
            raise self._repository.not_kept(self._revision)
        path = self._prefix + name
        url = hf_hub_url(self._repository.name, path, revision=self.commit, endpoint=self._repository.api.endpoint)
        headers = build_hf_headers() | {"Range": f"bytes={start}-{stop - 1}", "Accept-Encoding": "identity"}

        def piece() -> bytes:
            response = http_backoff("GET", url, headers=headers, timeout=_seconds())
            hf_raise_for_status(response)
            return exactly(response.content, start, stop, self.files[name].size)

        return self._repository.ask(f"reading {path} of {self._revision}", piece)

    def kept(self, name: str) -> Path | None:
        """See `Tree`."""
        path = self._repository.cache / "snapshots" / self.commit / self._prefix / name
        return path if path.is_file() else None

    def fetch(self, name: str, on_bytes: OnBytes) -> Path:
        """See `Tree`."""
        from huggingface_hub import hf_hub_download

        if self._repository.is_offline:
            kept = self.kept(name)
            if kept is None:
                raise self._repository.not_kept(self._revision)
            return kept
        file, path = self.files[name], self._prefix + name
        kind, _, digest = (file.identity or "").partition(":")
        if kind == _LARGE:
            # The client itself begins a file anew after an interrupt; one that is there already, it links to.
            complete(Partial(self, name, file.size, self._repository.cache / "blobs" / digest, digest), on_bytes)

        def download() -> Path:
            endpoint = self._repository.api.endpoint
            return Path(str(hf_hub_download(self._repository.name, path, revision=self.commit, endpoint=endpoint)))

        fetched = self._repository.ask(f"fetching {path} of {self._revision}", download)
        self._remember_revision()
        return fetched

    def _remember_revision(self) -> None:
        """Have the cache know which commit the revision is at, for those who work offline later."""
        if self._is_remembered or self._revision == self.commit:
            return
        self._is_remembered = True
        ref = self._repository.cache / "refs" / self._revision
        with suppress(OSError):
            ref.parent.mkdir(parents=True, exist_ok=True)
            with os.fdopen(open_own(ref, os.O_WRONLY | os.O_TRUNC), "w") as file:
                file.write(self.commit)

    @property
    def directory(self) -> Path:
        """See `Tree`."""
        return self._repository.cache.parent

    def drop(self) -> None:
        """See `Tree`: the cache is there for others, too."""

    def check_unchanged(self) -> None:
        """See `Tree`: a commit does not change."""

    def _kept_files(self) -> Mapping[str, RemoteFile]:
        root = self._repository.cache / "snapshots" / self.commit
        found = {}
        for path in sorted((root / self._prefix).rglob("*")):
            if path.is_file():
                blob = path.resolve()
                identity = f"{_LARGE if len(blob.name) == 64 else _SMALL}:{blob.name}"
                name = path.relative_to(root / self._prefix).as_posix()
                found[name] = RemoteFile(blob.stat().st_size, identity, is_hash=True)
        if not found:
            raise self._repository.not_kept(self._revision)
        return found


def _identity(file: object) -> tuple[str | None, bool]:
    lfs = getattr(file, "lfs", None)
    if lfs is not None:
        return f"{_LARGE}:{lfs.sha256}", True
    blob = getattr(file, "blob_id", None)
    return (f"{_SMALL}:{blob}", True) if blob else (None, False)


def _kept_refs(refs: Path) -> Mapping[str, str]:
    found = {}
    for path in sorted(refs.rglob("*")) if refs.is_dir() else ():
        if path.is_file():
            found[path.relative_to(refs).as_posix()] = path.read_text().strip()
    return found


def _seconds() -> float:
    from huggingface_hub import constants

    return float(constants.HF_HUB_DOWNLOAD_TIMEOUT)
