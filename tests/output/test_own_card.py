"""The user's own card: its fields win, its text comes first, and what cannot be used is refused."""

from __future__ import annotations

import datetime
import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import ModelCardData

import ckavg
from ckavg.output.origin import parse_card
from tests.cli.runner import run_cli
from tests.output.cards import STEPS, averaged, card_of, configure, fields_of
from tests.runs import CONFIG, random_run, write_run


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return write_run(tmp_path / "checkpoints", random_run(3, len(STEPS), torch.float32), STEPS)


def test_fields_and_text_of_the_user_come_first(source: Path, tmp_path: Path) -> None:
    configure(source, CONFIG | {"_name_or_path": "owner/base"})
    (source / "README.md").write_text("---\nlicense: other\nlicense_name: mine\nlanguage: en\n---\n")
    own = tmp_path / "own.md"
    own.write_text(
        "---\nlicense: mit\nlanguage: null\nbase_model: [a/b, c/d]\nextra: {x: 1.5e-7, y: [true, 2024-05-06]}\n---\n"
        "\n# My model\n\nGood at **chess**.\n\n---\n\n```\n---\n```\n",
        newline="\r\n",
    )
    card = card_of(source, card=own)
    fields = fields_of(card)
    assert fields == {
        "base_model": ["a/b", "c/d"],
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "license": "mit",
        "tags": ["checkpoint-averaging", "mean"],
        "extra": {"x": 1.5e-7, "y": [True, datetime.date(2024, 5, 6)]},
    }
    text = card.split("\n---\n", 1)[1]
    assert text.lstrip().startswith(
        "# My model\n\nGood at **chess**.\n\n---\n\n```\n---\n```\n\n## Average of checkpoints"
    )
    assert text.count("\n# ") == 1
    assert "### How it was averaged" in text


def test_null_removes_a_field_and_another_base_model_is_related_anew(source: Path, tmp_path: Path) -> None:
    configure(source, CONFIG | {"_name_or_path": "owner/base"})
    own = tmp_path / "own.md"
    own.write_text("---\nbase_model_relation: null\npipeline_tag: null\n---\n")
    assert fields_of(card_of(source, card=own)) == {
        "base_model": "owner/base",
        "library_name": "transformers",
        "tags": ["checkpoint-averaging", "mean"],
    }
    (source / "README.md").write_text("---\nbase_model: a/one\nbase_model_relation: merge\n---\n")
    own.write_text("---\nbase_model: c/d\ntags: [mine]\n---\n")
    fields = fields_of(card_of(source, card=own, force=True))
    assert (fields["base_model"], fields["base_model_relation"], fields["tags"]) == ("c/d", "finetune", ["mine"])


@pytest.mark.parametrize(
    ("content", "why"),
    [
        (b"\xff", "it is not UTF-8 text (byte 0)"),
        (b"---\nlicense: mit\n", "has no closing ---"),
        (b"---\n- a\n---\n", "is not a mapping"),
        (b"---\na: [1\n---\n", "is not valid YAML (line 3)"),
        (b"---\na: 1\na: 2\n---\n", "states 'a' twice"),
        (b"---\na: &x [1]\nb: *x\n---\n", "uses an alias"),
        (b"---\n1: a\n---\n", "its front matter is not in the form that the Hub expects"),
        (b"---\na: !!python/object/apply:os.getcwd []\n---\n", "is not valid YAML"),
        (b"---\na: 2024-02-30\n---\n", "day is out of range for month"),
        (b"---\na: " + b"[" * 99 + b"]" * 99 + b"\n---\n", "nested more than 32 deep"),
        (b"---\nmodel-index: 7\n---\n", "its model-index is not in the form that the Hub expects"),
        (b"---\nto_yaml: 7\n---\n", "its front matter is not in the form that the Hub expects"),
    ],
)
def test_a_card_that_cannot_be_used_is_refused(source: Path, tmp_path: Path, content: bytes, why: str) -> None:
    own = tmp_path / "own.md"
    own.write_bytes(content)
    with pytest.raises(ckavg.errors.SettingError, match=re.escape(why)):
        averaged(source, card=own)
    assert not (source / "averaged").exists()


def test_a_card_that_is_not_there(source: Path, tmp_path: Path) -> None:
    with pytest.raises(ckavg.errors.ReadError, match=r"card: .*none\.md cannot be read: No such file"):
        averaged(source, card=tmp_path / "none.md")
    with pytest.raises(ckavg.errors.ReadError, match="not a plain file"):
        averaged(source, card=tmp_path)


def test_option(source: Path, tmp_path: Path) -> None:
    own = tmp_path / "own.md"
    own.write_text("---\nlicense: mit\n---\nWords.\n")
    ran = run_cli("sweep", source, "mean", "ema", "--card", own, "-q")
    assert ran.exit_code == 0, ran.stderr
    for name in ("mean", "ema-gamma0.15"):
        card = (source / "averaged" / name / "README.md").read_text()
        assert fields_of(card)["license"] == "mit"
        assert "\nWords.\n" in card
    assert run_cli("mean", source, "--card", tmp_path / "none.md", "--force").exit_code == 1
    own.write_text("---\n- a\n---\n")
    assert run_cli("mean", source, "--card", own, "--force").exit_code == 2


ODD = ["a: b", "---", "\n---\n", '"', "\\", "\x00\x7f", "\U0001f600\U000e0041", "- x", "#", "no", "1e5", "{", "é"]
NUMBERS: list[Any] = [0, -7, 1.0, 1e-7, 1e300, -2.5e22, math.inf, -math.inf, True, None, [], {}, [[{}]]]


@pytest.mark.parametrize("value", [*ODD, *NUMBERS], ids=ascii)
def test_front_matter_is_read_as_the_hub_writes_it(value: object) -> None:
    fields: dict[str, Any] = {"a_b": [value]} | ({value: value} if isinstance(value, str) else {})
    block = f"---\n{ModelCardData(**fields).to_yaml()}\n---"
    card = parse_card(f"{block}\ntext".encode())
    assert (dict(card.metadata), card.text) == (fields, "text")
    assert card == parse_card(f"\n\n{block}\r\ntext".encode())
