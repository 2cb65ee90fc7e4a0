"""The scripts in `examples/`, run for real as far as there is what they are for."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
import torch
import yaml

from tests.cli.runner import run_cli
from tests.runs import random_run, write_run

EXAMPLES = Path(__file__).parents[2] / "examples"
SECONDS = 600
SRUN = """#!{python}
import os, subprocess, sys
tasks = {tasks}
words = [word for word in sys.argv[1:]]
while words[0].startswith("-"):
    words.pop(0)
told = dict(SLURM_NTASKS=str(tasks), SLURM_JOB_ID="7", SLURM_STEP_ID="0", SLURM_STEP_TASKS_PER_NODE=str(tasks))
started = [
    subprocess.Popen(words, env=os.environ | told | dict(SLURM_PROCID=str(task), SLURM_LOCALID=str(task)))
    for task in range(tasks)
]
sys.exit(max(each.wait() for each in started))
"""
"""What srun does, on one machine."""


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return write_run(tmp_path / "run", random_run(seed=1, count=4, dtype=torch.bfloat16), (0, 10, 20, 30))


@pytest.fixture
def expected(run: Path, tmp_path: Path) -> bytes:
    assert run_cli("pema", run, "--out", tmp_path / "alone").exit_code == 0
    shutil.rmtree(run / "averaged", ignore_errors=True)
    return weights(tmp_path / "alone")


def weights(directory: Path) -> bytes:
    return (directory / "model.safetensors").read_bytes()


def environment(**more: object) -> dict[str, str]:
    """In which `ckavg` and `torchrun` are those of these tests."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    return os.environ | {"PATH": path, "OMP_NUM_THREADS": "1"} | {name: str(value) for name, value in more.items()}


def test_shell(run: Path, expected: bytes, tmp_path: Path) -> None:
    words = ["sh", str(EXAMPLES / "parts.sh"), str(run), str(tmp_path / "out"), "3", "--accumulate", "float32"]
    subprocess.run(words, check=True, env=environment(), timeout=SECONDS)
    assert weights(tmp_path / "out") == expected


def test_kubernetes(run: Path, expected: bytes, tmp_path: Path) -> None:
    """The command of every pod, and that pods have what it takes."""
    job = yaml.safe_load((EXAMPLES / "kubernetes.yaml").read_text())
    spec = job["spec"]
    assert (job["kind"], job["apiVersion"], spec["completionMode"]) == ("Job", "batch/v1", "Indexed")
    assert spec["completions"] == spec["parallelism"]  # with --wait, all are there at a time
    (container,) = spec["template"]["spec"]["containers"]
    told = {each["name"]: each["value"] for each in container["env"]}
    assert told.keys() == {*re.findall(r"\$(\w+)", container["args"][0])} - {"JOB_COMPLETION_INDEX", "status"}
    assert told["PARTS"] == str(spec["completions"])
    place = container["volumeMounts"][0]["mountPath"]
    assert all(told[name].startswith(f"{place}/") for name in ("RUN", "OUT"))
    pods = [
        subprocess.Popen(
            [*container["command"], *container["args"]],
            env=environment(JOB_COMPLETION_INDEX=index, PARTS=2, RUN=run, OUT=tmp_path / "out"),
        )
        for index in range(2)
    ]
    assert [each.wait(SECONDS) for each in pods] == [0, 0]
    assert weights(tmp_path / "out") == expected


def test_slurm_tells_who_is_who(run: Path, expected: bytes, tmp_path: Path) -> None:
    srun = tmp_path / "bin" / "srun"
    srun.parent.mkdir()
    srun.write_text(SRUN.format(python=sys.executable, tasks=3))
    srun.chmod(0o755)
    told = environment(RUN=run, OUT=tmp_path / "out")
    told["PATH"] = f"{srun.parent}{os.pathsep}{told['PATH']}"
    done = subprocess.run(
        ["bash", str(EXAMPLES / "slurm.sbatch")], env=told, timeout=SECONDS, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("result") == 1
    assert weights(tmp_path / "out") == expected


@pytest.mark.parametrize("script", sorted(EXAMPLES.glob("*.s*")), ids=lambda path: path.name)
def test_scripts_parse(script: Path) -> None:
    subprocess.run(["bash", "-n", str(script)], check=True)


@pytest.mark.exhaustive
@pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="ray is not installed")
def test_ray(run: Path, expected: bytes, tmp_path: Path) -> None:
    words = [sys.executable, str(EXAMPLES / "ray_parts.py"), str(run), str(tmp_path / "out"), "--parts", "3"]
    subprocess.run([*words, "--cpus", "0.5"], check=True, env=environment(RAY_USAGE_STATS_ENABLED=0), timeout=SECONDS)
    assert weights(tmp_path / "out") == expected


