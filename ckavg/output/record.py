"""The record of a result, `ckavg.json`: what was done, in numbers. It is written here, and read as an untrusted file.

A record is accepted only if every value has its type, lists have one length, steps ascend, and names stay inside their
directories. `verify/` checks whether its numbers are right.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Annotated, Any, Literal

from ckavg import __version__
from ckavg.checkpoints.checkpoint import RESULT_RECORD
from ckavg.errors import CkavgError, CombinedError, ReadError, RecordError, SettingError, raise_all, short_repr
from ckavg.output.staging import bring_back
from ckavg.schemes import SCHEMES, Scheme
from ckavg.storage.address import AddressPath, is_meant_for_address
from ckavg.storage.local import parse_json, read_small

if TYPE_CHECKING:
    from pydantic import TypeAdapter

    from ckavg import Pushed

RUN, BASE_MODEL = "RUN", "BASE_MODEL"
"""Placeholders in a record for a run, and for a base model, whose path is not relative to the result."""

MOST_BYTES = 32 << 20
"""Limit on a record. One of 200 checkpoints in 30 shards each, with as many snapshots, takes 2 MB."""

MOST_VALUES = 1_000_000
"""Limit on the values in a record: about 250 bytes each once parsed."""

ALL_OTHERS = 0.01
_LARGEST = 2**63
_SHOWN = 60
_MESSAGES = {"missing": "missing", "tuple_type": "a list", "dict_type": "an object", "dataclass_type": "an object"}
"""Our wording by pydantic's error types."""

_BEYOND_ASCII = re.compile("[^\n -~]")


def _is_plain(value: Any) -> bool:
    """Whether a text has no NUL, a number is finite, and an integer has at most 64 bits."""
    if isinstance(value, str):
        return "\0" not in value
    return isinstance(value, list) or (abs(value) < _LARGEST if type(value) is int else math.isfinite(value))


@dataclass(frozen=True, slots=True)
class _Must:
    """A constraint on a value: its wording, and its test. pydantic is imported when a record is read."""

    be: str
    kinds: tuple[type, ...]
    passes: Callable[[Any], object] = lambda value: True

    def __get_pydantic_core_schema__(self, source: object, handler: Callable[[object], Any]) -> Any:
        from pydantic_core import core_schema

        def check(value: object) -> object:
            if type(value) not in self.kinds or not _is_plain(value) or not self.passes(value):
                raise ValueError
            return value

        tested = core_schema.no_info_before_validator_function(check, handler(source))
        return core_schema.custom_error_schema(tested, "wrong", custom_error_message=self.be)


class _ToFirstError:
    """Report only the first wrong value of a list or an object: there may be a million."""

    @staticmethod
    def __get_pydantic_core_schema__(source: object, handler: Callable[[object], Any]) -> Any:
        return {**handler(source), "fail_fast": True}


def _is_plain_path(name: str) -> bool:
    """Whether this names a file inside a directory: a relative path in normal form without `..`."""
    path = PurePosixPath(name)
    return not (path.is_absolute() or ".." in path.parts or str(path) != name or name == "." or "\\" in name)


Text = Annotated[str, _Must("a text", (str,))]
Flag = Annotated[bool, _Must("true or false", (bool,))]
Whole = Annotated[int, _Must("a whole number", (int,))]
Count = Annotated[int, _Must("a whole number, 0 or more", (int,), lambda value: value >= 0)]
Number = Annotated[float, _Must("a finite number", (int, float))]
Digest = Annotated[str, _Must("64 hexadecimal digits", (str,), re.compile("[0-9a-f]{64}").fullmatch)]
FileName = Annotated[str, _Must("the plain path of a file inside its directory", (str,), _is_plain_path)]
Directory = Annotated[Path, _Must("a text", (str,))]
Place = Annotated[Path | str, _Must("a text", (str,))]
Parameter = Annotated[float | int | str, _Must("a finite number or a text", (float, int, str))]
Selected = Annotated[bool | int | str | tuple[int | str, ...], _Must("what an option takes", (bool, int, str, list))]
Accumulated = Annotated[str, _Must("float32 or float64", (str,), {"float32", "float64"}.__contains__)]
Lora = Annotated[Literal["factors", "product"], _Must("factors or product", (str,))]
ZeroSigma = Annotated[Literal["exclude", "eps"], _Must("exclude or eps", (str,))]
EvaluationGoal = Annotated[Literal["min", "max", ""], _Must("min, max or empty", (str,))]

