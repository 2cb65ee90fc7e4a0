"""Files that only advise or accompany: whatever is in them, the average is right, and they are copied as they are."""

from __future__ import annotations

import json
import os
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.cli.runner import run_cli
from tests.exhaustive import all_but, few_or_all, thinned
from tests.hostile.contract import (
    MODEL,
    REPEATABLE,
    STEPS,
    check_mean,
    check_refusal,
    check_text,
    mean_of,
    sources,
    visible,
    write_small_run,
)
from tests.hostile.values import spoilt

LAST = f"checkpoint-{STEPS[-1]}"
STATE = {
    "epoch": 1.0,
    "global_step": STEPS[-1],
    "log_history": [{"learning_rate": 1e-4, "loss": 2.0, "step": 5}, {"learning_rate": 5e-5, "step": 15}],
}
CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "torch_dtype": "float32",
    "_name_or_path": "someone/model",
    "text_config": {"dtype": "float32", "layers": [1, 2]},
}


def files_of(run: Path) -> dict[str, list[Path]]:
    return {str(step): [run / f"checkpoint-{step}" / MODEL] for step in STEPS}


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return write_small_run(tmp_path / "run")


def stated_step(text: bytes) -> int:
    try:
        step = json.loads(text)["global_step"]
    except (ValueError, KeyError, TypeError, IndexError, RecursionError):
        return STEPS[-1]
    return step if type(step) is int and 0 <= step < 10**18 else STEPS[-1]


@pytest.mark.parametrize("examples", few_or_all(40, 120))
def test_trainer_states(run: Path, examples: int) -> None:
    seen: set[bytes] = set()
    warned = 0

    @settings(REPEATABLE, max_examples=examples)
    @given(spoilt(STATE) | st.sampled_from(["log_history", "global_step"]).flatmap(lambda part: spoilt(STATE, (part,))))
    def check(text: bytes) -> None:
        nonlocal warned
        seen.add(text)
        (run / LAST / "trainer_state.json").write_bytes(text)
        step = stated_step(text)
        result = mean_of(run)
        other = run_cli("bema", run, "--dry-run", "--json")  # which looks at the learning rates
        assert other.exit_code == result.exit_code, other.stderr
        check_text(other.stderr)
        if step in STEPS[:-1]:
            check_refusal(result, run, f"step {step} appears 2 times")
            return
        assert result.exit_code == 0, result.stderr
        warned += "warning: " in result.stderr
        record = json.loads((run / "averaged" / "mean" / "ckavg.json").read_bytes())
        assert record["steps"] == sorted([*STEPS[:-1], step])
        check_mean(run, files_of(run), run / "averaged" / "mean")

    check()
    sys.stdout.write(f"{len(seen)} distinct examples\n")  # shown with -rP
    assert len(seen) >= examples * 3 // 4
    assert warned >= examples // 3


@pytest.mark.parametrize("examples", few_or_all(15, 50))
@pytest.mark.parametrize("name", ["config.json", "adapter_config.json"])
def test_configs(run: Path, name: str, examples: int) -> None:
    seen: set[bytes] = set()
    others: set[bytes] = set()

    @settings(REPEATABLE, max_examples=examples)
    @given(spoilt(CONFIG) | spoilt(CONFIG, ("text_config",)))
    def check(text: bytes) -> None:
        seen.add(text)
        (run / LAST / name).write_bytes(text)
        result = mean_of(run, "--dtype", "bfloat16")
        if result.exit_code:  # a model of another kind
            check_refusal(result, run, f"step {STEPS[-1]}: config.json states ")
            others.add(text)
            return
        copied = (run / "averaged" / "mean" / name).read_bytes()
        card = (run / "averaged" / "mean" / "README.md").read_text()
        assert card.startswith("---\n")
        assert card.count("\n---\n") == 1
        assert len(card) < 3_000
        assert copied == text or (name == "config.json" and _as_bfloat16(text) == json.loads(copied))
        shown = run_cli("mean", run, "--force")
        assert shown.exit_code == 0, shown.stderr
        check_text(shown.stdout)

    check()
    sys.stdout.write(f"{len(seen)} distinct examples\n")  # shown with -rP
    assert len(seen) >= examples * 3 // 4
    assert len(others) <= examples // 5


def _as_bfloat16(text: bytes) -> Any:
    config = json.loads(text)
    pending = [config]
    while pending:
        part = pending.pop()
        for key, value in part.items():
            if isinstance(value, dict):
                pending.append(value)
            elif key in ("dtype", "torch_dtype") and value == "float32":
                part[key] = "bfloat16"
    return config


