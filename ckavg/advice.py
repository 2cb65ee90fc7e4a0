"""What an expert would tell the user about a run, in a sentence each. Pure; warns and never refuses."""

from __future__ import annotations

from collections.abc import Sequence

from ckavg.path.table import PathLength
from ckavg.run.values import Run
from ckavg.schemes import Coefficients, Last, Mean, Scheme

_NAMED = 3
_REFERENCE = (0.5, 1.0)
_FAR = 4.0


def before(run: Run, scheme: Scheme) -> tuple[str, ...]:
    """What can be told before any weight is read."""
    needs_no_anchor = scheme.every_from is not None or isinstance(scheme, Mean | Last)
    return () if needs_no_anchor else about_anchor(run.steps[0], with_init=run.anchor_is_init)


def about_anchor(step: int, *, with_init: bool) -> tuple[str, ...]:
    """What the anchor tells, whatever the scheme."""
    if step == 0 or with_init:
        return ()
    return (
        f"The run begins at step {step}: everything is measured from that checkpoint, not from the base model. "
        "Name the base model with --init to change that.",
    )


def about_path(path: PathLength, excluded: Sequence[str]) -> tuple[str, ...]:
    """What the measured path tells.

    Args:
        path: the table of pass 1.
        excluded: tensors that did not count because the user, or their nature, left them out.
    """
    told: list[str] = []
    if path.without_spread:
        told.append(
            f"No spread at the anchor (σ = 0), so not counted in the path length: {_named(path.without_spread)}. "
            "They are averaged like all others."
        )
    if excluded:
        told.append(f"Left out of the path length: {_named(excluded)}.")
    lengths = path.lengths
    if path.parameters_counted == 0:
        told.append("No tensor counts in the path length, so β = 1 and the result is the last checkpoint.")
    elif lengths[-1] == 0:
        told.append("Nothing moved: the path length is 0, so β = 1 and the result is the last checkpoint.")
    else:
        told += [
            f"Steps {path.steps[place]} and {path.steps[place + 1]} hold identical weights: a stale save?"
            for place in range(len(lengths) - 1)
            if all(tensor.distances[place] == 0 for tensor in path.tensors.values())
        ]
        told += _about_length(lengths[-1])
    return tuple(told)


def _about_length(length: float) -> list[str]:
    """PEMA's γ = 0.15 was found for runs whose path length is about 1, and served well from about 0.5 on."""
    if length < _REFERENCE[0] / _FAR:
        return [
            f"The path is short: ℓ(T) = {length:.2g}, where PEMA was tuned for 0.5 to 1. β stays near 1, and "
            "the result near the last checkpoint. Schemes that count steps (ema, bema) average more."
        ]
    if length > _REFERENCE[1] * _FAR:
        return [
            f"The path is long: ℓ(T) = {length:.2g}, where PEMA was tuned for 0.5 to 1. Noisier runs want a larger "
            "power: try --gamma 0.2 or 0.3 beside this one."
        ]
    return []


def about_coefficients(scheme: Scheme, coefficients: Coefficients, steps: Sequence[int]) -> tuple[str, ...]:
    """What the coefficients tell."""
    if coefficients.start == len(steps) - 1 and scheme.name != Last.name:
        return (f"No update falls after step {steps[-1]}, where the average begins: the result is that checkpoint.",)
    return ()


def _named(names: Sequence[str]) -> str:
    shown = ", ".join(names[:_NAMED]) + (", …" if len(names) > _NAMED else "")
    return f"{len(names)} tensor{'s' if len(names) > 1 else ''} ({shown})"
