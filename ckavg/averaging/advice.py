"""Advice about a run and its averages, a sentence or two each. It warns and never refuses.

Pure, except `before`, which reads the trainer's log. `docs/choosing.md` says where the thresholds come from.
"""

from __future__ import annotations

import bisect
import dataclasses
import itertools
import math
import statistics
from collections.abc import Collection, Iterable, Sequence

from ckavg.checkpoints.adapters import hold_factors
from ckavg.checkpoints.run import Run
from ckavg.checkpoints.trainer_log import Course, Series, learning_rates
from ckavg.errors import listed
from ckavg.path.table import PathLength
from ckavg.schemes import (
    BEMA,
    DEMA,
    EMA,
    OUEMA,
    PEMA,
    Coefficients,
    Last,
    Mean,
    PowerEMA,
    PowerExponentEMA,
    Scheme,
    Weights,
)
from ckavg.schemes.base import effective_count, mean_age

_NAMED = 3
_FAR = 4.0
_REFERENCE = (0.5, 1.0)
"""ℓ(T) of the runs that PEMA was tuned on (Pathwise EMA, Section 2)."""

_CLOCK = tuple(1800 * length**2 for length in _REFERENCE)
"""T · ℓ(T)² of those runs, of 1800 steps. Only this determines the last β; at a 16th of it, ℓ(T) · √T is `_FAR` off."""

_DECAYED = 0.25
"""Learning rate at the last checkpoint, as a fraction of the peak, below which averaging is said to gain less."""

_STABLE = 0.5
"""Fraction of the peak above which the learning rate counts as not decayed yet."""

_MOST_OF_A_RUN = 0.75
"""Fraction of the training before the decay that makes an average of that stretch worth comparing. A linear or cosine
decay from the beginning, to a quarter of the peak or less, has halved the rate earlier."""

_INTERVALS = (50, 400)
"""Optimizer steps between two updates in the papers: 50 to 300 (Pathwise EMA), 400 (EMA Without the Lag)."""

_INTERVAL_COMPARED = 300
"""The widest interval that Pathwise EMA compares, in optimizer steps."""

_FEWEST = 6
"""Updates of a run in the coarsest setting of Pathwise EMA: 1800 steps, every 300."""

_FEWEST_CORRECTED = 18
"""Updates of a run in the usual setting of EMA Without the Lag: 7265 steps, every 400."""

_MANY = 50
"""Checkpoints; with no more than this, close ones mean a short run."""

_SHORT_RUN = 1000
"""Optimizer steps; a run this short would have too few updates at a wider interval."""

_NARROW_POWER = 0.2
"""Largest power of β that Pathwise EMA compares: up to here, an average forgets all but the last ten checkpoints."""

_EXTRAPOLATED = -0.3
"""Sum of negative weights; BEMA's defaults stay above it in any run of 402 steps or more."""

_MUCH_OF_ANCHOR, _START_OF_RUN = 0.1, 0.05
"""Weight of the anchor that is worth a warning, and the fraction of a run within which a checkpoint is its start."""

_SOME = 2.0
"""Effective count below which an average is little else than one checkpoint."""

_POWERS = (0.05, 0.1, 0.15, 0.2, 0.3)
"""The powers γ that Pathwise EMA compares, and 0.3, which it needed once (Section 3.2.1, Appendix C.3)."""

_CONSTANT = 0.9
"""Fraction of the peak above which a learning rate has not begun to decay."""

_WITHOUT_ANCHOR = (Mean, PowerEMA, PowerExponentEMA, Weights)
"""Schemes that treat the first checkpoint like the others."""


def before(
    run: Run, scheme: Scheme, rates: Sequence[tuple[int, float]] | None = None, *, lora: str | None = None
) -> tuple[str, ...]:
    """Advice that needs no weight.

    Args:
        run: the checkpoints.
        scheme: how they are averaged.
        rates: the trainer's logged learning rates; None: read them from the last checkpoint's `trainer_state.json`.
        lora: how adapters are averaged, if that was stated.
    """
    if isinstance(scheme, Last):
        return ()
    logged = learning_rates(run.last) if rates is None else rates
    needs_no_anchor = scheme.every_from is not None or isinstance(scheme, _WITHOUT_ANCHOR)
    return (
        *(() if needs_no_anchor else about_anchor(run.steps[0], run.tensors, with_init=run.anchor_is_init)),
        *about_learning_rate(run.steps[int(run.anchor_is_init) :], logged),
        *about_interval(run.steps, scheme, with_init=run.anchor_is_init),
        *(about_adapters(run.tensors) if lora is None else ()),
    )


