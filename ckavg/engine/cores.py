"""Stage *engine*: the cores of this machine, and how many threads share them. Imports nothing heavy."""

from __future__ import annotations

import os

MOST_THREADS = 16
"""More do not read faster; each has its own buffers."""


def available_cores(processes: int = 1) -> int:
    """How many cores this process may use, where so many share them."""
    try:
        cores = len(os.sched_getaffinity(0))
    except AttributeError:  # macOS
        cores = os.cpu_count() or 1
    return max(1, cores // processes)


def worker_threads(processes: int = 1) -> int:
    """How many threads read and compute: one for each core, where so many processes share them."""
    return min(available_cores(processes), MOST_THREADS)
