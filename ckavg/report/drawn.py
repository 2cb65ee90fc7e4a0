"""Stage *report*: the picture in a model card: the weight of every checkpoint, and what it follows from."""

from __future__ import annotations

import importlib
import io
import itertools
import logging
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from importlib.util import find_spec
from typing import TYPE_CHECKING

from ckavg.report.canvas import COLOURS, plain_style
from ckavg.result.record import Averaged

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_WIDTH, _PANEL, _GAP, _BELOW, _LEFT, _RIGHT = 7.2, 0.95, 0.34, 0.46, 0.6, 0.12
"""In inches. Places are fixed: finding them takes longer than the drawing."""

_FEW = 60
"""Up to so many checkpoints each has a bar and a marker. More are drawn as one line, which keeps the file small."""

_BLUE, _VERMILLION = COLOURS[:2]


_UNDER_WAY: list[threading.Thread] = []
"""Imports that were begun."""


def make_ready() -> None:
    """Begin to import what `card_picture` needs, half a second of work, beside the reading of weights."""
    if find_spec("matplotlib") is not None:
        thread = threading.Thread(target=_import, name="ckavg-picture", daemon=True)
        _UNDER_WAY.append(thread)
        thread.start()


def _import() -> None:
    with _silent(), suppress(Exception):  # whatever is wrong with it shows, or does not matter, when it is drawn
        importlib.import_module("matplotlib.figure")
        importlib.import_module("matplotlib.backends.backend_svg")


def card_picture(result: Averaged) -> bytes | None:
    """The effective weights of an average over the steps, with ℓ, β and α where the scheme has them, as SVG.

    SVG, because its bytes hang on the numbers and on matplotlib alone. Those of a PNG hang on zlib, too, which comes in
    several makes that compress differently, and on some of them by processor.

    Args:
        result: the average.

    Returns:
        The file; None where matplotlib is not installed.
    """
    while _UNDER_WAY:
        _UNDER_WAY.pop().join()
    with _silent():
        try:
            from matplotlib.figure import Figure
        except ImportError:
            return None
        with plain_style():
            panels = _panels(result)
            height = len(panels) * (_PANEL + _GAP) + _BELOW
            figure = Figure(figsize=(_WIDTH, height))
            for place, panel in enumerate(panels):
                is_last = place == len(panels) - 1
                bottom = (height - (place + 1) * (_PANEL + _GAP)) / height
                width = (_WIDTH - _LEFT - _RIGHT) / _WIDTH
                axis = figure.add_axes((_LEFT / _WIDTH, bottom, width, _PANEL / height))
                _draw_panel(axis, result.steps, panel, is_last=is_last)
            file = io.BytesIO()
            figure.savefig(file, format="svg", metadata={"Date": None, "Creator": None})
            figure.clear()  # half of what it holds refers to itself, and the program collects no cycles
    return file.getvalue()


@dataclass(frozen=True, slots=True)
class _Panel:
    """One pair of axes: its title, and the values of each checkpoint, those of a second line dashed."""

    title: str
    lines: tuple[Sequence[float | None], ...]


def _panels(result: Averaged) -> list[_Panel]:
    """What is drawn, the weights last."""
    panels = []
    if result.path_length is not None:
        panels.append(_Panel("Path length ℓ", (result.path_length,)))
    if any(beta is not None for beta in result.betas):
        if result.alphas is None:
            panels.append(_Panel("β, the share of each checkpoint as it is taken in", (result.betas,)))
        else:
            panels.append(_Panel("β; dashed: α, the strength of the correction", (result.betas, result.alphas)))
    return [*panels, _Panel("Weight of each checkpoint in the average", (result.weights,))]


def _draw_panel(axis: Axes, steps: Sequence[int], panel: _Panel, *, is_last: bool) -> None:
    axis.set_title(panel.title, size=9, pad=4, y=1.0)  # a place that need not be found
    axis.tick_params(labelsize=8, labelbottom=is_last)
    axis.locator_params(axis="x", nbins=9, integer=True)
    axis.locator_params(axis="y", nbins=4)
    axis.ticklabel_format(axis="x", style="plain", useOffset=False)
    margin = 0.02 * max(steps[-1] - steps[0], 1)
    axis.set_xlim(steps[0] - margin, steps[-1] + margin)
    numbers = [0.0]
    for values, colour, dashes in zip(panel.lines, (_BLUE, _VERMILLION), ("-", "--"), strict=False):
        known = [(step, value) for step, value in zip(steps, values, strict=True) if value is not None]
        x, y = [step for step, _ in known], [value for _, value in known]
        numbers += y
        if is_last:
            _draw_weights(axis, x, y)
        else:
            marker = "o" if len(x) <= _FEW else None
            axis.plot(x, y, dashes, color=colour, marker=marker, markersize=3.5, clip_on=False)
    axis.set_ylim(1.05 * min(numbers), 1.05 * max(numbers) or 1.0)
    if is_last:
        axis.set_xlabel("optimizer step", size=8.5)
        axis.xaxis.set_label_coords(0.5, -0.27)


def _draw_weights(axis: Axes, steps: Sequence[int], weights: Sequence[float]) -> None:
    axis.axhline(0, color="0.3", linewidth=0.8)
    if len(steps) > _FEW:
        axis.fill_between(steps, weights, step="mid", color=_BLUE, linewidth=0.5)
        return
    span = max(steps[-1] - steps[0], 1)
    closest = min((after - before for before, after in itertools.pairwise(steps)), default=span)
    colours = [_VERMILLION if weight < 0 else _BLUE for weight in weights]
    axis.bar(steps, weights, width=min(max(0.7 * closest, 0.004 * span), 0.03 * span), color=colours)


@contextmanager
def _silent() -> Iterator[None]:
    """Without what matplotlib logs, of fonts that it looks for and of a cache that it may not write."""
    log = logging.getLogger("matplotlib")
    level = log.level
    log.setLevel(logging.CRITICAL + 1)
    try:
        yield
    finally:
        log.setLevel(level)
