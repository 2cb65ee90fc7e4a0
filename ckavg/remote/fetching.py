"""Stage *remote*: fetching whole what is to be fetched whole, and telling how far that has come."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from ckavg.checkpoints.run import Fetching, Remote
from ckavg.engine.context import OnProgress, Progress
from ckavg.errors import SettingError


def fetch(remote: Remote | None, fetching: Fetching | None, on_progress: OnProgress | None) -> None:
    """Fetch whole what is to be fetched whole of a run that is not on this machine.

    Raises:
        HubError, ReadError: it could not be fetched. What came of it stays.
    """
    if remote is None or fetching is None or not fetching.whole:
        return
    total, done = fetching.whole_bytes, 0

    def fetched(nbytes: int) -> None:
        nonlocal done
        done += nbytes
        if on_progress:
            on_progress(Progress("fetch", done, total))

    fetched(0)
    remote.fetch(fetching, fetched)


def fetch_all(remote: Remote | None, paths: Iterable[Path], on_progress: OnProgress | None) -> None:
    """Fetch whole all of some weight files, for a work that reads them as files.

    Raises:
        SettingError: there is no room for all of them.
        HubError, ReadError: they could not be fetched. What came of them stays.
    """
    if remote is None:
        return
    fetching = remote.plan(dict.fromkeys(paths, 2.0), other_bytes=0)
    if fetching.streamed_bytes:
        raise SettingError(
            f"All weights are to be read as files, {fetching.streamed_bytes / 2e9:.2f} GB; there is room for "
            f"{fetching.room / 1e9:.2f} GB at {fetching.directory}.",
            hint="Choose fewer checkpoints, or more room with --max-disk or HF_HOME.",
        )
    fetch(remote, fetching, on_progress)
