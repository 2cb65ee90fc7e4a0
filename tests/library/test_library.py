"""The library as it is written in its documentation: every call of it, on a small run."""

from __future__ import annotations

import ast
import dataclasses
import itertools
import math
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from safetensors.torch import load_file

import ckavg
from ckavg.errors import as_arguments
from ckavg.path.table import TensorPaths
from tests.runs import random_run, write_checkpoint, write_run

STEPS = (10, 20, 30, 40, 50)


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory with `checkpoints` and `base`, which is the current one."""
    base, *run = random_run(0, 6, torch.float32)
    write_checkpoint(tmp_path / "base", base)
    write_run(tmp_path / "checkpoints", run, STEPS)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def first_norm(directory: Path) -> float:
    return float(load_file(directory / "model.safetensors")["norm"].double().sum())


def test_the_documented_calls(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = ckavg.open_run("checkpoints", init="base", last=20)
    shown = str(run)
    assert [line.split()[0] for line in shown.splitlines()[2:8]] == ["0", "10", "20", "30", "40", "50"]
    assert "<table>" in run._repr_html_()
    assert run.warnings[0].startswith("--last 20 asks for more")
    assert all("warning: last=20 asks for more" in text for text in (shown, run._repr_html_()))

    path = ckavg.path_length(run)
    assert path.steps == (0, *STEPS)
    assert ckavg.path_length(run).bytes_read == 0
    assert path.to_pandas()["path_length"].tolist() == list(path.lengths)
    assert path.plot().axes

    weights = ckavg.effective_weights(run, ckavg.PEMA(0.15))
    assert not list(here.glob("checkpoints/averaged/*/"))
    assert math.isclose(sum(weights.values()), 1.0)

    result = ckavg.average("checkpoints", ckavg.PEMA(0.15), out="avg", progress=True)
    told = capsys.readouterr()
    assert told.out == ""
    assert "averaging" in told.err
    assert result.directory == Path("avg")

    results = ckavg.sweep(run, [ckavg.PEMA(0.1), ckavg.PEMA(0.2), ckavg.Mean()], evaluate=first_norm)
    values = {each.output.name: first_norm(each.directory) for each in results}
    assert first_norm(results.best.directory) == min(values.values())
    assert results.to_pandas()["value"].to_dict() == values
    assert results.plot().axes
    assert results[1].parameters["gamma"] == 0.2
    assert capsys.readouterr() == ("", "")

    state = ckavg.average_tensors(run, ckavg.EMA())
    written = load_file(ckavg.average(run, ckavg.EMA()).directory / "model.safetensors")
    assert state.keys() == written.keys()
    assert all(torch.equal(state[name], written[name]) and state[name].dtype == written[name].dtype for name in written)

    assert ckavg.verify_result(result, replay=True).problems == ()
    assert ckavg.inspect(run, deep=True).problems == ()
    assert ckavg.inspect("checkpoints").health is None


def test_the_weights_are_those_of_the_result(here: Path) -> None:
    for scheme in (ckavg.PEMA(0.3), ckavg.BEMA(0.5, 0.4), ckavg.Mean(), ckavg.Last()):
        result = ckavg.average("checkpoints", scheme)
        assert tuple(ckavg.effective_weights("checkpoints", scheme).values()) == result.weights


@pytest.mark.parametrize("dtype", ["source", "bfloat16", "float64"])
@pytest.mark.parametrize(
    "scheme", [ckavg.PEMA(0.2), ckavg.BEMA(), ckavg.DEMA(), ckavg.Last()], ids=lambda each: each.name
)
def test_tensors_in_memory_are_those_written(here: Path, scheme: ckavg.Scheme, dtype: str) -> None:
    state = ckavg.average_tensors("checkpoints", scheme, dtype=dtype)
    written = load_file(ckavg.average("checkpoints", scheme, dtype=dtype, out="avg").directory / "model.safetensors")
    assert state.keys() == written.keys()
    for name, tensor in written.items():
        assert state[name].dtype == tensor.dtype
        assert state[name].shape == tensor.shape
        assert state[name].reshape(-1).view(torch.uint8).tolist() == tensor.reshape(-1).view(torch.uint8).tolist()


def test_in_memory_nothing_is_written(here: Path) -> None:
    ckavg.average_tensors("checkpoints", ckavg.EMA(0.3))
    ckavg.average_tensors("checkpoints", ckavg.EMA(0.3))  # no result is there that could be in the way
    assert not (here / "checkpoints" / "averaged").exists()
    with pytest.raises(ckavg.CkavgError, match="force applies only to averages on disk"):
        ckavg.average_tensors("checkpoints", ckavg.EMA(), force=True)


def test_greatest_is_best(here: Path) -> None:
    schemes = [ckavg.Mean(), ckavg.Last()]
    least, greatest = (ckavg.sweep("checkpoints", schemes, evaluate=first_norm, goal=goal) for goal in ("min", "max"))
    assert {least.best.scheme, greatest.best.scheme} == {"mean", "last"}
    with pytest.raises(ckavg.CkavgError, match="None of the averages has a value"):
        _ = ckavg.sweep("checkpoints", [ckavg.EMA()]).best


def test_hyperparameters_by_position() -> None:
    assert ckavg.PEMA(0.2) == ckavg.PEMA(gamma=0.2)
    assert ckavg.EMA(0.3) == ckavg.EMA(gamma=0.3)
    assert ckavg.BEMA(0.2, 0.4) == ckavg.BEMA(eta=0.2, kappa=0.4)
    assert ckavg.Weights([0.5, 0.5]) == ckavg.Weights(weights=[0.5, 0.5])
    assert ckavg.PowerEMA(0.05) == ckavg.PowerEMA(sigma_rel=0.05)
    assert ckavg.MomentumEMA(0.99) == ckavg.MomentumEMA(momentum=0.99)


# --- a scheme of one's own ---


class Ends(ckavg.Scheme):
    def coefficients(self, timeline: ckavg.Timeline) -> ckavg.Coefficients:
        return ckavg.Coefficients.from_weights([0.5, *[0.0] * (len(timeline.steps) - 2), 0.5])


@dataclass(frozen=True)
class Travelled(ckavg.Scheme):
    """Weight by the distance since the checkpoint before."""

    needs_path: ClassVar[bool] = True
    power: float = 1.0

    def coefficients(self, timeline: ckavg.Timeline) -> ckavg.Coefficients:
        assert timeline.path_length is not None
        lengths = timeline.path_length
        moved = [0.0, *((after - before) ** self.power for before, after in itertools.pairwise(lengths))]
        return ckavg.Coefficients.from_weights([each / sum(moved) for each in moved])


def test_a_scheme_of_ones_own(here: Path) -> None:
    first, last = (load_file(here / "checkpoints" / f"checkpoint-{step}" / "model.safetensors") for step in (10, 50))
    result = ckavg.average("checkpoints", Ends())
    average = load_file(result.directory / "model.safetensors")
    torch.testing.assert_close(average["tiles"], (first["tiles"] + last["tiles"]) / 2)
    assert result.directory.name == "ends"
    assert ckavg.verify_result(result, replay=True).problems == ()
    assert ckavg.average("checkpoints", Ends()).seconds == result.seconds  # up to date


def test_one_with_a_path_and_a_parameter(here: Path) -> None:
    result = ckavg.average("checkpoints", Travelled(2.0))
    assert result.parameters == {"power": 2.0}
    assert ckavg.verify_result(result, replay=True).problems == ()
    assert ckavg.sweep("checkpoints", [Travelled(1.0), ckavg.PEMA()])[0].scheme == "travelled"


def bad(found: Any) -> ckavg.Scheme:
    class Bad(ckavg.Scheme):
        def coefficients(self, timeline: ckavg.Timeline) -> ckavg.Coefficients:
            made: ckavg.Coefficients = found
            return made

    return Bad()


@pytest.mark.parametrize(
    ("found", "told"),
    [
        ([0.2] * 5, "it must return Coefficients"),
        (ckavg.Coefficients("mean", 0, (None,) * 5), "rule is 'mean'"),  # type: ignore[arg-type]
        (ckavg.Coefficients("ema", 5, (None,) * 5), "start is 5"),
        (ckavg.Coefficients("ema", 0, (None, 0.5)), "they must have 5"),
        (ckavg.Coefficients("ema", 0, (None, 0.5, 0.5, 0.5, 1.5)), "a beta is 1.5"),
        (ckavg.Coefficients("ema", 0, (None, 0.5, 0.5, 0.5, None)), "a beta is None"),
        (ckavg.Coefficients("sum", 0, (None, 0.5, 0.5, 0.5, math.nan)), "a beta is nan"),
        (ckavg.Coefficients("bema", 0, (None, 0.5, 0.5, 0.5, 0.5)), "an alpha is None"),
    ],
)
def test_what_no_rule_can_take_is_refused(here: Path, found: Any, told: str) -> None:
    with pytest.raises(ckavg.CkavgError, match=told):
        ckavg.average("checkpoints", bad(found))


def test_a_scheme_that_changed_is_not_up_to_date(here: Path) -> None:
    ckavg.average("checkpoints", bad(ckavg.Coefficients.from_weights([0.2] * 5)))
    with pytest.raises(ckavg.CkavgError, match="force=True"):
        ckavg.average("checkpoints", bad(ckavg.Coefficients.from_weights([0.5, 0.5, 0.0, 0.0, 0.0])))


# --- what is shown ---


def longer(run: ckavg.Run, count: int) -> ckavg.Run:
    checkpoints = tuple(dataclasses.replace(run.checkpoints[0], step=step) for step in range(count))
    return dataclasses.replace(run, checkpoints=checkpoints)


def test_reprs_are_short(here: Path) -> None:
    run = ckavg.open_run("checkpoints")
    path, count = ckavg.path_length(run), 10_000
    steps, tensors = (
        tuple(range(count)),
        {f"{name}.{number}": each for name, each in path.tensors.items() for number in range(99)},
    )
    long_path = dataclasses.replace(path, steps=steps, tensors=TensorPaths.of(tensors))
    result = ckavg.average(run, ckavg.Mean())
    numbers = (0.1,) * count
    long_result = dataclasses.replace(result, steps=steps, betas=numbers, weights=numbers, inputs=result.inputs * 2_000)
    sweep = ckavg.Sweep((long_result,) * 100, "min", long_path)
    shown = [
        longer(run, count), long_path, long_result, sweep, ckavg.Timeline(steps, numbers),
        ckavg.Coefficients("ema", 0, numbers), ckavg.plan_average(run, ckavg.EMA(0.4)),
        ckavg.verify_result(result), ckavg.inspect(run, deep=True), run.last,
        ckavg.inspect("checkpoints", steps=[*STEPS]).run, dataclasses.replace(run.selection, steps=steps),
    ]  # fmt: skip
    for value in shown:
        assert len(repr(value)) < 2_000, type(value)
    table = str(longer(run, count)).splitlines()
    assert len(table) < 20
    assert "9990 more" in "\n".join(table)
    assert len(longer(run, count)._repr_html_()) < 4_000


def nothing_there(here: Path) -> object:
    return ckavg.average("checkpoints", ckavg.EMA(0.3), dtype="float32", out="checkpoints/checkpoint-10")


def exists(here: Path) -> object:
    (here / "avg").mkdir()
    (here / "avg" / "ckavg.json").write_text("{}")
    return ckavg.average("checkpoints", ckavg.EMA(0.3), out="avg")


REFUSED: dict[str, Callable[[Path], object]] = {
    "out in a checkpoint": nothing_there,
    "result is there": exists,
    "no goal": lambda _: ckavg.open_run("checkpoints", best=2),
    "no init": lambda _: ckavg.open_run("checkpoints", init="nowhere"),
    "too few": lambda _: ckavg.open_run("checkpoints", steps=[10]),
    "max disk": lambda _: ckavg.open_run("checkpoints", max_disk="1GB"),
    "revisions": lambda _: ckavg.open_run("checkpoints", revisions=["a*"]),
    "all weight on the anchor": lambda _: ckavg.average("checkpoints", ckavg.Weights([1, 0, 0, 0, 0])),
    "weights": lambda _: ckavg.average("checkpoints", ckavg.Weights([1, 1, 1, 1, 1])),
    "number of weights": lambda _: ckavg.average("checkpoints", ckavg.Weights([1, 1])),
    "lag": lambda _: ckavg.average("checkpoints", ckavg.BEMA(multiplier=-1.0)),
    "device": lambda _: ckavg.average("checkpoints", ckavg.EMA(), device="cuda:99"),
    "rank": lambda _: ckavg.average("checkpoints", ckavg.EMA(), rank=4),
    "lora": lambda _: ckavg.average("checkpoints", ckavg.EMA(), lora="product"),
    "branch": lambda _: ckavg.push("checkpoints", "me/model", revision="a b"),
    "pull request": lambda _: ckavg.push("checkpoints", "me/model", revision="a", create_pr=True),
}
COMMANDS = re.compile(r"(?:ckavg|hf|python) .*")


@pytest.mark.parametrize("name", REFUSED)
def test_messages_name_arguments(here: Path, name: str) -> None:
    with pytest.raises(ckavg.CkavgError) as met:
        REFUSED[name](here)
    assert not re.search(r"(?<!\S)--[a-z]", COMMANDS.sub("", str(met.value))), str(met.value)


def test_the_command_names_options(here: Path) -> None:
    with pytest.raises(ckavg.CkavgError) as met:
        exists(here)
    assert "force=True" in str(met.value)
    assert "--force" in met.value.as_typed
    assert "--out" in met.value.hint


# --- what may be missing, and what is old ---


@pytest.mark.parametrize(("library", "call"), [("pandas", "to_pandas"), ("matplotlib.figure", "plot")])
def test_what_is_not_installed(here: Path, monkeypatch: pytest.MonkeyPatch, library: str, call: str) -> None:
    sweep = ckavg.sweep("checkpoints", [ckavg.PEMA()])
    monkeypatch.setitem(sys.modules, library, None)
    values: Sequence[object] = (sweep, sweep.path)
    for value in values:
        with pytest.raises(ckavg.CkavgError, match="not installed"):
            getattr(value, call)()


@pytest.mark.parametrize(("old", "new"), [("measure_path", "path_length"), ("push_result", "push")])
def test_old_names_warn(old: str, new: str) -> None:
    with pytest.warns(DeprecationWarning, match=f"ckavg.{new}"):
        assert getattr(ckavg, old) is getattr(ckavg, new)
    assert old not in ckavg.__all__


# --- the documentation ---

PACKAGE = Path(ckavg.__file__).parent
DOCUMENT = PACKAGE.parent / "docs" / "library.md"
OPTION = re.compile(r"(?<!\S)--[a-z][a-z0-9-]*(?![\w-])")


def test_the_page_runs(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    blocks = re.findall(r"```python\n(.*?)```", DOCUMENT.read_text(encoding="utf-8"), re.DOTALL)
    names: dict[str, Any] = {"my_loss": first_norm, "__name__": "page"}
    for block in blocks:
        exec(compile(block, DOCUMENT, "exec"), names)
    assert names["result"].scheme == "ends"
    assert names["results"].best.evaluation is not None
    assert capsys.readouterr().out.startswith("Run('checkpoints', 6 checkpoints, steps 0 to 50)\n")


def texts_in(path: Path) -> list[str]:
    """All texts of a module but docstrings, with a number in each place that is filled in."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    alone = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    formatted = [node for node in ast.walk(tree) if isinstance(node, ast.JoinedStr)]
    alone |= {id(part) for node in formatted for part in node.values}
    texts = [
        "".join(str(getattr(each, "value", "7")) if isinstance(each, ast.Constant) else "7" for each in node.values)
        for node in formatted
    ]
    plain = [node for node in ast.walk(tree) if isinstance(node, ast.Constant) and id(node) not in alone]
    return texts + [node.value for node in plain if isinstance(node.value, str)]


