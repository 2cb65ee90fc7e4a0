"""Stage *engine*: the cores of this machine, and the processes that share a pass. Imports nothing heavy.

Processes exchange results through files in a shared directory: each writes its results to a journal of its own, and
reads those of the others. The processes of a job run at the same time, and a failure ends all of them (`job.py`). A
part is the same share of the work, run on its own at any time.
"""

from __future__ import annotations

import dataclasses
import heapq
import json
import os
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, Literal, TypeVar

from ckavg.engine.job import HOW_TO_RUN_ALONE, RANK_FILE, SECONDS_BETWEEN_LOOKS, Job
from ckavg.engine.launchers import launch_name
from ckavg.errors import MissingPartsError, RanksError, WriteError
from ckavg.storage.atomic import create_whole, write_bytes
from ckavg.storage.journal import Journal, JournalReader
from ckavg.storage.local import read_small

MOST_THREADS = 16
"""More threads do not read faster, and each has its own buffers."""

SECONDS_WITHOUT_PROGRESS = 600.0
AGREED = ".ckavg-agreed-"
"""Prefix of files with values that must be the same in all processes."""

JOURNAL = ".ckavg-journal-"
"""Prefix of journals; the name of the pass and the rank follow."""

NAMES_OF_A_JOB = (f"{RANK_FILE}*", f"{AGREED}*", f"{JOURNAL}*")
"""Shell patterns of the files through which processes exchange results."""

_PARTS = "parts"


