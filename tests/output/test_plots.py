"""Plots: what they show are the numbers, whatever the names; and they are written whole or not at all."""

from __future__ import annotations

import dataclasses
import itertools
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import matplotlib
import numpy as np
import pytest
import torch
from matplotlib.axes import Axes
from matplotlib.colors import AsinhNorm, to_hex
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.text import Text

import ckavg
from ckavg.errors import SettingError, WriteError
from ckavg.output.plots import averages_figure, check_plot_file, find_layers, label, path_figure, save_figure
from ckavg.path.table import PathLength, TensorPath, TensorPaths
from tests.runs import random_run, write_run

STEPS = (0, 10, 20, 40, 80)
HOSTILE = "\x1b[31m$\\frac{a}{b}$\n_x漢字\u202e" + "y" * 300
SIGNATURES = {".png": b"\x89PNG\r\n\x1a\n", ".svg": b"<?xml", ".pdf": b"%PDF-"}
KINDS = ("input_layernorm", "mlp.down_proj", "mlp.up_proj", "self_attn.k_proj", "self_attn.q_proj")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> ckavg.Run:
    root = tmp_path_factory.mktemp("run")
    return ckavg.open_run(write_run(root, random_run(0, len(STEPS), torch.float32), STEPS))


@pytest.fixture(scope="module")
def pema(run: ckavg.Run) -> ckavg.Averaged:
    return ckavg.average(run, ckavg.PEMA(gamma=0.3))


@pytest.fixture(scope="module")
def bema(run: ckavg.Run) -> ckavg.Averaged:
    return ckavg.average(run, ckavg.BEMA(eta=0.0, burn_in=10))


@pytest.fixture(scope="module")
def path(run: ckavg.Run) -> PathLength:
    return ckavg.path_length(run)


def travelled(lengths: dict[str, float], *, steps: Sequence[int] = STEPS, numel: int = 4) -> PathLength:
    """A path on which each tensor travelled its length in even steps."""
    updates = len(steps) - 1
    tensors = {
        name: TensorPath(numel, 0.5, (0.5 * numel * each / updates,) * updates) for name, each in lengths.items()
    }
    return PathLength(tuple(steps), TensorPaths.of(tensors), "exclude", 0)


def llama(layers: int) -> PathLength:
    lengths = {
        f"model.layers.{layer}.{kind}.weight": 0.1 + 0.01 * layer + 0.02 * place
        for layer in range(layers)
        for place, kind in enumerate(KINDS)
    }
    return travelled(lengths | {"model.embed_tokens.weight": 0.2, "model.norm.weight": 0.05, "lm_head.weight": 0.4})


def panel(figure: Figure, title: str) -> Axes:
    (found,) = (axes for axes in figure.axes if axes.get_title(loc="left").startswith(title))
    return found


def titles(figure: Figure) -> list[str]:
    return [title.split(",")[0] for axes in figure.axes if (title := axes.get_title(loc="left"))]


def lines(axes: Axes) -> list[tuple[list[float], list[float]]]:
    return [
        (list(line.get_xdata()), list(line.get_ydata()))  # type: ignore[arg-type]
        for line in axes.lines
        if len(line.get_xdata()) != 2 or line.get_marker() != "None"  # type: ignore[arg-type]
    ]


def heading(figure: Figure) -> list[str]:
    """Title, what it tells more, and the names in the key."""
    (legend,) = figure.subfigs[0].legends
    return [figure.get_suptitle(), legend.get_title().get_text(), *(text.get_text() for text in legend.get_texts())]


def boxes(axes: Axes) -> list[Rectangle]:
    return [patch for patch in axes.patches if isinstance(patch, Rectangle)]


def labels(texts: Sequence[Text]) -> list[str]:
    return [text.get_text() for text in texts]


