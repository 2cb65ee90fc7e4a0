"""Whether mapping the files of a run would be faster than `pread`: `python -m benchmarks.mapped RUN`.

A pass reads a piece of every checkpoint, then the next piece. Two threads do so and sum what they read, in a process
for each row: with `pread` into one buffer, mapped with each piece released as soon as it is summed, and mapped with
nothing released, which no program with a limit of memory can do. The run should be in the page cache.
"""

from __future__ import annotations

import argparse
import json
import mmap
import os
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from benchmarks import measure
from benchmarks.synthetic import weight_files
from benchmarks.table import Row, render, with_spread

WAYS = "pread", "released", "kept"
_PIECES = 1 << 16, 1 << 18, 1 << 20
_THREADS = 2


def sum_pieces(files: list[Path], way: str, piece: int) -> int:
    """The sum of all whole pieces of the files as 64-bit integers, with wrap-around.

    Args:
        files: of the same size.
        way: one of `WAYS`.
        piece: bytes, whole pages.
    """
    handles = [os.open(file, os.O_RDONLY) for file in files]
    maps = [mmap.mmap(handle, 0, prot=mmap.PROT_READ) for handle in handles] if way != "pread" else []
    starts = iter(range(0, files[0].stat().st_size - piece + 1, piece))  # of which each thread takes the next

    def read_on(_: int) -> int:
        buffer, total = np.empty(piece // 8, np.int64), np.int64(0)
        with np.errstate(over="ignore"):
            for start in starts:
                for handle in () if maps else handles:
                    os.preadv(handle, [buffer.data], start)
                    total += buffer.sum()
                for mapped in maps:
                    total += np.frombuffer(mapped, np.int64, piece // 8, start).sum()
                    if way == "released":
                        mapped.madvise(mmap.MADV_DONTNEED, start, piece)
        return int(total)

    with ThreadPoolExecutor(_THREADS) as executor:
        summed = sum(executor.map(read_on, range(_THREADS)))
    for mapped in maps:
        mapped.close()
    for handle in handles:
        os.close(handle)
    return summed % (1 << 64)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.mapped", description=__doc__)
    parser.add_argument("run", type=Path, help="a synthetic run")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--one", nargs=2, metavar=("WAY", "BYTES"), help="read once this way, and print the seconds")
    arguments = parser.parse_args()
    if arguments.one:
        way, piece = arguments.one
        begun, computed = time.perf_counter(), time.process_time()
        sum_pieces(weight_files(arguments.run), way, int(piece))
        print(json.dumps([time.perf_counter() - begun, time.process_time() - computed]))
        return
    found: dict[tuple[int, str], list[tuple[float, float, float]]] = {}
    for _ in range(arguments.repeats):  # in turn
        for piece in _PIECES:
            for way in WAYS:
                command = ["-m", "benchmarks.mapped", str(arguments.run), "--one", way, str(piece)]
                done = measure.run(command)
                seconds, computed = json.loads(done.stdout)
                found.setdefault((piece, way), []).append((seconds, computed, done.peak_bytes / 1e6))
    rows: list[Row] = []
    for (piece, way), samples in found.items():
        wall, cpu, peaks = zip(*samples, strict=True)
        figures = with_spread(wall, 2), with_spread(cpu, 2), with_spread(peaks, 0)
        rows.append((f"{piece >> 10} KiB, {way}", *figures))
    print(render(("piece, way", "seconds", "CPU s", "peak MB"), rows))


if __name__ == "__main__":
    main()
