"""Advice, and the runs that get it."""

from __future__ import annotations

import json
import math
import re
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

import ckavg
from ckavg.averaging import advice
from ckavg.averaging.rules import effective_weights
from ckavg.checkpoints.trainer_log import Course, trend_of
from ckavg.path.table import PathLength, TensorPath, TensorPaths
from ckavg.schemes import BEMA, DEMA, EMA, OUEMA, PEMA, Last, Mean, MomentumEMA, Scheme, Timeline, Weights
from tests.runs import write_run

WEIGHTS = {"w": torch.arange(6.0)}


def path(*distances: float, every: int = 100) -> PathLength:
    """A path of one tensor of 10 elements with σ = 1."""
    steps = tuple(range(0, every * len(distances) + 1, every))
    return PathLength(steps, TensorPaths.of({"w": TensorPath(10, 1.0, distances)}), "exclude", 0)


@pytest.mark.parametrize(
    ("distances", "told"),
    [
        ((0.5, 0.5), "PEMA averages little here: T·ℓ(T)² = 2 with T = 200 steps and ℓ(T) = 0.1, where"),
        ((5.0, 5.0), ""),
        ((20.0, 20.0), ""),
        ((30.0, 30.0), "The path is long: ℓ(T) = 6"),
        ((5.0, 0.0, 5.0), "Steps 100 and 200 hold identical weights"),
        ((0.0, 0.0), "Nothing moved"),
    ],
)
def test_path(distances: tuple[float, ...], told: str) -> None:
    said = advice.about_path(path(*distances), ())
    assert len(said) == bool(told)
    assert not told or said[0].startswith(told)


@pytest.mark.parametrize(
    ("length", "every", "least"),
    [(0.1, 100, 0.85), (0.1, 1_390, 0.6), (0.1, 1_420, None), (0.125, 890, 0.6), (0.125, 910, None), (0.9, 10, 0.65)],
)
def test_whether_a_path_is_short_is_a_matter_of_its_last_beta(length: float, every: int, least: float | None) -> None:
    """The threshold is a quarter of the length 0.5 in the 1800 steps of the paper; a longer run may be shorter."""
    measured = path(5 * length, 5 * length, every=every)
    assert measured.lengths[-1] == pytest.approx(length)
    betas = PEMA().coefficients(Timeline(measured.steps, measured.lengths)).betas
    said = advice.about_path(measured, ())
    assert bool(said) == (least is not None)
    if least is not None:
        assert f"At γ = 0.15 no β is below {least}, so" in said[0]
        assert betas[-1] == min(beta for beta in betas if beta is not None) == pytest.approx(least, rel=0.01)


def test_nothing_counts() -> None:
    empty = PathLength((0, 1), TensorPaths.of({"w": TensorPath(10, 0.0, (1.0,))}), "exclude", 0)
    assert [line.split(",")[0] for line in advice.about_path(empty, ("b",))] == [
        "No spread at the anchor (σ = 0)",
        "Left out of the path length: 1 tensor (b).",
        "No tensor counts in the path length",
    ]


@pytest.mark.parametrize(("step", "with_init", "said"), [(0, False, 0), (400, False, 1), (400, True, 0)])
def test_anchor(step: int, with_init: bool, said: int) -> None:
    assert len(advice.about_anchor(step, ["w"], with_init=with_init)) == said


def test_an_average_that_ends_where_it_begins() -> None:
    steps = (0, 100, 200)
    late, last = BEMA(burn_in=150), Last()
    assert len(advice.about_coefficients(late, late.coefficients(Timeline(steps)), steps)) == 1
    assert advice.about_coefficients(last, last.coefficients(Timeline(steps)), steps) == ()


def test_running_statistics_and_what_is_not_finite() -> None:
    steps = (0, 100, 200)
    for scheme, said in ((BEMA(), 1), (DEMA(), 1), (EMA(), 0), (BEMA(eta=math.inf), 0)):
        coefficients = scheme.coefficients(Timeline(steps))
        assert len(advice.about_coefficients(scheme, coefficients.sparing(["bn.running_var"]), steps)) == said
        assert advice.about_coefficients(scheme, coefficients.sparing([]), steps) == ()
    assert "in all checkpoints" in advice.about_infinite(["mask"])[0]
    assert "1,000 numbers" in advice.about_nonfinite(1000)[0]
    assert advice.about_infinite([]) == advice.about_nonfinite(0) == ()