def test_one_average_shows_its_numbers(pema: ckavg.Averaged) -> None:
    figure = averages_figure([pema])
    assert pema.path_length is not None
    assert lines(panel(figure, "Path length")) == [([*STEPS], [*pema.path_length])]
    assert lines(panel(figure, "β")) == [([*STEPS[1:]], [*pema.betas[1:]])]
    bars = boxes(panel(figure, "Weight"))
    assert [bar.get_height() for bar in bars] == [*pema.weights]
    assert [bar.get_x() + bar.get_width() / 2 for bar in bars] == pytest.approx(STEPS)
    assert all(bar.get_y() == 0 for bar in bars)
    assert heading(figure) == ["Pathwise EMA (PEMA): gamma 0.3", "5 checkpoints, steps 0 to 80, span 80"]
    assert figure.axes[-1].get_xlabel() == "optimizer step"


def test_axes_begin_at_zero_and_hold_every_value(pema: ckavg.Averaged, bema: ckavg.Averaged) -> None:
    for results in ([pema], [bema], [pema, bema]):
        figure = averages_figure(results)
        low, high = panel(figure, "β").get_ylim()
        assert low == 0
        assert high >= max(value or 0 for result in results for value in result.betas)
        weights = [weight for result in results for weight in result.weights]
        low, high = panel(figure, "Weight").get_ylim()
        assert low <= min(0, *weights)
        assert high >= max(weights)
        assert (low == 0) == (min(weights) >= 0)
        assert len({axes.get_xlim() for axes in figure.axes}) == 1
    low, high = panel(averages_figure([pema]), "Path length").get_ylim()
    assert low == 0
    assert high >= max(pema.path_length or ())


def test_a_correction_is_drawn_beside_beta_and_negative_weights_hang_below_zero(bema: ckavg.Averaged) -> None:
    figure = averages_figure([bema])
    assert bema.alphas is not None
    assert lines(panel(figure, "β")) == [([*STEPS[2:]], [*bema.betas[2:]]), ([*STEPS[2:]], [*bema.alphas[2:]])]
    assert panel(figure, "β").lines[1].get_linestyle() == "--"
    assert titles(figure) == ["β", "Weight of each checkpoint in the average"], "there is no path to draw"
    assert heading(figure) == [
        "Bias-corrected EMA (BEMA): eta 0.0, burn-in 10",
        "5 checkpoints, steps 0 to 80, span 70 from the anchor at step 10",
    ]
    bars = boxes(panel(figure, "Weight"))
    assert [bar.get_height() < 0 for bar in bars] == [weight < 0 for weight in bema.weights]
    below = {to_hex(bar.get_facecolor()) for bar in bars if bar.get_height() < 0}
    above = {to_hex(bar.get_facecolor()) for bar in bars if bar.get_height() >= 0}
    assert below
    assert below.isdisjoint(above)


def test_several_averages_are_lines_of_their_own(pema: ckavg.Averaged, bema: ckavg.Averaged) -> None:
    figure = averages_figure([bema, pema])
    assert lines(panel(figure, "Path length")) == [([*STEPS], [*(pema.path_length or ())])]
    assert lines(panel(figure, "β")) == [([*STEPS[2:]], [*bema.betas[2:]]), ([*STEPS[1:]], [*pema.betas[1:]])]
    weights = panel(figure, "Weight")
    assert lines(weights) == [([*STEPS], [*bema.weights]), ([*STEPS], [*pema.weights])]
    assert not weights.patches
    assert heading(figure)[2:] == [bema.directory.name, pema.directory.name]


def test_each_selection_has_plots_of_its_own_by_step(pema: ckavg.Averaged, bema: ckavg.Averaged) -> None:
    few, lengths = STEPS[::2], tuple((pema.path_length or ())[::2])
    thin = dataclasses.replace(
        pema, selection={"every": 40}, steps=few, path_length=lengths, betas=pema.betas[::2], weights=(0.2, 0.3, 0.5)
    )
    figure = averages_figure([bema, pema, thin])
    assert lines(panel(figure, "Path length")) == [([*STEPS], [*(pema.path_length or ())]), ([*few], [*lengths])]
    assert lines(panel(figure, "every 40: weight")) == [([*few], [0.2, 0.3, 0.5])]
    every = lines(panel(figure, "all checkpoints: weight"))
    assert every == [([*STEPS], [*bema.weights]), ([*STEPS], [*pema.weights])]
    alike = panel(figure, "every 40: weight").lines[0], panel(figure, "all checkpoints: weight").lines[1]
    assert alike[0].get_color() == alike[1].get_color(), "one scheme"
    assert heading(figure)[2:] == [scheme.to_scheme().label for scheme in (bema, pema)]
    for count in (2, 9, 32):
        drawn = panel(averages_figure([pema] * count), "β").lines
        assert len({to_hex(line.get_color()) for line in drawn}) == count
        assert len({(line.get_marker(), line.get_linestyle()) for line in drawn}) == count, "without colours, too"


