"""A result in an object store, such as `s3://bucket/result`: complete or absent, and continued after an interrupt.

It is made on this machine, in the user's cache, and uploaded from there; its record goes last. During the upload, a
mark beside the files holds their names and a token. A later command to the same address overwrites the mark, and a
command that finds a mark other than its own gives up: two commands never mix in one result. Uploaded files are noted
here under the same token, so that they are not uploaded again.
"""

from __future__ import annotations

import dataclasses
import fcntl
import json
import os
import secrets
import shutil
import threading
import time
import weakref
from collections import deque
from collections.abc import Collection, Iterable, Mapping, Sequence
from contextlib import suppress
from functools import cached_property
from pathlib import Path, PurePosixPath

from ckavg.checkpoints.checkpoint import RESULT_RECORD
from ckavg.checkpoints.fingerprints import fingerprint_files
from ckavg.checkpoints.run import Checkpoint
from ckavg.engine.context import OnProgress, Progress
from ckavg.errors import CkavgError, OutputError, OutputExistsError, WriteError, is_passing, listed
from ckavg.output.fetched import download
from ckavg.output.output_path import CARD, LOCAL, PARTIAL, PLOT, is_cache_file, recorded_files, remove
from ckavg.output.published import read_local
from ckavg.output.record import MOST_BYTES, Record
from ckavg.storage.address import Address, AddressPath, output_address
from ckavg.storage.atomic import cache_directory, make_own_directory, open_own, write_bytes
from ckavg.storage.base import FileInfo, RemotePath
from ckavg.storage.download import CONNECTIONS, Stopped, thread_map
from ckavg.storage.local import parse_json, read_small
from ckavg.storage.objects import LOCK, PROBE, ObjectTree, md5_of, part_bytes, remove_old, short_hash

_NOTES = ".sent.json"
_SECONDS_TO_STOP = 5.0
_PARTS = 16
"""Parts of files that are uploaded, and held in memory, at the same time."""

_LAST = (LOCAL, RESULT_RECORD)
"""The files uploaded after all others, in this order."""

_CHOOSE = "Choose another place with --out."

IN_CACHE = "The result is made there before the upload. Free some space, or set XDG_CACHE_HOME to another disk."
"""The hint where the cache has too little space for a result that is uploaded."""


