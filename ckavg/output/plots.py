"""Plots of averages and of the path length, for `--plot` and for model cards.

matplotlib is optional, so it is imported on use: without a display, without pyplot, and without the user's settings.
"""

from __future__ import annotations

import io
import itertools
import logging
import math
import re
import statistics
import textwrap
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ckavg.errors import RecordError, SettingError, WriteError, printable
from ckavg.output.output_path import check_parent
from ckavg.output.record import Curves, Record
from ckavg.path.table import PathLength
from ckavg.storage.atomic import replacing

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

    Plot = Callable[[Axes], None]
    """Draws one plot in the given axes."""

# Okabe and Ito's colours, distinct for any colour vision; grey replaces their yellow, which is hard to see on white.
COLOURS = "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#7F7F7F"

_MARKERS, _DASHES = "osD^vPX<", ("-", "--", "-.", ":")
_MOST_MARKERS, _MOST_BARS, _MOST_KINDS, _MOST_TENSORS, _MOST_LETTERS = 40, 200, 40, 30, 36
_UNIT = "σ per parameter"
_LAYER = re.compile(r"(?:(.*?)\.)??(\d{1,6})(?:\.(.*))?", re.ASCII | re.DOTALL)
_NUMBER = re.compile(r"(?<![^.])\d{1,6}(?![^.])", re.ASCII)
_NO_DATE = {"svg": {"Date": None}, "pdf": {"CreationDate": None}}

_STYLE: dict[Any, Any] = {
    "font.family": "DejaVu Sans",
    "axes.titlesize": 10.0,
    "axes.titlelocation": "left",
    "axes.titley": 1.0,  # a fixed position is faster
    "axes.spines.top": False,
    "axes.spines.right": False,
    "figure.constrained_layout.h_pad": 0.05,
    "legend.frameon": False,
    "legend.fontsize": 9.0,
    "legend.borderpad": 0.0,
    "legend.borderaxespad": 0.4,
    "lines.markersize": 4.5,
    "savefig.dpi": 160.0,
    "svg.hashsalt": "ckavg",
    "pdf.fonttype": 42,
    "text.parse_math": False,  # names may contain dollar signs
}


def check_plot_file(file: Path) -> None:
    """Refuse a plot that cannot be written, before any work is done.

    Raises:
        SettingError: the name does not end in .png, .svg or .pdf, or matplotlib is not installed.
        WriteError: `file` is a directory, or its directory is missing or not writable.
    """
    if file.suffix.lower() not in (".png", ".svg", ".pdf"):
        raise SettingError(f"plot is {str(file)!r}; it must end in .png, .svg or .pdf.")
    require_matplotlib()
    check_parent(file, "--plot")


def require_matplotlib() -> None:
    """Check that matplotlib is installed.

    Raises:
        SettingError: it is not.
    """
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError as error:
        raise SettingError(
            "Plots need matplotlib, which is not installed.", hint="Install it: pip install 'ckavg[plot]'"
        ) from error


def save_figure(figure: Figure, file: Path) -> None:
    """Write a figure in the format of the ending of `file`, completely or not at all.

    Raises:
        WriteError: the file cannot be written; it is unchanged.
    """
    kind = file.suffix[1:].lower()
    try:
        with plain_style(), replacing(file) as partial_file:
            figure.savefig(partial_file, format=kind, metadata=_NO_DATE.get(kind))
    except OSError as error:
        raise WriteError(
            f"{file} cannot be written: {error.strerror or error}.", hint="Choose another place with --plot."
        ) from error