def about_anchor(step: int, names: Iterable[str], *, with_init: bool) -> tuple[str, ...]:
    """Advice about the anchor, for any scheme.

    Args:
        step: its optimizer step.
        names: of its tensors.
        with_init: whether it was given with `init`.
    """
    if step == 0 or with_init:
        return ()
    if hold_factors(names):
        return (
            f"The run begins at step {step}: everything is measured from that checkpoint, not from the untrained "
            "adapter. "
            'Save that before the next training, beside the others: model.save_pretrained("checkpoint-0").',
        )
    return (
        f"The run begins at step {step}: everything is measured from that checkpoint, not from the base model. "
        "Name the base model with --init to change that.",
    )


def about_anchor_weight(
    steps: Sequence[int], weights: Sequence[float], start: int, *, with_init: bool
) -> tuple[str, ...]:
    """Advice about the weight of an anchor at the start of the run, a model that has not learned much.

    Args:
        steps: optimizer step of every checkpoint.
        weights: effective weight of each.
        start: index of the anchor.
        with_init: whether the first checkpoint was given with `init`.
    """
    if weights[start] < _MUCH_OF_ANCHOR or start == len(steps) - 1:
        return ()
    if with_init and start == 0:
        return (f"{weights[0]:.0%} of the weight is on the base model. Worth comparing: an average without --init.",)
    if steps[start] > _START_OF_RUN * steps[-1]:
        return ()
    return (
        f"{weights[start]:.0%} of the weight is on step {steps[start]}, where the run began. Worth comparing: "
        f"--from-step {steps[start + 1]}.",
    )


def about_trend(
    scheme: Scheme, course: Course, steps: Sequence[int], weights: Sequence[float], tried: Collection[str]
) -> tuple[str, ...]:
    """Advice to compare a narrower or a wider average, from the trainer's log.

    While the loss falls, a lagging average contains worse models. Once it is level at a constant learning rate, only
    noise is left, and a wider average has less of it. In any other case there is no advice.

    Args:
        scheme: how the checkpoints were averaged.
        course: how training went.
        steps: optimizer step of every checkpoint.
        weights: effective weight of each.
        tried: names of results that exist already or are being made.
    """
    lag, count = mean_age(steps, weights), effective_count(weights)
    metric = course.metric if course.metric == "eval_loss" else "The training loss"
    if course.trend == "falling" and count >= _SOME and lag > 0:
        choices = _narrower(scheme, len(steps), tried)
        text = f"{metric} was still falling, and this average is {lag:.0f} steps behind. Worth comparing: "
    elif course.trend == "level" and _is_constant(course.rates) and count < len(steps) / 2:
        choices = _wider(scheme, steps, count, tried)
        text = f"{metric} is level at a constant learning rate: a wider average may have less noise. Worth comparing: "
    else:
        return ()
    return (f"{text}{' or '.join(choices)}.",) if choices else ()


def _narrower(scheme: Scheme, count: int, tried: Collection[str]) -> list[str]:
    """Untried schemes that average over fewer checkpoints."""
    if isinstance(scheme, PEMA | EMA):
        choices = [(f"--gamma {each.gamma:g}", each.label) for each in _other_powers(scheme, tried)[0][-1:]]
        return [option for option, _ in choices] + ([] if _is_tried("bema", tried) else ["bema"])
    if isinstance(scheme, Mean) and count >= _FEWEST and not _is_tried(f"{scheme.label}-last{count // 2}", tried):
        return [f"--last {count // 2}"]
    return []


def _wider(scheme: Scheme, steps: Sequence[int], count: float, tried: Collection[str]) -> list[str]:
    """Untried schemes that average over more checkpoints."""
    if not isinstance(scheme, PEMA | EMA):
        return []
    if count < _SOME:  # on a short path, no power changes much
        return [] if _is_tried("mean", tried) else ["mean"]
    every = _wider_interval(steps) if scheme.gamma <= _NARROW_POWER else None
    if every and not _is_tried(f"{scheme.label}-every{every}", tried):
        return [f"--every {every}"]
    return [f"--gamma {each.gamma:g}" for each in _other_powers(scheme, tried)[1][:1]]


def _other_powers(scheme: PEMA | EMA, tried: Collection[str]) -> tuple[list[PEMA | EMA], list[PEMA | EMA]]:
    """The same scheme with smaller and with larger powers, ascending: the usual ones that were not tried."""
    others = [dataclasses.replace(scheme, gamma=power) for power in _POWERS]
    others = [other for other in others if not _is_tried(other.label, tried)]
    return [each for each in others if each.gamma < scheme.gamma], [
        each for each in others if each.gamma > scheme.gamma
    ]


