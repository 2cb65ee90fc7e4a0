"""The offline average of a run's checkpoints is what `trl.BEMACallback` formed online, while the run was trained."""

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoTokenizer
from trl import BEMACallback

import ckavg
from tests.cli.runner import run_cli

# Both sides do at most eight updates in float32 on weights of size 1 or so, each with a few roundings of 6e-8.
TOLERANCE = 5e-6


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """A run with the callback, and the options with which ckavg repeats it; what is not stated has one default."""

    callback: dict[str, float]
    options: dict[str, float] = field(default_factory=dict)
    steps: int = 40
    save_steps: int = 10
    visited: tuple[int, ...] = (0, 10, 20, 30, 40)
    every: int | None = None
    tied: bool = True
    anchor: bool = True


@dataclass(frozen=True, slots=True)
class Trained:
    case: Case
    run: Path

    @property
    def theirs(self) -> dict[str, torch.Tensor]:
        tensors: dict[str, torch.Tensor] = load_file(self.run / "bema" / "model.safetensors")
        return tensors

    @property
    def last(self) -> dict[str, torch.Tensor]:
        tensors: dict[str, torch.Tensor] = load_file(self.run / f"checkpoint-{self.case.steps}" / "model.safetensors")
        return tensors

    @property
    def init(self) -> Path | None:
        return None if self.case.anchor else self.run.with_name("init")


CASES = {
    "defaults": Case(callback={"update_freq": 10}),
    "untied, init apart, every setting": Case(
        callback={"update_freq": 5, "bias_power": 0.4, "ema_power": 0.7, "multiplier": 0.5, "lag": 4},
        options={"eta": 0.4, "kappa": 0.7, "multiplier": 0.5, "lag": 4},
        save_steps=5,
        visited=(0, 5, 10, 15, 20, 25, 30, 35, 40),
        tied=False,
        anchor=False,
    ),
    "strongest correction": Case(
        callback={"update_freq": 10, "bias_power": 0.0, "ema_power": 0.3}, options={"eta": 0.0, "kappa": 0.3}
    ),
    "burn-in": Case(
        callback={"update_freq": 10, "update_after": 20, "bias_power": 0.5}, options={"burn_in": 20, "eta": 0.5}
    ),
    # The Trainer saves the last step whether or not it is a multiple of save_steps; no update falls on it.
    "saved more often, odd burn-in": Case(
        callback={"update_freq": 10, "update_after": 15},
        options={"burn_in": 15},
        steps=48,
        save_steps=5,
        visited=(0, 15, 25, 35, 45),
        every=10,
    ),
}


@pytest.fixture(scope="module", params=list(CASES))
def trained(request: pytest.FixtureRequest, train: Callable[..., Path]) -> Trained:
    case = CASES[request.param]
    callback = BEMACallback(**case.callback)
    run = train(steps=case.steps, save_steps=case.save_steps, callbacks=[callback], tied=case.tied, anchor=case.anchor)
    return Trained(case, run)


@pytest.fixture(scope="module")
def result(trained: Trained) -> ckavg.Averaged:
    """What the library makes of the run."""
    case = trained.case
    scheme = ckavg.BEMA(**case.options)  # type: ignore[arg-type]
    run = ckavg.open_run(trained.run, init=trained.init, every=case.every, every_from=scheme.every_from)
    return ckavg.average(run, scheme, out=trained.run.with_name("library"))


def weights(result: ckavg.Averaged) -> dict[str, torch.Tensor]:
    tensors: dict[str, torch.Tensor] = load_file(result.directory / "model.safetensors")
    return tensors


def distance(mine: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> float:
    assert mine.keys() == theirs.keys()
    return max((mine[name].double() - theirs[name].double()).abs().max().item() for name in mine)


def test_it_equals_the_callback(trained: Trained, result: ckavg.Averaged) -> None:
    assert result.steps == trained.case.visited
    mine = weights(result)
    assert {tensor.dtype for tensor in mine.values()} == {torch.float32}
    assert ("lm_head.weight" in mine) == (not trained.case.tied)
    assert distance(mine, trained.theirs) <= TOLERANCE


def test_the_average_is_far_from_the_last_checkpoint(trained: Trained, result: ckavg.Averaged) -> None:
    # Else the comparison with the callback would show nothing.
    assert distance(trained.theirs, trained.last) > 1000 * TOLERANCE
    assert distance(weights(result), trained.last) > 1000 * TOLERANCE


def test_it_loads_as_the_callbacks_model_does(
    result: ckavg.Averaged, load: Callable[[Path], Any], warned: list[str]
) -> None:
    load(result.directory)
    text = "for x in y: pass"
    tokenizer = AutoTokenizer.from_pretrained(result.directory)
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    assert warned == []


def test_the_command_line_writes_the_same_bytes(trained: Trained, result: ckavg.Averaged, tmp_path: Path) -> None:
    case = trained.case
    options: dict[str, object] = {name.replace("_", "-"): value for name, value in case.options.items()}
    options |= {name: value for name, value in (("every", case.every), ("init", trained.init)) if value is not None}
    words = [part for name, value in options.items() for part in (f"--{name}", str(value))]
    done = run_cli("bema", trained.run, "--json", "--out", tmp_path / "out", *words)
    assert tuple(json.loads(done.stdout)["steps"]) == case.visited
    theirs = (result.directory / "model.safetensors").read_bytes()
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == theirs