def averages_figure(results: Sequence[Record], path: PathLength | None = None, curves: Curves = ()) -> Figure:
    """Evaluations, ℓ, β and the weight of every checkpoint by optimizer step, for averages of one run.

    With `path`, also ℓ by tensor. If there are several selections of checkpoints, each has its own plots.
    """
    with plain_style():
        if len({result.chosen for result in results}) > 1:
            return _selections_figure(results, path, curves)
        first, by_step, by_tensor = results[0], _averages_plots(results, path), _tensor_plots(path)
        if any(each.value is not None for _, curve in curves for _, each in curve):
            by_step.insert(0, partial(_plot_curves, [result.output.name for result in results], curves))
        if len(results) > 1:
            names = [label(result.outputs[-1].name, 40) for result in results]
            return _compose(f"{len(results)} averages of one run", "", first.steps, by_step, by_tensor, names)
        since = "" if first.anchor_step == first.steps[0] else f" from the anchor at step {first.anchor_step}"
        return _compose(recipe_title(first), f", span {first.span}{since}", first.steps, by_step, by_tensor)


def _selections_figure(results: Sequence[Record], path: PathLength | None, curves: Curves) -> Figure:
    """The figure for several selections. A scheme has the same line style in all plots."""
    from matplotlib.lines import Line2D

    schemes = list(dict.fromkeys(result.to_scheme().label for result in results))
    groups: dict[str, list[Record]] = defaultdict(list)
    for result in results:
        groups[result.chosen].append(result)
    plots: list[Plot] = []
    if any(each.value is not None for _, curve in curves for _, each in curve):
        plots.append(partial(_plot_curves, [result.output.name for result in results], curves))
    if any(result.path_length is not None for result in results):
        plots.append(partial(_plot_lengths, groups))
    for chosen, group in groups.items():
        places = [schemes.index(result.to_scheme().label) for result in group]
        if any(beta is not None for result in group for beta in result.betas):
            plots.append(partial(_plot_betas, group, places=places, count=len(schemes), of=f"{chosen}: "))
        plots.append(partial(_plot_weights, group, places=places, count=len(schemes), of=f"{chosen}: "))
    steps = sorted({step for result in results for step in result.steps})
    handles = [Line2D([], [], **_line(1, place, len(schemes))) for place in range(len(schemes))]
    names = [label(scheme, 40) for scheme in schemes]
    return _compose(f"{len(results)} averages of one run", "", steps, plots, _tensor_plots(path), names, handles)


def path_figure(path: PathLength) -> Figure:
    """How far the weights moved: ℓ by optimizer step, and ℓ of every tensor at the last step.

    Raises:
        SettingError: matplotlib is not installed.
    """
    require_matplotlib()
    with plain_style():
        length = partial(_plot_length, path.steps, path.lengths, path.standard_errors)
        title = f"Path length ℓ(T) = {path.lengths[-1]:.5g}"
        title += f" ± {path.standard_errors[-1]:.2g}" if path.standard_errors else ""
        more = f"; {len(path.counted)} of {len(path.tensors)} tensors count"
        more += " (the others have no spread)" if path.without_spread else ""
        more += f"; estimated from {100 * path.sample:.3g} % of each" if path.sample < 1 else ""
        return _compose(title, more, path.steps, [length], _tensor_plots(path))


def card_svg(result: Record) -> bytes | None:
    """The plots of one average for its model card, smaller than `averages_figure`. None without matplotlib.

    The bytes of an SVG depend only on the numbers and on matplotlib; those of a PNG also on zlib.
    """
    if find_spec("matplotlib") is None:
        return None
    with plain_style():
        from matplotlib.figure import Figure

        plots = _averages_plots([result])
        height = 1.4 * len(plots) + 0.4
        figure = Figure(figsize=(8.0, height))
        # Margins are fixed, in inches: computing them takes as long as plotting.
        margins = {"left": 0.75 / 8, "right": 7.9 / 8, "bottom": 0.5 / height, "top": 1 - 0.3 / height}
        axes = figure.subplots(len(plots), sharex=True, squeeze=False, gridspec_kw=margins | {"hspace": 0.4})
        _plot_by_step(axes[:, 0].tolist(), plots, result.steps)
        file = io.BytesIO()
        figure.savefig(file, format="svg", metadata={"Date": None, "Creator": None})
        figure.clear()  # it has reference cycles, and the program does not collect those
        return file.getvalue()