def _is_tried(label: str, tried: Collection[str]) -> bool:
    return any(name == label or name.startswith(f"{label}-") for name in tried)


def _is_constant(rates: Series) -> bool:
    """Whether the learning rate ended at or near its peak; False if none was logged."""
    return bool(rates) and rates[-1][1] >= _CONSTANT * max(rate for _, rate in rates)


def about_learning_rate(steps: Sequence[int], rates: Sequence[tuple[int, float]]) -> tuple[str, ...]:
    """Advice about the learning rate: averaging removes noise, and a decay leaves little of it.

    Args:
        steps: optimizer steps of the averaged checkpoints, without an anchor given with `init`.
        rates: (optimizer step, learning rate) as logged by the trainer, by step.
    """
    logged = [(step, rate) for step, rate in rates if step <= steps[-1]]
    peak = max((rate for _, rate in logged), default=0.0)
    if peak == 0 or logged[-1][1] >= _DECAYED * peak:
        return ()
    low = logged[-1][1]
    text = (
        f"The learning rate had fallen to {low:.2g} by step {steps[-1]}, {low / peak:.0%} of its peak of {peak:.2g}: "
        "expect less of averaging than at a high rate. "
    )
    stable = [step for step in steps if _rate_at(step, logged) >= _STABLE * peak]
    if len(stable) > 1 and stable[-1] >= _MOST_OF_A_RUN * steps[-1]:
        return (
            text + f"Worth comparing: an average that ends while the rate was still high, with --to-step {stable[-1]}.",
        )
    return (text + "Compare the result with the last checkpoint.",)


def _rate_at(step: int, rates: Sequence[tuple[int, float]]) -> float:
    """The last rate logged at or before a step; 0 before the first entry."""
    place = bisect.bisect_right(rates, step, key=lambda entry: entry[0])
    return rates[place - 1][1] if place else 0.0


def about_interval(steps: Sequence[int], scheme: Scheme, *, with_init: bool) -> tuple[str, ...]:
    """Advice about the interval between checkpoints, for schemes whose β ignores it.

    Args:
        steps: optimizer step of every checkpoint, the anchor's first.
        scheme: how they are averaged.
        with_init: whether the anchor was given with `init`; its distance to the run does not count then.
    """
    begin = next((index for index, step in enumerate(steps) if step >= (scheme.every_from or 0)), len(steps))
    visited, updates = steps[begin:], len(steps) - begin - 1
    own = visited[1:] if with_init and begin == 0 else visited
    if len(own) < 2:
        return ()
    interval = statistics.median(after - before for before, after in itertools.pairwise(own))
    few = 0
    if isinstance(scheme, BEMA | OUEMA | DEMA) and scheme.kappa > _NARROW_POWER:
        few = _FEWEST_CORRECTED
    elif isinstance(scheme, PEMA | EMA):
        few = _FEWEST
    if interval <= _INTERVALS[1] or updates >= few:
        return ()
    return (
        f"Only {updates} updates, {interval:g} steps apart: the paper of {scheme.name} made {few} or more, at most "
        f"{_INTERVALS[1] if few == _FEWEST_CORRECTED else _INTERVAL_COMPARED} apart. Save more often next time.",
    )


def _wider_interval(steps: Sequence[int]) -> int | None:
    """A multiple of the interval for `--every` within the range of the papers; None if there is no need for one.

    An interval of 1 usually counts epochs or saves, so it gets no advice.
    """
    interval = statistics.median(after - before for before, after in itertools.pairwise(steps))
    close = 1 < interval < _INTERVALS[0] and interval == int(interval)
    if not close or len(steps) <= _MANY or steps[-1] - steps[0] < _SHORT_RUN:
        return None
    every = math.ceil(_INTERVALS[0] / interval) * int(interval)
    kept = sum((step - steps[0]) % every == 0 for step in steps)
    return every if kept > _FEWEST else None


def about_adapters(names: Iterable[str]) -> tuple[str, ...]:
    """Advice about low-rank adapters, recognised by tensor names: the product of the factors acts on the model."""
    names = list(names)
    if not hold_factors(names):
        return ()
    is_lora = hold_factors(names, ("lora_",))
    return (
        "These are low-rank adapters, and the factors A and B are averaged separately: the product of the means is "
        "close to the mean of the products BA, but not the same. "
        + (
            "Worth comparing: --lora product, which averages the products; --rank with their rank keeps the size."
            if is_lora
            else "Merge each adapter into the base model and average those to have it exact."
        ),
    )


