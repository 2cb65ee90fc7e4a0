"""Stage *engine*: the cores of this machine, and the processes that share a piece of work. Imports nothing heavy.

Processes exchange through files in a directory that all of them see: each notes what comes of its share in a journal
of its own, and reads those of the others. Those of one job work at the same time, and one that fails ends all
(`job.py`). A part is the same share by itself, whenever it is started.
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

from ckavg.engine.job import ALONE as HOW_TO_RUN_ALONE
from ckavg.engine.job import RANK_FILE, SECONDS_BETWEEN_LOOKS, Job
from ckavg.engine.launchers import launch_name
from ckavg.errors import MissingPartsError, RanksError, WriteError
from ckavg.storage.atomic import create_whole, write_bytes
from ckavg.storage.journal import Journal, JournalReader
from ckavg.storage.local import read_small

MOST_THREADS = 16
"""More do not read faster; each has its own buffers."""

SECONDS_WITHOUT_PROGRESS = 600.0
AGREED = ".ckavg-agreed-"
"""How the names of files begin that hold what must be the same in all processes."""

JOURNAL = ".ckavg-journal-"
"""How the names of journals begin; what is noted, and the rank of who notes it, follow."""

NAMES_OF_A_JOB = (f"{RANK_FILE}*", f"{AGREED}*", f"{JOURNAL}*")
"""Shell patterns of the names of files by which processes exchange."""

_PARTS = "parts"


def available_cores(processes: int = 1) -> int:
    """How many cores this process may use, where so many share them."""
    try:
        cores = len(os.sched_getaffinity(0))
    except AttributeError:  # macOS
        cores = os.cpu_count() or 1
    return max(1, cores // processes)


def worker_threads(processes: int = 1) -> int:
    """How many threads read and compute: one for each core, where so many processes share them."""
    return min(available_cores(processes), MOST_THREADS)


Value = TypeVar("Value")
Result = TypeVar("Result")


@dataclass(frozen=True, slots=True)
class Ranks:
    """The processes that share a piece of work, as one of them sees them. All of them call the same methods.

    Attributes:
        rank: which of them this is, from 0.
        world: how many there are.
        local_rank: which of those on this machine.
        local_world: how many there are on this machine.
        mode: whether this process works `alone`, in a `job` of several, at a `part` without the others, or is to `join`
            what parts have left.
        timeout: seconds without progress after which a process is taken for gone.
        waits: of a part, whether it waits for the others.
        on_wait: called with a sentence on who is waited for, after a while and then seldom.
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
        """What a launcher tells a process in its environment; elsewhere, one process alone."""
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
        """Whether this process speaks for all, and makes what is made once."""
        return self.rank == 0 or self.mode == "part"

    @property
    def speaks(self) -> bool:
        """Whether this process is to show messages: the first or, where that is gone, the one after it."""
        return self.is_first or (bool(self._jobs) and {*range(self.rank)} <= self._jobs[-1].lost)

    @property
    def has_met(self) -> bool:
        """Whether this process has come to the others."""
        return bool(self._jobs)

    @property
    def is_ending(self) -> bool:
        """Whether this process is giving up already."""
        return any(job.is_ending for job in self._jobs)

    @property
    def is_shared(self) -> bool:
        """Whether other processes have a share in the work."""
        return self.mode != "alone"

    def share(self, sizes: Sequence[int]) -> list[int]:
        """Whose each unit of work is: each in turn goes to whoever has least by then.

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
        """The same processes at work in a directory, which the first of a job has emptied of what others left there.

        An error that leaves this block in one process of a job leaves it in all of them. The first leaves it last, when
        the others have closed their files.

        Args:
            directory: that all of them see.
            settings: by what it is, such as `checkpoints`, what must be the same in all processes.

        Raises:
            RanksError: the others do not come, or see something else.
            OutputError: others are filling the directory.
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
        """Raise what ended the job in another process, if something has."""
        if self._job is not None and self.mode in ("job", "part"):
            self._job.check()

    @contextmanager
    def working_on(self, block: str) -> Iterator[None]:
        """Have the others know that this process works on a block, and that it has come further."""
        if self._job is not None:
            self._job.begin(block)
        yield
        if self._job is not None:
            self._job.end(block)

    def agreed(self, name: str, function: Callable[[], Value]) -> Value:
        """What a function gives, a JSON value, once for all: in the first process of a job, or in the part that comes
        first. The others wait for it, or find it.

        Raises:
            RanksError: it cannot be written or read.
        """
        if self._job is None or self.mode == "alone":
            return function()
        path = self._job.directory / f"{AGREED}{self._job.name or _PARTS}-{name}"
        made = b""
        if self.mode == "job" and self.rank > 0:
            self._job.wait(lambda: [] if path.exists() else [0], "what it must say first")
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
                hint="All processes must see this directory, with hard links: choose another place with --out.",
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
        """What is done of a pass by any process, and who notes what this one does now.

        Args:
            name: of the pass, in the names of files.
            key: whatever could change what comes of a block is in it.
            as_json, from_json: the way of what comes of a block to JSON values, and back.
            known: what came of blocks, as this process knows from elsewhere.
            before_note: called before something is noted as done.
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
                if self.is_shared:  # by itself, a process needs none: no room for a journal, perhaps
                    raise WriteError(
                        f"{path} cannot be written: {error.strerror or error}.",
                        hint="The processes exchange through it: free some space, or choose another place with --out.",
                    ) from error

        if self.mode in ("job", "part"):
            note(known)  # in any case: a network file system may remember for long what was not there
        found = {**known, **read()}
        return PassJournal(found, self.agreed_places(f"done-{name}-{key[:16]}", found), note, read)

    def agreed_places(self, name: str, found: Collection[int]) -> frozenset[int]:
        """Of units that are done, those that all processes of a job take for done from the beginning."""
        return frozenset(self.agreed(name, lambda: sorted(found)) if self.mode == "job" else found)

    def wait(self, awaited: Callable[[], Collection[int]], what: str) -> None:
        """Wait until the shares of all others are there.

        Args:
            awaited: the ranks whose are missing, as it stands.
            what: of what, for a message.

        Raises:
            MissingPartsError: they are not, and nobody works on them now.
            BaseException: what ended the job, wherever it happened.
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
            time.sleep(SECONDS_BETWEEN_LOOKS)  # without a beat: who waits makes no progress

    def own_device(self, device: str) -> str:
        """The device of this process: with `cuda`, a GPU of its own, as far as its machine has enough."""
        if device != "cuda" or self.mode != "job":
            return device
        import torch

        return f"cuda:{self.local_rank % torch.cuda.device_count()}"

    def leave(self) -> None:
        """Before the first process makes a result of what all have done: have the others close their files."""
        if self._job is not None and self.mode == "job":
            if self.is_first:
                self._job.wait_for_leave()
            else:
                self._job.leave()
                self._job.wait_for_end()


