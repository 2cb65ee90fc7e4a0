"""The model card: what the Hub reads in it, what people read in it, and that nothing breaks out of it."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
import yaml
from huggingface_hub import metadata_load
from markdown_it import MarkdownIt

import ckavg
from ckavg.output.origin import pipeline_of
from ckavg.schemes import Scheme
from tests.output.cards import STEPS, averaged, blocks, card_of, configure, fields_of
from tests.runs import CONFIG, random_run, write_checkpoint, write_run

SCHEMES = [
    (ckavg.PEMA(), ["Pathwise {EMA}"]),
    (ckavg.EMA(), ["Pathwise {EMA}"]),
    (ckavg.MomentumEMA(momentum=0.9), ["How to Scale Your {EMA}"]),
    (ckavg.BEMA(), ["{EMA} Without the Lag"]),
    (ckavg.OUEMA(), ["{EMA} Without the Lag"]),
    (ckavg.DEMA(), ["{EMA} Without the Lag"]),
    (ckavg.Mean(), ["Averaging Weights", "{WSM}"]),
    (ckavg.Mean(decay="cosine"), ["{WSM}"]),
    (ckavg.Last(), []),
]


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return write_run(tmp_path / "checkpoints", random_run(3, len(STEPS), torch.float32), STEPS)


# --- metadata ---


def test_metadata_of_a_fine_tune(source: Path) -> None:
    configure(source, CONFIG | {"_name_or_path": "owner/base"})
    (source / "checkpoint-30" / "README.md").write_text(
        "---\nlicense: apache-2.0\nlanguage:\n- en\n- de\ndatasets: owner/data\ntags:\n- sft\n- trl\n- sft\n"
        "model-index:\n- name: x\n  results: []\nlibrary_name: other\n---\n# The run\n"
    )
    directory = averaged(source, ckavg.PEMA())
    card = (directory / "README.md").read_text()
    assert fields_of(card) == {
        "base_model": "owner/base",
        "base_model_relation": "finetune",
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "license": "apache-2.0",
        "language": ["en", "de"],
        "datasets": ["owner/data"],
        "tags": ["checkpoint-averaging", "pema", "sft", "trl"],
    }
    assert metadata_load(directory / "README.md") == fields_of(card)
    assert "Training began with [`owner/base`](https://huggingface.co/owner/base)." in card


def test_an_adapter_is_an_adapter(tmp_path: Path) -> None:
    source = tmp_path / "run"
    for step, weights in zip(STEPS, random_run(1, len(STEPS), torch.float32), strict=True):
        directory = write_checkpoint(source / f"checkpoint-{step}", weights, step=step)
        (directory / "model.safetensors").rename(directory / "adapter_model.safetensors")
        (directory / "config.json").unlink()
    configure(source, {"base_model_name_or_path": "owner/base", "task_type": "CAUSAL_LM"}, "adapter_config.json")
    (source / "checkpoint-30" / "README.md").write_text(
        "---\nbase_model: owner/other\ntags: ['base_model:adapter:/home/me/base', lora]\n---\n"
    )
    assert fields_of(card_of(source)) == {
        "base_model": "owner/base",
        "base_model_relation": "adapter",
        "library_name": "peft",
        "pipeline_tag": "text-generation",
        "tags": ["checkpoint-averaging", "mean", "lora"],
    }


def test_the_card_beside_the_checkpoints_counts(source: Path) -> None:
    (source / "README.md").write_text(
        "---\nbase_model: [a/one, a/two]\nbase_model_relation: merge\nlicense: mit\n---\n"
    )
    (source / "checkpoint-30" / "README.md").write_text("# no front matter\n")
    fields = fields_of(card_of(source))
    assert (fields["base_model"], fields["base_model_relation"]) == (["a/one", "a/two"], "merge")
    assert fields["license"] == "mit"


def test_license_of_the_base_model(source: Path, tmp_path: Path) -> None:
    cached = tmp_path / "models--owner--some-base" / "snapshots" / "0123"
    write_checkpoint(cached, random_run(3, 1, torch.float32)[0])
    (cached / "README.md").write_text(
        "---\nlicense: other\nlicense_name: llama-9\nlicense_link: https://example.org/l\ndatasets: a/b\n---\n"
    )
    (source / "checkpoint-0").rename(tmp_path / "away")
    fields = fields_of(card_of(source, init=cached))
    assert (fields["license"], fields["license_name"]) == ("other", "llama-9")
    assert fields["license_link"] == "https://example.org/l"
    assert (fields["base_model"], fields["base_model_relation"]) == ("owner/some-base", "finetune")
    assert "datasets" not in fields


def test_license_file(source: Path) -> None:
    (source / "checkpoint-30" / "LICENSE").write_text("Mine alone.")
    fields = fields_of(card_of(source))
    assert (fields["license"], fields["license_link"]) == ("other", "LICENSE")


@pytest.mark.parametrize(
    ("architectures", "task"),
    [
        (["Qwen3ForCausalLM"], "text-generation"),
        (["GPT2LMHeadModel"], "text-generation"),
        (["BertForMaskedLM"], "fill-mask"),
        (["Gemma3ForConditionalGeneration"], ""),
        (["LlamaForSequenceClassification"], ""),
        (["AForCausalLM", "BForMaskedLM"], ""),
        (["x y ForCausalLM"], ""),
        ("LlamaForCausalLM", ""),
        ([7], ""),
        (None, ""),
    ],
)
def test_task_where_it_is_certain(architectures: object, task: str) -> None:
    assert pipeline_of({"architectures": architectures}, {}) == task


def test_a_local_directory_is_no_base_model(source: Path, tmp_path: Path) -> None:
    (tmp_path / "outputs" / "base").mkdir(parents=True)
    for path in (str(tmp_path / "outputs" / "base"), "outputs/base", "../base", "./owner/base"):
        configure(source, CONFIG | {"_name_or_path": path})
        (source / "README.md").write_text(f"---\nbase_model: {path}\ndatasets: [{path}]\ntags: [{path}]\n---\n")
        card = card_of(source, force=True)
        assert "base_model" not in fields_of(card)
        assert "datasets" not in fields_of(card)
        assert str(tmp_path) not in card


def test_a_card_of_the_run_that_cannot_be_read_is_passed_over(source: Path) -> None:
    (source / "checkpoint-30" / "README.md").write_text("---\nlicense: [mit\n---\n")
    (source / "README.md").write_text("---\nlicense: mit\n---\n")
    result = ckavg.average(ckavg.open_run(source), ckavg.Mean())
    (warning,) = (each for each in result.warnings if "is not used" in each)
    assert "checkpoint-30/README.md is not used: its front matter is not valid YAML" in warning
    card = (result.directory / "README.md").read_text()
    assert fields_of(card)["license"] == "mit"
    assert str(source) not in card
    assert "The card RUN/checkpoint-30/README.md is not used: its front matter" in card


# --- text ---


@pytest.mark.parametrize(("scheme", "titles"), SCHEMES, ids=lambda value: getattr(value, "label", ""))
def test_every_scheme_cites_its_papers(source: Path, scheme: Scheme, titles: list[str]) -> None:
    card = card_of(source, scheme)
    assert not {"base_model", "base_model_relation", "license"} & fields_of(card).keys()
    _, *bibtex = [text for kind, text in blocks(card) if kind == "fence"]  # the first loads the model
    assert len(bibtex) == (1 if titles else 0)
    for title in titles:
        assert f"title = {{{title}" in bibtex[0]
    for text in bibtex:
        assert text.count("{") == text.count("}")
        assert text.count("\n@") + text.startswith("@") == len(titles)
    assert scheme.title in card
    assert "withheld" not in card
    assert ("**ℓ**, the normalized path length," in card) == (scheme.name == "pema")
    assert ("**β** is the share" in card) == (scheme.name != "last")
    assert ("**α**" in card) == (scheme.name in ("bema", "ouema"))
    assert str(source) not in card


@pytest.mark.parametrize("count", [4, 24, 30])
def test_weights_are_listed_and_the_middle_of_a_long_run_is_summed(tmp_path: Path, count: int) -> None:
    steps = tuple(range(0, 10 * count, 10))
    weights = [{"w": torch.full((2,), float(step))} for step in steps]
    result = ckavg.average(ckavg.open_run(write_run(tmp_path / "run", weights, steps)), ckavg.BEMA())
    card = (result.directory / "README.md").read_text()
    rows = re.findall(r"^\| (\d+|…) \|.*\| (-?[\d.]+|…) \|$", card, re.MULTILINE)
    listed = [(str(step), f"{weight:.4f}") for step, weight in zip(steps, result.weights, strict=True)]
    assert rows == (listed if count <= 24 else [*listed[:8], ("…", "…"), *listed[-16:]])
    between = (
        f"checkpoints in the middle are not shown; together they have the weight {sum(result.weights[8:-16]):.4f}."
    )
    assert (f"{count - 24} {between}" in card) == (count > 24)


def test_what_took_no_part_is_not_counted(source: Path, tmp_path: Path) -> None:
    assert "The weighted average of 3 checkpoints of one training run, from step 10 to step\n30" in card_of(
        source, ckavg.BEMA(burn_in=5)
    )
    assert "The checkpoint of step 30 of a training run" in card_of(source, ckavg.Last())


def test_the_base_model_of_the_command_is_named(source: Path, tmp_path: Path) -> None:
    configure(source, CONFIG | {"_name_or_path": "owner/base"})
    init = write_checkpoint(tmp_path / "secret-place", random_run(3, 1, torch.float32)[0])
    (source / "checkpoint-0").rename(tmp_path / "away")
    card = card_of(source, ckavg.EMA(), init=init)
    assert "    ckavg ema --gamma 0.15 --init BASE_MODEL\n" in card
    assert "`BASE_MODEL` is the directory of the model that training began with, `owner/base`." in card
    assert "secret-place" not in card


# --- what is hostile ---


def test_nothing_of_a_run_breaks_out(source: Path, tmp_path: Path) -> None:
    nasty = "owner/base\n---\n# x | `y` <script>"
    configure(source, CONFIG | {"_name_or_path": nasty, "architectures": [nasty]})
    stated = dict.fromkeys(("license", "license_name", "license_link", "language", "datasets", "tags"), nasty)
    stated |= {"base_model": nasty, "base_model_relation": nasty, "pipeline_tag": nasty}
    (source / "README.md").write_text(f"---\n{yaml.safe_dump(stated)}---\n")
    card = card_of(source, out=tmp_path / "a | b `c` <b> ~~d~~ $e$ [f](g)")
    assert fields_of(card) == {"library_name": "transformers", "tags": ["checkpoint-averaging", "mean"]}
    assert "<script>" not in card
    kinds = [kind for kind, _ in blocks(card)]
    assert (kinds.count("fence"), kinds.count("code_block")) == (2, 1)
    html = MarkdownIt().enable(["table", "strikethrough"]).render(card.split("\n---\n", 1)[1])
    assert "<h1>a | b `c` &lt;b&gt; ~~d~~ $e$ [f](g)</h1>" in html


@pytest.mark.parametrize(
    "content", [b"---\n" + b"a: " * 9 + b"\n---\n", b"\xff\xfe", b"---\na: &a [*a]\n---\n", b"---\n\x00\n---\n"]
)
def test_a_hostile_card_of_the_run_costs_a_warning(source: Path, content: bytes) -> None:
    (source / "README.md").write_bytes(content)
    result = ckavg.average(ckavg.open_run(source), ckavg.Mean())
    assert sum("is not used" in each for each in result.warnings) == 1


def test_a_card_that_leads_elsewhere_is_not_read(source: Path, tmp_path: Path) -> None:
    (tmp_path / "secret.md").write_text("---\nlicense: mit\n---\n")
    (source / "checkpoint-30" / "README.md").symlink_to(tmp_path / "secret.md")
    result = ckavg.average(ckavg.open_run(source), ckavg.Mean())
    assert "license" not in fields_of((result.directory / "README.md").read_text())
    assert any("outside the directory that was named" in each for each in result.warnings)
