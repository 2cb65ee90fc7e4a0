"""Where this user's cache is."""

from __future__ import annotations

import os
from pathlib import Path


def cache_directory() -> Path:
    """The directory for what can be had again: `$XDG_CACHE_HOME/ckavg`, or `~/.cache/ckavg`. It need not exist."""
    cache = os.environ.get("XDG_CACHE_HOME") or Path(os.path.expanduser("~")) / ".cache"  # noqa: PTH111 - never raises
    return Path(cache) / "ckavg"
