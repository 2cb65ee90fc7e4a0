"""Stage *report*: what is fetched of a run that is not on this machine, and where it goes."""

from __future__ import annotations

from typing import Any

from ckavg.report.text import as_bytes
from ckavg.storage.remote import Fetching


def fetching_to_dict(fetching: Fetching | None) -> dict[str, Any] | None:
    """The same as plain JSON values; None for a run on this machine."""
    if fetching is None:
        return None
    return {
        "to_disk_bytes": fetching.whole_bytes,
        "on_disk_bytes": fetching.kept_bytes,
        "streamed_bytes": fetching.streamed_bytes,
        "directory": str(fetching.directory),
        "room_bytes": fetching.room,
    }


def fetching_lines(fetching: Fetching | None) -> list[str]:
    """What is fetched to the disk and what is not, in lines that begin with a verb, in one column."""
    if fetching is None:
        return []
    lines = []
    if fetching.kept_bytes:
        lines.append(f"find   {as_bytes(fetching.kept_bytes)} in {fetching.directory}")
    if fetching.whole_bytes:
        lines.append(
            f"fetch  {as_bytes(fetching.whole_bytes)} to {fetching.directory}, with room for {as_bytes(fetching.room)}"
        )
    if fetching.streamed_bytes:
        lines.append(f"fetch  {as_bytes(fetching.streamed_bytes)} as it is read, none of it to the disk")
    return lines