Texts = Annotated[tuple[Text, ...], _ToFirstError]
Numbers = Annotated[tuple[Number, ...], _ToFirstError]
MaybeNumbers = Annotated[tuple[Number | None, ...], _ToFirstError]


@dataclass(frozen=True, slots=True)
class Input:
    """One checkpoint that took part.

    Attributes:
        step: its optimizer step.
        directory: its path or address.
        files: bytes of its weight files, by path relative to `directory`.
        checksum: of its averaged tensors, by `engine/checksums.py`; None if they were not read.
    """

    step: Whole
    directory: Place
    files: Annotated[dict[FileName, Count], _ToFirstError]
    checksum: Digest | None


@dataclass(frozen=True, slots=True)
class Output:
    """One written checkpoint.

    Attributes:
        name: its name.
        step: the optimizer step it stands for.
        directory: its path; an `AddressPath` for a result at an address.
        files: its files, by path relative to `directory`.
        sha256: SHA-256 of each file, except the record itself.
        discarded_energy: the part of the squared Frobenius norm lost where products of low-rank adapters were cut to a
            rank; else None.
    """

    name: Text
    step: Whole
    directory: Directory
    files: Annotated[tuple[FileName, ...], _ToFirstError]
    sha256: Annotated[dict[FileName, Digest], _ToFirstError]
    discarded_energy: Number | None = None


@dataclass(frozen=True, slots=True)
class Seconds:
    """Wall-clock time in seconds: pass 1, pass 2, and the total."""

    path: Number
    replay: Number
    total: Number


@dataclass(frozen=True, slots=True)
class Evaluation:
    """The evaluation of a result by the user's command.

    Attributes:
        command: as given, with `{dir}` in place of the result's directory.
        value: of the metric; None if the evaluation failed.
        problem: why there is no value, or no standard error though one was asked for; empty if nothing is wrong.
        metric: its name; empty if the last number printed counts.
        stderr: standard error of the value, if known.
        goal: `min` or `max`, whichever is better; empty in records of earlier versions.
        best_of: how many averages were compared by this value to choose this one; 0 if it was not chosen so.
        data: how much data was used, such as `4,096 tokens`; empty if the command does not say.
        last_value: value of the run's last checkpoint by the same command, if it was evaluated.
        last_stderr: standard error of `last_value`, if known.
    """

    command: Text
    value: Number | None
    problem: Text = ""
    metric: Text = ""
    stderr: Number | None = None
    goal: EvaluationGoal = ""
    best_of: Count = 0
    data: Text = ""
    last_value: Number | None = None
    last_stderr: Number | None = None


