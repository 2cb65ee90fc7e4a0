"""The obvious averaging loop with `load_file`, as a whole program that ckavg is compared with.

It shares no code with ckavg. It should stay obvious: clear first, not slower than necessary, without tricks.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from benchmarks.expected import pema_betas
from benchmarks.synthetic import WEIGHTS, step_of, weight_files


def load(file: Path) -> dict[str, Tensor]:
    return {name: tensor.float() for name, tensor in load_file(file).items()}


def path_length(files: list[Path]) -> list[float]:
    """ℓ at every checkpoint (Pathwise EMA, Eq. 2); tensors without spread do not count."""
    before = load(files[0])
    sigma = {name: tensor.std().item() for name, tensor in before.items()}
    counted = [name for name in sigma if sigma[name] > 0]
    parameters = sum(before[name].numel() for name in counted)
    lengths = [0.0]
    for file in files[1:]:
        after = load(file)
        moved = sum((after[name] - before[name]).abs().sum().item() / sigma[name] for name in counted)
        lengths.append(lengths[-1] + moved / parameters)
        before = after
    return lengths


def average(files: list[Path], betas: list[float]) -> dict[str, Tensor]:
    """E ← (1 − β) E + β θ over all checkpoints."""
    state = load(files[0])
    for file, beta in zip(files[1:], betas[1:], strict=True):
        for name, tensor in load(file).items():
            state[name].mul_(1 - beta).add_(tensor, alpha=beta)
    return state


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.obvious_loop", description=__doc__)
    parser.add_argument("run", type=Path, help="a synthetic run")
    parser.add_argument("out", type=Path, help="directory for the result")
    arguments = parser.parse_args()

    files = weight_files(arguments.run)
    steps = [step_of(file.parent) for file in files]
    begun = time.perf_counter()
    lengths = path_length(files)
    replaying = time.perf_counter()
    averaged = average(files, pema_betas(steps, lengths))
    arguments.out.mkdir(parents=True, exist_ok=True)
    rounded = {name: tensor.to(torch.bfloat16) for name, tensor in averaged.items()}
    save_file(rounded, arguments.out / WEIGHTS, metadata={"format": "pt"})
    done = time.perf_counter()

    read = 2 * sum(file.stat().st_size for file in files)
    seconds = {"path": replaying - begun, "replay": done - replaying, "total": done - begun}
    print(json.dumps({"path_length": lengths, "bytes_read": read, "seconds": seconds}))


if __name__ == "__main__":
    main()
