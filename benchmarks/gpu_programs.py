"""Programs that `benchmarks.gpu` runs in separate processes; all import torch.

- `machine`: describe this machine;
- `devices NAME...`: fail unless all of them are available;
- `command WORDS...`: run a command of ckavg, and print the GPU memory it took as the last line;
- `compare ONE OTHER`: compare two directories of results, weight by weight;
- `passes RUN DEVICE...`: measure the speed of the passes, by tile and threads.
"""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.table import Row, render

_TILES = [1 << power for power in range(18, 23)]
_THREADS = (1, 4, 8, 16)
_CANCELLED = 2.0**-21
_BITS = {torch.bfloat16: torch.int16, torch.float16: torch.int16, torch.float32: torch.int32}


def machine() -> int:
    """Print CPU, GPU, driver and versions."""
    print(f"{platform.system()} {platform.machine()}, {_cores()} of {os.cpu_count()} cores")
    print(f"Python {platform.python_version()}, torch {torch.__version__}, CUDA {torch.version.cuda}")
    print(f"typer {'is' if find_spec('typer') else 'is not'} here, safetensors {version('safetensors')}")
    if not torch.cuda.is_available():
        print("torch finds no GPU here")
        return 0
    for number in range(torch.cuda.device_count()):
        seen = torch.cuda.get_device_properties(number)
        print(f"GPU {number}: {seen.name}, {seen.total_memory / 1e9:.0f} GB, compute {seen.major}.{seen.minor}")
    print(f"driver {_driver()}")
    return 0


def devices(names: Sequence[str]) -> int:
    """Refuse devices that are not available, in one sentence."""
    from ckavg.engine.devices import resolve_device
    from ckavg.errors import CkavgError

    try:
        for name in names:
            resolve_device(name)
    except CkavgError as error:
        print(error, file=sys.stderr)
        return 1
    return 0


def command(words: Sequence[str]) -> int:
    """Run a command of ckavg, without the command line if typer is missing; print its JSON and one line."""
    status = _by_command(words) if find_spec("typer") and find_spec("rich") else _by_library(words)
    awake = torch.cuda.is_initialized()  # type: ignore[no-untyped-call]
    taken = torch.cuda.max_memory_reserved() if awake else 0
    print(json.dumps({"gpu_bytes": taken}))
    return status


def _by_command(words: Sequence[str]) -> int:
    from ckavg.cli.app import app

    try:
        app(args=list(words), prog_name="ckavg")
    except SystemExit as end:
        return int(end.code or 0)
    return 0


def _by_library(words: Sequence[str]) -> int:
    from ckavg.averaging.pipeline import carry_out
    from ckavg.averaging.plan import plan_averages
    from ckavg.averaging.sources import open_run
    from ckavg.engine.context import Context
    from ckavg.schemes import Mean, Scheme
    from ckavg.schemes.parse import parse_words

    verb, source, *rest = words
    options = rest[rest.index("--out") :]
    out, device = Path(options[1]), options[3]
    schemes: tuple[Scheme, ...] = (Mean(),)
    if verb != "mean":
        schemes = tuple(word.scheme for word in parse_words(rest[: rest.index("--out")] or [verb]))
    run = open_run(source)
    places = [out / scheme.label for scheme in schemes] if verb == "sweep" else [out]
    plans = plan_averages([(run, scheme, place) for scheme, place in zip(schemes, places, strict=True)])
    records = carry_out(plans, Context(device=device)).records
    print(f'{{"averages": [{", ".join(record.to_json() for record in records)}]}}')
    return 0


def compare(one: Path, other: Path) -> int:
    """Print how much the weights of all results below two directories differ."""
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


def passes(run: Path, names: Sequence[str]) -> int:
    """Print the speed of each pass, by tile and threads; for a GPU also its start-up and the speed of its bus."""
    for name in names:
        if name != "cpu":
            print(_told_of_gpu(name))
    rows: list[Row] = []
    for name in names:
        for tile in _TILES if name != "cpu" else _TILES[:2]:
            for threads in sorted({min(each, _cores()) for each in _THREADS}):
                # The better of two: the first one pins memory.
                rates = [max(_rate(run, name, tile, threads, number) for _ in range(2)) for number in (1, 2)]
                rows.append((name, f"{tile:,}", str(threads), *(f"{rate:.1f}" for rate in rates)))
    print("\n" + render(("passes alone", "tile", "threads", "pass 1, GB/s", "pass 2, GB/s"), rows))
    print("\nPass 2: one EMA, nothing written. Warm page cache; the better of two.")
    return 0


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
    """A writer that discards everything."""

    def put(self, name: str, offset: int, values: Tensor) -> None:
        pass


def _told_of_gpu(name: str) -> str:
    begun = time.perf_counter()
    torch.zeros(1, device=name).item()
    ready = time.perf_counter() - begun
    begun = time.perf_counter()
    pinned = torch.empty(1 << 28, dtype=torch.uint8, pin_memory=True)
    pinning = time.perf_counter() - begun
    there = torch.empty_like(pinned, device=name)
    rates = []
    for target, source in ((there, pinned), (pinned, there)):
        seconds = min(_timed(lambda: target.copy_(source)) for _ in range(5))  # noqa: B023 - called at once
        rates.append(pinned.numel() / 1e9 / seconds)
    return (
        f"{name}: ready after {ready:.2f} s, pins {pinned.numel() / 1e9 / pinning:.1f} GB/s, "
        f"copies {rates[0]:.1f} GB/s there and {rates[1]:.1f} GB/s back"
    )


def _timed(work: Callable[[], object]) -> float:
    torch.cuda.synchronize()
    begun = time.perf_counter()
    work()
    torch.cuda.synchronize()
    return time.perf_counter() - begun


def _pairs(one: Path, other: Path) -> Iterator[tuple[Tensor, Tensor]]:
    from safetensors import safe_open

    with safe_open(one, "pt") as first, safe_open(other, "pt") as second:
        for name in first.keys():  # noqa: SIM118 - not a mapping
            yield first.get_tensor(name), second.get_tensor(name)


def _ordered(values: Tensor) -> Tensor:
    """Integers that number the values of a dtype from 0, so that neighbours differ by 1."""
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
    if program == "machine":
        return machine()
    if program == "compare":
        return compare(Path(words[0]), Path(words[1]))
    if program == "passes":
        return passes(Path(words[0]), words[1:])
    return {"devices": devices, "command": command}[program](words)


if __name__ == "__main__":
    status = main()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)  # as in ckavg
