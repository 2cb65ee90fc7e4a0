"""ckavg as a process of its own, in surroundings that a test makes."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, cast

ROOT = Path(__file__).parents[2]

_MAIN = "from ckavg.cli import main\nmain()\n"

PEAK = """
import os, resource, sys
def _leave(status, leave=os._exit):
    if sys.platform == "darwin":
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    else:
        with open("/proc/self/status") as file:
            lines = file.read().splitlines()
        peak = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))
    with open(os.environ["PEAK"], "w") as file:
        file.write(str(peak))
    leave(status)
os._exit = _leave
"""
"""Has the program write its largest resident size in bytes to the file that PEAK names. Not what rusage says of a
child: that counts what its parent held before it began.
"""


def ckavg(
    *arguments: str | bytes | Path,
    before: str = "",
    env: Mapping[str, str] | None = None,
    preexec: Callable[[], None] | None = None,
    timeout: float = 240,
    **more: Any,
) -> subprocess.CompletedProcess[bytes]:
    """Run ckavg to its end.

    Args:
        arguments: of the command line.
        before: Python that runs in the process before the program does.
        env: variables to set; an empty text removes one.
        preexec: runs between fork and exec.
        timeout: seconds after which it hangs.
        more: for `subprocess.run`.
    """
    surroundings = os.environ | {"PYTHONPATH": str(ROOT), "PYTHONWARNINGS": "error,ignore::DeprecationWarning"}
    surroundings = {name: value for name, value in (surroundings | dict(env or {})).items() if value}
    command = [sys.executable, "-c", before + _MAIN, *arguments]
    options = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "stdin": subprocess.DEVNULL} | more
    done: Any = subprocess.run(command, env=surroundings, preexec_fn=preexec, timeout=timeout, check=False, **options)
    return cast("subprocess.CompletedProcess[bytes]", done)


def check_message(done: subprocess.CompletedProcess[bytes], *parts: str, status: int = 1) -> None:
    """The process ended with this status and one message that has these parts."""
    said = (done.stderr or b"").decode(errors="surrogateescape")
    assert done.returncode == status, (done.returncode, said)
    assert said.count("error: ") == 1, said
    assert "Traceback" not in said
    assert all(line.isprintable() for line in said.split("\n")), said
    for part in parts:
        assert part in said, said