def test_no_text_of_the_library_keeps_an_option() -> None:
    below = [path for path in PACKAGE.rglob("*.py") if path.relative_to(PACKAGE).parts[0] != "cli"]
    texts = [text for path in below for text in texts_in(path) if OPTION.search(text) and "_" not in text]
    assert len(texts) > 80
    left = [text for text in texts if OPTION.search(COMMANDS.sub("", as_arguments(text)))]
    assert not left


@pytest.mark.parametrize(
    ("typed", "written"),
    [
        ("--best and --metric require each other.", "`best` and `metric` require each other."),
        ("Use --device cpu.", "Use device='cpu'."),
        ("Stop before it with --to-step 20.", "Stop before it with to_step=20."),
        ("Leave it out: --path-exclude lm_head.weight", "Leave it out: path_exclude=['lm_head.weight']"),
        ("Choose: --revisions 'step*'", "Choose: revisions=['step*']"),
        ("--init /a/b does not exist.", "`init` /a/b does not exist."),
        ("Then: hf auth login --force", "Then: hf auth login --force"),
        ("See it with: ckavg verify x --replay", "See it with: ckavg verify x --replay"),
        ("Try --sample 0.1 and --weights 0.1,0.9", "Try sample=0.1 and weights='0.1,0.9'"),
        ("run--last is a name", "run--last is a name"),
        ("python z.py --safe_serialization", "python z.py --safe_serialization"),
    ],
)
def test_options_as_arguments(typed: str, written: str) -> None:
    assert as_arguments(typed) == written
