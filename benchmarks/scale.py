"""The cost of averaging on larger machines: `python -m benchmarks.scale`, tables to stdout, progress to stderr.

Costs are measured here, on one core and by planning runs of sparse files; machines are assumed. The rest is arithmetic:
`FORMULA`. The directory must be on a file system with sparse files and enough space for the largest result, or
`--dry-run` would refuse it: `mount -t tmpfs -o size=100T none DIRECTORY`.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.costs import SCHEMES, Costs, PassCosts, Planned, measure_costs, measure_plan
from benchmarks.measure import CommandError
from benchmarks.sparse import ITEM, MODELS, TILE, Built
from benchmarks.table import Row, render

FORMULA = """\
seconds of a pass = the largest of
  storage      bytes ÷ the machine's bytes a second
  requests     bytes ÷ piece × (latency + piece ÷ bytes a second of a stream) ÷ (16 × processes)
  cores        (bytes × byte + small tiles × tile + blocks × block) ÷ cores
  interpreter  (tiles × tile + blocks × block) ÷ processes
seconds of a result = the larger of storage, its bytes ÷ the machine's bytes a second that are written, and
  cores        its bytes × write byte ÷ cores
seconds of a plan = those of the processor that were measured + files × seconds to open one
A tile is 262,144 elements of one checkpoint, or what a tensor has left; small tiles are those beyond bytes ÷ 512 KiB. A
block is 4,194,304 elements of all checkpoints. A piece is 384 MiB ÷ (4 × checkpoints), from 1 to 32 MiB."""

CONNECTIONS, THREADS, HELD = 16, 16, 384 << 20
_THREAD_BYTES = TILE * (2 * 8 + 4 * 4)
"""Memory of the buffers of one thread, as `memory_bytes` counts them."""

MERGED_TIB, MERGED_RANKS = 1.8, 8
"""A published merge: in 572 s, 3.2 GiB/s; 0.71 GiB/s by one process."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Machine:
    """Assumptions about one or more nodes together.

    Attributes:
        name: as the tables show it.
        nodes, cores, processes: how many in all.
        read, write: bytes a second of the storage.
        open_seconds: to open a file.
        latency, stream: seconds until the first byte of a request, and bytes a second from then on; 0: no requests.
    """

    name: str
    nodes: int
    cores: int
    processes: int
    read: float
    write: float
    open_seconds: float
    latency: float = 0.0
    stream: float = 0.0

    @property
    def threads(self) -> int:
        """Of all processes."""
        return min(self.cores, self.processes * THREADS)


MACHINES = (
    Machine(name="1 node, NVMe", nodes=1, cores=64, processes=8, read=25e9, write=12e9, open_seconds=1e-5),
    Machine(name="8 nodes, Lustre", nodes=8, cores=512, processes=64, read=100e9, write=50e9, open_seconds=1e-3),
    *(
        Machine(
            name=f"{nodes} node{'s' * (nodes > 1)}, objects",
            nodes=nodes,
            cores=64 * nodes,
            processes=8 * nodes,
            read=12.5e9 * nodes,
            write=6e9 * nodes,
            open_seconds=0.05 / CONNECTIONS,
            latency=0.05,
            stream=80e6,
        )
        for nodes in (1, 8)
    ),
)

JOBS = (("8B", 40), ("70B", 40), ("1T", 20))
PLANS = (*JOBS, ("1T", 2), ("1T", 40), ("1M tensors", 3))


