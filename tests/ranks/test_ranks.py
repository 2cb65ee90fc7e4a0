"""Several processes of one job: the same bytes as one process, one output, and one end."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from ckavg.engine.blocks import BLOCK
from ckavg.output.output_path import LOCAL
from tests.cli.runner import run_cli
from tests.exhaustive import all_but
from tests.ranks.launch import MAIN, SECONDS, Job, Ran, environment, run_jobs, torchrun, torchrun_on
from tests.runs import write_run

STEPS = (0, 10, 20, 30)
NEXT_READ = """
import os, signal
from ckavg.engine.tiles import TileReader
load, calls = TileReader.load, iter(range(10**9))
def sabotaged(self, index, name, start, out):
    if next(calls) == 5:
        {act}
    return load(self, index, name, start, out)
TileReader.load = sabotaged
"""
"""In the middle of a pass."""

KILLED = NEXT_READ.format(act="os.kill(os.getpid(), signal.SIGKILL)")
KILLED_AT_A_BLOCK = """
import os, signal
from ckavg.engine.tiles import TileReader
begin, calls = TileReader.begin, iter(range(10**9))
def sabotaged(self, on_miss):
    if next(calls) == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    begin(self, on_miss)
TileReader.begin = sabotaged
"""
"""Compiled passes read by themselves."""

STOPPED = NEXT_READ.format(act="os.kill(os.getpid(), signal.SIGTERM)")
BROKEN = NEXT_READ.format(act="1 / 0")
FULL_DISK = """
import errno, os
from ckavg.output import weight_files
def full(handle, data, offset):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
weight_files._write_at = full
"""
LIBRARY = """
import ckavg
run = ckavg.open_run({source!r})
with ckavg.all_ranks() as ranks:
    path = ckavg.path_length(run, ranks=ranks)
    result = ckavg.average(run, ckavg.PEMA(gamma=0.1), ranks=ranks)
assert result.path_length == path.lengths
assert result.directory.is_dir()
"""


def weights() -> list[dict[str, torch.Tensor]]:
    """A few blocks in one tensor, and some of other sizes and dtypes."""
    generator = torch.Generator().manual_seed(0)
    sizes = {"large": 2 * BLOCK + 77_777, "bias": 130, "other": BLOCK // 2, "scalar": 1}
    theta = {name: 0.05 * torch.randn(size, generator=generator) for name, size in sizes.items()}
    run = []
    for place in range(len(STEPS)):
        for tensor in theta.values():
            tensor += 0.01 * torch.randn(tensor.shape, generator=generator)
        run.append(
            {name: tensor.to(torch.float32 if name == "other" else torch.bfloat16) for name, tensor in theta.items()}
            | {"ids": torch.arange(10) + place}
        )
    return run


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_run(tmp_path_factory.mktemp("original") / "run", weights(), STEPS, shards=(1, 2))


def fresh(original: Path, place: Path) -> Path:
    """A copy of the run without results or cached path."""
    place.mkdir(parents=True)
    for checkpoint in original.glob("checkpoint-*"):
        (place / checkpoint.name).symlink_to(checkpoint)
    return place


def files_of(source: Path) -> dict[str, Any]:
    """What was written into a run, without what tells the time or counts the single bytes that are read twice."""
    found: dict[str, Any] = {}
    for folder, _, names in os.walk(source / "averaged"):
        for path in (Path(folder) / name for name in names):
            data = path.read_bytes().replace(str(source).encode(), b"SOURCE")
            found[str(path.relative_to(source))] = data
            if path.name == "ckavg.json":
                found[str(path.relative_to(source))] = without_time(json.loads(data))
            if path.name == LOCAL:  # which knows the very files that were read and written
                made = json.loads(data)["made"]
                found[str(path.relative_to(source))] = (made["recipe"], made["side_files"])
    return found


def without_time(told: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in told.items() if key != "seconds"}


COMMANDS = (
    ("pema", "--snapshot-every", 20, "--json"),
    ("sweep", "pema:gamma=0.1,0.2", "pema:every=20", "bema", "mean:last=2", "--json"),
    ("path", "--json"),
    ("path", "--sample", 0.05, "--json"),
)


def command(words: tuple[object, ...], source: Path) -> list[object]:
    return [words[0], source, *words[1:]]


@pytest.fixture(scope="module")
def plain(original: Path, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What one process by itself writes and prints, for each command."""
    written = []
    for words in COMMANDS:
        source = fresh(original, tmp_path_factory.mktemp("plain") / "run")
        done = run_cli(*map(str, command(words, source)))
        assert done.exit_code == 0
        written.append(files_of(source) | {"stdout": done.stdout.replace(str(source), "SOURCE")})
    return written


