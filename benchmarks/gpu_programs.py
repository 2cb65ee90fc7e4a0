"""What `benchmarks.gpu` runs in processes of their own; all of it imports torch.

- `machine`: what this machine is;
- `devices NAME`: fail unless it is here, and all that ckavg needs;
- `bus NAME`: how fast the way to it is;
- `command WORDS...`: a command of ckavg, and the GPU memory that it took as a last line;
- `compare ONE OTHER`: two places with results, weight by weight;
- `passes RUN DEVICE`: how fast the passes are, by tile and threads, a line of JSON each.
"""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.gpu_constants import CPU, GPU, Pass, best

_TILES = [1 << power for power in range(18, 23)]
_CANCELLED = 2.0**-21
_BITS = {torch.bfloat16: torch.int16, torch.float16: torch.int16, torch.float32: torch.int32}


def machine() -> int:
    """Print CPU, GPU, driver and versions."""
    print(f"{platform.system()} {platform.machine()}, {_cores()} of {os.cpu_count()} cores")
    print(f"Python {platform.python_version()}, torch {torch.__version__}, CUDA {torch.version.cuda}")
    print(f"safetensors {version('safetensors')}")
    if not torch.cuda.is_available():
        print("torch finds no GPU here")
        return 0
    for number in range(torch.cuda.device_count()):
        seen = torch.cuda.get_device_properties(number)
        print(f"GPU {number}: {seen.name}, {seen.total_memory / 1e9:.0f} GB, compute {seen.major}.{seen.minor}")
    print(f"driver {_driver()}")
    return 0


def devices(name: str) -> int:
    """Refuse a device that is not here, or a Python that cannot run ckavg, in one sentence."""
    missing = [module for module in ("typer", "rich", "pydantic", "safetensors", "yaml") if not find_spec(module)]
    if missing:
        print(
            f"{', '.join(missing)}: not here. `make gpu-wheels` where there is a network; carry them.", file=sys.stderr
        )
        return 1
    from ckavg.engine.devices import resolve_device
    from ckavg.errors import CkavgError

    try:
        resolve_device(name)
    except CkavgError as error:
        print(error, file=sys.stderr)
        return 1
    return 0


def command(words: Sequence[str]) -> int:
    """Run a command of ckavg as its users do; print its JSON and one line more."""
    from ckavg.cli.app import app

    status = 0
    try:
        app(args=list(words), prog_name="ckavg")
    except SystemExit as end:
        status = int(end.code or 0)
    awake = torch.cuda.is_initialized()  # type: ignore[no-untyped-call]
    print(json.dumps({"gpu_bytes": torch.cuda.max_memory_reserved() if awake else 0}))
    return status


def compare(one: Path, other: Path) -> int:
    """Print how far apart the weights of all results below two places are."""
    weights = differ = most = wrong = 0
    files = sorted(file.relative_to(one) for file in one.rglob("*.safetensors"))
    if not files or files != sorted(file.relative_to(other) for file in other.rglob("*.safetensors")):
        sys.exit(f"{one} and {other} do not hold the same files.")
    for file in files:
        for first, second in _pairs(one / file, other / file):
            weights += first.numel()
            bits = _BITS[first.dtype]
            if torch.equal(first.view(bits), second.view(bits)):
                continue
            where = first.view(bits) != second.view(bits)
            got, want = first[where], second[where]
            units = (_ordered(got) - _ordered(want)).abs()
            near = (got.double() - want.double()).abs() <= _CANCELLED * float(second.abs().max())  # not >: NaN is far
            differ += units.numel()
            most = max(most, int(units.max()))
            wrong += int(((units > 1) & ~near).sum())
    print(json.dumps({"weights": weights, "differ": differ, "most_units": most, "wrong": wrong}))
    return 0


def passes(run: Path, device: str) -> int:
    """Print how fast each pass is alone: of the CPU, then of the GPU by tile, and with the best of them by threads."""
    most = min(16, _cores())
    _print_pass(run, CPU, "cpu", _TILES[0], most)
    by_tile = [_print_pass(run, GPU, device, tile, min(8, most)) for tile in _TILES]
    tile = best(by_tile).tile
    for threads in sorted({1, 2, 4, most} - {min(8, most)}):
        _print_pass(run, GPU, device, tile, threads)
    return 0


