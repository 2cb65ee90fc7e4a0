"""The averaging loop that anyone would write with `load_file`, as a whole program: what ckavg is measured against.

It shares no code with ckavg, so that it can also say whether ckavg's results are right. It should stay obvious: clear
first, no slower than it has to be, and with nothing that one would not write on the first day.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

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


def pema_betas(steps: list[int], lengths: list[float], *, gamma: float = 0.15) -> list[float]:
    clock = (steps[-1] - steps[0]) * lengths[-1]
    return [(1 + clock * length) ** -gamma for length in lengths]


def ema_betas(steps: list[int], *, gamma: float = 0.15, tau: float = 1.0) -> list[float]:
    return [(step - steps[0] + tau) ** -gamma for step in steps]


def bema_powers(steps: list[int], power: float, *, lag: float = 10.0) -> list[float]:
    return [(lag + step) ** -power for step in steps]


def average(files: list[Path], betas: list[float]) -> dict[str, Tensor]:
    """E ← (1 − β) E + β θ over all checkpoints."""
    state = load(files[0])
    for file, beta in zip(files[1:], betas[1:], strict=True):
        for name, tensor in load(file).items():
            state[name].mul_(1 - beta).add_(tensor, alpha=beta)
    return state


def corrected_average(files: list[Path], betas: list[float], alpha: float) -> dict[str, Tensor]:
    """E + α (θ_K − θ_0)."""
    anchor = load(files[0])
    state = {name: tensor.clone() for name, tensor in anchor.items()}
    latest = anchor
    for file, beta in zip(files[1:], betas[1:], strict=True):
        latest = load(file)
        for name, tensor in latest.items():
            state[name].mul_(1 - beta).add_(tensor, alpha=beta)
    for name, tensor in state.items():
        tensor.add_(latest[name] - anchor[name], alpha=alpha)
    return state


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.obvious_loop", description=__doc__)
    parser.add_argument("run", type=Path, help="a synthetic run")
    parser.add_argument("out", type=Path, help="directory for the result")
    parser.add_argument("--scheme", choices=("pema", "ema", "bema"), default="pema")
    arguments = parser.parse_args()

    files = weight_files(arguments.run)
    steps = [step_of(file.parent) for file in files]
    begun = time.perf_counter()
    lengths = path_length(files) if arguments.scheme == "pema" else None
    replaying = time.perf_counter()
    if lengths is not None:
        averaged = average(files, pema_betas(steps, lengths))
    elif arguments.scheme == "ema":
        averaged = average(files, ema_betas(steps))
    else:
        averaged = corrected_average(files, bema_powers(steps, 0.5), bema_powers(steps, 0.2)[-1])
    arguments.out.mkdir(parents=True, exist_ok=True)
    rounded = {name: tensor.to(torch.bfloat16) for name, tensor in averaged.items()}
    save_file(rounded, arguments.out / WEIGHTS, metadata={"format": "pt"})
    done = time.perf_counter()

    read = sum(file.stat().st_size for file in files) * (1 if lengths is None else 2)
    seconds = {"path": replaying - begun, "replay": done - replaying, "total": done - begun}
    print(json.dumps({"path_length": lengths, "bytes_read": read, "seconds": seconds}))


if __name__ == "__main__":
    main()