def test_an_estimate_has_a_band_of_its_error(pema: ckavg.Averaged, path: PathLength) -> None:
    variances = tuple(1e-4 * place for place in range(1, len(STEPS)))
    tensors = {name: dataclasses.replace(tensor, variances=variances) for name, tensor in path.tensors.items()}
    estimated = dataclasses.replace(path, sample=0.01, tensors=TensorPaths.of(tensors))
    assert estimated.standard_errors is not None
    for figure in (averages_figure([pema], estimated), path_figure(estimated)):
        axes = panel(figure, "Path length")
        assert "±1 standard error" in axes.get_title(loc="left")
        (band,) = axes.collections
        (outline,) = band.get_paths()
        corners = {(float(step), float(length)) for step, length in np.asarray(outline.vertices)}
        for step, length, error in zip(STEPS, path.lengths, estimated.standard_errors, strict=True):
            assert {(step, length - error), (step, length + error)} <= corners
        assert axes.get_ylim()[1] > path.lengths[-1] + estimated.standard_errors[-1]
    assert not panel(averages_figure([pema], path), "Path length").collections
    own = dataclasses.replace(pema, sample=0.5, path_length_error=(0.0, 0.1, 0.2, 0.3, 0.4))
    assert "at most 0.4" in panel(averages_figure([own]), "Path length").get_title(loc="left")


def test_a_path_shows_length_and_tensors(path: PathLength) -> None:
    figure = path_figure(path)
    assert titles(figure) == ["Path length ℓ", "ℓ of each tensor at step 80"]
    assert lines(panel(figure, "Path length")) == [([*STEPS], [*path.lengths])]
    bars = panel(figure, "ℓ of each")
    longest = sorted(path.counted, key=lambda name: (-path.tensor_lengths(name)[-1], name))
    assert labels(bars.get_yticklabels()) == longest
    assert [bar.get_width() for bar in boxes(bars)] == [path.tensor_lengths(name)[-1] for name in longest]
    assert {bar.get_x() for bar in boxes(bars)} == {0}
    assert bars.get_xlim()[0] == 0
    assert heading(figure)[0] == f"Path length ℓ(T) = {path.lengths[-1]:.5g}"


def test_layers_are_a_map_and_the_rest_are_bars() -> None:
    path = llama(30)
    figure = path_figure(path)
    layers = panel(figure, "ℓ of each tensor in the layers")
    (mesh,) = layers.collections
    shown_lengths = mesh.get_array()
    assert shown_lengths is not None
    assert labels(layers.get_yticklabels()) == sorted(KINDS)
    for row, kind in enumerate(sorted(KINDS)):
        expected = [path.tensor_lengths(f"model.layers.{layer}.{kind}.weight")[-1] for layer in range(30)]
        assert [*shown_lengths[row]] == pytest.approx(expected, rel=1e-15)
    assert labels(layers.get_xticklabels()) == [str(layer) for layer in range(0, 30, 2)]
    assert mesh.norm.vmin == 0
    assert mesh.norm.vmax == pytest.approx(float(shown_lengths.max()))
    assert mesh.colorbar is not None
    assert mesh.colorbar.ax.get_ylabel() == "σ per parameter"
    bars = panel(figure, "ℓ of the other tensors")
    assert labels(bars.get_yticklabels()) == ["lm_head.weight", "model.embed_tokens.weight", "model.norm.weight"]
    assert [bar.get_width() for bar in boxes(bars)] == pytest.approx([0.4, 0.2, 0.05])
    assert bars.get_xlim()[0] == 0


