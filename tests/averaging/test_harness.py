"""lm-evaluation-harness itself as the command of `--eval`, where it is installed: a tiny Llama on sums, offline.

`python -m tests.averaging.test_harness` writes what it prints and writes of one model to `tests/averaging/lm_eval`, for
the fast tests.
"""

from __future__ import annotations

import csv
import json
import os
import shlex
import subprocess
import sys
import tempfile
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from tests.averaging.tiny import save_tiny_model
from tests.cli.runner import run_cli

SUMS = [
    {"question": f"{a} plus {b}", "choices": [str(a + b), f"{a + b + 1}" + "." * (a % 2)]}
    for a in range(4)
    for b in range(3)
]
TASKS: dict[str, dict[str, Any]] = {
    "sums": {
        "output_type": "multiple_choice",
        "doc_to_text": "{{question}} =",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": 0,
        "metric_list": [
            {"metric": name, "aggregation": "mean", "higher_is_better": True} for name in ("acc", "acc_norm")
        ],
    },
    "prose": {
        "output_type": "loglikelihood_rolling",
        "doc_to_text": "",
        "doc_to_target": "{{question}}",
        "metric_list": [{"metric": "byte_perplexity"}, {"metric": "bits_per_byte"}],
    },
}


def write_tasks(directory: Path) -> str:
    """The tasks over a local file, and the command that evaluates `{dir}` on them."""
    directory.mkdir()
    data = directory / "sums.json"
    data.write_text("\n".join(map(json.dumps, SUMS)))
    for name, task in TASKS.items():
        common = {"task": name, "dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(data)}}}
        (directory / f"{name}.yaml").write_text(json.dumps(common | {"test_split": "test"} | task))
    return (
        f"HF_HUB_OFFLINE=1 HF_DATASETS_CACHE={directory}/cache {sys.executable} -m lm_eval --model hf --device cpu "
        f"--model_args pretrained={{dir}},dtype=float32 --tasks {','.join(TASKS)} --include_path {directory}"
    )


@pytest.mark.exhaustive
@pytest.mark.skipif(find_spec("lm_eval") is None, reason="lm_eval is not installed")
def test_the_harness_itself(tmp_path: Path) -> None:
    run = tmp_path / "run"
    for step in (100, 200, 300):
        save_tiny_model(run / f"checkpoint-{step}", seed=step)
    command = f"{write_tasks(tmp_path / 'tasks')} --output_path {{out}}; cp -r {{out}} {tmp_path}/$(basename {{dir}})"
    more = ("--eval", command, "--eval-metric", "sums.acc", "--eval-run", "--csv", tmp_path / "curves.csv")
    done = run_cli("sweep", run, "mean", "last", *more, "--json")
    assert done.exit_code == 0, done.stderr
    told = json.loads(done.stdout)
    exact = {}
    for name in ("mean", "last", "checkpoint-100", "checkpoint-200", "checkpoint-300"):
        (file,) = (tmp_path / name).rglob("results_*.json")
        results = json.loads(file.read_text())["results"]["sums"]
        exact[name] = (results["acc,none"], results["acc_stderr,none"])
    assert [(each["evaluation"]["value"], each["evaluation"]["stderr"]) for each in told["averages"]] == [
        exact["mean"], exact["last"],
    ]  # fmt: skip
    assert exact["last"] == exact["checkpoint-300"]
    assert told["averages"][0]["evaluation"]["goal"] == "max"
    rows = list(csv.DictReader((tmp_path / "curves.csv").read_text().splitlines()))
    assert [(row["step"], float(row["value"])) for row in rows if row["series"] == "run"] == [
        (str(step), exact[f"checkpoint-{step}"][0]) for step in (100, 200, 300)
    ]
    table = write_tasks(tmp_path / "again")  # prints its table alone
    done = run_cli("sweep", run, "mean", "--eval", table, "--eval-metric", "acc,none", "--json", "--force")
    printed = json.loads(done.stdout)["averages"][0]["evaluation"]
    assert (printed["value"], printed["stderr"]) == tuple(round(each, 4) for each in exact["mean"])


def main() -> None:
    """Write the fixtures of the fast tests, without what the harness says of the machine."""
    with tempfile.TemporaryDirectory() as place:
        model = save_tiny_model(Path(place) / "model")
        command = write_tasks(Path(place) / "tasks").replace("{dir}", shlex.quote(str(model)))
        done = subprocess.run(f"{command} --output_path {place}/out", shell=True, check=True, stdout=subprocess.PIPE)
        (file,) = (Path(place) / "out").rglob("results_*.json")
        results = json.loads(file.read_text().replace(place, "/work"))
        del results["pretty_env_info"]
        fixtures = Path(__file__).parent / "lm_eval"
        fixtures.mkdir(exist_ok=True)
        (fixtures / "results.json").write_text(json.dumps(results, indent=1) + "\n")
        (fixtures / "stdout.txt").write_bytes(done.stdout.replace(os.fsencode(place), b"/work"))


if __name__ == "__main__":
    main()
