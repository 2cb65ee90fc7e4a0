"""Stage *discover*: read the selected checkpoints of a source; problems are collected rather than raised."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

from ckavg.checkpoints.checkpoint import read_checkpoint
from ckavg.checkpoints.configs import read_facts
from ckavg.checkpoints.discover import Candidate, Scan
from ckavg.checkpoints.headers import KnownHeaders
from ckavg.checkpoints.layouts import WEIGHTS
from ckavg.checkpoints.run import Checkpoint, Selection, TensorInfo
from ckavg.checkpoints.trainer_log import TRAINER_STATE, Goal, Series, goal_of, read_history, values_at
from ckavg.errors import (
    CkavgError,
    CombinedError,
    DuplicateStepError,
    HubError,
    MissingShardError,
    ReadError,
    RunError,
    SettingError,
    TruncatedShardError,
    listed,
)
from ckavg.storage.base import AnyPath, RemotePath
from ckavg.storage.download import thread_map

MOST_CHECKPOINTS = 10_000


def select_steps(steps: Sequence[int], selection: Selection, logged: Series = ()) -> list[int]:
    """Indices into the ascending `steps` of the checkpoints that a selection chooses, in order.

    Explicit steps apply first, then the range, `best`, `last`, and the update frequency: with t_0 the step of the
    anchor, checkpoint k is visited if (t_k − t_0) mod `every` = 0. If `every` counts from another step, the first
    checkpoint at or after that is visited too (the burn-in of BEMA).

    Args:
        steps: of all checkpoints.
        selection: which checkpoints.
        logged: the metric of the selection; a checkpoint has the last value since the previous one, or none.

    Raises:
        SettingError: `every`, `last` or `best` is less than 1, or an explicit step has no checkpoint.

    >>> select_steps([0, 50, 100, 150, 200], Selection(every=100))
    [0, 2, 4]
    >>> select_steps([500, 1000, 1500, 2000], Selection(last=3, every=1000))
    [1, 3]
    >>> select_steps([50, 100, 150, 200], Selection(every=100, every_from=150))
    [0, 2]
    >>> select_steps([50, 100, 150, 200], Selection(steps=(50, 150, 200), skip_step=(150,)))
    [0, 3]
    >>> select_steps([50, 100, 150, 200], Selection(best=2, metric="loss"), ((50, 3.0), (90, 1.0), (150, 2.0)))
    [1, 2]
    """
    for option, named in (("steps", selection.steps), ("skip-step", selection.skip_step)):
        absent = [str(step) for step in named if step not in steps]
        if absent:
            raise SettingError(
                f"--{option} names {listed(absent)}, where there is no checkpoint.",
                hint=f"There are steps {listed([str(step) for step in steps], 12)}.",
            )
    for name, value in (("every", selection.every), ("last", selection.last), ("best", selection.best)):
        if value is not None and value < 1:
            raise SettingError(f"--{name} is {value}; it must be at least 1.")
    kept = [
        index
        for index, step in enumerate(steps)
        if (step in selection.steps or not selection.steps)
        and step not in selection.skip_step
        and (selection.from_step is None or step >= selection.from_step)
        and (selection.to_step is None or step <= selection.to_step)
    ]
    if selection.best is not None:
        sign = -1.0 if _goal(selection) == "max" else 1.0
        known = {index: value for index, value in enumerate(values_at(logged, steps)) if value is not None}
        ranked = sorted((sign * known[index], -index) for index in kept if index in known)
        kept = sorted(-index for _, index in ranked[: selection.best])
    kept = kept[-(selection.last or 0) :]
    if selection.every is None or not kept:
        return kept
    first, origin = ([], selection.init_step) if selection.init is not None else (kept[:1], steps[kept[0]])
    if selection.every_from is not None:
        origin = selection.every_from
        first += [index for index in kept if steps[index] >= origin][:1]
    return [
        index
        for index in kept
        if index in first or (steps[index] >= origin and (steps[index] - origin) % selection.every == 0)
    ]


def _goal(selection: Selection) -> Goal:
    """Whether the least or the greatest value of the metric is best.

    Raises:
        SettingError: it is not known.
    """
    goal = selection.goal or goal_of(selection.metric or "")
    if goal is None:
        raise SettingError(
            f"The name of the metric {selection.metric!r} does not say which values are better.",
            hint="Add --goal min or --goal max.",
        )
    return goal


def _read_metric(found: Scan, selection: Selection) -> Series:
    """The metric for choosing the best checkpoints, from the log of the run's last checkpoint; empty without `best`.

    Raises:
        SettingError: it is not in the log, or only one of `best` and `metric` is given.
    """
    if selection.best is None and selection.metric is None and selection.goal is None:
        return ()
    if selection.best is None or selection.metric is None:
        raise SettingError(
            "--best and --metric require each other.",
            hint="For example: --best 5 --metric eval_loss; and --goal if needed.",
        )
    _goal(selection)
    last = found.candidates[-1].path
    history = read_history(last)
    values = history.values(selection.metric)
    if not values:
        logged = f"it holds {listed(history.names, 12)}" if history.names else "there is none"
        raise SettingError(
            f"--metric {selection.metric} is not in the trainer's log, {last.name}/{TRAINER_STATE}: {logged}.",
            hint="Name a metric of its log_history, or choose checkpoints by --steps.",
        )
    return values


class Loader:
    """Chooses checkpoints and reads them; chooses again if some turn out to be incomplete."""

    def __init__(self, found: Scan) -> None:
        self._found = found
        self._read: dict[tuple[AnyPath, int], Checkpoint | CkavgError] = {}
        self._table: Mapping[str, TensorInfo] = {}
        self._headers: KnownHeaders = {}

    def load(self, selection: Selection) -> None:
        """Choose and read checkpoints, leaving out incomplete ones, until all chosen ones are complete.

        Checkpoints that an earlier selection has read are not read again.
        """
        self._selection = selection
        self._incomplete: dict[AnyPath, CkavgError] = {}
        self._logged = _read_metric(self._found, selection)
        self.candidates: list[Candidate] = []
        self.checkpoints: list[Checkpoint] = []
        self.problems: list[CkavgError] = []
        while True:
            self._load_chosen()
            if not any(candidate.path in self._incomplete for candidate in self.candidates):
                return

    @property
    def warnings(self) -> list[str]:
        """One for each checkpoint that was left out, and advice on a choice by a metric."""
        told = []
        if self._selection.best is not None:
            metric = self._selection.metric
            steps = [candidate.step for candidate in self._found.candidates]
            absent = [
                str(step) for step, value in zip(steps, values_at(self._logged, steps), strict=True) if value is None
            ]
            if absent:
                told.append(
                    f"No {metric} was logged since the previous checkpoint, so not chosen: step {listed(absent)}."
                )
            if self._selection.best > len(steps) - len(absent):
                told.append(f"--best {self._selection.best} asks for more checkpoints than have a {metric}.")
            told.append(
                f"Chosen by {metric}, which is optimistic for these checkpoints: judge the average on other data."
            )
        for path, why in self._incomplete.items():
            first = why.errors[0] if isinstance(why, CombinedError) else why
            told.append(f"Skipped: {path.name} is incomplete: {first.message}")
        return told

    def _load_chosen(self) -> None:
        complete = [candidate for candidate in self._found.candidates if candidate.path not in self._incomplete]
        chosen = select_steps([candidate.step for candidate in complete], self._selection, self._logged)
        self.candidates = [complete[index] for index in chosen]
        if len(self.candidates) > MOST_CHECKPOINTS:
            raise RunError(
                f"{len(self.candidates):,} checkpoints are chosen, more than {MOST_CHECKPOINTS:,}.",
                hint="Choose fewer with --every, --last, --best, --from-step or --to-step.",
            )
        places = [(candidate.path, candidate.step) for candidate in self.candidates]
        self.checkpoints, self.problems = [], []
        if self._selection.init is not None:
            places.insert(0, (self._selection.init, self._selection.init_step))
            self.problems += _check_anchor(places)
        self._read_all(places)
        stems = {candidate.path: candidate.label.stem for candidate in self.candidates if candidate.is_file}
        for path, step in places:
            outcome = self._read[path, step]
            if isinstance(outcome, CkavgError):
                self._keep(path, outcome)
            elif path in stems:
                self.checkpoints.append(dataclasses.replace(outcome, saved_as=f"{stems[path] or 'model'}{WEIGHTS}"))
            else:
                self.checkpoints.append(outcome)

    def _keep(self, path: AnyPath, error: CkavgError) -> None:
        """Note an error as a problem, or as the reason to leave a checkpoint out."""
        each = error.errors if isinstance(error, CombinedError) else (error,)
        may_skip = self._selection.skip_incomplete and path != self._selection.init
        if may_skip and all(isinstance(one, MissingShardError | TruncatedShardError) for one in each):
            self._incomplete[path] = error
        else:
            self.problems += each

    def _read_all(self, places: Sequence[tuple[AnyPath, int]]) -> None:
        """Read those that are not read yet; remote ones several at the same time."""
        unread = [place for place in places if place not in self._read]
        is_remote = any(isinstance(path, RemotePath) for path, _ in unread)
        read = thread_map(self._read_one, unread) if is_remote else map(self._read_one, unread)
        self._read |= zip(unread, read, strict=True)

    def _read_one(self, place: tuple[AnyPath, int]) -> Checkpoint | CkavgError:
        path, step = place
        init = self._selection.init
        named = init if path == init and init is not None else self._found.source
        try:
            checkpoint = read_checkpoint(path, step, within=named, prefix=self._selection.prefix, known=self._headers)
        except CkavgError as error:
            is_remote = isinstance(path, RemotePath) and isinstance(error, HubError | ReadError)
            if is_remote or isinstance(error, SettingError):
                raise  # not a problem of the checkpoint
            return error
        if self._selection.prefix is not None and path != init and not checkpoint.is_distributed:
            raise SettingError(
                f"--prefix is for checkpoints of torch.distributed.checkpoint; {path} is not one.",
                hint="Leave it out: its tensors have the names of the model.",
            )
        if isinstance(path, RemotePath):
            read_facts(checkpoint)  # caches its configs, which are read one by one later
        if checkpoint.entries == self._table:  # stored once: the table of a large model takes tens of megabytes
            return dataclasses.replace(checkpoint, entries=self._table)
        self._table = checkpoint.entries
        return checkpoint


def _check_anchor(places: list[tuple[AnyPath, int]]) -> list[CkavgError]:
    (init, init_step), rest = places[0], places[1:]
    if not init.exists():
        places.pop(0)
        return [RunError(f"--init {init} does not exist.", hint="Name the base model's directory or safetensors file.")]
    if not rest or rest[0][1] > init_step:
        return []
    return [
        DuplicateStepError(
            f"--init {init} counts as step {init_step}, but the run begins at step {rest[0][1]}.",
            hint="The run has its own anchor: leave out --init. Or state where each begins with --init-step and "
            "--from-step.",
        )
    ]