def available_cores(processes: int = 1) -> int:
    """How many cores this process may use if `processes` share them."""
    try:
        cores = len(os.sched_getaffinity(0))
    except AttributeError:  # macOS
        cores = os.cpu_count() or 1
    return max(1, cores // processes)


def worker_threads(processes: int = 1) -> int:
    """How many threads read and compute: one for each core that this process may use."""
    return min(available_cores(processes), MOST_THREADS)


Value = TypeVar("Value")
Result = TypeVar("Result")


@dataclass(frozen=True, slots=True)
class Ranks:
    """The processes that share a pass, from the view of one of them. All of them call the same methods.

    Attributes:
        rank: which process this is, from 0.
        world: how many there are.
        local_rank: which of those on this machine.
        local_world: how many are on this machine.
        mode: `alone`; in a `job` of several processes; a `part` without the others; or `join` the results of parts.
        timeout: seconds without progress after which a process counts as dead.
        waits: whether a part waits for the others.
        on_wait: called after a while of waiting, and then rarely, with a sentence that names the missing ranks.
    """

    rank: int = 0
    world: int = 1
    local_rank: int = 0
    local_world: int = 1
    mode: Literal["alone", "job", "part", "join"] = "alone"
    timeout: float = SECONDS_WITHOUT_PROGRESS
    waits: bool = False
    on_wait: Callable[[str], None] | None = None
    _job: Job | None = None
    _jobs: list[Job] = dataclasses.field(default_factory=list, compare=False)

    @classmethod
    def from_environment(cls) -> Ranks:
        """The job of a launcher, from the environment; without one, a process alone."""
        names = "RANK", "WORLD_SIZE", "LOCAL_RANK"
        if any(name not in os.environ for name in names):
            return cls()
        try:
            rank, world, local_rank = (int(os.environ[name]) for name in names)
            local_world = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        except ValueError as error:
            raise RanksError(
                f"{', '.join(names)} in the environment are not all numbers.", hint="torchrun sets them."
            ) from error
        if world <= 1:
            return cls()
        if not 0 <= rank < world:
            raise RanksError(f"RANK is {rank} and WORLD_SIZE {world} in the environment.", hint=HOW_TO_RUN_ALONE)
        return cls(rank, world, local_rank, local_world, "job")

    @property
    def is_first(self) -> bool:
        """Whether this process does what is done once, such as creating files."""
        return self.rank == 0 or self.mode == "part"

    @property
    def speaks(self) -> bool:
        """Whether this process shows messages: the first or, if that is lost, the next one."""
        return self.is_first or (bool(self._jobs) and {*range(self.rank)} <= self._jobs[-1].lost)

    @property
    def has_met(self) -> bool:
        """Whether this process has joined the others."""
        return bool(self._jobs)

    @property
    def is_ending(self) -> bool:
        """Whether this process is already stopping."""
        return any(job.is_ending for job in self._jobs)

    @property
    def is_shared(self) -> bool:
        """Whether other processes share the work."""
        return self.mode != "alone"

    def share(self, sizes: Sequence[int]) -> list[int]:
        """The rank for each unit of work: each in turn goes to the rank with the least so far.

        >>> Ranks(0, 2).share([8, 1, 8, 1])
        [0, 1, 1, 0]
        """
        loads = [(0, rank) for rank in range(self.world)]
        owners = []
        for size in sizes:
            load, rank = loads[0]
            heapq.heapreplace(loads, (load + size, rank))
            owners.append(rank)
        return owners

    @contextmanager
    def meet(self, directory: Path, settings: Mapping[str, Any]) -> Iterator[Ranks]:
        """Meet in a directory, which the first process of a job has emptied; yield the processes that met.

        An error that leaves this block in one process of a job leaves it in all of them. The first process leaves last,
        once the others have closed their files.

        Args:
            directory: shared by all of them.
            settings: what must be the same in all processes, by a name for messages such as `checkpoints`.

        Raises:
            RanksError: a process does not come, or has other settings.
            OutputError: another job is writing to the directory.
        """
        if self.mode in ("alone", "join"):
            yield dataclasses.replace(self, _job=Job(directory, self.rank, self.world))
            return
        job = Job(
            directory,
            self.rank,
            self.world,
            launch=launch_name(),
            timeout=self.timeout,
            on_wait=self.on_wait if self.rank < 2 else None,
        )
        joined = dataclasses.replace(self, _job=job)
        self._jobs.append(job)
        try:
            if self.mode == "part":
                job.enter(_PARTS)
            else:
                job.join()
                joined._check_same(job, settings)
            yield joined
            job.leave()
        except BaseException as error:
            if self.mode == "part":
                job.leave()
                raise
            reason = job.fail(error)
            if reason is error:
                raise
            raise reason from error

    def _check_same(self, job: Job, settings: Mapping[str, Any]) -> None:
        by_first = self.agreed("settings", lambda: dict(settings))
        own = json.loads(json.dumps(settings))
        differing = next((what for what, value in by_first.items() if own.get(what) != value), None)
        if differing is not None:
            raise RanksError(
                f"{job.name_of(self.rank)} has other {differing} than {job.name_of(0, within=True)}.",
                hint="Start the same command on every machine, with a file system that all of them share.",
            )

    def check(self) -> None:
        """Raise the error that ended the job in another process, if there is one."""
        if self._job is not None and self.mode in ("job", "part"):
            self._job.check()

    @contextmanager
    def working_on(self, block: str) -> Iterator[None]:
        """Tell the others that this process makes progress, and on which block; in any thread."""
        if self._job is not None:
            self._job.begin(block)
        yield
        if self._job is not None:
            self._job.end(block)

    def agreed(self, name: str, function: Callable[[], Value]) -> Value:
        """Compute a JSON value in one process and share it with all.

        The first process of a job computes it, and the others wait; of parts, the first to need it does.

        Raises:
            RanksError: the value cannot be written or read.
        """
        if self._job is None or self.mode == "alone":
            return function()
        path = self._job.directory / f"{AGREED}{self._job.name or _PARTS}-{name}"
        made = b""
        if self.mode == "job" and self.rank > 0:
            self._job.wait(lambda: [] if path.exists() else [0], "its first values")
        elif not path.exists():
            made = json.dumps(function()).encode()
        try:
            if made and self.mode == "job":
                write_bytes(path, made, follow=False)
            elif made:
                create_whole(path, made)
            value: Value = json.loads(read_small(path, 1 << 30, follow=False))
        except (OSError, ValueError, RecursionError) as error:
            raise RanksError(
                f"{path} cannot be written or read: {getattr(error, 'strerror', None) or error}.",
                hint="All processes must share this directory, and it needs hard links: choose another one with --out.",
            ) from error
        return value

    def journal(
        self,
        name: str,
        key: str,
        as_json: Callable[[Result], Any] = lambda result: result,
        from_json: Callable[[Any], Result] = lambda value: value,
        *,
        known: Mapping[int, Result] | None = None,
        before_note: Callable[[], None] = lambda: None,
    ) -> PassJournal[Result]:
        """The journal of a pass: the finished blocks of all processes, and a function that notes more of this one.

        Args:
            name: of the pass, for the names of files.
            key: covers everything that can change the result of a block.
            as_json, from_json: convert the result of a block to JSON values and back.
            known: results that this process has from another source.
            before_note: called before results are noted.
        """
        known = known or {}
        if self._job is None:
            return PassJournal(known, known.keys(), lambda _: None)
        directory = self._job.directory
        readers: dict[Path, JournalReader] = {}

        def read() -> dict[int, Result]:
            for path in directory.glob(f"{JOURNAL}{name}-*"):
                readers.setdefault(path, JournalReader(path, key))
            return {place: from_json(value) for each in readers.values() for place, value in each.read().items()}

        def note(finished: Mapping[int, Result]) -> None:
            before_note()
            path = directory / f"{JOURNAL}{name}-{self.rank}"
            try:
                journal = Journal(path, key)
                try:
                    journal.add({place: as_json(result) for place, result in finished.items()})
                finally:
                    journal.close()
            except OSError as error:
                if self.is_shared:  # a process alone works without a journal, as on a full disk
                    raise WriteError(
                        f"{path} cannot be written: {error.strerror or error}.",
                        hint="The processes exchange results through it: free some space, or choose another --out.",
                    ) from error

        if self.mode in ("job", "part"):
            note(known)  # even if empty: a network file system may cache for long that the file is missing
        found = {**known, **read()}
        return PassJournal(found, self.agreed_places(f"done-{name}-{key[:16]}", found), note, read)

    def agreed_places(self, name: str, found: Collection[int]) -> frozenset[int]:
        """The finished units that all processes of a job skip: those that the first has found."""
        return frozenset(self.agreed(name, lambda: sorted(found)) if self.mode == "job" else found)

    def wait(self, awaited: Callable[[], Collection[int]], what: str) -> None:
        """Wait until all other processes have finished their shares.

        Args:
            awaited: returns the ranks whose shares are still missing.
            what: the work, for messages.

        Raises:
            MissingPartsError: shares are missing, and no process is working on them.
            BaseException: what ended the job, in any process.
        """
        job = self._job
        if job is None or self.mode == "job":
            if job is not None:
                job.wait(awaited, what)
            return
        quiet, before = 0.0, None
        while missing := sorted(awaited()):
            now = job.statuses(), len(missing)
            quiet = 0.0 if now != before else quiet + SECONDS_BETWEEN_LOOKS
            before = now
            if not self.waits or quiet >= self.timeout:
                raise MissingPartsError(missing, self.world, what)
            time.sleep(SECONDS_BETWEEN_LOOKS)  # without a beat: waiting is no progress

    def own_device(self, device: str) -> str:
        """The device of this process: with `cuda`, a GPU of its own if the machine has enough."""
        if device != "cuda" or self.mode != "job":
            return device
        import torch

        return f"cuda:{self.local_rank % torch.cuda.device_count()}"

    def leave(self) -> None:
        """Close the files of all other processes, before the first process publishes the result."""
        if self._job is not None and self.mode == "job":
            if self.is_first:
                self._job.wait_for_leave()
            else:
                self._job.leave()
                self._job.wait_for_end()


@dataclass(frozen=True, slots=True)
class PassJournal(Generic[Result]):
    """The journal of a pass.

    Attributes:
        found: results of blocks, by index, that were known at the start.
        done: indices of blocks that need no work; the same in every process of a job.
        note: called now and then with results of further blocks of this process; it saves them.
        read: returns what all processes have noted since the last call.
    """

    found: Mapping[int, Result]
    done: Collection[int]
    note: Callable[[Mapping[int, Result]], None]
    read: Callable[[], Mapping[int, Result]] = dict


ALONE = Ranks()
"""A single process; nothing is shared."""


@contextmanager
def all_ranks(
    on_wait: Callable[[str], None] | None = None, *, timeout: float = SECONDS_WITHOUT_PROGRESS
) -> Iterator[Ranks]:
    """The job that a launcher such as torchrun has started; without a launcher, this process alone.

    Args:
        on_wait: called in this thread after a while of waiting, and then rarely, with a sentence that names the missing
            ranks; in the first two processes.
        timeout: seconds without progress after which a process counts as dead, and the job ends.

    Raises:
        RanksError: the variables of the launcher are not valid.
    """
    yield dataclasses.replace(Ranks.from_environment(), on_wait=on_wait, timeout=timeout)