def about_path(path: PathLength, excluded: Sequence[str]) -> tuple[str, ...]:
    """Advice about the measured path.

    Args:
        path: the table of pass 1.
        excluded: tensors left out of it, by the user or as running statistics.
    """
    texts: list[str] = []
    if path.without_spread:
        texts.append(
            f"No spread at the anchor (σ = 0), so not counted in the path length: {_named(path.without_spread)}. "
            "They are averaged like all others."
        )
    if path.not_finite:
        texts.append(f"NaN or infinity, so not counted in the path length: {_named(path.not_finite)}.")
    if excluded:
        texts.append(f"Left out of the path length: {_named(excluded)}.")
    lengths = path.lengths
    if path.parameters_counted == 0:
        texts.append("No tensor counts in the path length, so β = 1 and the result is the last checkpoint.")
    elif lengths[-1] == 0:
        texts.append("Nothing moved: the path length is 0, so β = 1 and the result is the last checkpoint.")
    else:
        texts += [
            f"Steps {path.steps[place]} and {path.steps[place + 1]} hold identical weights: a stale save?"
            for place in range(len(lengths) - 1)
            if not any(path.tensors.distances[place])
        ]
        texts += _about_length(lengths[-1], path.steps[-1] - path.steps[0])
    return tuple(texts)


def about_infinite(names: Sequence[str]) -> tuple[str, ...]:
    """Note infinities that all checkpoints share, as in masks; the result keeps them."""
    return (f"The same infinities in all checkpoints, and so in the result: {_named(names)}.",) if names else ()


def about_nonfinite(count: int) -> tuple[str, ...]:
    """Note NaN and infinity in the result, if they were allowed.

    Args:
        count: how many elements of the result are not finite.
    """
    return (f"{count:,} numbers of the result are NaN or infinite, as some of the checkpoints are.",) if count else ()


def _about_length(length: float, span: int) -> list[str]:
    """PEMA's γ = 0.15 was tuned on runs of 1800 steps with a path length of about 1, and worked well from 0.5 on."""
    clock = span * length**2
    if clock < _CLOCK[0] / _FAR**2:
        low, high = _CLOCK
        return [
            f"PEMA averages little here: T·ℓ(T)² = {clock:.2g} with T = {span} steps and ℓ(T) = {length:.2g}, where it "
            f"was tuned for {low:g} to {high:g}. At γ = 0.15 no β is below {(1 + clock) ** -0.15:.2g}, so most of the "
            "weight is on the last checkpoint."
        ]
    if length > _REFERENCE[1] * _FAR:
        return [f"The path is long: ℓ(T) = {length:.2g}, where PEMA was tuned for 0.5 to 1."]
    return []


def about_coefficients(scheme: Scheme, coefficients: Coefficients, steps: Sequence[int]) -> tuple[str, ...]:
    """Advice about the coefficients."""
    texts = []
    if coefficients.start == len(steps) - 1 and scheme.name != Last.name:
        texts.append(
            f"No update falls after step {steps[-1]}, where the average begins: the result is that checkpoint."
        )
    if coefficients.uncorrected:
        texts.append(
            f"Running statistics, so averaged without the correction of {scheme.name}, which could make a variance "
            f"negative: {_named(coefficients.uncorrected)}."
        )
    return tuple(texts)


def about_weights(scheme: Scheme, steps: Sequence[int], weights: Sequence[float]) -> tuple[str, ...]:
    """Advice about negative effective weights: how far the result lies beyond the checkpoints.

    Args:
        scheme: how they are averaged.
        steps: optimizer step of every checkpoint.
        weights: effective weight of each; they sum to 1.
    """
    negative = sum(weight for weight in weights if weight < 0)
    if negative >= _EXTRAPOLATED:
        return ()
    least, step = min(zip(weights, steps, strict=True))
    weaker = " Worth comparing: a larger --eta." if isinstance(scheme, BEMA | OUEMA) and scheme.eta < math.inf else ""
    return (
        f"The negative weights sum to {negative:.2f}, with {least:.2f} at step {step} the most negative: the result "
        f"lies beyond the checkpoints.{weaker}",
    )


def _named(names: Sequence[str]) -> str:
    shown = listed(names, _NAMED)
    return f"{len(names)} tensor{'s' if len(names) > 1 else ''} ({shown})"
