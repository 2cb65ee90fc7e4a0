"""Stage *path*: the cache of what pass 1 measured, kept beside the run so that it is measured once.

The key is a pair of checkpoints, each identified by its fingerprint (`checkpoints/fingerprints.py`), not by its name.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import math
import os
from array import array
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ckavg.checkpoints.fingerprints import Fingerprints, fingerprint_run
from ckavg.checkpoints.run import Run
from ckavg.errors import CkavgError
from ckavg.path.table import PathLength, Row
from ckavg.storage.atomic import cache_directory, resolved
from ckavg.storage.base import AnyPath, RemotePath
from ckavg.storage.objects import ObjectTree
from ckavg.storage.table import load_table, not_believed, save_table

NAME = "path.json"

_KINDS = "sigma", "distances"
_FORMAT = 2
_MOST_BYTES = 1 << 28


@dataclass(frozen=True, slots=True)
class CachedPath:
    """What the cache holds about tensors of a run, by their place among them; NaN: not cached.

    Attributes:
        sigmas: σ of θ_0.
        distances: ‖θ_j − θ_{j−1}‖₁ for j = 1 … K.
        fingerprints: of the checkpoints as they are now.
        warnings: about cached tables that were damaged or edited.
    """

    sigmas: Row
    distances: tuple[Row, ...]
    fingerprints: Fingerprints
    warnings: tuple[str, ...] = ()

    @classmethod
    def empty(cls, run: Run, names: Sequence[str]) -> CachedPath:
        """The cache of a run that was never measured."""
        unknown = array("d", [math.nan]) * len(names)
        return cls(unknown, (unknown,) * (len(run.checkpoints) - 1), fingerprint_run(run))


def load_cached_path(run: Run, names: Sequence[str]) -> CachedPath:
    """Load what was measured on these very files, of these tensors. A table that was damaged or edited counts as
    empty.
    """
    fingerprints = fingerprint_run(run)
    loaded = {file: _load(file) for file in _places(run)}
    tables = [table for table in loaded.values() if table]
    places = {name: place for place, name in enumerate(names)} if tables else {}
    unknown = array("d", [math.nan]) * len(names)

    def row(kind: str, key: str | None) -> Row:
        found = (_row(table, kind, key, places) for table in tables)
        return next((each for each in found if each is not None), unknown)

    sigmas = row("sigma", fingerprints[0])
    distances = tuple(row("distances", _pair(before, after)) for before, after in itertools.pairwise(fingerprints))
    warnings = tuple(not_believed(file, "measured") for file, table in loaded.items() if table is None)
    return CachedPath(sigmas, distances, fingerprints, warnings)


def save_path(run: Run, path: PathLength, fingerprints: Fingerprints) -> AnyPath | None:
    """Cache an exact path.

    Args:
        run: what was measured.
        path: its path.
        fingerprints: of the checkpoints before they were read; a checkpoint that changed since is not cached.

    Returns:
        The file: beside the results in the run's directory or, if that cannot be written, in the user's cache. None if
        neither can be written, or there is nothing to cache.
    """
    unchanged = [
        before if before == now else None for before, now in zip(fingerprints, fingerprint_run(run), strict=True)
    ]
    if not any(unchanged):
        return None
    checkpoints = {resolved(checkpoint.path) for checkpoint in run.checkpoints}
    for place in _places(run):
        if not isinstance(place, RemotePath) and checkpoints & set(resolved(place).parents):
            continue
        table = _merged(_load(place) or {}, run, path, unchanged)
        with contextlib.suppress(OSError, CkavgError):  # the file there may belong to somebody else
            save_table(place, table)
            return place
    return None


def _places(run: Run) -> tuple[AnyPath, ...]:
    """Where the path of a run may be cached; for a run in an object store, the store comes first."""
    source = run.source
    if isinstance(source, RemotePath):
        tree = source.storage.trees.get("")
        if isinstance(tree, ObjectTree) and not tree.url.startswith("hf:"):  # on the Hub it would be a commit
            return (source / "averaged" / NAME, *cache_files(run))
    return cache_files(run)


def cache_files(run: Run, file: str = NAME) -> tuple[Path, ...]:
    """Where a table of a run may be kept: beside its results or, if that cannot be written, in the user's cache.

    For a remote run, or results behind a link, only the user's cache is used.

    Args:
        run: the run.
        file: name of the file in `averaged`; in the user's cache it is part of the name.
    """
    source = run.source
    name = str(source).encode() if isinstance(source, RemotePath) else os.fsencode(resolved(source))
    in_cache = cache_directory() / f"{Path(file).stem}-{hashlib.sha256(name).hexdigest()[:24]}.json"
    if isinstance(source, RemotePath):
        return (in_cache,)
    averaged = source / "averaged"
    return (in_cache,) if averaged.is_symlink() else (averaged / file, in_cache)


def _pair(before: str | None, after: str | None) -> str | None:
    return None if before is None or after is None else f"{before} {after}"


def _load(place: AnyPath) -> dict[str, Any] | None:
    """A table; empty if it cannot be read, None if it was damaged or edited."""
    table = load_table(place, _FORMAT, most_bytes=_MOST_BYTES)
    return table if not table or isinstance(table.get("tensors"), list) else None


def _row(table: Mapping[str, Any], kind: str, key: str | None, places: Mapping[str, int]) -> array[float] | None:
    """The numbers of one checkpoint or pair, each in the place of its tensor, NaN if it is missing or not a number;
    None if all are.
    """
    rows = table.get(kind)
    values = rows.get(key) if isinstance(rows, dict) else None
    names = table.get("tensors", [])
    if not isinstance(values, list) or len(values) != len(names):
        return None
    row, is_empty = array("d", [math.nan]) * len(places), True
    for name, value in zip(names, values, strict=True):
        if isinstance(name, str) and name in places and isinstance(value, float) and 0 <= value < math.inf:
            row[places[name]], is_empty = value, False
    return None if is_empty else row


def _absolute(path: AnyPath) -> str:
    return str(path if isinstance(path, RemotePath) else path.absolute())


def _merged(table: Mapping[str, Any], run: Run, path: PathLength, fingerprints: list[str | None]) -> dict[str, Any]:
    """The table with a run's path in it, replacing earlier states of the same checkpoints."""
    home = f"{_absolute(run.source)}/"
    places_of_run = [_absolute(checkpoint.path).removeprefix(home) for checkpoint in run.checkpoints]
    at = dict(zip(places_of_run, fingerprints, strict=True))
    stated = table.get("checkpoints")
    kept = {
        fingerprint: where
        for fingerprint, where in (stated if isinstance(stated, dict) else {}).items()
        if isinstance(where, str) and where not in at
    }
    kept |= {fingerprint: where for where, fingerprint in at.items() if fingerprint}
    stated_rows = {kind: table.get(kind) for kind in _KINDS}
    held = [
        (kind, key)
        for kind, rows in stated_rows.items()
        for key in (rows if isinstance(rows, dict) else ())
        if all(fingerprint in kept for fingerprint in key.split())
    ]
    is_finite = path.tensors.are_finite
    finite = list(itertools.compress(path.tensors, is_finite))
    names = sorted({*finite, *(name for name in table.get("tensors", ()) if held and isinstance(name, str))})
    places = {name: place for place, name in enumerate(names)}
    own = {("sigma", fingerprints[0]): path.tensors.sigmas}
    pairs = itertools.starmap(_pair, itertools.pairwise(fingerprints))
    own |= {("distances", pair): row for pair, row in zip(pairs, path.tensors.distances, strict=True)}
    listed: dict[str, dict[str, Row]] = {kind: {} for kind in _KINDS}
    for kind, key in dict.fromkeys((*held, *own)):
        if key is None:
            continue
        row = _row(table, kind, key, places) or array("d", [math.nan]) * len(names)
        for name, value in zip(finite, itertools.compress(own.get((kind, key), ()), is_finite), strict=False):
            row[places[name]] = value
        listed[kind][key] = row
    return {"format": _FORMAT, "checkpoints": kept, "tensors": names, **listed}