@pytest.mark.parametrize("examples", few_or_all(20, 60))
def test_tables_of_the_path(run: Path, examples: int) -> None:
    assert run_cli("pema", run, "--quiet").exit_code == 0
    expected = (run / "averaged" / "pema-gamma0.15" / MODEL).read_bytes()
    table = json.loads((run / "averaged" / "path.json").read_bytes())
    (where,) = [run / "averaged" / "path.json"]
    before = sources(run)
    seen: set[bytes] = set()
    hostile = st.sampled_from(
        ["1e400", "NaN", "-1.0", '"3"', "null", "[]", "{}", "true", "1", "9" * 5_000, "[" * 2_000]
    )

    @settings(REPEATABLE, max_examples=examples)
    @given(st.sampled_from(["noise", "cut", "number", "part"]), st.data())
    def check(way: str, data: st.DataObject) -> None:
        text = json.dumps(table)
        if way == "noise":
            text = data.draw(st.text(max_size=50))
        elif way == "cut":
            text = text[: data.draw(st.integers(0, len(text) - 1))]
        elif way == "number":
            numbers = [n for rows in (table["sigma"], table["distances"]) for row in rows.values() for n in row]
            text = text.replace(repr(data.draw(st.sampled_from(numbers))), data.draw(hostile))
        else:
            part = data.draw(st.sampled_from(sorted(table)))
            text = text.replace(json.dumps(table[part]), data.draw(hostile), 1)
        seen.add(text.encode(errors="surrogatepass"))
        where.write_bytes(text.encode(errors="surrogatepass"))
        result = run_cli("pema", run, "--quiet", "--force")
        assert result.exit_code == 0, result.stderr
        assert (run / "averaged" / "pema-gamma0.15" / MODEL).read_bytes() == expected

    check()
    sys.stdout.write(f"{len(seen)} distinct examples\n")  # shown with -rP
    assert sources(run) == before
    assert len(seen) >= examples // 2


@pytest.mark.parametrize(
    ("name", "kind"),
    thinned(
        ["trainer_state.json", "config.json", "tokenizer.json", "../averaged/path.json"],
        ["pipe", "folder", "device", "huge", "circle", "unreadable text"],
    ),
)
def test_no_plain_file(run: Path, name: str, kind: str) -> None:
    """A huge config is no config; everything else is passed over, or warned about."""
    place = run / LAST / name
    place.parent.mkdir(exist_ok=True)
    (run / "averaged").mkdir(exist_ok=True)
    place.unlink(missing_ok=True)
    if kind == "pipe":
        os.mkfifo(place)
    elif kind == "folder":
        place.mkdir()
    elif kind == "huge":
        with place.open("wb") as file:
            file.truncate(1 << 40)
    elif kind == "unreadable text":
        place.write_bytes(b"\xff\xfe\x00")
    else:
        place.symlink_to("/dev/zero" if kind == "device" else place.name)
    before = sources(run)
    result = run_cli("pema", run, "--quiet")
    assert result.exit_code == 0, result.stderr
    check_text(result.stderr)
    assert sources(run) == before
    assert visible(run / "averaged")[-1:] == ["pema-gamma0.15"] or "pema-gamma0.15" in visible(run / "averaged")


LISTS = ["[" * depth + "]" * depth for depth in range(300, 1_100, 40)]
OBJECTS = ['{"dtype":' * depth + "1" + "}" * depth for depth in range(300, 1_100, 40)]


@pytest.mark.parametrize(
    "value",
    [
        '"\\ud800"',
        "1e400",
        "9" * 4_300,
        *all_but(LISTS[::7], LISTS),
        *all_but(OBJECTS[::7], OBJECTS),
    ],
)
def test_configs_that_can_hardly_be_written_again(run: Path, value: str) -> None:
    text = f'{{"torch_dtype": "float32", "x": {value}, "layers": {{"dtype": "float32"}}}}'.encode()
    (run / LAST / "config.json").write_bytes(text)
    result = mean_of(run, "--dtype", "bfloat16")
    assert result.exit_code == 0, result.stderr
    copied = (run / "averaged" / "mean" / "config.json").read_bytes()
    assert copied.decode()
    assert copied == text or json.loads(copied) == _as_bfloat16(text)


@pytest.mark.parametrize("content", [b"", b"\0" * 100, b"{" * 5_000, b'{"scheme": 3}', b"\xff", b"NaN"])
def test_records_of_results_that_are_replaced(run: Path, content: bytes) -> None:
    assert run_cli("mean", run, "--quiet").exit_code == 0
    result = run / "averaged" / "mean"
    expected = (result / MODEL).read_bytes()
    (result / "ckavg.json").write_bytes(content)
    (result / MODEL).write_bytes(b"something else")
    refused = run_cli("mean", run, "--quiet")
    assert (refused.exit_code, "already holds a result" in refused.stderr) == (1, True)
    assert (result / MODEL).read_bytes() == b"something else"
    assert run_cli("mean", run, "--quiet", "--force").exit_code == 0
    assert (result / MODEL).read_bytes() == expected


@pytest.mark.parametrize("kind", ["pipe", "folder", "dangling"])
def test_what_is_no_record_makes_no_result(run: Path, kind: str) -> None:
    place = run / "averaged" / "mean" / "ckavg.json"
    place.parent.mkdir(parents=True)
    if kind == "pipe":
        os.mkfifo(place)
    elif kind == "folder":
        place.mkdir()
    else:
        place.symlink_to("nowhere")
    refused = run_cli("mean", run, "--quiet", "--force")
    assert refused.exit_code == 1
    assert "exists and is not a result of ckavg" in refused.stderr
    assert os.listdir(place.parent) == ["ckavg.json"]  # noqa: PTH208


def test_side_files_that_lead_in_circles(run: Path) -> None:
    for name in ("one", "two", "three"):
        (run / LAST / name).symlink_to(".")
    (run / LAST / "code").mkdir()
    (run / LAST / "code" / "model.py").write_text("x = 1\n")
    (run / LAST / "code" / "up").symlink_to("..")
    result = mean_of(run)
    assert result.exit_code == 0
    files = json.loads((run / "averaged" / "mean" / "ckavg.json").read_bytes())["outputs"][-1]["files"]
    assert files == ["README.md", "ckavg.json", "code/model.py", "config.json", MODEL, "tokenizer.json"]
    shutil.rmtree(run / "averaged")
