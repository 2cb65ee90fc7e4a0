"""Rights, homes, limits and names of places that are not as one would wish."""

from __future__ import annotations

import ctypes
import json
import os
import resource
import shutil
import struct
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from safetensors.torch import load_file

from tests.cli.runner import placeless, run_cli
from tests.environment.process import PEAK, check_message, ckavg
from tests.exhaustive import all_but
from tests.hostile.contract import MODEL, check_mean, sources, visible, weights, write_small_run
from tests.runs import write_checkpoint

_DROP_FROM_BOUNDING_SET = 24
_OVERRIDE, _READ_SEARCH = 1, 2


def without_root_rights() -> None:
    """Rights count for this process as for any user; it stays the owner of its files."""
    if os.geteuid() == 0:
        library = ctypes.CDLL(None)
        for right in (_OVERRIDE, _READ_SEARCH):
            if library.prctl(_DROP_FROM_BOUNDING_SET, right, 0, 0, 0):
                raise OSError("rights cannot be given up")


needs_rights = pytest.mark.skipif(
    os.geteuid() == 0 and sys.platform != "linux", reason="root reads and writes everything here"
)


@pytest.fixture
def run(tmp_path: Path) -> Iterator[Path]:
    run = write_small_run(tmp_path / "run")
    yield run
    for folder, _, _ in os.walk(tmp_path):
        Path(folder).chmod(0o755)


@needs_rights
@pytest.mark.parametrize("verb", all_but((("pema",),), [("mean",), ("pema",), ("path",), ("sweep",)]), ids=" ".join)
def test_a_source_that_may_not_be_written(run: Path, tmp_path: Path, verb: tuple[str, ...]) -> None:
    words = ("pema", "mean") if verb == ("sweep",) else ()
    for folder in (*run.iterdir(), run):
        folder.chmod(0o555)
    env = {"XDG_CACHE_HOME": str(tmp_path / "cache")}
    if verb != ("path",):
        refused = ckavg(*verb, run, *words, preexec=without_root_rights, env=env)
        check_message(refused, "cannot be written: you may not write to", "--out")
    elsewhere = () if verb == ("path",) else ("--out", str(tmp_path / "out"))
    before = sources(run)
    done = ckavg(*verb, run, *words, *elsewhere, preexec=without_root_rights, env=env)
    assert done.returncode == 0, done.stderr
    assert sources(run) == before
    assert os.listdir(run) == ["checkpoint-0", "checkpoint-10", "checkpoint-20"] or not (run / "averaged").exists()  # noqa: PTH208
    if verb != ("mean",):
        assert len(list((tmp_path / "cache" / "ckavg").iterdir())) == 1


@needs_rights
@pytest.mark.parametrize("mode", all_but((0o555,), [0o555, 0o000, 0o666]))
def test_a_place_that_may_not_be_written(run: Path, tmp_path: Path, mode: int) -> None:
    place = tmp_path / "place"
    place.mkdir(mode)
    place.chmod(mode)
    before = sources(run)
    for out in (place / "out", place / "far" / "below"):
        done = ckavg("mean", run, "--out", out, preexec=without_root_rights)
        check_message(done, "cannot be written: ", str(place))
    assert sources(run) == before
    place.chmod(0o755)
    assert not list(place.iterdir())


@needs_rights
@pytest.mark.parametrize(
    "name",
    all_but(
        ("checkpoint-20/model.safetensors", "checkpoint-20/config.json"),
        ["checkpoint-20/model.safetensors", "checkpoint-20", "", "checkpoint-20/config.json"],
    ),
)
def test_what_may_not_be_read(run: Path, name: str) -> None:
    before = sources(run)
    mode = (run / name).stat().st_mode
    (run / name).chmod(0)
    done = ckavg("pema", run, preexec=without_root_rights)
    inspected = ckavg("inspect", run, preexec=without_root_rights)
    (run / name).chmod(mode)
    check_message(done, "Permission denied", name)
    assert b"Traceback" not in inspected.stderr
    assert inspected.returncode == (0 if name.endswith("config.json") else 1)
    assert sources(run) == before
    assert not visible(run / "averaged")


@needs_rights
def test_a_trainer_state_that_may_not_be_read_is_a_warning(run: Path) -> None:
    (run / "checkpoint-20" / "trainer_state.json").chmod(0)
    done = ckavg("mean", run, "--quiet", preexec=without_root_rights)
    assert done.returncode == 0
    assert b"the step is taken from the name" in done.stderr


@pytest.mark.parametrize("home", all_but(("/nonexistent",), ["", "/nonexistent", "/dev/null", "/proc"]))
def test_homes(run: Path, home: str) -> None:
    done = ckavg(
        "pema", run, "--gamma", "0.05", "--quiet", env={"HOME": home, "XDG_CACHE_HOME": "", "TMPDIR": "/nonexistent"}
    )
    assert (done.returncode, done.stderr) == (0, b"")
    assert visible(run / "averaged") == ["path.json", "pema-gamma0.05"]


