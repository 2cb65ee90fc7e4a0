"""Stage *verify*, first: `ckavg.json`, read as a file that anybody may have written. Opens nothing else.

A record is believed only where it is whole: every value of its kind, lists of one length, steps in order, and names
that stay inside their directories. Whether its numbers are right is for `arithmetic.py`.
"""

from __future__ import annotations

import dataclasses
import itertools
import stat
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar, cast

from ckavg import __version__
from ckavg.checkpoints.checkpoint import RESULT_RECORD
from ckavg.errors import CkavgError, ReadError, RecordError, SettingError, raise_all
from ckavg.output.leftovers import bring_back
from ckavg.output.record import Input, Output
from ckavg.path.table import ZeroSigma
from ckavg.schemes import SCHEMES, Scheme
from ckavg.storage.untrusted import read_small
from ckavg.verify import fields

MOST_BYTES = 32 << 20
"""Of a run of 200 checkpoints in 30 shards each, with as many snapshots, it takes 2 MB."""

Value = TypeVar("Value")


@dataclass(frozen=True, slots=True, kw_only=True)
class Record:
    """What a result says of itself, as far as it can be checked.

    Attributes:
        scheme: how it was averaged.
        output_index: the index of the checkpoint after which it was written; the last but for a snapshot.
        allow_nonfinite: whether NaN and infinity were let through.
        ckavg_version, source, anchor_is_init, steps, anchor_step, span, path_length, betas, alphas, weights, sample,
            path_exclude, zero_sigma, accumulate, uncorrected, infinite, copied, inputs, outputs: as of `Averaged`.
    """

    scheme: Scheme
    ckavg_version: str
    source: Path
    anchor_is_init: bool
    steps: tuple[int, ...]
    anchor_step: int
    span: int
    path_length: tuple[float, ...] | None
    betas: tuple[float | None, ...]
    alphas: tuple[float | None, ...] | None
    weights: tuple[float, ...]
    sample: float
    path_exclude: tuple[str, ...]
    zero_sigma: ZeroSigma
    accumulate: str
    allow_nonfinite: bool
    uncorrected: tuple[str, ...]
    infinite: tuple[str, ...]
    copied: tuple[str, ...]
    inputs: tuple[Input, ...]
    outputs: tuple[Output, ...]

    @property
    def output(self) -> Output:
        """The entry of the result itself; those of its snapshots come before it."""
        return self.outputs[-1]

    @property
    def output_index(self) -> int:
        """Index of the checkpoint after which the result was written."""
        return self.steps.index(self.output.step)


def read_record(directory: Path) -> Record:
    """Read the record of a result; one that a killed process had moved aside gets its name back first.

    Raises:
        RecordError: there is none, or it is not what a record must be; all that is wrong is listed.
        ReadError: the system would not let us read it.
    """
    for place in (directory.parent, directory):  # the result, perhaps, of which this is a snapshot
        bring_back(place)
    path = directory / RESULT_RECORD
    data = _read(directory, path)
    try:
        return _record(fields.parsed(data))
    except CkavgError as error:
        raise RecordError(f"{path}: {error.message}", hint=error.hint or _hint(data)) from error


def _read(directory: Path, path: Path) -> bytes:
    try:
        if not directory.is_dir():
            raise RecordError(f"{directory} is not a directory.", hint="Name the directory of a result.")
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):
            raise RecordError(f"{path} is not a file.", hint="Name the directory of a result.")
        if status.st_size > MOST_BYTES:
            raise RecordError(
                f"{path} is {status.st_size:,} bytes long; a record is at most {MOST_BYTES:,}.",
                hint="It is not the record of a result.",
            )
        return read_small(path, MOST_BYTES)
    except FileNotFoundError as error:
        raise RecordError(
            f"{directory} is not a result of ckavg: it holds no {RESULT_RECORD}.",
            hint="Name the directory of a result, such as checkpoints/averaged/pema-gamma0.15.",
        ) from error
    except (OSError, ValueError) as error:
        told = error.strerror if isinstance(error, OSError) else error
        raise ReadError(f"{path} cannot be read: {told}.", hint="Check that you may read it.") from error


def _hint(data: bytes) -> str:
    """Another version may keep another record."""
    try:
        version = fields.member(fields.parsed(data), "ckavg_version", fields.text)
    except CkavgError:
        version = __version__
    if version == __version__:
        return "The record was damaged or edited. Take it from a copy, or form the average again."
    return f"It was made with ckavg {version}; this is {__version__}. Verify it with that version."


