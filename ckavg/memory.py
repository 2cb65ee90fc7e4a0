"""How much memory averaging will take, told before anything is read. Arithmetic on plans: docs/design.md, Memory."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec

from ckavg.engine.blocks import TILE
from ckavg.engine.cores import worker_threads
from ckavg.engine.window import WINDOW_BYTES
from ckavg.fetching import fetching_of
from ckavg.plan import Plan

_LIBRARIES = 235_000_000
"""Python, torch and the other libraries, before anything is read: measured on Linux with torch for the CPU."""

_PICTURE = 45_000_000
"""matplotlib, and what it takes for the picture in a card."""

_PER_ENTRY = 450
"""A tensor in the table of a checkpoint: its name, its shape, and their places in a dictionary."""

_PER_DISTANCE = 100
"""A number of the path, by tensor and checkpoint, and its line in `path.json`."""

_STATE_TILES = 3
_RAW_BYTES_OF_ELEMENT = 8


def memory_bytes(plans: Sequence[Plan]) -> int:
    """Peak memory of carrying out plans of one run together on the CPU, in bytes; an estimate.

    Every thread has two buffers for bytes as they are stored, the widened tile, and the tiles of each average's state.
    The tables of the checkpoints and the side files come on top, and what the libraries take by themselves.

    Args:
        plans: what is carried out together; at least one.
    """
    run = plans[0].run
    wide = any("float64" in checkpoint.dtypes for checkpoint in run.checkpoints)
    tiles = (1 + _STATE_TILES * len(plans)) * TILE * (8 if wide else 4)
    buffers = worker_threads() * (2 * TILE * _RAW_BYTES_OF_ELEMENT + tiles)
    tables = {id(checkpoint.entries): len(checkpoint.entries) for checkpoint in run.checkpoints}
    known = _PER_ENTRY * sum(tables.values())
    if any(plan.path for plan in plans):
        known += _PER_DISTANCE * len(run.tensors) * len(run.checkpoints)
    beside = sum(len(data) for data in plans[0].side_files.values())
    headers = sum(len(shard.header) for shard in plans[0].weights.shards)
    fetching = fetching_of(plans)
    window = min(WINDOW_BYTES, fetching.streamed_bytes) if fetching is not None else 0
    libraries = _LIBRARIES + (_PICTURE if find_spec("matplotlib") else 0)
    return libraries + buffers + known + 2 * (beside + headers) + window