@pytest.mark.parametrize("processes", all_but((2,), [2, 3]))
def test_every_byte_is_that_of_a_single_process(
    original: Path, plain: list[dict[str, Any]], tmp_path: Path, processes: int
) -> None:
    sources = [fresh(original, tmp_path / str(number) / "run") for number in range(len(COMMANDS))]
    jobs = [Job(command(words, source)) for words, source in zip(COMMANDS, sources, strict=True)]
    from_python = fresh(original, tmp_path / "python" / "run")
    code = dict.fromkeys(range(processes), LIBRARY.format(source=str(from_python)))
    *of_commands, of_python = run_jobs(tmp_path, processes, *jobs, Job(["--version"], code))

    for source, ran, alone in zip(sources, of_commands, plain, strict=True):
        assert files_of(source) == {name: data for name, data in alone.items() if name != "stdout"}
        told, told_alone = (averages_in(text, source) for text in (ran.first_out, alone["stdout"]))
        assert [without_time(each) for each in told] == [without_time(each) for each in told_alone]

    assert of_python.first_out.startswith("ckavg ")
    weights = "averaged/pema-gamma0.1/model-00001-of-00002.safetensors"
    assert files_of(from_python)[weights] == plain[1][weights]


def averages_in(stdout: str, source: Path) -> list[dict[str, Any]]:
    """The JSON objects of all averages, or the one of the path."""
    told = json.loads(stdout.replace(str(source), "SOURCE"))
    averages: list[dict[str, Any]] = told.get("averages", [told])
    return averages


# --- errors ---


@dataclass
class Case:
    """A job that cannot succeed: its status by rank, what it says, and whether what was finished stays."""

    status: list[int]
    says: str
    words: Sequence[object] = ("bema", "--snapshot-every", 20)
    before: dict[int, str] = field(default_factory=dict)
    other: Sequence[object] = ()
    speaker: int = 0
    stays: bool = False


SOON = ("--rank-timeout", 3)
CASES = {
    "nan": Case([1, 1], r"error: step 20: tensor 'large' holds NaN or infinity"),
    "nan in pass 1": Case([1, 1], r"error: step 20: tensor 'large' holds NaN or infinity", ["pema"]),
    "full disk": Case(
        [1, 1], r"error: .* cannot be written: No space left on device", before={1: FULL_DISK}, stays=True
    ),
    "verbose": Case(
        [1, 1], r"In another process:\nTraceback", ["bema", "--verbose"], before={1: FULL_DISK}, stays=True
    ),
    "killed": Case([1, -9], r"error: Rank 1 on .* disconnected", before={1: KILLED}, stays=True),
    "first killed": Case([-9, 1], r"error: Rank 0 on .* disconnected", before={0: KILLED}, speaker=1, stays=True),
    "interrupted": Case([130, 130], r"interrupted: No result was left in part", before={1: STOPPED}, stays=True),
    "bug": Case([1, 1], r"ZeroDivisionError: division by zero\nIn another process:", before={1: BROKEN}),
    "setting": Case([2, 2], r"error: bema: eta is -1", ["bema", "--eta", -1]),
    "usage": Case([2, 2], r"error: ckavg bema has no option --no-such", ["bema", "--no-such"]),
    "other options": Case(
        [1, 1],
        r"error: Rank 1 on .* has other options than rank 0",
        ["bema", "--out", "OUT"],
        other=["bema", "--out", "OUT", "--eta", 0.3],
    ),
    "other run": Case(
        [1, 1],
        r"error: Rank 1 on .* has other checkpoints than rank 0",
        ["bema", "--out", "OUT"],
        other=["bema", "--out", "OUT", "--last", 3],
    ),
    "other place": Case(
        [1, 1],
        r"error: Rank 0 of 2 waited 3 s for rank 1, which did not join in .*/\.bema-eta0\.2\.ckavg-partial on ",
        ["bema", *SOON],
        other=["bema", *SOON, "--out", "OUT"],
    ),
    "no run": Case(
        [1, 1],
        r"error: Rank 0 of 2 waited 3 s for rank 1, which did not join in ",
        ["bema", *SOON],
        other=["bema", *SOON],
    ),
}
ALSO_SAYS = {
    "other place": r"error: Rank 1 of 2 waited 3 s for rank 0, which did not join in .*/\.OUT",
    "no run": r"error: .*nothing-there does not exist",
}
"""What the other process says by itself, since it has not come to where the first is."""


