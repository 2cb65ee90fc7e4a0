"""`python -m tests.gpu [DEVICE]`: the checks on this machine's GPU, `cuda`, without pytest."""

from __future__ import annotations

import sys
import tempfile
import time
import traceback
from pathlib import Path

import torch

from tests.gpu.checks import CHECKS


def main() -> int:
    device = sys.argv[1] if len(sys.argv) > 1 else "cuda"
    if device != "cpu" and not torch.cuda.is_available():
        _say(f"torch finds no GPU here: {len(CHECKS)} checks skipped")
        return 0
    failed = []
    for name, check in CHECKS.items():
        begun = time.perf_counter()
        with tempfile.TemporaryDirectory() as directory:
            try:
                check(Path(directory), device)
            except Exception:  # each check is told of, whatever went wrong in another
                _say(traceback.format_exc())
                failed.append(name)
        _say(f"{'FAILED' if name in failed else 'passed'}  {name}  ({time.perf_counter() - begun:.1f} s)")
    _say(f"{len(CHECKS) - len(failed)} of {len(CHECKS)} checks passed")
    for name in failed:
        _say(f"FAILED  {name}")
    return 1 if failed else 0


def _say(text: str) -> None:
    sys.stdout.write(f"{text}\n")
    sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(main())
