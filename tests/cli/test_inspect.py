"""What `ckavg inspect` shows, and what is said of runs whose tensors differ."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import torch

from tests.cli.runner import run_cli
from tests.runs import write_run
from tests.trainers import put

WEIGHTS = {"w": torch.zeros(100, 10, dtype=torch.bfloat16), "ids": torch.arange(3)}


def test_table_and_json(tmp_path: Path) -> None:
    run = write_run(tmp_path, [WEIGHTS] * 3, (0, 400, 1000), shards=(1, 2, 2))
    result = run_cli("inspect", run)
    assert result.exit_code == 0
    lines = [line.rstrip() for line in result.stdout.splitlines()]
    assert "3 checkpoints of 1.0k parameters" in " ".join(lines[:3])
    table = [line.split() for line in lines if "checkpoint-" in line and "bfloat16" in line]
    assert [row[0] for row in table] == ["0", "400", "1000"]
    assert table[1][1:3] == ["+400", "2"]
    assert table[2][1] == "+600"
    assert "(anchor)" in table[0]
    assert lines[-2:] == ["Nothing stands in the way.", f"next     ckavg pema {run}"]
    record = json.loads(run_cli("inspect", run, "--json").stdout)
    assert record["problems"] == []
    files = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    assert record["checkpoints"][1] == {
        "step": 400,
        "directory": str(run / "checkpoint-400"),
        "files": files,
        "bytes": sum((run / "checkpoint-400" / file).stat().st_size for file in files),
        "dtype": "bfloat16",
        "eval_loss": None,
    }
    assert record["log"] == {"metric": None, "steps": [], "values": [], "trend": None}


def with_log(run: Path, step: int, log: list[dict[str, float]]) -> None:
    (run / f"checkpoint-{step}/trainer_state.json").write_text(json.dumps({"global_step": step, "log_history": log}))


def test_loss_of_the_trainers_log(tmp_path: Path) -> None:
    run = write_run(tmp_path, [WEIGHTS] * 4, (100, 200, 300, 400))
    values = [4.0, 3.5, 3.0, 2.5, 2.0, 1.5, 1.0, 0.5]
    log = [{"step": 50 * place, "eval_loss": value} for place, value in enumerate(values, start=1)]
    with_log(run, 400, [each for each in log if each["step"] not in (250, 300)] + [{"step": 400, "loss": 9.0}])
    result = run_cli("inspect", run)
    rows = [line.split() for line in result.stdout.splitlines() if "checkpoint-" in line and "bfloat16" in line]
    assert [row[2] for row in rows[1:]] == ["2.5", "1", "0.5"]  # 1 shard, and nothing was logged since step 200
    assert "eval_loss  █▇▆▅▂▁  4 to 0.5, no clear trend" in result.stdout
    with_log(run, 400, log)
    assert "eval_loss  █▇▆▅▄▃▂▁  4 to 0.5, still falling" in run_cli("inspect", run).stdout
    told = json.loads(run_cli("inspect", run, "--json").stdout)
    assert told["log"] == {
        "metric": "eval_loss",
        "steps": [*range(50, 401, 50)],
        "values": values,
        "trend": "falling",
    }
    assert [each["eval_loss"] for each in told["checkpoints"]] == [3.5, 2.5, 1.5, 0.5]
    base = put(tmp_path / "base.safetensors", WEIGHTS)
    told = json.loads(run_cli("inspect", run, "--init", base, "--json").stdout)
    assert [each["eval_loss"] for each in told["checkpoints"]] == [None, 3.5, 2.5, 1.5, 0.5]


def test_without_eval_loss_the_training_loss(tmp_path: Path) -> None:
    run = write_run(tmp_path, [WEIGHTS] * 2, (100, 200))
    with_log(run, 200, [{"step": step, "loss": 2 + (step * 7 % 5) / 10} for step in range(1, 201)])
    shown = next(line for line in run_cli("inspect", run).stdout.splitlines() if line.startswith("loss  "))
    assert shown.endswith("2.2 to 2, level")
    assert len(shown.split()[1]) == 50
    told = json.loads(run_cli("inspect", run, "--json").stdout)
    assert (told["log"]["metric"], told["log"]["trend"], told["checkpoints"][0]["eval_loss"]) == ("loss", "level", None)


def test_losses_of_any_size(tmp_path: Path) -> None:
    run = write_run(tmp_path, [WEIGHTS] * 2, (100, 200))
    with_log(run, 200, [{"step": step, "eval_loss": 1.7e308 * (-1) ** step} for step in range(9)])
    assert "eval_loss  █▁█▁█▁█▁█  1.7e+308 to 1.7e+308, level" in run_cli("inspect", run).stdout


def test_problems(tmp_path: Path) -> None:
    run = write_run(tmp_path, [WEIGHTS] * 3, (0, 400, 1000))
    path = run / "checkpoint-400" / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    result = run_cli("inspect", run)
    assert result.exit_code == 1
    assert "\n\nproblem: " in result.stdout
    assert "checkpoint-400/model.safetensors is" in result.stdout.replace("\n", "")
    assert "1 problem to solve before averaging." in result.stdout
    record = json.loads(run_cli("inspect", run, "--json").stdout)
    assert [checkpoint["step"] for checkpoint in record["checkpoints"]] == [0, 1000]
    assert len(record["problems"]) == 1
    quiet = run_cli("inspect", run, "-q")
    assert (quiet.exit_code, quiet.stdout, quiet.stderr) == (1, "", "")


def test_help_and_version() -> None:
    """In a process of its own, which imports nothing for it that reads checkpoints."""
    code = (
        "import sys; from ckavg.cli.app import app\n"
        "try: app({words!r})\n"
        "except SystemExit as e: print(e.code, sorted({{'torch', 'ckavg.averaging.plan'}} & {{*sys.modules}}))"
    )
    for words, loaded in ((["--help"], "[]"), (["pema", "--help"], "['ckavg.averaging.plan']"), (["--version"], "[]")):
        ran = subprocess.run(
            [sys.executable, "-c", code.format(words=words)], capture_output=True, text=True, check=True
        )
        assert ran.stdout.splitlines()[-1] == f"0 {loaded}"
        assert len(ran.stdout.splitlines()) > 1
        assert ran.stderr == ""


def test_warnings_are_counted_and_the_step_to_look_at_is_named(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", [WEIGHTS] * 3, (0, 50, 75))
    put(run / "checkpoint-75" / "model_1.safetensors", WEIGHTS)
    assert run_cli("inspect", run).stdout.splitlines()[-2:] == ["1 warning.", f"next     ckavg pema {run}"]
    (run / "checkpoint-50" / "trainer_state.json").write_text('{"global_step": 60}')
    last = run_cli("inspect", run).stdout.splitlines()[-2:]
    assert last == ["2 warnings: look at step 60 first.", f"next     ckavg pema {run}"]
    deep = run_cli("inspect", run, "--deep", "-q", "--json")
    assert deep.exit_code == 0
    said = run_cli("inspect", run, "--deep").stdout.splitlines()[-2]
    assert said == "4 warnings: look at step 60 first."  # two stale saves more


def adapters(root: Path, *steps: int) -> Path:
    for step in steps:
        put(root / f"checkpoint-{step}/adapter_model.safetensors", {"q.lora_A.weight": torch.ones(2, 4) * step})
    return root


def test_the_anchor_of_adapters_is_the_untrained_adapter(tmp_path: Path) -> None:
    run = adapters(tmp_path / "run", 10, 20)
    told = " ".join(run_cli("inspect", run).stdout.split())
    assert 'Save that before the next training, beside the others: model.save_pretrained("checkpoint-0")' in told
    assert "base model with --init" not in told
    base = tmp_path / "base/model.safetensors"
    put(base, {"q.weight": torch.ones(4, 4)})
    refused = run_cli("ema", run, "--init", base.parent)
    assert refused.exit_code == 1
    assert "The anchor of an adapter is the untrained adapter, not the base model" in refused.stderr
    alone = run_cli("ema", adapters(tmp_path / "alone", 10))
    assert "Name the adapter as it was before training with --init" in alone.stderr


def test_a_prefix_that_is_the_only_difference_is_said_once(tmp_path: Path) -> None:
    weights = {f"layers.{place}.weight": torch.ones(2) for place in range(30)}
    write_run(tmp_path, [weights, weights, {f"module.{name}": t for name, t in weights.items()}], (10, 20, 30))
    refused = run_cli("ema", tmp_path)
    told = "step 30: the names of all tensors begin with 'module.', and are otherwise those of step 20"
    assert told in refused.stderr
    assert "layers.3" not in refused.stderr