def _record(value: dict[str, Any]) -> Record:
    errors: list[CkavgError] = []

    def take(name: str, each: fields.Reader[Value], default: Any = None) -> Value:
        try:
            return fields.member({name: default} | value if default is not None else value, name, each)
        except CkavgError as error:
            errors.append(error)
            return cast(Value, None)  # never seen: errors are raised below

    numbers, maybe_numbers = fields.sequence(fields.number), fields.sequence(fields.optional(fields.number))
    scheme_name, parameters = take("scheme", fields.text), take("parameters", _parameters)
    found: dict[str, Any] = {
        "ckavg_version": take("ckavg_version", fields.text),
        "source": take("source", _path),
        "anchor_is_init": "init" in (take("selection", fields.table(fields.text, _anything)) or {}),
        "steps": take("steps", fields.sequence(fields.whole)),
        "anchor_step": take("anchor_step", fields.whole),
        "span": take("span", fields.count),
        "path_length": take("path_length", fields.optional(numbers)),
        "betas": take("betas", maybe_numbers),
        "alphas": take("alphas", fields.optional(maybe_numbers)),
        "weights": take("weights", numbers),
        "sample": take("sample", fields.number),
        "path_exclude": take("path_exclude", fields.sequence(fields.text)),
        "zero_sigma": take("zero_sigma", fields.one_of("exclude", "eps")),
        "accumulate": take("accumulate", fields.one_of("float32", "float64")),
        "allow_nonfinite": take("allow_nonfinite", fields.flag, default=False),
        "uncorrected": take("uncorrected", fields.sequence(fields.text), default=[]),
        "infinite": take("infinite", fields.sequence(fields.text), default=[]),
        "copied": take("copied", fields.sequence(fields.text)),
        "inputs": take("inputs", fields.sequence(_input)),
        "outputs": take("outputs", fields.sequence(_output)),
    }
    raise_all(errors)
    record = Record(scheme=_scheme(scheme_name, parameters), **found)
    raise_all([RecordError(message) for is_wrong, message in _inconsistencies(record) if is_wrong])
    return record


def _anything(value: Any, where: str) -> object:
    return value


def _path(value: Any, where: str) -> Path:
    return Path(fields.text(value, where))


def _parameters(value: Any, where: str) -> dict[str, float | int | str]:
    def parameter(value: Any, where: str) -> float | int | str:
        if type(value) is int:
            return fields.whole(value, where)
        return value if isinstance(value, str) else fields.number(value, where)

    return fields.table(fields.text, parameter)(value, where)


def _input(value: Any, where: str) -> Input:
    return Input(
        fields.member(value, "step", fields.whole, where),
        fields.member(value, "directory", _path, where),
        fields.member(value, "files", fields.table(fields.file_name, fields.count), where),
        fields.member(value, "checksum", fields.optional(fields.digest), where),
    )


def _output(value: Any, where: str) -> Output:
    return Output(
        fields.member(value, "name", fields.text, where),
        fields.member(value, "step", fields.whole, where),
        fields.member(value, "directory", _path, where),
        fields.member(value, "files", fields.sequence(fields.file_name), where),
        fields.member(value, "sha256", fields.table(fields.file_name, fields.digest), where),
    )


def _scheme(name: str, parameters: dict[str, float | int | str]) -> Scheme:
    """The scheme with this name and these parameters, each of the type of its default."""
    candidates = [scheme for scheme in SCHEMES if scheme.name == name]
    if not candidates:
        raise RecordError(f"scheme is {name[:40]!r}, which is not known.")
    for scheme in candidates:
        defaults = {field.name: field.default for field in dataclasses.fields(scheme)}
        if defaults.keys() == parameters.keys():
            try:
                typed = {key: _typed(value, type(defaults[key])) for key, value in parameters.items()}
                return scheme(**typed)
            except (ValueError, SettingError) as error:
                raise RecordError(f"parameters do not fit {name}: {error}") from error
    raise RecordError(f"parameters are not those of {name}.")


def _typed(value: float | int | str, kind: type) -> Any:
    if kind is float and (value == "inf" or type(value) in (int, float)):
        return float(value)
    if type(value) is not kind:
        raise ValueError(f"{str(value)[:40]!r} must be of the type {kind.__name__}.")
    return value


def _inconsistencies(record: Record) -> list[tuple[bool, str]]:
    """What must not be between the values of a record, and whether it is."""
    steps, outputs = record.steps, record.outputs
    if len(steps) < 2:
        return [(True, "steps holds fewer than two checkpoints.")]
    lists = (record.betas, record.weights, record.inputs, record.alphas, record.path_length)
    names = [output.name for output in outputs]
    return [
        (any(after <= before for before, after in itertools.pairwise(steps)), "steps are not ascending."),
        (
            any(each is not None and len(each) != len(steps) for each in lists),
            "steps, betas, weights, inputs, alphas and path_length are not of one length.",
        ),
        (record.anchor_step not in steps, "anchor_step is not among the steps."),
        (tuple(each.step for each in record.inputs) != steps, "inputs are not of the steps in steps."),
        (not all(each.files for each in record.inputs), "inputs[].files is empty."),
        (not outputs, "outputs is empty."),
        (not all(each.step in steps for each in outputs), "outputs[].step is not among the steps."),
        (len({each.step for each in outputs}) < len(outputs), "outputs[].step is there twice."),
        (len(outputs) > 1 and outputs[-1].step != steps[-1], "the last of outputs is not of the last step."),
        (
            any("/" in name or name in ("", ".", "..") for name in names[:-1]) or len(set(names)) < len(names),
            "outputs[].name is no name of a directory, or appears twice.",
        ),
        (
            any({*each.sha256, RESULT_RECORD} != set(each.files) for each in outputs),
            f"outputs[].sha256 is not of the files in outputs[].files but {RESULT_RECORD}.",
        ),
        (any(len(set(each.files)) < len(each.files) for each in outputs), "outputs[].files names one twice."),
        (
            record.path_length is not None and any(length < 0 for length in record.path_length),
            "path_length holds a negative number.",
        ),
        (record.scheme.needs_path and record.path_length is None, "path_length is null."),
        (not 0 < record.sample <= 1, "sample is no fraction in (0, 1]."),
    ]