@needs_rights
def test_nowhere_to_keep_the_path(run: Path, tmp_path: Path) -> None:
    run.chmod(0o555)
    env = {"HOME": "/nonexistent", "XDG_CACHE_HOME": "", "TMPDIR": "/nonexistent"}
    done = ckavg(
        "pema", run, "--gamma", "0.05", "--quiet", "--out", tmp_path / "out", preexec=without_root_rights, env=env
    )
    assert (done.returncode, done.stderr) == (0, b"")


def test_umask(run: Path) -> None:
    def strict() -> None:
        os.umask(0o077)

    assert ckavg("pema", run, "--quiet", preexec=strict).returncode == 0
    result = run / "averaged" / "pema-gamma0.15"
    for path in (result, *result.iterdir(), run / "averaged" / "path.json"):
        assert path.stat().st_mode & 0o077 == 0, path


@pytest.mark.parametrize("gone", all_but(("source",), ["source", "absolute", "out"]))
def test_the_current_directory_is_gone(run: Path, tmp_path: Path, gone: str) -> None:
    (tmp_path / "here").mkdir()
    leave = f"import os; os.chdir({str(tmp_path / 'here')!r}); os.rmdir({str(tmp_path / 'here')!r})\n"
    words = {"source": (), "absolute": (run,), "out": (run, "--out", "out")}[gone]
    done = ckavg("mean", *words, before="import ckavg.cli.app\n" + leave)
    check_message(done, "The current directory does not exist any more")
    assert not (run / "averaged").exists()


NAMES = {
    "spaces": b" a  b ",
    "unicode": "modèle 模型 😀".encode(),
    "newline": b"a\nb\n",
    "dash": b"-rf",
    "dashes": b"--out",
    "dot": b"run.",
    "dots": b"...",
    "no text": b"a\xff\xfe",
    "half": b"a\xc3",
    "quotes": b"a'b\"c$d`e",
    "star": b"*?[x]",
    "backslash": b"a\\nb",
    "tilde": b"~",
    "colon": b"hf:x",
    "brace": b"{dir}",
    "percent": b"%s%(a)s",
    "hidden": b".run",
}


@pytest.mark.parametrize("name", all_but(("no text", "quotes", "hidden"), NAMES))
def test_names_of_places(tmp_path: Path, name: str) -> None:
    if sys.platform == "darwin" and name in ("no text", "half"):
        pytest.skip("names are text here")
    run = write_small_run(tmp_path / os.fsdecode(NAMES[name]))
    other = write_checkpoint(tmp_path / "base" / run.name, weights(5))
    out = tmp_path / "results" / run.name
    here = tmp_path
    for words in ([str(run)], ["--", run.name]):
        assert run_in(here, "inspect", *words).returncode == 0
        dry = run_in(here, "ema", "--dry-run", "--force", "--json", "--out", out, *words)
        assert json.loads(dry.stdout)["outputs"][-1]["directory"] == str(out)
        done = run_in(here, "mean", "--json", "--force", "--out", out, *words)
        assert done.returncode == 0, done.stderr
        record = json.loads(done.stdout)
        assert record["outputs"][-1]["directory"] == str(out)
        assert os.fsencode(record["source"]) == os.fsencode(words[-1])
        assert placeless(json.loads((out / "ckavg.json").read_bytes())) == placeless(record)
        assert (out / "README.md").read_bytes().decode().count("\n---\n") == 1
        check_mean(run, {str(step): [run / f"checkpoint-{step}" / MODEL] for step in (0, 10, 20)}, out)
    for verb in ("pema", "bema", "ouema", "dema"):
        assert run_in(here, verb, run, "--init", other, "--from-step", "10", "--quiet").returncode == 0
    swept = run_in(
        here, "sweep", run, "mean", "last", "--force", "--eval", "ls {dir} >/dev/null && echo 1.5", "--eval-goal", "min"
    )
    assert swept.returncode == 0
    record = json.loads((run / "averaged" / "last" / "ckavg.json").read_bytes())
    assert record["evaluation"]["value"] == 1.5
    assert run_in(here, "path", run, "--csv", tmp_path / f"{run.name}.csv", "--json").returncode == 0
    assert (tmp_path / f"{run.name}.csv").read_text().startswith("step,path_length,")
    (run / "checkpoint-20" / MODEL).write_bytes(b"")
    check_message(run_in(here, "mean", run, "--force"), "checkpoint-20/model.safetensors is 0 bytes long")