@pytest.fixture(scope="module")
def ended(original: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, Ran]]:
    """Where each case was tried, and what came of it."""
    root = tmp_path_factory.mktemp("ended")
    sources = {name: fresh(original, root / name / "run") for name in CASES}
    for name in ("nan", "nan in pass 1"):
        put_nan_into(sources[name])
    jobs = []
    for name, case in CASES.items():
        own, other = (command(tuple(words), sources[name]) for words in (case.words, case.other or case.words))
        if name == "no run":
            other[1] = root / "nothing-there"
        out = root / name / "OUT"
        own, other = ([out if word == "OUT" else word for word in words] for words in (own, other))
        jobs.append(Job(own, case.before, {1: other}))
    again = sources["first killed"]
    ran = run_jobs(
        root, 2, *jobs, Job(["bema", again]), Job(["bema", again]), Job(["bema", again, "--dtype", "bfloat16"])
    )
    cases = dict(zip(CASES, zip(sources.values(), ran, strict=False), strict=True))
    more = ("after first killed", "up to date", "existing")
    return cases | {name: (again, each) for name, each in zip(more, ran[-3:], strict=True)}


def put_nan_into(source: Path) -> None:
    broken = source / "checkpoint-20"
    original = broken.resolve()
    broken.unlink()
    shutil.copytree(original, broken)
    for file in broken.glob("*.safetensors"):
        weights = load_file(file)
        if "large" in weights:
            weights["large"][-1] = torch.nan
            save_file(weights, file, {"format": "pt"})


@pytest.mark.parametrize("name", CASES)
def test_one_message_one_status_and_nothing_left(ended: dict[str, tuple[Path, Ran]], name: str) -> None:
    (source, ran), case = ended[name], CASES[name]
    assert ran.status == case.status
    assert re.search(case.says, ran.err[case.speaker])
    if name in ALSO_SAYS:
        assert re.search(ALSO_SAYS[name], ran.err[1])
    else:
        assert ran.err[1] == "" or case.speaker == 1
    messages = [line for err in ran.err for line in err.splitlines() if line.startswith(("error:", "interrupted:"))]
    assert len(messages) == (name != "bug") + (name in ALSO_SAYS)
    assert ("Traceback" in "".join(ran.err)) == (name in ("bug", "verbose"))
    left = sorted(path.name for path in source.iterdir() if path.name != "averaged")
    assert left == [f"checkpoint-{step}" for step in STEPS]
    kept = [] if name == "first killed" else [path.name for path in source.glob("averaged/*")]
    assert kept in ([], [".bema-eta0.2.ckavg-partial"] if case.stays else [])


def test_what_a_killed_process_left_is_in_nobodys_way(ended: dict[str, tuple[Path, Ran]]) -> None:
    source, ran = ended["after first killed"]
    assert ran.status == [0, 0]
    assert [path.name for path in (source / "averaged").iterdir()] == ["bema-eta0.2"]


def test_a_result_that_is_up_to_date_is_so_for_all(ended: dict[str, tuple[Path, Ran]]) -> None:
    source, ran = ended["up to date"]
    assert ran.status == [0, 0]
    assert ran.out[0].startswith(f"{source / 'averaged' / 'bema-eta0.2'} is up to date\n")
    assert ran.out[1] == ""


def test_a_result_that_is_there_is_refused_once(ended: dict[str, tuple[Path, Ran]]) -> None:
    source, ran = ended["existing"]
    assert ran.status == [1, 1]
    assert ran.err[0].count("error: ") == ran.err[0].count("already holds a result") == 1
    assert ran.err[1] == ""
    assert [path.name for path in (source / "averaged").iterdir()] == ["bema-eta0.2"]


# --- torchrun itself ---