Curves = Sequence[tuple[str, Sequence[tuple[int, Evaluation]]]]
"""Evaluations by series, then by optimizer step. The series are the run's own checkpoints and the averages."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Record:
    """An average that was formed and written.

    Attributes:
        scheme: its name, such as `pema`.
        parameters: its hyper-parameters.
        ckavg_version: the version that made it.
        source: the directory or address that the checkpoints came from.
        selection: options that chose checkpoints, if not all of them.
        steps: optimizer step of every checkpoint that took part, the anchor first.
        anchor_step: optimizer step of θ_0.
        span: T = t_K − t_0 in optimizer steps.
        path_length: ℓ at every checkpoint; None where the scheme does not use it.
        path_length_error: standard error of each; None if ℓ is exact.
        betas: β of every update; None for the anchor and before.
        alphas: α of every update; None for schemes without a correction.
        weights: effective weight of every checkpoint; they sum to 1.
        effective_count: 1 / Σ w²: the number of equal weights with the same spread; None in older records, as are the
            next two.
        mean_age: Σ w_k (t_K − t_k) in optimizer steps, how far the average lags; negative if it leads.
        anchor_weight: weight of θ_0.
        path_kernel: what computed ℓ: `torch`, compiled `llvm` or, in older records, `numba`; None if it was not
            measured, or was cached.
        sample: the fraction of each tensor from which ℓ was estimated; 1 if it is exact.
        path_exclude: shell patterns of tensors excluded from ℓ.
        zero_sigma: how tensors without spread were treated.
        excluded_from_path: floating tensors that did not count in ℓ.
        parameters_counted: N, the scalars that did; None if ℓ was not measured.
        dtype: output dtype that was asked for.
        accumulate: dtype in which tensors were accumulated.
        allow_nonfinite: whether checkpoints with NaN or infinity were allowed.
        lora: how low-rank adapters were averaged: `factors` or `product`.
        rank: the rank to which averaged products were cut, if they were.
        uncorrected: running statistics that were averaged without the correction of the scheme.
        infinite: tensors with infinities, the same ones in all checkpoints and in the result.
        copied: floating tensors copied from the last checkpoint: not all checkpoints have them, or they never change.
        warnings: for the user.
        evaluation: by the user's command, if there was one.
        inputs: the checkpoints that took part, the anchor first.
        outputs: what was written: snapshots first, the average over all checkpoints last.
        bytes_read: bytes of checkpoints read.
        seconds: wall-clock time.
    """

    scheme: Text
    parameters: Annotated[dict[Text, Parameter], _ToFirstError]
    ckavg_version: Text = __version__
    source: Place
    selection: Annotated[dict[Text, Selected], _ToFirstError]
    steps: Annotated[tuple[Whole, ...], _ToFirstError]
    anchor_step: Whole
    span: Count
    path_length: Numbers | None
    path_length_error: Numbers | None
    betas: MaybeNumbers
    alphas: MaybeNumbers | None
    weights: Numbers
    effective_count: Number | None = None
    mean_age: Number | None = None
    anchor_weight: Number | None = None
    path_kernel: Text | None
    sample: Number
    path_exclude: Texts
    zero_sigma: ZeroSigma
    excluded_from_path: Texts
    parameters_counted: Count | None
    dtype: Text
    accumulate: Accumulated
    allow_nonfinite: Flag = False
    lora: Lora = "factors"
    rank: Count | None = None
    uncorrected: Texts = ()
    infinite: Texts = ()
    copied: Texts
    warnings: Texts
    evaluation: Evaluation | None
    inputs: Annotated[tuple[Input, ...], _ToFirstError]
    outputs: Annotated[tuple[Output, ...], _ToFirstError]
    bytes_read: Count
    seconds: Seconds

    def __repr__(self) -> str:
        return short_repr(self)

    def push_to_hub(self, repo: str, *, private: bool | None = None, **options: Any) -> Pushed:
        """Upload the result to the Hugging Face Hub: `ckavg.push` of its directory, with the same arguments."""
        from ckavg import push  # of a later room; the only such call

        return push(self.directory, repo, private=private, **options)

    @property
    def output(self) -> Output:
        """The entry of the result itself; those of its snapshots come before it."""
        return self.outputs[-1]

    @property
    def directory(self) -> Path:
        """The directory of the average."""
        return self.output.directory

    @property
    def output_index(self) -> int:
        """Index of the checkpoint after which the result was written: the last one, unless it is a snapshot."""
        return self.steps.index(self.output.step)

    @property
    def chosen(self) -> str:
        """The range options that chose the checkpoints: averages of one sweep may differ in them."""
        names = "every", "every_from", "from_step", "to_step", "last"
        ranges = {name: self.selection.get(name) for name in names}
        stated = [f"{name.replace('_', ' ')} {value}" for name, value in ranges.items() if value is not None]
        return ", ".join(stated) or "all checkpoints"

    @property
    def anchor_is_init(self) -> bool:
        """Whether θ_0 is a model given with `init`, not a checkpoint of the run."""
        return "init" in self.selection

    @property
    def is_mostly_anchor(self) -> bool:
        """Whether the average is practically θ_0."""
        return is_mostly_anchor(self.weights, self.steps.index(self.anchor_step), self.output_index)

    def to_scheme(self) -> Scheme:
        """The scheme with its hyper-parameters.

        Raises:
            RecordError: it is not known, or its parameters are not valid.
        """
        return scheme_from(self.scheme, self.parameters)

    def columns(self) -> dict[str, list[str]]:
        """The numbers of each checkpoint as text, by column: step, ℓ and α where there are any, β, weight."""
        numbers = {"ℓ": self.path_length, "β": self.betas, "α": self.alphas, "weight": self.weights}
        return {"step": [str(step) for step in self.steps]} | {
            name: ["" if value is None else f"{value:.4f}" for value in values]
            for name, values in numbers.items()
            if values is not None
        }

    def to_dict(self) -> dict[str, Any]:
        """The record as plain JSON values."""
        return dataclasses.asdict(self)

    def to_json(self) -> str:
        """The record as one JSON object."""
        return as_json(self.to_dict())

    def to_bytes(self) -> bytes:
        """The record as a file: `ckavg.json`."""
        return self.to_json().encode() + b"\n"


def is_mostly_anchor(weights: Sequence[float], start: int, last: int) -> bool:
    """Whether an average is practically its anchor: all other checkpoints together have at most 1 % of the weight.

    False if the anchor is the last checkpoint as well.
    """
    others = math.fsum(abs(weight) for place, weight in enumerate(weights) if place != start)
    return start < last and others <= ALL_OTHERS


def is_address(place: object) -> bool:
    """Whether a place is an address rather than a path on this machine."""
    return "://" in str(place)


def scheme_from(name: str, parameters: Mapping[str, Any]) -> Scheme:
    """The scheme of a name with these hyper-parameters, each converted to the type of its default.

    Raises:
        RecordError: the scheme is not known, or its parameters are not valid.
    """
    named = [scheme for scheme in SCHEMES if scheme.name == name] or _own_schemes(Scheme, name)  # type: ignore[type-abstract]
    if not named:
        raise RecordError(
            f"scheme is unknown: {name[:40]!r}.",
            hint="If it is a custom scheme, read the result in Python after importing its class.",
        )
    for scheme in named:
        defaults = {field.name: field.default for field in dataclasses.fields(scheme)}
        required = defaults.keys() - {*scheme.added_fields}
        if required <= parameters.keys() <= defaults.keys():
            try:
                return scheme(
                    **{
                        name: value
                        if isinstance(value, str) and name in scheme.repeatable
                        else _as_typed(value, defaults[name])
                        for name, value in parameters.items()
                    }
                )
            except (ValueError, SettingError) as error:
                raise RecordError(f"parameters do not fit {name}: {error}") from error
    raise RecordError(f"parameters are not those of {name}.")


def _own_schemes(base: type[Scheme], name: str) -> list[type[Scheme]]:
    """The custom schemes of a name, the newest first."""
    found = [each for kind in base.__subclasses__() for each in (*_own_schemes(kind, name), kind) if each.name == name]
    return found[::-1]


def as_json(value: object) -> str:
    """A JSON object as readable text, with everything escaped that a terminal would obey or cannot show."""
    text = json.dumps(value, indent=2, default=str, ensure_ascii=False, allow_nan=False)
    return _BEYOND_ASCII.sub(lambda found: found[0] if found[0].isprintable() else json.dumps(found[0])[1:-1], text)


def _as_typed(value: float | int | str, default: object) -> Any:
    kind = type(default)
    if kind is float and (value == "inf" or type(value) in (int, float)):
        return float(value)
    if type(value) is not kind:
        raise ValueError(f"{str(value)[:40]!r} must be of the type {kind.__name__}.")
    return value


def read_record(directory: Path) -> Record:
    """Read the record of a result. A result that a killed process had moved aside is moved back first.

    Raises:
        RecordError: there is no record, or it is invalid; all problems are listed.
        ReadError: it cannot be read.
    """
    if is_meant_for_address(directory):
        raise RecordError(
            f"{AddressPath(directory)} is not on this machine.",
            hint="Copy it here first. Only verify and diff download results.",
        )
    for place in (directory.parent, directory):  # if this is a snapshot, that is its result
        bring_back(place)
    path = directory / RESULT_RECORD
    try:
        data = read_small(path, MOST_BYTES)
    except (FileNotFoundError, NotADirectoryError) as error:
        raise RecordError(
            f"{directory} is not a result of ckavg: it has no {RESULT_RECORD}.",
            hint="Give the directory of a result, such as checkpoints/averaged/pema-gamma0.15.",
        ) from error
    except (OSError, ValueError) as error:
        why = error.strerror if isinstance(error, OSError) else error
        raise ReadError(
            f"{path} cannot be read: {why}.", hint="Check that it is a record and that you may read it."
        ) from error
    return parse_record(data, path)


def parse_record(data: bytes, path: object) -> Record:
    """The record in the content of a file; `path` is for messages.

    Raises:
        RecordError: it is invalid.
    """
    version = __version__
    try:
        fields = parse_fields(data)
        version = str(fields.get("ckavg_version", version))
        return _validated(fields)
    except CkavgError as error:
        hint = "The record was damaged or edited. Restore it from a copy, or make the average again."
        if version != __version__:
            hint = f"It was made by ckavg {version}; this is {__version__}. Use that version."
        raise RecordError(f"{path}: {error.message}", hint=hint) from error


def parse_fields(data: bytes) -> dict[str, Any]:
    """Parse a JSON object of limited size without duplicate keys.

    Raises:
        RecordError: it is not one.
    """
    if sum(map(data.count, (b",", b"[", b"{"))) > MOST_VALUES:
        raise RecordError(f"holds more than {MOST_VALUES:,} values.")
    try:
        value = parse_json(data)
    except (ValueError, RecursionError) as error:
        raise RecordError(f"is not JSON: {error}.") from error
    if not isinstance(value, dict):
        raise RecordError("is not a JSON object.")
    return value


@functools.cache
def _adapter() -> TypeAdapter[Record]:
    """The validator of records, made once: that takes 50 ms."""
    from pydantic import TypeAdapter

    return TypeAdapter(Record)


def _validated(fields: dict[str, Any]) -> Record:
    from pydantic import ValidationError

    try:
        record = _adapter().validate_python(fields)
    except ValidationError as error:
        found = error.errors(include_input=False)  # which would copy the whole record each time
        wrong = [_wrong(fields, each["loc"], _MESSAGES.get(each["type"], each["msg"])) for each in found]
        raise (CombinedError(wrong) if len(wrong) > 1 else wrong[0]) from error
    raise_all([RecordError(message) for is_wrong, message in _inconsistencies(record) if is_wrong])
    return record


def _wrong(fields: dict[str, Any], place: tuple[int | str, ...], message: str) -> RecordError:
    """The error that pydantic found at a place of a record."""
    names = (f"[{each}]" if isinstance(each, int) else f".{each[:_SHOWN]}" for each in place if each != "[key]")
    where = "".join(names).lstrip(".")
    if message == "missing":
        return RecordError(f"{where} is missing.")
    value: Any = fields
    for each in place:
        value = value[each] if each != "[key]" else place[-2]
    if isinstance(value, dict | list):
        shown = "a list" if isinstance(value, list) else "an object"
    elif type(value) is int and abs(value) >= _LARGEST:
        shown = "a huge number"
    else:
        shown = json.dumps(value)
    return RecordError(f"{where} is {shown if len(shown) <= _SHOWN else f'{shown[:_SHOWN]}…'}; it must be {message}.")


def _inconsistencies(record: Record) -> list[tuple[bool, str]]:
    """Possible inconsistencies between the values of a record, and whether each is present."""
    steps, outputs = record.steps, record.outputs
    if len(steps) < 2:
        return [(True, "steps has fewer than two entries.")]
    lists = (record.betas, record.weights, record.inputs, record.alphas, record.path_length)
    names = [output.name for output in outputs]
    return [
        (any(after <= before for before, after in itertools.pairwise(steps)), "steps are not ascending."),
        (
            any(each is not None and len(each) != len(steps) for each in lists),
            "steps, betas, weights, inputs, alphas and path_length differ in length.",
        ),
        (record.anchor_step not in steps, "anchor_step is not among the steps."),
        (tuple(each.step for each in record.inputs) != steps, "inputs[].step differs from steps."),
        (not all(each.files for each in record.inputs), "inputs[].files is empty."),
        (not outputs, "outputs is empty."),
        (not all(each.step in steps for each in outputs), "outputs[].step is not among the steps."),
        (len({each.step for each in outputs}) < len(outputs), "outputs[].step has a duplicate."),
        (len(outputs) > 1 and outputs[-1].step != steps[-1], "the last of outputs is not at the last step."),
        (
            any("/" in name or name in ("", ".", "..") for name in names[:-1]) or len(set(names)) < len(names),
            "outputs[].name is not a directory name, or has a duplicate.",
        ),
        (
            any({*each.sha256, RESULT_RECORD} != set(each.files) for each in outputs),
            f"outputs[].sha256 must list the files in outputs[].files except {RESULT_RECORD}.",
        ),
        (any(len(set(each.files)) < len(each.files) for each in outputs), "outputs[].files has a duplicate."),
        (
            record.path_length is not None and any(length < 0 for length in record.path_length),
            "path_length has a negative value.",
        ),
        (record.to_scheme().needs_path and record.path_length is None, "path_length is null."),
        (not 0 < record.sample <= 1, "sample is not in (0, 1]."),
    ]
