"""The tables of docs/formats.md, as values."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

DOCUMENT = Path(__file__).parents[2] / "docs" / "formats.md"


@dataclass(frozen=True)
class Cell:
    """What is code in a cell, and which of it is bold."""

    code: tuple[str, ...]
    bold: tuple[str, ...]

    @classmethod
    def of(cls, text: str) -> Cell:
        found = re.findall(r"(\*\*)?`([^`]+)`", text)
        return cls(tuple(code for _, code in found), tuple(code for bold, code in found if bold))


Row = dict[str, Cell]


def table(heading: str) -> dict[str, Row]:
    """The rows of the table below a heading: cells by the names of their columns, by the text of the first cell."""
    section = DOCUMENT.read_text(encoding="utf-8").split(f"\n## {heading}\n")[1].split("\n## ")[0]
    cells = [
        [cell.strip() for cell in line.strip().strip("|").split("|")]
        for line in section.splitlines()
        if line.startswith("| ")
    ]
    columns, *rows = cells
    named = {row[0]: dict(zip(columns[1:], map(Cell.of, row[1:]), strict=True)) for row in rows}
    assert len(named) == len(rows), "two rows of one name"
    return named