def long_run(place: Path) -> Path:
    """13 GB to read, in 32 MB."""
    (place / "checkpoint-0").mkdir(parents=True)
    save_file({"w": torch.randn(1 << 24).bfloat16()}, place / "checkpoint-0" / "model.safetensors")
    for step in range(1, 400):
        (place / f"checkpoint-{step}").symlink_to("checkpoint-0")
    return place


@pytest.mark.exhaustive
def test_a_killed_process_ends_the_job_of_torchrun(tmp_path: Path) -> None:
    """torchrun tells the others to stop while they are giving up already."""
    source = long_run(tmp_path / "run")
    before = sorted(path.name for path in source.iterdir())
    script = tmp_path / "killed.py"
    script.write_text(f"import os\nif os.environ['RANK'] == '1':\n    exec({KILLED_AT_A_BLOCK!r}, {{}})\n" + MAIN)
    ran = subprocess.run(
        torchrun(2, script, "ema", source), capture_output=True, text=True, timeout=SECONDS, env=environment()
    )
    assert ran.returncode
    assert len(re.findall(r"^error: Rank 1 on .* disconnected", ran.stderr, re.MULTILINE)) == 1
    assert "interrupted:" not in ran.stderr
    assert sorted(path.name for path in source.iterdir()) == before


@pytest.mark.parametrize("sent", all_but((signal.SIGTERM,), [signal.SIGTERM, signal.SIGINT]))
def test_torchrun_is_told_to_stop(tmp_path: Path, sent: signal.Signals) -> None:
    source = long_run(tmp_path / "run")
    before = sorted(path.name for path in source.iterdir())
    process = subprocess.Popen(
        torchrun(2, "-m", "ckavg", "ema", source), stderr=subprocess.PIPE, text=True, env=environment()
    )
    assert process.stderr is not None
    said = ""
    while "averaging: " not in said:
        said += process.stderr.readline()
    process.send_signal(sent)
    said += process.communicate(timeout=SECONDS)[1]
    assert process.returncode
    assert said.count("interrupted: No result was left in part") == 1
    assert "error: Rank" not in said
    assert sorted(path.name for path in source.iterdir()) == before


# --- two machines ---


@pytest.fixture
def two_machines() -> Iterator[tuple[list[list[str]], str]]:
    """Two network namespaces with a cable between them: the words before a command in each, the first one's address."""
    names = [f"ckavg-{os.getpid()}-{end}" for end in "ab"]
    cables = [f"ckavg{os.getpid() % 10**6}{end}" for end in "ab"]
    made = (
        "ip",
        "link",
        "add",
        cables[0],
        "netns",
        names[0],
        "type",
        "veth",
        "peer",
        "name",
        cables[1],
        "netns",
        names[1],
    )

    def system(*words: str) -> None:
        subprocess.run(words, check=True, capture_output=True, text=True)

    with ExitStack() as undo:
        try:
            for name in names:
                system("ip", "netns", "add", name)
                undo.callback(system, "ip", "netns", "del", name)
            system(*made)
            for number, (name, cable) in enumerate(zip(names, cables, strict=True), start=1):
                system("ip", "-n", name, "address", "add", f"10.231.7.{number}/24", "dev", cable)
                for device in (cable, "lo"):
                    system("ip", "-n", name, "link", "set", device, "up")
        except (OSError, subprocess.CalledProcessError) as error:
            pytest.skip(f"network namespaces cannot be made here: {getattr(error, 'stderr', '') or error}")
        yield [["ip", "netns", "exec", name] for name in names], "10.231.7.1"


def test_two_machines(
    two_machines: tuple[list[list[str]], str], original: Path, plain: list[dict[str, Any]], tmp_path: Path
) -> None:
    """They share a directory and nothing else; the name of the machine does not lead from one to the other."""
    source = fresh(original, tmp_path / "run")
    machines, address = two_machines
    words = "-m", "ckavg", *command(COMMANDS[0], source)
    processes = [
        subprocess.Popen(
            [*machine, *torchrun_on(node, 2, address, *words)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=environment(),
        )
        for node, machine in enumerate(machines)
    ]
    said = [process.communicate(timeout=SECONDS) for process in processes]
    assert [process.returncode for process in processes] == [0, 0], said
    assert said[1][0] == ""
    assert json.loads(said[0][0])["scheme"] == "pema"
    assert files_of(source) == {name: data for name, data in plain[0].items() if name != "stdout"}