def test_labels_keep_clear_of_each_other() -> None:
    figure = path_figure(llama(126))
    figure.draw_without_rendering()
    for axes in figure.axes:
        for texts in (axes.get_xticklabels(), axes.get_yticklabels()):
            places = [text.get_window_extent() for text in texts if text.get_text() and text.get_visible()]
            assert not any(one.overlaps(other) for one, other in itertools.combinations(places, 2))
    whole = figure.get_window_extent()
    for axes in figure.axes:
        box = axes.get_tightbbox()
        assert box is not None
        assert whole.x0 <= box.x0 <= box.x1 <= whole.x1 + 1


def test_cells_without_a_tensor_are_marked_and_large_ones_do_not_hide_the_others() -> None:
    lengths = {f"h.{layer}.{kind}": 0.1 for layer in range(3) for kind in "abc" if (layer, kind) != (1, "b")}
    layers = panel(path_figure(travelled(lengths | {"h.0.a": 30.0, "h.1.a": 0.0})), "ℓ of each")
    (mesh,) = layers.collections
    shown_lengths = mesh.get_array()
    assert isinstance(shown_lengths, np.ma.MaskedArray)
    assert shown_lengths.mask.tolist() == [[False] * 3, [False, True, False], [False] * 3]
    assert layers.patch.get_hatch()
    assert "hatched" in layers.get_xlabel()
    assert isinstance(mesh.norm, AsinhNorm)
    assert mesh.norm(0.0) == 0
    assert mesh.norm(0.1) > 0.1
    assert mesh.norm(30.0) == pytest.approx(1)
    assert mesh.colorbar is not None
    assert mesh.colorbar.ax.get_ylabel() == "σ per parameter\nlogarithmic above 0.1"
    assert {"0", "0.1", "1", "10"} <= {*labels(mesh.colorbar.ax.get_yticklabels())}


@pytest.mark.parametrize(
    ("names", "kinds", "numbers", "others"),
    [
        (["transformer.h.0.attn.c_attn.weight", "transformer.h.1.attn.c_attn.weight"], ["attn.c_attn"], [0, 1], []),
        (["enc.block.0.q", "dec.block.0.q", "dec.block.10.q"], ["dec.q", "enc.q"], [0, 10], []),
        (["blocks.2.b.bias", "blocks.2.b.weight", "blocks.3.b.bias", "n"], ["b", "b.bias"], [2, 3], ["n"]),
        (["0.weight", "2.weight"], ["weight"], [0, 2], []),
        (["prompts.0", "prompts.1"], ["prompts"], [0, 1], []),
        (["layers.0.a", "layers.1.b"], [], [], ["layers.0.a", "layers.1.b"]),
        (["layers.0.a", "layers.9999999.a", "x.²"], [], [], ["layers.0.a", "layers.9999999.a", "x.²"]),
        (["conv1.weight", "fc.weight"], [], [], ["conv1.weight", "fc.weight"]),
    ],
)
def test_names_tell_layers_and_kinds(names: list[str], kinds: list[str], numbers: list[int], others: list[str]) -> None:
    found, by_kind, outside = find_layers(travelled(dict.fromkeys(names, 1.0)))
    assert ([*by_kind], found, [*outside]) == (kinds, numbers, others)


def test_experts_of_a_layer_are_one_kind_with_the_length_of_all_their_parameters() -> None:
    path = travelled({f"layers.{layer}.experts.{expert}.up": 0.1 + expert for layer in (0, 1) for expert in (0, 1)})
    larger = {name: TensorPath(12, 0.5, (6.0,) * 4) for name in path.tensors if name.endswith(".1.up")}
    path = dataclasses.replace(path, tensors=TensorPaths.of({**path.tensors, **larger}))
    _, kinds, _ = find_layers(path)
    assert kinds == {"experts.*.up": pytest.approx([(4 * 0.1 + 12 * 4.0) / 16] * 2)}
    assert kinds["experts.*.up"][0] == pytest.approx(path.lengths[-1])


def test_what_does_not_fit_is_left_out_and_counted() -> None:
    bars = panel(path_figure(travelled({f"conv{place}": 0.01 * place for place in range(400)})), "ℓ of each tensor")
    assert labels(bars.get_yticklabels()) == [f"conv{place}" for place in range(399, 369, -1)]
    assert bars.get_xlabel() == "370 tensors that moved less are not shown"
    many = {f"h.{layer}.kind{kind:02}": 0.1 * (kind + layer + 1) for layer in range(2) for kind in range(50)}
    layers = panel(path_figure(travelled(many)), "ℓ of each tensor in the layers")
    assert labels(layers.get_yticklabels()) == [f"kind{kind:02}" for kind in range(10, 50)]
    assert layers.get_xlabel() == "layer\n10 kinds that moved less are not shown"


