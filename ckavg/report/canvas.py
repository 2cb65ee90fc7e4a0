"""Stage *report*: how a picture is laid out, looks and is written. With `picture`, the only user of matplotlib.

Figures are built and written without a display, without pyplot and without the user's settings for it. matplotlib is
optional, so it is imported where it is used.
"""

from __future__ import annotations

import math
import textwrap
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ckavg.atomic import replacing
from ckavg.errors import WriteError
from ckavg.report.layers import shortened
from ckavg.report.text import printable

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe and Ito's colours, which people with any colour vision tell apart; a grey in the place of their yellow, which
# is hardly seen on white.
COLOURS = "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#7F7F7F"
SMALL = 8.5
"""Size of what is not the main text, in points."""

_WIDTH = 8.0
_LETTERS = 100
"""How many letters fit side by side."""

_STYLE: dict[Any, Any] = {
    "font.family": "DejaVu Sans",
    "axes.titlesize": 10.0,
    "axes.titlelocation": "left",
    "axes.titlepad": 8.0,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "figure.constrained_layout.h_pad": 0.05,
    "legend.frameon": False,
    "legend.fontsize": 9.0,
    "legend.borderpad": 0.0,
    "legend.borderaxespad": 0.4,
    "savefig.dpi": 160.0,
    "svg.hashsalt": "ckavg",
    "pdf.fonttype": 42,
    "text.parse_math": False,  # names may hold dollar signs
}
_NO_DATE = {"svg": {"Date": None}, "pdf": {"CreationDate": None}}


@dataclass(frozen=True, slots=True)
class Panel:
    """One pair of axes: its height in inches, and what draws in it."""

    height: float
    draw: Callable[[Axes], None]


@dataclass(frozen=True, slots=True)
class Look:
    """A name for the key, and how its line is told from the others: by colour, by marker and by dashes."""

    name: str
    line: dict[str, Any]


@contextmanager
def plain_style() -> Iterator[None]:
    """The defaults of matplotlib and ours, whatever the user's own are; afterwards all is as it was."""
    import matplotlib

    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(_STYLE)
        yield


def compose(
    title: str,
    told: str,
    steps: Sequence[int],
    by_step: Sequence[Panel],
    by_layer: Sequence[Panel] = (),
    key: Sequence[Look] = (),
) -> Figure:
    """Put panels below each other, under a title, a line that tells more, and a key.

    Args:
        title: what the picture is of.
        told: more about it.
        steps: optimizer steps of the checkpoints.
        by_step: panels over `steps`, which share their x axis; at least one.
        by_layer: panels with margins of their own, since their labels are long.
        key: what the lines are, where there are several.
    """
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D
    from matplotlib.ticker import MaxNLocator, StrMethodFormatter

    columns = max(1, min(4, _LETTERS // (max((len(look.name) for look in key), default=0) + 9)))
    groups = [group for group in (by_step, by_layer) if group]
    heights = [math.fsum(panel.height for panel in group) for group in groups]
    heights[0] += 0.6 + 0.21 * math.ceil(len(key) / columns)
    figure = Figure(figsize=(_WIDTH, math.fsum(heights)), layout="constrained")
    figure.suptitle(textwrap.fill(title, 80), x=0.006, ha="left", size=12, weight="bold")
    parts = figure.subfigures(len(groups), height_ratios=heights, squeeze=False)[:, 0].tolist()
    for part, group in zip(parts, groups, strict=True):
        ratios = [panel.height for panel in group]
        axes = part.subplots(len(group), sharex=group is by_step, height_ratios=ratios, squeeze=False)[:, 0]
        for panel, axis in zip(group, axes, strict=True):
            panel.draw(axis)
        if group is by_step:
            margin = 0.025 * max(steps[-1] - steps[0], 1)
            axes[-1].set_xlim(steps[0] - margin, steps[-1] + margin)
            axes[-1].set_xlabel("optimizer step")
            axes[-1].xaxis.set_major_locator(MaxNLocator(8, integer=True, steps=[1, 2, 2.5, 5, 10]))
            axes[-1].xaxis.set_major_formatter(StrMethodFormatter("{x:.0f}"))
    legend = parts[0].legend(
        [Line2D([], [], **look.line | {"markersize": 5.0}) for look in key],
        [""] * len(key),
        loc="outside upper left",
        title=told,
        ncols=columns,
        alignment="left",
        handlelength=3.2,
    )
    for text, look in zip(legend.get_texts(), key, strict=True):
        text.set_text(look.name)  # as labels, those that begin with _ would be left out
    return figure


def shown(name: str, width: int) -> str:
    """A name from outside: on one line, without characters that control or that the font lacks, not too long."""
    from matplotlib.font_manager import findfont, get_font

    font = get_font(findfont(_STYLE["font.family"]))
    line = printable(name).replace("\n", "\\n")
    known = (char if font.get_char_index(ord(char)) else ascii(char)[1:-1] for char in line)
    return shortened("".join(known), width)


def write_figure(figure: Figure, file: Path) -> None:
    """Write a figure in the format that the ending of `file` says: complete, or not at all.

    Raises:
        WriteError: the system would not let us; `file` is as it was.
    """
    kind = file.suffix[1:].lower()
    try:
        with plain_style(), replacing(file) as partial:
            figure.savefig(partial, format=kind, metadata=_NO_DATE.get(kind))
    except OSError as error:
        raise WriteError(
            f"{file} cannot be written: {error.strerror or error}.", hint="Choose another place with --plot."
        ) from error
