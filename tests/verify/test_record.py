"""A record may have been written by anybody: whatever is in it, there is one message, and no traceback."""

from __future__ import annotations

import copy
import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import ckavg
from ckavg.errors import ReadError, RecordError
from ckavg.output import record as record_module
from ckavg.output.record import parse_fields, read_record
from tests.cli.runner import run_cli
from tests.runs import random_run, write_run

JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.integers(-(10**400), 10**400)
    | st.floats()
    | st.text(max_size=8)
    | st.sampled_from(["inf", "../x", "/etc/passwd", "a\0b", "\ud800", "float64", "", ".", "ema", "model.safetensors"]),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=6), inner, max_size=4),
    max_leaves=8,
)


UNCHECKED = {
    "ckavg_version", "source", "selection", "path_length_error", "path_kernel", "sample", "path_exclude", "zero_sigma",
    "excluded_from_path", "parameters_counted", "dtype", "accumulate", "warnings", "evaluation", "bytes_read",
    "seconds",
}  # fmt: skip
"""What a record says that nothing else tells, or that changes nothing of what is compared."""

HINTS = {"directory", "name"}
"""Where things were."""


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    root = tmp_path_factory.mktemp("record")
    run = ckavg.open_run(write_run(root / "run", random_run(0, 4, torch.float32), (0, 10, 20, 30)))
    result = ckavg.average(run, ckavg.PEMA(), snapshot_every=20).directory
    return result, json.loads((result / "ckavg.json").read_bytes())


def write(result: Path, record: Any) -> None:
    (result / "ckavg.json").write_text(json.dumps(record))


def paths_in(value: Any) -> list[tuple[Any, ...]]:
    """Where every value inside a JSON value is."""
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [()] + [(key, *rest) for key, below in inner for rest in paths_in(below)]


def at(record: Any, path: tuple[Any, ...]) -> Any:
    return at(record[path[0]], path[1:]) if path else record


def put(record: Any, path: tuple[Any, ...], value: Any) -> Any:
    if not path:
        return value
    changed = copy.copy(record)
    changed[path[0]] = put(record[path[0]], path[1:], value)
    return changed


