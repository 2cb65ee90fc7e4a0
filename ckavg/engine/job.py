"""Stage *engine*: how the processes of one job watch each other, through a shared directory.

Each process has a status file there (`members.py`), and reads those of the others now and then. A process that failed,
disconnected or makes no progress ends the job everywhere, with its own error if it wrote one.
"""

from __future__ import annotations

import os
import platform
import secrets
import time
from collections.abc import Callable, Collection
from contextlib import suppress
from pathlib import Path

from ckavg.engine.failures import as_json, from_json
from ckavg.engine.members import Member, Status, look_at
from ckavg.errors import OutputError, RanksError, listed, printable

RANK_FILE = ".ckavg-rank-"
"""Prefix of the status files; the rank follows."""

SECONDS_BETWEEN_LOOKS = 0.2
_SECONDS_OF_FIRST_PAUSE = 0.01
_LOOKS_A_SECOND = 40
_SECONDS_OF_A_BEAT = 1.0
_SECONDS_TO_TELL_OF_JOINING, _SECONDS_TO_TELL = 5.0, 30.0
_SECONDS_FOR_NEWS = 1.0
_SECONDS_TO_LEAVE = 20.0
_SECONDS_QUIET = 10.0
"""The last process to leave does not wait for one that has not changed for so long."""

_LOOKS_UNTIL_GONE = 5

_GONE = "It was killed, it crashed, or its machine is out of reach. Often memory ran out."
_STOPPED = "It was stopped (SIGSTOP, Ctrl-Z), or its machine or its storage hangs. --rank-timeout allows more."
HOW_TO_RUN_ALONE = (
    "RANK, WORLD_SIZE and LOCAL_RANK are set in the environment; to run a single process: env -u RANK ckavg …"
)


