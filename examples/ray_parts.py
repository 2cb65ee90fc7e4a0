"""Average a run in tasks of a Ray cluster, whose nodes share the storage of run and result.

    python ray_parts.py /shared/run /shared/pema --parts 8

If a node is lost, its task restarts on another node and continues. Not all tasks need to run at the same time.
"""

from __future__ import annotations

import argparse
import subprocess
import sys

import ray

UNFINISHED = 3


def do_part(words: list[str]) -> int:
    """Run one part in a separate process, and return its exit status."""
    return subprocess.run([sys.executable, "-m", "ckavg", *words], check=False).returncode


def main() -> None:
    """Run all parts, once for each pass of the scheme, and join them."""
    parser = argparse.ArgumentParser()
    parser.add_argument("source")
    parser.add_argument("result")
    parser.add_argument("--parts", type=int, default=4)
    parser.add_argument("--cpus", type=float, default=16, help="of each task")
    asked = parser.parse_args()
    ray.init()
    task = ray.remote(num_cpus=asked.cpus, max_retries=3)(do_part)
    words = ["pema", asked.source, "--out", asked.result, "--quiet"]
    for _ in range(2):
        statuses = ray.get([task.remote([*words, "--part", f"{part}/{asked.parts}"]) for part in range(asked.parts)])
        if UNFINISHED not in statuses:
            break
    sys.exit(max(statuses) or do_part(["join", asked.result]))


if __name__ == "__main__":
    main()
