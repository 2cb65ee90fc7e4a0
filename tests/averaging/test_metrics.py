"""The value of a metric in what an evaluation printed or wrote: never a neighbour's."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from ckavg.averaging.metrics import Reading, read_metric

HARNESS = Path(__file__).parent / "lm_eval"
"""What lm-evaluation-harness 0.4.13 printed and wrote for `tests/averaging/test_harness.py`."""


def harness() -> tuple[str, Any]:
    return (HARNESS / "stdout.txt").read_text(), json.loads((HARNESS / "results.json").read_text())


@pytest.mark.parametrize(
    ("text", "metric", "value", "stderr"),
    [
        ('{"loss": 1.5}', "loss", 1.5, None),
        ('{"loss": 9}\n{"loss": 1.5}\ntook 12 s', "loss", 1.5, None),  # the last object
        ('log {"loss": 9} and\n{\n "eval": {"loss": 1.5,\n "n": 3}\n}\n7', "loss", 1.5, None),
        ('{"eval": {"loss": 1.5}, "train": {"loss": 9}}', "eval.loss", 1.5, None),
        ('{"loss": 1.5, "train": {"loss": 9}}', "loss", 1.5, None),  # the whole path
        ('{"runs": [{"loss": 1.5}]}', "runs.0.loss", 1.5, None),
        ('{"a.b": {"c": 1.5}}', "a.b.c", 1.5, None),
        ('{"acc": 0.5, "acc_stderr": 0.125}', "acc", 0.5, 0.125),
        ('{"t": {"acc,none": 0.5, "acc_stderr,none": 0.125}}', "acc,none", 0.5, 0.125),
        ('{"t": {"acc,none": 0.5, "acc_stderr,none": "N/A"}}', "t.acc", 0.5, None),
        ('{"loss": 0.5, "stderr": 0.125, "tokens": 7}', "loss", 0.5, 0.125),
        ('{"loss": 0.5, "acc": 0.75, "stderr": 0.125}', "loss", 0.5, None),  # whose is it?
        ('{"loss": 0.5, "loss_stderr": NaN}', "loss", 0.5, None),
        ('{"acc": true, "t": {"acc": 0.5}}', "acc", 0.5, None),
        ('{"n": 7}\nloss 1.5', "loss", 1.5, None),
        ("{}\nloss 1.5", "loss", 1.5, None),
        ("loss: 9\nloss: 1.5 in 12 s\ndone", "loss", 1.5, None),
        ("{'loss': 1.5, 'epoch': 3}", "loss", 1.5, None),
        ("val_loss 9 loss 1.5", "loss", 1.5, None),
        ("loss 1.5 val/loss 9 val-loss 8 val.loss 7", "loss", 1.5, None),
        ("step:5,loss:1.5", "loss", 1.5, None),
        ("pass@1 0.5 pass@10 0.75", "pass@1", 0.5, None),
        ("held-out loss (nats) = 1.5", "held-out loss", 1.5, None),
        ("acc 0.5 acc_stderr 0.125", "acc", 0.5, 0.125),
        ("acc | 0.5 |± 0.125", "acc", 0.5, None),
    ],
)
def test_the_value_of_a_name(text: str, metric: str, value: float, stderr: float | None) -> None:
    assert read_metric(text, metric) == Reading(value, stderr, data="7 tokens" if '"tokens": 7' in text else "")


@pytest.mark.parametrize(
    ("text", "metric", "problem"),
    [
        ('{"a": {"acc": 1}, "b": {"acc": 1}}', "acc", "'acc' is ambiguous: there are a.acc, b.acc"),
        ('{"loss": NaN}', "loss", "'loss' is nan"),
        ('{"loss": -Infinity}', "loss", "'loss' is -inf"),
        ('{"loss": 1' + "0" * 400 + "}", "loss", "'loss' is inf"),
        ('{"loss": null}', "loss", "'loss' is null, not a number"),
        ('{"loss": "0.5"}', "loss", "'loss' is \"0.5\", not a number"),
        ('{"loss": true}', "loss", "'loss' is true, not a number"),
        ("loss nan", "loss", "'loss' is nan"),
        ("loss 0.5\nthe loss is fine", "loss", "'loss' has no number after it on the last line that has it"),
        ("loss 0.5, best loss 0.25", "loss", "'loss' is ambiguous: several numbers follow it on the last line that"),
        ("acc@5 0.5", "acc", "it printed no 'acc'"),
        ("val_loss: 0.5", "loss", "it printed no 'loss'; there are val_loss"),
        ('{"metric": "acc", "value": 0.5}', "acc", "it printed no 'acc'; there are value"),
        ('{"eval_loss": 1, "n": 2, "a": 3}', "loss", "it printed no 'loss'; there are eval_loss, "),
        (
            '{"x": [1, 2, 3, 4, 5, 6, 7, 8]}',
            "loss",
            "it printed no 'loss'; there are x.0, x.1, x.2, x.3, x.4, x.5 and 2",
        ),
        ("done", "loss", "it printed no 'loss', and no key or number"),
        ("", "loss", "it printed no 'loss', and no key or number"),
        ('{"a":' * 100_000 + "\nx", "loss", "it printed no 'loss'"),
    ],
)
def test_a_name_that_tells_nothing(text: str, metric: str, problem: str) -> None:
    found = read_metric(text, metric)
    assert (found.value, found.stderr) == (None, None)
    assert found.problem.startswith(problem)


def test_the_standard_error_is_not_the_metric() -> None:
    """The last number of such a text is the standard error."""
    text = '{"acc": 0.75, "acc_stderr": 0.03}'
    assert read_metric(text, None).value == 0.03
    assert read_metric(text, "acc") == Reading(0.75, 0.03)


def test_a_standard_error_by_its_name() -> None:
    text = '{"a": {"acc": 0.5, "se": 0.25}, "b": {"se": 0.125, "sd": 7}}'
    assert read_metric(text, "a.acc", "se") == Reading(0.5, 0.25)  # the one beside it
    assert read_metric(text, "a.acc", "b.se") == Reading(0.5, 0.125)
    assert read_metric(text, "a.acc", "sd") == Reading(0.5, 7.0)
    assert read_metric(text, "a.acc", "none") == Reading(0.5, problem="no standard error 'none' was found")
    assert read_metric("acc 0.5, error 0.25", "acc", "error") == Reading(0.5, 0.25)


@pytest.mark.parametrize("metric", ["acc", "acc,none", "sums.acc", "results.sums.acc,none"])
def test_real_output_of_the_harness(metric: str) -> None:
    stdout, document = harness()
    found = document["results"]["sums"]
    exact = Reading(found["acc,none"], found["acc_stderr,none"], data="12 samples")
    assert read_metric(stdout, metric, document=document) == exact
    assert read_metric(stdout, metric) == Reading(round(exact.value or 0, 4), round(exact.stderr or 0, 4))


def test_further_metrics_of_the_harness() -> None:
    stdout, document = harness()
    exact = document["results"]
    for each in (None, document):
        found = read_metric(stdout, "byte_perplexity", document=each).value
        assert found == pytest.approx(exact["prose"]["byte_perplexity,none"], abs=1e-4)
        norm = read_metric(stdout, "acc_norm", document=each).value
        assert norm == pytest.approx(exact["sums"]["acc_norm,none"], abs=1e-4)
        assert norm != pytest.approx(exact["sums"]["acc,none"], abs=1e-2)
        assert read_metric(stdout, "byte_perplexity", document=each).stderr is None
        assert "acc_norm" in read_metric(stdout, "acc_nrm", document=each).problem
    assert read_metric(stdout, "prose.acc").value is None
