"""Real processes under a real torchrun, for the tests of what several of them do together."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

JOBS = Path(__file__).with_name("jobs.py")
SECONDS = 300
MAIN = "\nfrom ckavg.cli import main\nmain()\n"


@dataclass
class Job:
    """One command of ckavg, the same in every process or one for each, and code to be run before it, by rank."""

    words: Sequence[object]
    before: dict[int, str] = field(default_factory=dict)
    of_rank: dict[int, Sequence[object]] = field(default_factory=dict)


@dataclass
class Ran:
    """The outcome of a job: stdout, stderr and exit status, by rank."""

    out: list[str]
    err: list[str]
    status: list[int]

    @property
    def first_out(self) -> str:
        """What the first process printed, and the only output of all of them."""
        assert self.status == [0] * len(self.status), self.err
        assert set(self.out[1:]) == set(self.err[1:]) == {""}
        return self.out[0]


def torchrun(processes: int, *arguments: object) -> list[str]:
    """A command that starts so many processes on this machine."""
    port = free_port()
    return [*_torchrun(), "--nproc-per-node", str(processes), "--master-port", str(port), *map(str, arguments)]


def torchrun_on(node: int, nodes: int, address: str, *arguments: object) -> list[str]:
    """A command that starts one process on one of several machines, the first of which has this address."""
    where = "--nnodes", nodes, "--node-rank", node, "--nproc-per-node", 1
    return [*_torchrun(), *map(str, (*where, "--master-addr", address, "--master-port", 29500, *arguments))]


def run_jobs(directory: Path, processes: int, *jobs: Job) -> list[Ran]:
    """Run jobs one after another under one torchrun."""
    ranks = range(processes)
    described = [
        {
            "words": [[str(word) for word in job.of_rank.get(rank, job.words)] for rank in ranks],
            "before": [job.before.get(rank, "") for rank in ranks],
        }
        for job in jobs
    ]
    (directory / "jobs.json").write_text(json.dumps(described))
    subprocess.run(torchrun(processes, JOBS, directory), check=True, timeout=SECONDS, env=environment())
    return [
        Ran(
            [(directory / f"{number}-{rank}.out").read_text() for rank in ranks],
            [(directory / f"{number}-{rank}.err").read_text() for rank in ranks],
            [int((directory / f"{number}-{rank}.status").read_text()) for rank in ranks],
        )
        for number in range(len(jobs))
    ]


def start(rank: int, world: int, *words: object, before: str = "", **more: str) -> subprocess.Popen[str]:
    """One process of a job that something else than torchrun starts, after some Python code."""
    told = {"RANK": rank, "WORLD_SIZE": world, "LOCAL_RANK": rank} | more
    return subprocess.Popen(
        [sys.executable, "-c", before + MAIN, *map(str, words)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment() | {name: str(value) for name, value in told.items()},
    )


def environment() -> dict[str, str]:
    """Of this process, without what torchrun itself would tell."""
    return os.environ | {"OMP_NUM_THREADS": "1"}


def _torchrun() -> list[str]:
    return [sys.executable, "-m", "torch.distributed.run"]


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port: int = server.getsockname()[1]
        return port