# --- Slurm's own daemons, where they are installed ---

CONFIGURATION = """
ClusterName=tests
SlurmctldHost={host}
AuthType=auth/munge
AuthInfo=socket={root}/munge.socket
CryptoType=crypto/munge
SlurmUser=root
SlurmdUser=root
StateSaveLocation={root}/state
SlurmdSpoolDir={root}/spool
SlurmctldPidFile={root}/slurmctld.pid
SlurmdPidFile={root}/slurmd.pid
SlurmctldLogFile={root}/slurmctld.log
SlurmdLogFile={root}/slurmd.log
SlurmctldPort=16817
SlurmdPort=16818
ProctrackType=proctrack/pgid
TaskPlugin=task/none
SelectType=select/cons_tres
MpiDefault=none
ReturnToService=2
SlurmdParameters=config_overrides
NodeName={host} NodeAddr=127.0.0.1 CPUs=8 State=UNKNOWN
PartitionName=tests Nodes={host} Default=YES MaxTime=INFINITE State=UP
"""


@pytest.fixture
def slurm(tmp_path: Path) -> Iterator[dict[str, str]]:
    """The environment in which `sbatch` and `srun` use daemons of these tests."""
    daemons = [shutil.which(name, path="/usr/sbin:/usr/bin") for name in ("munged", "slurmctld", "slurmd")]
    if None in daemons or os.geteuid():
        pytest.skip("Slurm's daemons are not installed, or this is not root")
    host = socket.gethostname().partition(".")[0]
    root = tmp_path / "slurm"
    for name in ("state", "spool"):
        (root / name).mkdir(parents=True)
    file = root / "slurm.conf"
    file.write_text(CONFIGURATION.format(host=host, root=root))
    key = root / "munge.key"
    key.write_bytes(os.urandom(1024))
    key.chmod(0o600)
    munged, *others = map(str, daemons)
    places = ["--key-file", key, "--socket", root / "munge.socket", "--pid-file", root / "munge.pid"]
    places += ["--log-file", root / "munge.log", "--seed-file", root / "munge.seed"]
    told = environment(SLURM_CONF=file)
    with ExitStack() as undo:
        for words in ([munged, "--foreground", "--force", *map(str, places)], *([each, "-D"] for each in others)):
            process = subprocess.Popen(words, env=told, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
            undo.callback(process.wait, 60)
            undo.callback(process.terminate)
        for _ in range(60):
            seen = subprocess.run(["sinfo", "-h", "-o", "%T"], env=told, capture_output=True, text=True).stdout
            if seen.strip() == "idle":
                break
            assert process.poll() is None, (root / "slurmd.log").read_text()
            subprocess.run(["sleep", "1"], check=True)
        else:
            pytest.skip(f"Slurm does not start here: {seen}")
        yield told


@pytest.mark.exhaustive
@pytest.mark.parametrize("script", ["slurm.sbatch", "slurm-torchrun.sbatch"])
def test_slurm(slurm: dict[str, str], run: Path, expected: bytes, tmp_path: Path, script: str) -> None:
    log = tmp_path / "log"
    tasks = ["--ntasks-per-node", "3" if script == "slurm.sbatch" else "1"]
    words = ["sbatch", "--wait", "--nodes", "1", *tasks, "--cpus-per-task", "1", "--output", str(log)]
    words += [f"--export=ALL,RUN={run},OUT={tmp_path / 'out'},PROCESSES=2", str(EXAMPLES / script)]
    done = subprocess.run(words, env=slurm, timeout=SECONDS, capture_output=True, text=True)
    assert done.returncode == 0, (done.stderr, log.read_text() if log.exists() else "")
    assert weights(tmp_path / "out") == expected
