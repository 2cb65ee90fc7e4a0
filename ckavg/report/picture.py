"""Stage *report*: pictures of averages and of the path length, for `--plot`."""

from __future__ import annotations

import dataclasses
import itertools
import math
import os
import statistics
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ckavg.errors import SettingError, WriteError
from ckavg.path.table import PathLength
from ckavg.report.canvas import COLOURS, SMALL, Look, Panel, compose, plain_style, shown, write_figure
from ckavg.report.layers import Layers, find_layers, furthest
from ckavg.result.record import Averaged
from ckavg.schemes import SCHEMES

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.colors import Normalize
    from matplotlib.figure import Figure

SUFFIXES = (".png", ".svg", ".pdf")

_MOST_KINDS = 40
_MOST_BARS = 30
_MOST_BARS_BELOW_LAYERS = 12
_NAME_WIDTH = 36
_UNIT = "σ per parameter"
_BLUE, _VERMILLION = COLOURS[:2]
_MARKERS = "o", "s", "^", "D", "v", "P", "X", "<"
_DASHES = "-", "--", "-.", ":"


def check_picture(file: Path) -> None:
    """Refuse a picture that could not be written, before any work is done for it.

    Raises:
        SettingError: the name does not end in .png, .svg or .pdf, or matplotlib is not installed.
        WriteError: the directory is not there or may not be written to, or `file` is a directory itself.
    """
    if file.suffix.lower() not in SUFFIXES:
        raise SettingError(f"plot is {str(file)!r}; it must end in {', '.join(SUFFIXES[:-1])} or {SUFFIXES[-1]}.")
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError as error:
        raise SettingError(
            "Pictures need matplotlib, which is not installed.", hint="Install it: pip install 'ckavg[plot]'"
        ) from error
    if not file.parent.is_dir():
        raise WriteError(f"{file.parent} is not a directory.", hint="Make it, or choose another place with --plot.")
    if not os.access(file.parent, os.W_OK | os.X_OK):
        raise WriteError(f"{file.parent} may not be written to.", hint="Choose another place with --plot.")
    if file.is_dir():
        raise WriteError(f"{file} is a directory.", hint="Choose another name with --plot.")


def draw_averages(results: Sequence[Averaged], file: Path, path: PathLength | None = None) -> None:
    """Draw averages of one run: ℓ, β, and the weight of every checkpoint.

    Args:
        results: the averages; at least one.
        file: where the picture goes. What is there is replaced.
        path: the path that was measured for them; with it, how far every tensor travelled is drawn, too.

    Raises:
        WriteError: the system would not let us write; `file` is as it was.
    """
    write_figure(averages_figure(results, path), file)


def draw_path(path: PathLength, file: Path) -> None:
    """Draw how far the weights travelled: ℓ, and the path of every tensor.

    Args:
        path: what was measured.
        file: where the picture goes. What is there is replaced.

    Raises:
        WriteError: the system would not let us write; `file` is as it was.
    """
    write_figure(path_figure(path), file)


def averages_figure(results: Sequence[Averaged], path: PathLength | None = None) -> Figure:
    """What `draw_averages` writes."""
    with plain_style():
        first, looks = results[0], _looks(results)
        panels = []
        measured = path or next((result for result in results if result.path_length is not None), None)
        if isinstance(measured, PathLength):
            panels.append(_length_panel(measured.steps, measured.lengths, measured.standard_errors))
        elif measured and measured.path_length is not None:
            panels.append(_length_panel(measured.steps, measured.path_length, measured.path_length_error))
        if any(beta is not None for result in results for beta in result.betas):
            panels.append(Panel(1.7, partial(_draw_betas, results, looks)))
        panels.append(Panel(2.1, partial(_draw_weights, results, looks)))
        told = f"{len(first.steps)} checkpoints, steps {first.steps[0]} to {first.steps[-1]}"
        if len(results) > 1:
            title, key = f"{len(results)} averages of one run", looks
        else:
            title, key = _title(first), []
            since = "" if first.anchor_step == first.steps[0] else f" from the anchor at step {first.anchor_step}"
            told += f", span {first.span}{since}"
        return compose(title, told, first.steps, panels, _tensor_panels(path), key)


def path_figure(path: PathLength) -> Figure:
    """What `draw_path` writes."""
    with plain_style():
        steps, lengths, errors = path.steps, path.lengths, path.standard_errors
        title = f"Path length ℓ(T) = {lengths[-1]:.5g}" + (f" ± {errors[-1]:.2g}" if errors else "")
        told = f"{len(steps)} checkpoints, steps {steps[0]} to {steps[-1]}; "
        told += f"{len(path.counted)} of {len(path.tensors)} tensors count"
        if path.without_spread:
            told += " (the others have no spread)"
        if path.sample < 1:
            told += f"; estimated from {100 * path.sample:.3g} % of each"
        return compose(title, told, steps, [_length_panel(steps, lengths, errors)], _tensor_panels(path))