ODD = {
    "nothing moved": travelled({"h.0.a": 0.0, "h.1.a": 0.0, "b": 0.0}),
    "no tensor counts": PathLength(STEPS, TensorPaths.of({"norm": TensorPath(1, 0.0, (1.0,) * 4)}), "exclude", 0),
    "no tensor": PathLength(STEPS, TensorPaths.of({}), "exclude", 0),
    "one update": travelled({"weight": 0.1}, steps=(0, 3)),
    "200 checkpoints": travelled({"h.0.a": 2.0, "h.1.a": 1.0}, steps=[place**2 for place in range(200)]),
    "tiny": travelled({"h.0.a": 1e-9, "h.1.a": 1e-12, "b": 1e-15}),
    "huge": travelled({"h.0.a": 1e9, "h.1.a": 1e3, "b": 1e12}),
    "hostile names": travelled({HOSTILE: 1.0, f"h.0.{HOSTILE}": 1.0, f"h.1.{HOSTILE}": 1.0, "_": 1.0, "W" * 99: 1.0}),
    "1000 layers": travelled({f"h.{layer}.a": 0.1 for layer in range(99_000, 100_000)}),
}


@pytest.mark.parametrize("odd", ODD)
def test_odd_paths_can_be_drawn(odd: str, tmp_path: Path) -> None:
    path = ODD[odd]
    save_figure(path_figure(path), tmp_path / "path.png")
    assert (tmp_path / "path.png").read_bytes().startswith(SIGNATURES[".png"])
    assert lines(panel(path_figure(path), "Path length")) == [([*path.steps], [*path.lengths])]


def test_odd_averages_can_be_drawn(pema: ckavg.Averaged, tmp_path: Path) -> None:
    last = dataclasses.replace(
        pema, scheme="last", parameters={}, path_length=None, betas=(None,) * 5, weights=(0.0, 0.0, 0.0, 0.0, 1.0)
    )
    assert titles(averages_figure([last])) == ["Weight of each checkpoint in the average"]
    assert heading(averages_figure([last]))[0] == "Last checkpoint"
    once = dataclasses.replace(last, scheme="unknown", parameters={"a_b": 1}, betas=(None, None, None, None, 0.5))
    assert lines(panel(averages_figure([once]), "β")) == [([80], [0.5])]
    assert heading(averages_figure([once]))[0] == "unknown: a-b 1"
    still = dataclasses.replace(pema, path_length=(0.0,) * 5)
    (bottom, top) = panel(averages_figure([still]), "Path length").get_ylim()
    assert bottom == 0 < top
    steps, lengths = tuple(range(200)), tuple(0.1 * step for step in range(200))
    long = dataclasses.replace(
        pema, steps=steps, path_length=lengths, betas=(None, *(0.1,) * 199), weights=(0.005,) * 200
    )
    assert len(panel(averages_figure([long]), "Weight").patches) == 200
    late = dataclasses.replace(long, betas=(*(None,) * 199, 0.5))
    (point,) = panel(averages_figure([late]), "β").lines
    assert point.get_marker() == "o", "where there are many, the line shows them; one alone would not be seen"
    for place, results in enumerate(([last], [once], [long], [last, still, once], [pema] * 40)):
        save_figure(averages_figure(results), tmp_path / f"{place}.png")
    layers = travelled({"h.0.a": 0.1, "h.1.a": 0.2, "b": 0.3})
    save_figure(averages_figure([pema, last], layers), tmp_path / "sweep.png")
    assert len(panel(averages_figure([pema, last], layers), "β").lines) == 1, "an empty line took all room once"


