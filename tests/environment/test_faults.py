"""Every call by which a result is written fails once: there is the whole result, the earlier one, or none."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from ckavg.output.output_path import LOCAL
from tests.cli.runner import run_cli
from tests.environment.faults import ERRORS, faults
from tests.environment.process import check_message, ckavg
from tests.exhaustive import unless
from tests.hostile.contract import check_text, sources, visible, write_small_run

Contents = dict[str, bytes]


def contents(place: Path) -> Contents:
    return {str(path.relative_to(place)): path.read_bytes() for path in sorted(place.rglob("*")) if path.is_file()}


def weights_of(found: Contents) -> Contents:
    """All but what tells how long it took."""
    return {name: data for name, data in found.items() if Path(name).name not in ("ckavg.json", LOCAL)}


def clear(run: Path) -> None:
    shutil.rmtree(run / "averaged", ignore_errors=True)
    shutil.rmtree(run.parent / "cache", ignore_errors=True)


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr("ckavg.engine.stream.SECONDS_BETWEEN_NOTES", 0.0)  # so that journals are written, too
    return write_small_run(tmp_path / "run", shards=2)


def count_calls(run: Path, *command: str) -> int:
    with faults(None, 0, below=run) as seen:
        assert run_cli(*command).exit_code == 0
    sys.stdout.write(f"{command[0]}: {len(seen.calls)} calls\n")  # shown with -rP
    assert {"mkdir", "open", "pwrite", "fsync", "rename"} <= set(seen.calls)
    return len(seen.calls)


def at_some(error: int, tries: int, *, lasting: bool = False, typical: bool = False) -> Any:
    """A case: how the system fails, whether from then on, and at how many of the calls: each, each third, three."""
    name = f"{errno.errorcode[error]}, {'from then on' if lasting else 'once'}, {tries or 'all'}"
    return pytest.param(error, lasting, tries, marks=unless(typical), id=name)


def chosen(calls: int, error: int, tries: int) -> Sequence[int]:
    """The calls that fail, each in its turn."""
    if tries == THREE:
        return (calls // 4, calls // 2, calls - 2)
    return range(ERRORS.index(error) % 3, calls, 3) if tries == EACH_THIRD else range(calls)


ALL, EACH_THIRD, THREE = 0, 1, 3


@pytest.mark.parametrize(
    ("error", "lasting", "tries"),
    [
        at_some(errno.EIO, ALL, typical=True),
        at_some(errno.ENOSPC, ALL),
        at_some(errno.EDQUOT, EACH_THIRD),
        at_some(errno.EROFS, EACH_THIRD),
        at_some(errno.ENOSPC, ALL, lasting=True),
        at_some(errno.EROFS, EACH_THIRD, lasting=True),
        at_some(errno.ENOSPC, THREE, typical=True),
        at_some(errno.EDQUOT, THREE, typical=True),
        at_some(errno.EROFS, THREE, lasting=True, typical=True),
    ],
)
def test_a_first_result(run: Path, error: int, lasting: bool, tries: int) -> None:
    command = ("pema", str(run), "--quiet")
    place = run / "averaged" / "pema-gamma0.15"
    calls = count_calls(run, *command)
    expected = weights_of(contents(place))
    before = sources(run)
    failed = 0
    tried = chosen(calls, error, tries)
    for at in tried:
        clear(run)
        with faults(at, error, below=run, lasting=lasting) as met:
            result = run_cli(*command)
        assert len(met.calls) > at
        told = (at, met.calls[at], result.stderr)
        assert "Traceback" not in result.stderr
        check_text(result.stderr)
        if result.exit_code:
            failed += 1
            assert (result.exit_code, result.stderr.count("error: ")) == (1, 1), told
            if "pema-gamma0.15" in visible(run / "averaged"):
                assert met.calls[at] == "fsync", told  # of the parent, after the rename: it is whole, if not for sure
                assert weights_of(contents(place)) == expected, told
        else:
            assert weights_of(contents(place)) == expected, told
        assert set(visible(run / "averaged")) <= {"path.json", "pema-gamma0.15"}, told
        assert sources(run) == before, told
        again = run_cli(*command, "--force")
        assert again.exit_code == 0, (told, again.stderr)
        assert weights_of(contents(place)) == expected, told
        assert visible(run / "averaged")[-1] == "pema-gamma0.15", told
    assert failed >= len(tried) // 4


@pytest.mark.parametrize(
    ("error", "lasting", "tries"),
    [at_some(errno.EIO, EACH_THIRD, typical=True), at_some(errno.EIO, ALL), at_some(errno.ENOSPC, ALL)],
)
def test_an_earlier_result(run: Path, error: int, lasting: bool, tries: int) -> None:
    command = ("mean", str(run), "--quiet", "--force")
    place = run / "averaged" / "mean"
    assert run_cli("mean", str(run), "--quiet", "--last", "2", "--out", str(place)).exit_code == 0
    earlier = contents(place)
    shutil.copytree(run / "averaged", run.parent / "kept")
    calls = count_calls(run, *command)
    expected = weights_of(contents(place))
    assert expected != weights_of(earlier)
    failed = 0
    tried = chosen(calls, error, tries)
    for at in tried:
        clear(run)
        shutil.copytree(run.parent / "kept", run / "averaged")
        with faults(at, error, below=run, lasting=lasting) as met:
            result = run_cli(*command)
        told = (at, met.calls[at], result.stderr)
        found = contents(place)
        assert found == earlier or weights_of(found) == expected, told
        assert result.exit_code == 1 or weights_of(found) == expected, told
        assert result.stderr.count("error: ") == result.exit_code, told
        failed += result.exit_code
        assert visible(run / "averaged") == ["mean"], told
        assert run_cli(*command).exit_code == 0, told
        assert weights_of(contents(place)) == expected, told
    assert failed >= len(tried) // 4


@contextlib.contextmanager
def small_file_system(place: Path, size: int) -> Iterator[Path]:
    """A file system of its own, in memory; root alone may make one."""
    place.mkdir()
    if (
        os.geteuid()
        or subprocess.run(
            ["mount", "-t", "tmpfs", "-o", f"size={size}", "ckavg", place], capture_output=True, check=False
        ).returncode
    ):
        pytest.skip("only root may mount a file system")
    try:
        yield place
    finally:
        subprocess.run(["umount", "--lazy", place], check=True)


def test_a_file_system_that_fills_up(tmp_path: Path) -> None:
    """17 MB, of which 16 MiB must be free before anything is read; somebody else takes them meanwhile."""
    run = write_small_run(tmp_path / "run", shards=2)
    before = sources(run)
    with small_file_system(tmp_path / "small", 20 << 20) as disk:
        refused = ckavg("mean", run, "--out", disk / "out", before=_fill(disk, at="plan"))
        check_message(refused, "GB free; the result needs")
        (disk / "filling").unlink()
        full = ckavg("mean", run, "--out", disk / "out", before=_fill(disk, at="begin"))
        check_message(full, "No space left on device")
        assert visible(disk) == ["filling"]
        (disk / "filling").unlink()
        assert run_cli("mean", run, "--out", disk / "out", "--quiet").exit_code == 0
        assert run_cli("mean", run, "--quiet").exit_code == 0
        assert (
            weights_of(contents(disk / "out"))["model-00001-of-00002.safetensors"]
            == (run / "averaged" / "mean" / "model-00001-of-00002.safetensors").read_bytes()
        )
    assert sources(run) == before


def _fill(disk: Path, *, at: str) -> str:
    """Take all of a file system before anything is looked at, or once it was found large enough."""
    fill = f"""
import importlib, os
def fill():
    with open({str(disk / "filling")!r}, "wb", buffering=0) as file:
        try:
            while file.write(bytes(1 << 12)):
                pass
        except OSError:
            pass
"""
    if at == "plan":
        return f"{fill}fill()\n"
    return f"""{fill}
average = importlib.import_module("ckavg.averaging.pipeline")
check = average.check_compatible
def check_and_fill(plans):
    check(plans)
    fill()
average.check_compatible = check_and_fill
"""
