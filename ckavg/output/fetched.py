"""Downloads a result from an object store: the files that its record lists."""

from __future__ import annotations

import secrets
import shutil
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path

from ckavg.checkpoints.checkpoint import RESULT_RECORD
from ckavg.engine.context import OnProgress, Progress
from ckavg.errors import ReadError, RecordError
from ckavg.output.output_path import LOCAL, recorded_files
from ckavg.output.record import MOST_BYTES, parse_record
from ckavg.storage.address import address_of
from ckavg.storage.atomic import cache_directory, make_own_directory
from ckavg.storage.base import FileInfo
from ckavg.storage.download import complete
from ckavg.storage.objects import LOCK, ObjectTree


@contextmanager
def here(result: Path, on_progress: OnProgress | None = None) -> Iterator[Path]:
    """The directory of a result. A result at an address is downloaded first, and the copy removed at the end.

    Args:
        result: the directory or the address of a result.
        on_progress: called from time to time in this thread while files are downloaded.

    Raises:
        RecordError: the address has no record, or an invalid one.
        ReadError: it cannot be read, or the disk is too small for it.
        SettingError: results at such an address are not supported.
    """
    address = address_of(result)
    if address is None:
        yield result
        return
    if address.scheme == "hf":
        raise RecordError(f"{address} is on the Hub.", hint=f"Download it: hf download {address.place} --local-dir DIR")
    tree = ObjectTree(address)
    info = tree.files.get(RESULT_RECORD)
    if info is None or info.nbytes > MOST_BYTES:
        raise RecordError(
            f"{address} is not a result of ckavg: it has no {RESULT_RECORD}.", hint="Give the address of a result."
        )
    data = tree.read_whole(RESULT_RECORD, info)
    parse_record(data, f"{address}/{RESULT_RECORD}")
    names = recorded_files(data) & tree.files.keys()
    parent = cache_directory() / "results"
    try:
        make_own_directory(parent)
        directory = parent / secrets.token_hex(16)
        directory.mkdir()
        (directory / LOCK).touch()  # if this process is killed, the directory is removed after a week
        free, needed = shutil.disk_usage(parent).free, sum(tree.files[name].nbytes for name in names)
    except OSError as error:
        raise ReadError(
            f"{error.filename or parent} cannot be written: {error.strerror or error}.",
            hint="Free some space, or set XDG_CACHE_HOME to another directory.",
        ) from error
    try:
        if free < needed:
            raise ReadError(
                f"{parent} has {free / 1e9:.2f} GB free; {address} needs {needed / 1e9:.2f} GB.",
                hint="Free some space, or set XDG_CACHE_HOME to a directory on another disk.",
            )
        place = directory / address.name
        download(tree, tree.files, names, place, on_progress)
        yield place
    finally:
        shutil.rmtree(directory, ignore_errors=True)


def download(
    tree: ObjectTree,
    files: Mapping[str, FileInfo],
    names: Collection[str],
    place: Path,
    on_progress: OnProgress | None = None,
) -> None:
    """Download files of a result and the local file beside its record; the record comes last.

    Raises:
        ReadError: a file cannot be read, or cannot be written here.
    """
    wanted = sorted({*names, LOCAL} & files.keys(), key=lambda name: (name == RESULT_RECORD, name))
    total, done = sum(files[name].nbytes for name in wanted), 0

    def count(nbytes: int) -> None:
        nonlocal done
        done += nbytes
        if on_progress is not None:
            on_progress(Progress("fetch", done, total))

    for name in wanted:
        read = partial(_read, tree, name, files[name].nbytes)
        complete(read, files[name].nbytes, place / name, count, url=f"{tree.url}/{name}")


def _read(tree: ObjectTree, name: str, nbytes: int, start: int, stop: int) -> bytes:
    return tree.read_part(name, start, stop, nbytes)
