"""Cards of small results for the tests, and their metadata as the Hub's own library reads it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import ModelCard
from markdown_it import MarkdownIt

import ckavg
from ckavg.schemes import Scheme

STEPS = (0, 10, 20, 30)


def averaged(source: Path, scheme: Scheme | None = None, **settings: Any) -> Path:
    init = {"init": settings.pop("init")} if "init" in settings else {}
    return ckavg.average(ckavg.open_run(source, **init), scheme or ckavg.Mean(), **settings).directory


def card_of(source: Path, scheme: Scheme | None = None, **settings: Any) -> str:
    return (averaged(source, scheme, **settings) / "README.md").read_text(encoding="utf-8")


def fields_of(card: str) -> dict[str, Any]:
    """The metadata as the Hub's own library and as a parser of YAML read it, which must be the same."""
    of_hub: dict[str, Any] = ModelCard(card).data.to_dict()  # type: ignore[no-untyped-call]
    of_yaml = yaml.safe_load(card.split("\n---\n")[0].removeprefix("---\n"))
    assert of_hub == {name: value for name, value in of_yaml.items() if value is not None}
    return of_hub


def configure(source: Path, config: dict[str, Any], name: str = "config.json") -> None:
    for step in STEPS:
        (source / f"checkpoint-{step}" / name).write_text(json.dumps(config))


def blocks(card: str) -> list[tuple[str, str]]:
    """Kind and content of the outermost blocks, as a Markdown parser sees them."""
    text = card.split("\n---\n", 1)[1]
    tokens = MarkdownIt().enable("table").parse(text)
    return [(token.type, token.content) for token in tokens if token.type in ("inline", "fence", "code_block")]