@contextmanager
def plain_style() -> Iterator[None]:
    """Use matplotlib's defaults and ours instead of the user's, without its log; restored at the end."""
    log = logging.getLogger("matplotlib")  # about fonts and a cache that cannot be written
    level = log.level
    log.setLevel(logging.CRITICAL + 1)
    try:
        import matplotlib

        with matplotlib.rc_context():
            matplotlib.rcdefaults()
            matplotlib.rcParams.update(_STYLE)
            yield
    finally:
        log.setLevel(level)


def label(name: str, width: int = _MOST_LETTERS) -> str:
    """A name from outside on one line, with control characters and characters that the font lacks escaped.

    A long one loses its middle, since names differ most at their ends.
    """
    from matplotlib.font_manager import findfont, get_font

    font = get_font(findfont(_STYLE["font.family"]))
    line = printable(name).replace("\n", "\\n")
    text = "".join(char if font.get_char_index(ord(char)) else ascii(char)[1:-1] for char in line)
    end = (width - 1) // 2
    return text if len(text) <= width else f"{text[: width - 1 - end]}…{text[-end:]}"


def find_layers(path: PathLength) -> tuple[list[int], dict[str, list[float]], dict[str, float]]:
    """Arrange ℓ of the counted tensors at the last step by layer and kind, as their names tell.

    The first numeric component of a name is the layer's number. Tensors that differ only in further numbers, such as
    the experts of a layer, are one kind; its ℓ is that of all their parameters together:

        ℓ = Σ_p numel_p · ℓ_p / Σ_p numel_p

    A prefix that all stacks of layers share is dropped: `encoder.block.0.q` is of the kind `encoder.q` if there is also
    a `decoder.block`, and of the kind `q` otherwise.

    Returns:
        The layers' numbers, ascending. ℓ by kind, then by layer; NaN where there is no counted tensor. ℓ of the other
        tensors by name, the longest first; that is all of them if no kind is in two layers.
    """
    lengths = {name: path.tensor_lengths(name)[-1] for name in path.counted}
    matches = {name: match for name in lengths if (match := _LAYER.fullmatch(name))}
    stacks = [set((match[1] or "").split(".")) for match in matches.values()]
    common = stacks[0].intersection(*stacks) if stacks else set()
    cells: dict[tuple[str, int], list[str]] = defaultdict(list)
    for name, match in matches.items():
        own = [part for part in (match[1] or "").split(".") if part not in common]
        kind = _NUMBER.sub("*", match[3] or "").removesuffix(".weight")
        cells[".".join(filter(None, [*own, kind])) or match[1] or "", int(match[2])].append(name)
    kinds = {kind for kind, _ in cells}
    if len(kinds) == len(cells):
        cells, matches, kinds = {}, {}, set()
    sizes = {name: path.tensors[name].numel for name in matches}
    joint = {
        cell: math.fsum(sizes[name] * lengths[name] for name in names) / sum(sizes[name] for name in names)
        for cell, names in cells.items()
    }
    numbers = sorted({number for _, number in cells})
    others = sorted(lengths.keys() - matches.keys(), key=lambda name: (-lengths[name], name))
    by_kind = {kind: [joint.get((kind, number), math.nan) for number in numbers] for kind in sorted(kinds)}
    return numbers, by_kind, {name: lengths[name] for name in others}


def recipe_title(result: Record) -> str:
    """The scheme and its hyper-parameters in words, as in the summary."""
    title, stated = result.scheme, result.parameters
    with suppress(RecordError):  # a scheme of another version of ckavg
        scheme = result.to_scheme()
        title, stated = scheme.title, dict(scheme.stated)
    settings = ", ".join(f"{name.replace('_', '-')} {value}" for name, value in stated.items())
    return f"{title}: {settings}" if settings else title


