"""The main table: ckavg, reading alone, the obvious loop and mergekit, from the page cache and from the disk."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from benchmarks.cache import State
from benchmarks.contest import Turns
from benchmarks.programs import (
    BEMA,
    MEAN,
    PEMA,
    Program,
    Sample,
    ckavg,
    mapped_roofline,
    mergekit,
    obvious_loop,
    pread_roofline,
    sweep,
)
from benchmarks.table import Row, median, most, with_spread

HEADER: Row = (
    "",
    "seconds",
    "GB/s",
    "pass 1",
    "÷ reading",
    "pass 2",
    "÷ reading",
    "rival ÷ this",
    "from disk, GB",
    "peak MB",
)

NOTES = """\
Medians (least–most). Seconds: the whole command, start-up and writing included; of reading alone: without start-up.
GB/s: bytes of checkpoints read, by those seconds; of a pass: by the seconds of that pass alone, those of writing
included; of mergekit: by those of the merge without its imports. ÷ reading: by the GB/s of reading alone in the same
turn, the faster where there are two; a pass may find in the page cache what another has read, and beat the disk.
Rival: the obvious loop for pema, mergekit for mean; seconds by seconds, turn by turn. From disk: the most of all turns,
program and libraries included. Peak MB: the most of all turns, mapped files included; 10⁶ bytes. Every result was what
it must be, to one unit of bfloat16."""

_READERS: Mapping[State, Sequence[Program]] = {
    State.WARM: (mapped_roofline(),),
    State.COLD: (pread_roofline(4), pread_roofline(8)),
}
_RIVALS: Mapping[str, str] = {ckavg(PEMA).name: obvious_loop().name, ckavg(MEAN).name: mergekit().name}


def programs(state: State, *, mergekit_python: str | None) -> list[Program]:
    """The programs for each state of the page cache, in the order of a round."""
    merging = [mergekit(mergekit_python)] if mergekit_python else []
    return [*_READERS[state], obvious_loop(), ckavg(PEMA), *merging, ckavg(MEAN), ckavg(BEMA), sweep()]


def rows(samples: Mapping[State, Turns]) -> list[Row]:
    """A line for each state, then one for each program."""
    lines: list[Row] = []
    for state, turns in samples.items():
        lines.append((f"{state.value}:", *[""] * (len(HEADER) - 1)))
        rates = [[one.rate for one in turns[reader.name]] for reader in _READERS[state]]
        reading = [max(of_turn) for of_turn in zip(*rates, strict=True)]
        lines.extend(_row(name, turns, reading) for name in turns)
    return lines


def _row(name: str, turns: Turns, reading: Sequence[float]) -> Row:
    own = turns[name]
    return (
        name,
        with_spread([one.seconds for one in own], 2),
        median([one.rate for one in own], 2),
        *_pass([one.path_rate for one in own], reading),
        *_pass([one.replay_rate for one in own], reading),
        _ratio(turns.get(_RIVALS.get(name, "")), own),
        most([one.disk_bytes for one in own], 1e9, 1),
        most([one.peak_bytes for one in own], 1e6),
    )


def _pass(rates: Sequence[float | None], reading: Sequence[float]) -> tuple[str, str]:
    """GB/s of one pass, and its ratio to reading alone."""
    ratios = [rate / limit if rate else None for rate, limit in zip(rates, reading, strict=True)]
    return median(rates, 2), median(ratios, 2)


def _ratio(theirs: Sequence[Sample] | None, ours: Sequence[Sample]) -> str:
    """The ratio of the seconds of two programs in the same round."""
    if not theirs:
        return ""
    return with_spread([one.seconds / other.seconds for one, other in zip(theirs, ours, strict=True)], 1)
