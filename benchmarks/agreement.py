"""Whether two averages of the same run are the same but for rounding: no time counts for a wrong result.

As a program it exits with status 1 and names the first tensor that differs. Imports torch; see `benchmarks.measure`.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from benchmarks.synthetic import WEIGHTS

_WEIGHT_TOLERANCE = 1e-5
"""Relative to a tensor's largest weight: float32 updates in another order, and β off by what ℓ is off. It matters only
where a weight comes out near 0; elsewhere the last place of bfloat16 is far coarser."""


def weight_difference(first: Tensor, second: Tensor) -> str | None:
    """What is wrong between two bfloat16 tensors, or None: one unit in the last place is allowed."""
    if first.dtype != torch.bfloat16 or second.dtype != torch.bfloat16 or first.shape != second.shape:
        return f"{first.dtype} {tuple(first.shape)} and {second.dtype} {tuple(second.shape)}"
    one, other = first.float(), second.float()
    larger = torch.maximum(one.abs(), other.abs())
    # A unit in the last place of x is more than 2⁻⁸ |x| and at most 2⁻⁷ |x|: the bound admits one unit, never two.
    allowed = torch.maximum(larger * 2**-7, larger.max() * _WEIGHT_TOLERANCE)
    wrong = ~((one - other).abs() <= allowed)  # not >, so that NaN is wrong
    return f"{int(wrong.sum())} of {wrong.numel()} weights differ" if bool(wrong.any()) else None


def first_difference(first: Path, second: Path) -> str | None:
    """What is wrong between two averages, given their directories, or None."""
    with safe_open(first / WEIGHTS, "pt") as one, safe_open(second / WEIGHTS, "pt") as other:
        names = sorted(one.keys())
        if names != sorted(other.keys()):
            return "the tensor names differ"
        for name in names:
            difference = weight_difference(one.get_tensor(name), other.get_tensor(name))
            if difference:
                return f"{name}: {difference}"
    return None


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.agreement", description=__doc__)
    parser.add_argument("first", type=Path)
    parser.add_argument("second", type=Path)
    arguments = parser.parse_args()
    difference = first_difference(arguments.first, arguments.second)
    if difference:
        sys.exit(f"{arguments.first} and {arguments.second}: {difference}")


if __name__ == "__main__":
    main()