class Target:
    """An address in an object store that a result is uploaded to.

    Args:
        address: of the result.
        like: another target, whose connection is used if it is in the same bucket.

    Attributes:
        address: of the result.
        directory: the address as a path.
        place: the local directory in which the result is made; removed a week after the last command.

    Raises:
        WriteError: the driver of the address cannot write.
        SettingError: there is no driver for it.
    """

    def __init__(self, address: Address, like: Target | None = None) -> None:
        is_near = like is not None and _bucket(like.address) == _bucket(address)
        self.address: Address = address
        self.directory = AddressPath(str(address))
        self._tree: ObjectTree = ObjectTree(address, like._tree if like is not None and is_near else None)
        self._tree.check_driver()
        self._home = _results_directory() / short_hash(str(address))
        self.place = self._home / address.name
        self._held: weakref.finalize[[int], Target] | None = None

    @cached_property
    def files(self) -> Mapping[str, FileInfo]:
        """The files at the address when they were first listed, by relative path."""
        return self._tree.list_files()

    @property
    def holds_result(self) -> bool:
        """Whether the address has a record."""
        return RESULT_RECORD in self.files

    def read_small(self, name: str) -> bytes:
        """The content of a small file at the address; empty if it is missing or large.

        Raises:
            ReadError: it cannot be read.
        """
        info = self.files.get(name)
        return b"" if info is None or info.nbytes > MOST_BYTES else self._tree.read_whole(name, info)

    def problems(
        self, checkpoints: Iterable[Checkpoint], *, force: bool, files: Collection[str], differs: str = ""
    ) -> list[CkavgError]:
        """All problems of writing a result there; for the arguments see `output_path_problems`."""
        url = str(self.address)
        for each in checkpoints:
            if isinstance(each.path, RemotePath) and f"{url}/".startswith(f"{each.path}/"):
                return [OutputError(f"{url} lies inside the checkpoint {each.path}.", hint=_CHOOSE)]
        try:
            self._check_replaceable(self.files, force=force, files=files, differs=differs)
        except CkavgError as error:
            return [error]
        return []

    def begin(self) -> None:
        """Lock the result against other commands of this machine, and test whether the address can be written.

        Raises:
            OutputError: another command is writing it.
            WriteError: the address, or the local directory in the user's cache, cannot be written.
        """
        if self._held is not None and self._held.alive:
            return
        remove_old(self._home.parent)
        try:
            handle = _lock(self._home)
        except OSError as error:
            raise WriteError(
                f"{error.filename or self._home} cannot be written: {error.strerror or error}.",
                hint="Set XDG_CACHE_HOME to a directory of yours: results are made there before the upload.",
            ) from error
        if handle is None:
            raise OutputError(f"Another ckavg is writing {self.address}.", hint=f"Wait for it. {_CHOOSE}")
        self._held = weakref.finalize(self, os.close, handle)
        try:
            self._tree.check_writable()
        except BaseException:
            self.release()
            raise

    def release(self) -> None:
        """Unlock the result: another command of this machine may continue it."""
        if self._held is not None and self._held.alive:
            if not any(path.name != LOCK for path in self._home.iterdir()):
                shutil.rmtree(self._home, ignore_errors=True)
            self._held()
        self._held = None

    def at_address(self, record: Record) -> Record:
        """The record with the address in place of the local directory."""
        outputs = [
            dataclasses.replace(each, directory=self.directory / each.directory.relative_to(record.directory))
            for each in record.outputs
        ]
        return dataclasses.replace(record, outputs=tuple(outputs))

    def here(self, record: Record) -> Record:
        """The record with the local directory in place of the address."""
        outputs = [
            dataclasses.replace(each, directory=self.place / each.directory.relative_to(record.directory))
            for each in record.outputs
        ]
        return dataclasses.replace(record, outputs=tuple(outputs))

    def send(self, record: Record, on_progress: OnProgress | None = None) -> Record:
        """Upload a result that was made here. Skips uploaded files, and replaces an earlier result.

        Args:
            record: of the result.
            on_progress: called from time to time in this thread.

        Returns:
            The record with the address.

        Raises:
            WriteError, ReadError: the upload failed, and the result is absent; the same command continues.
            OutputError: another command has begun to write to the same address.
        """
        self.begin()
        try:
            self._send(_names(record), on_progress)
        except BaseException as error:
            self.release()
            if is_passing(error):
                error.add_note(
                    f"The average is complete and kept in {self.place} for a week: the same command uploads the rest."
                )
            raise
        return self.at_address(record)

    def fetch(self, record: Record, on_progress: OnProgress | None = None) -> None:
        """Download a result that is only at the address.

        Raises:
            WriteError, ReadError: the download failed.
        """
        self.begin()
        if (self.place / RESULT_RECORD).is_file() and (
            (self.place / RESULT_RECORD).read_bytes() == self.read_small(RESULT_RECORD)
        ):
            return
        remove(self.place)
        download(self._tree, self.files, _names(record), self.place, on_progress)

    def discard(self) -> None:
        """Remove the local copy, unless another command uses it."""
        with suppress(OSError, CkavgError):
            if self._held is None and self._home.is_dir():
                handle = _lock(self._home)
                self._held = None if handle is None else weakref.finalize(self, os.close, handle)
            if self._held is not None and self._held.alive:
                with suppress(CkavgError):  # the response to the last request was lost
                    notes = _Notes(self._home / _NOTES)
                    if notes.token and self._mark(self._tree.list_files()).get("token") == notes.token:
                        self._tree.remove(PARTIAL)
                shutil.rmtree(self._home, ignore_errors=True)
                self._held()
        self._held = None

    # --- upload ---

    def _send(self, names: Sequence[str], on_progress: OnProgress | None) -> None:
        there = self._tree.list_files()
        self._check_replaceable(there, force=True, files=names)
        notes = self._begin_sending(names, there)
        if RESULT_RECORD in there:
            self._tree.remove(RESULT_RECORD)
        self._send_all([name for name in names if name not in _LAST], there, notes, on_progress)
        for name in there.keys() - {*names, LOCAL, PARTIAL}:
            self._tree.remove(name)
        tags = self._check_sent(names, notes)
        local = read_local(self.place)
        made = local.made and dataclasses.replace(local.made, own_fingerprints=tags)
        self._tree.put(LOCAL, type(local)(made=made).to_bytes())
        self._tree.put(RESULT_RECORD, (self.place / RESULT_RECORD).read_bytes())
        with suppress(CkavgError):  # beside a record it does no harm
            self._tree.remove(PARTIAL)
            (self._home / _NOTES).unlink(missing_ok=True)

    def _begin_sending(self, names: Sequence[str], there: Mapping[str, FileInfo]) -> _Notes:
        """Write the mark. Files noted under the same token earlier count as uploaded."""
        files = sorted({*names, LOCAL, *(there.keys() - {PARTIAL, RESULT_RECORD})})
        notes = _Notes(self._home / _NOTES)
        if self._mark(there).get("token") != notes.token:
            notes = notes.anew()
            self._tree.put(PARTIAL, json.dumps({"token": notes.token, "files": files}).encode())
        return notes

    def _send_all(
        self, names: Sequence[str], there: Mapping[str, FileInfo], notes: _Notes, on_progress: OnProgress | None
    ) -> None:
        sizes = {name: (self.place / name).stat().st_size for name in names}
        came: deque[int] = deque()
        over = threading.Event()
        in_parts: set[str] = set()
        done, total = 0, sum(sizes.values())

        def count(nbytes: int) -> None:
            if over.is_set():
                raise Stopped
            came.append(nbytes)

        def send(name: str) -> None:
            path, info = self.place / name, there.get(name)
            state = fingerprint_files([path])
            has_come = info is not None and info.nbytes == sizes[name]
            if has_come and notes.has(name, state):
                count(sizes[name])
                return
            md5 = md5_of(path, in_parts=self.address.scheme == "s3")
            if has_come and info is not None and info.md5 == md5:
                count(sizes[name])
            else:
                in_parts.update({name} if sizes[name] >= 2 * part_bytes(sizes[name]) else ())
                try:
                    self._tree.put_file(path, name, count, parts=max(1, _PARTS // min(CONNECTIONS, len(names))))
                finally:
                    in_parts.discard(name)
            notes.add(name, state, md5)

        def tell() -> None:
            nonlocal done
            while came:
                done += came.popleft()
            if on_progress is not None:
                on_progress(Progress("upload", done, total))

        try:
            # large ones first, so that none of them is left for the end
            thread_map(send, sorted(names, key=lambda name: -sizes[name]), meanwhile=tell)
        finally:
            over.set()
            end = time.monotonic() + _SECONDS_TO_STOP
            while in_parts and time.monotonic() < end:  # after an interrupt the store removes the uploaded parts
                threading.Event().wait(0.05)

    def _check_sent(self, names: Sequence[str], notes: _Notes) -> dict[str, str]:
        """Check that every file has arrived unchanged, and return what identifies each version later, by name.

        Raises:
            WriteError: a file differs from what was uploaded.
            OutputError: another command has begun to write there.
        """
        there = self._tree.list_files()
        if self._mark(there).get("token") != notes.token:
            raise OutputError(
                f"Another command has begun to write to {self.address}.",
                hint=f"The address has no result now. {_CHOOSE}",
            )
        sent = [name for name in names if name not in _LAST]
        sizes = {name: (self.place / name).stat().st_size for name in sent}
        md5s = {name: there[name].md5 for name in sent if name in there}
        # A store that encrypts does not report the MD5 of the file.
        is_comparable = any(md5s.get(name) == notes.md5(name) for name in sent)
        for name in sent:
            is_wrong = is_comparable and md5s.get(name) not in (None, notes.md5(name))
            if name not in there or there[name].nbytes != sizes[name] or is_wrong:
                notes.forget(name)
                raise WriteError(
                    f"{self.address}/{name} differs from what was uploaded.",
                    hint="Run the command again: it uploads the file again.",
                )
        return {
            name: identity
            for name in sent
            if (identity := there[name].identity) is not None and PurePosixPath(name).name not in (CARD, RESULT_RECORD)
        }

    def _mark(self, there: Mapping[str, FileInfo]) -> dict[str, object]:
        """The content of the mark at the address; empty if there is none, or a foreign one."""
        info = there.get(PARTIAL)
        with suppress(ValueError, RecursionError):
            if info is not None and 0 < info.nbytes <= MOST_BYTES:
                said = parse_json(self._tree.read_whole(PARTIAL, info))
                return said if isinstance(said, dict) and isinstance(said.get("files"), list) else {}
        return {}

    def _check_replaceable(
        self, there: Mapping[str, FileInfo], *, force: bool, files: Collection[str], differs: str = ""
    ) -> None:
        """Refuse to replace anything except a result, with `force`, or the remains of an interrupted command.

        Raises:
            OutputExistsError: something else is there.
            ReadError: the address cannot be read.
        """
        own = {name for name in there if is_cache_file(PurePosixPath(name).name)} | {PARTIAL, PROBE, RESULT_RECORD}
        if RESULT_RECORD in there:
            if not force:
                raise OutputExistsError(
                    f"{self.address} already holds a result{f'; {differs}' if differs else ''}.",
                    hint="Replace it with --force, or choose another place with --out.",
                )
            is_small = there[RESULT_RECORD].nbytes <= MOST_BYTES
            data = self._tree.read_whole(RESULT_RECORD, there[RESULT_RECORD]) if is_small else b""
            known = recorded_files(data) or {*files, PLOT}
        elif mark := self._mark(there):
            known = {str(name) for name in mark["files"]} if isinstance(mark["files"], list) else set()
        elif there.keys() - {PROBE}:
            raise OutputExistsError(f"{self.address} exists and is not a result of ckavg.", hint=_CHOOSE)
        else:
            return
        if unknown := sorted(there.keys() - known - own):
            raise OutputExistsError(
                f"{self.address} holds files that are not part of the result and would be lost: {listed(unknown)}.",
                hint="Nothing was removed. Move your files away, or choose another place with --out.",
            )


class _Notes:
    """The files uploaded under the token of a mark: their state here, and the MD5 of their content."""

    def __init__(self, file: Path) -> None:
        self._file = file
        self._lock = threading.Lock()
        self.token = ""
        self._sent: dict[str, list[str]] = {}
        with suppress(OSError, ValueError, RecursionError, AttributeError, TypeError, KeyError):
            said = parse_json(read_small(file, MOST_BYTES, follow=False))
            self._sent = {str(name): [str(state), str(md5)] for name, (state, md5) in said["sent"].items()}
            self.token = str(said["token"])

    def anew(self) -> _Notes:
        self.token, self._sent = secrets.token_hex(16), {}
        self._save()
        return self

    def has(self, name: str, state: str) -> bool:
        return self._sent.get(name, [""])[0] == state

    def md5(self, name: str) -> str:
        return self._sent[name][1]

    def add(self, name: str, state: str, md5: str) -> None:
        with self._lock:
            self._sent[name] = [state, md5]
            self._save()

    def forget(self, name: str) -> None:
        self._sent.pop(name, None)
        self._save()

    def _save(self) -> None:
        with suppress(OSError):  # the disk is full: it would be uploaded again
            write_bytes(self._file, json.dumps({"token": self.token, "sent": self._sent}).encode(), follow=False)


def target_of(out: Path | str, like: Target | None = None) -> Target | None:
    """The target of an address; None for a path on this machine. For errors see `output_address` and `Target`."""
    address = output_address(out)
    return None if address is None else Target(address, like)


def place_here(out: Path) -> Path:
    """The local path; for an address, the directory in which its result is made. Makes no request."""
    address = output_address(out)
    return out if address is None else _results_directory() / short_hash(str(address)) / address.name


def _results_directory() -> Path:
    return cache_directory() / "results"


def _bucket(address: Address) -> tuple[str, str]:
    return address.scheme, address.place.partition("/")[0]


def _names(record: Record) -> list[str]:
    """The files of all outputs, by path in the result."""
    *snapshots, output = record.outputs
    return [f"{each.name}/{file}" for each in snapshots for file in each.files] + list(output.files)


def _lock(home: Path) -> int | None:
    """Lock a directory until the handle is closed; None if another command holds the lock."""
    make_own_directory(home.parent)
    make_own_directory(home)
    handle = open_own(home / LOCK, os.O_RDWR, 0o600)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if os.fstat(handle).st_ino == (home / LOCK).stat().st_ino:
            os.utime(handle)
            return handle
    except (BlockingIOError, FileNotFoundError):  # or just removed by the process that held it
        pass
    except BaseException:
        os.close(handle)
        raise
    os.close(handle)
    return None