class Job:
    """One process of a job, with its view of the others. Only `begin` and `end` may be called from several threads.

    Args:
        directory: holds the status files of all processes.
        rank, world: which process this is, and of how many.
        launch: the launcher's name for the job.
        timeout: seconds without a change after which a process counts as dead.
        on_wait: called after a while of waiting, and then rarely, with a sentence that names the missing ranks.
    """

    def __init__(
        self,
        directory: Path,
        rank: int,
        world: int,
        *,
        launch: str = "",
        timeout: float = 600.0,
        on_wait: Callable[[str], None] | None = None,
    ) -> None:
        self.directory = directory
        self._rank = rank
        self._world = world
        self._launch = launch
        self._timeout = timeout
        self._on_wait = on_wait
        self._interval = max(SECONDS_BETWEEN_LOOKS, world / _LOOKS_A_SECOND)
        self._member: Member | None = None
        self._seen: dict[int, Status] = {}
        self._held: set[int] = set()
        self._left: set[int] = set()
        self._absent: dict[int, int] = {}
        self._silence: dict[int, float] = {}
        self._failure: BaseException | None = None
        self._looked = self._beaten = 0.0
        self._blocks: dict[str, None] = {}
        self._has_moved = False
        self.lost: set[int] = set()
        self.is_ending = False

    @property
    def name(self) -> str:
        """The unique id of the job."""
        return "" if self._member is None else self._member.status.job

    # --- joining ---

    def join(self) -> None:
        """Wait until all processes have joined. The first must hold the directory already, without status files in it.

        Raises:
            RanksError: a process does not come.
            OutputError: another job is using the directory.
        """
        if self._rank == 0:
            self.enter(secrets.token_hex(8))
        else:
            first: list[Status] = []
            self._wait_to_join(lambda: [] if self._finds_first(first) else [0])
            self.enter(first[-1].job)
        others = [rank for rank in range(self._world) if rank != self._rank]
        self._wait_to_join(lambda: [rank for rank in others if not self._finds(rank)])

    def enter(self, job: str) -> None:
        """Write the status file of this process, as a member of the job with this id.

        Raises:
            OutputError: another living process has the same rank.
            RanksError: the file cannot be written.
        """
        status = Status(job, self._launch, self._rank, self._world, platform.node(), os.getpid())
        path = self.directory / f"{RANK_FILE}{self._rank}"
        try:
            self._member = Member(path, status)
        except BlockingIOError as error:
            raise OutputError(
                f"Rank {self._rank} of the processes writing to {path.parent} exists already: {error}.",
                hint="Wait for it, or choose another place with --out.",
            ) from error
        except OSError as error:
            raise RanksError(
                f"{path} cannot be written: {error.strerror or error}.",
                hint="All machines must share this directory and may write to it: choose another one with --out.",
            ) from error

    def _finds_first(self, found: list[Status]) -> bool:
        """Whether the first process has come. The file of a killed process is not locked and never changes."""
        seen = self._look_at(0)
        if seen is None:
            return False
        status, is_held = seen
        lives = is_held or bool(found and found[-1] != status)
        found.append(status)
        if lives and (status.launch, status.world) != (self._launch, self._world):
            raise OutputError(
                f"Another job is writing to {self.directory}: process {status.pid} on {status.host} is its first.",
                hint="Wait for it, or choose another place with --out.",
            )
        return lives and status.state == "working"

    def _finds(self, rank: int) -> bool:
        if rank not in self._seen and (seen := self._look_at(rank)) is not None and seen[0].job == self.name:
            self._seen[rank] = seen[0]
            self._held |= {rank} if seen[1] else set()
        return rank in self._seen

    def _wait_to_join(self, missing: Callable[[], Collection[int]]) -> None:
        waited, tell_at, seconds = 0.0, _SECONDS_TO_TELL_OF_JOINING, _SECONDS_OF_FIRST_PAUSE
        while awaited := missing():
            who = f"rank {listed([str(rank) for rank in awaited])}"
            if waited >= self._timeout:
                self.lost.update(awaited)
                raise RanksError(
                    f"Rank {self._rank} of {self._world} waited {waited:.0f} s for {who}, which did not join in "
                    f"{self.directory} on {platform.node()}.",
                    hint=f"All processes must share this directory. {HOW_TO_RUN_ALONE}",
                )
            if waited >= tell_at:
                tell_at *= 4
                self._say(f"Rank {self._rank} of {self._world} waits for {who} in {self.directory}. {HOW_TO_RUN_ALONE}")
            self.pause(seconds=seconds)
            waited += seconds
            seconds = min(2 * seconds, self._interval)

    # --- working ---

    def begin(self, block: str) -> None:
        """Note that work on a block begins; in any thread."""
        self._blocks[block] = None
        self._has_moved = True

    def end(self, block: str) -> None:
        """Note that a block is done; in any thread."""
        self._blocks.pop(block, None)
        self._has_moved = True

    def check(self) -> None:
        """Look at the others, unless that was just done; publish the progress of this process.

        Raises:
            BaseException: what ended the job, in any process.
        """
        if not self.is_ending:
            self._beat()
            self._look()

    def wait(self, awaited: Callable[[], Collection[int]], what: str) -> None:
        """Wait until no rank is missing.

        Args:
            awaited: returns the ranks that are still missing.
            what: what they must do, for messages.

        Raises:
            BaseException: what ended the job, in any process.
        """
        waited, tell_at, seconds = 0.0, _SECONDS_TO_TELL, _SECONDS_OF_FIRST_PAUSE
        while ranks := awaited():
            if waited >= tell_at:
                tell_at *= 4
                who = listed([self.name_of(rank, within=True) for rank in sorted(ranks)])
                self._say(f"Waiting for {who} for {waited:.0f} s: {what}.")
            self.pause(what, seconds)
            waited += seconds
            seconds = min(2 * seconds, self._interval)

    def pause(self, what: str = "joining", seconds: float = SECONDS_BETWEEN_LOOKS) -> None:
        """Sleep a little, and look at the others."""
        self._has_moved = True
        self._blocks = {what: None}
        self.check()
        time.sleep(seconds)
        self._blocks = {}
        with suppress(OSError):  # a network file system may cache for long that a file is missing
            os.listdir(self.directory)  # noqa: PTH208

    def statuses(self) -> list[Status]:
        """The statuses of all other processes, of any job."""
        seen = [self._look_at(rank) for rank in range(self._world) if rank != self._rank]
        return [each[0] for each in seen if each is not None]

    def _say(self, line: str) -> None:
        if self._on_wait is not None:
            self._on_wait(line)

    def _beat(self) -> None:
        now = time.monotonic()
        if self._member is not None and self._has_moved and now - self._beaten >= _SECONDS_OF_A_BEAT:
            self._has_moved, self._beaten = False, now
            at = next(iter([*self._blocks]), "")  # the oldest block in work
            self._member.tell(beat=self._member.status.beat + 1, at=at)

    def _look(self, *, at_once: bool = False) -> None:
        """Look at all members, at most once per interval.

        At most one interval counts as silence: if this process itself was stopped, the others were not silent.
        """
        now = time.monotonic()
        since = min(now - self._looked, self._interval)
        if at_once or since == self._interval:
            self._looked = now
            for rank in [rank for rank in self._seen if rank not in self._left | self.lost]:
                self._look_again(rank, since)
        if self._failure is not None:
            raise self._failure

    def _look_again(self, rank: int, since: float) -> None:
        seen, before = self._look_at(rank), self._seen[rank]
        if seen is None or seen[0].job != self.name:
            self._absent[rank] = self._absent.get(rank, 0) + 1
            if self._absent[rank] >= _LOOKS_UNTIL_GONE and not self.is_ending:
                self._lose(rank, "disconnected", _GONE)
            return
        status, is_held = seen
        self._absent[rank], self._seen[rank] = 0, status
        self._silence[rank] = 0.0 if status != before else self._silence.get(rank, 0.0) + since
        if status.state != "working":
            self._left.add(rank)
            if status.state == "failed":
                self._take_failure(rank, status)
        elif is_held:
            self._held.add(rank)
        elif rank in self._held or (status.locks and self._member and status.locks == self._member.status.locks):
            self._lose(rank, "disconnected", _GONE)
        if self._silence[rank] >= self._timeout and rank not in self._left:
            at = f", at {printable(status.at)}" if status.at else ""
            self._lose(rank, f"made no progress for {self._timeout:.0f} s{at}", _STOPPED)

    def _take_failure(self, rank: int, status: Status) -> None:
        try:
            error = from_json(status.error)
        except Exception as cause:  # the file is not trusted: reading it may fail in any way
            error = RanksError(
                f"{self.name_of(rank)} failed with an error that cannot be read.",
                hint="Start the same version of ckavg on every machine.",
            )
            error.__cause__ = cause
        self._failure = self._failure or error

    def _lose(self, rank: int, why: str, hint: str) -> None:
        self.lost.add(rank)
        error = RanksError(f"{self.name_of(rank)} {why}; stopping all ranks.", hint=hint)
        self._failure = self._failure or error

    def _look_at(self, rank: int) -> tuple[Status, bool] | None:
        return look_at(self.directory / f"{RANK_FILE}{rank}")

    def name_of(self, rank: int, *, within: bool = False) -> str:
        """The name of a process in messages, at the beginning of a sentence or within it."""
        status = self._seen.get(rank)
        if rank == self._rank and self._member is not None:
            status = self._member.status
        name = f"rank {rank}" if within else f"Rank {rank}"
        return f"{name} on {status.host}" if status is not None else name

    # --- ending ---

    def fail(self, error: BaseException) -> BaseException:
        """Stop, and publish the error. The first process waits until the others have closed their files. Idempotent.

        Returns:
            What ended the job: for an interrupt, often an error of another process.
        """
        if self.is_ending or self._member is None:
            return self._failure or error
        if isinstance(error, KeyboardInterrupt):
            end = time.monotonic() + _SECONDS_FOR_NEWS
            while self._failure is None and time.monotonic() < end:
                with suppress(BaseException):
                    self._look(at_once=True)
                time.sleep(SECONDS_BETWEEN_LOOKS / 4)
            error = self._failure or error
        self.is_ending = True
        self._failure = error
        self._member.tell(state="failed", error=as_json(error))
        self._member.close()
        if self._rank == 0:
            self.wait_for_leave()
        return error

    def leave(self) -> None:
        """Note that this process has closed all files of the job."""
        if self._member is not None:
            self._member.tell(state="left")
            self._member.close()

    def wait_for_leave(self) -> None:
        """Wait a short while until the others have left or died."""
        end = time.monotonic() + _SECONDS_TO_LEAVE
        while time.monotonic() < end:
            with suppress(BaseException):
                self._look(at_once=True)
            left = self._left | self.lost
            if all(rank in left or self._silence.get(rank, 0.0) >= _SECONDS_QUIET for rank in self._seen):
                return
            if not self.is_ending and self._failure is not None:
                raise self._failure
            self._beat()
            time.sleep(SECONDS_BETWEEN_LOOKS / 4)

    def wait_for_end(self) -> None:
        """After `leave`, wait until the first process has ended and removed its file.

        Raises:
            BaseException: how it failed.
        """
        while self.directory.exists() and self._absent.get(0, 0) < _LOOKS_UNTIL_GONE - 1:
            self._look_again(0, SECONDS_BETWEEN_LOOKS / 4)
            if self._failure is not None:
                raise self._failure
            time.sleep(SECONDS_BETWEEN_LOOKS / 4)
