"""Compares averages up to rounding: the time of a wrong result does not count.

As a program it compares pairs of directories; if they differ, it names the first tensor and exits with status 1.
Imports torch; see `benchmarks.measure`.
"""

from __future__ import annotations

import argparse
import sys
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

_PIECE = 1 << 18  # elements, few enough for the processor's cache
_WEIGHT_TOLERANCE = 1e-5
"""Tolerance relative to a tensor's largest weight, for float32 updates in another order and the error of β from ℓ. It
matters only for weights near 0; elsewhere the last place of bfloat16 is far coarser."""


def weight_difference(first: Tensor, second: Tensor) -> str | None:
    """The difference between two bfloat16 tensors, or None; one unit in the last place is allowed."""
    if first.dtype != torch.bfloat16 or second.dtype != torch.bfloat16 or first.shape != second.shape:
        return f"{first.dtype} {tuple(first.shape)} and {second.dtype} {tuple(second.shape)}"
    least = max(first.abs().max().item(), second.abs().max().item()) * _WEIGHT_TOLERANCE
    one, other = first.flatten(), second.flatten()
    pieces = (slice(start, start + _PIECE) for start in range(0, one.numel(), _PIECE))
    wrong = sum(_wrong(one[piece].float(), other[piece].float(), least) for piece in pieces)
    return f"{wrong} of {first.numel()} weights differ" if wrong else None


def _wrong(one: Tensor, other: Tensor, least: float) -> int:
    """How many weights differ by more than a unit in the last place of bfloat16 and by more than `least`."""
    # A unit in the last place of x is more than 2⁻⁸ |x| and at most 2⁻⁷ |x|: the bound admits one unit, never two.
    allowed = torch.maximum(one.abs(), other.abs()).mul_(2**-7).clamp_(min=least)
    right = ((one - other).abs_() <= allowed) & allowed.isfinite()  # not >, so that NaN counts as wrong
    return one.numel() - int(right.sum())


def first_difference(first: Path, second: Path) -> str | None:
    """The difference between two averages, given their directories, or None. Either may be sharded."""
    with ExitStack() as stack:
        one, other = opened_tensors(first, stack), opened_tensors(second, stack)
        if not one or one.keys() != other.keys():
            return "the tensor names differ"
        for name in sorted(one):
            difference = weight_difference(one[name].get_tensor(name), other[name].get_tensor(name))
            if difference:
                return f"{name}: {difference}"
    return None


def opened_tensors(directory: Path, stack: ExitStack) -> dict[str, Any]:
    """The open file of each tensor, by the tensor's name."""
    opened = [stack.enter_context(safe_open(file, "pt")) for file in sorted(directory.glob("*.safetensors"))]
    return {name: file for file in opened for name in file.keys()}  # noqa: SIM118 - not a mapping


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.agreement", description=__doc__)
    parser.add_argument(
        "--pair", type=Path, nargs=2, action="append", required=True, metavar="DIR", help="may be given several times"
    )
    for first, second in parser.parse_args().pair:
        difference = first_difference(first, second)
        if difference:
            sys.exit(f"{first} and {second}: {difference}")


if __name__ == "__main__":
    main()
