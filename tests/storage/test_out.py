"""Results that go to an object store: complete or absent there, whatever goes wrong, and continued."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import ckavg
from ckavg.storage.atomic import cache_directory
from tests.cli.runner import run_cli
from tests.storage.stores import Store

pytestmark = pytest.mark.usefixtures("without_pictures")

OUT = "s3://runs/team/results/pema"


def test_a(s3: Store, run: Path, tmp_path: Path, expected: dict[str, bytes]) -> None:
    r = run_cli("pema", run, "--out", OUT)
    print(r.output)
    print(s3.requests)
    assert r.exit_code == 0
    s3.forget()
    r = run_cli("pema", run, "--out", OUT)
    print(r.output)
    print(s3.requests)
    print([p for p in cache_directory().rglob("*")])
    r = run_cli("pema", run, "--out", OUT, "--json")
    print(r.stdout[-900:])
    r = run_cli("pema", run, "--gamma", "0.3", "--out", OUT)
    print(r.output)
    r = run_cli("pema", run, "--gamma", "0.3", "--out", OUT, "--force", "--dry-run")
    print(r.output)
    s3.forget()
    r = run_cli("pema", run, "--gamma", "0.3", "--out", OUT, "--force")
    print(r.output)
    print(s3.requests)
    rec = ckavg.average(ckavg.open_run(run), ckavg.EMA(), out="s3://runs/x y/ü/ema", snapshot_every=10)
    print(rec.directory, rec.outputs)
    assert 0