# --- learning rate ---


def decaying(steps: int, *, begin: int, floor: float = 0.0, peak: float = 2e-5) -> tuple[tuple[int, float], ...]:
    """Rates logged every 10 steps: warmup over 100 steps, the peak, then from `begin` a line to `floor` of the peak."""

    def rate(step: int) -> float:
        if step < 100:
            return step / 100
        return 1 - (1 - floor) * max(0, step - begin) / (steps - begin)

    return tuple((step, peak * rate(step)) for step in range(10, steps + 1, 10))


STEPS = tuple(range(100, 1801, 100))


@pytest.mark.parametrize(
    "rates",
    [
        (),
        decaying(1800, begin=100, floor=1.0),
        decaying(1800, begin=100, floor=0.26),
        tuple((step, 0.0) for step in range(10, 1801, 10)),
        tuple((step, step / 1800) for step in range(10, 1801, 10)),
        ((2000, 1.0), (2010, 0.0)),
    ],
    ids=("unknown", "constant", "above a quarter", "zero", "rising", "later than the run"),
)
def test_a_learning_rate_that_says_nothing(rates: tuple[tuple[int, float], ...]) -> None:
    assert advice.about_learning_rate(STEPS, rates) == ()


def test_a_short_decay_has_a_part_before_it() -> None:
    (told,) = advice.about_learning_rate(STEPS, decaying(1800, begin=1500))
    assert told.startswith("The learning rate had fallen to 0 by step 1800, 0% of its peak of 2e-05:")
    # Two thirds of the rate are left at 1600, one third at 1700.
    assert told.endswith("Worth comparing: an average that ends while the rate was still high, with --to-step 1600.")


def test_a_long_decay_is_no_reason_to_throw_half_the_run_away() -> None:
    (told,) = advice.about_learning_rate(STEPS, decaying(1800, begin=100, floor=0.249))
    assert ", 25% of its peak of 2e-05:" in told
    assert told.endswith("Compare the result with the last checkpoint.")


def test_a_part_before_the_decay_is_three_quarters_of_the_training() -> None:
    def told(begin: int) -> str:
        (line,) = advice.about_learning_rate(sorted((*STEPS, 1350)), decaying(1800, begin=begin))
        return line.split(": ")[-1]

    # Half the rate is left at (begin + 1800) / 2.
    assert told(900).endswith("--to-step 1350.")
    assert "--to-step" not in told(880)


@pytest.mark.parametrize("steps", [(1700, 1800), (1600, 1700, 1800)], ids=("none before", "one before"))
def test_what_lies_before_the_decay_must_be_an_average(steps: tuple[int, ...]) -> None:
    (told,) = advice.about_learning_rate(steps, decaying(1800, begin=1500))
    assert told.endswith("Compare the result with the last checkpoint.")


def test_where_nothing_was_logged_the_last_entry_counts() -> None:
    rates = ((500, 1e-5), (1000, 1e-5), (1500, 1e-6))
    assert advice.about_learning_rate((490, 999, 1499), rates) == ()
    (told,) = advice.about_learning_rate((490, 1000, 1100, 1499, 1510), rates)
    assert "1e-06 by step 1510, 10% of its peak of 1e-05" in told
    assert told.endswith("--to-step 1499.")


# --- interval ---


def interval(scheme: Scheme, count: int, apart: int, *, begin: int = 0, with_init: bool = False) -> tuple[str, ...]:
    """The advice for `count` updates at this interval."""
    steps = (0,) * with_init + tuple(range(begin, begin + apart * (count + 1 - with_init), apart))
    return advice.about_interval(steps, scheme, with_init=with_init)