def _compose(
    title: str,
    more: str,
    steps: Sequence[int],
    by_step: Sequence[Plot],
    by_tensor: Mapping[Plot, float],
    names: Sequence[str] = (),
    handles: Sequence[Line2D] | None = None,
) -> Figure:
    """Stack plots under a title, a subtitle that ends with `more`, and a legend of `names`, if any.

    The legend shows `handles` or, without them, the lines of the last plot by step. Plots by tensor come with heights
    in inches; they have their own margins, since their labels are long.
    """
    from matplotlib.figure import Figure

    columns = max(1, min(4, 100 // (max(map(len, names), default=0) + 9)))
    heights = [1.9 * len(by_step) + 0.6 + 0.21 * math.ceil(len(names) / columns)]
    heights += [math.fsum(by_tensor.values())] if by_tensor else []
    figure = Figure(figsize=(8.0, math.fsum(heights)), layout="constrained")
    figure.suptitle(textwrap.fill(title, 80), x=0.006, ha="left", size=12, weight="bold")
    top, *below = figure.subfigures(len(heights), height_ratios=heights, squeeze=False)[:, 0]
    axes = top.subplots(len(by_step), sharex=True, squeeze=False)[:, 0].tolist()
    _plot_by_step(axes, by_step, steps)
    for part in below:
        rows = part.subplots(len(by_tensor), height_ratios=[*by_tensor.values()], squeeze=False)
        for plot, axis in zip(by_tensor, rows.flat, strict=True):
            plot(axis)
    subtitle = f"{len(steps)} checkpoints, steps {steps[0]} to {steps[-1]}{more}"
    key: dict[str, Any] = {"loc": "outside upper left", "alignment": "left", "ncols": columns, "handlelength": 3.2}
    legend = top.legend(handles or axes[-1].lines[: len(names)], [""] * len(names), title=subtitle, **key)
    for text, name in zip(legend.get_texts(), names, strict=True):
        text.set_text(name)  # as labels, names that begin with _ would be dropped
    return figure


def _plot_by_step(axes: Sequence[Axes], plots: Sequence[Plot], steps: Sequence[int]) -> None:
    from matplotlib.ticker import MaxNLocator, StrMethodFormatter

    for axis, plot in zip(axes, plots, strict=True):
        plot(axis)
        axis.locator_params(axis="y", nbins=5)
    margin = 0.025 * max(steps[-1] - steps[0], 1)
    axes[-1].set_xlim(steps[0] - margin, steps[-1] + margin)
    axes[-1].set_xlabel("optimizer step")
    axes[-1].xaxis.set_major_locator(MaxNLocator(8, integer=True, steps=[1, 2, 2.5, 5, 10]))
    axes[-1].xaxis.set_major_formatter(StrMethodFormatter("{x:.0f}"))


def _averages_plots(results: Sequence[Record], path: PathLength | None = None) -> list[Plot]:
    """ℓ and β, if there are any, then the weights."""
    lengths = [(one.steps, one.path_length, one.path_length_error) for one in results if one.path_length is not None]
    if path is not None:
        lengths = [(path.steps, path.lengths, path.standard_errors)]
    plots: list[Plot] = [partial(_plot_length, *measured) for measured in lengths[:1]]
    if any(beta is not None for result in results for beta in result.betas):
        plots.append(partial(_plot_betas, results))
    return [*plots, partial(_plot_weights, results)]


def _plot_length(steps: Sequence[int], lengths: Sequence[float], errors: Sequence[float] | None, axis: Axes) -> None:
    axis.plot(steps, lengths, **_line(len(steps)))
    errors = errors or [0.0] * len(lengths)
    low, high = ([each + sign * error for each, error in zip(lengths, errors, strict=True)] for sign in (-1, 1))
    band = f"; the band is ±1 standard error, at most {max(errors):.2g}" if any(errors) else ""
    if band:
        axis.fill_between(steps, low, high, color=COLOURS[0], alpha=0.25, linewidth=0)
    axis.set(title=f"Path length ℓ, in {_UNIT}{band}", ylim=(0, 1.05 * max(high) or 1))


def _plot_lengths(groups: Mapping[str, Sequence[Record]], axis: Axes) -> None:
    """ℓ of each selection."""
    measured = {chosen: next((one for one in group if one.path_length), None) for chosen, group in groups.items()}
    found = {chosen: one for chosen, one in measured.items() if one is not None and one.path_length is not None}
    for place, (chosen, one) in enumerate(found.items()):
        axis.plot(one.steps, one.path_length or (), label=chosen, **_line(len(one.steps), place, len(found)))
    top = max(one.path_length[-1] for one in found.values() if one.path_length)
    axis.legend()
    axis.set(title=f"Path length ℓ, in {_UNIT}", ylim=(0, 1.05 * top or 1))


def _plot_curves(names: Sequence[str], curves: Curves, axis: Axes) -> None:
    """The evaluations of each average in its colour, those of the run in grey, with their standard errors."""
    of_run = False
    for name, curve in curves:
        points = [(step, each.value, each.stderr or 0.0) for step, each in curve if each.value is not None]
        if not points:
            continue
        style = _line(len(points), names.index(name), len(names)) if name in names else {"color": "0.5", "marker": "o"}
        of_run |= name not in names
        steps, values, errors = zip(*points, strict=True)
        axis.errorbar(steps, values, yerr=errors if any(errors) else None, capsize=2, **style)
    metric = next(each.metric for _, curve in curves for _, each in curve) or "Evaluation"
    axis.set(title=f"{label(metric)}{'; grey: checkpoints of the run' if of_run else ''}")


def _plot_betas(
    results: Sequence[Record], axis: Axes, *, places: Sequence[int] = (), count: int = 0, of: str = ""
) -> None:
    """β by step; `places` are the indices of these lines among all `count` lines."""
    lines, title = [result.betas for result in results], f"{of}β, the share of each checkpoint as it is taken in"
    if len(results) == 1 and results[0].alphas is not None:
        lines, title = [*lines, results[0].alphas], f"{title}; dashed: α, the strength of the correction"
    for number, values in enumerate(lines):
        steps = results[min(number, len(results) - 1)].steps  # the last line may be α
        known = [(step, value) for step, value in zip(steps, values, strict=True) if value is not None]
        if known:  # an empty line has no extent, which breaks the layout
            place = places[number] if places else number
            axis.plot(*zip(*known, strict=True), **_line(len(known), place, count or len(lines)))
    axis.set(title=title, ylim=(0, 1.05 * max(value or 0.0 for values in lines for value in values) or 1))


def _plot_weights(
    results: Sequence[Record], axis: Axes, *, places: Sequence[int] = (), count: int = 0, of: str = ""
) -> None:
    """Weights by step, as lines; as bars for a single average. For `places` and `count` see `_plot_betas`."""
    steps, weights = results[0].steps, [weight for result in results for weight in result.weights]
    if count or len(results) > 1:
        for number, result in enumerate(results):
            place = places[number] if places else number
            axis.plot(result.steps, result.weights, **_line(len(result.steps), place, count or len(results)))
    elif len(steps) > _MOST_BARS:
        axis.fill_between(steps, weights, step="mid", color=COLOURS[0], linewidth=0.5)
    else:
        span = max(steps[-1] - steps[0], 1)
        closest = min((after - before for before, after in itertools.pairwise(steps)), default=span)
        width = min(max(0.7 * closest, 0.004 * span), 0.03 * span)  # neither too thin nor too thick
        axis.bar(steps, weights, width=width, color=[COLOURS[weight < 0] for weight in weights])
    axis.axhline(0, color="0.3", linewidth=0.8, zorder=1.5)
    limits = 1.05 * min(0.0, *weights), 1.05 * max(0.0, *weights)
    axis.set(title=f"{of}weight of each checkpoint" if of else "Weight of each checkpoint in the average", ylim=limits)


def _line(checkpoints: int, place: int = 0, count: int = 1) -> dict[str, Any]:
    """Line style: a colour each for up to eight lines, shades in order for more; with dashes and markers.

    One or two lines of many checkpoints have no markers.
    """
    import matplotlib

    shades, dashes = matplotlib.colormaps["viridis"], (place + place // len(_MARKERS)) % len(_DASHES)
    every = math.ceil(checkpoints / _MOST_MARKERS)
    return {
        "color": COLOURS[place] if count <= len(COLOURS) else shades(0.92 * place / (count - 1)),
        "linestyle": _DASHES[dashes],
        "zorder": 2 + dashes / len(_DASHES),  # where two lines coincide, the lower one shows between the dashes
        "marker": _MARKERS[place % len(_MARKERS)] if count > 2 or every == 1 else None,
        "markevery": (place * every // count, every),
        "clip_on": False,
    }


def _tensor_plots(path: PathLength | None) -> dict[Plot, float]:
    """A heat map of the layers, if names tell them, and bars for other tensors; with the height of each in inches."""
    plots: dict[Plot, float] = {}
    if path is None or not path.counted:
        return plots
    (numbers, kinds, others), at_step = find_layers(path), f"at step {path.steps[-1]}"
    if kinds:
        furthest = sorted(kinds, key=lambda kind: -max(length for length in kinds[kind] if not math.isnan(length)))
        few = {kind: kinds[kind] for kind in sorted(furthest[:_MOST_KINDS])}
        title = f"ℓ of each tensor in the layers {at_step}"
        plots[partial(_plot_layers, numbers, few, title, len(kinds) - len(few))] = 0.9 + max(0.2 * len(few), 0.6)
    if others:
        bars = dict(itertools.islice(others.items(), 12 if kinds else _MOST_TENSORS))
        title = f"ℓ of {'the other tensors' if kinds else f'each tensor {at_step}'}, in {_UNIT}"
        plots[partial(_plot_tensors, bars, title, len(others) - len(bars))] = 0.8 + 0.2 * len(bars)
    return plots


def _plot_layers(numbers: Sequence[int], kinds: Mapping[str, list[float]], title: str, hidden: int, axis: Axes) -> None:
    from matplotlib.colors import AsinhNorm, Normalize
    from matplotlib.ticker import StrMethodFormatter

    lengths = [length for row in kinds.values() for length in row if length > 0] or [1.0]
    middle, top = statistics.median(lengths), max(lengths)
    uneven = top > 10 * middle  # so that a few do not hide all others
    norm = AsinhNorm(linear_width=middle, vmin=0, vmax=top) if uneven else Normalize(0, top)
    mesh = axis.pcolormesh([*kinds.values()], norm=norm, cmap="viridis")
    aspect, tick_format = max(1.5 * len(kinds), 5), StrMethodFormatter("{x:.3g}")
    bar = axis.figure.colorbar(mesh, ax=axis, format=tick_format, pad=0.02, aspect=aspect)
    bar.minorticks_off()
    bar.set_label(f"{_UNIT}\nlogarithmic above {middle:.2g}" if uneven else _UNIT, size="small")
    gaps = any(math.isnan(length) for row in kinds.values() for length in row)
    axis.patch.set(hatch="////" if gaps else None, edgecolor="0.75")
    every = math.ceil(len(numbers) * (len(str(numbers[-1])) + 1) / 66)  # that many letters fit
    shown = range(0, len(numbers), every)
    axis.set_xticks([place + 0.5 for place in shown], [str(numbers[place]) for place in shown])
    axis.set_yticks([place + 0.5 for place in range(len(kinds))], [label(kind) for kind in kinds], size="small")
    axis.tick_params(length=0)
    axis.invert_yaxis()
    axis.spines[:].set_visible(False)
    rest = f"\n{hidden} kinds that moved less are not shown" if hidden else ""
    axis.set(title=title, xlabel="layer" + " (hatched: no such tensor, or not counted)" * gaps + rest)


def _plot_tensors(bars: Mapping[str, float], title: str, hidden: int, axis: Axes) -> None:
    rectangles = axis.barh(range(len(bars)), [*bars.values()], height=0.7, color=COLOURS[0])
    axis.bar_label(rectangles, fmt="{:.3g}", padding=3, size="small")
    axis.set_yticks(range(len(bars)), [label(name) for name in bars], size="small")
    axis.tick_params(axis="y", length=0)
    axis.set(title=title, ylim=(len(bars) - 0.5, -0.5), xlim=(0, 1.1 * max(bars.values()) or 1))
    axis.set_xlabel(f"{hidden} tensors that moved less are not shown" if hidden else "")
    axis.locator_params(axis="x", nbins=6)
