"""How fast this machine can read a run from its page cache at all: every mapped byte summed, by all cores.

No average can be formed faster than this. As a program it prints its seconds, start-up left out, and what it read.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import numpy.typing as npt

from benchmarks.synthetic import weight_files

_PIECE = 1 << 20  # of 8 bytes; small beside a file, so that the cores finish together

Words = npt.NDArray[np.int64]


def read_all(files: list[Path], *, threads: int) -> int:
    """Sum the files as 64-bit integers, wrapping around; what is over at their ends is left out."""
    mapped: list[Words] = [np.memmap(file, np.int64, "r", shape=(file.stat().st_size // 8,)) for file in files]
    pieces = [words[start : start + _PIECE] for words in mapped for start in range(0, len(words), _PIECE)]
    with ThreadPoolExecutor(threads) as executor:
        return sum(executor.map(lambda words: int(words.sum()), pieces))


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.roofline", description=__doc__)
    parser.add_argument("run", type=Path, help="a synthetic run")
    files = weight_files(parser.parse_args().run)
    begun = time.perf_counter()
    read_all(files, threads=os.cpu_count() or 1)
    seconds = time.perf_counter() - begun
    read = sum(file.stat().st_size for file in files)
    print(json.dumps({"bytes_read": read, "seconds": seconds}))


if __name__ == "__main__":
    main()
