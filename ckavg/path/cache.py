"""Stage *path*: the cache of what pass 1 measured, kept beside the run so that it is measured once.

The key is a pair of checkpoints, each identified by its fingerprint (`checkpoints/fingerprints.py`), not by its name.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ckavg.checkpoints.fingerprints import Fingerprints, fingerprint_run
from ckavg.checkpoints.run import Run
from ckavg.errors import CkavgError
from ckavg.path.table import PathLength
from ckavg.storage.atomic import cache_directory, resolved
from ckavg.storage.base import AnyPath, RemotePath
from ckavg.storage.objects import ObjectTree
from ckavg.storage.table import load_table, not_believed, save_table

NAME = "path.json"

_FORMAT = 2
_MOST_BYTES = 1 << 28


@dataclass(frozen=True, slots=True)
class CachedPath:
    """What the cache holds about a run; any tensor may be missing.

    Attributes:
        sigmas: σ of θ_0 by tensor name.
        distances: ‖θ_j − θ_{j−1}‖₁ by tensor name, for j = 1 … K.
        fingerprints: of the checkpoints as they are now.
        warnings: about cached tables that were damaged or edited.
    """

    sigmas: Mapping[str, float]
    distances: tuple[Mapping[str, float], ...]
    fingerprints: Fingerprints
    warnings: tuple[str, ...] = ()

    @classmethod
    def empty(cls, run: Run) -> CachedPath:
        """The cache of a run that was never measured."""
        return cls({}, ({},) * (len(run.checkpoints) - 1), fingerprint_run(run))


def load_cached_path(run: Run) -> CachedPath:
    """Load what was measured on these very files. A table that was damaged or edited counts as empty."""
    fingerprints = fingerprint_run(run)
    loaded = {file: _load(file) for file in _places(run)}
    tables = [table for table in loaded.values() if table]
    sigmas = next((found for table in tables if (found := _row(table, "sigma", fingerprints[0]))), {})
    distances = tuple(
        next((found for table in tables if (found := _row(table, "distances", _pair(before, after)))), {})
        for before, after in itertools.pairwise(fingerprints)
    )
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


def _row(table: Mapping[str, Any], kind: str, key: str | None) -> dict[str, float]:
    """The numbers of one checkpoint or pair by tensor name; empty if they are missing or not numbers."""
    rows = table.get(kind)
    values = rows.get(key) if isinstance(rows, dict) else None
    names = table.get("tensors", [])
    if not isinstance(values, list) or len(values) != len(names):
        return {}
    return {
        name: value
        for name, value in zip(names, values, strict=True)
        if isinstance(name, str) and isinstance(value, float) and 0 <= value < float("inf")
    }


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
    rows: dict[str, dict[str, dict[str, float]]] = {"sigma": {}, "distances": {}}
    for kind, of_key in rows.items():
        held = table.get(kind)
        for key in held if isinstance(held, dict) else ():
            if all(fingerprint in kept for fingerprint in key.split()):
                of_key[key] = _row(table, kind, key)
    finite = {name: tensor for name, tensor in path.tensors.items() if tensor.is_finite}
    if fingerprints[0]:
        rows["sigma"].setdefault(fingerprints[0], {}).update((name, each.sigma) for name, each in finite.items())
    for place, pair in enumerate(itertools.starmap(_pair, itertools.pairwise(fingerprints))):
        if pair is not None:
            own = rows["distances"].setdefault(pair, {})
            own.update((name, tensor.distances[place]) for name, tensor in finite.items())
    names = sorted({name for of_key in rows.values() for row in of_key.values() for name in row})
    listed = {
        kind: {key: [row.get(name) for name in names] for key, row in of_key.items()} for kind, of_key in rows.items()
    }
    return {"format": _FORMAT, "checkpoints": kept, "tensors": names, **listed}
