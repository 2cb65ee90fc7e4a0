"""The page of `--report`: its numbers are those of the records, whatever the names, and it holds nothing else."""

from __future__ import annotations

import base64
import dataclasses
import hashlib
import json
import math
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch

import ckavg
from ckavg.errors import SettingError, WriteError
from ckavg.output.record import Evaluation
from ckavg.output.report import check_report_file, report_data, report_html, save_report
from ckavg.path.table import PathLength, TensorPath, TensorPaths
from tests.cli.runner import run_cli
from tests.runs import random_run, write_run

STEPS = (0, 10, 20, 40, 80)
WORDS = (
    "pema:gamma=0.1,0.2,every=10,20 pema:gamma=0.3,pairing=next,clock=updates ema:gamma=0.2,0.4,tau=2 bema mean last"
)
HOSTILE = "</script><script>hacked=1</script><!--<img src=x onerror=hacked=1>\u2028\u202e'\"&amp;\x1b[31m"
SECRET = "hf_aBcDeF1234567890"
LOSSES = (
    "case $(basename {dir}) in pema-gamma0.1*) v=0.5 ;; pema*) v=0.505 ;; bema*) exit 3 ;; *) v=0.75 ;; esac; "
    f"echo loss $v loss_stderr 0.01 --token {SECRET}"
)


