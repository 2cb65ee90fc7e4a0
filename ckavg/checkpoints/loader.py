"""Stage *discover*: the chosen checkpoints of a source, read; what is wrong with each is kept rather than raised."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

from ckavg.checkpoints.checkpoint import read_checkpoint
from ckavg.checkpoints.configs import read_facts
from ckavg.checkpoints.discover import Candidate, Scan
from ckavg.checkpoints.run import Checkpoint, Selection, TensorInfo
from ckavg.checkpoints.select import selected
from ckavg.checkpoints.weight_files import WEIGHTS
from ckavg.errors import (
    CkavgError,
    CombinedError,
    DuplicateStepError,
    HubError,
    MissingShardError,
    ReadError,
    RunError,
    TruncatedShardError,
)
from ckavg.storage.base import AnyPath, RemotePath
from ckavg.storage.download import thread_map

MOST_CHECKPOINTS = 10_000

_INCOMPLETE = (MissingShardError, TruncatedShardError)


class Loader:
    """Chooses checkpoints and reads them; again, where some that were chosen turned out to be incomplete."""

    def __init__(self, found: Scan, selection: Selection) -> None:
        self._found = found
        self._selection = selection
        self._read: dict[tuple[AnyPath, int], Checkpoint | CkavgError] = {}
        self._texts: dict[str, str] = {}
        self._table: Mapping[str, TensorInfo] = {}
        self._incomplete: dict[AnyPath, CkavgError] = {}
        self._done = False
        self.candidates: list[Candidate] = []
        self.checkpoints: list[Checkpoint] = []
        self.problems: list[CkavgError] = []

    @property
    def warnings(self) -> list[str]:
        """One for each checkpoint that was left out."""
        return [f"{path.name} is incomplete and left out: {_why(why)}" for path, why in self._incomplete.items()]

    def is_done(self) -> bool:
        """Whether every checkpoint that is chosen has been read."""
        return self._done

    def go_on(self) -> None:
        """Choose among what is not known to be incomplete, and read what is not read yet."""
        init, init_step = self._selection.init, self._selection.init_step
        self.candidates = self._choose()
        if len(self.candidates) > MOST_CHECKPOINTS:
            raise RunError(
                f"{len(self.candidates):,} checkpoints are chosen, more than {MOST_CHECKPOINTS:,}.",
                hint="Choose fewer with --every, --last, --from-step or --to-step.",
            )
        places = [(candidate.path, candidate.step) for candidate in self.candidates]
        stems = {candidate.path: candidate.label.stem for candidate in self.candidates if candidate.is_file}
        self.problems = []
        if init is not None:
            places.insert(0, (init, init_step))
            self.problems += _check_anchor(places)
        self.checkpoints = []
        self._read_all(places)
        for path, step in places:
            outcome = self._read[path, step]
            if isinstance(outcome, Checkpoint):
                if path in stems:
                    outcome = dataclasses.replace(outcome, saved_as=f"{stems[path] or 'model'}{WEIGHTS}")
                self.checkpoints.append(outcome)
            else:
                self._tell(path, outcome)
        self._done = not any(candidate.path in self._incomplete for candidate in self.candidates)

    def _tell(self, path: AnyPath, error: CkavgError) -> None:
        """Keep what is wrong with a checkpoint, as a problem or as the reason to leave it out."""
        each = error.errors if isinstance(error, CombinedError) else (error,)
        may_skip = self._selection.skip_incomplete and path != self._selection.init
        if may_skip and all(isinstance(one, _INCOMPLETE) for one in each):
            self._incomplete[path] = error
        else:
            self.problems += each

    def _choose(self) -> list[Candidate]:
        complete = [candidate for candidate in self._found.candidates if candidate.path not in self._incomplete]
        kept = selected([candidate.step for candidate in complete], self._selection)
        return [complete[index] for index in kept]

    def _read_all(self, places: Sequence[tuple[AnyPath, int]]) -> None:
        """Read those that are not read yet; elsewhere, several at the same time."""
        unread = [place for place in places if place not in self._read]
        is_remote = any(isinstance(path, RemotePath) for path, _ in unread)
        read = thread_map(self._read_one, unread) if is_remote else map(self._read_one, unread)
        self._read |= zip(unread, read, strict=True)

    def _read_one(self, place: tuple[AnyPath, int]) -> Checkpoint | CkavgError:
        path, step = place
        init = self._selection.init
        named = init if path == init and init is not None else self._found.source
        try:
            checkpoint = read_checkpoint(path, step, within=named)
        except CkavgError as error:
            if isinstance(path, RemotePath) and isinstance(error, HubError | ReadError):
                raise  # whatever it is, it is not the checkpoint
            return error
        if isinstance(path, RemotePath):
            read_facts(checkpoint)  # its configs are wanted later, one after another
        return self._sharing_tables(checkpoint)

    def _sharing_tables(self, checkpoint: Checkpoint) -> Checkpoint:
        """With the tensor table of the last one read, where they are equal: a large model's takes tens of megabytes.
        So may what headers say of a training set.
        """
        shards = tuple(
            dataclasses.replace(
                shard, metadata={key: self._texts.setdefault(value, value) for key, value in shard.metadata.items()}
            )
            for shard in checkpoint.shards
        )
        table = self._table
        if checkpoint.entries != table:
            self._table = table = checkpoint.entries
        return dataclasses.replace(checkpoint, shards=shards, entries=table)


def _why(error: CkavgError) -> str:
    return error.errors[0].message if isinstance(error, CombinedError) else error.message


def _check_anchor(places: list[tuple[AnyPath, int]]) -> list[CkavgError]:
    (init, init_step), rest = places[0], places[1:]
    if not init.exists():
        places.pop(0)
        return [RunError(f"--init {init} does not exist.", hint="Name the base model's directory or safetensors file.")]
    if not rest or rest[0][1] > init_step:
        return []
    return [
        DuplicateStepError(
            f"--init {init} is taken to be step {init_step}, but the run begins at step {rest[0][1]}.",
            hint="The run has its own anchor: leave out --init. "
            "Or say with --init-step and --from-step where each begins.",
        )
    ]