def pass_terms(machine: Machine, run: Built, costs: PassCosts) -> dict[str, float]:
    """Seconds of a pass over a run by resource; the resources work in parallel.

    >>> run = Built("", 10, files=1, tensors=2, tiles=32, blocks=2, nbytes=1 << 24, header_bytes=0)
    >>> machine = Machine(name="", nodes=1, cores=4, processes=2, read=1e9, write=1e9, open_seconds=0.0)
    >>> pass_terms(machine, run, PassCosts(byte=1e-9, tile=1e-3, block=0.01))
    {'storage': 0.16777216, 'cores': 0.04694304, 'interpreter': 0.17}
    """
    nbytes, tiles = (run.checkpoints * each for each in (run.nbytes, run.tiles))
    of_blocks = run.blocks * costs.block
    of_small = (tiles - nbytes / (TILE * ITEM)) * costs.tile
    terms = {
        "storage": nbytes / machine.read,
        "cores": (nbytes * costs.byte + of_small + of_blocks) / machine.threads,
        "interpreter": (tiles * costs.tile + of_blocks) / machine.processes,
    }
    if machine.stream:
        piece = min(32 << 20, max(1 << 20, HELD // (4 * run.checkpoints)))
        requests = nbytes / piece / (CONNECTIONS * machine.processes)
        terms["requests"] = requests * (machine.latency + piece / machine.stream)
    return terms


def seconds_of(machine: Machine, planned: Planned, scheme: str, costs: Costs) -> tuple[float, str]:
    """Seconds of a whole command, and the resource that limits it."""
    run = planned.run
    passes = [costs.path, costs.replay[scheme]] if scheme == "pema" else [costs.replay[scheme]]
    result = {"storage": run.nbytes / machine.write, "cores": run.nbytes * costs.write_byte / machine.threads}
    spent = {"plan": planned.planned.cpu_seconds + run.checkpoints * run.files * machine.open_seconds}
    for terms in (*(pass_terms(machine, run, each) for each in passes), result):
        seconds, term = max((seconds, term) for term, seconds in terms.items())
        spent[term] = spent.get(term, 0.0) + seconds
    return sum(spent.values()), max(spent, key=lambda term: spent[term])


def memory_of(machine: Machine, planned: Planned) -> int:
    """Memory of one process: that of the plan, with its number of threads, and the window for objects."""
    further = machine.threads // machine.processes - min(len(os.sched_getaffinity(0)), THREADS)
    return planned.memory_bytes + further * _THREAD_BYTES + (HELD if machine.stream else 0)


def main() -> int:
    arguments = _parse()
    try:
        with tempfile.TemporaryDirectory(dir=arguments.directory) as directory:
            scratch = Path(directory)
            sizes = {name: getattr(arguments, name) for name in ("megabytes", "tensors", "repeats")}
            costs = measure_costs(scratch, **sizes, say=_say)
            planned = []
            for model, count in PLANS:
                if model in arguments.models:
                    _say(f"planning {count} checkpoints of {model}")
                    planned.append(measure_plan(scratch, model, count))
    except (CommandError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    _show("Measured here: costs of one core, files in memory", *_costs_table(costs))
    _show("Measured here: plans of files that are holes", *_plans_table(planned))
    _show("Assumed", *_machines_table())
    print(f"\n{FORMULA}")
    jobs = [each for each in planned if (each.run.model, each.run.checkpoints) in JOBS]
    _show("Computed: time of a command, and what most of it is spent on", *_times_table(jobs, costs))
    _show("Computed: memory of one process, and of all on a node", *_memory_table(jobs))
    mean = costs.replay["mean"].byte
    print(
        f"\n{MERGED_TIB} TiB from memory by {MERGED_RANKS} processes of one core: "
        f"{MERGED_TIB * 2**40 * mean / MERGED_RANKS:.0f} s, {MERGED_RANKS / mean / 2**30:.1f} GiB/s; "
        f"by one: {1 / mean / 2**30:.2f} GiB/s."
    )
    return 0


Table = tuple[Row, list[Row]]


def _costs_table(costs: Costs) -> Table:
    parts = {"pass 1": costs.path, **{f"pass 2, {scheme}": costs.replay[scheme] for scheme in SCHEMES}}
    rows: list[Row] = [
        (
            name,
            f"{1e9 * each.byte:.2f}",
            f"{1e-9 / each.byte:.1f}" if each.byte else "",
            f"{1e6 * each.tile:.0f}",
            f"{1e6 * each.block:.0f}",
        )
        for name, each in parts.items()
    ]
    written = (
        "a result",
        f"{1e9 * costs.write_byte:.2f}",
        f"{1e-9 / costs.write_byte:.1f}" if costs.write_byte else "",
        "",
        "",
    )
    return ("", "ns a byte", "GB/s", "µs a tile", "µs a block"), [*rows, written]


def _plans_table(planned: Sequence[Planned]) -> Table:
    header = (
        "",
        "checkpoints",
        "tensors",
        "files",
        "header MB",
        "inspect s",
        "CPU s",
        "MB",
        "dry run s",
        "CPU s",
        "MB",
        "need MB",
    )
    rows: list[Row] = [
        (
            each.run.model,
            str(each.run.checkpoints),
            f"{each.run.tensors:,}",
            f"{each.run.checkpoints * each.run.files:,}",
            f"{each.run.header_bytes / 1e6:.1f}",
            *(
                cell
                for one in (each.inspected, each.planned)
                for cell in (f"{one.seconds:.1f}", f"{one.cpu_seconds:.1f}", f"{one.peak_bytes / 1e6:.0f}")
            ),
            f"{each.memory_bytes / 1e6:.0f}",
        )
        for each in planned
    ]
    return header, rows


def _machines_table() -> Table:
    rows: list[Row] = [
        (
            each.name,
            str(each.cores),
            str(each.processes),
            f"{each.read / 1e9:g}",
            f"{each.write / 1e9:g}",
            f"{1e3 * each.open_seconds:g}",
            f"{1e3 * each.latency:g}" if each.stream else "",
            f"{each.stream / 1e6:g}" if each.stream else "",
        )
        for each in MACHINES
    ]
    return ("", "cores", "processes", "read GB/s", "write GB/s", "open ms", "latency ms", "stream MB/s"), rows


def _times_table(jobs: Sequence[Planned], costs: Costs) -> Table:
    rows = []
    for each in jobs:
        for scheme in SCHEMES:
            cells = []
            for machine in MACHINES:
                seconds, term = seconds_of(machine, each, scheme, costs)
                cells.append(f"{_duration(seconds)} {term}")
            rows.append((f"{each.run.model} × {each.run.checkpoints} {scheme}", *cells))
    return ("", *(machine.name for machine in MACHINES)), rows


def _memory_table(jobs: Sequence[Planned]) -> Table:
    rows = []
    for each in jobs:
        own = [(memory_of(machine, each), machine.processes // machine.nodes) for machine in MACHINES]
        cells = (f"{nbytes / 1e6:.0f} MB, {count * nbytes / 1e9:.1f} GB" for nbytes, count in own)
        rows.append((f"{each.run.model} × {each.run.checkpoints} pema", *cells))
    return ("", *(machine.name for machine in MACHINES)), rows


def _duration(seconds: float) -> str:
    """Seconds as one reads them.

    >>> _duration(42.4), _duration(600), _duration(9000)
    ('42 s', '10 min', '2.5 h')
    """
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.scale", description=__doc__)
    names = list(MODELS)
    parser.add_argument("--models", nargs="+", choices=names, default=names, help="default: all of them")
    parser.add_argument("--megabytes", type=int, default=256, help="of a checkpoint that bytes are measured on")
    parser.add_argument("--tensors", type=int, default=4_000, help="of one that tensors are measured on")
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--directory", type=Path, default=Path(tempfile.gettempdir()), help="default: %(default)s")
    return parser.parse_args()


def _show(title: str, header: Row, rows: list[Row]) -> None:
    print(f"\n{title}\n{render(header, rows)}", flush=True)


def _say(what: str) -> None:
    print(f"[{what}]", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