def test_names_are_shown_as_they_are(pema: ckavg.Averaged, tmp_path: Path) -> None:
    escaped = label(HOSTILE, 500)
    assert escaped.startswith("\\x1b[31m$\\frac{a}{b}$\\n_x\\u6f22\\u5b57\\u202ey")
    assert len(label(HOSTILE, 36)) == 36
    (output,) = pema.outputs
    names = "_hidden", "$x^2$", HOSTILE
    results = [dataclasses.replace(pema, outputs=(dataclasses.replace(output, name=name),)) for name in names]
    figure = averages_figure(results)
    assert heading(figure)[2:] == ["_hidden", "$x^2$", label(HOSTILE, 40)]
    save_figure(averages_figure(results), tmp_path / "names.svg")
    bars = panel(path_figure(travelled(dict.fromkeys(names, 1.0))), "ℓ of each")
    assert {*labels(bars.get_yticklabels())} == {"_hidden", "$x^2$", label(HOSTILE, 36)}
    assert not any(text.get_parse_math() for text in bars.get_yticklabels())
    assert not any(text.get_parse_math() for text in figure.subfigs[0].legends[0].get_texts())


@pytest.mark.parametrize("name", ["a.png", "a.svg", "a.pdf", "A.PNG"])
def test_files_are_what_their_names_say_and_always_the_same(name: str, pema: ckavg.Averaged, tmp_path: Path) -> None:
    file = tmp_path / name
    check_plot_file(file)
    file.write_text("an earlier plot")
    save_figure(averages_figure([pema]), file)
    first = file.read_bytes()
    assert first.startswith(SIGNATURES[file.suffix.lower()])
    save_figure(averages_figure([pema]), file)
    assert file.read_bytes() == first
    assert [path.name for path in tmp_path.iterdir()] == [name], "nothing else is left"


def test_settings_of_the_user_do_not_matter_and_stay(pema: ckavg.Averaged, tmp_path: Path) -> None:
    save_figure(averages_figure([pema]), tmp_path / "plain.svg")
    own = {"text.usetex": True, "axes.facecolor": "red", "svg.fonttype": "none", "font.family": ["serif"]}
    with matplotlib.rc_context(own):  # type: ignore[arg-type]
        save_figure(averages_figure([pema]), tmp_path / "own.svg")
        assert {name: matplotlib.rcParams[name] for name in own} == own  # type: ignore[index]
    assert (tmp_path / "own.svg").read_bytes() == (tmp_path / "plain.svg").read_bytes()


def test_places_that_cannot_be_written_are_refused(path: PathLength, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "a.png").mkdir()
    for name, told in (
        ("missing/a.png", "missing is not a directory"),
        ("file/a.png", "file is not a directory"),
        ("a.png", r"a\.png is a directory"),
    ):
        with pytest.raises(WriteError, match=told):
            check_plot_file(tmp_path / name)
        with pytest.raises(WriteError, match="cannot be written"):
            save_figure(path_figure(path), tmp_path / name)
    for name in ("plot", "plot.jpg", ".png", "plot.png.gz"):
        with pytest.raises(SettingError, match=r"must end in \.png, \.svg or \.pdf"):
            check_plot_file(tmp_path / name)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.png", "file"], "nothing is left"


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_directory_without_permission_is_refused(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(WriteError, match="you may not write to"):
        check_plot_file(tmp_path / "a.png")


def test_without_matplotlib_the_refusal_says_how_to_get_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(SettingError) as refused:
        check_plot_file(tmp_path / "a.png")
    assert "pip install 'ckavg[plot]'" in refused.value.hint


def test_matplotlib_is_imported_only_to_draw_and_never_with_pyplot(tmp_path: Path) -> None:
    code = (
        "import sys\n"
        "from pathlib import Path\n"
        "from ckavg.output.plots import path_figure, save_figure\n"
        "from ckavg.path.table import PathLength, TensorPath, TensorPaths\n"
        "before = 'matplotlib' in sys.modules\n"
        "path = PathLength((0, 1), TensorPaths.of({'w': TensorPath(2, 1.0, (1.0,))}), 'exclude', 0)\n"
        f"save_figure(path_figure(path), Path({str(tmp_path / 'a.png')!r}))\n"
        "print(before, 'matplotlib.pyplot' in sys.modules, 'torch' in sys.modules)"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ran.stdout == "False False False\n"