@settings(max_examples=100, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_value_anywhere(made: tuple[Path, dict[str, Any]], data: st.DataObject) -> None:
    """Most are refused; what is not changes nothing that is checked, or is found to be wrong. Replayed all the same."""
    result, record = made
    path = data.draw(st.sampled_from(paths_in(record)))
    value = data.draw(JSON)
    write(result, put(record, path, value))
    done = run_cli("verify", result, "--replay", "--sources", "--elements", "20", "--seed", "1", "-q")
    assert done.exit_code in (0, 1)
    assert "Traceback" not in done.output
    if done.exit_code:
        assert (done.stderr.count("error: "), done.stdout.count("problem: ") > 0) in ((1, False), (0, True))
    else:
        assert done.output == ""
        is_older = value is None and path[0] in ("effective_count", "mean_age", "anchor_weight")
        assert is_older or path[0] in UNCHECKED or path[-1] in HINTS or value == at(record, path)


@settings(max_examples=100, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.binary(max_size=200) | JSON.map(lambda value: json.dumps(value).encode()))
def test_any_bytes(made: tuple[Path, dict[str, Any]], data: bytes) -> None:
    result, _ = made
    (result / "ckavg.json").write_bytes(data)
    done = run_cli("verify", result)
    assert (done.exit_code, done.stdout, done.stderr.count("error: ")) == (1, "", 1)


@pytest.mark.parametrize(
    ("path", "value", "told"),
    [
        (("scheme",), "magic", "scheme is unknown: 'magic'."),
        (("parameters", "gamma"), -1, "parameters do not fit pema: pema: gamma is -1; it must be 0 or more."),
        (("parameters", "gamma"), "0.15", "parameters do not fit pema: '0.15' must be of the type float."),
        (("parameters",), {"gamma": 1}, "parameters are not those of pema."),
        (("steps",), [], "steps has fewer than two entries."),
        (("steps", 2), 10, "steps are not ascending."),
        (("anchor_step",), 1, "anchor_step is not among the steps."),
        (("steps", 2), 20.0, "steps[2] is 20.0; it must be a whole number."),
        (("steps", 2), 10**30, "steps[2] is a huge number; it must be a whole number."),
        (("steps", 2), True, "steps[2] is true; it must be a whole number."),
        (("betas",), [None, 0.5], "steps, betas, weights, inputs, alphas and path_length differ in length."),
        (("betas", 1), "x" * 99, 'betas[1] is "' + "x" * 59 + "…; it must be a finite number."),
        (("weights",), None, "weights is null; it must be a list."),
        (("path_length",), None, "path_length is null."),
        (("path_length", 1), -1e-9, "path_length has a negative value."),
        (("sample",), 0, "sample is not in (0, 1]."),
        (("zero_sigma",), "maybe", 'zero_sigma is "maybe"; it must be exclude or eps.'),
        (("inputs", 1, "step"), 11, "inputs[].step differs from steps."),
        (("inputs", 1, "checksum"), "F" * 64, "inputs[1].checksum is"),
        (("inputs", 1, "files"), {"../../x": 1}, 'is "../../x"; it must be the plain path of a file'),
        (("inputs", 1, "files"), {"x": -1}, "inputs[1].files.x is -1; it must be a whole number, 0 or more."),
        (("inputs", 1, "files"), {}, "inputs[].files is empty."),
        (("outputs",), [], "outputs is empty."),
        (("outputs", 0, "step"), 21, "outputs[].step is not among the steps."),
        (("outputs", 0, "step"), 30, "outputs[].step has a duplicate."),
        (("outputs", 1, "step"), 10, "the last of outputs is not at the last step."),
        (("outputs", 0, "name"), "../x", "outputs[].name is not a directory name, or has a duplicate."),
        (("outputs", 1, "files", 0), "/etc/passwd", 'outputs[1].files[0] is "/etc/passwd"; it must be the plain path'),
        (("outputs", 1, "files", 0), "a//b", 'outputs[1].files[0] is "a//b"; it must be the plain path of a file'),
        (("outputs", 1, "sha256"), {}, "outputs[].sha256 must list the files in outputs[].files except ckavg.json."),
        (("source",), "a\0b", r'source is "a\u0000b"; it must be a text.'),
        (("allow_nonfinite",), 1, "allow_nonfinite is 1; it must be true or false."),
    ],
)
def test_what_is_said(made: tuple[Path, dict[str, Any]], path: tuple[Any, ...], value: Any, told: str) -> None:
    result, record = made
    changed = put(record, path, value) if path[0] in record else record | {path[0]: value}
    write(result, changed)
    with pytest.raises(RecordError) as error:
        read_record(result)
    assert error.value.message.startswith(f"{result}/ckavg.json: ")
    assert told in error.value.message
    assert error.value.hint == "The record was damaged or edited. Restore it from a copy, or make the average again."


def test_all_that_is_wrong_is_listed(made: tuple[Path, dict[str, Any]]) -> None:
    result, record = made
    write(result, record | {"betas": 1, "weights": [None], "span": -3})
    with pytest.raises(RecordError, match=r"(?s)3 problems:.*span is -3.*betas is 1.*weights\[0\] is null"):
        read_record(result)


@pytest.mark.parametrize(
    "text", ['{"a": 1, "a": 2}', '{"a": NaN}', "[" * 100_000, "\x00", "[]", "7", '{"a": ' + "9" * 5000 + "}", ""]
)
def test_what_is_no_record(text: str) -> None:
    with pytest.raises(RecordError):
        parse_fields(text.encode())


def test_a_record_that_is_too_large(
    made: tuple[Path, dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(record_module, "MOST_BYTES", 1000)
    write(tmp_path, made[1])
    with pytest.raises(ReadError, match="larger than 1,000 bytes"):
        read_record(tmp_path)


def test_a_record_that_is_no_file(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "ckavg.json")
    with pytest.raises(ReadError, match="not a plain file"):
        read_record(tmp_path)


def test_what_the_record_leads_to_is_looked_at_before_it_is_opened(made: tuple[Path, dict[str, Any]]) -> None:
    """Devices and pipes are not read, whatever a record says of them."""
    result, record = made
    inputs = [dict(each, directory="/dev", files={"zero": 0}) for each in record["inputs"]]
    write(result, record | {"inputs": inputs})
    problems = ckavg.verify_result(result, sources=True, replay=True).problems
    assert problems[0] == "checkpoint-20/ckavg.json is of another average than the result."
    assert problems[1] == "step 0: /dev/zero is not a plain file."
