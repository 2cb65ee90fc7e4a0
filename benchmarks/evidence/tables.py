"""What a study found, as a table: in a CSV file, which is the record, and in the document, which is drawn from it."""

from __future__ import annotations

import csv
import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "docs" / "evidence"
DOCUMENT = ROOT / "docs" / "evidence.md"

Cell = str | int | float | None


@dataclass(frozen=True, slots=True)
class Table:
    """Rows under named columns.

    Attributes:
        name: of the file, and of the place in the document.
        columns: their headings, units included.
        rows: a cell for each column; None is left empty.
    """

    name: str
    columns: tuple[str, ...]
    rows: tuple[tuple[Cell, ...], ...]

    def write(self, directory: Path = RESULTS) -> None:
        """Write `<name>.csv`, real numbers with six significant digits."""
        directory.mkdir(parents=True, exist_ok=True)
        with (directory / f"{self.name}.csv").open("w", encoding="utf-8", newline="") as file:
            writer = csv.writer(file, lineterminator="\n")
            writer.writerow(self.columns)
            writer.writerows([stored(cell) for cell in row] for row in self.rows)


def read_table(file: Path) -> Table:
    """The table in a CSV file, every cell as the text that it holds."""
    with file.open(encoding="utf-8", newline="") as lines:
        columns, *rows = csv.reader(lines)
    return Table(file.stem, tuple(columns), tuple(tuple(row) for row in rows))


def stored(cell: Cell) -> str:
    """A cell as it stands in a CSV file.

    >>> [stored(cell) for cell in ("far", 2000, 0.123456789, None)]
    ['far', '2000', '0.123457', '']
    """
    if cell is None:
        return ""
    return f"{cell:.6g}" if isinstance(cell, float) else str(cell)


def shown(text: str) -> str:
    """A stored cell as it stands in the document: real numbers with four significant digits at most.

    >>> [shown(text) for text in ("far", "2000", "0.123457", "12345.6", "7.29812e-05", "")]
    ['far', '2000', '0.1235', '12346', '7.298e-05', '']
    """
    if not re.fullmatch(r"-?\d+(\.\d+)?(e[+-]\d+)?", text) or re.fullmatch(r"-?\d+", text):
        return text
    value = float(text)
    return f"{value:.0f}" if 1000 <= abs(value) < 1e6 else f"{value:.4g}"


def with_error(value: float, error: float) -> str:
    """A value to the place of the second digit of its standard error.

    >>> with_error(0.02758, 0.000344), with_error(649.655, 36.1), with_error(1.5, 0.0)
    ('0.02758 ± 0.00034', '650 ± 36', '1.5 ± 0')
    """
    if error <= 0:
        return f"{value:.4g} ± 0"
    places = max(0, 1 - math.floor(math.log10(float(f"{error:.1e}"))))
    return f"{value:.{places}f} ± {error:.{places}f}"


def as_markdown(table: Table) -> str:
    """The table as Markdown, drawn from what its file holds; the first column to the left, the others to the right."""
    lines = [table.columns, ("---", *("---:" for _ in table.columns[1:]))]
    lines += [tuple(shown(stored(cell)) for cell in row) for row in table.rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def place_in(text: str, table: Table) -> str:
    """The document `text` with `table` in its place, between `<!-- table: NAME -->` and `<!-- end -->`.

    Raises:
        ValueError: the document has no such place, or several.
    """
    place = re.compile(rf"(<!-- table: {re.escape(table.name)} -->\n).*?(<!-- end -->)", flags=re.DOTALL)
    replaced, count = place.subn(lambda found: f"{found[1]}\n{as_markdown(table)}\n\n{found[2]}", text)
    if count != 1:
        raise ValueError(f"The document has {count} places for the table {table.name}; it must have one.")
    return replaced


def publish(tables: Sequence[Table]) -> None:
    """Write the tables to their files, then those that have a place in the document to the document, too."""
    text = DOCUMENT.read_text(encoding="utf-8")
    for table in tables:
        table.write()
        if f"<!-- table: {table.name} -->" in text:
            text = place_in(text, table)
    DOCUMENT.write_text(text, encoding="utf-8")


def write_record(name: str, record: Mapping[str, object]) -> None:
    """Write `<name>.json`: the settings of a study, and what is no table."""
    RESULTS.mkdir(parents=True, exist_ok=True)
    text = json.dumps(record, indent=1, ensure_ascii=False)
    (RESULTS / f"{name}.json").write_text(f"{text}\n", encoding="utf-8")