def _title(result: Averaged) -> str:
    """The scheme and what is stated of it, as the summary has it."""
    values: dict[str, Any] = {name: math.inf if value == "inf" else value for name, value in result.parameters.items()}
    of_name = (scheme for scheme in SCHEMES if scheme.name == result.scheme)
    known = next((each for each in of_name if {field.name for field in dataclasses.fields(each)} == {*values}), None)
    title, stated = (known.title, known(**values).stated) if known else (result.scheme, result.parameters)
    told = ", ".join(f"{name.replace('_', '-')} {value}" for name, value in stated.items())
    return f"{title}: {told}" if told else title


def _looks(results: Sequence[Averaged]) -> list[Look]:
    """Up to eight averages get a colour each, more of them shades in their order; all get a marker and dashes."""
    import matplotlib

    count, checkpoints = len(results), len(results[0].steps)
    shades = matplotlib.colormaps["viridis"]
    every = math.ceil(checkpoints / 40)
    looks = []
    for place, result in enumerate(results):
        dashes = (place + place // len(_MARKERS)) % len(_DASHES)
        line = {
            "color": COLOURS[place] if count <= len(COLOURS) else shades(0.92 * place / (count - 1)),
            "linestyle": _DASHES[dashes],
            "zorder": 2 + dashes / len(_DASHES),  # where two lines are one, what is below is seen between the dashes
            "marker": _MARKERS[place % len(_MARKERS)],
            "markersize": _marker_size(checkpoints),
            "markevery": (place * every // count, every),
            "clip_on": False,
        }
        looks.append(Look(shown(result.outputs[-1].name, 40), line))
    return looks


def _length_panel(steps: Sequence[int], lengths: Sequence[float], errors: Sequence[float] | None) -> Panel:
    return Panel(1.9, partial(_draw_length, steps, lengths, errors or (0.0,) * len(lengths)))


def _draw_length(steps: Sequence[int], lengths: Sequence[float], errors: Sequence[float], axis: Axes) -> None:
    band = f"; the band is ±1 standard error, at most {max(errors):.2g}" if any(errors) else ""
    axis.set_title(f"Path length ℓ, in {_UNIT}{band}")
    axis.plot(steps, lengths, color=_BLUE, marker="o", markersize=_marker_size(len(steps)), clip_on=False)
    low, high = ([each + sign * error for each, error in zip(lengths, errors, strict=True)] for sign in (-1, 1))
    if band:
        axis.fill_between(steps, low, high, color=_BLUE, alpha=0.25, linewidth=0)
    axis.set_ylim(0, 1.05 * max(high) or 1)


def _draw_betas(results: Sequence[Averaged], looks: Sequence[Look], axis: Axes) -> None:
    alphas = results[0].alphas if len(results) == 1 else None
    also = "; dashed: α, the strength of the correction" if alphas else ""
    axis.set_title(f"β, the share of each checkpoint as it is taken in{also}")
    for result, look in zip(results, looks, strict=True):
        steps, betas = _known(result.steps, result.betas)
        if betas:  # an empty line has no extent, and the layout would be lost on it
            axis.plot(steps, betas, **look.line)
    if alphas:
        line = looks[0].line | {"color": _VERMILLION, "linestyle": "--", "marker": "s"}
        axis.plot(*_known(results[0].steps, alphas), **line)
    axis.set_ylim(0, 1)


def _draw_weights(results: Sequence[Averaged], looks: Sequence[Look], axis: Axes) -> None:
    axis.set_title("Weight of each checkpoint in the average")
    weights = [weight for result in results for weight in result.weights]
    if len(results) == 1:
        colours = [_VERMILLION if weight < 0 else _BLUE for weight in weights]
        axis.bar(results[0].steps, weights, width=_bar_width(results[0].steps), color=colours)
    else:
        for result, look in zip(results, looks, strict=True):
            axis.plot(result.steps, result.weights, **look.line)
    axis.axhline(0, color="0.3", linewidth=0.8, zorder=1.5)
    axis.set_ylim(1.05 * min(0.0, *weights), 1.05 * max(0.0, *weights))


def _tensor_panels(path: PathLength | None) -> list[Panel]:
    if path is None or not path.counted:
        return []
    layers, last = find_layers(path), path.steps[-1]
    panels = []
    if layers.kinds:
        few = furthest(layers, _MOST_KINDS)
        rest = _rest(len(layers.kinds) - len(few.kinds), "kinds")
        title = f"ℓ of each tensor in the layers at step {last}"
        panels.append(Panel(0.9 + max(0.2 * len(few.kinds), 0.6), partial(_draw_layers, few, title, rest)))
    if layers.others:
        bars = layers.others[: _MOST_BARS_BELOW_LAYERS if layers.kinds else _MOST_BARS]
        rest = _rest(len(layers.others) - len(bars), "tensors")
        title = f"ℓ of {'the other tensors' if layers.kinds else f'each tensor at step {last}'}, in {_UNIT}"
        panels.append(Panel(0.8 + 0.2 * len(bars), partial(_draw_bars, bars, title, rest)))
    return panels


def _draw_layers(layers: Layers, title: str, rest: str, axis: Axes) -> None:
    from matplotlib.ticker import StrMethodFormatter

    rows, columns = len(layers.kinds), len(layers.numbers)
    gaps = any(math.isnan(length) for row in layers.lengths for length in row)
    axis.set_title(title)
    axis.set_xlabel("\n".join(filter(None, ["layer" + " (hatched: no such tensor, or not counted)" * gaps, rest])))
    axis.patch.set(hatch="////" if gaps else None, edgecolor="0.75")
    norm, ticks, unevenly = _colour_scale(layers)
    mesh = axis.pcolormesh(range(columns + 1), range(rows + 1), layers.lengths, norm=norm, cmap="viridis")
    every = math.ceil(columns * (len(str(layers.numbers[-1])) + 1) / 66)
    numbers = [str(number) for number in layers.numbers[::every]]
    axis.set_xticks([place + 0.5 for place in range(0, columns, every)], numbers)
    axis.set_yticks(
        [place + 0.5 for place in range(rows)], [shown(kind, _NAME_WIDTH) for kind in layers.kinds], size=SMALL
    )
    axis.tick_params(length=0)
    axis.invert_yaxis()
    axis.spines[:].set_visible(False)
    bar = axis.figure.colorbar(
        mesh, ax=axis, ticks=ticks, format=StrMethodFormatter("{x:g}"), pad=0.02, aspect=max(1.5 * rows, 5)
    )
    bar.minorticks_off()
    bar.set_label(f"{_UNIT}{unevenly}", size=SMALL)


def _colour_scale(layers: Layers) -> tuple[Normalize, list[float] | None, str]:
    """Even shades from 0 to the largest ℓ; uneven ones, and words that say so, where a few would hide all others."""
    from matplotlib.colors import AsinhNorm, Normalize

    lengths = [length for row in layers.lengths for length in row if length > 0] or [1.0]
    middle, top = statistics.median(lengths), max(lengths)
    if top <= 10 * middle:
        return Normalize(0, top), None, ""
    decades = range(math.floor(math.log10(middle)), math.ceil(math.log10(top)))
    steps = [digit * 10.0**decade for decade in decades for digit in ((1, 2, 5) if len(decades) < 4 else (1,))]
    ticks = [0.0, *(step for step in steps if middle / 2 <= step <= top)]
    return AsinhNorm(linear_width=middle, vmin=0, vmax=top), ticks, f"\nlogarithmic above {middle:.2g}"


def _draw_bars(bars: Sequence[tuple[str, float]], title: str, rest: str, axis: Axes) -> None:
    axis.set_title(title)
    lengths = [length for _, length in bars]
    drawn = axis.barh(range(len(bars)), lengths, height=0.7, color=_BLUE)
    axis.bar_label(drawn, [f"{length:.3g}" for length in lengths], padding=3, size=SMALL)
    axis.set_yticks(range(len(bars)), [shown(name, _NAME_WIDTH) for name, _ in bars], size=SMALL)
    axis.tick_params(axis="y", length=0)
    axis.set_ylim(len(bars) - 0.5, -0.5)
    axis.set_xlim(0, 1.1 * max(lengths) or 1)
    axis.set_xlabel(rest)
    axis.locator_params(axis="x", nbins=6)


def _rest(hidden: int, what: str) -> str:
    return f"{hidden} {what} that moved less are left out" if hidden else ""


def _known(steps: Sequence[int], values: Sequence[float | None]) -> tuple[list[int], list[float]]:
    known = [(step, value) for step, value in zip(steps, values, strict=True) if value is not None]
    return [step for step, _ in known], [value for _, value in known]


def _bar_width(steps: Sequence[int]) -> float:
    """In steps: most of the smallest interval, but neither a hair nor a block."""
    span = max(steps[-1] - steps[0], 1)
    closest = min((after - before for before, after in itertools.pairwise(steps)), default=span)
    return min(max(0.7 * closest, 0.004 * span), 0.03 * span)


def _marker_size(checkpoints: int) -> float:
    return 5.0 if checkpoints <= 40 else 3.5 if checkpoints <= 100 else 2.0
