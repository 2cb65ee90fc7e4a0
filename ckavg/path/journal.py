"""Stage *path*: the journal of pass 1, with the finished blocks of an interrupted attempt.

It is a hidden file beside the path cache (`path/cache.py`), removed once the path is complete. A journal that nobody
continues is removed after a week.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import hashlib
import os
import re
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar

from ckavg import __version__
from ckavg.checkpoints.fingerprints import Fingerprints
from ckavg.checkpoints.run import Run
from ckavg.engine.distributed import PassJournal, Ranks
from ckavg.errors import is_passing
from ckavg.path.cache import cache_files
from ckavg.storage.atomic import check_own
from ckavg.storage.journal import Journal, read_journal

Value = TypeVar("Value")

_PREFIX, _SUFFIX = ".path-", ".ckavg-partial"
_NAME = re.compile(rf"{re.escape(_PREFIX)}[0-9a-f]{{16}}-[0-9a-f]{{16}}-\d+{re.escape(_SUFFIX)}")
_SECONDS_CACHED = 7 * 24 * 3600


class PathJournal:
    """The finished blocks of a path that is being measured. A context: after an interrupt the journal stays.

    Args:
        run: what is measured.
        fingerprints: of its checkpoints; if one has none, nothing is kept.
        ranks: the processes that measure it; several exchange their blocks through the journal.
    """

    def __init__(self, run: Run, fingerprints: Fingerprints, ranks: Ranks) -> None:
        self._paths = [place.parent for place in cache_files(run)]
        self._run_key = None if None in fingerprints else _hash(__version__, fingerprints)
        self._ranks = ranks
        self._key = ""
        self._journal: Journal | None = None
        self._path: Path | None = None
        self._made: Path | None = None
        self._keeps = False

    def journal(
        self, asked: object, as_json: Callable[[Value], Any], from_json: Callable[[Any], Value]
    ) -> PassJournal[Value] | None:
        """The journal of measuring these checkpoints: what is finished, and a function that notes more.

        Args:
            asked: everything besides the checkpoints that can change the result of a block.
            as_json, from_json: convert the result of a block to JSON values and back.
        """
        if self._run_key is None:
            return None
        self._key = f"{self._run_key}-{_hash(asked)}"
        done = {place: from_json(value) for place, value in self._recovered().items()}
        self._keeps = bool(done) and not self._ranks.is_shared
        journal = self._ranks.journal("path", self._key, as_json, from_json, known=done)
        if self._ranks.is_shared:
            return journal

        def note(finished: Mapping[int, Value]) -> None:
            self._note({place: as_json(value) for place, value in finished.items()})

        return dataclasses.replace(journal, note=note)

    def __enter__(self) -> PathJournal:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._journal is not None:
            self._journal.close()
        if error is not None and self._keeps and is_passing(error):
            error.add_note("The measured part of the path is kept: the same command continues from there.")
        elif self._path is not None:
            self._path.unlink(missing_ok=True)
            if self._made is not None and error is not None:
                with contextlib.suppress(OSError):
                    self._made.rmdir()

    def clear(self) -> None:
        """Remove the journals of these checkpoints, now that their path is complete, and journals that are a week old.

        A journal that another process is writing stays.
        """
        for directory in self._paths:
            for path in _journals(directory, ""):
                with contextlib.suppress(OSError):
                    check_own(path)
                    handle = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
                    try:
                        if self._is_done_with(path) and _is_free(handle):
                            path.unlink()
                    finally:
                        os.close(handle)

    def _is_done_with(self, path: Path) -> bool:
        ours = self._run_key is not None and path.name.startswith(f"{_PREFIX}{self._run_key}-")
        return ours or time.time() - path.stat().st_mtime > _SECONDS_CACHED

    def _recovered(self) -> dict[int, Any]:
        done: dict[int, Any] = {}
        for directory in self._paths:
            for path in _journals(directory, self._key):
                done |= read_journal(path, self._key)
        return done

    def _note(self, finished: Mapping[int, Any]) -> None:
        if self._journal is None:
            self._open()
        if self._journal is not None:
            try:
                self._journal.add(finished)
                self._keeps = True
            except OSError:  # such as a full disk: measuring goes on without a journal
                self._journal.close()
                self._journal, self._paths = None, []

    def _open(self) -> None:
        name = f"{_PREFIX}{self._key}-{self._ranks.rank}{_SUFFIX}"
        for directory in self._paths:
            with contextlib.suppress(OSError):
                existed = directory.exists()
                directory.mkdir(parents=True, exist_ok=True)
                journal = Journal(directory / name, self._key)
                if not _is_free(journal.handle):  # another ckavg measures the same
                    journal.close()
                    return
                self._journal, self._path = journal, directory / name
                self._made = None if existed else directory
                return
        self._paths = []


def _journals(directory: Path, key: str) -> list[Path]:
    try:
        return sorted(
            path for path in directory.iterdir() if path.name.startswith(_PREFIX + key) and _NAME.fullmatch(path.name)
        )
    except OSError:
        return []


def _hash(*values: object) -> str:
    return hashlib.sha256(repr(values).encode()).hexdigest()[:16]


def _is_free(handle: int) -> bool:
    """Lock a file until it is closed; whether nobody else had locked it."""
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True
