"""Evaluate a result with the user's own command, and take the value of a metric from its output."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import shlex
import subprocess
import tempfile
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ckavg.averaging.metrics import Reading, read_metric
from ckavg.averaging.plan import Plan
from ckavg.checkpoints.checkpoint import RESULT_RECORD
from ckavg.checkpoints.trainer_log import Goal, goal_of
from ckavg.errors import SettingError, WriteError
from ckavg.output.card import write_card
from ckavg.output.loading import example
from ckavg.output.output_path import CARD, PLOT
from ckavg.output.published import published
from ckavg.output.record import Evaluation, Record
from ckavg.output.weight_files import sha256
from ckavg.storage.atomic import write_bytes
from ckavg.storage.local import read_small

DIRECTORY, FILES = "{dir}", "{out}"

_JOB_VARIABLES = re.compile(
    r"(?:(?:LOCAL_|GROUP_|ROLE_|NODE_)?(?:RANK|WORLD_SIZE)|ROLE_NAME|MASTER_(?:ADDR|PORT)|TORCHELASTIC_.*"
    r"|(?:OMPI_COMM_WORLD|PMI|PMIX|MV2_COMM_WORLD)_(?:LOCAL_)?(?:RANK|SIZE))"
)
"""Variables of torchrun and MPI. A command that saw them would join the job and wait for its processes."""

_VARIABLES = {DIRECTORY: "CKAVG_EVAL_DIR", FILES: "CKAVG_EVAL_OUT"}
_QUOTED = re.compile(r"""\\.|'[^']*'|"(?:\\.|[^"\\])*"|\{(?:dir|out)\}""", re.DOTALL)
_STDERR, _CHUNK, _LAST_LINES, _LINE, _TAIL = 2, 1 << 16, 5, 200, 1 << 14


@dataclass(frozen=True, slots=True)
class Criterion:
    """How results are compared.

    Attributes:
        command: for the shell, with `{dir}` for the directory of a result, and optionally `{out}` for output files.
        metric: the name of the value to compare; None: the last number that the command prints.
        goal: whether the least or the greatest value is best.
        stderr: the name of its standard error; None: the usual ones.
        warnings: for the user.
    """

    command: str
    metric: str | None
    goal: Goal
    stderr: str | None = None
    warnings: tuple[str, ...] = ()


def criterion_of(
    command: str, metric: str | None = None, goal: Goal | None = None, stderr: str | None = None
) -> Criterion:
    """A criterion; without `goal`, the name of the metric says whether less or more is better.

    Raises:
        SettingError: the command has no `{dir}`, or the goal is not known.
    """
    if DIRECTORY not in command:
        raise SettingError(
            f"eval is {command!r}; it must contain {DIRECTORY}, which stands for the directory of a result.",
            hint=f"For example: --eval 'python evaluate.py {DIRECTORY}'",
        )
    if metric is not None and not metric.strip():
        raise SettingError("eval-metric is empty; it must be the name of a metric.", hint="Or leave it out.")
    known = None if metric is None else goal_of(metric)
    decided = goal or known
    if decided is None:
        raise SettingError(
            "eval-goal is missing: without eval-metric, it must say whether the least or the greatest number is best."
            if metric is None
            else f"eval-goal is missing: the name {metric!r} does not say whether less or more is better.",
            hint="Add --eval-goal min or --eval-goal max.",
        )
    warnings: tuple[str, ...] = ()
    if known not in (None, decided):
        which = "least" if decided == "min" else "greatest"
        warnings = (f"The {which} value of {metric!r} counts as the best, as eval-goal says; its name says {known}.",)
    return Criterion(command, metric, decided, stderr, warnings)


@dataclass(frozen=True, slots=True)
class Outcome:
    """The outcome of an evaluation.

    Attributes:
        evaluation: for the record.
        said: the last lines that the command printed.
    """

    evaluation: Evaluation
    said: tuple[str, ...] = ()


