"""The output of a study: tables in CSV files, and its settings in a JSON file, all in docs/evidence."""

from __future__ import annotations

import csv
import json
import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "docs" / "evidence"

Cell = str | int | float | None


@dataclass(frozen=True, slots=True)
class Table:
    """Rows under named columns.

    Attributes:
        name: of the file.
        columns: their headings, units included.
        rows: a cell for each column; None is left empty.
    """

    name: str
    columns: tuple[str, ...]
    rows: tuple[tuple[Cell, ...], ...]

    def write(self, directory: Path) -> None:
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
    """The text of a cell in a CSV file.

    >>> [stored(cell) for cell in ("far", 2000, 0.123456789, None)]
    ['far', '2000', '0.123457', '']
    """
    if cell is None:
        return ""
    return f"{cell:.6g}" if isinstance(cell, float) else str(cell)


def with_error(value: float, error: float) -> str:
    """A value rounded to the second digit of its standard error.

    >>> with_error(0.02758, 0.000344), with_error(649.655, 36.1), with_error(1.5, 0.0)
    ('0.02758 ± 0.00034', '650 ± 36', '1.5 ± 0')
    """
    if error <= 0:
        return f"{value:.4g} ± 0"
    places = max(0, 1 - math.floor(math.log10(float(f"{error:.1e}"))))
    return f"{value:.{places}f} ± {error:.{places}f}"


_STUDENT = {1: 63.66, 2: 9.92, 3: 5.84, 4: 4.60, 5: 4.03, 6: 3.71, 7: 3.50, 9: 3.25, 11: 3.11, 15: 2.95, 23: 2.81}


def least_t(count: int) -> float:
    """How many standard errors make a difference significant: Student's t, two-sided, 1 %, for `count` values.

    >>> least_t(3), least_t(12), least_t(13), least_t(1000)
    (9.92, 3.11, 3.11, 2.81)
    """
    return _STUDENT[max(freedom for freedom in _STUDENT if freedom <= count - 1)]


@dataclass(frozen=True, slots=True)
class Difference:
    """A mean difference, its standard error, and the number of values."""

    mean: float
    error: float
    count: int

    @classmethod
    def of(cls, values: Sequence[float]) -> Difference:
        return cls(statistics.fmean(values), statistics.stdev(values) / math.sqrt(len(values)), len(values))

    @property
    def verdict(self) -> str:
        """`lower`, `higher` or `undecided`."""
        if self.mean == 0 or abs(self.mean) <= least_t(self.count) * self.error:
            return "undecided"
        return "lower" if self.mean < 0 else "higher"

    def __str__(self) -> str:
        return with_error(self.mean, self.error)

    @property
    def marked(self) -> str:
        """With a question mark if it is undecided."""
        return f"{self} (?)" if self.verdict == "undecided" else str(self)


def publish(tables: Iterable[Table], directory: Path = RESULTS) -> None:
    """Write the tables to their files."""
    for table in tables:
        table.write(directory)


def write_record(name: str, record: Mapping[str, object]) -> None:
    """Write `<name>.json`: the settings of a study, and other values."""
    RESULTS.mkdir(parents=True, exist_ok=True)
    text = json.dumps(record, indent=1, ensure_ascii=False)
    (RESULTS / f"{name}.json").write_text(f"{text}\n", encoding="utf-8")
