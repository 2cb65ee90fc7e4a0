"""Which constants of `ckavg/engine/devices.py` follow from what was measured of a GPU. Pure, no torch."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from benchmarks.measure import Measured, spread
from benchmarks.table import Row, render

CPU, GPU = "CPU", "GPU"
_AS_GOOD = 0.95
"""Of the best rate: with that, less memory and fewer threads are preferred."""

_FASTER = 0.9
"""Of the CPU's seconds a byte: what a GPU must stay below, or it is noise."""


@dataclass(frozen=True, slots=True)
class Sample:
    """One command on one device.

    Attributes:
        seconds: wall time of the whole command.
        path_seconds, replay_seconds: those of its passes; 0 where there is no pass 1.
        read: bytes of checkpoints that each pass read.
        gpu_bytes: most memory that torch took of the GPU.
        peak_bytes: most memory resident on the machine.
    """

    seconds: float
    path_seconds: float
    replay_seconds: float
    read: float
    gpu_bytes: int
    peak_bytes: int

    @classmethod
    def parse(cls, measured: Measured) -> Sample:
        """From what a command printed: JSON, and a line with the memory of the GPU."""
        *text, last = measured.stdout.splitlines()
        printed = json.loads("\n".join(text))
        first = printed.get("averages", [printed])[0]  # one reading: all of a sweep have the same bytes and seconds
        path, replay = first["seconds"]["path"], first["seconds"]["replay"]
        read = first["bytes_read"] / (2 if path else 1)
        return cls(measured.seconds, path, replay, read, json.loads(last)["gpu_bytes"], measured.peak_bytes)

    @property
    def outside_seconds(self) -> float:
        """Start-up and all else that does not grow with the run."""
        return self.seconds - self.path_seconds - self.replay_seconds

    def __str__(self) -> str:
        path = f"pass 1 {self.read / 1e9 / self.path_seconds:.1f} GB/s, " if self.path_seconds else ""
        return (
            f"{self.seconds:.2f} s, {path}pass 2 {self.read / 1e9 / self.replay_seconds:.1f} GB/s, "
            f"{self.outside_seconds:.2f} s outside; {self.gpu_bytes / 1e6:.0f} MB of the GPU, "
            f"peak {self.peak_bytes / 1e6:.0f} MB"
        )


@dataclass(frozen=True, slots=True)
class Pass:
    """Both passes alone; GB/s."""

    device: str
    tile: int
    threads: int
    path: float
    replay: float

    @property
    def rate(self) -> float:
        """Of both passes, one after the other."""
        return 2 / (1 / self.path + 1 / self.replay)

    def __str__(self) -> str:
        rates = f"pass 1 {self.path:.1f}, pass 2 {self.replay:.1f} GB/s"
        return f"{self.device}, tile {self.tile:,}, {self.threads} threads: {rates}"


def table_of(passes: Sequence[Pass]) -> str:
    """The passes, a line each."""
    rows: list[Row] = [
        (each.device, f"{each.tile:,}", str(each.threads), f"{each.path:.1f}", f"{each.replay:.1f}", f"{each.rate:.1f}")
        for each in passes
    ]
    return render(("passes alone, GB/s", "tile", "threads", "pass 1", "pass 2", "both"), rows)


def best(passes: Sequence[Pass]) -> Pass:
    """The pass with the smallest tile, then with the fewest threads, that is as good as the best.

    >>> measured = [(4, 8, 10.0), (2, 8, 9.8), (2, 4, 9.7), (1, 8, 5.0)]
    >>> chosen = best([Pass(GPU, tile, threads, rate, rate) for tile, threads, rate in measured])
    >>> chosen.tile, chosen.threads
    (2, 4)
    """
    least = _AS_GOOD * max(each.rate for each in passes)
    return min((each for each in passes if each.rate >= least), key=lambda each: (each.tile, each.threads))


def break_even(cpu: Sequence[Sample], gpu: Sequence[Sample]) -> float:
    """Bytes that a command reads from which on a GPU takes less time; infinite where it never does.

    Seconds are those outside the passes, and bytes by the rate of the passes:
    (outside_GPU − outside_CPU) ÷ (1 / rate_CPU − 1 / rate_GPU).

    >>> sample = Sample(3.0, 1.0, 1.0, 1e9, 0, 0)
    >>> round(break_even([sample], [Sample(4.0, 0.5, 0.5, 1e9, 0, 0)])), break_even([sample], [sample])
    (4000000000, inf)
    """
    (outside, per_byte), (outside_gpu, per_byte_gpu) = map(_line, (cpu, gpu))
    if per_byte_gpu >= _FASTER * per_byte:
        return math.inf
    return max(0.0, (outside_gpu - outside) / (per_byte - per_byte_gpu))


def _line(samples: Sequence[Sample]) -> tuple[float, float]:
    """Seconds outside the passes, and seconds a byte that the passes read."""
    passes = [(each.seconds - each.outside_seconds) / (each.read * (2 if each.path_seconds else 1)) for each in samples]
    return spread(each.outside_seconds for each in samples).median, spread(passes).median


def told_of(samples: Mapping[tuple[str, str], Sequence[Sample]], passes: Sequence[Pass]) -> str:
    """The lines to paste."""
    lines = []
    on_gpu = [each for each in passes if each.device == GPU]
    if on_gpu:
        chosen = best(on_gpu)
        lines += [
            f"_GPU_FEEDERS = {chosen.threads}",
            f"    tile = {chosen.tile}  # the first line of gpu_tile, instead of BLOCK",
        ]
    else:
        lines.append("# threads and tile: not measured")
    verbs = [verb for verb, name in samples if name == GPU]
    found = {verb: break_even(samples[verb, CPU], samples[verb, GPU]) for verb in verbs}
    for verb, nbytes in found.items():
        what = "never" if nbytes == math.inf else f"from {nbytes / 1e9:.1f} GB read on"
        lines.append(f"# {verb}: the GPU takes less time {what}")
    if not found:
        lines.append("# --device auto: not measured")
    elif max(found.values()) == math.inf:
        lines.append('# --device auto stays the CPU: if device in ("auto", "cpu"): return "cpu"')
    else:
        lines.append(
            f"_AUTO_GPU_BYTES = {max(found.values()):.0f}  # auto: cuda where a command reads as much, else cpu"
        )
    for (verb, name), each in samples.items():
        seconds, rate = spread(one.seconds for one in each), spread(one.read / 1e9 / one.replay_seconds for one in each)
        told = f"{seconds.median:.2f} ({seconds.least:.2f}–{seconds.most:.2f}) | {rate.median:.1f}"
        lines.append(f"| `ckavg {verb}` on the {name} | {told} | {max(one.peak_bytes for one in each) / 1e6:.0f} |")
    return (
        "For ckavg/engine/devices.py; rows for docs/performance.md: seconds, pass 2 in GB/s, peak MB\n\n"
        + "\n".join(lines)
    )
