"""Stage *engine*: the environment variables of launchers: torchrun, and Slurm's srun."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping


def slurm_environment(environment: Mapping[str, str]) -> dict[str, str]:
    """The variables of torchrun, from those of Slurm's srun; empty with a single task, or if torchrun has set them.

    >>> slurm_environment({"SLURM_PROCID": "3", "SLURM_NTASKS": "4", "SLURM_LOCALID": "1"})["RANK"]
    '3'
    """
    count = environment.get("SLURM_NTASKS", "1")
    if "RANK" in environment or "SLURM_PROCID" not in environment or not count.isdecimal() or int(count) < 2:
        return {}
    on_node = re.findall(r"\d+", environment.get("SLURM_STEP_TASKS_PER_NODE", "1"))
    return {
        "RANK": environment["SLURM_PROCID"],
        "WORLD_SIZE": count,
        "LOCAL_RANK": environment.get("SLURM_LOCALID", "0"),
        "LOCAL_WORLD_SIZE": on_node[0] if on_node else "1",
    }


def launch_name() -> str:
    """The launcher's name for the job, the same in all its processes; empty parts if it gives none."""
    names = "MASTER_PORT", "TORCHELASTIC_RUN_ID", "TORCHELASTIC_RESTART_COUNT", "SLURM_JOB_ID", "SLURM_STEP_ID"
    return " ".join(os.environ.get(name, "-") for name in names)