@dataclass(frozen=True, slots=True)
class PassJournal(Generic[Result]):
    """What is done of a pass, and who notes what is done now.

    Attributes:
        found: what came of blocks by their place, as far as it was known at first.
        done: the places of those that need not be worked on again; the same in every process of a job.
        note: called now and then with what came of further blocks of this process; it keeps them.
        read: what was noted since it was last called, by all processes.
    """

    found: Mapping[int, Result]
    done: Collection[int]
    note: Callable[[Mapping[int, Result]], None]
    read: Callable[[], Mapping[int, Result]] = dict


ALONE = Ranks()
"""One process, for which nothing of this does anything."""


@contextmanager
def all_ranks(
    on_wait: Callable[[str], None] | None = None, *, timeout: float = SECONDS_WITHOUT_PROGRESS
) -> Iterator[Ranks]:
    """The job that a launcher such as torchrun has started, with this process in it; this process alone elsewhere.

    Args:
        on_wait: called in this thread with a sentence on who is waited for, after a while and then seldom: in the first
            process, and in the second.
        timeout: seconds without progress after which a process is taken for gone, and the job ends.

    Raises:
        RanksError: the environment makes no sense.
    """
    yield dataclasses.replace(Ranks.from_environment(), on_wait=on_wait, timeout=timeout)
