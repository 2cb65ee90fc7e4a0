"""Which learning rates a trainer's log holds, and that nothing in it can do harm."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from safetensors.torch import save_file

import ckavg
from ckavg.checkpoints.checkpoint import read_checkpoint
from ckavg.checkpoints.run import Checkpoint
from ckavg.checkpoints.trainer_log import (
    LARGEST,
    TRAINER_STATE,
    Logs,
    goal_of,
    learning_rates,
    read_course,
    read_trainer_state,
    trend_of,
)
from tests.runs import write_checkpoint

REAL = """{
  "best_metric": null, "epoch": 0.512, "eval_steps": 20, "global_step": 40, "is_world_process_zero": true,
  "log_history": [
    {"epoch": 0.128, "grad_norm": 8.750067710876465, "learning_rate": 4.5e-05, "loss": 2.2761, "step": 10},
    {"epoch": 0.256, "grad_norm": NaN, "learning_rate": 5e-05, "loss": 2.0013, "step": 20},
    {"epoch": 0.256, "eval_loss": 1.9874, "eval_runtime": 1.5, "eval_samples_per_second": 12.0, "step": 20},
    {"epoch": 0.512, "grad_norm": 3.1, "learning_rate": 0.0, "loss": 1.9, "step": 40}
  ],
  "logging_steps": 10, "max_steps": 40, "num_train_epochs": 1, "save_steps": 20,
  "stateful_callbacks": {"TrainerControl": {"args": {"should_epoch_stop": false}, "attributes": {}}},
  "total_flos": 1.0e+15, "train_batch_size": 8, "trial_name": null, "trial_params": null
}
"""
"""What the Trainer of transformers writes."""


@pytest.fixture
def checkpoint(tmp_path: Path) -> Checkpoint:
    return read_checkpoint(write_checkpoint(tmp_path / "checkpoint-40", {"w": torch.arange(6.0)}, step=40), 40)


def write(checkpoint: Checkpoint, content: str | bytes) -> None:
    Path(checkpoint.path, TRAINER_STATE).write_bytes(content if isinstance(content, bytes) else content.encode())


def with_history(checkpoint: Checkpoint, history: Any) -> tuple[tuple[int, float], ...]:
    write(checkpoint, json.dumps({"global_step": 40, "log_history": history}))
    return learning_rates(checkpoint)


def test_a_real_log(checkpoint: Checkpoint) -> None:
    write(checkpoint, REAL)
    assert learning_rates(checkpoint) == ((10, 4.5e-05), (20, 5e-05), (40, 0.0))
    assert read_trainer_state(checkpoint.path)["global_step"] == 40
    assert ckavg.open_run(checkpoint.path.parent, init=checkpoint.path / "model.safetensors").steps == (0, 40)


def test_order_and_repeats(checkpoint: Checkpoint) -> None:
    """A run that was resumed may log a step twice."""
    entries = [(30, 3e-5), (10, 1e-5), (20, 9e-5), (20, 2e-5)]
    found = with_history(checkpoint, [{"step": step, "learning_rate": rate} for step, rate in entries])
    assert found == ((10, 1e-5), (20, 2e-5), (30, 3e-5))


_losses = st.sampled_from([0.5, 0.25, 1, math.nan, "x", None])
_entries = st.lists(
    st.one_of(st.builds(lambda step, loss: {"loss": loss, "step": step}, st.integers(0, 3), _losses), st.just(7)),
    max_size=3,
)
_spoilt = st.sampled_from(
    [
        ("", ""),
        ('"global_step"', '"\\u0067lobal_step"'),
        ('"global_step"', '"a\\\\\\"log_history"'),
        ('"global_step"', '"log_history"'),
        ('"log_history"', '"log\\u005fhistory"'),
        ("}\n  ]", "},\n  ]"),
        ("}\n  ]", "} 3\n  ]"),
        ("}\n  ]", "}, 3\t\n  ]"),
        ("}\n  ]", "},, 3\n  ]"),
        ("}\n  ]", "}\n  "),
        ('"log_history": [', '"x": {"log_history": [1]}, "log_history": ['),
        ('"log_history": [', '"log_history": 5, "y": ['),
        ('"log_history": [', '"log_history":['),
        ("{", "\ufeff{"),
        ("{", "["),
        ("é", "\udcff"),
    ]
)


@settings(max_examples=400, deadline=None)
@given(st.lists(st.tuples(_entries, st.booleans(), _spoilt), min_size=1, max_size=6))
def test_what_states_share_is_parsed_once(states: list[tuple[list[Any], bool, tuple[str, str]]]) -> None:
    """The same comes of it as of each state parsed by itself and compared with all logs before it."""
    logs, known, history = Logs(), list[dict[int, set[float]]](), list[Any]()
    for step, (entries, goes_on, (old, new)) in enumerate(states):
        history = [*history, *entries] if goes_on else entries
        state: dict[str, Any] = {"best": None, "global_step": step, "log_history": history, "name": "é", "y": {"z": []}}
        text = json.dumps(state, indent=2, sort_keys=True, ensure_ascii=False).replace(old, new, 1)
        data = text.encode("utf-8", "surrogateescape")
        try:
            expected = json.loads(data)
        except ValueError:
            with pytest.raises(ValueError, match=r"."):
                logs.parse(data)
            continue
        found = logs.parse(data)
        assert repr(found) == repr(expected)
        if isinstance(expected, dict):
            assert logs.number(found) == number_of(expected, known)


def number_of(state: dict[str, Any], known: list[dict[int, set[float]]]) -> int | None:
    """Which of the logs a state goes on with, looked for in all of both."""
    losses: dict[int, set[float]] = {}
    history = state.get("log_history")
    for entry in history if isinstance(history, list) else []:
        if isinstance(entry, dict) and type(entry["loss"]) is float and math.isfinite(entry["loss"]):
            losses.setdefault(entry["step"], set()).add(entry["loss"])
    seen = False
    for number, log in enumerate(known):
        shared = log.keys() & losses.keys()
        if shared and all(log[step] & losses[step] for step in shared):
            known[number] = losses if len(losses) > len(log) else log
            return number
        seen = seen or bool(shared)
    if not losses or (known and not seen):
        return None
    known.append(losses)
    return len(known) - 1


@pytest.mark.parametrize(
    "content",
    [
        "",
        "not JSON",
        '{"log_history": [{"step": 1, "learning_rate": 1e-5}',
        b"\xff\xfe\x00{",
        "[" * 200_000,
        '{"log_history": ' + "[" * 200_000 + "]" * 200_000 + "}",
        '{"log_history": [{"step": 1, "learning_rate": ' + "9" * 5000 + "}]}",
        "null",
        "[1, 2]",
        '"log_history"',
        "{}",
        '{"log_history": null}',
        '{"log_history": {"step": 1, "learning_rate": 1e-5}}',
        '{"log_history": "step learning_rate"}',
        '{"log_history": [null, 3, "a", [], [1, 1e-5], {}, {"step": 1}, {"learning_rate": 1e-5}]}',
    ],
)
def test_what_is_no_log_tells_nothing(checkpoint: Checkpoint, content: str | bytes) -> None:
    write(checkpoint, content)
    assert learning_rates(checkpoint) == ()


@pytest.mark.parametrize(
    "entry",
    [
        *({"step": 2, "learning_rate": each} for each in (None, True, "1e-5", [1], -1e-5, math.nan, math.inf, 10**400)),
        *({"step": each, "learning_rate": 1} for each in (None, True, "2", 2.0, -2, math.nan, ())),
    ],
    ids=str,
)
def test_entries_that_tell_nothing(checkpoint: Checkpoint, entry: dict[str, Any]) -> None:
    assert with_history(checkpoint, [{"step": 1, "learning_rate": 1}, entry]) == ((1, 1.0),)


def test_a_huge_file_is_not_read(checkpoint: Checkpoint) -> None:
    content = b'{"log_history": [{"step": 1, "learning_rate": 1e-05}]}'
    write(checkpoint, content)
    os.truncate(checkpoint.path / TRAINER_STATE, LARGEST + 1)
    assert learning_rates(checkpoint) == ()

    write(checkpoint, content + b" " * (LARGEST - len(content)))
    assert learning_rates(checkpoint) == ((1, 1e-5),)
    write(checkpoint, content + b" " * (LARGEST + 1 - len(content)))
    assert learning_rates(checkpoint) == ()


def test_what_is_no_file_is_not_opened(checkpoint: Checkpoint) -> None:
    Path(checkpoint.path, TRAINER_STATE).unlink()
    assert learning_rates(checkpoint) == ()
    os.mkfifo(checkpoint.path / TRAINER_STATE)
    assert learning_rates(checkpoint) == ()
    Path(checkpoint.path, TRAINER_STATE).unlink()
    Path(checkpoint.path, TRAINER_STATE).mkdir()
    assert learning_rates(checkpoint) == ()


def test_a_log_beside_single_files_is_not_theirs(tmp_path: Path) -> None:
    save_file({"w": torch.ones(2)}, tmp_path / "step_5.safetensors")
    (tmp_path / TRAINER_STATE).write_text(REAL)
    assert learning_rates(read_checkpoint(tmp_path / "step_5.safetensors", 5)) == ()


@pytest.mark.parametrize(
    ("names", "goal"),
    [
        (
            "loss eval_loss eval-loss evalLoss val/loss perplexity word_perplexity,none ppl nll error wer token.nll",
            "min",
        ),
        ("results.acc.loss mse bits_per_byte,none eval.error_rate LOSS", "min"),
        (
            "acc accuracy f1 macro_f1 exact_match exact_match,strict-match bleu rouge1 rougeL reward score acc,none",
            "max",
        ),
        ("results.hellaswag.acc_norm,none results.loss_task.acc,none eval_F1 exactMatch em top1.acc", "max"),
        ("class glossary lossless accent terror scoreboard x value pass@1 acc_stderr,none neg_loss f1_loss", None),
    ],
)
def test_goal_from_the_words_of_a_name(names: str, goal: str | None) -> None:
    for name in names.split():
        assert goal_of(name) == goal, name


NOISE = [0.3, -0.8, 0.5, -0.1, 0.9, -0.6, 0.2, -0.4, 0.7, -0.9, 0.1, 0.4, -0.3, 0.8, -0.7, -0.2, 0.6, -0.5, 0.0, 0.0]


def a_loss(*levels: float, noise: float = 0.01) -> list[tuple[int, float]]:
    """20 values, 50 steps apart, along a line from level to level."""
    at = [place * (len(levels) - 1) / 19 for place in range(20)]
    line = [levels[int(x)] + (x % 1) * (levels[min(int(x) + 1, len(levels) - 1)] - levels[int(x)]) for x in at]
    return [(50 * place, value + noise * NOISE[place]) for place, value in enumerate(line)]


@pytest.mark.parametrize(
    ("values", "trend"),
    [
        (a_loss(2, 1), "falling"),
        (a_loss(2, 1, 1), "level"),
        (a_loss(1, 1, 0.9), "falling"),
        (a_loss(1, 1), "level"),
        (a_loss(1, 1, noise=0.0), "level"),
        (a_loss(2, 1, 1.1), "rising"),
        (a_loss(1, 1, 0.99), None),
        ([*a_loss(1, 1)[:-1], (950, 0.2)], "level"),
        (a_loss(2, 1)[:7], None),
        (a_loss(2, 1)[:8], "falling"),
        ([], None),
        ([(step, 1 + 0.3 * NOISE[step % 20] - 0.001 * step) for step in range(1000)], "falling"),
        ([(step, 1 + 0.3 * NOISE[step % 20]) for step in range(1000)], "level"),
    ],
)
def test_whether_a_loss_was_still_falling(values: list[tuple[int, float]], trend: str | None) -> None:
    assert trend_of(values) == trend
    assert trend_of([(step, 1e307 * value) for step, value in values]) == trend
    assert trend_of([(10**17 + step, value) for step, value in values]) == trend


def test_the_course_of_a_training(checkpoint: Checkpoint) -> None:
    history: list[dict[str, Any]] = [{"step": 1, "loss": 3.0, "learning_rate": 1e-5}, {"step": 10**400, "loss": 1.0}]
    write(checkpoint, json.dumps({"log_history": history}).encode())
    course = read_course(checkpoint.path)
    assert (course.metric, course.values, course.trend, course.rates) == ("loss", ((1, 3.0),), None, ((1, 1e-5),))
    write(checkpoint, json.dumps({"log_history": [*history, {"step": 2, "eval_loss": 2}]}).encode())
    assert read_course(checkpoint.path).values == ((2, 2.0),)
    write(checkpoint, b"[]")
    assert read_course(checkpoint.path).metric == ""
