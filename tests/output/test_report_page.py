"""The page of `--report` in a real browser: it draws, sorts and computes, and asks nobody for anything."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import ckavg
from ckavg.averaging.rules import effective_weights
from ckavg.output.record import Evaluation
from ckavg.output.report import report_data, save_report
from ckavg.path.table import PathLength, TensorPath, TensorPaths
from ckavg.schemes import EMA, PEMA, Scheme, Timeline
from tests.output.browser import CHROMIUM, Page, open_browser
from tests.output.test_report import HOSTILE, STEPS
from tests.runs import random_run, write_run

pytestmark = [
    pytest.mark.exhaustive,
    pytest.mark.skipif(CHROMIUM is None, reason="no Chromium is installed"),
]
SCHEMES: tuple[Scheme, ...] = (
    PEMA(gamma=0.15),
    PEMA(gamma=0.3, pairing="next"),
    PEMA(gamma=0.2, clock="updates"),
    EMA(gamma=0.25, tau=3.0),
    ckavg.BEMA(eta=0.1),
    ckavg.Last(),
)
VALUES = 2.5, 2.25, None, 2.25, 2.75, 10.5
TENSORS = [f"model.layers.{layer}.{kind}.weight" for layer in range(30) for kind in ("mlp.up_proj", "q" * 60)]


@pytest.fixture(scope="module")
def records(tmp_path_factory: pytest.TempPathFactory) -> list[ckavg.Averaged]:
    run = ckavg.open_run(write_run(tmp_path_factory.mktemp("run"), random_run(5, len(STEPS), torch.float32), STEPS))
    found = [ckavg.average(run, each, out=run.home / f"result{number}") for number, each in enumerate(SCHEMES)]
    return [
        dataclasses.replace(
            record, evaluation=Evaluation("score {dir}", value, "" if value else "exit status 3", "loss", 0.1, "min")
        )
        for record, value in zip(found, VALUES, strict=True)
    ]


def data_of(records: list[ckavg.Averaged], name: str = "") -> dict[str, Any]:
    tensors = {f"{each}{name}": TensorPath(4, 0.5, (0.1 * place,) * 4) for place, each in enumerate([*TENSORS, "head"])}
    paths = [
        PathLength(STEPS, TensorPaths.of(tensors), "exclude", 0) if record.path_length else None for record in records
    ]
    marks = ["level with the best", "best, equal", "", "best, equal", "", ""]
    curve = [(step, Evaluation("c", 3 - step / 100, metric="loss", stderr=0.05)) for step in STEPS]
    return report_data(records, marks, paths, [(f"run{name}", curve), (f"result0{name}", curve)])


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Page]:
    with open_browser(tmp_path_factory.mktemp("profile")) as page:
        yield page


@pytest.fixture
def file(records: list[ckavg.Averaged], tmp_path: Path) -> Path:
    save_report(tmp_path / "report.html", data_of(records))
    return tmp_path / "report.html"


@pytest.fixture
def page(browser: Page, file: Path) -> Iterator[Page]:
    browser.open(file)
    yield browser
    assert not browser.complaints


def choose(page: Page, index: int, gamma: float | None = None) -> None:
    page.evaluate(f"$('chosen').value = {index}; $('chosen').dispatchEvent(new Event('change'))")
    if gamma is not None:
        page.evaluate(f"$('gamma').value = {gamma!r}; $('gamma').dispatchEvent(new Event('input'))")


def shown_numbers(page: Page, title: str) -> list[list[str]]:
    """The rows of the table below a picture."""
    rows: list[list[str]] = page.evaluate(
        f"""new Promise(done => {{
          const box = [...document.querySelectorAll('figure')].find(each => each.textContent.startsWith({title!r}));
          const cells = row => [...row.children].map(cell => cell.textContent);
          box.querySelector('details').open = true;
          setTimeout(() => done([...box.querySelectorAll('tr')].slice(1).map(cells)), 50);
        }})"""
    )
    return rows


def test_everything_is_drawn_and_nothing_complains(page: Page) -> None:
    titles = page.evaluate("[...document.querySelectorAll('figcaption')].map(each => each.firstChild.textContent)")
    assert titles == [
        "loss along the run",
        "Weight of each checkpoint",
        "β, the share of each checkpoint as it is taken in",
        "ℓ along the run",
        "ℓ by layer",
        "ℓ of the other tensors",
    ]
    assert page.evaluate("document.title") == "6 averages of one run"
    assert page.evaluate("$('subtitle').textContent").endswith("best: result1, loss 2.25 ± 0.1")
    assert page.evaluate("[...document.querySelectorAll('svg[role=img]')].every(each => each.clientHeight > 20)")


def test_what_a_picture_shows_can_be_read(page: Page) -> None:
    assert page.evaluate(
        "[...document.querySelectorAll('svg[role=img]')].every(each => each.querySelector('title').textContent"
        " && each.querySelector('desc').textContent.length > 20 && each.getAttribute('aria-label'))"
    )
    assert shown_numbers(page, "loss along")[:2] == [["run", "0", "3", "0.05"], ["run", "10", "2.9", "0.05"]]
    assert len(shown_numbers(page, "ℓ by layer")) == 60
    assert page.evaluate("document.querySelectorAll('caption').length") == 3


@pytest.mark.parametrize("index", range(4))
@pytest.mark.parametrize("gamma", [0.0, 1e-3, 0.15, 0.4321, 1.0])
def test_the_slider_has_the_weights_of_python(
    page: Page, records: list[ckavg.Averaged], index: int, gamma: float
) -> None:
    choose(page, index, gamma)
    stated = records[index].parameters | {"gamma": gamma}
    coefficients = type(SCHEMES[index])(**stated).coefficients(Timeline(STEPS, records[index].path_length))
    got = page.evaluate(f"(b => [b, weightsOf(b)])(betasFor(data.averages[{index}], Number($('gamma').value)))")
    assert got[0] == [None, *(pytest.approx(beta, rel=1e-9) for beta in coefficients.betas[1:])]
    assert got[1] == pytest.approx(effective_weights(coefficients), rel=1e-9, abs=1e-12)
    drawn = [float(row[2]) for row in shown_numbers(page, "Weight of each")]
    assert drawn == pytest.approx(effective_weights(coefficients), rel=1e-2, abs=1e-9)
    count = 1 / sum(weight**2 for weight in effective_weights(coefficients))
    assert page.evaluate("$('readout').textContent").startswith(f"Like {count:.1f} equal checkpoints")


def test_an_average_is_shown_as_it_was_formed(page: Page, records: list[ckavg.Averaged]) -> None:
    for index, record in enumerate(records):
        choose(page, index)
        assert [float(row[2]) for row in shown_numbers(page, "Weight of each")] == pytest.approx(
            [*record.weights], rel=1e-2, abs=1e-9
        )
        assert page.evaluate("$('slider').hidden") == (index > 3)
        assert page.evaluate("$('reset').disabled")
    choose(page, 0, 0.7)
    assert "no such average was formed" in page.evaluate("$('readout').textContent")
    page.evaluate("$('reset').click()")
    assert page.evaluate("$('value').textContent") == "0.15"


def test_the_keyboard_moves_the_slider_and_sorts(page: Page) -> None:
    choose(page, 0)
    page.evaluate("$('gamma').focus()")
    page.press("ArrowRight", 39)
    assert page.evaluate("$('value').textContent") == "0.16"
    page.evaluate("document.querySelector('th button').focus()")
    page.press("Enter", 13, "\r")
    assert page.evaluate("document.querySelector('th').getAttribute('aria-sort')") == "ascending"


def test_columns_sort(page: Page) -> None:
    def order(column: int) -> tuple[str, list[str]]:
        page.evaluate(f"document.querySelectorAll('th button')[{column}].click()")
        said = page.evaluate(f"document.querySelectorAll('thead th')[{column}].getAttribute('aria-sort')")
        return said, page.evaluate("[...document.querySelectorAll('tbody th')].map(each => each.textContent.at(-1))")

    assert order(1) == ("ascending", ["1", "3", "0", "4", "5", "2"]), "numbers, not texts; what failed is last"
    assert order(1) == ("descending", ["5", "4", "0", "1", "3", "2"])
    assert order(0) == ("ascending", [*"012345"])
    assert page.evaluate("document.querySelectorAll('[aria-sort=none]').length") == 6
    assert page.evaluate("document.querySelectorAll('mark').length") == 3


@pytest.mark.parametrize("dark", [False, True])
def test_it_fits_a_phone_and_follows_the_colours_of_the_system(browser: Page, file: Path, dark: bool) -> None:
    browser.open(file, width=360, height=740, dark=dark)
    assert browser.evaluate("document.documentElement.scrollWidth") <= 360
    wider = "[...document.querySelectorAll('figure')].filter(each => each.scrollWidth > each.clientWidth).length"
    assert browser.evaluate(wider) == 0
    background, ink = (
        sum(json.loads(f"[{colour[4:-1]}]"))
        for colour in browser.evaluate("(s => [s.backgroundColor, s.color])(getComputedStyle(document.body))")
    )
    assert (background < ink) == dark
    assert not browser.complaints


def test_hostile_names_run_nothing(browser: Page, records: list[ckavg.Averaged], tmp_path: Path) -> None:
    odd = [
        dataclasses.replace(
            record, warnings=(HOSTILE,), outputs=(dataclasses.replace(record.output, name=HOSTILE + "x" * 300),)
        )
        for record in records
    ]
    save_report(tmp_path / "hostile.html", data_of(odd, HOSTILE))
    browser.open(tmp_path / "hostile.html", width=360)
    assert browser.evaluate("typeof hacked") == "undefined"
    assert browser.evaluate("document.documentElement.scrollWidth") <= 360
    assert browser.evaluate("document.querySelectorAll('img, script').length") == 2
    assert not browser.complaints


def odd_data(records: list[ckavg.Averaged]) -> dict[str, dict[str, Any]]:
    pema, last = records[0], records[5]
    steps = (*range(0, 10_000_000 * 199, 10_000_000), 80 + 10_000_000 * 199)
    long: dict[str, Any] = {"steps": steps, "outputs": (dataclasses.replace(pema.output, step=steps[-1]),)}
    long |= {"betas": (None, *(0.5,) * 199), "path_length": tuple(1e9 * k for k in range(200))}
    weights = (-0.5, *(1.5 / 199,) * 199)
    still = dataclasses.replace(pema, path_length=(0.0,) * 5, path_length_error=(0.0,) * 5, evaluation=None)
    alone: dict[str, Any] = {"steps": (80,), "betas": (None,), "weights": (1.0,), "anchor_step": 80}
    old: dict[str, Any] = {"effective_count": None, "mean_age": None, "anchor_weight": None}
    tiny = PathLength(STEPS, TensorPaths.of({"a": TensorPath(1, 1.0, (0.0,) * 4)}), "exclude", 0)
    return {
        "one": report_data([pema]),
        "nothing moved": report_data([still], paths=[tiny]),
        "one checkpoint": report_data([dataclasses.replace(last, **alone, path_length=None)]),
        "200 checkpoints": report_data([dataclasses.replace(pema, **long, weights=weights, anchor_step=0)]),
        "all failed": report_data([records[2]] * 2),
        "of an older version": report_data([dataclasses.replace(pema, **old, evaluation=None)]),
        "100 averages": report_data([dataclasses.replace(pema, warnings=("a",))] * 100),
    }


def test_odd_averages_can_be_drawn(browser: Page, records: list[ckavg.Averaged], tmp_path: Path) -> None:
    for name, data in odd_data(records).items():
        save_report(tmp_path / "odd.html", data)
        for width in (360, 1200):
            browser.open(tmp_path / "odd.html", width=width)
            assert browser.evaluate("$('versions').textContent").startswith("ckavg "), name
            assert browser.evaluate("document.documentElement.scrollWidth") <= width, name
            assert "NaN" not in browser.evaluate("document.body.innerHTML.replace(/<script.*/s, '')"), name
            assert not browser.complaints, name
    assert "<h1" in browser.evaluate("document.body.innerHTML")