def evaluate(directory: Path, criterion: Criterion) -> Outcome:
    """Run a command on a result, in a shell. Its stderr is shown; a failure is returned, never raised.

    Args:
        directory: of the result.
        criterion: the command and the metric. `{dir}` is replaced by the absolute path of the directory, quoted;
            `{out}` by that of an empty directory, whose newest JSON file is read.
    """
    with tempfile.TemporaryDirectory(prefix="ckavg-eval-", ignore_cleanup_errors=True) as files:
        paths = {DIRECTORY: str(directory.absolute()), FILES: files}
        variables = {_VARIABLES[name]: path for name, path in paths.items()}
        try:
            with _shown_stderr() as (handle, tail):
                done = subprocess.run(  # noqa: S602
                    _with_paths(criterion.command, paths),
                    shell=True,
                    stdout=subprocess.PIPE,
                    stderr=handle,
                    stdin=subprocess.DEVNULL,
                    check=False,
                    env={name: value for name, value in os.environ.items() if not _JOB_VARIABLES.fullmatch(name)}
                    | variables,
                )
        except (OSError, ValueError) as error:
            return failed(criterion, f"it could not be run: {error}")
        text = done.stdout.decode(errors="replace")
        said = _last_lines(text[-_TAIL:]) + _last_lines(bytes(tail).decode(errors="replace"))
        if done.returncode:
            return failed(criterion, f"exit status {done.returncode}", said)
        document = _newest_json(Path(files)) if FILES in criterion.command else None
    return Outcome(_evaluation(criterion, read_metric(text, criterion.metric, criterion.stderr, document)), said)


def failed(criterion: Criterion, problem: str, said: tuple[str, ...] = ()) -> Outcome:
    """The outcome of an evaluation that failed."""
    return Outcome(_evaluation(criterion, Reading(problem=problem)), said)


def _evaluation(criterion: Criterion, found: Reading) -> Evaluation:
    return Evaluation(
        criterion.command,
        found.value,
        found.problem,
        criterion.metric or "",
        found.stderr,
        criterion.goal,
        data=found.data,
    )


@contextmanager
def _shown_stderr() -> Iterator[tuple[int, bytearray]]:
    """A handle that forwards to stderr, and the last bytes that passed. Background processes are not waited for."""
    reading, writing = os.pipe()
    tail = bytearray()

    def copy() -> None:
        with os.fdopen(reading, "rb", buffering=0) as file:
            while chunk := file.read(_CHUNK):
                tail.extend(chunk)
                del tail[:-_TAIL]
                with suppress(OSError):
                    os.write(_STDERR, chunk)

    thread = threading.Thread(target=copy, daemon=True)
    thread.start()
    try:
        yield writing, tail
    finally:
        os.close(writing)
        thread.join(timeout=1.0)


def _last_lines(text: str) -> tuple[str, ...]:
    """The last lines that are not empty; of a line that is redrawn, such as a progress bar, its last state."""
    lines = [line.rstrip().rpartition("\r")[2][:_LINE] for line in text.split("\n") if line.strip()]
    return tuple(lines[-_LAST_LINES:])


def _newest_json(directory: Path) -> Any:
    """The content of the newest JSON file below a directory; None if there is none, or it cannot be read."""
    found = [path for path in directory.rglob("*.json") if path.is_file()]
    with suppress(OSError, ValueError, RecursionError):
        newest = max(found, key=lambda path: (path.stat().st_mtime_ns, str(path)))
        return json.loads(read_small(newest))
    return None


def _with_paths(command: str, paths: dict[str, str]) -> str:
    r"""The command with `{dir}` and `{out}` replaced by paths, inside quotes and outside.

    If a path has characters that mean something to a shell, the shell itself inserts the paths from variables, so that
    it takes none of them for part of the command: in quotes of their own, or in the double quotes that are there.
    Single quotes are interrupted for it.

    >>> _with_paths("f {dir} '{dir}'", {"{dir}": "/a"}), _with_paths("f {dir} \"{dir}\" 'g {dir}'", {"{dir}": "/$a b"})
    ("f /a '/a'", 'f "${CKAVG_EVAL_DIR}" "${CKAVG_EVAL_DIR}" \'g \'"${CKAVG_EVAL_DIR}"\'\'')
    """
    name = re.compile("|".join(map(re.escape, paths)))
    if all(shlex.quote(path) == path for path in paths.values()):
        return name.sub(lambda found: paths[found[0]], command)

    def quoted(part: re.Match[str]) -> str:
        pattern = {"'": """'"${{{}}}"'""", '"': "${{{}}}"}.get(part[0][0], '"${{{}}}"')
        return name.sub(lambda found: pattern.format(_VARIABLES[found[0]]), part[0])

    return _QUOTED.sub(quoted, command)