class Parsed(HTMLParser):
    """The elements of a page in order, and the text of scripts and styles."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, tuple[tuple[str, str | None], ...]]] = []
        self.texts: list[tuple[str, str]] = []
        self.feed(page)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, tuple(attrs)))

    def handle_data(self, data: str) -> None:
        self.texts.append((self.elements[-1][0] if self.elements else "", data))


def data_of(page: str) -> dict[str, Any]:
    (text,) = re.findall(r'<script type="application/json" id="data">(.*?)</script>', page, re.DOTALL)
    data: dict[str, Any] = json.loads(text)
    return data


@dataclasses.dataclass(frozen=True)
class Swept:
    run: Path
    page: str
    said: dict[str, Any]

    @property
    def data(self) -> dict[str, Any]:
        return data_of(self.page)


@pytest.fixture(scope="module")
def swept(tmp_path_factory: pytest.TempPathFactory) -> Swept:
    root = tmp_path_factory.mktemp("secret-place")
    run = write_run(root / "run", random_run(0, len(STEPS), torch.float32), STEPS)
    words = [*WORDS.split(), "--eval", LOSSES, "--eval-metric", "loss", "--eval-stderr", "loss_stderr", "--eval-run"]
    done = run_cli("sweep", run, *words, "--json", "--report", root / "report.html")
    assert done.exit_code == 0, done.output
    return Swept(run, (root / "report.html").read_text(encoding="utf-8"), json.loads(done.stdout))


@pytest.fixture(scope="module")
def record(tmp_path_factory: pytest.TempPathFactory) -> ckavg.Averaged:
    run = write_run(tmp_path_factory.mktemp("one"), random_run(1, len(STEPS), torch.float32), STEPS)
    return ckavg.average(ckavg.open_run(run), ckavg.PEMA(gamma=0.3))


def test_the_averages_are_the_records(swept: Swept) -> None:
    averages, said = swept.data["averages"], swept.said["averages"]
    assert [one["name"] for one in averages] == [one["outputs"][-1]["name"] for one in said]
    fields = "scheme parameters steps betas weights path_length effective_count mean_age anchor_weight"
    for one, known in zip(averages, said, strict=True):
        assert {name: one[name] for name in fields.split()} == {name: known[name] for name in fields.split()}
        assert {name: one["evaluation"][name] for name in ("value", "stderr", "problem")} == {
            name: known["evaluation"][name] for name in ("value", "stderr", "problem")
        }
        assert one["weights"][one["anchor"]] == known["anchor_weight"]
    by_name = {one["name"]: one for one in averages}
    assert by_name["pema-gamma0.1-every10"]["mark"] == "best, equal"
    assert by_name["pema-gamma0.2-every20"]["mark"] == "level with the best"
    assert by_name["bema-eta0.2"]["evaluation"]["problem"].startswith("exit status 3")
    assert (by_name["last"]["mark"], by_name["last"]["command"]) == ("", "ckavg sweep last")
    assert by_name["pema-gamma0.1-every20"]["command"] == "ckavg pema --gamma 0.1 --every 20"
    assert by_name["pema-gamma0.1-every20"]["chosen"] == "every 20"


def test_beta_and_weights_follow_from_the_path_and_the_steps(swept: Swept) -> None:
    """What the page computes while the slider moves, from the same numbers."""
    checked = []
    for one in swept.data["averages"]:
        steps, length, stated = one["steps"], one["path_length"], one["parameters"]
        if one["scheme"] == "pema":
            span = steps[-1] - steps[0] if stated["clock"] == "steps" else len(steps) - 1
            taken = length[1:] if stated["pairing"] == "same" else length[:-1]
            betas = [math.exp(-stated["gamma"] * math.log(1 + span * length[-1] * each)) for each in taken]
        elif one["scheme"] == "ema":
            betas = [math.exp(-stated["gamma"] * math.log(step - steps[0] + stated["tau"])) for step in steps[1:]]
        else:
            continue
        kept = [1 - beta for beta in betas]
        weights = [math.prod(kept), *(beta * math.prod(kept[k + 1 :]) for k, beta in enumerate(betas))]
        assert one["betas"] == [None, *(pytest.approx(beta, rel=1e-9) for beta in betas)]
        assert one["weights"] == pytest.approx(weights, rel=1e-9, abs=1e-15)
        checked.append(one["name"])
    assert len(checked) == 7


def test_the_metric_against_each_setting(swept: Swept) -> None:
    axes = {axis["name"]: axis for axis in swept.data["axes"]}
    lines = {line["name"]: line["points"] for line in axes["gamma"]["lines"]}
    assert lines == {
        "pema, every 10": [[0.1, 0.5, 0.01], [0.2, 0.505, 0.01]],
        "pema, every 20": [[0.1, 0.5, 0.01], [0.2, 0.505, 0.01]],
        "ema": [[0.2, 0.75, 0.01], [0.4, 0.75, 0.01]],
    }
    assert axes["gamma"]["flat"] == [{"name": "last", "value": 0.75}]
    assert [line["name"] for line in axes["every"]["lines"]] == ["pema, gamma 0.1", "pema, gamma 0.2"]
    assert axes.keys() == {"gamma", "every"}


def test_curves_and_paths(swept: Swept) -> None:
    data = swept.data
    assert [(curve["name"], [point[0] for point in curve["points"]]) for curve in data["curves"]] == [("run", [*STEPS])]
    assert [(path["name"], path["steps"]) for path in data["paths"]] == [
        ("every 10", [*STEPS]),
        ("every 20", [0, 20, 40, 80]),
    ]
    for path in data["paths"]:
        assert path["lengths"] == next(one["path_length"] for one in data["averages"] if one["steps"] == path["steps"])
        assert path["layers"]["others"]


def test_layers_have_the_path_of_their_tensors(record: ckavg.Averaged) -> None:
    tensors = {f"h.{layer}.{kind}": TensorPath(4, 0.5, (2.0 * layer,) * 4) for layer in (0, 1, 2) for kind in "ab"}
    tensors |= {f"t{number:02}": TensorPath(2, 1.0, (number / 2,) * 4) for number in range(40)}
    del tensors["h.1.b"]
    (path,) = report_data([record], paths=[PathLength(STEPS, TensorPaths.of(tensors), "exclude", 0)])["paths"]
    layers = path["layers"]
    assert layers["numbers"] == [0, 1, 2]
    assert layers["kinds"] == [("a", [0.0, 4.0, 8.0]), ("b", [0.0, None, 8.0])]
    assert layers["others"] == [(f"t{number:02}", float(number)) for number in range(39, 9, -1)]
    assert layers["hidden"] == [0, 10]


def test_names_from_outside_are_data_and_nothing_else(record: ckavg.Averaged) -> None:
    def page(name: str) -> str:
        evaluation = Evaluation(name, 1.0, name, name, 0.1, "min")
        (output,) = record.outputs
        odd = dataclasses.replace(
            record,
            outputs=(dataclasses.replace(output, name=name),),
            selection={"match": name},
            warnings=(name,),
            evaluation=evaluation,
        )
        path = PathLength(STEPS, TensorPaths.of({name: TensorPath(1, 1.0, (1.0,) * 4)}), "exclude", 0)
        return report_html(report_data([odd], [name], [path], [(name, [(0, evaluation), (10, evaluation)])]))

    hostile, plain = page(HOSTILE), page("plain")
    assert Parsed(hostile).elements == Parsed(plain).elements
    assert not re.search("[\u2028\u2029\u202e\x1b]", hostile)
    (text,) = re.findall(r'id="data">(.*?)\n?</script>\n<script>', hostile, re.DOTALL)
    assert "<" not in text
    name = data_of(hostile)["averages"][0]["name"]
    assert name.startswith("</script><script>hacked=1</script><!--<img")
    assert r"\u2028\u202e" in name, "as text, so that it reverses and breaks nothing"
    assert data_of(page("DATA"))["averages"][0]["name"] == "DATA"


def test_the_page_stands_by_itself_and_runs_only_its_own_script(swept: Swept) -> None:
    parsed = Parsed(swept.page)
    assert not {"link", "img", "iframe", "object", "base", "form"} & {tag for tag, _ in parsed.elements}
    assert not [
        attrs for _, attrs in parsed.elements if any(key in ("src", "style") or key[:2] == "on" for key, _ in attrs)
    ]
    assert set(re.findall(r"https?://[^\s\"'<]+", swept.page)) == {"http://www.w3.org/2000/svg"}
    (policy,) = (dict(attrs)["content"] or "" for tag, attrs in parsed.elements if "http-equiv" in dict(attrs))
    rules = dict(rule.strip().split(" ", 1) for rule in policy.split(";"))
    assert rules["default-src"] == "'none'"
    for tag in ("script", "style"):
        (text,) = re.findall(rf"<{tag}>(.*?)</{tag}>", swept.page, re.DOTALL)
        assert rules[f"{tag}-src"] == f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"
    assert not re.search(r"innerHTML|insertAdjacentHTML|document\.write|eval\(", swept.page)


def test_it_holds_no_places_and_no_secrets(swept: Swept) -> None:
    assert SECRET not in swept.page
    assert "secret-place" not in swept.page
    assert str(swept.run.parent.parent) not in swept.page
    assert "--token …" in swept.data["eval_command"]


def test_its_size_is_bounded(record: ckavg.Averaged) -> None:
    assert len(report_html({})) < 40_000
    steps = tuple(range(200))
    long = dataclasses.replace(
        record, steps=steps, betas=(None, *(1 / 3,) * 199), weights=(1 / 300,) * 200, path_length=(1 / 7,) * 200
    )
    tensors = {f"h.{layer}.kind{kind}": TensorPath(4, 0.5, (1 / 3,) * 199) for layer in range(80) for kind in range(60)}
    page = report_html(report_data([long] * 50, paths=[PathLength(steps, TensorPaths.of(tensors), "exclude", 0)] * 50))
    assert len(page) < 1_000_000


def test_one_average_without_an_evaluation(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", random_run(2, 3, torch.float32), STEPS[:3])
    file = tmp_path / "a.HTML"
    file.write_text("an earlier page")
    assert run_cli("mean", run, "--quiet", "--report", file).exit_code == 0
    data = data_of(file.read_text(encoding="utf-8"))
    assert [one["name"] for one in data["averages"]] == ["mean"]
    assert (data["metric"], data["axes"], data["curves"], data["paths"]) == ("", [], [], [])
    assert data["averages"][0]["evaluation"] is None
    assert not list(tmp_path.glob(".ckavg*"))


def test_places_that_cannot_be_written_are_refused_before_anything_is_read(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", random_run(3, 2, torch.float32), STEPS[:2])
    (tmp_path / "a.html").mkdir()
    for name, told in (
        ("missing/b.html", "missing is not a directory"),
        ("a.html", "a.html is a directory"),
        ("b.txt", "must end in .html"),
        ("run/checkpoint-0/b.html", "lies inside the checkpoint"),
    ):
        refused = run_cli("mean", run, "--report", tmp_path / name)
        assert refused.exit_code == (2 if name == "b.txt" else 1), name
        assert told in refused.stderr.replace("\n", " "), name
    assert not (run / "averaged").exists()
    with pytest.raises(SettingError, match=r"must end in \.html"):
        check_report_file(tmp_path / "report")
    with pytest.raises(WriteError, match="cannot be written") as error:
        save_report(tmp_path / "missing" / "b.html", {})
    assert "--report" in error.value.hint
