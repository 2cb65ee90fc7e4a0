"""The public names, and what importing them costs."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import torch

import ckavg
from tests.runs import random_run, write_run
from tests.test_house import imports_of

PACKAGE = Path(ckavg.__file__).parent


def test_public_names() -> None:
    assert ckavg.__all__ == [
        "BEMA",
        "DEMA",
        "EMA",
        "OUEMA",
        "PEMA",
        "Averaged",
        "Best",
        "CkavgError",
        "Coefficients",
        "Inspected",
        "Last",
        "Mean",
        "MomentumEMA",
        "PathLength",
        "PowerEMA",
        "PowerExponentEMA",
        "Progress",
        "Pushed",
        "Run",
        "Scheme",
        "Sweep",
        "Timeline",
        "Verified",
        "Weights",
        "__version__",
        "all_ranks",
        "average",
        "average_tensors",
        "best",
        "effective_weights",
        "inspect",
        "open_run",
        "path_length",
        "plan_average",
        "push",
        "sweep",
        "verify_result",
    ]
    assert all(getattr(ckavg, name) is not None for name in ckavg.__all__)


def test_few_modules_know_the_client_of_the_hub() -> None:
    users = {
        str(path.relative_to(PACKAGE))
        for path in PACKAGE.rglob("*.py")
        if any("huggingface_hub" in name for name in imports_of(path))
    }
    assert users <= {"hub.py", "output/card.py", "output/origin.py", "storage/hub.py", "storage/hub_errors.py"}


def test_importing_is_light() -> None:
    heavy = "torch", "numpy", "rich", "huggingface_hub", "safetensors", "matplotlib"
    code = f"import sys; from ckavg import *; print([name for name in {heavy!r} if name in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"


def imported(*words: str | Path) -> list[str]:
    """The packages that a command imports, in order."""
    command = [sys.executable, "-X", "importtime", "-m", "ckavg", *map(str, words)]
    told = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    return [*dict.fromkeys(re.findall(r"^import time:.*\| +(\w+)", told, re.MULTILINE))]


def test_averaging_imports_what_it_needs_when_it_needs_it(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", random_run(1, 3, torch.float32), (10, 20, 30))
    names = imported("mean", run)
    assert not {*names} & {"matplotlib", "PIL", "pandas", "numba", "fsspec", "safetensors", "transformers"}
    assert names.index("torch") < names.index("huggingface_hub"), "which writes the card, after all else"
    assert not {*imported("mean", run)} & {"torch", "numpy", "huggingface_hub"}, "the result is up to date"
    assert "matplotlib" in imported("mean", run, "--force", "--plot", tmp_path / "plot.svg")


def test_inspecting_needs_no_torch(tmp_path: Path) -> None:
    (tmp_path / "checkpoint-1").mkdir()
    code = (
        "import sys, ckavg.cli.app as a\n"
        f"try: a.app(['inspect', {str(tmp_path)!r}])\n"
        "except SystemExit as e: print(e.code, 'torch' in sys.modules)"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ran.stdout.splitlines()[-1] == "1 False"