def record_evaluation(result: Record, evaluation: Evaluation, plan: Plan) -> Record:
    """Add an evaluation to the card and the record of a result, in its files too.

    A card that was edited since it was written stays as it is.

    Args:
        result: its record.
        evaluation: what to add.
        plan: of the result; the card is written from it again.

    Raises:
        WriteError: a file cannot be written; the record is unchanged.
    """
    if evaluation.last_value is None and (before := result.evaluation) is not None:
        known = dataclasses.replace(evaluation, last_value=before.last_value, last_stderr=before.last_stderr)
        same = published(dataclasses.replace(result, evaluation=known)).evaluation == published(result).evaluation
        evaluation = known if same else evaluation
    evaluated = dataclasses.replace(result, evaluation=evaluation)
    if published(evaluated).evaluation == published(result).evaluation:  # already in the files of an up-to-date result
        return evaluated
    if plan.is_there and plan.target is not None:
        plan.target.fetch(result)
        evaluated = plan.target.here(evaluated)
    path = evaluated.directory / RESULT_RECORD
    try:
        evaluated = _with_card(evaluated, plan)
        write_bytes(path, published(evaluated).to_bytes(), follow=False)
    except OSError as error:
        raise WriteError(
            f"{path} cannot be written: {error.strerror or error}.", hint="The average itself is complete."
        ) from error
    return evaluated


def _with_card(evaluated: Record, plan: Plan) -> Record:
    *snapshots, output = evaluated.outputs
    path = output.directory / CARD
    if sha256(path.read_bytes()) != output.sha256[CARD]:
        return evaluated
    picture = PLOT if PLOT in output.files else None
    usage = example(plan.side_files, plan.weights.names)
    card = write_card(published(evaluated), plan.scheme, plan.origin, usage, picture=picture).encode()
    write_bytes(path, card, follow=False)
    output = dataclasses.replace(output, sha256=output.sha256 | {CARD: sha256(card)})
    return dataclasses.replace(evaluated, outputs=(*snapshots, output))


def compare_with_last(
    records: Sequence[Record], of_run: Mapping[int, Evaluation] | None = None
) -> Iterator[tuple[int, Evaluation]]:
    """Evaluations with that of the run's last checkpoint added, by the indices of their records.

    Args:
        records: the results, with their evaluations by one criterion; those of the scheme `last` are compared with.
        of_run: evaluations of the run's own checkpoints by step.
    """
    lasts = {**(of_run or {})}
    lasts |= {each.steps[-1]: each.evaluation for each in records if each.scheme == "last" and each.evaluation}
    for index, record in enumerate(records):
        last, own = lasts.get(record.steps[-1]), record.evaluation
        if record.scheme != "last" and last is not None and own is not None and own.value is not None:
            yield index, dataclasses.replace(own, last_value=last.value, last_stderr=last.stderr)


@dataclass(frozen=True, slots=True)
class Ranking:
    """The best of several results, by index.

    Attributes:
        best: the first with the best value.
        equal: the others with the same value.
        level: those that differ from it by no more than its standard error.
    """

    best: int
    equal: tuple[int, ...]
    level: tuple[int, ...]


def rank(evaluations: Sequence[Evaluation | None], goal: Goal) -> Ranking | None:
    """Rank evaluations; None if none has a value.

    >>> each = [Evaluation("c", value, stderr=0.5) for value in (2.0, 1.0, 1.0, 1.5)]
    >>> rank(each, "min")
    Ranking(best=1, equal=(2,), level=(3,))
    """
    values = {index: each.value for index, each in enumerate(evaluations) if each and each.value is not None}
    if not values:
        return None
    best = (min if goal == "min" else max)(values, key=values.__getitem__)
    first = evaluations[best]
    width = first.stderr if first is not None and first.stderr is not None else 0.0
    others = {index: abs(value - values[best]) for index, value in values.items() if index != best}
    return Ranking(
        best,
        tuple(index for index, distance in others.items() if distance == 0),
        tuple(index for index, distance in others.items() if 0 < distance <= width),
    )
