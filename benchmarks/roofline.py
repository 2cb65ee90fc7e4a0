"""How fast this machine can read a run: an upper bound on the speed of any average.

From the page cache, all cores sum every mapped byte. From the disk, several threads `pread` large pieces, each into one
reused buffer. As a program it prints its seconds, without start-up, and the bytes read.
"""

from __future__ import annotations

import argparse
import json
import os
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import numpy.typing as npt

from benchmarks.synthetic import weight_files

_PIECE = 8 << 20  # bytes; much smaller than a file, so that the threads finish together

Words = npt.NDArray[np.int64]


def sum_mapped(files: list[Path], *, threads: int) -> None:
    """Sum the files as 64-bit integers with wrap-around; remainders at their ends are left out."""
    mapped: list[Words] = [np.memmap(file, np.int64, "r", shape=(file.stat().st_size // 8,)) for file in files]
    length = _PIECE // 8
    pieces = [words[start : start + length] for words in mapped for start in range(0, len(words), length)]
    with ThreadPoolExecutor(threads) as executor:
        list(executor.map(lambda words: int(words.sum()), pieces))


def read_pieces(files: list[Path], *, threads: int) -> None:
    """Read the files piece by piece, and do nothing else."""
    own = threading.local()
    pieces = [(file, start) for file in files for start in range(0, file.stat().st_size, _PIECE)]

    def read(piece: tuple[Path, int]) -> None:
        if not hasattr(own, "buffer"):
            own.buffer = bytearray(_PIECE)
        file, start = piece
        handle = os.open(file, os.O_RDONLY)
        try:
            os.preadv(handle, [own.buffer], start)
        finally:
            os.close(handle)

    with ThreadPoolExecutor(threads) as executor:
        list(executor.map(read, pieces))


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.roofline", description=__doc__)
    parser.add_argument("run", type=Path, help="a synthetic run")
    parser.add_argument("--pread", type=int, metavar="THREADS", help="read with this many threads instead of mapping")
    arguments = parser.parse_args()
    files = weight_files(arguments.run)
    begun, computed = time.perf_counter(), time.process_time()
    if arguments.pread:
        read_pieces(files, threads=arguments.pread)
    else:
        sum_mapped(files, threads=os.cpu_count() or 1)
    seconds = time.perf_counter() - begun
    read = sum(file.stat().st_size for file in files)
    times = {"path": None, "replay": None, "total": seconds, "cpu": time.process_time() - computed}
    print(json.dumps({"path_length": None, "bytes_read": read, "seconds": times}))


if __name__ == "__main__":
    main()
