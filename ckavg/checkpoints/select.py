"""Stage *discover*: which of the checkpoints found take part. Pure arithmetic on steps."""

from __future__ import annotations

from collections.abc import Sequence

from ckavg.checkpoints.run import Selection
from ckavg.errors import SettingError, listed


def selected(steps: Sequence[int], selection: Selection) -> list[int]:
    """Indices into `steps`, ascending, of the checkpoints that a selection chooses; errors as of `select_steps`."""
    return select_steps(
        steps,
        only=selection.steps,
        skip=selection.skip_step,
        every=selection.every,
        every_from=selection.every_from,
        from_step=selection.from_step,
        to_step=selection.to_step,
        last=selection.last,
        anchor_step=selection.init_step if selection.init is not None else None,
    )


def select_steps(
    steps: Sequence[int],
    *,
    only: Sequence[int] = (),
    skip: Sequence[int] = (),
    every: int | None = None,
    every_from: int | None = None,
    from_step: int | None = None,
    to_step: int | None = None,
    last: int | None = None,
    anchor_step: int | None = None,
) -> list[int]:
    """Indices into `steps` of the checkpoints that take part, in order.

    What is named by its step comes first, then the range, `last`, and the update frequency: with t_0 the step of the
    anchor, checkpoint k is visited where (t_k − t_0) mod `every` = 0.

    Args:
        steps: optimizer steps, ascending.
        only: exactly these steps; empty: all.
        skip: leave out these steps.
        every: update frequency f in optimizer steps; None visits every checkpoint.
        every_from: count `every` from this step instead of the anchor's; the first checkpoint at or after it is
            visited, too (the burn-in of BEMA).
        from_step: leave out checkpoints before this step.
        to_step: leave out checkpoints after this step.
        last: keep only this many, the newest.
        anchor_step: step of an anchor given apart from the run; None: the first checkpoint kept is the anchor.

    Raises:
        SettingError: `every` or `last` is less than 1, or a step that is named is not there.

    >>> select_steps([0, 50, 100, 150, 200], every=100)
    [0, 2, 4]
    >>> select_steps([500, 1000, 1500, 2000], last=3, every=1000)
    [1, 3]
    >>> select_steps([50, 100, 150, 200], every=100, every_from=150)
    [0, 2]
    >>> select_steps([50, 100, 150, 200], only=(50, 150, 200), skip=(150,))
    [0, 3]
    """
    for option, named in (("steps", only), ("skip-step", skip)):
        absent = [str(step) for step in named if step not in steps]
        if absent:
            raise SettingError(
                f"--{option} names {listed(absent)}, where there is no checkpoint.",
                hint=f"There are steps {listed([str(step) for step in steps], 12)}.",
            )
    for name, value in (("every", every), ("last", last)):
        if value is not None and value < 1:
            raise SettingError(f"--{name} is {value}; it must be at least 1.")
    kept = [
        index
        for index, step in enumerate(steps)
        if (step in only or not only)
        and step not in skip
        and (from_step is None or step >= from_step)
        and (to_step is None or step <= to_step)
    ]
    if last is not None:
        kept = kept[-last:]
    if every is None or not kept:
        return kept
    first = [] if anchor_step is not None else kept[:1]
    origin = steps[kept[0]] if anchor_step is None else anchor_step
    if every_from is not None:
        origin = every_from
        first += [index for index in kept if steps[index] >= every_from][:1]
    return [
        index for index in kept if index in first or (steps[index] >= origin and (steps[index] - origin) % every == 0)
    ]