@pytest.mark.parametrize(
    ("scheme", "count", "apart", "told"),
    [
        # The papers' own settings, the demo's, and Trainer's default.
        (PEMA(), 36, 50, False),
        (PEMA(), 6, 300, False),
        (BEMA(), 18, 400, False),
        (PEMA(), 16, 40, False),
        (BEMA(), 16, 40, False),
        (PEMA(), 10, 500, False),
        # Far apart.
        (PEMA(), 5, 401, True),
        (PEMA(), 6, 401, False),
        (EMA(), 5, 401, True),
        (PEMA(), 5, 400, False),
        (BEMA(), 17, 401, True),
        (BEMA(), 18, 401, False),
        (BEMA(), 17, 400, False),
        (OUEMA(), 17, 401, True),
        (DEMA(), 17, 401, True),
        (BEMA(kappa=0.2), 5, 1000, False),
        (Mean(), 3, 5000, False),
        (MomentumEMA(momentum=0.999), 3, 5000, False),
    ],
)
def test_interval(scheme: Scheme, count: int, apart: int, told: bool) -> None:
    assert len(interval(scheme, count, apart)) == told


def test_what_is_said_of_the_interval() -> None:
    (far,) = interval(BEMA(), 10, 500)
    assert far == (
        "Only 10 updates, 500 steps apart: the paper of bema made 18 or more, at most 400 apart. Save more often next "
        "time."
    )
    (far,) = interval(PEMA(), 5, 500)
    assert far.startswith("Only 5 updates, 500 steps apart: the paper of pema made 6 or more, at most 300 apart.")


def test_the_base_model_is_no_neighbour() -> None:
    """The distance from the base model to the newest checkpoints says nothing about how often the run was saved."""
    assert interval(BEMA(), 10, 100, begin=9000, with_init=True) == ()
    assert advice.about_interval((0, 9000), BEMA(), with_init=True) == ()
    assert interval(BEMA(), 17, 500, begin=500, with_init=True)[0].startswith("Only 17 updates, 500 steps apart")


def test_after_a_burn_in() -> None:
    steps = tuple(range(0, 10_001, 500))
    assert advice.about_interval(steps, BEMA(), with_init=False) == ()
    (told,) = advice.about_interval(steps, BEMA(burn_in=2000), with_init=False)
    assert told.startswith("Only 16 updates")
    assert advice.about_interval(steps, BEMA(burn_in=20_000), with_init=False) == ()


# --- adapters ---


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight", 1),
        ("base_model.model.model.embed_tokens.lora_embedding_B", 1),
        ("base_model.model.model.layers.0.mlp.up_proj.hada_w1_a", 1),
        ("base_model.model.model.layers.0.mlp.up_proj.lokr_w1", 1),
        ("base_model.model.model.layers.0.mlp.up_proj.ia3_l", 0),
        ("base_model.model.prompt_embeddings", 0),
        ("model.layers.0.self_attn.q_proj.weight", 0),
        ("model.explora_A.weight", 0),
    ],
)
def test_adapters(name: str, said: int) -> None:
    told = advice.about_adapters(["model.norm.weight", name])
    assert len(told) == said
    assert any("--lora product" in each for each in told) == ("lora_" in name and bool(said))


# --- weights ---


