"""The expected results of every measured program: sums of weighted checkpoints, one tensor at a time.

`python -m benchmarks.reference RUN DIR NAME...` writes each average to its own directory in DIR, rounded to bfloat16,
and prints ℓ. Imports torch; see `benchmarks.measure`.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from benchmarks.expected import AVERAGES
from benchmarks.synthetic import WEIGHTS, step_of, weight_files

_PIECE = 1 << 22  # elements of one checkpoint


class Checkpoints:
    """A run that is read in pieces, the same piece of every checkpoint."""

    def __init__(self, files: list[Path], stack: ExitStack) -> None:
        self._opened = [stack.enter_context(safe_open(file, "pt")) for file in files]
        self.names: list[str] = sorted(self._opened[0].keys())

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._opened[0].get_tensor(name).shape)

    def pieces(self, name: str) -> Iterator[tuple[slice, Tensor]]:
        """The position of a piece in the flat tensor, and its elements: a float32 row per checkpoint."""
        flat: list[Tensor] = [checkpoint.get_tensor(name).flatten() for checkpoint in self._opened]
        for start in range(0, flat[0].numel(), _PIECE):
            place = slice(start, min(start + _PIECE, flat[0].numel()))
            yield place, torch.stack([tensor[place] for tensor in flat]).float()


def path_length(checkpoints: Checkpoints) -> list[float]:
    """ℓ at every checkpoint (Pathwise EMA, Eq. 2); tensors without spread do not count."""
    moved: list[Tensor] = []
    parameters = 0
    for name in checkpoints.names:
        elements, total, squares, distances = 0, 0.0, 0.0, []
        for _, rows in checkpoints.pieces(name):
            anchor = rows[0].double()
            elements += anchor.numel()
            total += anchor.sum().item()
            squares += anchor.square().sum().item()
            distances.append((rows[1:] - rows[:-1]).abs_().sum(dim=1, dtype=torch.float64))
        variance = (squares - total**2 / elements) / (elements - 1)
        if variance > 0:
            parameters += elements
            moved.append(torch.stack(distances).sum(dim=0) / variance**0.5)
    steps = torch.stack(moved).sum(dim=0) / parameters
    return [0.0, *steps.cumsum(dim=0).tolist()]


def write_averages(checkpoints: Checkpoints, weights: dict[str, list[float]], directory: Path) -> None:
    """Write Σ_k w_k θ_k, rounded to bfloat16, for every name."""
    matrix = torch.tensor(list(weights.values()), dtype=torch.float32)
    averages: dict[str, dict[str, Tensor]] = {name: {} for name in weights}
    for tensor_name in checkpoints.names:
        shape = checkpoints.shape(tensor_name)
        for averaged in averages.values():
            averaged[tensor_name] = torch.empty(shape, dtype=torch.bfloat16)
        for place, rows in checkpoints.pieces(tensor_name):
            for averaged, row in zip(averages.values(), matrix @ rows, strict=True):
                averaged[tensor_name].view(-1)[place] = row
    for name, averaged in averages.items():
        (directory / name).mkdir(parents=True, exist_ok=True)
        save_file(averaged, directory / name / WEIGHTS, metadata={"format": "pt"})


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.reference", description=__doc__)
    parser.add_argument("run", type=Path, help="a synthetic run")
    parser.add_argument("directory", type=Path, help="directory for the averages")
    parser.add_argument("names", nargs="+", choices=AVERAGES, metavar="NAME", help=", ".join(AVERAGES))
    arguments = parser.parse_args()
    files = weight_files(arguments.run)
    steps = [step_of(file.parent) for file in files]
    with ExitStack() as stack:
        checkpoints = Checkpoints(files, stack)
        lengths = path_length(checkpoints)
        weights = {name: AVERAGES[name](steps, lengths) for name in arguments.names}
        write_averages(checkpoints, weights, arguments.directory)
    print(json.dumps({"path_length": lengths}))


if __name__ == "__main__":
    main()
