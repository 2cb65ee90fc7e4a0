"""Occupies memory, so that the page cache is as small as a measurement needs. Only for root on Linux.

As a program it holds memory until its standard input ends. It releases memory when others need it, and is the first
process that the system kills when there is none.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import mmap
import os
import select
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from benchmarks.cache import available_bytes

_STEP = 64 << 20
_PAUSE = 0.05
_LOCK_ALL = 1 | 2  # MCL_CURRENT | MCL_FUTURE: later mappings are resident at once, and never swapped out
_READY = b"ready\n"


@contextlib.contextmanager
def balloon(leave: int) -> Iterator[None]:
    """Leave only this many bytes of memory to other processes and the page cache while the context lasts.

    Raises:
        OSError: the system does not let this user lock that much memory.
    """
    command = [sys.executable, "-m", "benchmarks.balloon", str(leave)]
    root = Path(__file__).resolve().parent.parent
    with subprocess.Popen(command, cwd=root, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            if process.stdout.readline() != _READY:
                raise OSError("memory could not be taken away; see above")
            yield
            if process.poll() is not None:
                raise OSError("the system took back the occupied memory")
        finally:
            process.stdin.close()


def change(available: int, leave: int) -> int:
    """How many steps of memory to take, or to release if negative.

    >>> change(_STEP * 10, _STEP * 7), change(_STEP * 7 - 1, _STEP * 7), change(_STEP * 7 + 1, _STEP * 7)
    (3, -1, 0)
    """
    return (available - leave) // _STEP


def hold(leave: int) -> None:
    """Take and give back memory until standard input ends."""
    held: list[mmap.mmap] = []
    said = False
    while True:
        wanted = change(available_bytes(), leave)
        for _ in range(wanted):
            held.append(mmap.mmap(-1, _STEP, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS))
        for _ in range(min(-wanted, len(held))):
            held.pop().close()
        if wanted <= 0 and not said:
            os.write(sys.stdout.fileno(), _READY)
            said = True
        if select.select([sys.stdin], [], [], _PAUSE)[0]:
            return


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.balloon", description=__doc__)
    parser.add_argument("leave", type=int, help="bytes that others may have")
    leave = parser.parse_args().leave
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent, which then closes standard input
    Path("/proc/self/oom_score_adj").write_text("1000\n", encoding="ascii")
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.mlockall(_LOCK_ALL):
        sys.exit(f"locking memory failed: {os.strerror(ctypes.get_errno())}")
    hold(leave)


if __name__ == "__main__":
    main()