def _print_pass(run: Path, name: str, device: str, tile: int, threads: int) -> Pass:
    # Twice, and the better: with the first, memory is pinned.
    rates = [max(_rate(run, device, tile, threads, number) for _ in range(2)) for number in (1, 2)]
    found = Pass(name, tile, threads, *rates)
    print(json.dumps(asdict(found)), flush=True)
    return found


def _rate(source: Path, device: str, tile: int, threads: int, number: int) -> float:
    from ckavg.averaging.replay import Average, replay
    from ckavg.averaging.sources import open_run
    from ckavg.engine.context import Context
    from ckavg.path.measure import measure
    from ckavg.schemes import EMA, Timeline

    run = open_run(source)
    context = Context(device=device, tile=tile, threads=threads)
    begun = time.perf_counter()
    if number == 1:
        read = measure(run, context=context).bytes_read
    else:
        dtypes = {name: entry.dtype for name, entry in run.tensors.items()}
        average = Average(EMA().coefficients(Timeline(run.steps)), dtypes, {len(run.steps) - 1: _Dropped()})
        read = replay(run, [average], context=context).bytes_read
    return read / 1e9 / (time.perf_counter() - begun)


class _Dropped:
    """A writer that keeps nothing."""

    def put(self, name: str, offset: int, values: Tensor) -> None:
        pass


def bus(device: str) -> int:
    """Print how soon a GPU is ready, and how fast its bus is: no pass can be faster."""
    begun = time.perf_counter()
    torch.zeros(1, device=device).item()
    print(f"ready after {time.perf_counter() - begun:.2f} s", flush=True)
    begun = time.perf_counter()
    pinned = torch.empty(1 << 28, dtype=torch.uint8, pin_memory=device != "cpu")
    print(f"pins {pinned.numel() / 1e9 / (time.perf_counter() - begun):.1f} GB/s", flush=True)
    there = torch.empty_like(pinned, device=device)
    for what, target, source in (("there", there, pinned), ("back", pinned, there)):
        seconds = min(_timed(target, source) for _ in range(5))
        print(f"copies {pinned.numel() / 1e9 / seconds:.1f} GB/s {what}", flush=True)
    return 0


def _timed(target: Tensor, source: Tensor) -> float:
    begun = time.perf_counter()
    target.copy_(source)  # not non_blocking: returns when it is there
    return time.perf_counter() - begun


def _pairs(one: Path, other: Path) -> Iterator[tuple[Tensor, Tensor]]:
    from safetensors import safe_open

    with safe_open(one, "pt") as first, safe_open(other, "pt") as second:
        for name in first.keys():  # noqa: SIM118 - not a mapping
            yield first.get_tensor(name), second.get_tensor(name)


def _ordered(values: Tensor) -> Tensor:
    """Integers that count the numbers of a dtype from 0 on, so that neighbours differ by 1."""
    bits = values.contiguous().view(_BITS[values.dtype]).to(torch.int64)
    return torch.where(bits < 0, torch.iinfo(_BITS[values.dtype]).min - bits, bits)


def _cores() -> int:
    from ckavg.engine.distributed import available_cores

    return available_cores()


def _driver() -> str:
    asked = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        return subprocess.run(asked, capture_output=True, text=True, check=True).stdout.split()[0]
    except (OSError, subprocess.CalledProcessError, IndexError):
        return "unknown"


def main() -> int:
    program, *words = sys.argv[1:]
    if program == "compare":
        return compare(Path(words[0]), Path(words[1]))
    if program == "passes":
        return passes(Path(words[0]), words[1])
    if program == "command":
        return command(words)
    if program == "machine":
        return machine()
    return {"devices": devices, "bus": bus}[program](words[0])


if __name__ == "__main__":
    status = main()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)  # as ckavg does: without taking torch apart
