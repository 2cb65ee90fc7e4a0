"""What a user's own command says of a result: it is run, and the number that it prints last is its answer."""

from __future__ import annotations

import dataclasses
import math
import os
import re
import shlex
import subprocess
from pathlib import Path

from ckavg.averaging.plan import Plan
from ckavg.checkpoints.checkpoint import RESULT_RECORD
from ckavg.errors import SettingError, WriteError
from ckavg.output.card import write_card
from ckavg.output.output_path import CARD, PLOT
from ckavg.output.published import published
from ckavg.output.record import Evaluation, Record
from ckavg.output.weight_files import sha256
from ckavg.storage.atomic import write_bytes

DIRECTORY = "{dir}"

_NUMBER = re.compile(
    r"(?<![\w.])[-+]?(?>(?:\d+\.?\d*|\.\d+)(?:e[-+]?\d+)?|nan|inf(?:inity)?)(?!\w)",
    re.IGNORECASE,
)

_JOB_VARIABLES = re.compile(
    r"(?:(?:LOCAL_|GROUP_|ROLE_|NODE_)?(?:RANK|WORLD_SIZE)|ROLE_NAME|MASTER_(?:ADDR|PORT)|TORCHELASTIC_.*"
    r"|(?:OMPI_COMM_WORLD|PMI|PMIX|MV2_COMM_WORLD)_(?:LOCAL_)?(?:RANK|SIZE))"
)
"""What torchrun and MPI tell a process of its job: a command that starts processes of its own would wait for those."""

_PATH = "CKAVG_EVAL_DIR"
_QUOTED = re.compile(r"""\\.|'[^']*'|"(?:\\.|[^"\\])*"|\{dir\}""", re.DOTALL)


def check_command(command: str) -> None:
    """Refuse a command that does not say where the directory of the result goes.

    Raises:
        SettingError: it does not.
    """
    if DIRECTORY not in command:
        raise SettingError(
            f"eval is {command!r}; it must say with {DIRECTORY} where the directory of a result goes.",
            hint=f"For example: --eval 'python evaluate.py {DIRECTORY}'",
        )


def evaluate(directory: Path, command: str) -> Evaluation:
    """Run a command on a result, in a shell. What it prints to stderr is shown; a failure is told, never raised.

    Args:
        directory: of the result.
        command: for the shell; `{dir}` is replaced by the absolute path of the directory, quoted.
    """
    try:
        path = str(directory.absolute())
        done = subprocess.run(  # noqa: S602
            _with_directory(command, path),
            shell=True,
            stdout=subprocess.PIPE,
            stdin=subprocess.DEVNULL,
            check=False,
            env={name: value for name, value in os.environ.items() if not _JOB_VARIABLES.fullmatch(name)}
            | {_PATH: path},
        )
    except (OSError, ValueError) as error:
        return Evaluation(command, None, f"it could not be run: {error}")
    if done.returncode:
        return Evaluation(command, None, f"exit status {done.returncode}")
    value = last_number(done.stdout.decode(errors="replace"))
    if value is None:
        return Evaluation(command, None, "it printed no number")
    if not math.isfinite(value):
        return Evaluation(command, None, f"it printed {value}")
    return Evaluation(command, value)


def _with_directory(command: str, path: str) -> str:
    r"""The command with a path in the place of `{dir}`, within quotes and without.

    A path with characters that mean something to a shell is put in by the shell itself, which takes none of them for
    part of the command: in quotes of its own, or in the double ones that are there. Single ones are interrupted for it.

    >>> _with_directory("f {dir} '{dir}'", "/a"), _with_directory("f {dir} \"{dir}\" 'g {dir}'", "/$a b")
    ("f /a '/a'", 'f "${CKAVG_EVAL_DIR}" "${CKAVG_EVAL_DIR}" \'g \'"${CKAVG_EVAL_DIR}"\'\'')
    """
    if shlex.quote(path) == path:
        return command.replace(DIRECTORY, path)
    inside = {"'": f"""'"${{{_PATH}}}"'""", '"': f"${{{_PATH}}}"}
    return _QUOTED.sub(lambda part: part[0].replace(DIRECTORY, inside.get(part[0][0], f'"${{{_PATH}}}"')), command)


def record_evaluation(result: Record, evaluation: Evaluation, plan: Plan) -> Record:
    """Put an evaluation into the card and the record of a result, on the disk, too.

    A card that was edited since it was written stays as it is.

    Args:
        result: what was averaged.
        evaluation: what is said of it.
        plan: by which it was made; the card is written from it again.

    Raises:
        WriteError: the system would not let us; the record is as it was.
    """
    evaluated = dataclasses.replace(result, evaluation=evaluation)
    path = result.directory / RESULT_RECORD
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
    card = write_card(published(evaluated), plan.scheme, plan.origin, picture=picture).encode()
    write_bytes(path, card, follow=False)
    output = dataclasses.replace(output, sha256=output.sha256 | {CARD: sha256(card)})
    return dataclasses.replace(evaluated, outputs=(*snapshots, output))


def last_number(text: str) -> float | None:
    """The number that stands last in a text.

    >>> last_number("step 10: loss 1.52e-1, 7 s"), last_number("accuracy: 87.5%"), last_number("done")
    (7.0, 87.5, None)
    >>> last_number("loss=-0.5")
    -0.5
    """
    found = _NUMBER.findall(text)
    return float(found[-1]) if found else None


def best(evaluations: list[Evaluation | None], goal: str) -> int | None:
    """Index of the best of several evaluations, the first of equals; None where there is no number.

    Args:
        evaluations: of each result.
        goal: `min` or `max`.
    """
    values = {index: each.value for index, each in enumerate(evaluations) if each and each.value is not None}
    if not values:
        return None
    return min(values, key=values.__getitem__) if goal == "min" else max(values, key=values.__getitem__)
