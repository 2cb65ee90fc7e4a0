"""Average a run in tasks of a Ray cluster, whose nodes share the storage of run and result.

    python ray_parts.py /shared/run /shared/pema --parts 8

A task that is lost with its node is done again elsewhere, and continues. Fewer tasks than parts may run at a time.
"""

from __future__ import annotations

import argparse
import subprocess
import sys

import ray

UNFINISHED = 3


def main() -> None:
    """Do all parts, in as many rounds as the scheme has passes, and join them."""
    parser = argparse.ArgumentParser()
    parser.add_argument("source")
    parser.add_argument("result")
    parser.add_argument("--parts", type=int, default=4)
    parser.add_argument("--cpus", type=float, default=16, help="of each task")
    asked = parser.parse_args()
    ray.init()

    @ray.remote(num_cpus=asked.cpus, max_retries=3)
    def part(number: int) -> int:
        words = "pema", asked.source, "--out", asked.result, "--part", f"{number}/{asked.parts}", "--quiet"
        return subprocess.run([sys.executable, "-m", "ckavg", *words], check=False).returncode

    for _ in range(2):
        statuses = ray.get([part.remote(number) for number in range(asked.parts)])
        if UNFINISHED not in statuses:
            break
    join = [sys.executable, "-m", "ckavg", "join", asked.result]
    sys.exit(max(statuses) or subprocess.run(join, check=False).returncode)


if __name__ == "__main__":
    main()
