"""Stage *engine*: how the processes of one job know of each other, through a directory that all of them see.

Each has a file there (`members.py`). Whoever waits, and whoever works, looks at those of the others now and then: one
that has failed, is gone, or comes no further ends the job everywhere, with its own error where it has told one.
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
"""How the names of those files begin; the rank follows."""

SECONDS_BETWEEN_LOOKS = 0.2
_SECONDS_OF_FIRST_PAUSE = 0.01
_LOOKS_A_SECOND = 40
_SECONDS_OF_A_BEAT = 1.0
_SECONDS_TO_TELL_OF_JOINING, _SECONDS_TO_TELL = 5.0, 30.0
_SECONDS_FOR_NEWS = 1.0
_SECONDS_TO_LEAVE = 20.0
_SECONDS_QUIET = 10.0
"""Without a change: the last one to leave does not wait for such a process."""

_LOOKS_UNTIL_GONE = 5

_GONE = "It was killed, it crashed, or its machine is out of reach. Often memory ran out."
_STOPPED = "It was stopped (SIGSTOP, Ctrl-Z), or its machine or its storage hangs. --rank-timeout allows more."
ALONE = "RANK, WORLD_SIZE and LOCAL_RANK are set in the environment; to run one process by itself: env -u RANK ckavg …"


class Job:
    """One process of a job, as it sees the others. All but `begin` and `end` are for one thread.

    Args:
        directory: where the files of all processes are.
        rank, world: which process this is, and of how many.
        launch: what the launcher calls the job.
        timeout: seconds without a change after which a process is taken for gone.
        on_wait: called after a while of waiting, and then seldom, with a sentence on who is waited for.
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
        """The word that no other job has."""
        return "" if self._member is None else self._member.status.job

    # --- joining ---

    def join(self) -> None:
        """Wait until all processes are there. The first must hold the directory by now, with no such file in it.

        Raises:
            RanksError: they do not come.
            OutputError: another job has come before this one.
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
        """Say that this process is there, as one of the job that has this word.

        Raises:
            OutputError: another process that lives says the same.
            RanksError: the system would not let us write.
        """
        status = Status(job, self._launch, self._rank, self._world, platform.node(), os.getpid())
        path = self.directory / f"{RANK_FILE}{self._rank}"
        try:
            self._member = Member(path, status)
        except BlockingIOError as error:
            raise OutputError(
                f"Rank {self._rank} of those that fill {path.parent} is there already: {error}.",
                hint="Wait for it, or choose another place with --out.",
            ) from error
        except OSError as error:
            raise RanksError(
                f"{path} cannot be written: {error.strerror or error}.",
                hint="All machines must see this directory, and may write to it: choose another place with --out.",
            ) from error

    def _finds_first(self, found: list[Status]) -> bool:
        """Whether the first process of this job has come: what a killed one has left is not held, and does not
        change.
        """
        seen = self._look_at(0)
        if seen is None:
            return False
        status, is_held = seen
        lives = is_held or bool(found and found[-1] != status)
        found.append(status)
        if lives and (status.launch, status.world) != (self._launch, self._world):
            raise OutputError(
                f"Another job is filling {self.directory}: process {status.pid} on {status.host} is its first.",
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
                    f"Rank {self._rank} of {self._world} has waited {waited:.0f} s in vain for {who} in "
                    f"{self.directory} on {platform.node()}.",
                    hint=f"All processes must see this directory. {ALONE}",
                )
            if waited >= tell_at:
                tell_at *= 4
                self._say(f"Rank {self._rank} of {self._world} waits for {who} in {self.directory}. {ALONE}")
            self.pause(seconds=seconds)
            waited += seconds
            seconds = min(2 * seconds, self._interval)

    # --- working ---

    def begin(self, block: str) -> None:
        """Say that a block is worked on; in any thread."""
        self._blocks[block] = None
        self._has_moved = True

    def end(self, block: str) -> None:
        """Say that it is done."""
        self._blocks.pop(block, None)
        self._has_moved = True

    def check(self) -> None:
        """Look at the others, unless that was just done; say that this process has come further, if it has.

        Raises:
            BaseException: what ended the job, wherever it happened.
        """
        if not self.is_ending:
            self._beat()
            self._look()

    def wait(self, awaited: Callable[[], Collection[int]], what: str) -> None:
        """Wait until nobody is waited for.

        Args:
            awaited: those who are waited for, as it stands.
            what: what for.

        Raises:
            BaseException: what ended the job, wherever it happened.
        """
        waited, tell_at, seconds = 0.0, _SECONDS_TO_TELL, _SECONDS_OF_FIRST_PAUSE
        while ranks := awaited():
            if waited >= tell_at:
                tell_at *= 4
                who = listed([self.name_of(rank, within=True) for rank in sorted(ranks)])
                self._say(f"{waited:.0f} s of waiting for {who}: {what}.")
            self.pause(what, seconds)
            waited += seconds
            seconds = min(2 * seconds, self._interval)

    def pause(self, what: str = "joining", seconds: float = SECONDS_BETWEEN_LOOKS) -> None:
        """Let a moment go by, and look at the others."""
        self._has_moved = True
        self._blocks = {what: None}
        self.check()
        time.sleep(seconds)
        self._blocks = {}
        with suppress(OSError):  # a network file system may remember for long what was not there
            os.listdir(self.directory)  # noqa: PTH208

    def statuses(self) -> list[Status]:
        """What all others say that are there, whichever job they are of."""
        seen = [self._look_at(rank) for rank in range(self._world) if rank != self._rank]
        return [each[0] for each in seen if each is not None]

    def _say(self, line: str) -> None:
        if self._on_wait is not None:
            self._on_wait(line)

    def _beat(self) -> None:
        now = time.monotonic()
        if self._member is not None and self._has_moved and now - self._beaten >= _SECONDS_OF_A_BEAT:
            self._has_moved, self._beaten = False, now
            at = next(iter([*self._blocks]), "")  # the oldest of those that are under way
            self._member.tell(beat=self._member.status.beat + 1, at=at)

    def _look(self, *, at_once: bool = False) -> None:
        """Look at all that have come, at most every so often. Of the seconds since the last look no more count than
        that: of a process that was stopped itself, the others have been silent for as long.
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
                self._lose(rank, "is gone without a word", _GONE)
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
            self._lose(rank, "is gone without a word", _GONE)
        if self._silence[rank] >= self._timeout and rank not in self._left:
            at = f", at {printable(status.at)}" if status.at else ""
            self._lose(rank, f"has come no further for {self._timeout:.0f} s{at}", _STOPPED)

    def _take_failure(self, rank: int, status: Status) -> None:
        try:
            error = from_json(status.error)
        except Exception as cause:  # whatever becomes of reading what anybody may have written
            error = RanksError(
                f"{self.name_of(rank)} has failed with an error that cannot be understood.",
                hint="Start the same version of ckavg on every machine.",
            )
            error.__cause__ = cause
        self._failure = self._failure or error

    def _lose(self, rank: int, why: str, hint: str) -> None:
        self.lost.add(rank)
        error = RanksError(f"{self.name_of(rank)} {why}; the others give up.", hint=hint)
        self._failure = self._failure or error

    def _look_at(self, rank: int) -> tuple[Status, bool] | None:
        return look_at(self.directory / f"{RANK_FILE}{rank}")

    def name_of(self, rank: int, *, within: bool = False) -> str:
        """What messages call a process, at the beginning of a sentence or within it."""
        status = self._seen.get(rank)
        if rank == self._rank and self._member is not None:
            status = self._member.status
        name = f"rank {rank}" if within else f"Rank {rank}"
        return f"{name} on {status.host}" if status is not None else name

    # --- ending ---

    def fail(self, error: BaseException) -> BaseException:
        """Give up: tell the others; the first waits for them, so that no file is open any more. May be called again.

        Returns:
            What ended the job. An interrupt is often but the consequence of what happened elsewhere.
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
        """Say that this process has no file of the job open any more."""
        if self._member is not None:
            self._member.tell(state="left")
            self._member.close()

    def wait_for_leave(self) -> None:
        """Wait until the others have left, or are gone; not for long."""
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
        """Wait until the first process has ended, and its file with it; this one has left.

        Raises:
            BaseException: how it failed.
        """
        while self.directory.exists() and self._absent.get(0, 0) < _LOOKS_UNTIL_GONE - 1:
            self._look_again(0, SECONDS_BETWEEN_LOOKS / 4)
            if self._failure is not None:
                raise self._failure
            time.sleep(SECONDS_BETWEEN_LOOKS / 4)