def about_weights(scheme: Scheme, span: int, count: int) -> tuple[str, ...]:
    steps = tuple(range(0, span + 1, span // count))
    return advice.about_weights(scheme, steps, effective_weights(scheme.coefficients(Timeline(steps))))


@pytest.mark.parametrize("span", [640, 1800, 7200, 144_000])
@pytest.mark.parametrize("count", [4, 16, 40, 160])
def test_usual_settings_are_silent(span: int, count: int) -> None:
    for scheme in (EMA(), BEMA(), BEMA(form="author"), BEMA(kappa=0.2), BEMA(kappa=0.0), DEMA(), DEMA(kappa=0.2)):
        assert about_weights(scheme, span, count) == (), scheme.label


def test_weights_from_both_sides() -> None:
    """Once BEMA's average has forgotten the anchor, its weight is that of the correction, −(10 + t)^(−0.2)."""
    assert about_weights(BEMA(), 402, 201) == ()
    (told,) = about_weights(BEMA(), 300, 150)
    assert f"{-(310**-0.2):.2f} at step 0" in told
    assert advice.about_weights(BEMA(), (0, 1, 2), (-0.3, 0.0, 1.3)) == ()


def test_which_weight_is_the_most_negative() -> None:
    (told,) = advice.about_weights(BEMA(), (0, 100, 200), (-0.11, -0.25, 1.36))
    assert told.endswith("beyond the checkpoints. Worth comparing: a larger --eta.")
    assert told.startswith("The negative weights sum to -0.36, with -0.25 at step 100 the most negative:")
    assert len(about_weights(BEMA(eta=0.1), 1800, 72)) == 1
    assert len(about_weights(OUEMA(), 640, 72)) == 1


@pytest.mark.parametrize("scheme", [DEMA(), Weights(weights=(1.0,)), BEMA(eta=math.inf)])
def test_no_larger_eta_where_there_is_none(scheme: Scheme) -> None:
    (told,) = advice.about_weights(scheme, (0, 100, 200), (-0.11, -0.25, 1.36))
    assert told.endswith("the result lies beyond the checkpoints.")


# --- anchor ---


@pytest.mark.parametrize(
    ("steps", "weights", "start", "with_init", "told"),
    [
        ((0, 100, 200), (0.1, 0.3, 0.6), 0, False, "10% on step 0, --from-step 100"),
        ((0, 100, 200), (0.099, 0.301, 0.6), 0, False, ""),
        ((0, 100, 200), (-0.2, 0.6, 0.6), 0, False, ""),
        ((0, 100, 200), (0.26, 0.14, 0.6), 0, True, "26% on the base model"),
        ((700, 800, 900), (0.26, 0.14, 0.6), 0, True, "26% on the base model"),
        ((700, 800, 900), (0.26, 0.14, 0.6), 0, False, ""),
        ((50, 100, 1000), (0.26, 0.14, 0.6), 0, False, "26% on step 50, --from-step 100"),
        ((51, 100, 1000), (0.26, 0.14, 0.6), 0, False, ""),
        ((0, 10, 1000), (0.0, 0.4, 0.6), 1, True, "40% on step 10, --from-step 1000"),
        ((0, 100, 200), (0.0, 0.0, 1.0), 2, False, ""),
    ],
)
def test_weight_of_the_start(
    steps: tuple[int, ...], weights: tuple[float, ...], start: int, with_init: bool, told: str
) -> None:
    said = "".join(advice.about_anchor_weight(steps, weights, start, with_init=with_init))
    said = said.replace(" of the weight is", "").replace("where the run began. Worth comparing: ", "")
    assert said.replace(". Worth comparing: an average without --init", "").rstrip(".") == told


# --- how training went ---

CONSTANT: tuple[tuple[int, float], ...] = ((10, 1e-5), (100, 1e-4), (1800, 1e-4))
EVALS = range(50, 1801, 50)


def course(falls_by: float, *, rates: tuple[tuple[int, float], ...] = CONSTANT, metric: str = "eval_loss") -> Course:
    """A loss that falls linearly by `fall`, with a noise of 0.01."""
    noise = np.random.default_rng(0).normal(size=len(EVALS))
    values = tuple((step, 2 - falls_by * step / 1800 + 0.01 * float(x)) for step, x in zip(EVALS, noise, strict=True))
    return Course(metric, values, trend_of(values), rates)


LEARNING, LEVEL, OVERFITTING = course(0.3), course(0.0), course(-0.3)
RUN = tuple(range(0, 1801, 50))


def about_trend(scheme: Scheme, told: Course, *tried: str, steps: tuple[int, ...] = RUN, length: float = 1.0) -> str:
    """The advice for an average of a run with a straight path."""
    path = tuple(length * step / steps[-1] for step in steps)
    weights = effective_weights(scheme.coefficients(Timeline(steps, path)))
    return "".join(advice.about_trend(scheme, told, steps, weights, {scheme.label, *tried}))


def test_the_courses_are_what_they_are_called() -> None:
    assert (LEARNING.trend, LEVEL.trend, OVERFITTING.trend) == ("falling", "level", "rising")


@pytest.mark.parametrize("gamma", [0.05, 0.1, 0.15, 0.2, 0.3, 0.7])
@pytest.mark.parametrize("length", [0.05, 0.5, 1.0, 6.0])
@pytest.mark.parametrize("kind", [PEMA, EMA])
def test_a_run_that_still_learns_gets_no_advice_to_average_more(
    gamma: float, length: float, kind: type[PEMA] | type[EMA]
) -> None:
    """For any path: on such a run a larger γ was worse at every step."""
    scheme = kind(gamma=gamma)
    told = about_trend(scheme, LEARNING, length=length)
    told += "".join(advice.about_path(path(*[50 * length] * 36, every=50), ()))
    named = [float(word) for word in re.findall(r"--gamma ([\d.]+\d)", told)]
    assert all(each < gamma for each in named)
    for wider in ("mean", "--every", "ema", "0.2 or 0.3"):
        assert not re.search(rf"(comparing|try).*(?<!b){wider}", told), told


@pytest.mark.parametrize(
    ("scheme", "how", "tried", "told"),
    [
        (PEMA(), LEARNING, (), "Worth comparing: --gamma 0.1 or bema."),
        (EMA(gamma=0.3), LEARNING, (), "Worth comparing: --gamma 0.2 or bema."),
        (PEMA(), LEARNING, ("bema-eta0.2",), "Worth comparing: --gamma 0.1."),
        (PEMA(), LEARNING, ("pema-gamma0.1", "bema"), "Worth comparing: --gamma 0.05."),
        (PEMA(), LEARNING, ("pema-gamma0.1-every100", "pema-gamma0.05", "bema-eta0.4"), ""),
        (EMA(), LEARNING, ("pema-gamma0.1", "bema"), "Worth comparing: --gamma 0.1."),
        (PEMA(gamma=0.01), LEARNING, (), ""),
        (Mean(), LEARNING, (), "Worth comparing: --last 18."),
        (Mean(), LEARNING, ("mean-last18",), ""),
        (BEMA(), LEARNING, (), ""),
        (Last(), LEARNING, (), ""),
        (PEMA(), LEVEL, (), "Worth comparing: --gamma 0.2."),
        (EMA(gamma=0.05), LEVEL, (), "Worth comparing: mean."),
        (PEMA(), LEVEL, ("pema-gamma0.2",), "Worth comparing: --gamma 0.3."),
        (PEMA(), LEVEL, ("pema-gamma0.2", "pema-gamma0.3"), ""),
        (Mean(), LEVEL, (), ""),
        (BEMA(), LEVEL, (), ""),
        (PEMA(), OVERFITTING, (), ""),
        (PEMA(), course(0.0, rates=()), (), ""),
        (PEMA(), course(0.0, rates=decaying(1800, begin=1500)), (), ""),
        (PEMA(), course(0.3, rates=decaying(1800, begin=1500)), (), "Worth comparing: --gamma 0.1 or bema."),
        (PEMA(), Course("", (), None, CONSTANT), (), ""),
    ],
)
def test_narrower_or_wider_as_the_log_says(scheme: Scheme, how: Course, tried: tuple[str, ...], told: str) -> None:
    said = about_trend(scheme, how, *tried)
    assert said.endswith(told) if told else not said


def test_words_about_the_course() -> None:
    assert re.match(
        r"eval_loss was still falling, and this average is \d+ steps behind\. Worth", about_trend(PEMA(), LEARNING)
    )
    assert about_trend(PEMA(), course(0.3, metric="loss")).startswith("The training loss was still falling")
    assert about_trend(PEMA(), LEVEL).startswith("eval_loss is level at a constant learning rate: a wider average may")


def test_on_a_short_path_no_power_is_named() -> None:
    """A power changes little on a short path; the mean does not depend on the path."""
    assert about_trend(PEMA(), LEVEL, length=0.03).endswith("Worth comparing: mean.")
    assert about_trend(PEMA(), LEVEL, "mean", length=0.03) == ""
    assert about_trend(PEMA(), LEARNING, length=0.03) == ""


@pytest.mark.parametrize(
    ("scheme", "steps", "every"),
    [
        (PEMA(), range(0, 1801, 20), 60),
        (EMA(gamma=0.2), range(0, 1801, 25), 50),
        (PEMA(), range(0, 1801, 50), None),
        (PEMA(), range(0, 991, 15), None),
        (PEMA(), range(0, 2001, 1), None),
        (PEMA(gamma=0.3), range(0, 1801, 20), None),
        (PEMA(), [0, *range(3, 1804, 20)], None),
    ],
)
def test_close_checkpoints_of_a_level_run(scheme: Scheme, steps: Sequence[int], every: int | None) -> None:
    """The last of them: counted from step 0, no multiple of 50 is among 3, 23, 43, …"""
    told = about_trend(scheme, LEVEL, steps=tuple(steps))
    assert re.findall(r"--every (\d+)", told) == ([str(every)] if every else [])
    assert "--every" not in about_trend(scheme, LEVEL, f"{scheme.label}-every{every}", steps=tuple(steps))
    assert "--every" not in about_trend(scheme, LEARNING, steps=tuple(steps))


# --- all that can be told before weights are read ---


def write_log(root: Path, rates: Mapping[int, float]) -> None:
    """The same history in every checkpoint, as the trainer would have it by then."""
    for directory in root.iterdir():
        state = json.loads((directory / "trainer_state.json").read_text())
        history = [{"step": s, "learning_rate": r, "loss": 1.0} for s, r in rates.items() if s <= state["global_step"]]
        (directory / "trainer_state.json").write_text(json.dumps(state | {"log_history": history}))


def test_before(tmp_path: Path) -> None:
    steps = tuple(range(500, 5001, 500))
    weights = {"layer.lora_A.weight": torch.ones(2, 3), "layer.lora_B.weight": torch.ones(3, 2)}
    root = write_run(tmp_path / "run", [weights] * len(steps), steps)
    write_log(root, {step: 1e-4 if step <= 4000 else 1e-6 for step in range(500, 5001, 500)})

    beginnings = ["The run begins at step 500", "The learning rate had fallen", "Only 9 updates", "These are low-rank"]
    run = ckavg.open_run(root)
    for scheme, expected in (
        (BEMA(), beginnings),
        (PEMA(), [beginnings[0], beginnings[1], beginnings[3]]),
        (Mean(), [beginnings[1], beginnings[3]]),
        (Last(), []),
    ):
        told = advice.before(run, scheme)
        assert [line[: len(begin)] for line, begin in zip(told, expected, strict=True)] == expected
    assert "--to-step 4000" in advice.before(run, Mean())[0]
    assert not any("learning rate" in line for line in advice.before(ckavg.open_run(root, to_step=4000), BEMA()))

    save_file(weights, tmp_path / "base.safetensors")
    told = advice.before(ckavg.open_run(root, init=tmp_path / "base.safetensors"), BEMA())
    assert [line.split(",")[0] for line in told][1] == "Only 10 updates"
    assert not any("begins at step" in line for line in told)


def test_before_of_a_plain_run(tmp_path: Path) -> None:
    run = ckavg.open_run(write_run(tmp_path, [WEIGHTS] * 4, (0, 100, 200, 300)))
    for scheme in (PEMA(), BEMA(), EMA(), OUEMA(), DEMA(), Mean(), Last(), MomentumEMA(momentum=0.99)):
        assert advice.before(run, scheme) == ()


def test_before_needs_no_torch(tmp_path: Path) -> None:
    root = write_run(tmp_path, [WEIGHTS] * 2, (0, 100))
    code = (
        "import sys; from ckavg.averaging import advice; from ckavg.averaging.sources import open_run; "
        "from ckavg.schemes import PEMA; "
        f"advice.before(open_run({str(root)!r}), PEMA()); assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize(("falls_by", "said"), [(0.3, "Worth comparing: --gamma 0.1 or bema."), (0.0, "--gamma 0.2.")])
def test_of_a_whole_run(tmp_path: Path, falls_by: float, said: str) -> None:
    """A noisy run with a path far longer than PEMA was tuned for; results that exist are not suggested again."""
    base, *noise = torch.randn(20, 300, generator=torch.Generator().manual_seed(0))
    steps = tuple(range(0, 1801, 100))
    source = write_run(tmp_path, [{"w": base + 0.22 * row} for row in noise], steps)
    log = [{"step": step, "eval_loss": value} for step, value in course(falls_by).values]
    log += [{"step": step, "learning_rate": rate} for step, rate in CONSTANT]
    state = json.dumps({"global_step": 1800, "log_history": log})
    (source / "checkpoint-1800/trainer_state.json").write_text(state)
    run = ckavg.open_run(source)
    told = ckavg.average(run, PEMA()).warnings
    assert any(line.startswith("The path is long: ℓ(T) = ") for line in told)
    assert next(line for line in told if "--gamma" in line).endswith(said)
    wider = BEMA() if falls_by else PEMA(gamma=0.2)
    ckavg.average(run, wider)
    again = [line for line in ckavg.average(run, PEMA(), out=tmp_path / "again").warnings if "--gamma" in line]
    assert again[0].endswith("comparing: --gamma 0.1." if falls_by else "comparing: --gamma 0.3.")
