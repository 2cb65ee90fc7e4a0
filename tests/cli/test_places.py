"""Places that are none as they were typed: one message with what to type instead, and no password in it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import ckavg
from ckavg.storage import objects
from tests.cli.runner import run_cli
from tests.runs import random_run, write_run

SECRET = "VerySecret123"
MEANT = {
    "owner/name": "hf://owner/name",
    "owner/name@step10": "hf://owner/name@step10",
    "owner/name@main/folder": "hf://owner/name@main/folder",
    "hf:owner/name": "hf://owner/name",
    "huggingface.co/owner/name": "hf://owner/name",
    "hf.co/owner/name/tree/step10": "hf://owner/name@step10",
    "https://huggingface.co/owner/name": "hf://owner/name",
    "http://www.huggingface.co/owner/name/": "hf://owner/name",
    "https://huggingface.co/owner/name/tree/main": "hf://owner/name@main",
    "https://huggingface.co/owner/name/tree/refs%2Fpr%2F1/a/b?x=1#y": "hf://owner/name@refs%2Fpr%2F1/a/b",
    "https://huggingface.co/owner/name/blob/main/a/model.safetensors": "hf://owner/name@main/a",
    "https://huggingface.co/owner/name/resolve/main/model.safetensors?download=true": "hf://owner/name@main",
    "https://huggingface.co/owner/name/discussions/3": "hf://owner/name",
    "https://huggingface.co/gpt2": "hf://gpt2",
    f"https://me:{SECRET}@huggingface.co/owner/name": "hf://owner/name",
}


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return write_run(tmp_path / "run", random_run(0, 3, torch.float32), (0, 10, 20))


def told(*words: str | Path, status: int) -> str:
    done = run_cli(*words)
    assert (done.exit_code, done.stdout) == (status, "")
    assert done.stderr.count("error: ") == 1
    assert SECRET not in done.output
    return done.stderr


@pytest.mark.parametrize("typed", MEANT)
def test_what_was_meant(run: Path, typed: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(run.parent)
    status = 2 if "://" in typed else 1
    for words in (["pema", typed], ["inspect", typed], ["sweep", typed, "mean"], ["ema", run, "--init", typed]):
        assert told(*words, status=status).splitlines()[-1] == f"hint: Did you mean {MEANT[typed]}?"
    with pytest.raises(ckavg.CkavgError) as met:
        ckavg.open_run(typed)
    assert met.value.hint == f"Did you mean {MEANT[typed]}?"


@pytest.mark.parametrize("typed", ["a/b/c", "../owner/name", "../name", "nowhere", "/owner/name", "~/name"])
def test_what_is_no_name_of_the_hub(typed: str) -> None:
    assert "Did you mean" not in told("pema", typed, status=1)


def test_what_is_there_is_meant(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(run.parent)
    (run.parent / "owner").mkdir()
    run.rename(run.parent / "owner" / "name")
    assert run_cli("inspect", "owner/name", "-q").exit_code == 0


def test_a_directory_by_its_address(run: Path) -> None:
    for typed in (f"file://{run}", f"file:{run}", f"local://{run}"):
        assert f"Did you mean {run}?" in told("inspect", typed, status=2)


@pytest.mark.parametrize(
    ("typed", "meant"),
    [
        ("hf://owner/name", "owner/name"),
        ("https://huggingface.co/owner/name", "owner/name"),
        ("hf.co/owner/name", "owner/name"),
        ("hf://owner/name@step10", "owner/name --revision step10"),
        ("https://huggingface.co/owner/name/tree/pema", "owner/name --revision pema"),
        (f"https://me:{SECRET}@huggingface.co/owner/name", "owner/name"),
    ],
)
def test_where_to_push(run: Path, typed: str, meant: str) -> None:
    assert told("push", run, typed, status=2).splitlines()[-1] == f"hint: Did you mean {meant}?"
    assert f"Did you mean {meant}?" in told("mean", run, "--push-to-hub", typed, status=2)


@pytest.mark.parametrize(
    "typed",
    [
        f"https://me:{SECRET}@example.org/run",
        f"https://{SECRET}@example.org/run",
        f"https://example.org/run?X-Amz-Signature={SECRET}&x=1",
        f"https://me:a/{SECRET}@example.org/run",
        f"s3://AKIA:{SECRET}@bucket/run",
        f"s3://AKIA:a/{SECRET}@bucket/run",
        f"s3://bucket/run?sig={SECRET}",
        f"abfs://box@account.example.org/run?sv=1&sig={SECRET}",
        f"zip://a.zip::https://me:{SECRET}@example.org/a",
    ],
)
def test_no_password_is_shown(run: Path, typed: str) -> None:
    result = ckavg.average(ckavg.open_run(run), ckavg.EMA()).directory
    for verb, *words in (("inspect",), ("pema", "-v"), ("ema", run, "-v", "--init")):
        assert f"error: {typed.partition('://')[0]}://" in told(verb, *words, typed, status=2)
    told("verify", result, "--sources", "-v", "--source", typed, status=2)
    told("push", result, typed, "-v", status=2)
    record = json.loads((result / "ckavg.json").read_bytes())
    record["inputs"] = [each | {"directory": typed} for each in record["inputs"]]
    (result / "ckavg.json").write_text(json.dumps(record))
    done = run_cli("verify", result, "--sources", "--fetch", "-v")
    assert (done.exit_code, SECRET in done.output) == (1, False)


def test_no_word_of_a_driver_holds_a_password(monkeypatch: pytest.MonkeyPatch) -> None:
    class Driver:
        protocol = "s3"

        def __init__(self, **_: Any) -> None:
            pass

        @staticmethod
        def _get_kwargs_from_urls(_: str) -> dict[str, str]:
            return {}

        @staticmethod
        def _strip_protocol(url: str) -> str:
            return url

        def find(self, *_: Any, **__: Any) -> None:
            raise PermissionError(f"https://store.example.org/run?X-Amz-Signature={SECRET} says no to me:{SECRET}@x")

    monkeypatch.setattr("fsspec.get_filesystem_class", lambda _: Driver)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", SECRET)
    said = told("inspect", "s3://bucket/run", "-v", status=1)
    assert "s3://bucket/run may not be read: https://store.example.org/run?X-Amz-Signature=…" in said
    assert objects._reason(ValueError(SECRET)) == "…"
