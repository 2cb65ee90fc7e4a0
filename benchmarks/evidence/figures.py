"""Figures of the studies: panels of curves, as PNG, without a display, the same bytes from the same numbers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from benchmarks.evidence.tables import RESULTS
from ckavg.output.plots import COLOURS, plain_style


@dataclass(frozen=True, slots=True, kw_only=True)
class Curve:
    """One line.

    Attributes:
        name: in the legend; the same name has the same colour in every panel.
        x, y: its points.
        error: one standard error of each y, drawn as a band; may be empty.
        dashed: whether it is theory rather than measurement.
        dots: whether its points are drawn by themselves, without a line.
    """

    name: str
    x: Sequence[float]
    y: Sequence[float]
    error: Sequence[float] = ()
    dashed: bool = False
    dots: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Panel:
    """One pair of axes: a title, what is on the axes, and the curves."""

    title: str
    x_label: str
    y_label: str
    curves: Sequence[Curve]
    x_scale: str = "linear"
    y_scale: str = "log"
    ticks: Mapping[float, str] = field(default_factory=dict)


def draw(name: str, panels: Sequence[Panel], *, columns: int, directory: Path = RESULTS) -> Path:
    """Draw `<name>.png`, panels in rows of `columns`, with one key below all of them."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import NullFormatter, StrMethodFormatter

    rows = -(-len(panels) // columns)
    names = list(dict.fromkeys(curve.name for panel in panels for curve in panel.curves))
    per_line = max(1, min(len(names), 2 * columns))
    file = directory / f"{name}.png"
    directory.mkdir(parents=True, exist_ok=True)
    with plain_style():
        size = (max(3.0 * columns, 4.5), 2.4 * rows + 0.25 * -(-len(names) // per_line) + 0.1)
        figure = Figure(figsize=size, layout="constrained")
        handles = {}
        axes = list(figure.subplots(rows, columns, squeeze=False).flat)
        for unused in axes[len(panels) :]:
            unused.remove()
        for panel, axis in zip(panels, axes, strict=False):
            axis.set(title=panel.title, xlabel=panel.x_label, ylabel=panel.y_label)
            axis.set(xscale=panel.x_scale, yscale=panel.y_scale)
            for one, scale in ((axis.xaxis, panel.x_scale), (axis.yaxis, panel.y_scale)):
                if scale == "log":  # matplotlib's own labels are formulas, which the style turns off
                    one.set_major_formatter(StrMethodFormatter("{x:g}"))
                    one.set_minor_formatter(NullFormatter())
            for curve in panel.curves:
                colour = COLOURS[names.index(curve.name) % len(COLOURS)]
                style, marker = ("", "o") if curve.dots else ("--" if curve.dashed else "-", "")
                (handles[curve.name],) = axis.plot(
                    curve.x, curve.y, color=colour, linestyle=style, marker=marker, markersize=4, linewidth=1.3
                )
                if curve.error:
                    low, high = ([y + s * e for y, e in zip(curve.y, curve.error, strict=True)] for s in (-1, 1))
                    axis.fill_between(curve.x, low, high, color=colour, alpha=0.25, linewidth=0)
            if panel.ticks:
                axis.set_xticks(list(panel.ticks), list(panel.ticks.values()))
                axis.tick_params(axis="x", which="minor", bottom=False)
        figure.legend(handles.values(), handles, loc="outside lower center", ncols=per_line)
        figure.savefig(file, dpi=100, metadata={"Software": None})
    return file
