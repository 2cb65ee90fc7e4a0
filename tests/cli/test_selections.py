"""`sweep` over selections of checkpoints: each result is that of its own command, and all come from one reading."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.cli.runner import placeless, run_cli, snapshot
from tests.runs import random_run, write_run

STEPS = (10, 20, 30, 40, 50, 60, 80, 90)

SINGLE = {
    "pema-gamma0.1-every20": "pema --gamma 0.1 --every 20",
    "pema-gamma0.1-every30": "pema --gamma 0.1 --every 30",
    "pema-gamma0.3-every20": "pema --gamma 0.3 --every 20",
    "pema-gamma0.3-every30": "pema --gamma 0.3 --every 30",
    "pema-gamma0.15-scopetensor-last4": "pema --scope tensor --last 4",
    "bema-eta0.2-burn-in30-every20": "bema --burn-in 30 --every 20",
    "dema-kappa0.5-to-step50": "dema --to-step 50",
    "ema-gamma0.15-from-step40-last3": "ema --from-step 40 --last 3",
    "mean-last2": "mean --last 2",
    "ouema-eta0.2": "ouema",
}
"""By the name of the result: the command of its own."""

WORDS = (
    "pema:gamma=0.1,0.3,every=20,30", "pema:scope=tensor,last=4", "bema:burn-in=30,every=20", "dema:to-step=50",
    "ema:from-step=40,last=3", "mean:last=2", "ouema",
)  # fmt: skip


def make_run(root: Path, dtype: torch.dtype) -> tuple[Path, Path]:
    """A base model and the run that was trained from it."""
    first, *rest = random_run(7, len(STEPS) + 1, dtype)
    base = {name: tensor.float() if tensor.is_floating_point() else tensor for name, tensor in first.items()}
    return write_run(root / "base", [base], (0,)) / "checkpoint-0", write_run(root / "run", rest, STEPS, shards=(2, 1))


def contents(result: Path) -> dict[str, Any]:
    """Every file of a result, its record without what hangs on the place and on the reading."""
    files: dict[str, Any] = {name: data for name, (_, _, data) in snapshot(result).items()}
    for name in [name for name in files if name.endswith("ckavg.json")]:
        record = placeless(json.loads(files[name]))
        files[name] = {key: value for key, value in record.items() if key not in ("seconds", "bytes_read")}
    return {name: data for name, data in files.items() if not Path(name).name.startswith(".")}


def forget(run: Path) -> None:
    """Have the path measured anew."""
    (run / "averaged" / "path.json").unlink(missing_ok=True)


def compare(run: Path, out: Path, *options: str | Path) -> None:
    """A sweep with these options, and each of its results with that of the command of its own."""
    swept = run_cli("sweep", run, *WORDS, "--out", out / "swept", *options, "--json")
    assert swept.exit_code == 0, swept.stderr
    records = json.loads(swept.stdout)["averages"]
    with_init = "--init" in options
    for name, record in zip(SINGLE, records, strict=True):
        (out / "alone").mkdir(exist_ok=True)
        forget(run)
        result = Path(record["outputs"][-1]["directory"])
        assert result.name.replace("-init", "") == name
        assert ("-init" in result.name) == with_init
        verb, *own = SINGLE[name].split()
        alone = run_cli(verb, run, *own, *options, "--out", out / "alone" / result.name, "-q")
        assert alone.exit_code == 0, alone.stderr
        assert contents(result) == contents(out / "alone" / result.name), name


@pytest.mark.usefixtures("without_pictures")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("with_init", [False, True], ids=["", "init"])
def test_results_are_those_of_their_own_commands(tmp_path: Path, dtype: torch.dtype, with_init: bool) -> None:
    base, run = make_run(tmp_path, dtype)
    compare(run, tmp_path, *(("--init", base) if with_init else ()))