def run_in(here: Path, *arguments: str | Path) -> subprocess.CompletedProcess[bytes]:
    """In this process, which is ten times as fast; bytes as a process would give."""
    previous = Path.cwd()
    os.chdir(here)
    try:
        result = run_cli(*arguments)
    finally:
        os.chdir(previous)
    return subprocess.CompletedProcess(arguments, result.exit_code, result.stdout.encode(), result.stderr.encode())


def limited(files: int) -> Callable[[], None]:
    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_NOFILE, (files, files))

    return limit


def write_wide_run(run: Path, checkpoints: int, shards: int, tensors: int, *, elements: int = 1 << 20) -> None:
    """Headers alone; the tensors lie in files with a hole instead of data, linked where they are the same."""
    (run / "blobs").mkdir(parents=True)
    placed = {}
    names = [f"model-{number:05d}-of-{shards:05d}.safetensors" for number in range(1, shards + 1)]
    for number, name in enumerate(names):
        header = {}
        for place, tensor in enumerate(range(number, tensors, shards)):
            offsets = [place * elements * 2, (place + 1) * elements * 2]
            header[f"model.layers.{tensor}.weight"] = {"dtype": "BF16", "shape": [elements], "data_offsets": offsets}
            placed[f"model.layers.{tensor}.weight"] = name
        text = json.dumps(header).encode()
        for checkpoint in range(checkpoints):
            folder = run / f"checkpoint-{checkpoint}"
            folder.mkdir(exist_ok=True)
            with (folder / name).open("wb") as file:
                file.write(struct.pack("<Q", len(text)) + text)
                file.truncate(8 + len(text) + len(header) * elements * 2)
    index = json.dumps({"weight_map": placed})
    for checkpoint in range(checkpoints):
        (run / f"checkpoint-{checkpoint}" / "model.safetensors.index.json").write_text(index)
    (run / "blobs").rmdir()


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    run = tmp_path_factory.mktemp("wide") / "run"
    write_wide_run(run, 200, 30, 400)
    yield run
    shutil.rmtree(run)


@pytest.mark.parametrize("verb", all_but((("ema", "--dry-run"),), [("inspect",), ("ema", "--dry-run")]), ids=" ".join)
def test_200_checkpoints_of_30_shards(wide: Path, tmp_path: Path, verb: tuple[str, ...]) -> None:
    begun = time.monotonic()
    done = ckavg(*verb, wide, "--json", before=PEAK, env={"PEAK": str(tmp_path / "peak")}, preexec=limited(256))
    seconds, peak = time.monotonic() - begun, int((tmp_path / "peak").read_text())
    assert done.returncode == (1 if b"GB free" in done.stderr else 0), done.stderr
    sys.stdout.write(f"{' '.join(verb)}: {seconds:.1f} s, {peak / 1e6:.0f} MB\n")  # shown with -rP
    assert peak < 500_000_000
    if verb == ("inspect",):
        found = json.loads(done.stdout)
        assert [len(each["files"]) for each in found["checkpoints"]] == [30] * 200
        assert found["problems"] == []


@pytest.mark.exhaustive
def test_hundreds_of_shards_with_few_open_files(tmp_path: Path) -> None:
    """Of 64 files that may be open, the interpreter, torch and the result take some."""
    run = tmp_path / "run"
    tensors = {f"w{number:03d}": weights(number)["w"] for number in range(300)}
    for place in range(3):
        shifted = {name: value + place for name, value in tensors.items()}
        write_checkpoint(run / f"checkpoint-{100 * place}", shifted, step=100 * place, shards=300 if place < 2 else 2)
    before = sources(run)
    for verb in ("pema", "mean"):
        done = ckavg(verb, run, "--quiet", preexec=limited(64))
        assert done.returncode == 0, done.stderr
    assert sources(run) == before
    found = {
        name: value
        for file in (run / "averaged" / "mean").glob("*.safetensors")
        for name, value in load_file(file).items()
    }
    assert found.keys() == tensors.keys()
    for name, value in found.items():
        assert value.equal(tensors[name] + 1)


@pytest.mark.exhaustive
def test_more_files_of_a_result_than_may_be_open(tmp_path: Path) -> None:
    """The average, or one message."""
    run = tmp_path / "run"
    tensors = {f"w{number:03d}": weights(number)["w"] for number in range(300)}
    for step in range(2):
        write_checkpoint(run / f"checkpoint-{step}", {name: t + step for name, t in tensors.items()}, shards=300)
    before = sources(run)
    done = ckavg("mean", run, "--quiet", preexec=limited(64))
    if done.returncode:
        check_message(done, "Too many open files")
        assert not visible(run / "averaged")
    else:
        assert len(list((run / "averaged" / "mean").glob("*.safetensors"))) == 300
    assert sources(run) == before
