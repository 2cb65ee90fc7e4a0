"""Run commands of ckavg one after another in each process that torchrun has started, so that torch is imported once.

    torchrun … jobs.py DIRECTORY

DIRECTORY/jobs.json is a list of jobs: `words` of the command line by rank, and Python code that is run first, by rank.
Each job is a process of its own that runs the program as a user would; what it prints is in DIRECTORY/JOB-RANK.out and
.err, its status in DIRECTORY/JOB-RANK.status.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import torch  # noqa: F401 - once, and not in each job

from ckavg.cli import main


def run(directory: Path) -> None:
    rank = os.environ["RANK"]
    for number, job in enumerate(json.loads((directory / "jobs.json").read_text())):
        child = os.fork()
        if not child:
            for stream, suffix in ((1, "out"), (2, "err")):
                os.dup2(os.open(directory / f"{number}-{rank}.{suffix}", os.O_CREAT | os.O_WRONLY), stream)
            sys.argv = ["ckavg", *job["words"][int(rank)]]
            exec(job["before"][int(rank)], {})
            main()
        _, status = os.waitpid(child, 0)
        (directory / f"{number}-{rank}.status").write_text(str(os.waitstatus_to_exitcode(status)))


if __name__ == "__main__":
    run(Path(sys.argv[1]))
