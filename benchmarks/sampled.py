"""How accurate a sampled path is: ℓ from a part of each tensor against the full ℓ, and the effect on a result.

`python -m benchmarks.sampled RUN --init BASE` prints for each step both lengths and their difference in standard
errors, then by how many units in the last place of the stored dtype the two averages of PEMA differ. The run is not
modified: it is measured through links in a temporary directory, where no path is cached.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections import Counter
from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open
from torch import Tensor

import ckavg
from benchmarks.table import Row, render

_BITS = {torch.bfloat16: torch.int16, torch.float16: torch.int16, torch.float32: torch.int32}
_MOST_ERRORS = 3.0
_MOST_AT_THE_END = 0.01


def main() -> int:
    arguments = _parse()
    with tempfile.TemporaryDirectory(dir=arguments.directory) as scratch:
        links = Path(scratch) / "run"
        links.mkdir()
        opened = ckavg.open_run(arguments.run, init=arguments.init)
        for checkpoint in opened.checkpoints[int(opened.anchor_is_init) :]:
            (links / checkpoint.path.name).symlink_to(Path(checkpoint.path).absolute())
        run = ckavg.open_run(links, init=arguments.init)
        sampled = ckavg.average(run, ckavg.PEMA(), out=Path(scratch) / "sampled", sample=arguments.fraction)
        exact = ckavg.average(run, ckavg.PEMA(), out=Path(scratch) / "exact")
        good = _print_lengths(exact, sampled)
        _print_units(exact.directory, sampled.directory)
    return 0 if good else 1


def _print_lengths(exact: ckavg.Averaged, sampled: ckavg.Averaged) -> bool:
    """Print ℓ by step; return whether every difference agrees with the standard error."""
    assert exact.path_length is not None
    assert sampled.path_length is not None
    assert sampled.path_length_error is not None
    rows: list[Row] = []
    good = True
    columns = zip(exact.steps, exact.path_length, sampled.path_length, sampled.path_length_error, strict=True)
    for step, length, estimate, error in columns:
        off = (estimate - length) / error if error else 0.0
        good &= abs(off) <= _MOST_ERRORS
        relative = f"{100 * (estimate / length - 1):+.3f} %" if length else ""
        rows.append((str(step), f"{length:.6f}", f"{estimate:.6f}", f"{error:.6f}", f"{off:+.2f}", relative))
    print(render(("step", "ℓ in full", "ℓ from sample", "standard error", "in errors", "relative"), rows))
    at_the_end = abs(sampled.path_length[-1] / exact.path_length[-1] - 1)
    saved = exact.bytes_read - sampled.bytes_read
    print(f"\nsample {100 * sampled.sample:g} %; read {sampled.bytes_read:,} bytes, {saved:,} fewer than in full")
    return good and at_the_end <= _MOST_AT_THE_END


def _print_units(exact: Path, sampled: Path) -> None:
    """Print how many weights of two averages differ by how many units in the last place."""
    counts: Counter[int] = Counter()
    for file in sorted(exact.glob("*.safetensors")):
        with safe_open(file, "pt") as one, safe_open(sampled / file.name, "pt") as other:
            for name in one.keys():  # noqa: SIM118 - not a mapping
                tensor = one.get_tensor(name)
                if tensor.dtype in _BITS:
                    apart = (_ordered(tensor) - _ordered(other.get_tensor(name))).abs()
                    units, found = np.unique(apart.numpy(), return_counts=True)
                    counts.update(dict(zip(units.tolist(), found.tolist(), strict=True)))
    total = sum(counts.values())
    rows = [(str(units), f"{count:,}", f"{100 * count / total:.4f} %") for units, count in sorted(counts.items())]
    few = [*rows[:5], ("…", "", f"at most {rows[-1][0]}")] if len(rows) > 6 else rows
    print(f"\n{render(('units apart', 'weights', 'of all'), few)}")


def _ordered(values: Tensor) -> Tensor:
    """Integers that number the values of a dtype from 0, so that neighbours differ by 1."""
    bits = values.contiguous().view(_BITS[values.dtype]).to(torch.int64)
    return torch.where(bits < 0, torch.iinfo(_BITS[values.dtype]).min - bits, bits)


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.sampled", description=__doc__)
    parser.add_argument("run", type=Path, help="directory of saved checkpoints")
    parser.add_argument("--init", type=Path, default=None, help="the model that training began with")
    parser.add_argument("--fraction", type=float, default=0.01, help="default: %(default)s")
    parser.add_argument("--directory", type=Path, default=None, help="directory for the two temporary averages")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
